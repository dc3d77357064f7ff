#pragma once

#include "../../backend.h"
#include "../parallel.h"
#include "arena.h"
#include "work.h"

namespace natten::detail::cpu::engine {

/// Additional tokens, packed a piece at a time. Every row sees them, so kernels read them plain.
template <class E>
class AdditionalTokens {
 public:
  using T = StatisticOf<E>;

  explicit AdditionalTokens(const Job& job)
      : keys_(operand<const E>(job.problem, job.tensors, &Tensors::additional_keys)),
        values_(operand<const E>(job.problem, job.tensors, &Tensors::additional_values)) {}

  void take(Arena& arena, const Plan& plan) {
    const std::int64_t piece = std::min(plan.problem().additional, kAdditionalPiece);
    const std::int64_t keys = plan.column_heads * piece * plan.padded;
    const std::int64_t values = plan.column_heads * piece * plan.value_padded;
    keys_plain_ = arena.take<T>(keys);
    values_plain_ = arena.take<T>(values);
    keys_scored_ = plan.in_pairs ? arena.take<T>(keys) : keys_plain_;
    values_scored_ = plan.in_pairs ? arena.take<T>(values) : values_plain_;
    loaded_ = -1;
  }

  /// Packs those from `first` on of the columns' heads, if they are not there.
  void load(const simd::InstructionSet& isa, const Plan& plan, const Work& work,
            std::int64_t first) {
    const Problem& p = plan.problem();
    const std::int64_t of = (work.batch * p.kv_heads + work.column_head) * p.additional + first;
    if (loaded_ == of) return;
    loaded_ = of;
    count_ = std::min(p.additional - first, kAdditionalPiece);
    const auto pack_piece = [&](const Operand<const E>& from, std::int64_t dim, T* to, T* scored,
                                std::int64_t padded) {
      if (!from) return;
      for (std::int64_t i = 0; i < work.column_head_count * count_ && plan.in_pairs; ++i) {
        const E* token = from.at(work.batch, work.column_head + i / count_, first + i % count_);
        auto* pairs = reinterpret_cast<E*>(scored + i * padded);
        std::copy_n(token, dim, pairs);
        if (dim % 2 != 0) pairs[dim] = E{};
      }
      simd::Packing<T> packing;
      packing.from = from.at(work.batch, work.column_head, first);
      packing.stride = from.token;
      packing.count = count_;
      packing.dim = dim;
      packing.heads = static_cast<int>(work.column_head_count);
      packing.head_stride = from.head;
      packing.plain = to;
      packing.padded = padded;
      packing.plain_stride = count_ * padded;
      pack(isa, p.dtype, packing, plan.in_pairs);
    };
    pack_piece(keys_, p.head_dim, keys_plain_, keys_scored_, plan.padded);
    pack_piece(values_, p.value_dim, values_plain_, values_scored_, plan.value_padded);
  }
  std::int64_t count() const { return count_; }

  /// The packed tokens of a head of columns, as the only line.
  simd::Line<T> line(const Plan& plan, std::int64_t head) const {
    simd::Line<T> line;
    const std::int64_t keys = head * count_ * plan.padded;
    const std::int64_t values = head * count_ * plan.value_padded;
    line.transposed = keys_scored_ + keys;
    line.transposed_grad = values_scored_ + values;
    line.plain = values_plain_ + values;
    line.plain_grad = keys_plain_ + keys;
    return line;
  }

 private:
  Operand<const E> keys_, values_;
  // [head][token][padded]. If in pairs: plain ones of tokens, those for scores of dims.
  T *keys_plain_ = nullptr, *values_plain_ = nullptr;
  T *keys_scored_ = nullptr, *values_scored_ = nullptr;
  std::int64_t count_ = 0;
  std::int64_t loaded_ = -1;
};

/// The additional tokens of a backward pass as keys of a grid of their own, all of which every
/// query sees.
Job additional_tokens_as_keys(const Job& job);

/// Adds up the partial sums of the gradients of additional tokens.
template <class E>
Phase sum_grad_additional(const Job& job, const Plan& backward_query);

}  // namespace natten::detail::cpu::engine
