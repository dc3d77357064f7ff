#pragma once

// From products to scores: biases, and what a row does not see.

#include "walk-inl.h"

namespace natten::detail::cpu::simd {
namespace {

struct True {
  static constexpr bool value = true;
};
struct False {
  static constexpr bool value = false;
};

/// Calls f<true> where the products of a vector's batch are its scores as they are: without biases
/// or a mask, and with nothing that a row does not see.
template <class T, class F>
NATTEN_INLINE void with_kind_of_scores(const Walk<T>& walk, const Batch& batch, int v, F&& f) {
  if (!walk.block.lines->bias && !walk.block.lines->hidden && walk.sees_all(v, batch.step0) &&
      walk.sees_all(v, batch.step1 - 1))
    f(True{});
  else
    f(False{});
}

/// The score of a step: adds the bias, and sets what a row does not see to -inf, what is hidden to
/// `hidden_score`.
template <bool kPlain, class T>
NATTEN_INLINE Vector<T> finish_score(const Walk<T>& walk, const Line<T>& line, int v,
                                     std::int64_t step, Vector<T> score,
                                     T hidden_score = -kInfinity<T>) {
  if constexpr (kPlain) return score;
  if (line.bias) {
    const T* bias = line.bias + walk.bias_at(v, step);
    score += walk.access == Access::permuted ? permute<T>(load(bias), walk.bias_index)
                                             : broadcast<T>(*bias);
  }
  if (line.hidden)
    score = walk.read(line.hidden, v, step) == 0 ? score : broadcast<T>(hidden_score);
  if (!walk.sees_all(v, step)) score = walk.mask(v, step) ? score : broadcast<T>(-kInfinity<T>);
  return score;
}

}  // namespace
}  // namespace natten::detail::cpu::simd
