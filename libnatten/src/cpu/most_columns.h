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

/// Positions of an axis's rows in a dilation group.
inline Interval rows_of(const Axis& axis, bool rows_are_keys, std::int64_t group) {
  return rows_are_keys ? key_positions(axis, group) : query_positions(axis, group);
}

/// Rows from either end of an axis beyond which runs see columns as those a period further on do:
/// rows a stride apart see columns a stride apart. A query sees less than a kernel size to either
/// side, and is not led from further than a stride away.
inline std::int64_t rows_near_an_end(const Axis& axis, std::int64_t run) {
  return 2 * (axis.kernel_size + axis.stride + run) + std::lcm(run, axis.stride);
}

/// Most columns that `run` rows of an axis see together, where rows are cut into runs from the
/// first on. Where only a part of the queries of a circular axis is given, keys are taken to be
/// seen by the others too.
inline std::int64_t most_columns(const Axis& given, bool rows_are_keys, std::int64_t run) {
  if (!given.is_causal && given.boundary == Boundary::shift &&
      given.kernel_size == given.grid_length)  // everything
    return rows_are_keys ? given.query_length : given.key_length;
  Axis axis = given;
  const bool is_circular = axis.boundary == Boundary::circular;
  if (rows_are_keys && is_circular) {
    axis.query_offset = 0;
    axis.query_length = axis.grid_length;
  }
  const std::int64_t near = rows_near_an_end(axis, run);
  std::int64_t most = 0;
  // Groups differ only in where queries, keys and the grid begin and end, which changes at one
  // group each.
  const std::int64_t ends[] = {0,
                               axis.query_offset,
                               axis.query_offset + axis.query_length,
                               axis.key_offset,
                               axis.key_offset + axis.key_length,
                               axis.grid_length};
  std::set<std::int64_t> groups;
  for (const std::int64_t end : ends) groups.insert(group_of(axis, end));
  for (const std::int64_t group : groups) {
    const Interval rows = rows_of(axis, rows_are_keys, group);
    Interval seeing = rows;  // of which the others see nothing
    if (rows_are_keys && !is_circular) {
      const Interval queries = query_positions(axis, group);
      if (queries.size() == 0) continue;
      seeing.begin = std::max(rows.begin, window(axis, group, queries.begin).begin);
      seeing.end = std::min(rows.end, window(axis, group, queries.end - 1).end);
    }
    std::int64_t first = rows.begin + (seeing.begin - rows.begin) / run * run;
    const std::int64_t skipped = (seeing.end - first - 2 * near - run) / run * run;
    for (bool skips = skipped > 0; first < seeing.end; first += run) {
      if (skips && first >= seeing.begin + near) {
        first += skipped;
        skips = false;
      }
      const std::int64_t begin = std::max(first, seeing.begin);
      const std::int64_t last = std::min(first + run, seeing.end) - 1;
      most = std::max(most, columns_of(axis, rows_are_keys, group, last).end -
                                columns_of(axis, rows_are_keys, group, begin).begin);
    }
  }
  return most;
}

}  // namespace natten::detail::cpu
