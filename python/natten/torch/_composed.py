"""The backend `composed`: the operations made of PyTorch's own, for every device that PyTorch has.

Tiles of queries meet the keys that any of their queries sees (`natten/_composed.py`), a chunk of
tiles at a time, in float32 at least. Nothing here has a rule for its derivatives: PyTorch
differentiates, maps, compiles and exports what it finds. A chunk alone is computed again in the
backward pass (`_Recomputed`), so that weights are never kept.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from natten import _core
from natten._args import Config, scale_or_default, window_size
from natten._choices import tell_composed
from natten._composed import AxisTiles, Tiles, strides_of, tiles_of
from natten._kernel import COMPOSED, tell_without_kernels
from natten._log import TELLS_CHOICES
from natten.torch import _ops
from natten.torch._autograd import without_empty_rows
from natten.torch._private import (
    any_requires_grad,
    forward_mode_levels,
    is_any_autocast_enabled,
    is_in_forward_mode,
    pulled_back,
    with_dynamo,
)

# Pairs of query and key whose scores are in memory at a time, over batch and heads: on the CPU what
# stays in its cache, less often what is gathered from keys is added up; on other devices, and in
# graphs, which have a copy of the code per chunk, what keeps them busy.
_PAIRS_ON_CPU = 2**18
_PAIRS_ON_CPU_WITH_GRADIENTS = 2**21
_PAIRS = 2**24
_PAIRS_OF_TILE = 2**16

# Whether libnatten has kernels for CUDA tensors of this PyTorch; ROCm calls its devices cuda too.
_HAS_CUDA = bool(_core.backends("cuda")) and torch.version.hip is None


class _Observed(threading.local):
    """Who is told of the calls of this thread: (operator, config, scale, inputs)."""

    by: Callable[..., None] | None = None


observed = _Observed()


def lacks_kernels(device: torch.device) -> bool:
    """Whether libnatten has nothing for a device. `meta` is served by the operators themselves."""
    return device.type not in ("cpu", "meta") and not (device.type == "cuda" and _HAS_CUDA)


def serves(x: Tensor, backend: str) -> bool:
    """Whether a call on `x` is for `composed`, as libnatten has nothing for its device.

    Raises:
        ValueError: another backend is asked for, which that device does not have.
    """
    if not lacks_kernels(x.device):
        return False
    if backend in ("", "fused"):
        return True
    if x.device.type == "cuda":
        return False  # libnatten says how to build with it
    raise ValueError(f'backend: got "{backend}"; must be {COMPOSED} on {x.device.type}')


def _tell(device: torch.device) -> None:
    if lacks_kernels(device):
        advice = "; the README says how to build it with them" if device.type == "cuda" else ""
        tell_without_kernels(device.type, "PyTorch", advice)


def call(operator: _ops.Operator, *args: Any, statistic: bool = True) -> Any:
    """Computes what an operator does; `statistic`: whether logsumexp is wanted, else it is None.

    Raises what the operator raises."""
    inputs, _, config, scale, _ = operator.split(args)
    options: tuple[Any, ...] = (config,)
    if operator.is_fused:
        options = config, scale, statistic
    results = _run(operator.name, *inputs, *options)
    return (*results, None)[:2] if operator.is_fused else results


def call_for_each(examples: Sequence[Sequence[Any]]) -> list[Tensor]:
    """[output, logsumexp] of `attention` for examples that follow each other. Without keys they
    are 0 and -inf."""
    results = []
    for query, key, value, rpb, keys, values, mask, *options in examples:
        if not key.shape[1]:  # one that nobody sees
            key, value = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1)) for x in (key, value))
            mask = torch.zeros(key.shape[:2], dtype=torch.bool, device=key.device)
        inputs = query, key, value, rpb, keys, values, mask
        results.append(call(_ops.attention_forward, *inputs, *options))
    return [torch.cat(x, 1) for x in zip(*results, strict=True)]


def _run(name: str, *args: Any) -> Any:
    operator = getattr(_ops, name)
    inputs = args[: len(operator.inputs)]
    config, scale, *_ = (*args[len(inputs) :], None)
    _check(operator, inputs, config, scale)
    if not is_any_autocast_enabled():
        return _FUNCTIONS[name](*args)
    with torch.autocast(inputs[0].device.type, enabled=False):
        return _FUNCTIONS[name](*args)


# Dynamo need not look inside: what it finds here are operations.
with_dynamo(lambda: torch.compiler.allow_in_graph(_run))


def _check(
    operator: _ops.Operator, inputs: Sequence[Tensor | None], config: Config, scale: float | None
) -> None:
    operator.check_devices(inputs)
    device = next(x.device for x in inputs if x is not None)
    specs: list[Any] = []
    for role, x in zip(operator.inputs, inputs, strict=True):
        if x is None:
            specs.append(None)
            continue
        shape = list(x.shape)
        if shape and role.dims[0] in "BM":  # of any size while a graph is traced
            shape[0] = _known(shape[0])
        specs.append((tuple(map(int, shape)), _ops.dtype_name(x)))
    outputs = [True] * len(operator.outputs)
    _core.plan(operator.name, config, scale, "", specs, outputs, device=None)
    _tell(device)
    if observed.by is not None:
        observed.by(operator, config, scale, inputs)
    if TELLS_CHOICES:
        tell_composed(operator.name, config, specs, str(device))


class _Recomputed(torch.autograd.Function):
    """`function(*tensors)`, a tuple, which is computed again for its derivatives. So of all that it
    computes nothing is kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function: Callable[..., Any], *tensors: Tensor | None) -> Any:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.function, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]

        def function(*tensors: Tensor) -> Any:
            given = iter(tensors)
            return ctx.function(
                *(next(given) if want else x for want, x in zip(wanted, saved, strict=True))
            )

        tensors = (x for want, x in zip(wanted, saved, strict=True) if want)
        gradients = iter(pulled_back(function, tensors, grads))
        return None, *(next(gradients) if want else None for want in wanted)


def _recomputed(
    function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor | None
) -> tuple[Tensor, ...]:
    # In forward mode nothing is kept; inside a compiled graph only transforms tell of that mode. An
    # exported graph is one of the forward pass.
    is_forward_mode = is_in_forward_mode() or forward_mode_levels() > 0
    if not torch.is_grad_enabled() or is_forward_mode or torch.compiler.is_exporting():
        return function(*tensors)
    return _Recomputed.apply(function, *tensors)


class _Axis:
    """The tables of an `AxisTiles` as tensors."""

    def __init__(self, tiles: AxisTiles, tables: Iterator[Tensor]) -> None:
        self.tiles = tiles
        rows = [next(tables).unflatten(0, (tiles.count, -1)) for _ in range(6)]
        self.queries, self.keys, self.begin, self.end, self.slot, self.bias = rows
        self.tile, self.row = next(tables), next(tables)
        self.local = torch.arange(tiles.keys_per_tile, device=self.keys.device)

    @staticmethod
    def tables_of(tiles: AxisTiles) -> list[list[int]]:
        """Of an axis, in the order in which they are read."""
        rows = tiles.queries, tiles.keys, tiles.begin, tiles.end, tiles.slot, tiles.bias
        tables = [list(itertools.chain.from_iterable(table)) for table in rows]
        return [*tables, list(tiles.tile), list(tiles.row)]


class _Problem:
    """The tiles of a call, and which of them are computed together."""

    def __init__(
        self,
        config: Config,
        query_grid: Sequence[int],
        key_grid: Sequence[int],
        additional: int,
        problems: int,  # batch * heads
        tensors: Sequence[Tensor | None],
    ) -> None:
        device = next(x.device for x in tensors if x is not None)
        with_gradients = torch.is_grad_enabled() and any_requires_grad(*tensors)
        # Powers of two, so that there are few different plans.
        pairs_in_memory = _pairs_in_memory(device, with_gradients)
        most = max(_PAIRS // max(problems, 1), 1)
        most = min(2 ** (most.bit_length() - 1), _PAIRS_OF_TILE)
        self.tiles: Tiles = tiles_of(
            config, [int(n) for n in query_grid], [int(n) for n in key_grid], additional, most
        )
        self.additional = additional
        # One tensor with all tables, which goes along as an argument: a tensor that is made under a
        # transform belongs to that, and must not come in by another way.
        tables = [table for axis in self.tiles.axes for table in _Axis.tables_of(axis)]
        self.table_sizes = [len(table) for table in tables]
        numbers = list(itertools.chain.from_iterable(tables))
        self.table = torch.tensor(numbers, dtype=torch.int64, device=device)
        self.queries = self.tiles.queries_per_tile
        self.keys = self.tiles.keys_per_tile + additional
        self.key_tokens = math.prod(self.tiles.key_grid)
        pairs = max(problems, 1) * self.queries * self.keys
        chunks = -(-self.tiles.count * pairs // pairs_in_memory)
        self.tiles_per_chunk = -(-self.tiles.count // min(chunks, self.tiles.count))

    def axes(self, table: Tensor) -> list[_Axis]:
        tables = iter(table.split(self.table_sizes))
        return [_Axis(axis, tables) for axis in self.tiles.axes]

    def queries_by_tile(self) -> Tensor:
        """Of each place in tiles, [tiles * queries of a tile], the number of its query."""
        strides = strides_of(self.tiles.query_grid)
        axes = _Chunk(self, 0, self.tiles.count, self.table).axes
        parts = [
            (axis.queries * stride)[i].unsqueeze(-1)
            for (axis, i), stride in zip(axes, strides, strict=True)
        ]
        return _product(parts, torch.add).flatten()

    def places_of_queries(self) -> Tensor:
        """The inverse, [queries]."""
        by_tile = strides_of([axis.count for axis in self.tiles.axes])
        by_row = strides_of([axis.queries_per_tile for axis in self.tiles.axes])
        parts = [
            (axis.tile * (a * self.queries) + axis.row * b).view(1, -1, 1)
            for axis, a, b in zip(self.axes(self.table), by_tile, by_row, strict=True)
        ]
        return _product(parts, torch.add).flatten()

    def chunks(self) -> list[tuple[int, int]]:
        """(first, past the last) tile of each."""
        step, count = self.tiles_per_chunk, self.tiles.count
        return [(i, min(i + step, count)) for i in range(0, count, step)]


def _pairs_in_memory(device: torch.device, with_gradients: bool) -> int:
    if device.type != "cpu" or torch.compiler.is_compiling():
        return _PAIRS
    return _PAIRS_ON_CPU_WITH_GRADIENTS if with_gradients else _PAIRS_ON_CPU


def _product(parts: Sequence[Tensor], combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combines tables [tiles, rows, columns], one per axis, into that of the product of axes."""
    rank = len(parts)
    total: Tensor | None = None
    for i, part in enumerate(parts):
        tiles, rows, columns = part.shape
        before, after = (1,) * i, (1,) * (rank - 1 - i)
        part = part.reshape(tiles, *before, rows, *after, *before, columns, *after)
        total = part if total is None else combine(total, part)
    assert total is not None
    tiles = total.shape[0]
    rows, columns = math.prod(total.shape[1 : rank + 1]), math.prod(total.shape[rank + 1 :])
    return total.reshape(tiles, rows, columns)


class _Chunk:
    """Some tiles that are computed together."""

    def __init__(self, problem: _Problem, first: int, past: int, table: Tensor) -> None:
        self.problem, self.count = problem, past - first
        numbers = torch.arange(first, past, device=table.device)
        counts = [axis.count for axis in problem.tiles.axes]
        self.axes = [  # each with the tile of it that each tile here has
            (axis, torch.div(numbers, stride, rounding_mode="floor") % axis.tiles.count)
            for axis, stride in zip(problem.axes(table), strides_of(counts), strict=True)
        ]

    def keys(self) -> Tensor:
        """[tiles * keys of a tile]: numbers of keys, additional ones being counted on."""
        p = self.problem
        strides = strides_of(p.tiles.key_grid)
        parts = [
            (axis.keys * stride)[tile].unsqueeze(1)
            for (axis, tile), stride in zip(self.axes, strides, strict=True)
        ]
        keys = _product(parts, torch.add).squeeze(1)
        if p.additional:
            more = torch.arange(p.key_tokens, p.key_tokens + p.additional, device=keys.device)
            keys = torch.cat([keys, more.expand(self.count, p.additional)], 1)
        return keys.flatten()

    def _seen(self) -> list[Tensor]:
        """Per axis [tiles, queries, keys]: which keys a query sees."""
        seen = []
        for axis, tile in self.axes:
            begin, end = axis.begin[tile].unsqueeze(-1), axis.end[tile].unsqueeze(-1)
            seen.append((begin <= axis.local) & (axis.local < end))
        return seen

    def penalty(self, dtype: torch.dtype) -> Tensor | None:
        """[tiles, queries, keys]: -inf where a query does not see a key, else 0. None where all see
        all."""
        p = self.problem
        if p.tiles.is_full:
            return None
        zero = torch.zeros((), dtype=dtype, device=self.axes[0][1].device)
        penalty = _product([torch.where(x, zero, -torch.inf) for x in self._seen()], torch.add)
        return torch.nn.functional.pad(penalty, (0, p.additional)) if p.additional else penalty

    def visible(self, mask: Tensor | None, keys: Tensor) -> Tensor:
        """[batch of mask or 1, tiles, queries, keys]."""
        p = self.problem
        seen = _product(self._seen(), torch.logical_and).unsqueeze(0)
        if p.additional:
            seen = torch.nn.functional.pad(seen, (0, p.additional), value=True)
        if mask is None:
            return seen
        return seen & mask.index_select(1, keys).unflatten(1, (self.count, 1, p.keys))

    def slots(self) -> tuple[Tensor, Tensor]:
        """[tiles, queries, slots]: (local numbers of keys in slots, anything in empty ones; whether
        there is one)."""
        p = self.problem
        places, filled = [], []
        strides = strides_of([axis.keys_per_tile for axis in p.tiles.axes])
        for (axis, tile), stride in zip(self.axes, strides, strict=True):
            begin, end = axis.begin[tile].unsqueeze(-1), axis.end[tile].unsqueeze(-1)
            # Only here, as cut windows of fused functions may be larger than memory.
            slots = torch.arange(axis.tiles.kernel_size, device=tile.device)
            local = axis.slot[tile].unsqueeze(-1) + slots
            filled.append((begin <= local) & (local < end))
            places.append(local.clamp(0, axis.tiles.keys_per_tile - 1) * stride)
        place, fill = _product(places, torch.add), _product(filled, torch.logical_and)
        return self._with_additional(place, fill, p.keys - p.additional)

    def slots_of_keys(self) -> tuple[Tensor, Tensor]:
        """[tiles, queries, keys]: (slots of keys, anything where a query does not see it; whether
        it does)."""
        p = self.problem
        places = []
        sizes = p.tiles.kernel_size
        for (axis, tile), size, stride in zip(self.axes, sizes, strides_of(sizes), strict=True):
            slot = axis.local - axis.slot[tile].unsqueeze(-1)
            places.append(slot.clamp(0, size - 1) * stride)
        place, seen = _product(places, torch.add), _product(self._seen(), torch.logical_and)
        return self._with_additional(place, seen, math.prod(sizes))

    def _with_additional(self, place: Tensor, there: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """The same with columns for the additional keys, whose places follow the others'."""
        count = self.problem.additional
        if not count:
            return place, there
        more = torch.arange(first, first + count, device=place.device)
        place = torch.cat([place, more.expand(*place.shape[:2], count)], -1)
        return place, torch.nn.functional.pad(there, (0, count), value=True)

    def bias(self, rpb: Tensor) -> Tensor:
        """[heads, tiles, queries, keys]; anything where a query does not see a key."""
        p = self.problem
        sizes = rpb.shape[1:]
        parts = []
        for (axis, tile), size, stride in zip(self.axes, sizes, strides_of(sizes), strict=True):
            number = axis.bias[tile].unsqueeze(-1) + axis.local
            parts.append(number.clamp(0, size - 1) * stride)
        number = _product(parts, torch.add).flatten(1)
        heads = rpb.shape[0]
        # By tile, so that the gradient is a sum of sums.
        bias = rpb.flatten(1).unsqueeze(1).expand(heads, self.count, math.prod(sizes))
        bias = bias.gather(2, number.expand(heads, *number.shape))
        bias = bias.unflatten(2, (p.queries, p.keys - p.additional))
        return torch.nn.functional.pad(bias, (0, p.additional)) if p.additional else bias


def _dtype_of(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _tokens(
    x: Tensor, additional: Tensor | None, mask: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Keys or values [batch, heads, tokens, dim], hidden ones 0, and the additional ones."""
    if mask is not None:  # they may hold anything
        x = x.masked_fill(~mask[:, None, :, None], 0.0)
    if additional is not None:
        x = torch.cat([x, additional], 2)
    return x.to(dtype).contiguous()


def _flat_mask(mask: Tensor | None, additional: int) -> tuple[Tensor | None, Tensor | None]:
    """(the mask by token, the same with additional ones, which it does not hide)."""
    if mask is None:
        return None, None
    mask = mask.flatten(1)
    return mask, torch.nn.functional.pad(mask, (0, additional), value=True)


def _count(additional: Tensor | None, axis: int) -> int:
    return 0 if additional is None else int(additional.shape[axis])


def _known(n: Any) -> int:
    """A size, or 1 where a graph is traced for any."""
    return n if type(n) is int else 1


def _over_tiles(
    problem: _Problem,
    run: Callable[..., tuple[Tensor, ...]],
    x: Tensor,
    *tensors: Tensor | None,
) -> list[Tensor]:
    """Results [batch, heads, queries, ...] of `run(first and past the last tile, tables, rows,
    *tensors)`, which gets and returns the rows of a chunk's queries. `x`: rows of all of them."""
    rows = x.index_select(2, problem.queries_by_tile())
    results = [
        _recomputed(functools.partial(run, tiles), problem.table, part, *tensors)
        for tiles, part in zip(
            problem.chunks(), rows.split(problem.tiles_per_chunk * problem.queries, 2), strict=True
        )
    ]
    places = problem.places_of_queries()
    return [
        (torch.cat(parts, 2) if len(parts) > 1 else parts[0]).index_select(2, places)
        for parts in zip(*results, strict=True)
    ]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    key_mask: Tensor | None,
    config: Config,
    scale: float | None,
    statistic: bool,
) -> tuple[Tensor, ...]:
    batch, *query_grid, heads, dim = query.shape
    key_grid, kv_heads = key.shape[1:-2], key.shape[-2]
    group, dtype = heads // kv_heads, _dtype_of(query)
    if math.prod(query_grid) == 0:
        none = query.sum(-1, keepdim=True)  # no element, but of the graph
        output = none.expand(*query.shape[:-1], value.shape[-1])
        return (output, none.squeeze(-1).to(dtype)) if statistic else (output,)
    additional = _count(additional_keys, 1)
    problem = _Problem(
        config,
        query_grid,
        key_grid,
        additional,
        _known(batch) * heads,
        (query, key, value, rpb, additional_keys, additional_values),
    )

    def heads_first(x: Tensor | None) -> Any:
        return None if x is None else x.flatten(1, -3).transpose(1, 2)

    key_mask, mask = _flat_mask(key_mask, additional)
    k = _tokens(heads_first(key), heads_first(additional_keys), key_mask, dtype)
    v = _tokens(heads_first(value), heads_first(additional_values), key_mask, dtype)
    q = query.flatten(1, -3).to(dtype) * scale_or_default(scale, dim)
    q = q.unflatten(2, (kv_heads, group)).transpose(1, 2)  # [batch, kv_heads, tokens, group, dim]
    rpb = None if rpb is None else rpb.to(dtype)

    def run(
        tiles: tuple[int, int], table: Tensor, q: Tensor, k: Tensor, v: Tensor, rpb: Any, mask: Any
    ) -> Any:
        chunk = _Chunk(problem, *tiles, table)
        keys = chunk.keys()
        k, v = (x.index_select(2, keys).unflatten(2, (chunk.count, problem.keys)) for x in (k, v))
        q = q.unflatten(2, (chunk.count, problem.queries)).flatten(3, 4)
        scores = (q @ k.mT).unflatten(3, (problem.queries, group))
        if rpb is not None:
            bias = chunk.bias(rpb).unflatten(0, (kv_heads, group))
            scores = scores + bias.permute(0, 2, 3, 1, 4)
        is_empty = None
        if mask is not None or rpb is not None:
            # What is not seen counts for nothing, whatever it is, and maybe nothing is left.
            visible = chunk.visible(mask, keys).unsqueeze(1).unsqueeze(4)
            scores, is_empty = without_empty_rows(torch.where(visible, scores, -torch.inf))
        elif (penalty := chunk.penalty(dtype)) is not None:  # quicker
            scores = scores + penalty.unsqueeze(2)
        weights = scores.softmax(-1)
        if is_empty is not None:
            weights = weights.masked_fill(is_empty, 0.0)
        output = (weights.flatten(3, 4) @ v).unflatten(3, (problem.queries, group)).flatten(2, 3)
        if not statistic:
            return (output,)
        lse = scores.logsumexp(-1)
        if is_empty is not None:
            lse = lse.masked_fill(is_empty.squeeze(-1), -torch.inf)
        return output, lse.flatten(2, 3)

    output, *more = (
        x.transpose(1, 2).flatten(2, 3).unflatten(1, query_grid)
        for x in _over_tiles(problem, run, q, k, v, rpb, mask)
    )
    return (output.to(query.dtype), *more)


def _qk(
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    key_mask: Tensor | None,
    config: Config,
) -> Tensor:
    batch, heads, *query_grid, _ = query.shape
    dtype, key_grid = _dtype_of(query), key.shape[2:-1]
    additional = _count(additional_keys, 2)
    if math.prod(query_grid) == 0:
        return query.new_zeros((*query.shape[:-1], window_size(config, key_grid) + additional))
    problem = _Problem(
        config,
        query_grid,
        key_grid,
        additional,
        _known(batch) * heads,
        (query, key, rpb, additional_keys),
    )
    key_mask, mask = _flat_mask(key_mask, additional)
    k = _tokens(key.flatten(2, -2), additional_keys, key_mask, dtype)
    rpb = None if rpb is None else rpb.to(dtype)

    def run(
        tiles: tuple[int, int], table: Tensor, q: Tensor, k: Tensor, rpb: Any, mask: Any
    ) -> tuple[Tensor]:
        chunk = _Chunk(problem, *tiles, table)
        keys = chunk.keys()
        k = k.index_select(2, keys).unflatten(2, (chunk.count, problem.keys))
        scores = q.to(dtype).unflatten(2, (chunk.count, problem.queries)) @ k.mT
        if rpb is not None:
            scores = scores + chunk.bias(rpb)
        if mask is not None:
            scores = torch.where(chunk.visible(mask, keys).unsqueeze(1), scores, -torch.inf)
        places, filled = chunk.slots()
        scores = scores.gather(4, places.expand(*scores.shape[:2], *places.shape))
        scores = torch.where(filled, scores, -torch.inf)
        return (scores.flatten(2, 3).to(query.dtype),)

    (attn,) = _over_tiles(problem, run, query.flatten(2, -2), k, rpb, mask)
    return attn.unflatten(2, query_grid)


def _av(
    attn: Tensor,
    value: Tensor,
    additional_values: Tensor | None,
    key_mask: Tensor | None,
    config: Config,
) -> Tensor:
    batch, heads, *query_grid, _ = attn.shape
    dtype, key_grid = _dtype_of(attn), value.shape[2:-1]
    if math.prod(query_grid) == 0:
        return attn.new_zeros((*attn.shape[:-1], value.shape[-1]))
    additional = _count(additional_values, 2)
    problem = _Problem(
        config,
        query_grid,
        key_grid,
        additional,
        _known(batch) * heads,
        (attn, value, additional_values),
    )
    key_mask, mask = _flat_mask(key_mask, additional)
    v = _tokens(value.flatten(2, -2), additional_values, key_mask, dtype)

    def run(
        tiles: tuple[int, int], table: Tensor, attn: Tensor, v: Tensor, mask: Any
    ) -> tuple[Tensor]:
        chunk = _Chunk(problem, *tiles, table)
        keys = chunk.keys()
        v = v.index_select(2, keys).unflatten(2, (chunk.count, problem.keys))
        attn = attn.unflatten(2, (chunk.count, problem.queries))
        places, visible = chunk.slots_of_keys()
        weights = attn.gather(4, places.expand(*attn.shape[:2], *places.shape)).to(dtype)
        if mask is not None:
            visible = chunk.visible(mask, keys).unsqueeze(1)
        weights = torch.where(visible, weights, 0.0)
        return ((weights @ v).flatten(2, 3).to(attn.dtype),)

    (output,) = _over_tiles(problem, run, attn.flatten(2, -2), v, mask)
    return output.unflatten(2, query_grid)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "attention_forward": _attention,
    "qk": _qk,
    "av": _av,
}
