#pragma once

#include <natten/tuner.h>

#include "backend.h"

namespace natten::detail {

/// Sets the configuration of a checked call: the one in memory or in the cache's folder or, where
/// the process's settings say so and `allowed` and `can_time` let it, the one that is found now by
/// running the job. Settings that are off cost a look at a number.
void configure(Job& job, const Backend& backend, const Context& context, Tuning allowed,
               bool can_time);

/// Keeps something for `take_tuning_notes`.
void note(bool is_warning, const std::string& text);

/// Integers that describe a problem, but for the number of its device, in an order of their own:
/// `f(name, reference)`, which is of an integer, an enumerator or a bool.
template <class P, class F>
void visit_problem(P& p, F f) {
  f("op", p.op);
  f("dtype", p.dtype);
  f("device", p.device.type);
  f("rank", p.rank);
  f("batch", p.batch);
  f("heads", p.heads);
  f("kv_heads", p.kv_heads);
  f("head_dim", p.head_dim);
  f("value_dim", p.value_dim);
  f("additional", p.additional);
  f("rpb", p.has_rpb);
  f("key_mask", p.has_key_mask);
  f("grad_logsumexp", p.has_grad_logsumexp);
  f("grad_query", p.wants_grad_query);
  f("grad_key", p.wants_grad_key);
  f("grad_value", p.wants_grad_value);
  f("grad_rpb", p.wants_grad_rpb);
  f("grad_additional", p.wants_grad_additional);
  f("empty_slots", p.empty_slots);
  f("deterministic", p.deterministic);
  f("allow_tf32", p.allow_tf32);
  for (auto* tile : {&p.query_tile, &p.key_tile, &p.key_splits}) {
    f("tile", tile->size);
    for (int i = 0; i < kMaxRank; ++i) f("extent", tile->values[static_cast<std::size_t>(i)]);
  }
  for (auto& axis : p.axes) {
    f("queries", axis.query_length);
    f("keys", axis.key_length);
    f("kernel_size", axis.kernel_size);
    f("stride", axis.stride);
    f("dilation", axis.dilation);
    f("causal", axis.is_causal);
    f("boundary", axis.boundary);
    f("grid", axis.grid_length);
    f("query_offset", axis.query_offset);
    f("key_offset", axis.key_offset);
  }
}
/// What `visit_problem` visits.
inline constexpr int kProblemWords = 21 + 3 * (1 + kMaxRank) + kMaxRank * 10;

/// A call of the problem, without memory. Throws Error where there is none.
Call call_of(const Problem& problem);

}  // namespace natten::detail
