#pragma once

// The unfused operations, whose weights are in memory.

#include "conversions-inl.h"
#include "scores-inl.h"

namespace natten::detail::cpu::simd {
namespace {

/// Copies a batch's weights between the scratch, [step][row], and Weights, [row][slot]. Reads those
/// of the batch alone, for they may lie in a tensor; writes to a vector's end.
template <bool kToScratch, class T>
NATTEN_INLINE void copy_weights(const Walk<T>& walk, const Batch& batch, const Weights<T>& w) {
  constexpr int kW = kWidth<T>;
  for (int v = 0; v < walk.block.vectors; ++v) {
    const std::int64_t* first_slot = walk.block.first_slot + (walk.block.adjacent ? v * kW : 0);
    bool by_square = walk.all_low[walk.of(v)] == 0 && walk.all_high[walk.of(v)] == walk.count;
    for (int row = 1; row < walk.rows_of(v); ++row)
      by_square = by_square && first_slot[row] == first_slot[0];
    for (std::int64_t l = batch.line0; l < batch.line1; ++l) {
      const Line<T>& line = walk.block.lines[l];
      if (v < line.first_vector || v >= line.last_vector) continue;
      T* in_scratch = w.block.scratch + v * kScores<T> + batch.at(l) * kW;
      T* by_row = w.weights + v * w.vector_stride + line.weights[v];
      if (by_square) {
        by_row += first_slot[0];
        for (std::int64_t step = batch.step0; step < batch.step1; step += kW) {
          const std::int64_t count = min(kW, batch.step1 - step);
          Vector<T> square[kW];
          if constexpr (kToScratch) {
            // Rows of padding are the last one again: what is added to them is never read.
            for (int i = 0; i < kW; ++i) {
              const T* from = by_row + min(i, walk.rows_of(v) - 1) * w.stride + step;
              square[i] = count == kW ? load(from) : read_part<Same<T>>(from, count);
            }
            transpose<T>(square);
            for (int i = 0; i < count; ++i) store(in_scratch + (step + i) * kW, square[i]);
          } else {
            for (int i = 0; i < kW; ++i)
              square[i] = load(in_scratch + (step + min(i, count - 1)) * kW);
            transpose<T>(square);
            const Ints<T> in_range = lanes<T>() < static_cast<typename VectorOf<T>::Int>(count);
            for (int i = 0; i < kW; ++i) {
              T* to = by_row + i * w.stride + step;
              store(to, in_range ? square[i] : load(to));
            }
          }
        }
        continue;
      }
      for (int row = 0; row < walk.rows_of(v); ++row, by_row += w.stride) {
        const std::int64_t low = walk.low[walk.of(v)][row];
        const std::int64_t end = min(walk.high[walk.of(v)][row], batch.step1);
        for (std::int64_t step = max(low, batch.step0); step < end; ++step) {
          T& weight = in_scratch[step * kW + row];
          T& in_row = by_row[first_slot[row] + step - low];
          if constexpr (kToScratch)
            weight = in_row;
          else
            in_row = weight;
        }
      }
    }
  }
}

template <class T>
void score(const Weights<T>& w) {
  const Walk<T> walk(w.block);
  for_each_batch(walk, [&](const Batch& batch) {
    T* scores = w.block.scratch;
    column_products<Single<T>>(walk, batch, w.rows, &Line<T>::transposed, w.block.dim,
                               w.block.padded, scores);
    for (int v = 0; v < w.block.vectors; ++v)
      finish_scores(walk, batch, v, scores + v * kScores<T>, w.hidden_score);
    copy_weights<false>(walk, batch, w);
  });
}

template <class T>
void weigh(const Weights<T>& w) {
  const Walk<T> walk(w.block);
  for_each_batch(walk, [&](const Batch& batch) {
    // Rows of a vector share columns that not all of them see.
    if (w.block.adjacent)
      for (int v = 0; v < w.block.vectors; ++v)
        for (std::int64_t i = 0; i < (batch.line1 - batch.line0) * batch.per_line(); ++i)
          store(w.block.scratch + v * kScores<T> + i * kWidth<T>, Vector<T>{});
    copy_weights<true>(walk, batch, w);
    if (w.block.lines->hidden)  // their weights may be no numbers
      for (int v = 0; v < w.block.vectors; ++v)
        for_each_step(walk, batch, v,
                      [&](std::int64_t offset, const Line<T>& line, std::int64_t step) {
                        T* at = w.block.scratch + v * kScores<T> + offset;
                        const Vector<T> hidden = walk.read(line.hidden, v, step);
                        store(at, hidden == 0 ? load(at) : Vector<T>{});
                      });
    row_products<Single<T>>(walk, batch, w.block.scratch, &Line<T>::plain, w.block.padded, w.sums);
  });
}

}  // namespace
}  // namespace natten::detail::cpu::simd
