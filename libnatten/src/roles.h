#pragma once

#include <natten/problem.h>

#include <cstring>

namespace natten::detail {

/// The part a tensor plays in an operation. The binding passes tensors in the order of this table,
/// validation checks them by it and backends take their strides from it.
///
/// `dims` spells the tensor's dimensions:
///   B batch, H heads, G key-value heads, D head dim, V value dim, N additional tokens,
///   Q query grid (one dimension per axis), K key grid (likewise), R relative positions
///   (2 * kernel_size - 1 per axis), W slots (window + N), X slots of the window and any more.
struct Role {
  const char* name;
  TensorView Tensors::*tensor;
  const char* dims;
  bool is_output;
  bool is_required;
  bool is_statistic;  ///< float32, or float64 for float64: logsumexp and its gradient
};

struct Roles {
  const Role* first;
  const Role* last;
  const Role* begin() const { return first; }
  const Role* end() const { return last; }
};

Roles roles_of(Op op);

/// The dims of one tensor of an operation; null where the operation does not have it.
inline const char* dims_of(Op op, TensorView Tensors::*tensor) {
  for (const Role& role : roles_of(op))
    if (role.tensor == tensor) return role.dims;
  return nullptr;
}

}  // namespace natten::detail
