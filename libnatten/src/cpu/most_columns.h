#pragma once

#include <natten/neighborhood.h>

#include <algorithm>
#include <numeric>
#include <set>

namespace natten::detail::cpu {

/// What the row at `position` of an axis sees: a query its window, a key the queries that see it.
inline Interval columns_of(const Axis& axis, bool rows_are_keys, std::int64_t group,
                           std::int64_t position) {
  return rows_are_keys ? inverse_window(axis, group, position) : window(axis, group, position);
}

/// Rows of an axis in a dilation group.
inline std::int64_t rows_of(const Axis& axis, bool rows_are_keys, std::int64_t group) {
  return group_length(axis, rows_are_keys ? axis.key_length : axis.query_length, group);
}

/// An axis whose runs of rows see as many columns as those of the given one, but that is not much
/// longer than a few windows. Away from the ends, rows a stride apart see columns a stride apart.
/// So tokens are left out of the middle, as many as keep the places of runs among strides.
inline Axis shortened(Axis axis, std::int64_t run) {
  if (axis.query_length != axis.key_length) return axis;  // not a common grid
  const std::int64_t period = std::lcm(run, axis.stride);
  // A query sees less than a kernel size to either side, and is not led from further than a stride
  // away. So twice that, and a run, is what the ends have an influence on.
  const std::int64_t kept = 4 * (axis.kernel_size + axis.stride + run) + period;
  const std::int64_t spare = axis.key_length / axis.dilation - kept;
  if (spare < period) return axis;
  axis.query_length -= spare / period * period * axis.dilation;
  axis.key_length = axis.query_length;
  return axis;
}

/// Most columns that `run` rows of an axis, from a multiple of `run` on, see together.
inline std::int64_t most_columns(const Axis& given, bool rows_are_keys, std::int64_t run) {
  if (!given.is_causal && given.kernel_size == given.key_length)  // everything
    return rows_are_keys ? given.query_length : given.key_length;
  const Axis axis = shortened(given, run);
  const std::int64_t d = axis.dilation;
  std::int64_t most = 0;
  // Groups differ only in their lengths, of queries and of keys, which change at one group each.
  for (const std::int64_t group :
       std::set<std::int64_t>{0, axis.query_length % d, axis.key_length % d}) {
    const std::int64_t rows = rows_of(axis, rows_are_keys, group);
    for (std::int64_t first = 0; first < rows; first += run) {
      const std::int64_t last = std::min(first + run, rows) - 1;
      most = std::max(most, columns_of(axis, rows_are_keys, group, last).end -
                                columns_of(axis, rows_are_keys, group, first).begin);
    }
  }
  return most;
}

}  // namespace natten::detail::cpu
