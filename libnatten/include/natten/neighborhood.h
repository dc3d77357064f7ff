#pragma once

#include <natten/host_device.h>

#include <cstdint>

/// The one definition of the neighborhood. Every backend, mask and cost model calls it, on host
/// and device.
///
/// Tokens are numbered over the whole grid. Positions number the tokens of a dilation group, and
/// may count on beyond a border: on a circular axis they are those of its other end, else nothing
/// is there. So a window is one interval, whatever the boundary.
namespace natten {

/// What happens to a window at the border of the grid.
enum class Boundary : std::uint8_t {
  shift,     ///< it is moved inwards, so that it always holds kernel_size keys
  cut,       ///< the slots outside stay empty
  circular,  ///< it goes on at the other end
};

/// One spatial axis. Queries and keys are given of a part of the grid each, or of the same grid
/// whole; in general attention the keys have a grid of their own.
struct Axis {
  std::int64_t query_length = 1;  ///< queries that are given
  std::int64_t key_length = 1;    ///< keys that are given
  std::int64_t kernel_size = 1;
  std::int64_t stride = 1;
  std::int64_t dilation = 1;
  bool is_causal = false;
  Boundary boundary = Boundary::shift;
  std::int64_t grid_length = 1;   ///< of the whole grid of keys
  std::int64_t query_offset = 0;  ///< token of the first query
  std::int64_t key_offset = 0;    ///< token of the first key; the keys may overhang the grid
};

/// Half open: `begin` is inside, `end` is not.
struct Interval {
  std::int64_t begin;
  std::int64_t end;
  NATTEN_HOST_DEVICE constexpr std::int64_t size() const { return end - begin; }
  NATTEN_HOST_DEVICE constexpr bool contains(std::int64_t i) const { return begin <= i && i < end; }
};

namespace detail {
NATTEN_HOST_DEVICE constexpr std::int64_t min(std::int64_t a, std::int64_t b) {
  return a < b ? a : b;
}
NATTEN_HOST_DEVICE constexpr std::int64_t max(std::int64_t a, std::int64_t b) {
  return a < b ? b : a;
}
/// Rounded down, also where `a` is negative.
NATTEN_HOST_DEVICE constexpr std::int64_t floor_div(std::int64_t a, std::int64_t b) {
  return a / b - (a % b < 0 ? 1 : 0);
}
/// From 0 to b - 1.
NATTEN_HOST_DEVICE constexpr std::int64_t floor_mod(std::int64_t a, std::int64_t b) {
  const std::int64_t rest = a % b;
  return rest < 0 ? rest + b : rest;
}
}  // namespace detail

/// Token `i` of an axis is token number `i / dilation` of dilation group `i % dilation`. Windows
/// and relative positions count inside the group.
NATTEN_HOST_DEVICE constexpr std::int64_t group_of(const Axis& axis, std::int64_t token) {
  return detail::floor_mod(token, axis.dilation);
}
NATTEN_HOST_DEVICE constexpr std::int64_t position_of(const Axis& axis, std::int64_t token) {
  return detail::floor_div(token, axis.dilation);
}
NATTEN_HOST_DEVICE constexpr std::int64_t token_at(const Axis& axis, std::int64_t group,
                                                   std::int64_t position) {
  return position * axis.dilation + group;
}
/// The position from which on the tokens of a group are `token` or later.
NATTEN_HOST_DEVICE constexpr std::int64_t first_position(const Axis& axis, std::int64_t group,
                                                         std::int64_t token) {
  return detail::floor_div(token - group + axis.dilation - 1, axis.dilation);
}
/// How many of the grid's tokens fall into a dilation group: positions 0 to that.
NATTEN_HOST_DEVICE constexpr std::int64_t group_length(const Axis& axis, std::int64_t group) {
  return (axis.grid_length - group + axis.dilation - 1) / axis.dilation;
}

/// Positions of the queries, or keys, of a group that are given.
NATTEN_HOST_DEVICE constexpr Interval query_positions(const Axis& axis, std::int64_t group) {
  return {first_position(axis, group, axis.query_offset),
          first_position(axis, group, axis.query_offset + axis.query_length)};
}
NATTEN_HOST_DEVICE constexpr Interval key_positions(const Axis& axis, std::int64_t group) {
  return {first_position(axis, group, axis.key_offset),
          first_position(axis, group, axis.key_offset + axis.key_length)};
}

namespace detail {
NATTEN_HOST_DEVICE constexpr std::int64_t index_among(const Axis& axis, std::int64_t token,
                                                      std::int64_t offset, std::int64_t length) {
  std::int64_t index = token - offset;
  if (axis.boundary == Boundary::circular) index = floor_mod(index, axis.grid_length);
  return index >= 0 && index < length ? index : -1;
}
}  // namespace detail

/// The number of a token among the queries, or keys, that are given; -1 where it is not.
NATTEN_HOST_DEVICE constexpr std::int64_t query_index(const Axis& axis, std::int64_t token) {
  return detail::index_among(axis, token, axis.query_offset, axis.query_length);
}
NATTEN_HOST_DEVICE constexpr std::int64_t key_index(const Axis& axis, std::int64_t token) {
  return detail::index_among(axis, token, axis.key_offset, axis.key_length);
}

/// Position of slot 0 of the window of the query at `position` of `group`; at a cut border it may
/// lie outside. Queries that share `position / stride` share a leader, and this.
NATTEN_HOST_DEVICE constexpr std::int64_t first_slot(const Axis& axis, std::int64_t group,
                                                     std::int64_t position) {
  const std::int64_t k = axis.kernel_size;
  const std::int64_t first = detail::floor_div(position, axis.stride) * axis.stride;
  if (axis.boundary == Boundary::circular) return first + axis.stride / 2 - k / 2;
  const std::int64_t n = group_length(axis, group);
  if (axis.is_causal) return detail::max(detail::min(first + axis.stride - 1, n - 1) - k + 1, 0);
  const std::int64_t begin = detail::min(first + axis.stride / 2, n - 1) - k / 2;
  if (axis.boundary == Boundary::cut) return begin;
  return detail::min(detail::max(begin, 0), n - k);
}

/// Positions of the keys that the query at `position` of `group` attends to.
NATTEN_HOST_DEVICE constexpr Interval window(const Axis& axis, std::int64_t group,
                                             std::int64_t position) {
  const std::int64_t begin = first_slot(axis, group, position);
  const std::int64_t end = begin + axis.kernel_size;
  if (axis.is_causal) return {begin, detail::min(position + 1, group_length(axis, group))};
  if (axis.boundary == Boundary::cut)
    return {detail::max(begin, 0), detail::min(end, group_length(axis, group))};
  return {begin, end};
}

/// Positions of the queries that see the key at `position` of `group`. Both ends of `window` grow
/// with the query, so the queries form an interval, found by bisection over `window` itself. All
/// of these queries are given, except on a circular axis of which only a part is given: there the
/// first and the last are.
NATTEN_HOST_DEVICE constexpr Interval inverse_window(const Axis& axis, std::int64_t group,
                                                     std::int64_t position) {
  const Interval given = query_positions(axis, group);
  const bool is_circular = axis.boundary == Boundary::circular;
  const std::int64_t reach = axis.kernel_size + axis.stride;  // no query sees further
  const Interval all = is_circular ? Interval{position - reach, position + reach + 1} : given;
  std::int64_t begin = all.begin;  // first query whose window ends past the key
  for (std::int64_t high = all.end; begin < high;) {
    const std::int64_t middle = begin + (high - begin) / 2;
    if (window(axis, group, middle).end > position)
      high = middle;
    else
      begin = middle + 1;
  }
  std::int64_t end = begin;  // first query whose window begins past the key
  for (std::int64_t high = all.end; end < high;) {
    const std::int64_t middle = end + (high - end) / 2;
    if (window(axis, group, middle).begin > position)
      high = middle;
    else
      end = middle + 1;
  }
  if (!is_circular || axis.query_length == axis.grid_length) return {begin, end};
  if (given.size() == 0) return {begin, begin};
  const std::int64_t n = group_length(axis, group);
  const std::int64_t turn_of_begin = detail::floor_div(begin - given.begin, n) * n;
  const std::int64_t turn_of_last = detail::floor_div(end - 1 - given.begin, n) * n;
  const std::int64_t first =
      begin < given.end + turn_of_begin ? begin : given.begin + turn_of_begin + n;
  end = detail::min(end, given.end + turn_of_last);
  return first < end ? Interval{first, end} : Interval{begin, begin};
}

/// The tokens that the given queries see, from the first to past the last: inside the grid, or on
/// a circular axis counted on from the queries, and then the whole grid where they go all around.
NATTEN_HOST_DEVICE constexpr Interval key_range(const Axis& axis) {
  Interval range{0, 0};
  // Each token of the first `dilation` is the first query of its group.
  const std::int64_t groups = detail::min(axis.dilation, axis.query_length);
  for (std::int64_t i = 0; i < groups; ++i) {
    const std::int64_t group = group_of(axis, axis.query_offset + i);
    const Interval given = query_positions(axis, group);
    const std::int64_t begin = token_at(axis, group, window(axis, group, given.begin).begin);
    const std::int64_t end = token_at(axis, group, window(axis, group, given.end - 1).end - 1) + 1;
    if (i == 0 || begin < range.begin) range.begin = begin;
    if (i == 0 || end > range.end) range.end = end;
  }
  const bool is_whole = axis.boundary == Boundary::circular && range.size() > axis.grid_length;
  return is_whole ? Interval{0, axis.grid_length} : range;
}

/// Whether every key that a query sees is given.
NATTEN_HOST_DEVICE constexpr bool has_all_keys(const Axis& axis) {
  const Interval range = key_range(axis);
  if (axis.boundary == Boundary::circular)
    return axis.key_length == axis.grid_length ||
           detail::floor_mod(range.begin - axis.key_offset, axis.grid_length) + range.size() <=
               axis.key_length;
  return range.begin >= axis.key_offset && range.end <= axis.key_offset + axis.key_length;
}

}  // namespace natten
