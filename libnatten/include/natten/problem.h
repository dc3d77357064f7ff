#pragma once

#include <natten/neighborhood.h>
#include <natten/types.h>

#include <optional>

namespace natten {

/// What can be computed. T tokens, K = product of kernel_size, N additional tokens; `attn` has
/// K + N slots per query, K in row-major window order and then the N.
enum class Op : std::uint8_t {
  attention_forward,   ///< query, key, value -> output, logsumexp
  attention_backward,  ///< ... , logsumexp, grad_output -> gradients of all inputs
  qk,                  ///< attn[q, slot] = <query[q], key[slot]> (+ rpb)
  av,                  ///< output[q] = sum over slots of attn[q, slot] * value[slot]
  av_transpose,  ///< key[p] = sum over the queries q that see p of attn[q, slot of p] * query[q]
  rpb_gather,    ///< attn[q, slot] = rpb at the offset of slot
  rpb_scatter,   ///< grad_rpb[offset] = sum of attn over batch, queries and slots at offset
};
NATTEN_EXPORT const char* name_of(Op);
/// Whether weights stay inside the operation.
constexpr bool is_fused(Op op) {
  return op == Op::attention_forward || op == Op::attention_backward;
}

/// What `qk` and `rpb_gather` write to slots that causality, a cut border or a mask leave empty.
enum class EmptySlots : std::uint8_t {
  negative_infinity,  ///< softmax gives them weight 0
  zero,               ///< makes the operation linear, as derivatives need it
};

NATTEN_EXPORT const char* name_of(Boundary);

/// The sliding window, one value per axis. Empty stride, dilation, is_causal or boundary mean 1, 1,
/// false and `Boundary::shift`.
///
/// Queries and keys may each be a part of a larger grid. The parts may differ in shape where one of
/// query_offset, key_offset and grid_size is given; windows, strides, dilation groups and biases
/// are those of the whole grid.
struct Neighborhood {
  Tuple kernel_size;
  Tuple dilation;
  Tuple is_causal;
  Tuple stride;
  Tuple boundary;      ///< values of `Boundary`
  Tuple query_offset;  ///< token of the first query; default 0
  /// Token of the first key; default 0. Keys may overhang the grid: on a circular axis those are
  /// tokens of its other end, else padding that no query sees.
  Tuple key_offset;
  Tuple grid_size;  ///< of the whole grid; default: the keys are all of it

  bool has_parts() const { return query_offset.size || key_offset.size || grid_size.size; }
};

/// Every tensor of every operation; an operation uses those that `Op` names.
///
/// Fused operations are heads-last: query, output, grad_query, grad_output [B, *spatial, H, D or
/// Dv]; key, value and their gradients [B, *spatial, Hkv, D or Dv]; logsumexp, grad_logsumexp
/// [B, *spatial, H] (float32, float64 for float64); additional_keys, additional_values and their
/// gradients [B, N, Hkv, D or Dv]. Unfused operations are heads-first: [B, H, *spatial, D],
/// attn [B, H, *spatial, K + N], additional [B, H, N, D]. rpb, grad_rpb [H, 2 k0 - 1, ...].
/// key_mask [B or 1, *spatial] has a byte per key, 0 where the key is hidden: it then has no weight
/// and no gradients, whatever it holds. Innermost strides are 1, others free; data is aligned.
///
/// Inputs may share memory with each other, and their outer strides may be 0. An output may share
/// no element with an input, with another output, or with itself; calls that run at once count as
/// one. Slices of one buffer that interleave, as of a packed [..., 3, heads, dim], are separate.
struct Tensors {
  TensorView query, key, value, rpb, additional_keys, additional_values, key_mask, attn;
  TensorView output, logsumexp;
  TensorView grad_output, grad_logsumexp;
  TensorView grad_query, grad_key, grad_value, grad_rpb;
  TensorView grad_additional_keys, grad_additional_values;
};

/// What a call may take from the tuner (tuner.h), where the process's settings allow it.
enum class Tuning : std::uint8_t {
  any,   ///< the call may be run several times to be timed
  read,  ///< nothing is timed
  none,  ///< nothing tuned is used
};

struct Options {
  std::optional<double> scale;  ///< fused only; default 1 / sqrt(D)
  EmptySlots empty_slots = EmptySlots::negative_infinity;
  /// Keys lie on a grid of their own (general attention); otherwise their shape must be the
  /// query's. The window is all of that grid: of kernel_size only the number of axes counts. There
  /// are no relative positions then, so neither rpb nor its gradient.
  bool separate_key_grid = false;
  /// Such a grid may be empty, as that of an example in a batch may be: its queries see nothing.
  bool allow_no_keys = false;
  /// query_offset and key_offset are said later, so those of the call are ignored: `describe` and
  /// `workspace_bytes` check all that does not depend on them, `run` refuses the call.
  bool unknown_offsets = false;
  bool deterministic = true;
  /// Products of float32 may be computed in TF32, with 11 bits of precision in place of 24, where
  /// that is faster: by backends for CUDA.
  bool allow_tf32 = false;
  Tuning tuning = Tuning::any;
  bool allow_gemm = true;  ///< unfused operations may run on tensor cores, on CUDA
  /// Tile shapes and key splits are hints for backends that work on tiles: one positive integer
  /// per axis, or empty for the default.
  Tuple query_tile, key_tile, backward_query_tile, backward_key_tile, key_splits;
};

/// One request: what to compute, over which neighborhood, on which tensors.
struct Call {
  Op op = Op::attention_forward;
  Neighborhood neighborhood;
  Tensors tensors;
  Options options;
};

/// The validated description of a call, without its data. Plain, for host and device; backends
/// accept or refuse on its sight alone.
struct Problem {
  Op op = Op::attention_forward;
  DType dtype = DType::float32;
  Device device;
  int rank = 0;
  /// Always three; where the rank is lower the leading axes are trivial (length and kernel 1).
  Axis axes[kMaxRank];
  std::int64_t batch = 0;
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t head_dim = 0;    ///< of query and key
  std::int64_t value_dim = 0;   ///< of value and output
  std::int64_t additional = 0;  ///< N
  double scale = 1.0;
  bool has_rpb = false;
  bool has_key_mask = false;
  std::int64_t rpb_span = 0;  ///< elements between a head's first and last bias in memory
  bool has_logsumexp = false;
  bool has_grad_logsumexp = false;
  bool wants_grad_query = false;
  bool wants_grad_key = false;
  bool wants_grad_value = false;
  bool wants_grad_rpb = false;
  bool wants_grad_additional = false;
  EmptySlots empty_slots = EmptySlots::negative_infinity;
  bool deterministic = true;
  bool allow_tf32 = false;
  bool allow_gemm = true;
  Tuple query_tile, key_tile, key_splits;

  std::int64_t queries() const {
    return axes[0].query_length * axes[1].query_length * axes[2].query_length;
  }
  std::int64_t keys() const { return axes[0].key_length * axes[1].key_length * axes[2].key_length; }
  std::int64_t window_size() const {
    return axes[0].kernel_size * axes[1].kernel_size * axes[2].kernel_size;
  }
  /// Slots of attention weights per query: K + N.
  std::int64_t slots() const { return window_size() + additional; }
};

}  // namespace natten
