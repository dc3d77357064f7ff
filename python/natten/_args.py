"""Arguments that the adapters share, and the flat form in which they travel.

Only what C++ cannot see is checked here: that an argument is an integer or a sequence of them, one
per spatial axis. All else is checked by libnatten.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import TypeAlias

from natten import _core, context

Ints: TypeAlias = int | Sequence[int]
Bools: TypeAlias = bool | Sequence[bool]
Config: TypeAlias = tuple[int, ...]

# Bits of the last integer of a config; mirrors natten::bindings::Flag.
HAS_SCALE = 1
EMPTY_SLOTS_ZERO = 2
SEPARATE_KEY_GRID = 4  # the window is all of the keys' grid; kernel_size is a placeholder
NONDETERMINISTIC = 8
ALLOW_TF32 = 16


def per_axis(name: str, value: Ints | Bools, rank: int) -> tuple[int, ...]:
    """`value` for every axis, or one value per axis, as a tuple of `rank` ints."""
    if isinstance(value, int):  # by far the most frequent, and quicker than what follows
        return (value,) * rank
    try:
        if not isinstance(value, Sequence):
            return (operator.index(value),) * rank
        values = tuple(operator.index(v) for v in value)
    except TypeError:
        raise TypeError(
            f"{name}: got {value!r}; must be an integer or {rank} integers, one per spatial axis"
        ) from None
    if len(values) != rank:
        raise ValueError(
            f"{name}: got {value!r}, {len(values)} elements; must be an integer or {rank}, "
            "one per spatial axis"
        )
    return values


def make_config(
    rank: int,
    kernel_size: Ints,
    dilation: Ints = 1,
    is_causal: Bools = False,
    stride: Ints = 1,
    *,
    q_tile_shape: Ints | None = None,
    kv_tile_shape: Ints | None = None,
    backward_q_tile_shape: Ints | None = None,
    backward_kv_tile_shape: Ints | None = None,
    backward_kv_splits: Ints | None = None,
    flags: int = 0,
) -> Config:
    """The flat list of integers that `natten._core` takes (bindings/call.h)."""
    config = [rank, *per_axis("kernel_size", kernel_size, rank)]
    for name, value in (
        ("dilation", dilation),
        ("is_causal", is_causal),
        ("stride", stride),
        ("q_tile_shape", q_tile_shape),
        ("kv_tile_shape", kv_tile_shape),
        ("backward_q_tile_shape", backward_q_tile_shape),
        ("backward_kv_tile_shape", backward_kv_tile_shape),
        ("backward_kv_splits", backward_kv_splits),
    ):
        if value is None:
            config.append(0)
        else:
            config += (rank, *per_axis(name, value, rank))
    return (*config, flags)


def window_size(config: Sequence[int], key_grid: Sequence[int]) -> int:
    """Slots of a window: the product of its kernel size, or of the keys' grid where they have one
    of their own."""
    return math.prod(key_grid if config[-1] & SEPARATE_KEY_GRID else config[1 : 1 + config[0]])


def attention_flags(scale: float | None) -> int:
    """The flags of a fused call: what its arguments and the process's switches say."""
    flags = 0 if scale is None else HAS_SCALE
    if context.is_kv_parallelism_in_fused_na_enabled():
        flags |= NONDETERMINISTIC
    if context.is_tf32_in_gemm_na_enabled():
        flags |= ALLOW_TF32
    return flags


def with_flags(config: Config, flags: int) -> Config:
    return (*config[:-1], config[-1] | flags)


def real_scale(scale: float | None) -> float | None:
    """`scale` as a float; libnatten checks that it is finite."""
    if scale is None:
        return None
    try:
        return float(scale)
    except (TypeError, ValueError):
        raise TypeError(f"scale: got {scale!r}; must be a real number or None") from None


def spelled_is_causal(is_causal: Bools, is_casual: Bools | None) -> Bools:
    """Accepts the misspelling `is_casual`, which widely copied examples contain."""
    if is_casual is None:
        return is_causal
    warnings.warn("is_casual is a misspelling of is_causal; it is taken as is_causal", stacklevel=4)
    return is_casual


def check_neighborhood(
    kernel_size: tuple[int, ...], dilation: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    """Raises what libnatten says of values that fit no grid at all."""
    rank = len(kernel_size)
    smallest_grid = (max(k * d, 1) for k, d in zip(kernel_size, dilation, strict=True))
    attn = (1, 1, *smallest_grid, max(math.prod(kernel_size), 1))
    config = make_config(rank, kernel_size, dilation, stride=stride)
    _core.plan("rpb_scatter", config, None, "", [(attn, "float32")], [True], device=None)


def check_merge(
    outputs: Sequence[tuple[Sequence[int], str]], lse_tensors: Sequence[tuple[Sequence[int], str]]
) -> None:
    """Raises where (shape, dtype name) of attentions and their logsumexps cannot be merged."""
    if not outputs or len(outputs) != len(lse_tensors):
        raise ValueError(
            f"outputs, lse_tensors: got {len(outputs)} and {len(lse_tensors)} tensors; must be "
            "equally many, at least one"
        )
    shape = list(outputs[0][0])
    if not shape:
        raise ValueError("outputs: got shape []; must be [..., heads, value_head_dim]")
    statistics = ["float64", "float32"]
    for name, tensors, want, dtypes in (
        ("outputs", outputs, shape, [*statistics, "bfloat16", "float16"]),
        ("lse_tensors", lse_tensors, shape[:-1], statistics),
    ):
        for got, dtype in tensors:
            if list(got) != want:
                raise ValueError(f"{name}: got shape {list(got)}; must be {want}")
            if dtype not in dtypes:
                raise TypeError(
                    f"{name}: got dtype {dtype}; must be {', '.join(dtypes[:-1])} or {dtypes[-1]}"
                )
            if dtype != tensors[0][1]:
                raise TypeError(f"{name}: got dtypes {tensors[0][1]} and {dtype}; must be one")


def named(name: str, rank: int, module: str) -> Callable[[Callable], Callable]:
    """Names the function that a factory made for one rank, and fills the rank into its doc."""

    def apply(function: Callable) -> Callable:
        function.__name__ = function.__qualname__ = name.format(rank=rank)
        function.__module__ = module
        function.__doc__ = (function.__doc__ or "").replace("{rank}", str(rank))
        return function

    return apply
