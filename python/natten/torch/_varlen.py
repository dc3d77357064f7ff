"""Neighborhood attention on grids of different shapes that lie one after another in tensors of
batch 1.

Grids that are alike and follow each other are one call. Without gradients those with one window run
in one parallel region, else each is a call of its own, which PyTorch differentiates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias, Unpack

import torch
from torch import Tensor

from natten import _core
from natten._args import (
    Bools,
    Config,
    Ints,
    UpstreamKeywords,
    check_extra,
    integer,
    make_config,
    with_flags,
)
from natten._kernel import COMPOSED
from natten.torch import _composed, _functional, _nested, _ops
from natten.torch._private import (
    is_any_autocast_enabled,
    is_plain,
    refuses_script,
    takes_part_in_autograd,
)
from natten.torch._tuning import fused_flags

# How many grids follow each other that are alike, their shape, and their config without flags.
Run: TypeAlias = tuple[int, tuple[int, ...], Config]

_KEYS = {"backend", "runs"}


def _grids(token_layout_list: Any) -> list[tuple[int, ...]]:
    """The shapes of a list, all of one rank."""
    must = "must be a list of shapes, such as [(8, 8), (6, 10)]"
    if not isinstance(token_layout_list, Sequence) or isinstance(token_layout_list, str):
        raise TypeError(f"token_layout_list: got {token_layout_list!r}; {must}")
    if not token_layout_list:
        raise ValueError(f"token_layout_list: got {token_layout_list!r}; {must}, with at least one")
    for grid in token_layout_list:
        if not isinstance(grid, Sequence) or isinstance(grid, str):
            raise TypeError(f"token_layout_list: has {grid!r}; {must}")
    grids = [tuple(integer("token_layout_list", n, 0) for n in grid) for grid in token_layout_list]
    for grid in grids:
        if len(grid) not in (1, 2, 3) or len(grid) != len(grids[0]):
            raise ValueError(
                f"token_layout_list: has {grids[0]} and {grid}; all must have 1, 2 or 3 axes, "
                "equally many"
            )
    return grids


def _for_each_grid(name: str, one: Ints | None, of_each: Any, count: int) -> Sequence[Ints]:
    """The values of an option of windows: those of a list, or the same for all."""
    if of_each is None:
        if one is None:
            raise ValueError(f"{name}, {name}_list: got None for both; one must be given")
        return [one] * count
    if not isinstance(of_each, Sequence) or isinstance(of_each, str):
        raise TypeError(f"{name}_list: got {of_each!r}; must be a list, or None")
    if len(of_each) != count:
        raise ValueError(
            f"{name}_list: got {len(of_each)} elements; must be {count}, one for each of "
            "token_layout_list"
        )
    return of_each


@refuses_script
def configure_varlen(
    token_layout_list: Sequence[Sequence[int]],
    head_dim: int,
    device: torch.device | str | int,
    dtype: torch.dtype,
    requires_grad: bool,
    head_dim_v: int | None = None,
    *,
    kernel_size: Ints | None = 2,
    stride: Ints | None = 1,
    dilation: Ints | None = 1,
    is_causal: Bools | None = False,
    kernel_size_list: Sequence[Ints] | None = None,
    stride_list: Sequence[Ints] | None = None,
    dilation_list: Sequence[Ints] | None = None,
    backend: str | None = None,
    q_tile_shape: Ints | None = None,
    kv_tile_shape: Ints | None = None,
    backward_q_tile_shape: Ints | None = None,
    backward_kv_tile_shape: Ints | None = None,
    **upstream: Unpack[UpstreamKeywords],
) -> dict[str, Any]:
    """What `neighborhood_attention_varlen` takes in place of shapes and windows: made and checked
    once for all layers and steps that have the same.

    Args:
        token_layout_list: the shapes of the grids, in the order in which they lie; all of 1, 2 or 3
            axes.
        head_dim, head_dim_v: head dims of queries and keys, and of values; one for both by default.
        device, dtype, requires_grad: of the tensors, as NATTEN takes them. What is made here does
            not depend on the device.
        kernel_size, stride, dilation, is_causal: the window of all grids, as in `na2d`.
        kernel_size_list, stride_list, dilation_list: instead, those of each grid.
        backend, q_tile_shape, kv_tile_shape, backward_q_tile_shape, backward_kv_tile_shape, and the
            other names of NATTEN's kernels: as in `na2d`.

    Returns:
        A dictionary of this version of natten, of nothing but numbers and strings: it can be
        pickled, and serves any number of heads.

    Raises:
        ValueError: a grid that its window does not fit; another value that does not fit.
        TypeError: an argument of another type; an unsupported dtype.
    """
    if upstream:
        check_extra("configure_varlen", (), upstream)
    grids = _grids(token_layout_list)
    dims = [integer("head_dim", head_dim, 0)]
    dims.append(dims[0] if head_dim_v is None else integer("head_dim_v", head_dim_v, 0))
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: got {dtype!r}; must be a torch.dtype")
    torch.device(device)  # raises unless it is one
    name = _functional._backend(backend)
    windows = zip(
        grids,
        _for_each_grid("kernel_size", kernel_size, kernel_size_list, len(grids)),
        _for_each_grid("stride", stride, stride_list, len(grids)),
        _for_each_grid("dilation", dilation, dilation_list, len(grids)),
        strict=True,
    )
    examples: list[tuple[tuple[int, ...], Config]] = []
    checked = set()
    for i, (grid, kernel, step, gap) in enumerate(windows):
        try:
            config = make_config(
                len(grid),
                kernel,
                gap,
                is_causal,
                step,
                q_tile_shape=q_tile_shape,
                kv_tile_shape=kv_tile_shape,
                backward_q_tile_shape=backward_q_tile_shape,
                backward_kv_tile_shape=backward_kv_tile_shape,
            )
            # While a graph is traced its operators check this.
            if (grid, config) not in checked and not torch.compiler.is_compiling():
                _check(grid, config, dims, dtype, name)
                checked.add((grid, config))
        except (TypeError, ValueError) as error:
            raise type(error)(f"token_layout_list[{i}], {grid}: {error}") from None
        examples.append((grid, config))
    runs = [(len(list(alike)), *example) for example, alike in itertools.groupby(examples)]
    return {"backend": name, "runs": runs}


def _check(
    grid: tuple[int, ...], config: Config, dims: Sequence[int], dtype: torch.dtype, backend: str
) -> None:
    """Raises what a call on one grid would, of what does not depend on a device."""
    of_scores, of_values = (((1, *grid, 1, dim), _ops.name_of(dtype)) for dim in dims)
    specs = [of_scores, of_scores, of_values, *[None] * 4]
    backend = "" if backend == COMPOSED else backend
    _core.plan("attention_forward", config, None, backend, specs, [True, None], None)


@refuses_script
def neighborhood_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    metadata: dict[str, Any] | None = None,
    token_layout_list: Sequence[Sequence[int]] | None = None,
    *,
    kernel_size: Ints | None = 2,
    stride: Ints | None = 1,
    dilation: Ints | None = 1,
    is_causal: Bools | None = False,
    kernel_size_list: Sequence[Ints] | None = None,
    stride_list: Sequence[Ints] | None = None,
    dilation_list: Sequence[Ints] | None = None,
    scale: float | None = None,
    backend: str | None = None,
    q_tile_shape: Ints | None = None,
    kv_tile_shape: Ints | None = None,
    backward_q_tile_shape: Ints | None = None,
    backward_kv_tile_shape: Ints | None = None,
    return_lse: bool = False,
    **upstream: Unpack[UpstreamKeywords],
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention within each of many grids, which differ in shape, heads-last.

    The tokens of the grids lie one after another, without padding, those of a grid in row-major
    order. Each grid is computed as `na1d`, `na2d` or `na3d` would compute it alone.

    Args:
        query: [1, tokens, heads, head_dim], float64, float32, bfloat16 or float16.
        key: [1, tokens, kv_heads, head_dim]; kv_heads divides heads (grouped-query).
        value: [1, tokens, kv_heads, value_head_dim].
        metadata: of `configure_varlen`: shapes, windows and backend.
        token_layout_list: instead, the shapes of the grids, with their windows below. There may be
            more tokens than these have: nobody sees those, and they see nothing, so that their
            output is 0 and their logsumexp -inf.
        kernel_size, stride, dilation, is_causal, kernel_size_list, stride_list, dilation_list,
        backend, q_tile_shape, kv_tile_shape, backward_q_tile_shape, backward_kv_tile_shape, and the
            other names of NATTEN's kernels: as in `configure_varlen`, for which they are here.
        scale: factor on the scores; head_dim ** -0.5 by default.
        return_lse: also return logsumexp.

    Returns:
        output [1, tokens, heads, value_head_dim]; with return_lse also logsumexp
        [1, tokens, heads], float32 (float64 for float64). Both have derivatives of any order.

    Raises:
        ValueError: fewer tokens than the grids have; another shape or value that does not fit.
        TypeError: an argument of another type; an unsupported or mismatched dtype.
    """
    if upstream:
        check_extra("neighborhood_attention_varlen", (), upstream)
    for name, x in (("query", query), ("key", key), ("value", value)):
        _ops.check_tensor(name, x)
        if x.dim() != 4 or x.shape[0] != 1:
            raise ValueError(f"{name}: got shape {list(x.shape)}; must be [1, tokens, heads, dim]")
        if x.shape[1] != query.shape[1]:
            raise ValueError(
                f"{name}: got {x.shape[1]} tokens; must be {query.shape[1]}, as many as query has"
            )
    if metadata is None:
        if token_layout_list is None:
            raise ValueError("metadata, token_layout_list: got None for both; one must be given")
        metadata = configure_varlen(
            token_layout_list,
            query.shape[-1],
            query.device,
            query.dtype,
            query.requires_grad,
            value.shape[-1],
            kernel_size=kernel_size,
            stride=stride,
            dilation=dilation,
            is_causal=is_causal,
            kernel_size_list=kernel_size_list,
            stride_list=stride_list,
            dilation_list=dilation_list,
            backend=backend,
            q_tile_shape=q_tile_shape,
            kv_tile_shape=kv_tile_shape,
            backward_q_tile_shape=backward_q_tile_shape,
            backward_kv_tile_shape=backward_kv_tile_shape,
        )
    else:
        if not isinstance(metadata, dict) or not metadata.keys() >= _KEYS:
            raise TypeError(
                f"metadata: got {metadata!r}; must be what natten.varlen.configure_varlen returns"
            )
        lists = {
            "token_layout_list": token_layout_list,
            "kernel_size_list": kernel_size_list,
            "stride_list": stride_list,
            "dilation_list": dilation_list,
        }
        for name, given in lists.items():
            if given is not None:
                raise ValueError(f"{name}: given together with metadata; must be in one of the two")
    runs = metadata["runs"]
    lengths = [count * math.prod(grid) for count, grid, _ in runs]
    rest = query.shape[1] - sum(lengths)
    if rest < 0:
        raise ValueError(
            f"query: got {query.shape[1]} tokens; must be at least {sum(lengths)}, as many as the "
            "grids have"
        )
    name = _functional._backend(backend)
    if metadata["backend"]:
        if backend is not None and name != metadata["backend"]:
            raise ValueError(
                f"backend: got {backend!r}; must be {metadata['backend']!r}, which metadata says, "
                "or None"
            )
        name = metadata["backend"]
    options = fused_flags(scale), _functional._scale(scale), name
    sizes = [*lengths, rest]
    output, logsumexp = (
        _in_place(query, key, value, runs, sizes, *options)
        if _is_plain(query, key, value, name)
        else _joined(query, key, value, runs, sizes, *options, return_lse)
    )
    return (output, logsumexp) if return_lse else output


def _is_plain(query: Tensor, key: Tensor, value: Tensor, backend: str) -> bool:
    """Whether nothing but numbers is wanted, and kernels of libnatten compute them."""
    if torch.compiler.is_compiling() or is_any_autocast_enabled():
        return False
    tensors = query, key, value
    if not is_plain(tensors) or takes_part_in_autograd(tensors) or backend == COMPOSED:
        return False
    return query.is_cpu or not _composed.serves(query, backend)


def _batches(x: Tensor, runs: Sequence[Run], sizes: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """([grids, *grid, ...] of each run, the tokens after them)."""
    *parts, rest = x.split(sizes, 1)
    return [
        part.unflatten(1, (count, *grid)).squeeze(0)
        for part, (count, grid, _) in zip(parts, runs, strict=True)
    ], rest


def _in_place(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: Sequence[Run],
    sizes: Sequence[int],
    flags: int,
    scale: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(output, logsumexp), each written where it belongs."""
    shape = query.shape[:-1]
    output = query.new_empty((*shape, value.shape[-1]))
    logsumexp = query.new_empty(
        shape, dtype=_ops.dtype_of(_ops.attention_forward.outputs[1], query.dtype)
    )
    inputs = [
        [_ops.readable(part) for part in _batches(x, runs, sizes)[0]] for x in (query, key, value)
    ]
    outputs, rest = zip(*(_batches(x, runs, sizes) for x in (output, logsumexp)), strict=True)
    rest[0].zero_()
    rest[1].fill_(-torch.inf)
    calls: dict[Config, list[Any]] = {}
    for (_, _, config), q, k, v, *results in zip(runs, *inputs, *outputs, strict=True):
        calls.setdefault(config, []).append(((q, k, v, *[None] * 4), results))
    for config, alike in calls.items():
        _nested.run_all(_ops.attention_forward, alike, with_flags(config, flags), scale, backend)
    return output, logsumexp


def _joined(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: Sequence[Run],
    sizes: Sequence[int],
    flags: int,
    scale: float | None,
    backend: str,
    statistic: bool,
) -> tuple[Tensor, Any]:
    """The same as a graph of calls, with None for logsumexp unless `statistic`."""
    (queries, rest), (keys, _), (values, _) = (
        _batches(x, runs, sizes) for x in (query, key, value)
    )
    outputs, statistics = [], []
    for q, k, v, (_, _, config) in zip(queries, keys, values, runs, strict=True):
        output, logsumexp = _functional._call(
            _ops.attention_forward, q, k, v, *[None] * 4,
            with_flags(config, flags), scale, backend, statistic=statistic,
        )  # fmt: skip
        outputs.append(output.flatten(0, -3))
        if statistic:
            statistics.append(logsumexp.flatten(0, -2))
    if rest.shape[1]:
        shape = rest.shape[1:-1]
        outputs.append(outputs[0].new_zeros((*shape, value.shape[-1])))
        if statistic:
            statistics.append(statistics[0].new_full(shape, -torch.inf))
    output = torch.cat(outputs).unsqueeze(0)
    return output, torch.cat(statistics).unsqueeze(0) if statistic else None
