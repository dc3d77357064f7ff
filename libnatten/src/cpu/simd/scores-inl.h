#pragma once

// From products to scores: biases, and what a row does not see.

#include "walk-inl.h"

namespace natten::detail::cpu::simd {
namespace {

/// Sets what rows of a vector do not see to `value`. The steps are the same ones in each line.
template <class T>
NATTEN_INLINE void set_unseen(const Walk<T>& walk, const Batch& batch, int v, T* products,
                              T value) {
  if (walk.sees_all(v, batch.step0) && walk.sees_all(v, batch.step1 - 1)) return;
  const Vector<T> values = broadcast<T>(value);
  for (std::int64_t step = batch.step0; step < batch.step1; ++step) {
    if (walk.sees_all(v, step)) continue;
    const Ints<T> mask = walk.mask(v, step);
    for (std::int64_t l = batch.line0; l < batch.line1; ++l) {
      const Line<T>& line = walk.block.lines[l];
      if (v < line.first_vector || v >= line.last_vector) continue;
      T* at = products + (batch.at(l) + step) * kWidth<T>;
      store(at, mask ? load(at) : values);
    }
  }
}

/// Makes scores of a vector's products: adds biases, and sets those of hidden columns to
/// `hidden_score`.
template <class T>
NATTEN_INLINE void finish_scores(const Walk<T>& walk, const Batch& batch, int v, T* scores,
                                 T hidden_score = -kInfinity<T>) {
  if (!walk.block.lines->bias && !walk.block.lines->hidden) return;
  for_each_step(walk, batch, v, [&](std::int64_t offset, const Line<T>& line, std::int64_t step) {
    Vector<T> score = load(scores + offset);
    if (line.bias) {
      const T* bias = line.bias + walk.bias_at(v, step);
      score += walk.access == Access::permuted ? permute<T>(load(bias), walk.bias_index)
                                               : broadcast<T>(*bias);
    }
    if (line.hidden)
      score = walk.read(line.hidden, v, step) == 0 ? score : broadcast<T>(hidden_score);
    store(scores + offset, score);
  });
}

}  // namespace
}  // namespace natten::detail::cpu::simd
