#pragma once

#include <vector>

#include "../../backend.h"
#include "../parallel.h"
#include "arena.h"
#include "work.h"

namespace natten::detail::cpu::engine {

/// Tables of biases as the kernels read them: converted, of the heads at hand. Where rows are keys,
/// columns run against the offset: the innermost dimension is reversed.
template <class E>
class BiasTables {
 public:
  using T = StatisticOf<E>;

  BiasTables(const Job& job, const Plan& plan)
      : biases_(operand<const E>(job.problem, job.tensors, &Tensors::rpb)),
        shape_(relative_positions(job.problem)),
        elements_(bias_elements(job.problem)),
        is_reversed_(rows_are_keys(plan.kind())) {}

  explicit operator bool() const { return bool(biases_); }

  void take(Arena& arena, const Plan& plan) {
    tables_ = arena.take<T>(biases_ ? plan.row_heads * elements_ : 0);
    loaded_head_ = -1;
  }

  /// Makes the tables of the heads at hand, if they are not there.
  void load(const Work& work) {
    if (loaded_head_ == work.query_head) return;
    loaded_head_ = work.query_head;
    for (std::int64_t h = 0; h < work.head_count; ++h) {
      T* to = table(h);
      Coordinate at{};
      for (at[0] = 0; at[0] < shape_[0]; ++at[0])
        for (at[1] = 0; at[1] < shape_[1]; ++at[1], to += shape_[2]) {
          const E* from = biases_.at(0, work.query_head + h, at);
          for (std::int64_t i = 0; i < shape_[2]; ++i)
            to[is_reversed_ ? shape_[2] - 1 - i : i] = static_cast<T>(from[i * biases_.grid[2]]);
        }
    }
  }

  /// Elements from the biases for one line of rows to those for the next: it is one line further,
  /// or nearer.
  std::int64_t stride() const { return is_reversed_ ? shape_[2] : -shape_[2]; }

  /// Gives a line of columns its biases; `grad_bias` is a table of their gradients, or null.
  void set(simd::Line<T>& line, const Plan& plan, const Work& work, const Coordinate& position,
           T* grad_bias) const {
    const Axis* axes = plan.problem().axes;
    std::int64_t at[2];  // of the line's distance from the first line of rows, in the table
    for (int i = 0; i < 2; ++i) {
      const std::int64_t distance = position[i] - work.first[i];
      at[i] = (is_reversed_ ? -distance : distance) + axes[i].kernel_size - 1;
    }
    const std::int64_t offset = (at[0] * shape_[1] + at[1]) * shape_[2] + axes[2].kernel_size - 1;
    line.bias = table(work.head) + offset;
    line.grad_bias = grad_bias ? grad_bias + offset : nullptr;
  }

 private:
  T* table(std::int64_t head) const { return tables_ + head * elements_ + kBiasPadding; }

  Operand<const E> biases_;
  Coordinate shape_;
  std::int64_t elements_;  // of a table, with its padding
  bool is_reversed_;
  T* tables_ = nullptr;
  std::int64_t loaded_head_ = -1;
};

// Operations on biases alone, and what follows the gradients of queries.

/// Copies biases to the slots that have them.
Phase rpb_gather(const Job& job);
/// Sums the slots at each offset.
Phase rpb_scatter(const Job& job);
/// Adds up the partial sums of the gradients of biases.
template <class E>
Phase sum_grad_bias(const Job& job, const Plan& backward_query);

}  // namespace natten::detail::cpu::engine
