#pragma once

#include <natten/problem.h>

namespace natten {

/// The part a tensor plays in an operation. Bindings pass tensors in the order of this table,
/// validation checks them by it and backends take their strides from it.
///
/// `dims` spells the tensor's dimensions:
///   B batch, H heads, G key-value heads, D head dim, V value dim, N additional tokens,
///   Q query grid (one dimension per axis), K key grid (likewise), R relative positions
///   (2 * kernel_size - 1 per axis), W slots (window + N), X slots of the window and any more,
///   M batch or 1.
struct Role {
  const char* name;
  TensorView Tensors::*tensor;
  const char* dims;
  bool is_output;
  bool is_required;
  bool is_statistic;  ///< float32, or float64 for float64: logsumexp and its gradient
  bool is_mask;       ///< boolean
};

struct Roles {
  const Role* first;
  const Role* last;
  const Role* begin() const { return first; }
  const Role* end() const { return last; }
};

/// The tensors of an operation: inputs first, then outputs.
NATTEN_EXPORT Roles roles_of(Op op);
/// `Role::dims` of one tensor; null where the operation does not have it.
NATTEN_EXPORT const char* dims_of(Op op, TensorView Tensors::*tensor);

}  // namespace natten
