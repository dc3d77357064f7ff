#pragma once

#include <natten/context.h>
#include <natten/error.h>
#include <natten/problem.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace natten {

/// Checks a call and describes it. Reads shapes, types and devices, never data: data pointers may
/// be null, and outputs may be missing. Throws Error.
NATTEN_EXPORT Problem describe(const Call& call);

/// Scratch memory that the call needs in `Context::workspace`. Throws Error.
NATTEN_EXPORT std::size_t workspace_bytes(const Call& call, const Context& context = {});

/// Checks the call, selects a backend and runs it. On the CPU it returns when the outputs are
/// written; on CUDA when the kernels are enqueued on `Context::stream`. Throws Error; where the
/// call was refused no output has been written. Outputs that overlap another tensor are refused
/// (see `Tensors`).
NATTEN_EXPORT void run(const Call& call, const Context& context = {});

/// Runs independent calls on one device in one parallel region, for example a batch of images of
/// different sizes. No call may write what another reads or writes. Their workspaces are laid out
/// one after another (`workspace_bytes` of the list).
NATTEN_EXPORT void run(const std::vector<Call>& calls, const Context& context = {});
NATTEN_EXPORT std::size_t workspace_bytes(const std::vector<Call>& calls,
                                          const Context& context = {});

/// The shape and type that one tensor of a call must have, as a row-major view without memory:
/// `expected(describe(call), &Tensors::output)` says what to allocate. Throws Error, for a
/// described call only where its operation has no such tensor.
NATTEN_EXPORT TensorView expected(const Problem& problem, TensorView Tensors::*tensor);
/// Checks the whole call each time; for several tensors, describe it once instead.
NATTEN_EXPORT TensorView expected(const Call& call, TensorView Tensors::*tensor);

/// The tokens along each axis that `query_length` queries from `query_offset` on see, in a grid of
/// `grid_size` tokens. All arguments have one value per axis; offsets and sizes in `neighborhood`
/// are ignored. Tokens are within [0, grid_size), except on circular axes. There they are counted
/// on from the queries, so `begin` may be negative or `end` beyond the grid; where windows reach
/// all around they are 0 to grid_size. Throws Error.
NATTEN_EXPORT std::vector<Interval> key_range(const Tuple& query_offset, const Tuple& query_length,
                                              const Tuple& grid_size,
                                              const Neighborhood& neighborhood);

/// Softmax attention over all keys: query [B, S, H, D], key [B, Skv, Hkv, D], value
/// [B, Skv, Hkv, Dv] -> output [B, S, H, Dv] and, where given, logsumexp [B, S, H]. `is_causal`
/// lets query i see keys 0..i, as PyTorch's scaled_dot_product_attention aligns it.
NATTEN_EXPORT Call attention_call(const Tensors& tensors, bool is_causal = false,
                                  std::optional<double> scale = {});

/// Where examples of different lengths lie in tensors that hold them one after another along their
/// only axis, without padding. Names as in NATTEN.
struct Packing {
  /// 0, then for each example where it ends: the sum of the lengths up to it. Lengths may be 0.
  std::vector<std::int64_t> cumulative_seqlen_Q, cumulative_seqlen_KV;
  /// Where given: no length is larger.
  std::optional<std::int64_t> max_seqlen_Q, max_seqlen_KV;
};

/// The call of each example, for `run`. `packed` is a fused operation of rank 1 on tensors
/// [B, sum of lengths, ...]; memory is not copied. It is either attention over all keys
/// (`attention_call`): queries of an example without keys get output 0 and logsumexp -inf. Or it is
/// a neighborhood: then cumulative_seqlen_Q and cumulative_seqlen_KV must be equal, no example may
/// be empty, and each is a whole grid. All examples share rpb, whose gradient cannot be wanted;
/// there are no additional tokens. Throws Error.
NATTEN_EXPORT std::vector<Call> examples_of(const Call& packed, const Packing& packing);

/// Runs these calls: on the CPU in one parallel region; on CUDA each pass is one launch for all
/// examples, unless their grids are circular. The workspace on CUDA depends only on the number of
/// examples and the sums of their lengths, unless they are circular. `context` has no default, as
/// `run(call, {})` would have two meanings with one.
NATTEN_EXPORT void run(const Call& packed, const Packing& packing, const Context& context);
NATTEN_EXPORT std::size_t workspace_bytes(const Call& packed, const Packing& packing,
                                          const Context& context);

/// Combines results of attention over disjoint sets of keys into the result over their union:
/// logsumexp = log sum_i exp(logsumexps[i]), output = sum_i exp(logsumexps[i] - logsumexp) *
/// outputs[i]. outputs[i], output [..., H, Dv]; logsumexps[i], logsumexp [..., H]. A set with
/// logsumexp -inf is empty: its output is ignored, whatever it holds. Where all are empty output is
/// 0 and logsumexp -inf. The results may not overlap the arguments. CPU only.
NATTEN_EXPORT void merge_attentions(const std::vector<TensorView>& outputs,
                                    const std::vector<TensorView>& logsumexps,
                                    const TensorView& output, const TensorView& logsumexp,
                                    const Context& context = {});

/// Gradients of `merge_attentions`. `grad_logsumexp` may be a missing view (taken as 0).
NATTEN_EXPORT void merge_attentions_backward(const std::vector<TensorView>& outputs,
                                             const std::vector<TensorView>& logsumexps,
                                             const TensorView& grad_output,
                                             const TensorView& grad_logsumexp,
                                             const std::vector<TensorView>& grad_outputs,
                                             const std::vector<TensorView>& grad_logsumexps,
                                             const Context& context = {});

}  // namespace natten
