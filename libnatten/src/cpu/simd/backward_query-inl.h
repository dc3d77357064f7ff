#pragma once

// Gradients from a block of queries: theirs, those of biases and of additional tokens.

#include "exp-inl.h"
#include "scores-inl.h"

namespace natten::detail::cpu::simd {
namespace {

/// Adds gradients of scores to those of the biases, those of a vector's steps at once.
template <class T>
NATTEN_INLINE void add_to_bias(const Walk<T>& walk, const Batch& batch, int v, const T* grads) {
  constexpr int kW = kWidth<T>;
  for_each_line(walk, batch, v, [&](const Line<T>& line, std::int64_t at) {
    for (std::int64_t step = batch.step0; step < batch.step1; step += kW) {
      Vector<T> square[kW];
      for (int i = 0; i < kW; ++i)
        square[i] = step + i < batch.step1 ? load(grads + (at + step + i) * kW) : Vector<T>{};
      transpose<T>(square);  // now by row
      Vector<T> sums{}, after{};
      for (int row = 0; row < walk.rows_of(v); ++row) {
        if (walk.access != Access::permuted) {
          sums += square[row];
          continue;
        }
        const Ints<T> from = lanes<T>() - walk.bias_index[row];
        const Vector<T> moved = permute<T>(square[row], from & (kW - 1));
        sums += from >= 0 ? moved : Vector<T>{};
        after += from < 0 ? moved : Vector<T>{};
      }
      T* to = line.grad_bias + walk.bias_at(v, step);
      store(to, load(to) + sums);
      if (walk.access == Access::permuted) store(to + kW, load(to + kW) + after);
    }
  });
}

template <class F, class T = typename F::Sum>
void backward_query(const BackwardQuery<T>& f) {
  const Block<T>& block = f.block;
  const Walk<T> walk(block);
  constexpr std::int64_t kBatch = kMostVectors * kScores<T>;
  // Both rounds at once need all steps in one batch.
  const bool at_once = f.sum_row_term && f.sum_gradients && fits_at_once(walk);
  const std::int64_t most_steps = at_once ? kMostStepsAtOnce : kBatchSteps;
  const bool sums_columns = block.lines->grad_key || block.lines->grad_value;
  // The weights of a row sum up to 1 only as well as its logsumexp is rounded, which is the worse
  // the larger scores are. With the quotient the gradients of a row's scores still sum up to 0.
  const auto finish_row_term = [&](int v) {
    const std::int64_t row = v * block.vector_stride;
    store(f.row_term + row,
          load(f.row_term + row) / load(f.total + row) - load(f.grad_logsumexp + row));
  };
  for (int round = 0; round < 2; ++round) {
    std::int64_t number = 0;  // of the batch
    const bool sums_row_term = round == 0 && f.sum_row_term;
    const bool sums_gradients = round == 0 ? at_once : f.sum_gradients && !at_once;
    if (!sums_row_term && !sums_gradients) continue;
    for_each_batch(walk, most_steps, [&](const Batch& batch) {
      // Weights of one of several batches leave room for their gradients.
      static_assert(2 * kBatchSteps <= kMostStepsAtOnce);
      const bool is_kept = !at_once && number < f.kept_batches;
      T* weights = is_kept ? f.kept + number * kBatch : block.scratch;
      T* grads = weights + (is_kept ? kBatchSteps * kWidth<T> : kBatch);
      const bool is_computed = is_kept && round == 1;
      ++number;
      if (!is_computed) {
        column_products<F>(walk, batch, f.query, &Line<T>::transposed, block.dim, block.padded,
                           weights, block.scale);
        column_products<F>(walk, batch, f.grad_output, &Line<T>::transposed_grad, block.value_dim,
                           block.value_padded, grads);
      }
      for (int v = 0; v < block.vectors; ++v) {
        T* w = weights + v * kScores<T>;
        T* g = grads + v * kScores<T>;
        const std::int64_t first_row = v * block.vector_stride;
        if (!is_computed) {
          const Vector<T> logsumexp = load(f.logsumexp + first_row);
          Vector<T> sum{}, total{};
          finish_scores(walk, batch, v, w);
          set_unseen(walk, batch, v, w, -kInfinity<T>);
          set_unseen(walk, batch, v, g, T(0));
          for_each_product(walk, batch, v, [&](std::int64_t offset) {
            const Vector<T> weight = exp<T>(load(w + offset) - logsumexp);
            store(w + offset, weight);
            sum += weight * load(g + offset);
            total += weight;
          });
          if (sums_row_term) {
            store(f.row_term + first_row, load(f.row_term + first_row) + sum);
            store(f.total + first_row, load(f.total + first_row) + total);
          }
        }
        if (at_once) finish_row_term(v);
        if (!sums_gradients) continue;
        const Vector<T> row_term = load(f.row_term + first_row);
        for_each_product(walk, batch, v, [&](std::int64_t offset) {
          store(g + offset, load(w + offset) * (load(g + offset) - row_term));
        });
        if (block.lines->grad_bias) add_to_bias(walk, batch, v, g);
        if (!sums_columns) continue;
        // Some rows at a time are multiplied with some columns, which not all of them see. Stacked
        // rows read what they see, each by itself.
        clear_padding(batch, w);
        clear_padding(batch, g);
        if (!block.adjacent) continue;
        set_unseen(walk, batch, v, w, T(0));
        set_unseen(walk, batch, v, g, T(0));
      }
      if (!sums_gradients) return;
      if (sums_columns) {
        const auto sum = [&](const T* of, T scale, const T* plain, std::int64_t padded,
                             T* Line<T>::*sums) {
          if constexpr (F::kCount > 1) {
            T* pairs = block.scratch + 2 * kBatch;
            for (int v = 0; v < block.vectors; ++v)
              pair_rows<F>(walk, batch, v, of + v * kScores<T>, pairs + v * kScores<T>, scale);
            of = pairs;
          }
          column_sums<F>(walk, batch, of, plain, padded, sums);
        };
        sum(grads, block.scale, f.plain_query, block.padded, &Line<T>::grad_key);
        sum(weights, T(1), f.plain_grad_output, block.value_padded, &Line<T>::grad_value);
      }
      for (int v = 0; v < block.vectors; ++v)
        finish_weights<F>(walk, batch, v, grads + v * kScores<T>);
      row_products<F>(walk, batch, grads, &Line<T>::plain_grad, block.padded, f.grad_query);
    });
    if (round == 0 && f.sum_gradients && !at_once)
      for (int v = 0; v < block.vectors; ++v) finish_row_term(v);
  }
}

}  // namespace
}  // namespace natten::detail::cpu::simd
