"""Counts of floating-point operations.

A multiply-accumulate (MAC) is two operations (FLOPs). Counted are the products of queries with keys
and of weights with values, over full windows: one that is causal or cut counts as if it had no
empty slots, and keys that a mask hides count too. Softmax, scale and biases are not counted.

PyTorch's `torch.utils.flop_counter.FlopCounterMode` counts natten's operators in FLOPs, forward and
backward, with nothing to set up. fvcore's `FlopCountAnalysis` counts the forward pass in MACs, once
`add_natten_handle` has taught it the operators; `get_flops` is both in one call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, TypeAlias

from natten import _core
from natten._args import Bools, Config, Ints, integer, listed, make_config, window_size
from natten.utils import check_all_args

Shape: TypeAlias = Sequence[int]


# MACs of each operator, from its arguments with shapes in place of tensors. The names of parameters
# are those of the operators' schemas (torch/_ops.py), since they may be passed by name.


def _attention_forward(
    query: Shape,
    key: Shape,
    value: Shape,
    rpb: Shape | None,
    additional_keys: Shape | None,
    additional_values: Shape | None,
    key_mask: Shape | None,
    config: Sequence[int],
    scale: float | None,
    backend: str,
) -> int:
    slots = window_size(config, key[1:-2]) + (additional_keys[1] if additional_keys else 0)
    return prod(query[:-1]) * slots * (query[-1] + value[-1])


def _attention_backward(
    query: Shape,
    key: Shape,
    value: Shape,
    rpb: Shape | None,
    additional_keys: Shape | None,
    additional_values: Shape | None,
    key_mask: Shape | None,
    logsumexp: Shape,
    grad_output: Shape,
    grad_logsumexp: Shape | None,
    wanted: Sequence[bool],
    config: Sequence[int],
    scale: float | None,
    backend: str,
) -> int:
    """The products that the gradients are made of, each once, as PyTorch counts its own attention:
    five where those of query, key and value are wanted. That a backend may recompute more is not
    counted."""
    rows, dim, value_dim = prod(query[:-1]), query[-1], value[-1]
    window = rows * window_size(config, key[1:-2])
    additional = rows * additional_keys[1] if additional_keys else 0
    want_query, want_key, want_value, want_rpb, want_additional_keys, want_additional_values = (
        wanted
    )
    macs = (window + additional) * dim  # scores again
    if want_query or want_key or want_rpb or want_additional_keys:
        macs += (window + additional) * value_dim  # gradients of weights: grad_output times values
    if want_query:
        macs += (window + additional) * dim
    macs += (window * want_key + additional * want_additional_keys) * dim
    macs += (window * want_value + additional * want_additional_values) * value_dim
    return macs


def _qk(
    query: Shape,
    key: Shape,
    rpb: Shape | None,
    additional_keys: Shape | None,
    key_mask: Shape | None,
    config: Sequence[int],
    backend: str,
) -> int:
    slots = window_size(config, key[2:-1]) + (additional_keys[2] if additional_keys else 0)
    return prod(query) * slots


def _av(
    attn: Shape,
    value: Shape,
    additional_values: Shape | None,
    key_mask: Shape | None,
    config: Sequence[int],
    backend: str,
) -> int:
    return prod(attn) * value[-1]


def _av_transpose(
    attn: Shape,
    query: Shape,
    key_mask: Shape | None,
    key_grid: Sequence[int],
    additional: int,
    config: Sequence[int],
    backend: str,
) -> int:
    return prod(attn) * query[-1]


_MACS: dict[str, Callable[..., int]] = {
    "attention_forward": _attention_forward,
    "attention_backward": _attention_backward,
    "qk": _qk,
    "av": _av,
    "av_transpose": _av_transpose,
}


def register_torch_formulas() -> None:
    """Has `FlopCounterMode` count the operators. `natten.torch` calls it after defining them."""
    import torch
    from torch.utils.flop_counter import register_flop_formula

    def flops(macs: Callable[..., int]) -> Callable[..., int]:
        return lambda *args, out_shape=None, **kwargs: 2 * macs(*args, **kwargs)

    for name, macs in _MACS.items():
        register_flop_formula(getattr(torch.ops.natten, name))(flops(macs))

    from natten.torch import _autograd, _ops, _private

    def packed_flops(operator: _ops.Operator, macs: Callable[..., int]) -> Callable[..., int]:
        """Of examples that lie one after another, each with its own keys."""

        def of(*args: Any, out_val: Any = None) -> int:
            examples = _autograd.examples_of(operator, args)
            shapes = [
                [x.shape if isinstance(x, torch.Tensor) else x for x in example]
                for example in examples
            ]
            return 2 * sum(macs(*example) for example in shapes)

        return of

    for operator in (_ops.packed_attention_forward, _ops.packed_attention_backward):
        formula = packed_flops(operator, _MACS[operator.name])
        register_flop_formula(operator.overload.overloadpacket, get_raw=True)(formula)
    _private.tell_active_flop_counters()  # natten.torch may be loaded by the first call inside one


def fna_flop_count(
    q_shape: Shape,
    k_shape: Shape,
    v_shape: Shape,
    kernel_size: Ints,
    dilation: Ints | None,
    is_causal: Bools | None,
    is_heads_last: bool,
    return_macs: bool = False,
    *,
    additional: int = 0,
) -> int:
    """FLOPs of the forward pass of `na1d`, `na2d` or `na3d`.

    Args:
        q_shape: [batch, *spatial, heads, head_dim], or [batch, heads, *spatial, head_dim] where
            is_heads_last is False. So are the other shapes.
        k_shape: [batch, *spatial, kv_heads, head_dim]; kv_heads divides heads.
        v_shape: [batch, *spatial, kv_heads, value_head_dim].
        kernel_size, dilation, is_causal: one value for all axes or one per axis. Neither dilation
            nor is_causal changes the count; None is 1 and False.
        is_heads_last: the layout of the shapes.
        return_macs: count multiply-accumulates, half as many.
        additional: number of additional keys and values.

    Raises:
        ValueError: shapes or values that the operation refuses too; the message says why.
        TypeError: an argument that should be an integer and is not.
    """
    rank = _rank(q_shape=q_shape, k_shape=k_shape, v_shape=v_shape)
    query, key, value = (
        shape if is_heads_last else _heads_last(shape) for shape in (q_shape, k_shape, v_shape)
    )
    more = _tokens(key, 1, additional), _tokens(value, 1, additional)
    inputs = query, key, value, None, *more, None
    config = make_config(rank, *check_all_args(rank, kernel_size, dilation, is_causal))
    _check("attention_forward", config, inputs, [True, None])
    macs = _attention_forward(*inputs, config, None, "")
    return macs if return_macs else 2 * macs


def na_qk_flop_count(
    q_shape: Shape,
    k_shape: Shape,
    kernel_size: Ints,
    dilation: Ints | None,
    is_causal: Bools | None,
    is_heads_last: bool,
    return_macs: bool = False,
    *,
    additional: int = 0,
) -> int:
    """FLOPs of `na1d_qk`, `na2d_qk` or `na3d_qk`. Both shapes have the same heads; all else as in
    `fna_flop_count`."""
    rank = _rank(q_shape=q_shape, k_shape=k_shape)
    query, key = (_heads_first(s) if is_heads_last else s for s in (q_shape, k_shape))
    inputs = query, key, None, _tokens(key, 2, additional), None
    config = make_config(rank, *check_all_args(rank, kernel_size, dilation, is_causal))
    _check("qk", config, inputs, [True])
    macs = _qk(*inputs, config, "")
    return macs if return_macs else 2 * macs


def na_av_flop_count(
    a_shape: Shape,
    v_shape: Shape,
    kernel_size: Ints,
    dilation: Ints | None,
    is_causal: Bools | None,
    is_heads_last: bool,
    return_macs: bool = False,
    *,
    additional: int = 0,
) -> int:
    """FLOPs of `na1d_av`, `na2d_av` or `na3d_av`. a_shape is [batch, *spatial, heads, slots], or
    heads-first, slots being the product of kernel_size plus `additional`. Both shapes have the same
    heads; all else as in `fna_flop_count`."""
    rank = _rank(a_shape=a_shape, v_shape=v_shape)
    attn, value = (_heads_first(s) if is_heads_last else s for s in (a_shape, v_shape))
    inputs = attn, value, _tokens(value, 2, additional), None
    config = make_config(rank, *check_all_args(rank, kernel_size, dilation, is_causal))
    _check("av", config, inputs, [True])
    macs = _av(*inputs, config, "")
    return macs if return_macs else 2 * macs


def _rank(**shapes: Shape) -> int:
    for name, shape in shapes.items():
        if len([integer(name, n) for n in listed(name, shape)]) not in (4, 5, 6):
            raise ValueError(
                f"{name}: got {list(shape)}; must have 4, 5 or 6 dimensions, those of batch, heads "
                "and head dim besides 1, 2 or 3 spatial axes"
            )
    return len(next(iter(shapes.values()))) - 3


def _heads_last(shape: Shape) -> Shape:
    batch, heads, *grid, dim = shape
    return batch, *grid, heads, dim


def _heads_first(shape: Shape) -> Shape:
    batch, *grid, heads, dim = shape
    return batch, heads, *grid, dim


def _tokens(like: Shape, axis: int, count: int) -> Shape | None:
    """The shape of `count` additional tokens for keys or values shaped `like`, None for none:
    the spatial axes replaced by one. `axis` is the first of them."""
    rank = len(like) - 3
    count = integer("additional", count, 0)
    return (*like[:axis], count, *like[axis + rank :]) if count else None


def _check(
    op: str, config: Config, inputs: Sequence[Shape | None], outputs: list[bool | None]
) -> None:
    """Raises what the operation itself raises for inputs of these shapes."""
    specs = [None if shape is None else (tuple(shape), "float32") for shape in inputs]
    _core.plan(op, config, None, "", specs, outputs)


def add_natten_handle(flop_ctr: Any) -> Any:
    """Teaches an `fvcore.nn.FlopCountAnalysis` natten's operators, and returns it. It counts MACs,
    of the forward pass."""

    handles = {f"natten::{name}": functools.partial(_traced, macs) for name, macs in _MACS.items()}
    return flop_ctr.set_op_handle(**handles)


def _traced(macs: Callable[..., int], inputs: list[Any], outputs: list[Any]) -> int:
    """`macs` of the inputs of a traced call."""
    return macs(*map(_traced_argument, inputs))


def _traced_argument(value: Any) -> Any:
    """What a `torch._C.Value` of a traced graph stands for: a shape, a list of numbers, a constant
    or None."""
    if value.isCompleteTensor():
        return value.type().sizes()
    if value.node().kind() == "prim::ListConstruct":
        return [element.toIValue() for element in value.node().inputs()]
    return value.toIValue()


def qk_rpb_flop(inputs: list[Any], outputs: list[Any]) -> int:
    """MACs of `na1d_qk`, `na2d_qk` or `na3d_qk`, as an fvcore handle of `natten::qk`.

    Args:
        inputs, outputs: the values of a traced call.
    """
    return _traced(_qk, inputs, outputs)


def av_flop(inputs: list[Any], outputs: list[Any]) -> int:
    """MACs of `na1d_av`, `na2d_av` or `na3d_av`, as an fvcore handle of `natten::av`.

    Args:
        inputs, outputs: the values of a traced call.
    """
    return _traced(_av, inputs, outputs)


# NATTEN before 0.17.4 has one for each rank.
qk_1d_rpb_flop = qk_2d_rpb_flop = qk_3d_rpb_flop = qk_rpb_flop
av_1d_flop = av_2d_flop = av_3d_flop = av_flop


def get_flops(model: Any, input: Any, disable_warnings: bool = False) -> int:
    """MACs of `model(input)`, counted by fvcore.

    Args:
        model: a `torch.nn.Module`.
        input: a tensor, or a tuple of the model's arguments.
        disable_warnings: do not log which other operators fvcore does not count.

    Raises:
        ImportError: fvcore is not installed.
    """
    try:
        from fvcore.nn import FlopCountAnalysis  # type: ignore[import-not-found,import-untyped]
    except ImportError as error:
        raise ImportError(
            "get_flops counts with fvcore, which is not installed: pip install fvcore. Without it, "
            "torch.utils.flop_counter.FlopCounterMode counts natten's operators too"
        ) from error
    flop_ctr = add_natten_handle(FlopCountAnalysis(model, input))
    return flop_ctr.unsupported_ops_warnings(not disable_warnings).total()


__all__ = [
    "add_natten_handle",
    "av_1d_flop",
    "av_2d_flop",
    "av_3d_flop",
    "av_flop",
    "fna_flop_count",
    "get_flops",
    "na_av_flop_count",
    "na_qk_flop_count",
    "qk_1d_rpb_flop",
    "qk_2d_rpb_flop",
    "qk_3d_rpb_flop",
    "qk_rpb_flop",
    "register_torch_formulas",
]
