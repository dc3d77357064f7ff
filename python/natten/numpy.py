"""Neighborhood attention on numpy arrays, forward only. Needs neither PyTorch nor JAX.

Functions for 1, 2 and 3 spatial axes: `na1d`, ... (fused), `na1d_qk`, `na1d_av`, ... (unfused), and
`attention` and `merge_attentions`. docs/numpy.md shows how to use them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Never, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from natten import _core
from natten._args import (
    HAS_SCALE,
    SEPARATE_KEY_GRID,
    Bools,
    Boundaries,
    Config,
    Ints,
    check_extra,
    check_merge,
    listed,
    make_config,
    named,
    real_scale,
    with_flags,
)
from natten._choices import tell
from natten._kernel import chosen_backend, tell_meaning
from natten._log import TELLS_CHOICES
from natten._merge import merge
from natten._roles import roles_of

__all__ = [
    "attention",
    "merge_attentions",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na3d",
    "na3d_av",
    "na3d_qk",
]

# `output`, or `(output, logsumexp)` with return_lse=True; a union would not help callers.
FusedResult: TypeAlias = Any

_INPUTS = {op: roles_of(op)[0] for op in ("attention_forward", "qk", "av")}

# What numpy hands over by DLPack. Those that libnatten does not compute with, it refuses itself.
_DLPACK_DTYPES = np.typecodes["AllInteger"] + "?efdFD"


def _as_array(name: str, value: ArrayLike | None) -> np.ndarray:
    """`value` as an array that libnatten can read: copied only where its layout requires that."""
    if value is None:
        raise TypeError(f"{name}: got None; must be an array")
    if isinstance(value, np.ndarray) and type(value) is not np.ndarray and np.ma.is_masked(value):
        raise TypeError(f"{name}: got a masked array; must be a plain one (key_mask hides keys)")
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: got {type(value)}; must be an array: {error}") from error
    dtype = array.dtype
    if dtype.char not in _DLPACK_DTYPES:
        raise TypeError(
            f"{name}: got dtype {dtype.name}; must be float64, float32 or float16 in numpy "
            "(convert it with astype)"
        )
    if (
        dtype.isnative
        and array.flags.aligned
        and (array.ndim == 0 or array.strides[-1] == dtype.itemsize)
    ):
        return array
    return np.array(array, dtype.newbyteorder("="), order="C")


def _run(
    op: str,
    arrays: Sequence[ArrayLike | None],
    config: Config,
    backend: str | None,
    scale: float | None = None,
    wanted: tuple[bool | None, ...] = (True,),
) -> list[Any]:
    inputs = [
        None if x is None and not role.is_required else _as_array(role.name, x)
        for role, x in zip(_INPUTS[op], arrays, strict=True)
    ]
    if backend is not None:
        tell_meaning(backend)
    backend = chosen_backend(backend)
    outputs = _core.run(op, config, scale, backend, inputs, wanted, None, np.empty)
    if TELLS_CHOICES:
        tell(op, config, scale, backend, inputs, outputs, "cpu")
    return outputs


def _attention(
    arrays: Sequence[ArrayLike | None],
    config: Config,
    backend: str | None,
    scale: float | None,
    return_lse: bool,
) -> FusedResult:
    if scale is not None:
        config = with_flags(config, HAS_SCALE)
    wanted = (True, True if return_lse else None)
    output, logsumexp = _run(
        "attention_forward", arrays, config, backend, real_scale(scale), wanted
    )
    return (output, logsumexp) if return_lse else output


def _make_fused(rank: int) -> Callable[..., FusedResult]:
    @named("na{rank}d", rank, __name__)
    def fused(
        query: ArrayLike,
        key: ArrayLike,
        value: ArrayLike,
        kernel_size: Ints,
        *by_position: Never,
        stride: Ints = 1,
        dilation: Ints = 1,
        is_causal: Bools | None = False,
        boundary: Boundaries = "shift",
        rpb: ArrayLike | None = None,
        key_mask: ArrayLike | None = None,
        scale: float | None = None,
        additional_keys: ArrayLike | None = None,
        additional_values: ArrayLike | None = None,
        query_offset: Ints | None = None,
        key_offset: Ints | None = None,
        grid_size: Ints | None = None,
        return_lse: bool = False,
        backend: str | None = None,
    ) -> FusedResult:
        """Fused {rank}-D neighborhood attention, heads-last.

        Every token attends to a window of `kernel_size` tokens around it; the weights are never
        stored. `spatial` below stands for {rank} axes.

        Heads are last here and first in `na{rank}d_qk`. An array in the wrong layout is an array of
        another grid, and raises no error where that grid is large enough for the window.

        Args:
            query: [batch, *spatial, heads, head_dim], float64, float32 or float16.
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
            key_mask: bool [batch or 1, *spatial of key], True where a key may be seen. A query that
                sees no key gets output 0 and logsumexp -inf.
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

        Returns:
            output [batch, *spatial, heads, value_head_dim], of the dtype of query; with return_lse
            also logsumexp [batch, *spatial, heads], float32 (float64 for float64), the natural
            logarithm of the sum of exp(score) (`merge_attentions` uses it).

        Raises:
            ValueError: a shape or value that does not fit; the message says which and why.
            TypeError: an argument of another type; an unsupported or mismatched dtype.
        """
        if by_position:
            check_extra(f"na{rank}d", by_position)
        config = make_config(
            rank,
            kernel_size,
            dilation,
            is_causal,
            stride,
            boundary,
            query_offset=query_offset,
            key_offset=key_offset,
            grid_size=grid_size,
        )
        arrays = (query, key, value, rpb, additional_keys, additional_values, key_mask)
        return _attention(arrays, config, backend, scale, return_lse)

    return fused


def _make_qk(rank: int) -> Callable[..., np.ndarray]:
    @named("na{rank}d_qk", rank, __name__)
    def qk(
        query: ArrayLike,
        key: ArrayLike,
        kernel_size: Ints,
        dilation: Ints = 1,
        additional_keys: ArrayLike | None = None,
        is_causal: Bools | None = False,
        rpb: ArrayLike | None = None,
        *,
        stride: Ints = 1,
        boundary: Boundaries = "shift",
        key_mask: ArrayLike | None = None,
        query_offset: Ints | None = None,
        key_offset: Ints | None = None,
        grid_size: Ints | None = None,
        backend: str | None = None,
    ) -> np.ndarray:
        """Scores of {rank}-D neighborhood attention, heads-first. No scale is applied.

        Heads are first here and last in `na{rank}d`; see there.

        Args:
            query, key: [batch, heads, *spatial, head_dim], of the same dtype (see `na{rank}d`).
            additional_keys: [batch, heads, n, head_dim]; their n scores follow the window's.
            rpb: bias [heads, 2 * kernel_size[0] - 1, ...] by relative position.
            kernel_size, dilation, is_causal, stride, boundary, key_mask, query_offset, key_offset,
            grid_size, backend: as in `na{rank}d`.

        Returns:
            attn [batch, heads, *spatial, slots], of the dtype of query; slots = product of
            kernel_size, in row-major window order, plus n. Slots that causality, a cut border or
            key_mask leave empty hold -inf.

        Raises:
            ValueError, TypeError: as `na{rank}d`.
        """
        config = make_config(
            rank,
            kernel_size,
            dilation,
            is_causal,
            stride,
            boundary,
            query_offset=query_offset,
            key_offset=key_offset,
            grid_size=grid_size,
        )
        return _run("qk", (query, key, rpb, additional_keys, key_mask), config, backend)[0]

    return qk


def _make_av(rank: int) -> Callable[..., np.ndarray]:
    @named("na{rank}d_av", rank, __name__)
    def av(
        attn: ArrayLike,
        value: ArrayLike,
        kernel_size: Ints,
        dilation: Ints = 1,
        additional_values: ArrayLike | None = None,
        is_causal: Bools | None = False,
        *,
        stride: Ints = 1,
        boundary: Boundaries = "shift",
        key_mask: ArrayLike | None = None,
        query_offset: Ints | None = None,
        key_offset: Ints | None = None,
        grid_size: Ints | None = None,
        backend: str | None = None,
    ) -> np.ndarray:
        """Values weighted by {rank}-D neighborhood attention weights, heads-first.

        Heads are first here and last in `na{rank}d`; see there.

        Args:
            attn: [batch, heads, *spatial, slots], slots as `na{rank}d_qk` returns them. Empty ones
                are ignored.
            value: [batch, heads, *spatial, head_dim], of the dtype of attn.
            additional_values: [batch, heads, n, head_dim], for the last n slots.
            kernel_size, dilation, is_causal, stride, boundary, key_mask, query_offset, key_offset,
            grid_size, backend: as in `na{rank}d`.

        Returns:
            output [batch, heads, *spatial, head_dim], of the dtype of attn.

        Raises:
            ValueError, TypeError: as `na{rank}d`.
        """
        config = make_config(
            rank,
            kernel_size,
            dilation,
            is_causal,
            stride,
            boundary,
            query_offset=query_offset,
            key_offset=key_offset,
            grid_size=grid_size,
        )
        return _run("av", (attn, value, additional_values, key_mask), config, backend)[0]

    return av


na1d, na2d, na3d = map(_make_fused, (1, 2, 3))
na1d_qk, na2d_qk, na3d_qk = map(_make_qk, (1, 2, 3))
na1d_av, na2d_av, na3d_av = map(_make_av, (1, 2, 3))


def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    is_causal: bool | None = False,
    scale: float | None = None,
    return_lse: bool = False,
    *,
    backend: str | None = None,
) -> FusedResult:
    """Softmax attention over all keys, heads-last. There is no mask and no dropout.

    Args:
        query: [batch, length, heads, head_dim], float64, float32 or float16.
        key: [batch, kv_length, kv_heads, head_dim]; kv_heads divides heads (grouped-query).
        value: [batch, kv_length, kv_heads, value_head_dim].
        is_causal: query i sees keys 0 to i, also where the lengths differ.
        scale: factor on the scores; head_dim ** -0.5 by default.
        return_lse: also return logsumexp.
        backend: name of the implementation to use; by default the first that accepts the call.

    Returns:
        output [batch, length, heads, value_head_dim]; with return_lse also logsumexp
        [batch, length, heads], as `na1d`.

    Raises:
        ValueError, TypeError: as `na1d`.
    """
    config = make_config(1, 1, is_causal=is_causal, flags=SEPARATE_KEY_GRID)
    arrays = (query, key, value, None, None, None, None)
    return _attention(arrays, config, backend, scale, return_lse)


def merge_attentions(
    outputs: Sequence[ArrayLike], lse_tensors: Sequence[ArrayLike]
) -> tuple[np.ndarray, np.ndarray]:
    """Combines attention over disjoint sets of keys into attention over their union, exactly.

    With lse = log sum_i exp(lse_i), output = sum_i exp(lse_i - lse) output_i.

    Args:
        outputs: arrays [..., heads, value_head_dim], all of one shape and dtype: float64, float32
            or float16.
        lse_tensors: their logsumexps [..., heads], float32 or float64; -inf where a set holds no
            keys, whose output is ignored.

    Returns:
        (output, lse), of the shapes and dtypes of the inputs. Where all sets are empty, output is
        0 and lse -inf.

    Raises:
        ValueError: nothing to merge, or shapes that differ.
        TypeError: dtypes that differ or are not supported.
    """
    parts = [_as_array("outputs", x) for x in listed("outputs", outputs)]
    lses = [_as_array("lse_tensors", x) for x in listed("lse_tensors", lse_tensors)]
    check_merge(*([(x.shape, x.dtype.name) for x in arrays] for arrays in (parts, lses)))
    with np.errstate(all="ignore"):  # infinities and NaN pass through silently, as in the kernels
        output, lse = merge(
            np, parts, lses, lambda mask, x: np.where(mask, 0, x) if mask.any() else x
        )
    return np.asarray(output, parts[0].dtype), np.asarray(lse)
