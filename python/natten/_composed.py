"""How the backend `composed` cuts a problem into tiles: plain integers, for any framework.

`composed` is neighborhood attention made of a framework's own operations. A tile is some queries
and the keys that any of them sees. Each axis is cut by itself, its dilation groups apart, into
tiles of one size, and a tile of the grid is a product of one tile per axis. So a framework gathers
the keys of many tiles into one array [..., tiles, keys of a tile, dim] and multiplies all tiles at
once. What a query sees of its tile is an interval of keys per axis.

All tables are per axis and grow with the axis, never with the product of axes or with the window.
Windows are libnatten's (`_core.windows`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from natten import _core
from natten._args import SEPARATE_KEY_GRID, Config

Row = tuple[int, ...]

# What a tile costs besides its pairs of query and key, in pairs: each query and key that is
# gathered, and the tile itself.
_TOKEN_COST = 24
_TILE_COST = 1000

_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class AxisTiles(NamedTuple):
    """One axis in tiles of `queries_per_tile` queries and `keys_per_tile` keys.

    "Local" numbers count the keys, or queries, of a tile. `queries`, `keys`, `begin`, `end`, `slot`
    and `bias` have a row per tile. Where a tile has fewer queries or keys than others its last one
    is repeated; a repeated key is seen by no one, and what a repeated query gets is not used.
    """

    count: int
    queries_per_tile: int
    keys_per_tile: int
    kernel_size: int
    queries: tuple[Row, ...]  # [count][queries_per_tile]: numbers among the queries that are given
    keys: tuple[Row, ...]  # [count][keys_per_tile]: numbers among the keys that are given
    begin: tuple[Row, ...]  # [count][queries_per_tile]: local number of the first key that it sees
    end: tuple[Row, ...]  # likewise, past the last
    slot: tuple[Row, ...]  # likewise, of the key in slot 0; less than 0 where a border cuts it off
    bias: tuple[Row, ...]  # likewise: local key j has bias number j + this, if the query sees it
    tile: Row  # of each query that is given: its tile
    row: Row  # likewise: its local number

    @property
    def is_full(self) -> bool:
        """Whether all queries see all keys of their tiles."""
        whole = (self.keys_per_tile,) * self.queries_per_tile
        return all(not any(row) for row in self.begin) and all(row == whole for row in self.end)


class Tiles(NamedTuple):
    """A problem in tiles. Tiles of the grid, and queries and keys of a tile, are numbered in
    row-major order of the axes."""

    axes: tuple[AxisTiles, ...]
    query_grid: Row
    key_grid: Row

    @property
    def count(self) -> int:
        return math.prod(axis.count for axis in self.axes)

    @property
    def queries_per_tile(self) -> int:
        return math.prod(axis.queries_per_tile for axis in self.axes)

    @property
    def keys_per_tile(self) -> int:
        return math.prod(axis.keys_per_tile for axis in self.axes)

    @property
    def kernel_size(self) -> Row:
        return tuple([axis.kernel_size for axis in self.axes])

    @property
    def is_full(self) -> bool:
        return all(axis.is_full for axis in self.axes)


def strides_of(sizes: Sequence[int]) -> Row:
    """By how much a row-major number grows with each of its indices."""
    return tuple([math.prod(sizes[i + 1 :]) for i in range(len(sizes))])


def tiles_of(
    config: Config,
    query_grid: Sequence[int],
    key_grid: Sequence[int],
    additional: int = 0,
    most_pairs: int = 2**16,
) -> Tiles:
    """The tiles of a problem.

    Args:
        config: as `make_config` returns it; with SEPARATE_KEY_GRID all keys are the window.
        query_grid, key_grid: tokens per axis that are given. Neither may be empty.
        additional: keys that every tile has besides.
        most_pairs: of query and key in a tile, wherever that can be had.

    Raises:
        ValueError: as libnatten does.
    """
    flags = config[-1] & SEPARATE_KEY_GRID
    config = (*config[:-1], flags)
    return _tiles_of(config, tuple(query_grid), tuple(key_grid), additional, most_pairs)


@functools.lru_cache(256)
def _tiles_of(
    config: Config, query_grid: Row, key_grid: Row, additional: int, most_pairs: int
) -> Tiles:
    axes = [_Axis(*windows) for windows in _core.windows(config, query_grid, key_grid)]
    kernel = key_grid if config[-1] & SEPARATE_KEY_GRID else config[1 : 1 + config[0]]
    lengths = _best_lengths(axes, additional, most_pairs)
    cut = [axis.cut(n, k) for axis, n, k in zip(axes, lengths, kernel, strict=True)]
    return Tiles(tuple(cut), query_grid, key_grid)


def _best_lengths(axes: Sequence[_Axis], additional: int, most_pairs: int) -> list[int]:
    """The queries per tile of each axis that cost least."""

    def cost(choice: Sequence[tuple[int, int, int]]) -> tuple[bool, int]:
        count, queries, keys = (math.prod(c[i] for c in choice) for i in range(3))
        keys += additional
        pairs = queries * keys
        total = count * (pairs + _TOKEN_COST * (queries + keys) + _TILE_COST)
        return (pairs > most_pairs, pairs if pairs > most_pairs else total)

    choices = [[axis.sizes(n) for n in axis.lengths()] for axis in axes]
    return [c[1] for c in min(itertools.product(*choices), key=cost)]


class _Axis:
    """The windows of one axis, from which tiles of any length are cut."""

    def __init__(
        self,
        queries: Sequence[tuple[int, int, int, int, int]],
        groups: Sequence[tuple[int, int, Sequence[int]]],
    ) -> None:
        self.queries = queries
        self.keys = {group: (first, keys) for group, first, keys in groups}
        members: dict[int, list[int]] = {group: [] for group, _, _ in groups}
        for i, query in enumerate(queries):
            members[query[0]].append(i)
        # Queries of a group come by position, and both ends of windows grow with it.
        self.members = list(members.values())

    def lengths(self) -> list[int]:
        """Of tiles, those that are worth a try."""
        longest = max(map(len, self.members))
        members = max(self.members, key=len)
        of_middle = self.queries[members[longest // 2]][2]
        shared = sum(self.queries[i][2] == of_middle for i in members)  # by how many, a window
        lengths = {-(-longest // -(-longest // n)) for n in _LENGTHS if n < longest} | {longest}
        return sorted(lengths | {n * shared for n in _LENGTHS if n * shared < longest})

    def _parts(self, length: int) -> list[list[int]]:
        """The queries of each tile. Those that share a window stay together where they can."""
        parts = []
        for members in self.members:
            parts += [members[i : i + length] for i in range(0, len(members), length)]
        return parts

    def _span(self, part: Sequence[int]) -> tuple[int, int]:
        """First and past the last position that queries of a tile see."""
        return self.queries[part[0]][3], self.queries[part[-1]][4]

    def sizes(self, length: int) -> tuple[int, int, int]:
        """(tiles, queries of each, keys of each)."""
        parts = self._parts(length)
        spans = map(self._span, parts)
        return len(parts), length, max(end - begin for begin, end in spans)

    def cut(self, length: int, kernel_size: int) -> AxisTiles:
        parts = self._parts(length)
        most = self.sizes(length)[2]
        tile, row = [0] * len(self.queries), [0] * len(self.queries)
        tables: list[list[Row]] = [[] for _ in range(6)]
        for number, part in enumerate(parts):
            for local, query in enumerate(part):
                tile[query], row[query] = number, local
            first, past = self._span(part)
            group = self.queries[part[0]][0]
            first_of_group, numbers = self.keys[group]
            keys = list(numbers[first - first_of_group : past - first_of_group])
            padded = part + [part[-1]] * (length - len(part))
            windows = [self.queries[i] for i in padded]
            rows = (
                padded,
                keys + [keys[-1]] * (most - len(keys)),
                [begin - first for _, _, _, begin, _ in windows],
                [end - first for _, _, _, _, end in windows],
                [slot - first for _, _, slot, _, _ in windows],
                [first - position + kernel_size - 1 for _, position, _, _, _ in windows],
            )
            for table, values in zip(tables, rows, strict=True):
                table.append(tuple(values))
        return AxisTiles(
            len(parts), length, most, kernel_size, *map(tuple, tables), tuple(tile), tuple(row)
        )
