#include "bias.h"

#include <limits>

#include "workspace.h"

namespace natten::detail::cpu::engine {
namespace {

/// What a query sees of an axis.
Interval seen_by(const Axis& axis, std::int64_t token) {
  return window(axis, group_of(axis, token), position_of(axis, token));
}

/// The slot of an axis that is at an offset of the table from a token, or -1.
std::int64_t slot_at(const Axis& axis, std::int64_t token, std::int64_t offset) {
  const std::int64_t key = position_of(axis, token) + offset - (axis.kernel_size - 1);
  const Interval keys = seen_by(axis, token);
  return key >= keys.begin && key < keys.end ? key - keys.begin : -1;
}

/// Runs of biases: the last axes of a token's slots and of the table lie alike.
template <class E>
Phase gather(const Job& job) {
  const Problem p = job.problem;
  const auto rpb = operand<const E>(p, job.tensors, &Tensors::rpb);
  const auto attn = operand<E>(p, job.tensors, &Tensors::attn);
  const E empty =
      p.empty_slots == EmptySlots::zero ? E(0.0f) : E(-std::numeric_limits<float>::infinity());
  const std::int64_t tokens = p.queries();
  const auto body = [=](std::int64_t first, std::int64_t last) {
    const Axis* axes = p.axes;
    for (std::int64_t item = first; item < last; ++item) {
      if (item % 64 == 0) checkpoint(64 * p.slots());
      const std::int64_t batch = item / tokens / p.heads, head = item / tokens % p.heads;
      const Coordinate token = unravel(item % tokens, query_lengths(p));
      Interval seen[kMaxRank];
      Coordinate offset;  // of the first slot, in the table
      for (int i = 0; i < kMaxRank; ++i) {
        seen[i] = seen_by(axes[i], token[i]);
        offset[i] = seen[i].begin - position_of(axes[i], token[i]) + axes[i].kernel_size - 1;
      }
      E* slots = attn.at(batch, head, token);
      std::fill(slots, slots + p.window_size(), empty);
      std::fill(slots + p.window_size(), slots + p.slots(), E(0.0f));
      for (std::int64_t i = 0; i < seen[0].size(); ++i)
        for (std::int64_t j = 0; j < seen[1].size(); ++j) {
          const Coordinate at{offset[0] + i, offset[1] + j, offset[2]};
          std::copy_n(rpb.at(0, head, at), seen[2].size(),
                      slots + (i * axes[1].kernel_size + j) * axes[2].kernel_size);
        }
    }
  };
  return {p.batch * p.heads * tokens, body};
}

/// An item is a head and a line of its biases, to which the slots of a token's lines at one offset
/// add.
template <class E>
Phase scatter(const Job& job) {
  const Problem p = job.problem;
  const auto attn = operand<const E>(p, job.tensors, &Tensors::attn);
  const auto grad_rpb = operand<E>(p, job.tensors, &Tensors::grad_rpb);
  const Coordinate shape = relative_positions(p);
  const auto body = [=](std::int64_t first, std::int64_t last) {
    const Axis* axes = p.axes;
    std::vector<double> sums;
    for (std::int64_t item = first; item < last; ++item) {
      Coordinate at{item / shape[1] % shape[0], item % shape[1], 0};
      const std::int64_t head = item / shape[1] / shape[0];
      sums.assign(static_cast<std::size_t>(shape[2]), 0.0);
      Coordinate token;
      for (std::int64_t batch = 0; batch < p.batch; ++batch)
        for (token[0] = 0; token[0] < axes[0].query_length; ++token[0])
          for (token[1] = 0; token[1] < axes[1].query_length; ++token[1]) {
            const std::int64_t slot0 = slot_at(axes[0], token[0], at[0]);
            const std::int64_t slot1 = slot_at(axes[1], token[1], at[1]);
            if (slot0 < 0 || slot1 < 0) continue;
            const std::int64_t slot = (slot0 * axes[1].kernel_size + slot1) * axes[2].kernel_size;
            for (token[2] = 0; token[2] < axes[2].query_length; ++token[2]) {
              if (token[2] % 64 == 0) checkpoint(64 * axes[2].kernel_size);
              const Interval keys = seen_by(axes[2], token[2]);
              const E* slots = attn.at(batch, head, token) + slot;
              double* to = sums.data() + keys.begin - position_of(axes[2], token[2]) +
                           axes[2].kernel_size - 1;
              for (std::int64_t i = 0; i < keys.size(); ++i) to[i] += static_cast<double>(slots[i]);
            }
          }
      for (at[2] = 0; at[2] < shape[2]; ++at[2])
        *grad_rpb.at(0, head, at) = static_cast<E>(sums[static_cast<std::size_t>(at[2])]);
    }
  };
  return {p.heads * shape[0] * shape[1], body};
}

}  // namespace

Phase rpb_gather(const Job& job) {
  return dispatch_dtype(job.problem.dtype,
                        [&](auto type) { return gather<typename decltype(type)::type>(job); });
}

Phase rpb_scatter(const Job& job) {
  return dispatch_dtype(job.problem.dtype,
                        [&](auto type) { return scatter<typename decltype(type)::type>(job); });
}

template <class E>
Phase sum_grad_bias(const Job& job, const Plan& backward_query) {
  const Problem p = job.problem;
  const Workspace<StatisticOf<E>> workspace(job, backward_query);
  const auto grad = operand<E>(p, job.tensors, &Tensors::grad_rpb);
  const Coordinate shape = relative_positions(p);
  const auto body = [=](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t head = i / bias_count(p), at = i % bias_count(p);
      double sum = 0;
      for (std::int64_t b = 0; b < p.batch; ++b)
        sum += workspace.sum(b, head, 1, kBiasPadding + at);
      *grad.at(0, head, unravel(at, shape)) = static_cast<E>(sum);
    }
  };
  return {p.heads * bias_count(p), body};
}
template Phase sum_grad_bias<double>(const Job&, const Plan&);
template Phase sum_grad_bias<float>(const Job&, const Plan&);
template Phase sum_grad_bias<bfloat16>(const Job&, const Plan&);
template Phase sum_grad_bias<float16>(const Job&, const Plan&);

}  // namespace natten::detail::cpu::engine
