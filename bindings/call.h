#pragma once

#include <natten/natten.h>

#include <cstddef>
#include <cstdint>
#include <string_view>

/// The wire format that the Python adapters and XLA share. A call travels as the name of its
/// operation, a flat list of integers (below), a scale and its tensors in the order of
/// `natten::roles_of`.
namespace natten::bindings {

/// Bits of the last integer of the list. Mirrored in python/natten/_args.py.
enum Flag : std::int64_t {
  has_scale = 1,
  empty_slots_zero = 2,
  separate_key_grid = 4,
  nondeterministic = 8,
  allow_tf32 = 16,
  unknown_offsets = 32,
  allow_no_keys = 64,
  no_timing = 128,
  nothing_tuned = 256,
  no_gemm = 512,
};
constexpr std::int64_t kAllFlags = 1023;

/// Throws Error.
Op op_named(std::string_view name);

/// Decodes everything but the tensors. `config` holds 13 tuples, each preceded by its length
/// (kernel_size, dilation, is_causal, stride, boundary, query_offset, key_offset, grid_size,
/// q_tile_shape, kv_tile_shape, backward_q_tile_shape, backward_kv_tile_shape, backward_kv_splits),
/// then the flags. Throws Error.
Call decode_call(std::string_view op, const std::int64_t* config, std::size_t count, double scale);

}  // namespace natten::bindings
