#pragma once

// The forward pass of fused attention.

#include "exp-inl.h"
#include "scores-inl.h"

namespace natten::detail::cpu::simd {
namespace {

template <class F, class T = typename F::Sum>
void forward(const Forward<T>& f) {
  constexpr int kW = kWidth<T>;
  const Block<T>& block = f.block;
  const Walk<T> walk(block);
  for_each_batch(walk, [&](const Batch& batch) {
    column_products<F>(walk, batch, f.query, &Line<T>::transposed, block.dim, block.padded,
                       block.scratch, block.scale);
    for (int v = 0; v < block.vectors; ++v) {
      T* scores = block.scratch + v * kScores<T>;
      const std::int64_t first_row = v * block.vector_stride;
      const Vector<T> before = load(f.largest + first_row);
      Vector<T> largest = before;
      finish_scores(walk, batch, v, scores);
      set_unseen(walk, batch, v, scores, -kInfinity<T>);
      for_each_product(walk, batch, v, [&](std::int64_t offset) {
        const Vector<T> score = load(scores + offset);
        largest = score > largest ? score : largest;
      });
      // Where a row sees nothing yet all weights are 0, not exp(-inf + inf).
      const Vector<T> reference = largest == -kInfinity<T> ? Vector<T>{} : largest;
      Vector<T> total{};
      for_each_product(walk, batch, v, [&](std::int64_t offset) {
        const Vector<T> weight = exp<T>(load(scores + offset) - reference);
        store(scores + offset, weight);
        total += weight;
      });
      finish_weights<F>(walk, batch, v, scores);
      const Vector<T> shrink = exp<T>(before - reference);
      store(f.total + first_row, load(f.total + first_row) * shrink + total);
      store(f.largest + first_row, largest);
      for (int row = 0; row < walk.rows_of(v); ++row) {
        if (before[row] == -kInfinity<T> || before[row] == largest[row]) continue;
        T* sums = f.sums + (first_row + row) * block.value_padded;
        for (std::int64_t d = 0; d < block.value_padded; d += kW)
          store(sums + d, load(sums + d) * shrink[row]);
      }
    }
    row_products<F>(walk, batch, block.scratch, &Line<T>::plain, block.value_padded, f.sums);
  });
}

template <class T>
void finish(T* largest, T* total, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += kWidth<T>) {
    const Vector<T> sum = load(total + i);
    store(largest + i, load(largest + i) + log<T>(sum));
    // A row whose scores all are -inf has no weights to divide.
    store(total + i, sum == 0 ? Vector<T>{} : 1 / sum);
  }
}

}  // namespace
}  // namespace natten::detail::cpu::simd
