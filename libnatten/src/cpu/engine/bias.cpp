#include "bias.h"

#include <limits>

#include "workspace.h"

namespace natten::detail::cpu::engine {
namespace {

/// What a query sees of an axis.
struct Seen {
  std::int64_t group, position;
  Interval keys;
  std::int64_t first_slot;    // of the keys
  std::int64_t first_offset;  // of the keys, in the table

  /// `query`: its number among those that are given.
  Seen(const Axis& axis, std::int64_t query)
      : group(group_of(axis, axis.query_offset + query)),
        position(position_of(axis, axis.query_offset + query)),
        keys(window(axis, group, position)),
        first_slot(keys.begin - natten::first_slot(axis, group, position)),
        first_offset(keys.begin - position + axis.kernel_size - 1) {}

  /// The number of a key among those that are given.
  std::int64_t key(const Axis& axis, std::int64_t i) const {
    return key_index(axis, token_at(axis, group, keys.begin + i));
  }
};

/// The key of an axis that is at an offset of the table from a query, counted from the first that
/// the query sees; or -1.
std::int64_t key_at(const Seen& seen, std::int64_t offset) {
  const std::int64_t i = offset - seen.first_offset;
  return i >= 0 && i < seen.keys.size() ? i : -1;
}

/// Runs of biases: the last axes of a token's slots and of the table lie alike.
template <class E>
Phase gather(const Job& job) {
  const Problem p = job.problem;
  const auto rpb = operand<const E>(p, job.tensors, &Tensors::rpb);
  const auto attn = operand<E>(p, job.tensors, &Tensors::attn);
  const KeyMask mask = key_mask(p, job.tensors);
  const E empty =
      p.empty_slots == EmptySlots::zero ? E(0.0f) : E(-std::numeric_limits<float>::infinity());
  const std::int64_t tokens = p.queries();
  const auto body = [=](std::int64_t first, std::int64_t last) {
    const Axis* axes = p.axes;
    for (std::int64_t item = first; item < last; ++item) {
      if (item % 64 == 0) checkpoint(64 * p.slots());
      const std::int64_t batch = item / tokens / p.heads, head = item / tokens % p.heads;
      const Coordinate query = unravel(item % tokens, query_lengths(p));
      const Seen seen[kMaxRank] = {{axes[0], query[0]}, {axes[1], query[1]}, {axes[2], query[2]}};
      E* slots = attn.at(batch, head, query);
      std::fill(slots, slots + p.window_size(), empty);
      std::fill(slots + p.window_size(), slots + p.slots(), E(0.0f));
      for (std::int64_t i = 0; i < seen[0].keys.size(); ++i)
        for (std::int64_t j = 0; j < seen[1].keys.size(); ++j) {
          const Coordinate at{seen[0].first_offset + i, seen[1].first_offset + j,
                              seen[2].first_offset};
          E* to = slots + seen[2].first_slot +
                  ((seen[0].first_slot + i) * axes[1].kernel_size + seen[1].first_slot + j) *
                      axes[2].kernel_size;
          std::copy_n(rpb.at(0, head, at), seen[2].keys.size(), to);
          for (std::int64_t k = 0; mask && k < seen[2].keys.size(); ++k)
            if (mask.hides(batch, {seen[0].key(axes[0], i), seen[1].key(axes[1], j),
                                   seen[2].key(axes[2], k)}))
              to[k] = empty;
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
  const KeyMask mask = key_mask(p, job.tensors);
  const Coordinate shape = relative_positions(p);
  const auto body = [=](std::int64_t first, std::int64_t last) {
    const Axis* axes = p.axes;
    std::vector<double> sums;
    for (std::int64_t item = first; item < last; ++item) {
      Coordinate at{item / shape[1] % shape[0], item % shape[1], 0};
      const std::int64_t head = item / shape[1] / shape[0];
      sums.assign(static_cast<std::size_t>(shape[2]), 0.0);
      Coordinate query;
      for (std::int64_t batch = 0; batch < p.batch; ++batch)
        for (query[0] = 0; query[0] < axes[0].query_length; ++query[0])
          for (query[1] = 0; query[1] < axes[1].query_length; ++query[1]) {
            const Seen seen0(axes[0], query[0]), seen1(axes[1], query[1]);
            const std::int64_t key0 = key_at(seen0, at[0]), key1 = key_at(seen1, at[1]);
            if (key0 < 0 || key1 < 0) continue;
            const std::int64_t slot =
                ((seen0.first_slot + key0) * axes[1].kernel_size + seen1.first_slot + key1) *
                axes[2].kernel_size;
            for (query[2] = 0; query[2] < axes[2].query_length; ++query[2]) {
              if (query[2] % 64 == 0) checkpoint(64 * axes[2].kernel_size);
              const Seen seen2(axes[2], query[2]);
              const E* slots = attn.at(batch, head, query) + slot + seen2.first_slot;
              double* to = sums.data() + seen2.first_offset;
              for (std::int64_t i = 0; i < seen2.keys.size(); ++i)
                if (!mask || !mask.hides(batch, {seen0.key(axes[0], key0), seen1.key(axes[1], key1),
                                                 seen2.key(axes[2], i)}))
                  to[i] += static_cast<double>(slots[i]);
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
