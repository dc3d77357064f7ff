#pragma once

#include <natten/roles.h>

#include <array>
#include <cstring>
#include <type_traits>

namespace natten::detail {

/// One number per axis.
using Coordinate = std::array<std::int64_t, kMaxRank>;

/// Token number `index` of a grid, row-major.
NATTEN_HOST_DEVICE inline Coordinate unravel(std::int64_t index, const Coordinate& lengths) {
  Coordinate at;
  for (int i = kMaxRank - 1; i >= 0; --i) {
    at[i] = index % lengths[i];
    index /= lengths[i];
  }
  return at;
}

/// The number of a token of a grid: the inverse of `unravel`.
template <class Lengths>
NATTEN_HOST_DEVICE std::int64_t ravel(const Coordinate& at, const Lengths& lengths) {
  return (at[0] * lengths[1] + at[1]) * lengths[2] + at[2];
}

inline Coordinate query_lengths(const Problem& p) {
  return {p.axes[0].query_length, p.axes[1].query_length, p.axes[2].query_length};
}
inline Coordinate key_lengths(const Problem& p) {
  return {p.axes[0].key_length, p.axes[1].key_length, p.axes[2].key_length};
}

/// Shape of a head's table of biases.
inline Coordinate relative_positions(const Problem& p) {
  return {2 * p.axes[0].kernel_size - 1, 2 * p.axes[1].kernel_size - 1,
          2 * p.axes[2].kernel_size - 1};
}
NATTEN_HOST_DEVICE inline std::int64_t volume(const Coordinate& lengths) {
  return lengths[0] * lengths[1] * lengths[2];
}

/// A tensor of an operation by what its dimensions mean, so that one kernel serves heads-first and
/// heads-last tensors of every rank. Elements along the innermost dimension are adjacent.
template <class T>
struct Operand {
  T* data = nullptr;
  std::int64_t batch = 0, head = 0, token = 0;  // strides; token: of additional tokens
  Coordinate grid{};                            // strides, of a token grid or relative positions

  NATTEN_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
  NATTEN_HOST_DEVICE T* at(std::int64_t b, std::int64_t h, const Coordinate& c) const {
    return data + b * batch + h * head + c[0] * grid[0] + c[1] * grid[1] + c[2] * grid[2];
  }
  NATTEN_HOST_DEVICE T* at(std::int64_t b, std::int64_t h, std::int64_t n) const {
    return data + b * batch + h * head + n * token;
  }
};

/// `T` is const for inputs.
template <class T>
Operand<T> operand(const Problem& p, const Tensors& tensors, TensorView Tensors::*member) {
  Operand<T> o;
  const TensorView& view = tensors.*member;
  const char* dims = dims_of(p.op, member);
  if (!view || !dims) return o;  // not given, or not a tensor of the operation
  o.data = static_cast<T*>(view.data);
  int at = 0;
  for (const char* d = dims; *d; ++d) {
    if (std::strchr("QKR", *d)) {
      for (int i = kMaxRank - p.rank; i < kMaxRank; ++i) o.grid[i] = view.strides[at++];
      continue;
    }
    const std::int64_t stride = view.strides[at++];
    if (*d == 'B') o.batch = stride;
    if (*d == 'M') o.batch = view.shape[at - 1] == 1 ? 0 : stride;
    if (*d == 'H' || *d == 'G') o.head = stride;
    if (*d == 'N') o.token = stride;
  }
  return o;
}

/// Whether the call is on a whole grid with the border `shift`, without a mask.
inline bool is_plain(const Problem& p) {
  for (const Axis& axis : p.axes)
    if (axis.boundary != Boundary::shift || axis.query_offset != 0 || axis.key_offset != 0 ||
        axis.key_length != axis.grid_length)
      return false;
  return !p.has_key_mask;
}

/// Which keys are hidden. Without a mask none is.
struct KeyMask {
  Operand<const std::uint8_t> seen;

  NATTEN_HOST_DEVICE explicit operator bool() const { return bool(seen); }
  /// `key`: numbers among the given keys.
  NATTEN_HOST_DEVICE bool hides(std::int64_t batch, const Coordinate& key) const {
    return seen && *seen.at(batch, 0, key) == 0;
  }
};
inline KeyMask key_mask(const Problem& p, const Tensors& tensors) {
  return {operand<const std::uint8_t>(p, tensors, &Tensors::key_mask)};
}

/// Row terms of a backward pass, in the workspace: contiguous [B, H, queries].
template <class T>
Operand<T> row_term_operand(const Problem& p, T* data) {
  Operand<T> o;
  o.data = data;
  o.grid = {p.axes[1].query_length * p.axes[2].query_length, p.axes[2].query_length, 1};
  o.head = p.queries();
  o.batch = p.heads * p.queries();
  return o;
}

}  // namespace natten::detail
