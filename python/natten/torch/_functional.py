"""The functions of `natten.functional`, on PyTorch tensors."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any, Never, Unpack

import torch
from torch import Tensor

from natten._args import (
    ALLOW_NO_KEYS,
    SEPARATE_KEY_GRID,
    Bools,
    Boundaries,
    Ints,
    UpstreamKeywords,
    by_name,
    check_extra,
    check_merge,
    listed,
    make_config,
    named,
    product_flags,
    real_scale,
    spelled_is_causal,
)
from natten._kernel import (
    COMPOSED,
    check_environment,
    check_name,
    chosen_backend,
    tell_meaning,
)
from natten._merge import merge
from natten.torch import _autograd as _autograd  # registers the derivatives
from natten.torch import _composed, _nested, _ops, _packing
from natten.torch._private import is_any_autocast_enabled, refuses_script, with_dynamo
from natten.torch._tuning import fused_flags


def _call(operator: _ops.Operator, *args: Any, statistic: bool = True) -> Any:
    """Calls an operator on dense or nested tensors. `statistic`: whether logsumexp is wanted."""
    try:
        if is_any_autocast_enabled():
            args = _autocast(args)
        if type(args[0]) is not Tensor and is_distributed(args[0]):
            return _on_distributed(operator, args, statistic)
        is_nested = args[0].is_nested or args[1].is_nested
        is_composed = args[-1] == COMPOSED or (
            not args[0].is_cpu and _composed.serves(args[0], args[-1])
        )
        if is_nested:
            composed = functools.partial(_composed.call, operator) if is_composed else None
            return _nested.call(operator, *args, composed=composed)
        if is_composed and operator is _ops.packed_attention_forward:
            _packing.check(args)
            return _composed.call_for_each(_autograd.examples_of(operator, args))
        if is_composed:
            return _composed.call(operator, *args, statistic=statistic)
        if torch.compiler.is_compiling():  # Dynamo cannot follow questions about dispatch keys
            return operator.overload(*args)
        return operator(*args, statistic=statistic)
    except Exception:
        # Only now, as good calls need no such checks.
        if not is_distributed(args[0]) and any(map(is_distributed, args)):
            return _on_distributed(operator, args, statistic)  # which refuses it
        nested = any(map(_is_nested, args[:2]))
        for role, x in zip(operator.inputs, args, strict=False):
            if x is not None or role.is_required:
                _ops.check_tensor(role.name, x, may_be_nested=nested)
        if args[-1]:  # libnatten does not know `composed` among the names
            check_name(args[-1], args[0].device.type)
        else:
            check_environment()
        raise


def is_distributed(x: Any) -> bool:
    """Whether `x` is a DTensor. Those who have one have loaded what makes it, which takes long."""
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(x, tensor.DTensor)


def _on_distributed(operator: _ops.Operator, args: Sequence[Any], statistic: bool) -> Any:
    from natten.torch import _distributed

    return _distributed.call(operator, args, functools.partial(_call, statistic=statistic))


def _scale(scale: float | None) -> float | None:
    if torch.compiler.is_compiling():  # Dynamo cannot follow questions about types
        return None if scale is None else float(scale)
    return real_scale(scale)


# Dynamo cannot follow logging; it runs such a function while it traces.
with_dynamo(lambda: torch.compiler.assume_constant_result(tell_meaning))


def _backend(backend: str | None) -> str:
    """The name of the backend that operators get."""
    if backend is not None:
        tell_meaning(backend)
    return chosen_backend(backend)


def _is_nested(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_nested


def _autocast(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """As PyTorch's autocast treats scaled_dot_product_attention: all but float64 is cast."""
    device = args[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return args
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype)
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        else x
        for x in args
    )


def _make_fused(rank: int):
    @refuses_script
    @named("na{rank}d", rank, "natten.functional")
    def fused(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: Ints,
        *by_position: Never,
        stride: Ints = 1,
        dilation: Ints = 1,
        is_causal: Bools | None = False,
        boundary: Boundaries = "shift",
        rpb: Tensor | None = None,
        key_mask: Tensor | None = None,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        query_offset: Ints | None = None,
        key_offset: Ints | None = None,
        grid_size: Ints | None = None,
        return_lse: bool = False,
        backend: str | None = None,
        q_tile_shape: Ints | None = None,
        kv_tile_shape: Ints | None = None,
        backward_q_tile_shape: Ints | None = None,
        backward_kv_tile_shape: Ints | None = None,
        backward_kv_splits: Ints | None = None,
        is_casual: Bools | None = None,
        **upstream: Unpack[UpstreamKeywords],
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Fused {rank}-D neighborhood attention, heads-last.

        Every token attends to a window of `kernel_size` tokens around it; the weights are never
        stored. `spatial` below stands for {rank} axes.

        Tensors may be DTensors that are split along batch, heads and axes of the grid, over any
        mesh; the results are placed like query, and only the tokens that windows need travel.

        Heads are last here and first in `na{rank}d_qk`. A tensor in the wrong layout is a tensor of
        another grid, and raises no error where that grid is large enough for the window.

        Args:
            query: [batch, *spatial, heads, head_dim], float64, float32, bfloat16 or float16.
            key: [batch, *spatial, kv_heads, head_dim]; kv_heads divides heads (grouped-query).
            value: [batch, *spatial, kv_heads, value_head_dim].
            kernel_size: window size, one for all axes or one per axis. kernel_size * dilation must
                not exceed the axis, unless its boundary is "cut". Pass everything
                after it by name: next came dilation in NATTEN before 0.20, and stride since then.
            stride: how many neighboring queries share one window; 1 to kernel_size.
            dilation: distance between the tokens of a window.
            is_causal: whether a token sees only itself and earlier ones, a bool for all axes or
                one per axis (None is False).
            boundary: what happens to a window at the border of the grid, one name for all axes or
                one per axis: "shift" moves it inwards, "cut" leaves the slots outside empty, and
                "circular" lets it go on at the other end. A circular axis must be a multiple of
                dilation times stride, and cannot be causal.
            rpb: bias [heads, 2 * kernel_size[0] - 1, ...] by relative position, added to scores.
            key_mask: bool [batch or 1, *spatial of key], True where a key may be seen. Hidden keys
                and values have gradient 0; the mask has none. A query that sees no key gets output
                0 and logsumexp -inf.
            scale: factor on the scores; head_dim ** -0.5 by default.
            additional_keys: [batch, n, kv_heads, head_dim], more keys, which every query sees.
            additional_values: [batch, n, kv_heads, value_head_dim].
            query_offset, key_offset, grid_size: where queries and keys are parts of a larger grid:
                their first tokens in it, and its tokens per axis; one value for all axes or one per
                axis. By default 0, 0 and the grid of key. Where one of the three is given, keys may
                have another shape than queries. The keys must hold all windows of the queries
                (`natten.key_range` says which tokens these need). They may reach beyond the grid:
                into its other end on a circular axis, else into padding that nobody sees.
            return_lse: also return logsumexp.
            backend: name of the implementation to use; by default the first that accepts the call.
                NATTEN's own names, such as "cutlass-fna", mean "fused".
            q_tile_shape, kv_tile_shape, backward_q_tile_shape, backward_kv_tile_shape,
            backward_kv_splits: for CUDA backends that work on tiles; where one refuses a shape, its
                message names those that it takes. CPU backends only check them.
            is_casual: the spelling of is_causal in some examples of NATTEN; warns.
            attention_kwargs, backward_use_pt_reduction, run_persistent_kernel, kernel_schedule,
            torch_compile, try_fuse_additional_kv, xformers_kwargs: of NATTEN's own kernels; they
                have no effect here.

        Returns:
            output [batch, *spatial, heads, value_head_dim]; with return_lse also logsumexp
            [batch, *spatial, heads], float32 (float64 for float64), the natural logarithm of the
            sum of exp(score), which is differentiable too and serves `merge_attentions`.

        Raises:
            ValueError: a shape or value that does not fit; the message says which and why.
            TypeError: an argument of another type; an unsupported or mismatched dtype.
        """
        if by_position or upstream:
            check_extra(f"na{rank}d", by_position, upstream)
        config = make_config(
            rank,
            kernel_size,
            dilation,
            spelled_is_causal(is_causal, is_casual),
            stride,
            boundary,
            query_offset=query_offset,
            key_offset=key_offset,
            grid_size=grid_size,
            q_tile_shape=q_tile_shape,
            kv_tile_shape=kv_tile_shape,
            backward_q_tile_shape=backward_q_tile_shape,
            backward_kv_tile_shape=backward_kv_tile_shape,
            backward_kv_splits=backward_kv_splits,
            flags=fused_flags(scale),
        )
        output, logsumexp = _call(
            _ops.attention_forward,
            query, key, value, rpb, additional_keys, additional_values, key_mask,
            config, _scale(scale), _backend(backend), statistic=return_lse,
        )  # fmt: skip
        return (output, logsumexp) if return_lse else output

    return fused


def _make_qk(rank: int):
    @refuses_script
    @named("na{rank}d_qk", rank, "natten.functional")
    def qk(
        query: Tensor,
        key: Tensor,
        kernel_size: Ints,
        dilation: Ints = 1,
        additional_keys: Tensor | None = None,
        is_causal: Bools | None = False,
        rpb: Tensor | None = None,
        *,
        stride: Ints = 1,
        boundary: Boundaries = "shift",
        key_mask: Tensor | None = None,
        query_offset: Ints | None = None,
        key_offset: Ints | None = None,
        grid_size: Ints | None = None,
        backend: str | None = None,
        is_casual: Bools | None = None,
        **upstream: Unpack[UpstreamKeywords],
    ) -> Tensor:
        """Scores of {rank}-D neighborhood attention, heads-first. No scale is applied.

        Heads come first here, and last in `na{rank}d`, which says more about that.

        Args:
            query, key: [batch, heads, *spatial, head_dim].
            additional_keys: [batch, heads, n, head_dim]; their n scores follow the window's.
            rpb: bias [heads, 2 * kernel_size[0] - 1, ...] by relative position.
            kernel_size, dilation, is_causal, stride, boundary, key_mask, query_offset, key_offset,
            grid_size, backend, and the names of NATTEN's kernels: as in `na{rank}d`.

        Returns:
            attn [batch, heads, *spatial, slots], slots = product of kernel_size, in row-major
            window order, plus n. Slots that causality, a cut border or key_mask leave empty hold
            -inf.

        Raises:
            ValueError, TypeError: as `na{rank}d`.
        """
        if upstream:
            check_extra(f"na{rank}d_qk", (), upstream)
        config = make_config(
            rank,
            kernel_size,
            dilation,
            spelled_is_causal(is_causal, is_casual),
            stride,
            boundary,
            query_offset=query_offset,
            key_offset=key_offset,
            grid_size=grid_size,
            flags=product_flags(),
        )
        return _call(_ops.qk, query, key, rpb, additional_keys, key_mask, config, _backend(backend))

    return qk


def _make_av(rank: int):
    @refuses_script
    @named("na{rank}d_av", rank, "natten.functional")
    def av(
        attn: Tensor,
        value: Tensor,
        kernel_size: Ints,
        dilation: Ints = 1,
        additional_values: Tensor | None = None,
        is_causal: Bools | None = False,
        *,
        stride: Ints = 1,
        boundary: Boundaries = "shift",
        key_mask: Tensor | None = None,
        query_offset: Ints | None = None,
        key_offset: Ints | None = None,
        grid_size: Ints | None = None,
        backend: str | None = None,
        is_casual: Bools | None = None,
        **upstream: Unpack[UpstreamKeywords],
    ) -> Tensor:
        """Values weighted by {rank}-D neighborhood attention weights, heads-first.

        Heads come first here, and last in `na{rank}d`, which says more about that.

        Args:
            attn: [batch, heads, *spatial, slots], slots as `na{rank}d_qk` returns them. Empty ones
                are ignored.
            value: [batch, heads, *spatial, head_dim].
            additional_values: [batch, heads, n, head_dim], for the last n slots.
            kernel_size, dilation, is_causal, stride, boundary, key_mask, query_offset, key_offset,
            grid_size, backend, and the names of NATTEN's kernels: as in `na{rank}d`.

        Returns:
            [batch, heads, *spatial, head_dim].

        Raises:
            ValueError, TypeError: as `na{rank}d`.
        """
        if upstream:
            check_extra(f"na{rank}d_av", (), upstream)
        config = make_config(
            rank,
            kernel_size,
            dilation,
            spelled_is_causal(is_causal, is_casual),
            stride,
            boundary,
            query_offset=query_offset,
            key_offset=key_offset,
            grid_size=grid_size,
            flags=product_flags(),
        )
        return _call(_ops.av, attn, value, additional_values, key_mask, config, _backend(backend))

    return av


na1d, na2d, na3d = (_make_fused(rank) for rank in (1, 2, 3))
na1d_qk, na2d_qk, na3d_qk = (_make_qk(rank) for rank in (1, 2, 3))
na1d_av, na2d_av, na3d_av = (_make_av(rank) for rank in (1, 2, 3))


@refuses_script
@by_name
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool | None = False,
    scale: float | None = None,
    return_lse: bool = False,
    *,
    seqlens_Q: Tensor | None = None,
    seqlens_KV: Tensor | None = None,
    cumulative_seqlen_Q: Tensor | None = None,
    cumulative_seqlen_KV: Tensor | None = None,
    max_seqlen_Q: int | None = None,
    max_seqlen_KV: int | None = None,
    backend: str | None = None,
    q_tile_size: int | None = None,
    kv_tile_size: int | None = None,
    backward_q_tile_size: int | None = None,
    backward_kv_tile_size: int | None = None,
    backward_kv_splits: int | None = None,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    **upstream: Unpack[UpstreamKeywords],
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over all keys, heads-last. Takes no mask and no dropout.

    Examples of different lengths may lie one after another in tensors of batch 1; each then attends
    to its own keys. Give their lengths as `seqlens_Q` and `seqlens_KV`, or in the form that
    `natten.utils.varlen.generate_varlen_parameters` makes of these. An example may be empty:
    queries of one without keys get output 0 and logsumexp -inf.

    Args:
        query: [batch, length, heads, head_dim], float64, float32, bfloat16 or float16.
        key: [batch, kv_length, kv_heads, head_dim]; kv_heads divides heads (grouped-query).
        value: [batch, kv_length, kv_heads, value_head_dim].
        is_causal: query i sees keys 0 to i, also where the lengths differ, as in
            `torch.nn.functional.scaled_dot_product_attention`.
        scale: factor on the scores; head_dim ** -0.5 by default.
        return_lse: also return logsumexp.
        seqlens_Q, seqlens_KV: lengths of the examples in query, and in key and value, int32 or
            int64 [examples] on the device of query.
        cumulative_seqlen_Q, cumulative_seqlen_KV: instead of these, 0 and the sums of lengths up
            to the end of each example, int32 or int64 [examples + 1].
        max_seqlen_Q, max_seqlen_KV: with the sums, the largest length, or more.
        backend: name of the implementation to use; by default the first that accepts the call.
        q_tile_size, kv_tile_size, backward_q_tile_size, backward_kv_tile_size, backward_kv_splits:
            as the tile shapes of `na1d`; so are the other names of NATTEN's kernels.
        attn_mask, dropout_p: must be None and 0; they are there for calls that were written for
            scaled_dot_product_attention.

    Returns:
        output [batch, length, heads, value_head_dim]; with return_lse also logsumexp
        [batch, length, heads], float32 (float64 for float64).

    Raises:
        ValueError: a shape or value that does not fit; the message says which and why.
        TypeError: an unsupported or mismatched dtype.
        NotImplementedError: a mask or dropout.
    """
    if attn_mask is not None or dropout_p != 0.0 or isinstance(is_causal, Tensor):
        raise NotImplementedError(
            "attention takes no mask and no dropout (attn_mask, dropout_p); use "
            "torch.nn.functional.scaled_dot_product_attention, or merge_attentions over parts of "
            "the keys"
        )
    if upstream:
        check_extra("attention", (), upstream)
    flags = SEPARATE_KEY_GRID | fused_flags(scale)
    operator, packing = _ops.attention_forward, _packing.given(
        query, key, value, seqlens_Q, seqlens_KV, cumulative_seqlen_Q, cumulative_seqlen_KV,
        max_seqlen_Q, max_seqlen_KV,
    )  # fmt: skip
    if packing:
        operator, flags = _ops.packed_attention_forward, flags | ALLOW_NO_KEYS
    config = make_config(
        1,
        1,
        is_causal=is_causal,
        flags=flags,
        q_tile_shape=q_tile_size,
        kv_tile_shape=kv_tile_size,
        backward_q_tile_shape=backward_q_tile_size,
        backward_kv_tile_shape=backward_kv_tile_size,
        backward_kv_splits=backward_kv_splits,
    )
    output, logsumexp = _call(
        operator, query, key, value, None, None, None, None,
        *packing, config, _scale(scale), _backend(backend), statistic=return_lse,
    )  # fmt: skip
    return (output, logsumexp) if return_lse else output


@refuses_script
def merge_attentions(
    outputs: Sequence[Tensor],
    lse_tensors: Sequence[Tensor],
    *,
    torch_compile: bool = True,
    use_autograd_fix: bool = True,
) -> tuple[Tensor, Tensor]:
    """Combines attention over disjoint sets of keys into attention over their union, exactly.

    With lse = log sum_i exp(lse_i), output = sum_i exp(lse_i - lse) output_i.

    Args:
        outputs: tensors [..., heads, value_head_dim], all of one shape, dtype and device.
        lse_tensors: their logsumexps [..., heads], all float32 or float64; -inf where a set holds
            no keys, whose output is ignored.
        torch_compile, use_autograd_fix: of NATTEN; no effect here, where gradients are exact.

    Returns:
        (output, lse), of the shapes and dtypes of the inputs. Differentiable. Where all sets are
        empty, output is 0 and lse -inf.

    Raises:
        ValueError: nothing to merge, or shapes that differ.
        TypeError: dtypes that differ.
    """
    outputs, lse_tensors = listed("outputs", outputs), listed("lse_tensors", lse_tensors)
    for name, tensors in (("outputs", outputs), ("lse_tensors", lse_tensors)):
        for x in tensors:
            if _is_nested(x):
                raise ValueError(f"{name}: got a nested tensor; merge their values() instead")
            _ops.check_tensor(name, x)
    check_merge(*([(x.shape, _ops.dtype_name(x)) for x in xs] for xs in (outputs, lse_tensors)))
    devices = {x.device for x in (*outputs, *lse_tensors)}
    if len(devices) > 1:
        raise ValueError(
            f"outputs, lse_tensors: are on {' and '.join(sorted(map(str, devices)))}; must be on "
            "one device"
        )
    output, lse = merge(
        torch,
        outputs,
        lse_tensors,
        lambda mask, x: x.masked_fill(mask, 0.0),
        torch.Tensor.detach,
    )
    return output.to(outputs[0].dtype), lse
