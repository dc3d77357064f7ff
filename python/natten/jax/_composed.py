"""The backend `composed`: libnatten's operations made of JAX's own.

Each operation of `_primitives.py` is here a function of arrays. It goes through the problem tile by
tile (`natten._composed`): some queries, the keys that any of them sees, gathered, and the products
of all of them, of which those that a query does not see are masked. So memory does not grow with
the number of tokens times that of a window's slots. Gradients of keys gather in an array that the
tiles add to, one after the other.

Where offsets are read at run time, tiles are runs of neighboring queries, against as many
neighboring tokens as such a run can see wherever it lies.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natten import _core
from natten._args import (
    EMPTY_SLOTS_ZERO,
    PART_OPTIONS,
    UNKNOWN_OFFSETS,
    WINDOW_OPTIONS,
    Config,
    make_config,
    options_of,
    scale_or_default,
    window_size,
    with_flags,
)
from natten._composed import AxisTiles, strides_of, tiles_of
from natten.jax._private import made_varying, varying_axes

Shape: TypeAlias = tuple[int, ...]

# Pairs of query and key. A tile has at most the first of these, or where windows are large up to
# the second, as tiles of few queries read each key often. Tiles with fewer are computed together.
_LEAST_PAIRS, _MOST_PAIRS = 2**16, 2**20
_PAIRS_AT_ONCE = 2**17
_LONGEST_RUN = {1: 128, 2: 16, 3: 8}  # of queries per axis, by rank, where offsets are not known


# Tiles along one axis. "Places" count the keys of a tile.


class _Part(NamedTuple):
    """A tile along one axis."""

    queries: Array  # [queries]: their numbers among those given; -1 where there is none
    keys: Array  # [keys]: likewise
    begin: Array  # [queries]: the places that a query sees
    end: Array
    first: Array  # [queries]: the place of slot 0, which may lie before all others
    shift: Array  # [queries]: what the number of a key's bias is more than that of its slot
    is_lost: Array | None  # [queries]: does not see all keys; None: checked before


@dataclasses.dataclass(frozen=True, eq=False)
class _Axis:
    """One axis in tiles."""

    queries: np.ndarray  # [tiles, queries of a tile], as in `_Part`
    keys_per_tile: int
    kernel_size: int
    step: int  # places from one slot of a window to the next
    part: Callable[[Any, Any, Any], _Part]  # of (tile, token of the first query, of the first key)

    @property
    def count(self) -> int:
        return len(self.queries)


def _keys(
    first: Any, count: int, dilation: int, boundary: str, grid_length: int, key_length: int
) -> Array:
    """The numbers of keys that are `dilation` apart. Programs hold no table of them, which would
    grow with the number of tiles times that of keys."""
    keys = first + dilation * jnp.arange(count, dtype=np.int32)
    if boundary == "circular":
        keys = keys % grid_length
    return jnp.where((keys >= 0) & (keys < key_length), keys, -1)


def _of_known_offsets(
    tiles: AxisTiles, dilation: int, boundary: str, grid_length: int, key_length: int
) -> _Axis:
    numbers, begin, end, first, bias = (
        np.array(table, np.int32)
        for table in (tiles.queries, tiles.begin, tiles.end, tiles.slot, tiles.bias)
    )
    first_keys = np.array([keys[0] for keys in tiles.keys], np.int32)
    # Where a tile has fewer queries than others, the last one is repeated.
    is_real = np.array(tiles.row)[numbers] == np.arange(tiles.queries_per_tile)
    queries, end = np.where(is_real, numbers, -1), np.where(is_real, end, begin)
    count = tiles.keys_per_tile

    def part(tile: Any, query_offset: Any, key_offset: Any) -> _Part:
        first_key = jnp.asarray(first_keys)[tile]
        return _Part(
            jnp.asarray(queries)[tile],
            _keys(first_key, count, dilation, boundary, grid_length, key_length),
            jnp.asarray(begin)[tile],
            jnp.asarray(end)[tile],
            jnp.asarray(first)[tile],
            jnp.asarray(first + bias)[tile],
            None,
        )

    return _Axis(queries, count, tiles.kernel_size, 1, part)


def _of_unknown_offsets(
    windows: Any,
    query_length: int,
    kernel_size: int,
    dilation: int,
    boundary: str,
    grid_length: int,
    key_length: int,
    longest: int,
) -> _Axis:
    """`windows`: of the whole axis (`_core.windows`). `longest`: queries of a tile. Places are
    tokens, from the first one on that the tile sees."""
    group, position, first, begin, end = np.array(windows[0], np.int32).T
    token = position * dilation + group
    first, begin = first * dilation + group, begin * dilation + group
    end = (end - 1) * dilation + group + 1
    shift = (first - token) // dilation + kernel_size - 1
    count = -(-query_length // longest)
    length = -(-query_length // count)
    queries = np.arange(count * length, dtype=np.int32).reshape(count, length)
    queries = np.where(queries < query_length, queries, -1)
    begins, ends = (
        np.lib.stride_tricks.sliding_window_view(x, min(length, grid_length)) for x in (begin, end)
    )
    keys_per_tile = int((ends.max(-1) - begins.min(-1)).max())

    def part(tile: Any, query_offset: Any, key_offset: Any) -> _Part:
        of_tile = jnp.asarray(queries)[tile]
        is_real = of_tile >= 0
        token = query_offset + of_tile
        is_outside = (token < 0) | (token >= grid_length)
        token = jnp.clip(token, 0, grid_length - 1)
        b, e, f, s = (jnp.asarray(table)[token] for table in (begin, end, first, shift))
        start = jnp.min(jnp.where(is_real, b, grid_length))
        keys = _keys(start - key_offset, keys_per_tile, 1, boundary, grid_length, key_length)
        seen = _Part(of_tile, keys, b - start, jnp.where(is_real, e, b) - start, f - start, s, None)
        is_lost = is_outside | (_is_seen(seen, dilation) & (keys < 0)).any(-1)
        return seen._replace(is_lost=is_real & is_lost)

    return _Axis(queries, keys_per_tile, kernel_size, dilation, part)


def _is_seen(part: _Part, step: int) -> Array:
    """[queries, keys]."""
    places = jnp.arange(part.keys.shape[0], dtype=np.int32)
    seen = (places >= part.begin[:, None]) & (places < part.end[:, None])
    return seen if step == 1 else seen & ((places - part.first[:, None]) % step == 0)


# Tiles of the grid.


class _Tile(NamedTuple):
    """A tile. Queries, keys, slots of a window and biases are numbered row-major; -1 stands where
    there is none."""

    queries: Array  # [queries]
    keys: Array  # [keys]
    slots: Array  # [queries, keys]: the slot that a key has in a query's window
    biases: Array  # likewise, its bias
    places: Array  # [queries, slots]: which of the tile's keys is in a slot
    slot_biases: Array  # likewise, its bias
    bias_places: Array  # [queries, biases]: which of the tile's keys has a bias
    bias_slots: Array  # likewise, its slot
    is_lost: Array | None  # [queries]: where offsets are read at run time, does not see all keys


class _Tiles:
    """All tiles of a checked call."""

    def __init__(self, config: Config, queries: Shape, keys: Shape, additional: int) -> None:
        rank = config[0]
        self.query_grid, self.key_grid = queries, keys
        options = options_of(config)
        grid = options.get("grid_size", keys)
        window: dict[str, Any] = {
            o.name: o.per_axis(options.get(o.name), rank) for o in WINDOW_OPTIONS
        }
        if config[-1] & UNKNOWN_OFFSETS:
            self.axes = [
                _of_unknown_offsets(*of_axis)
                for of_axis in zip(
                    _core.windows(make_config(rank, **window), grid, grid),
                    queries,
                    window["kernel_size"],
                    window["dilation"],
                    window["boundary"],
                    grid,
                    keys,
                    [_LONGEST_RUN[rank]] * rank,
                    strict=True,
                )
            ]
        else:
            most_pairs = min(max(32 * window_size(config, keys), _LEAST_PAIRS), _MOST_PAIRS)
            tiles = tiles_of(config, queries, keys, additional, most_pairs)
            self.axes = [
                _of_known_offsets(*of_axis)
                for of_axis in zip(
                    tiles.axes, window["dilation"], window["boundary"], grid, keys, strict=True
                )
            ]
        counts = [axis.count for axis in self.axes]
        self.count, self._strides = math.prod(counts), strides_of(counts)
        self.kernel_size = [axis.kernel_size for axis in self.axes]
        self.bias_grid = [2 * k - 1 for k in self.kernel_size]
        self.window = math.prod(self.kernel_size)
        pairs = math.prod(axis.queries.shape[1] for axis in self.axes)
        pairs *= math.prod(axis.keys_per_tile for axis in self.axes) + additional
        most = min(max(_PAIRS_AT_ONCE // pairs, 1), self.count)
        self._at_once = max(i for i in range(1, most + 1) if self.count % i == 0)

    def _tile(self, number: Any, offsets: Array | None) -> _Tile:
        rank, numbers = len(self.axes), functools.partial(jnp.arange, dtype=np.int32)
        query_offset, key_offset = [None] * rank, [None] * rank
        if offsets is not None:
            query_offset, key_offset = (list(row) for row in offsets.astype(np.int32))
        parts: list[_Part] = []
        slots: list[Array] = []
        biases: list[Array] = []
        places: list[Array] = []
        slot_biases: list[Array] = []
        bias_places: list[Array] = []
        bias_slots: list[Array] = []
        for i, (axis, stride) in enumerate(zip(self.axes, self._strides, strict=True)):
            part = axis.part(number // stride % axis.count, query_offset[i], key_offset[i])
            parts.append(part)
            first, shift = part.first[:, None], part.shift[:, None]
            seen = _is_seen(part, axis.step)
            slot = (numbers(axis.keys_per_tile) - first) // axis.step
            slots.append(jnp.where(seen, slot, -1))
            biases.append(jnp.where(seen, slot + shift, -1))
            for slot, of_place, other, of_other in (
                (numbers(axis.kernel_size), places, shift, slot_biases),
                (numbers(2 * axis.kernel_size - 1) - shift, bias_places, 0, bias_slots),
            ):
                place = first + slot * axis.step
                is_full = (place >= part.begin[:, None]) & (place < part.end[:, None])
                of_place.append(jnp.where(is_full, place, -1))
                of_other.append(jnp.where(is_full, slot + other, -1))
        # Any number of lost queries along an axis is as good as another: 0, or -1.
        lost = [jnp.where(p.is_lost, -1, 0) for p in parts if p.is_lost is not None]
        return _Tile(
            _numbers([part.queries for part in parts], self.query_grid),
            _numbers([part.keys for part in parts], self.key_grid),
            _numbers(slots, self.kernel_size),
            _numbers(biases, self.bias_grid),
            _numbers(places, [axis.keys_per_tile for axis in self.axes]),
            _numbers(slot_biases, self.bias_grid),
            _numbers(bias_places, [axis.keys_per_tile for axis in self.axes]),
            _numbers(bias_slots, self.kernel_size),
            _numbers(lost, [1] * rank) < 0 if lost else None,
        )

    def run(
        self,
        function: Callable[[_Tile], tuple[Sequence[Array], Sequence[tuple[Array | None, Array]]]],
        offsets: Array | None,
        sums: Sequence[Array] = (),
    ) -> tuple[list[Array], list[Array]]:
        """(results [queries of the grid, ...], sums) of all tiles.

        `function` returns results [queries of the tile, ...], and what is added to each of the
        sums: (places [count], terms [count, ...]), or (None, one term).
        """

        def step(sums: list[Array], numbers: Array) -> tuple[list[Array], Sequence[Array]]:
            results, terms = jax.vmap(lambda i: function(self._tile(i, offsets)))(numbers)
            added = []
            for total, (places, x) in zip(sums, terms, strict=True):
                if places is None:
                    added.append(total + x.sum(0))
                else:
                    places = _or_past(places.reshape(-1), len(total))
                    added.append(total.at[places].add(x.reshape(-1, *x.shape[2:]), mode="drop"))
            return added, results

        numbers = np.arange(self.count, dtype=np.int32).reshape(-1, self._at_once)
        totals = list(sums)
        if len(numbers) == 1:
            totals, results = step(totals, jnp.asarray(numbers[0]))
            flat = [x.reshape(-1, *x.shape[2:]) for x in results]
        else:
            totals, results = jax.lax.scan(step, totals, jnp.asarray(numbers))
            flat = [x.reshape(-1, *x.shape[3:]) for x in results]
        rows = self._rows() if flat else None
        return [x[rows] for x in flat], totals

    def _rows(self) -> np.ndarray:
        """Of each query the number of its row, where the rows of all tiles follow each other."""
        numbers: np.ndarray = np.zeros((1, 1), np.int64)
        for axis, length in zip(self.axes, self.query_grid, strict=True):
            a, b = numbers[:, None, :, None], axis.queries[None, :, None, :]
            pairs = np.where((a < 0) | (b < 0), -1, a * length + b)
            numbers = pairs.reshape(len(numbers) * axis.count, -1)
        numbers = numbers.reshape(-1)
        rows = np.empty(math.prod(self.query_grid), np.int32)
        (given,) = np.nonzero(numbers >= 0)
        rows[numbers[given]] = given
        return rows


def _numbers(of_axes: Sequence[Array], sizes: Sequence[int]) -> Array:
    """Row-major numbers, from numbers along each axis: arrays [n] become one [product of n], arrays
    [n, m] one [product of n, product of m]."""
    result = of_axes[0]
    for x, size in zip(of_axes[1:], sizes[1:], strict=True):
        shape = [a * b for a, b in zip(result.shape, x.shape, strict=True)]
        if x.ndim == 1:
            a, b = result[:, None], x[None]
        else:
            a, b = result[:, None, :, None], x[None, :, None, :]
        result = jnp.where((a < 0) | (b < 0), -1, a * size + b).reshape(shape)
    return result


def _or_past(numbers: Array, size: int) -> Array:
    """Numbers with one past the last in place of -1, which JAX would take for the last."""
    return jnp.where(numbers < 0, size, numbers)


def _take(x: Array, numbers: Array, axis: int) -> Array:
    """Elements along an axis; 0 where there is none."""
    past = _or_past(numbers, x.shape[axis])
    return jnp.take(x, past, axis, mode="fill", fill_value=0)


def _along_last(x: Array, numbers: Array) -> Array:
    """Elements [..., rows, numbers] of an array [..., rows, n], where there are any: numbers are
    [rows, numbers]."""
    numbers = numbers.reshape(*[1] * (x.ndim - 2), *numbers.shape)
    return jnp.take_along_axis(x, jnp.maximum(numbers, 0), -1, mode="clip")


def _flat(x: Array, first: int, rank: int) -> Array:
    """The axes of a grid as one."""
    last = first + rank
    return x.reshape(*x.shape[:first], math.prod(x.shape[first:last]), *x.shape[last:])


def _sums_of(dtype: Any) -> Any:
    """The type that products of a type are summed in."""
    return jnp.promote_types(dtype, jnp.float32)


# Terms that are added one after another. Sums of more are summed from sums of so many, since what
# float32 loses grows with the number of terms.
_MOST_TERMS = 1024


def _in_blocks(total_of: Callable[[slice], Array], terms: int) -> Array:
    """The total of all terms, from that of a slice of them."""
    blocks = [slice(i, i + _MOST_TERMS) for i in range(0, terms, _MOST_TERMS)]
    return functools.reduce(jnp.add, map(total_of, blocks or [slice(0)]))


def _product(spec: str, a: Array, b: Array) -> Array:
    """`einsum` of two arrays."""
    of_a, of_b, result = spec.replace("->", ",").split(",")
    *_, summed = (letter for letter in of_a if letter in of_b and letter not in result)

    def of_block(block: slice) -> Array:
        blocks = (
            x[tuple(block if letter == summed else slice(None) for letter in letters)]
            for x, letters in ((a, of_a), (b, of_b))
        )
        return jnp.einsum(
            spec,
            *blocks,
            precision=jax.lax.Precision.HIGHEST,  # else TPUs multiply float32 by parts of it
            preferred_element_type=_sums_of(b.dtype),
        )

    return _in_blocks(of_block, a.shape[of_a.index(summed)])


def _row_sums(x: Array) -> Array:
    """Over the last axis, which stays."""
    return _in_blocks(lambda block: x[..., block].sum(-1, keepdims=True), x.shape[-1])


def zeros(shape: Sequence[int], dtype: Any, like: Array) -> Array:
    """An array to add to that varies over the axes of a mesh as another does."""
    x, axes = jnp.zeros(shape, dtype), varying_axes(like)
    return made_varying(x, tuple(sorted(axes))) if axes else x


class _Seen:
    """What the queries of one tile see. Tensors are [batch, heads, tokens, ...]."""

    def __init__(self, tile: _Tile, mask: Array | None) -> None:
        """mask: [batch or 1, keys of the grid]."""
        self.tile = tile
        self.shown = None if mask is None else _take(mask, tile.keys, 1)

    def rows(self, x: Array) -> Array:
        """The tile's rows. Those of queries that do not see all they should are NaN, and so are
        results: nothing else can tell of it at run time."""
        rows, is_lost = _take(x, self.tile.queries, 2), self.tile.is_lost
        if is_lost is None:
            return rows
        return jnp.where(is_lost.reshape(-1, *[1] * (rows.ndim - 3)), jnp.nan, rows)

    def columns(self, x: Array) -> Array:
        """The tile's keys or values, 0 where the mask hides them."""
        return self.cleared(_take(x, self.tile.keys, 2))

    def cleared(self, x: Array) -> Array:
        return x if self.shown is None else jnp.where(self.shown[:, None, :, None], x, 0)

    def pairs(self) -> Array:
        """[batch or 1, 1, queries, keys]: what is seen."""
        seen = self.tile.slots[None, None] >= 0
        return seen if self.shown is None else seen & self.shown[:, None, None]

    def slots(self) -> Array:
        """[batch or 1, 1, queries, slots]: which slots hold a key that may be seen."""
        places = self.tile.places
        full = places[None, None] >= 0
        return full if self.shown is None else full & _take(self.shown, places, 1)[:, None]


# The operations: functions of (setup, shapes or flags of the wanted results, inputs or None). The
# last input, lengths of examples, is of fused attention alone.

Inputs: TypeAlias = Any  # an array, or None
Results: TypeAlias = list[Any]


class Examples:
    """Which keys the queries of examples see that follow each other. `lengths`: as
    `_primitives.LENGTHS`."""

    def __init__(self, lengths: Array, queries: int, keys: int, config: Config) -> None:
        self.of_queries = self._places(lengths[0], queries)
        self.of_keys = self._places(lengths[1], keys)
        self.is_causal = any(options_of(config).get("is_causal", ()))

    @staticmethod
    def _places(row: Array, count: int) -> tuple[Array, Array]:
        """(the example, the place in it) of each token."""
        ends, tokens = row[:-1], jnp.arange(count)
        example = jnp.searchsorted(ends, tokens, side="right") - 1
        return example, tokens - ends[example]

    def sees(self, queries: Array, keys: Array) -> Array:
        """[queries, keys], by their numbers."""
        (example, query), (of_key, key) = (
            [x[numbers] for x in places]
            for places, numbers in ((self.of_queries, queries), (self.of_keys, keys))
        )
        sees = example[:, None] == of_key
        return sees & (key <= query[:, None]) if self.is_causal else sees


class _Attention:
    """What the forward and the backward pass of fused attention share."""

    def __init__(self, setup: Any, inputs: Sequence[Inputs]) -> None:
        query, key, value, rpb, keys, values, mask, offsets, lengths = inputs
        rank, config, self.examples = setup.config[0], setup.config, None
        if lengths is not None:
            self.examples = Examples(lengths, query.shape[1], key.shape[1], config)
            config = make_config(1, 1, flags=config[-1])  # all see all, but for what `sees` says
        self.setup, self.rank, self.offsets = setup, rank, offsets
        self.batch, *grid, self.heads, head_dim = query.shape
        key_grid, self.kv_heads = key.shape[1 : 1 + rank], key.shape[-2]
        self.additional = 0 if keys is None else keys.shape[1]
        self.tiles = _Tiles(config, tuple(grid), key_grid, self.additional)
        self.scale = scale_or_default(setup.scale, head_dim)
        self.dtype, self.sums = query.dtype, _sums_of(query.dtype)
        self.query, self.key, self.value = map(self.heads_first, (query, key, value))
        self.more = [jnp.moveaxis(x, 2, 1) for x in (keys, values) if x is not None]
        self.mask = None if mask is None else _flat(mask, 1, rank)
        self.rpb = None if rpb is None else _flat(rpb, 1, rank).astype(self.sums)

    def heads_first(self, x: Array) -> Array:
        """[batch, heads, queries or keys, ...] from [batch, *grid, heads, ...]."""
        return jnp.moveaxis(_flat(x, 1, self.rank), 2, 1)

    def heads_last(self, x: Array) -> Array:
        """[batch, *grid, heads, ...] from results [queries, batch, heads, ...]."""
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(self.batch, *self.tiles.query_grid, *x.shape[2:])

    def rows(self, seen: _Seen, x: Array) -> Array:
        """[batch, key-value heads, heads of each, queries, ...]."""
        rows = seen.rows(x)
        group = self.heads // self.kv_heads
        return rows.reshape(self.batch, self.kv_heads, group, *rows.shape[2:])

    def result(self, rows: Array) -> Array:
        """The inverse, but queries are first."""
        rows = rows.reshape(self.batch, self.heads, *rows.shape[3:])
        return jnp.moveaxis(rows, 2, 0)

    def tensors(self, seen: _Seen) -> tuple[Array, Array, Array]:
        """Of a tile: query as `rows`, key and value [batch, key-value heads, keys, dim]."""
        key, value = map(seen.columns, (self.key, self.value))
        if self.additional:
            key, value = (
                jnp.concatenate(parts, 2) for parts in zip((key, value), self.more, strict=True)
            )
        return self.rows(seen, self.query), key, value

    def scores(self, seen: _Seen, query: Array, key: Array) -> Array:
        """[batch, key-value heads, heads of each, queries, keys], -inf where they are not seen."""
        scores = self.scale * _product("bgrqd,bgud->bgrqu", query, key)
        if self.rpb is not None:
            bias = self._with_more(_take(self.rpb, seen.tile.biases, 1), 0)
            scores = scores + bias.reshape(1, self.kv_heads, -1, *bias.shape[1:])
        pairs = seen.pairs()
        if self.examples:
            pairs &= self.examples.sees(seen.tile.queries, seen.tile.keys)
        pairs = self._with_more(pairs, True)
        return jnp.where(pairs[:, :, None], scores, -jnp.inf)

    def _with_more(self, x: Array, value: Any) -> Array:
        """With columns for the additional keys."""
        padding = [(0, 0)] * (x.ndim - 1) + [(0, self.additional)]
        return jnp.pad(x, padding, constant_values=value)

    def softmax(self, scores: Array) -> tuple[Array, Array, Array]:
        """(weights, their sums, what was subtracted from scores)."""
        largest = jax.lax.stop_gradient(scores).max(-1, keepdims=True)
        largest = jnp.where(jnp.isfinite(largest), largest, 0)
        weights = jnp.exp(scores - largest)
        return weights, _row_sums(weights), largest


def attention_forward(setup: Any, wanted: Sequence[Any], *inputs: Inputs) -> Results:
    call = _Attention(setup, inputs)

    def of_tile(tile: _Tile) -> Any:
        seen = _Seen(tile, call.mask)
        query, key, value = call.tensors(seen)
        weights, total, largest = call.softmax(call.scores(seen, query, key))
        sees_nothing = total == 0
        total = jnp.where(sees_nothing, 1, total)
        output = _product("bgrqu,bguv->bgrqv", weights.astype(call.dtype), value) / total
        logsumexp = jnp.where(sees_nothing, -jnp.inf, largest + jnp.log(total))
        return (call.result(output.astype(call.dtype)), call.result(logsumexp)), ()

    results, _ = call.tiles.run(of_tile, call.offsets)
    output, logsumexp = map(call.heads_last, results)
    return _wanted((output, logsumexp[..., 0]), wanted)


def attention_backward(setup: Any, wanted: Sequence[Any], *inputs: Inputs) -> Results:
    *tensors, _, grad_output, grad_logsumexp = inputs  # all but logsumexp, which is computed again
    call = _Attention(setup, tensors)
    needs = [w is not False for w in wanted]
    grad_output = call.heads_first(grad_output)
    if grad_logsumexp is not None:
        grad_logsumexp = call.heads_first(grad_logsumexp)

    def of_tile(tile: _Tile) -> Any:
        seen = _Seen(tile, call.mask)
        query, key, value = call.tensors(seen)
        incoming = call.rows(seen, grad_output)
        scores = call.scores(seen, query, key)
        weights, total, _ = call.softmax(scores)
        weights = weights / jnp.where(total == 0, 1, total)
        grads = _product("bgrqv,bguv->bgrqu", incoming, value)
        row = _row_sums(weights * grads)
        if grad_logsumexp is not None:
            row = row - call.rows(seen, grad_logsumexp)[..., None]
        # What is not seen has a gradient of 0, be the incoming one NaN.
        grads = jnp.where(jnp.isneginf(scores), 0, weights * (grads - row))
        of_scores, weights = grads.astype(call.dtype), weights.astype(call.dtype)
        results = []
        terms: list[tuple[Array | None, Array]] = []
        if needs[0]:
            grad_query = call.scale * _product("bgrqu,bgud->bgrqd", of_scores, key)
            results.append(call.result(grad_query.astype(call.dtype)))
        of_columns = {}
        if needs[1] or needs[4]:
            of_columns[1] = call.scale * _product("bgrqu,bgrqd->bgud", of_scores, query)
        if needs[2] or needs[5]:
            of_columns[2] = _product("bgrqu,bgrqv->bguv", weights, incoming)
        keys = len(tile.keys)
        for i, x in of_columns.items():
            if needs[i]:
                terms.append((tile.keys, jnp.moveaxis(seen.cleared(x[:, :, :keys]), 2, 0)))
            if needs[3 + i]:
                terms.append((None, jnp.moveaxis(x[:, :, keys:], 2, 1)))
        if needs[3]:
            grad_rpb = grads[..., :keys].sum(0).reshape(call.heads, -1, keys)
            terms.append((None, _of_biases(grad_rpb, tile.bias_places)))
        return results, terms

    def zeros_for(x: Array) -> Array:
        return zeros(x.shape, call.sums, grad_output)

    sums = []
    for i, x in ((1, call.key), (2, call.value)):
        if needs[i]:
            sums.append(zeros_for(jnp.moveaxis(x, 2, 0)))
        if needs[3 + i]:
            sums.append(zeros_for(inputs[3 + i]))
    if needs[3]:
        assert call.rpb is not None
        sums.append(zeros_for(call.rpb))
    results, sums = call.tiles.run(of_tile, call.offsets, sums)
    grads: Results = [None] * 6
    if needs[0]:
        grads[0] = call.heads_last(results[0])
    rest = iter(sums)
    for i in (1, 2):
        if needs[i]:
            grads[i] = jnp.moveaxis(next(rest), 0, 1)
        if needs[3 + i]:
            grads[3 + i] = next(rest)
    if needs[3]:
        grads[3] = next(rest)
    return [
        None if g is None else g.reshape(x.shape).astype(x.dtype)
        for g, x in zip(grads, inputs, strict=False)
    ]


class _Unfused:
    """What the unfused operations share. Heads are first."""

    def __init__(
        self, setup: Any, queries: Shape, keys: Shape | None, mask: Inputs, offsets: Inputs
    ) -> None:
        """queries: their grid. keys: theirs; None: there are none, and it is that of the mask, or
        else the whole one."""
        config, self.rank = setup.config, setup.config[0]
        if keys is None and mask is not None:
            keys = mask.shape[1:]
        if keys is None:
            config, keys = _with_all_keys(config, queries)
            offsets = None if offsets is None else offsets.at[1].set(0)
        self.tiles, self.offsets = _Tiles(config, queries, keys, 0), offsets
        self.window = self.tiles.window
        self.mask = None if mask is None else _flat(mask, 1, self.rank)

    def run(self, function: Callable[[_Seen], Any], sums: Sequence[Array] = ()) -> Any:
        return self.tiles.run(lambda tile: function(_Seen(tile, self.mask)), self.offsets, sums)

    def heads_first(self, x: Array) -> Array:
        """[batch, heads, *grid, ...] from results [queries, batch, heads, ...]."""
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], *self.tiles.query_grid, *x.shape[3:])

    def weights(self, seen: _Seen, attn: Array) -> Array:
        """[batch, heads, queries, keys], from rows [batch, heads, queries, slots]. What slots
        without a key hold is ignored."""
        weights = _along_last(attn[..., : self.window], seen.tile.slots)
        return jnp.where(seen.pairs(), weights, 0)


def _with_all_keys(config: Config, queries: Shape) -> tuple[Config, Shape]:
    """The config of a part of the queries and all keys, and the grid of these."""
    options = options_of(config)
    grid = options.get("grid_size", queries)
    parts: dict[str, Any] = {o.name: options[o.name] for o in PART_OPTIONS if o.name in options}
    parts.pop("key_offset", None)
    if parts:
        parts["grid_size"] = grid
    window: dict[str, Any] = {o.name: options.get(o.name) for o in WINDOW_OPTIONS}
    made = make_config(config[0], **window, **parts)
    return with_flags(made, config[-1]), grid


def qk(setup: Any, wanted: Sequence[Any], *inputs: Inputs) -> Results:
    query, key, rpb, keys, mask, offsets, _ = inputs
    rank = setup.config[0]
    call = _Unfused(setup, query.shape[2:-1], key.shape[2:-1], mask, offsets)
    dtype, sums = query.dtype, _sums_of(query.dtype)
    query, key = (_flat(x, 2, rank) for x in (query, key))
    rpb = None if rpb is None else _flat(rpb, 1, rank).astype(sums)
    empty = 0 if setup.config[-1] & EMPTY_SLOTS_ZERO else -jnp.inf

    def of_tile(seen: _Seen) -> Any:
        rows = seen.rows(query)
        scores = _product("bhqd,bhud->bhqu", rows, seen.columns(key))
        scores = _along_last(scores, seen.tile.places)
        if rpb is not None:
            scores = scores + _take(rpb, seen.tile.slot_biases, 1)
        scores = jnp.where(seen.slots(), scores, empty)
        if keys is not None:
            more = _product("bhqd,bhnd->bhqn", rows, keys)
            scores = jnp.concatenate([scores, more], -1)
        return (jnp.moveaxis(scores.astype(dtype), 2, 0),), ()

    (attn,), _ = call.run(of_tile)
    return [call.heads_first(attn)]


def av(setup: Any, wanted: Sequence[Any], *inputs: Inputs) -> Results:
    attn, value, values, mask, offsets, _ = inputs
    rank = setup.config[0]
    call = _Unfused(setup, attn.shape[2:-1], value.shape[2:-1], mask, offsets)
    attn, value = (_flat(x, 2, rank) for x in (attn, value))

    def of_tile(seen: _Seen) -> Any:
        rows = seen.rows(attn)
        output = _product("bhqu,bhud->bhqd", call.weights(seen, rows), seen.columns(value))
        if values is not None:
            output = output + _product("bhqn,bhnd->bhqd", rows[..., call.window :], values)
        return (jnp.moveaxis(output.astype(value.dtype), 2, 0),), ()

    (output,), _ = call.run(of_tile)
    return [call.heads_first(output)]


def av_transpose(setup: Any, wanted: Sequence[Any], *inputs: Inputs) -> Results:
    attn, query, mask, offsets, _ = inputs
    rank = setup.config[0]
    shape, shape_of_more = wanted
    call = _Unfused(setup, attn.shape[2:-1], shape[2:-1], mask, offsets)
    dtype, sums = query.dtype, _sums_of(query.dtype)
    attn, query = (_flat(x, 2, rank) for x in (attn, query))

    def of_tile(seen: _Seen) -> Any:
        rows, of_rows = seen.rows(attn), seen.rows(query)
        keys = _product("bhqu,bhqd->bhud", call.weights(seen, rows), of_rows)
        terms: list[tuple[Array | None, Array]] = [
            (seen.tile.keys, jnp.moveaxis(seen.cleared(keys), 2, 0))
        ]
        if shape_of_more:
            more = _product("bhqn,bhqd->bhnd", rows[..., call.window :], of_rows)
            terms.append((None, more))
        return (), terms

    batch, heads, *grid, head_dim = shape
    totals = [zeros((math.prod(grid), batch, heads, head_dim), sums, query)]
    if shape_of_more:
        totals.append(zeros(shape_of_more, sums, query))
    _, (key, *more) = call.run(of_tile, totals)
    key = jnp.moveaxis(key, 0, 2).reshape(shape)
    return [key.astype(dtype), more[0].astype(dtype) if more else None]


def rpb_gather(setup: Any, wanted: Sequence[Any], *inputs: Inputs) -> Results:
    rpb, mask, offsets, _ = inputs
    (shape,) = wanted
    call = _Unfused(setup, shape[2:-1], None, mask, offsets)
    rpb = _flat(rpb, 1, setup.config[0])

    def of_tile(seen: _Seen) -> Any:
        bias = jnp.where(seen.slots(), _take(rpb, seen.tile.slot_biases, 1), 0)
        bias = jnp.broadcast_to(bias, (shape[0], *bias.shape[1:]))
        bias = jnp.pad(bias, [(0, 0)] * 3 + [(0, shape[-1] - call.window)])
        return (jnp.moveaxis(bias, 2, 0),), ()

    (attn,), _ = call.run(of_tile)
    return [call.heads_first(attn)]


def rpb_scatter(setup: Any, wanted: Sequence[Any], *inputs: Inputs) -> Results:
    attn, mask, offsets, _ = inputs
    rank = setup.config[0]
    call = _Unfused(setup, attn.shape[2:-1], None, mask, offsets)
    heads, sums = attn.shape[1], _sums_of(attn.dtype)
    dtype, attn = attn.dtype, _flat(attn, 2, rank)

    def of_tile(seen: _Seen) -> Any:
        rows = seen.rows(attn)[..., : call.window].astype(sums)
        rows = jnp.where(seen.slots(), rows, 0).sum(0)
        return (), [(None, _of_biases(rows, seen.tile.bias_slots))]

    total = zeros((heads, math.prod(call.tiles.bias_grid)), sums, attn)
    _, (total,) = call.run(of_tile, [total])
    return [total.reshape(heads, *call.tiles.bias_grid).astype(dtype)]


def _of_biases(x: Array, numbers: Array) -> Array:
    """[heads, biases]: the sums of what a tile has of each bias, in [heads, queries, n]. It is
    looked up, not scattered, as GPUs scatter in any order. numbers: [queries, biases]."""
    return jnp.where(numbers >= 0, _along_last(x, numbers), 0).sum(1)


def _wanted(results: Sequence[Array], wanted: Sequence[Any]) -> Results:
    return [x if w is not False else None for x, w in zip(results, wanted, strict=True)]


OPERATIONS: dict[str, Callable[..., Results]] = {
    function.__name__: function
    for function in (
        attention_forward,
        attention_backward,
        qk,
        av,
        av_transpose,
        rpb_gather,
        rpb_scatter,
    )
}
