#pragma once

#include <natten/attention.h>

#include <optional>

/// The operations by the names and argument order of NATTEN's C++ API page, for 1, 2 and 3 axes.
/// Each is a thin name over `natten::run`; layouts as in `natten::Tensors`.
namespace natten {

namespace detail {

using OptionalView = std::optional<TensorView>;

/// Checks that the tuples have `rank` entries, then runs `count` calls of one neighborhood at once.
NATTEN_EXPORT void run_of_rank(int rank, const Call* calls, int count, const Context& context);

struct Mask {
  const Tuple& kernel_size;
  const Tuple& dilation;
  const Tuple& is_causal;
};

inline Call make_call(Op op, const Mask& mask) {
  Call call;
  call.op = op;
  call.neighborhood.kernel_size = mask.kernel_size;
  call.neighborhood.dilation = mask.dilation;
  call.neighborhood.is_causal = mask.is_causal;
  return call;
}

template <int Rank>
struct Forward {
  /// `rel_pos_bias` and `logsumexp` are optional. Tile sizes are hints; the CPU has no use for
  /// them.
  void operator()(TensorView output, TensorView query, TensorView key, TensorView value,
                  OptionalView rel_pos_bias, OptionalView logsumexp, Tuple kernel_size,
                  Tuple dilation, Tuple is_causal, double attn_scale, Tuple query_tile_size = {},
                  Tuple key_tile_size = {}, const Context& context = {}) const {
    Call call = make_call(Op::attention_forward, {kernel_size, dilation, is_causal});
    call.tensors.output = output;
    call.tensors.query = query;
    call.tensors.key = key;
    call.tensors.value = value;
    call.tensors.rpb = rel_pos_bias.value_or(TensorView{});
    call.tensors.logsumexp = logsumexp.value_or(TensorView{});
    call.options.scale = attn_scale;
    call.options.query_tile = query_tile_size;
    call.options.key_tile = key_tile_size;
    run_of_rank(Rank, &call, 1, context);
  }
};

template <int Rank>
struct Backward {
  /// `output` is accepted for the signature's sake: the row term is recomputed, which is more exact
  /// than deriving it from the rounded output. For the same reason `compute_delta` has no effect.
  void operator()(TensorView grad_query, TensorView grad_key, TensorView grad_value,
                  TensorView query, TensorView key, TensorView value, TensorView /*output*/,
                  TensorView grad_output, TensorView logsumexp, Tuple kernel_size, Tuple dilation,
                  Tuple is_causal, double attn_scale, Tuple query_tile_size = {},
                  Tuple key_tile_size = {}, Tuple num_splits_key = {},
                  bool /*compute_delta*/ = false, OptionalView rel_pos_bias = {},
                  OptionalView grad_rel_pos_bias = {}, const Context& context = {}) const {
    Call call = make_call(Op::attention_backward, {kernel_size, dilation, is_causal});
    call.tensors.grad_query = grad_query;
    call.tensors.grad_key = grad_key;
    call.tensors.grad_value = grad_value;
    call.tensors.query = query;
    call.tensors.key = key;
    call.tensors.value = value;
    call.tensors.grad_output = grad_output;
    call.tensors.logsumexp = logsumexp;
    call.tensors.rpb = rel_pos_bias.value_or(TensorView{});
    call.tensors.grad_rpb = grad_rel_pos_bias.value_or(TensorView{});
    call.options.scale = attn_scale;
    call.options.backward_query_tile = query_tile_size;
    call.options.backward_key_tile = key_tile_size;
    call.options.key_splits = num_splits_key;
    run_of_rank(Rank, &call, 1, context);
  }
};

template <int Rank>
struct QkForward {
  void operator()(TensorView attn, TensorView query, TensorView key, OptionalView rel_pos_bias,
                  Tuple kernel_size, Tuple dilation, Tuple is_causal,
                  const Context& context = {}) const {
    Call call = make_call(Op::qk, {kernel_size, dilation, is_causal});
    call.tensors.attn = attn;
    call.tensors.query = query;
    call.tensors.key = key;
    call.tensors.rpb = rel_pos_bias.value_or(TensorView{});
    run_of_rank(Rank, &call, 1, context);
  }
};

template <int Rank>
struct QkBackward {
  void operator()(TensorView d_query, TensorView d_key, OptionalView d_rel_pos_bias,
                  TensorView d_attn, TensorView query, TensorView key, Tuple kernel_size,
                  Tuple dilation, Tuple is_causal, const Context& context = {}) const {
    const Mask mask{kernel_size, dilation, is_causal};
    Call calls[] = {make_call(Op::av, mask), make_call(Op::av_transpose, mask),
                    make_call(Op::rpb_scatter, mask)};
    for (Call& call : calls) call.tensors.attn = d_attn;
    calls[0].tensors.value = key;
    calls[0].tensors.output = d_query;
    calls[1].tensors.query = query;
    calls[1].tensors.key = d_key;
    calls[2].tensors.grad_rpb = d_rel_pos_bias.value_or(TensorView{});
    run_of_rank(Rank, calls, d_rel_pos_bias ? 3 : 2, context);
  }
};

template <int Rank>
struct AvForward {
  void operator()(TensorView output, TensorView attn, TensorView value, Tuple kernel_size,
                  Tuple dilation, Tuple is_causal, const Context& context = {}) const {
    Call call = make_call(Op::av, {kernel_size, dilation, is_causal});
    call.tensors.output = output;
    call.tensors.attn = attn;
    call.tensors.value = value;
    run_of_rank(Rank, &call, 1, context);
  }
};

template <int Rank>
struct AvBackward {
  void operator()(TensorView d_attn, TensorView d_value, TensorView d_out, TensorView attn,
                  TensorView value, Tuple kernel_size, Tuple dilation, Tuple is_causal,
                  const Context& context = {}) const {
    const Mask mask{kernel_size, dilation, is_causal};
    Call calls[] = {make_call(Op::qk, mask), make_call(Op::av_transpose, mask)};
    calls[0].options.empty_slots = EmptySlots::zero;
    calls[0].tensors.attn = d_attn;
    calls[0].tensors.query = d_out;
    calls[0].tensors.key = value;
    calls[1].tensors.attn = attn;
    calls[1].tensors.query = d_out;
    calls[1].tensors.key = d_value;
    run_of_rank(Rank, calls, 2, context);
  }
};

}  // namespace detail

inline constexpr detail::Forward<1> na1d_forward{};
inline constexpr detail::Forward<2> na2d_forward{};
inline constexpr detail::Forward<3> na3d_forward{};
inline constexpr detail::Backward<1> na1d_backward{};
inline constexpr detail::Backward<2> na2d_backward{};
inline constexpr detail::Backward<3> na3d_backward{};
inline constexpr detail::QkForward<1> na1d_qk_forward{};
inline constexpr detail::QkForward<2> na2d_qk_forward{};
inline constexpr detail::QkForward<3> na3d_qk_forward{};
inline constexpr detail::QkBackward<1> na1d_qk_backward{};
inline constexpr detail::QkBackward<2> na2d_qk_backward{};
inline constexpr detail::QkBackward<3> na3d_qk_backward{};
inline constexpr detail::AvForward<1> na1d_av_forward{};
inline constexpr detail::AvForward<2> na2d_av_forward{};
inline constexpr detail::AvForward<3> na3d_av_forward{};
inline constexpr detail::AvBackward<1> na1d_av_backward{};
inline constexpr detail::AvBackward<2> na2d_av_backward{};
inline constexpr detail::AvBackward<3> na3d_av_backward{};

}  // namespace natten
