#pragma once

#include <natten/host_device.h>

#include <cstdint>

/// The one definition of the neighborhood. Every backend, mask and cost model calls it, on host
/// and device.
namespace natten {

/// One spatial axis. Queries and keys share the grid except in general attention, where the key
/// length differs.
struct Axis {
  std::int64_t query_length = 1;
  std::int64_t key_length = 1;
  std::int64_t kernel_size = 1;
  std::int64_t stride = 1;
  std::int64_t dilation = 1;
  bool is_causal = false;
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
}  // namespace detail

/// Token `i` of an axis is token number `i / dilation` of dilation group `i % dilation`. Windows
/// and relative positions count inside the group.
NATTEN_HOST_DEVICE constexpr std::int64_t group_of(const Axis& axis, std::int64_t token) {
  return token % axis.dilation;
}
NATTEN_HOST_DEVICE constexpr std::int64_t position_of(const Axis& axis, std::int64_t token) {
  return token / axis.dilation;
}
NATTEN_HOST_DEVICE constexpr std::int64_t token_at(const Axis& axis, std::int64_t group,
                                                   std::int64_t position) {
  return position * axis.dilation + group;
}
/// How many of `length` tokens fall into a dilation group.
NATTEN_HOST_DEVICE constexpr std::int64_t group_length(const Axis& axis, std::int64_t length,
                                                       std::int64_t group) {
  return (length - group + axis.dilation - 1) / axis.dilation;
}

/// Positions of the keys that the query at `position` of `group` attends to. Queries that share
/// `position / stride` share a leader and, unless causal, a window.
NATTEN_HOST_DEVICE constexpr Interval window(const Axis& axis, std::int64_t group,
                                             std::int64_t position) {
  const std::int64_t n = group_length(axis, axis.key_length, group);
  const std::int64_t k = axis.kernel_size;
  const std::int64_t first = position / axis.stride * axis.stride;
  if (axis.is_causal) {
    const std::int64_t leader = detail::min(first + axis.stride - 1, n - 1);
    return {detail::max(leader - k + 1, 0), detail::min(position, n - 1) + 1};
  }
  const std::int64_t leader = detail::min(first + axis.stride / 2, n - 1);
  const std::int64_t begin = detail::min(detail::max(leader - k / 2, 0), n - k);
  return {begin, begin + k};
}

/// Positions of the queries that see the key at `position` of `group`. Both ends of `window` grow
/// with the query, so the queries form an interval, found by bisection over `window` itself.
NATTEN_HOST_DEVICE constexpr Interval inverse_window(const Axis& axis, std::int64_t group,
                                                     std::int64_t position) {
  const std::int64_t queries = group_length(axis, axis.query_length, group);
  std::int64_t begin = 0;  // first query whose window ends past the key
  for (std::int64_t high = queries; begin < high;) {
    const std::int64_t middle = begin + (high - begin) / 2;
    if (window(axis, group, middle).end > position)
      high = middle;
    else
      begin = middle + 1;
  }
  std::int64_t end = begin;  // first query whose window begins past the key
  for (std::int64_t high = queries; end < high;) {
    const std::int64_t middle = end + (high - end) / 2;
    if (window(axis, group, middle).begin > position)
      high = middle;
    else
      end = middle + 1;
  }
  return {begin, end};
}

}  // namespace natten
