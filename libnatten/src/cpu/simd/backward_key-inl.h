#pragma once

// Gradients of a block of keys and of their values.

#include "exp-inl.h"
#include "scores-inl.h"

namespace natten::detail::cpu::simd {
namespace {

template <class F, class T = typename F::Sum>
void backward_key(const BackwardKey<T>& f) {
  const Block<T>& block = f.block;
  const Walk<T> walk(block);
  T* weights = block.scratch;
  T* grads = weights + kMostVectors * kScores<T>;
  for_each_batch(walk, [&](const Batch& batch) {
    column_products<F>(walk, batch, f.key, &Line<T>::transposed, block.dim, block.padded, weights,
                       block.scale);
    column_products<F>(walk, batch, f.value, &Line<T>::transposed_grad, block.value_dim,
                       block.value_padded, grads);
    for (int v = 0; v < block.vectors; ++v) {
      T* w = weights + v * kScores<T>;
      T* g = grads + v * kScores<T>;
      finish_scores(walk, batch, v, w);
      for_each_step(
          walk, batch, v, [&](std::int64_t offset, const Line<T>& line, std::int64_t step) {
            const Vector<T> weight = exp<T>(load(w + offset) - walk.read(line.logsumexp, v, step));
            store(w + offset, weight);
            store(g + offset, weight * (load(g + offset) - walk.read(line.row_term, v, step)));
          });
      // Stacked rows read what they see, each by itself, but for the other one of a pair.
      if (block.adjacent || F::kCount > 1) {
        set_unseen(walk, batch, v, w, T(0));
        set_unseen(walk, batch, v, g, T(0));
      }
      finish_weights<F>(walk, batch, v, w);
      finish_weights<F>(walk, batch, v, g);
    }
    row_products<F>(walk, batch, weights, &Line<T>::plain, block.value_padded, f.grad_value);
    row_products<F>(walk, batch, grads, &Line<T>::plain_grad, block.padded, f.grad_key);
  });
}

}  // namespace
}  // namespace natten::detail::cpu::simd
