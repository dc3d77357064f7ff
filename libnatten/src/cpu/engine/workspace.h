#pragma once

#include <algorithm>
#include <limits>

#include "../../backend.h"
#include "work.h"

namespace natten::detail::cpu::engine {

/// What weights are exp(score - ...) of: where all scores are -inf, and logsumexp with them, there
/// are none.
template <class T>
T weights_reference(T logsumexp) {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  return logsumexp == -kInfinity ? kInfinity : logsumexp;
}

/// The workspace of a backward call: a row term per query and head, [B, H, queries], then the
/// partial sums, [B, H, units], of biases, additional keys and additional values.
template <class T>
class Workspace {
 public:
  /// `plan` has the partial sums: that of the gradients of queries, or one that uses row terms
  /// alone.
  Workspace(const Job& job, const Plan& plan)
      : row_terms_(row_term_operand(plan.problem(), static_cast<T*>(job.workspace))),
        partial_sums_(row_terms_.data + plan.problem().batch * row_terms_.batch),
        heads_(plan.problem().heads),
        units_(plan.units),
        partial_(plan.partial),
        additional_keys_(plan.problem().additional * plan.padded) {}

  /// In elements.
  static std::int64_t size(const Plan& plan) {
    const Problem& p = plan.problem();
    return p.batch * p.heads * (p.queries() + plan.units * plan.partial.elements());
  }

  T* row_term(std::int64_t batch, std::int64_t head, const Coordinate& token) const {
    return row_terms_.at(batch, head, token);
  }
  T* partial_sums(std::int64_t batch, std::int64_t head, std::int64_t unit) const {
    return partial_sums_ + ((batch * heads_ + head) * units_ + unit) * partial_.elements();
  }
  void clear_partial_sums(const Work& work) const {
    for (std::int64_t h = 0; h < work.head_count; ++h)
      std::fill_n(partial_sums(work.batch, work.first_head + h, work.unit), partial_.elements(),
                  T(0));
  }

  // The partial sums of the head whose turn it is; null where there are none.
  T* grad_bias(const Work& work) const { return partial_.bias ? of(work) + kBiasPadding : nullptr; }
  T* grad_additional_keys(const Work& work) const {
    return partial_.additional ? of(work) + partial_.bias : nullptr;
  }
  T* grad_additional_values(const Work& work) const {
    return partial_.additional ? of(work) + partial_.bias + additional_keys_ : nullptr;
  }

  /// Adds up an element of the partial sums of some heads of one batch entry, all their units.
  double sum(std::int64_t batch, std::int64_t first_head, std::int64_t heads,
             std::int64_t element) const {
    double sum = 0;
    const T* from = partial_sums(batch, first_head, 0) + element;
    for (std::int64_t unit = 0; unit < heads * units_; ++unit, from += partial_.elements())
      sum += static_cast<double>(*from);
    return sum;
  }

 private:
  T* of(const Work& work) const {
    return partial_sums(work.batch, work.first_head + work.head, work.unit);
  }

  Operand<T> row_terms_;
  T* partial_sums_;
  std::int64_t heads_;
  std::int64_t units_;
  PartialSums partial_;
  std::int64_t additional_keys_;  // elements
};

}  // namespace natten::detail::cpu::engine
