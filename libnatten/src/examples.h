#pragma once

// Examples of different lengths that lie one after another along the last axis (`Packing`), where a
// backend takes all of them in one job.

#include <natten/attention.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace natten::detail {

/// Where an example lies. An axis of a packed problem has fewer than 2^31 tokens.
struct alignas(16) Example {
  std::int32_t first_query, queries;
  std::int32_t first_key, keys;
};

/// The axis along which they lie, as one of them has it.
NATTEN_HOST_DEVICE inline Axis axis_of_example(Axis axis, int queries, int keys) {
  axis.query_length = queries;
  axis.key_length = axis.grid_length = keys;
  // Where a window is all of the keys. Others are no longer than an axis whose border shifts them.
  if (axis.boundary == Boundary::shift) axis.kernel_size = min(axis.kernel_size, axis.grid_length);
  return axis;
}

/// Those of a checked packing.
inline std::vector<Example> examples_in(const Packing& packing) {
  const auto narrow = [](std::int64_t x) { return static_cast<std::int32_t>(x); };
  const std::vector<std::int64_t>&q = packing.cumulative_seqlen_Q,
        &kv = packing.cumulative_seqlen_KV;
  std::vector<Example> examples;
  for (std::size_t i = 0; i + 1 < q.size(); ++i)
    examples.push_back(
        {narrow(q[i]), narrow(q[i + 1] - q[i]), narrow(kv[i]), narrow(kv[i + 1] - kv[i])});
  return examples;
}

/// An example as long as the longest: `problem` is that of all tokens. Without examples, itself.
inline Problem longest_of(Problem problem, const std::vector<Example>& examples) {
  if (examples.empty()) return problem;
  int queries = 0, keys = 0;
  for (const Example& e : examples) {
    queries = e.queries > queries ? e.queries : queries;
    keys = e.keys > keys ? e.keys : keys;
  }
  Axis& axis = problem.axes[kMaxRank - 1];
  axis = axis_of_example(axis, queries, keys);
  return problem;
}

}  // namespace natten::detail
