"""Which tokens each part of a grid holds, and which it needs of the others: its halo.

No framework takes part here: the parts of an axis are numbered along it, and adapters know which
rank or device has which.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from natten._args import Bools, Boundaries, Ints, integer, listed, per_axis, window_options
from natten._key_range import Range, key_range

Part = tuple[int, ...]  # the number of a part along each axis


class Piece(NamedTuple):
    """Tokens of one part that another needs, along one axis."""

    held: int  # the first, counted from the first that the giver holds
    needed: int  # the first, counted from the first that the taker needs
    tokens: int


class Axis(NamedTuple):
    """One axis of a grid in parts."""

    length: int
    is_circular: bool
    held: tuple[Range, ...]  # tokens of each part
    needed: tuple[Range, ...]  # tokens that the windows of its queries see, as key_range counts
    window: tuple[tuple[str, Any], ...]  # its options by name

    def pieces(self, giver: int, taker: int) -> tuple[Piece, ...]:
        """What one part needs of another; on a circular axis maybe at both of its ends."""
        return self.pieces_of(giver, self.needed[taker])

    def pieces_of(self, giver: int, needed: Range) -> tuple[Piece, ...]:
        """What a part holds of tokens that are needed."""
        first, last = needed
        found = []
        for turn in (-self.length, 0, self.length) if self.is_circular else (0,):
            start, end = (token + turn for token in self.held[giver])
            low, high = max(start, first), min(end, last)
            if low < high:
                found.append(Piece(low - start, low - first, high - low))
        return tuple(found)

    def needed_of(self, queries: Range) -> Range:
        """The tokens that the windows of some queries see."""
        begin, end = queries
        if len(self.held) == 1:  # where it is not cut, all of the axis is there
            return self.held[0]
        if begin == end:
            return queries
        return key_range(begin, end - begin, self.length, **dict(self.window))  # type: ignore[return-value]

    def inside(self, part: int) -> Range:
        """Queries of a part that see nothing but what it holds; maybe none."""
        begin, end = self.held[part]

        def is_inside(first: int, last: int) -> bool:
            low, high = self.needed_of((first, last))
            return begin <= low and high <= end

        middle = (begin + end) // 2
        if begin == end or not is_inside(middle, middle + 1):
            return middle, middle
        # More queries see more, so that both ends can be found by halving.
        low = bisect.bisect_left(
            range(begin, middle), True, key=lambda first: is_inside(first, middle + 1)
        )
        high = bisect.bisect_left(
            range(middle + 1, end), True, key=lambda last: not is_inside(middle, last + 1)
        )
        return begin + low, middle + 1 + high


class Block(NamedTuple):
    """Some of the queries of a part, and the tokens that are there for them, per axis."""

    queries: tuple[Range, ...]
    needed: tuple[Range, ...]
    is_inside: bool  # whether that is what the part holds


class Halos(NamedTuple):
    """A grid in parts."""

    axes: tuple[Axis, ...]

    def held(self, part: Part) -> tuple[Range, ...]:
        return tuple([axis.held[i] for axis, i in zip(self.axes, part, strict=True)])

    def needed(self, part: Part) -> tuple[Range, ...]:
        return tuple([axis.needed[i] for axis, i in zip(self.axes, part, strict=True)])

    def boxes(self, giver: Part, needed: Sequence[Range]) -> list[tuple[Piece, ...]]:
        """What a part holds of tokens that are needed: boxes, a piece per axis."""
        along = zip(self.axes, giver, needed, strict=True)
        return list(itertools.product(*(axis.pieces_of(g, n) for axis, g, n in along)))

    def whole(self, part: Part) -> tuple[Block, ...]:
        """All queries of a part as one block."""
        return (Block(self.held(part), self.needed(part), False),)

    def blocks(self, part: Part) -> tuple[Block, ...]:
        """The queries of a part, first those that see nothing but what it holds, if there are any,
        then those around them. They can be computed before and after tokens of others come."""
        held = self.held(part)
        inside = tuple([axis.inside(i) for axis, i in zip(self.axes, part, strict=True)])
        if any(begin == end for begin, end in inside):
            return self.whole(part)
        found = [Block(inside, held, True)]
        rest = list(held)
        for i, ((begin, end), (low, high)) in enumerate(zip(held, inside, strict=True)):
            for border in ((begin, low), (high, end)):
                if border[0] < border[1]:
                    queries = (*rest[:i], border, *rest[i + 1 :])
                    needed = [a.needed_of(q) for a, q in zip(self.axes, queries, strict=True)]
                    found.append(Block(queries, tuple(needed), False))
            rest[i] = (low, high)
        return tuple(found)

    def givers(self, part: Part) -> list[Part]:
        """The other parts that it needs tokens of, in the order of their numbers."""
        return self._others(part, lambda axis, own, other: axis.pieces(other, own))

    def takers(self, part: Part) -> list[Part]:
        """The other parts that need tokens of it, in the order of their numbers."""
        return self._others(part, lambda axis, own, other: axis.pieces(own, other))

    def _others(
        self, part: Part, shared: Callable[[Axis, int, int], tuple[Piece, ...]]
    ) -> list[Part]:
        near = [
            [j for j in range(len(axis.held)) if shared(axis, i, j)]
            for axis, i in zip(self.axes, part, strict=True)
        ]
        return [other for other in itertools.product(*near) if other != part]

    def tokens(self, giver: Part, taker: Part) -> int:
        along = zip(self.axes, giver, taker, strict=True)
        return math.prod(sum(p.tokens for p in axis.pieces(g, t)) for axis, g, t in along)


def chunks(length: int, counts: Sequence[int]) -> tuple[Range, ...]:
    """The ranges of `torch.chunk` along an axis, which are those of DTensor and of XLA: all of the
    same size but the last ones, which may be smaller or empty. Each is cut again by the next of
    `counts`."""
    ranges = [(0, length)]
    for count in counts:
        pieces = []
        for begin, end in ranges:
            size = -(-(end - begin) // count)
            cuts = [min(begin + i * size, end) for i in range(count + 1)]
            pieces += list(itertools.pairwise(cuts))
        ranges = pieces
    return tuple(ranges)


@functools.lru_cache(maxsize=1024)
def axis_of(length: int, counts: tuple[int, ...], window: tuple[tuple[str, Any], ...]) -> Axis:
    """An axis in the parts that `chunks` says; `window`: its options by name."""
    is_circular = dict(window).get("boundary") == "circular"
    axis = Axis(length, is_circular, chunks(length, counts), (), window)
    return axis._replace(needed=tuple(map(axis.needed_of, axis.held)))


def halos_of(
    grid: Sequence[int], parts: Sequence[tuple[int, ...]], window: Mapping[str, Sequence[Any]]
) -> Halos:
    """`parts`: per axis the counts that `chunks` takes. `window`: its options by name, each with
    one value per axis."""
    return Halos(
        tuple(
            axis_of(length, counts, tuple((name, values[i]) for name, values in window.items()))
            for i, (length, counts) in enumerate(zip(grid, parts, strict=True))
        )
    )


class HaloBytes(NamedTuple):
    """What `halo_bytes` counts."""

    sent: int
    received: int


def halo_bytes(
    grid_size: Sequence[int],
    parts: Sequence[int | Sequence[int]],
    kernel_size: Ints,
    *,
    part: Sequence[int],
    token_bytes: int,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools | None = False,
    boundary: Boundaries = "shift",
) -> HaloBytes:
    """The bytes that one rank sends and receives in a forward call on a grid in parts.

        halo_bytes((721, 1440), (4, 8), 7, part=(0, 3), token_bytes=8 * (64 + 64) * 2)

    In backward the gradients of the same tokens travel the other way, without a mask.

    Args:
        grid_size: tokens of the whole grid, per axis.
        parts: per axis into how many parts it is cut, or several numbers where several mesh axes
            cut it, one after the other. Parts are those of `torch.chunk`.
        kernel_size, stride, dilation, is_causal, boundary: the windows, as in `natten.na1d`.
        part: which of the parts the rank has, per axis.
        token_bytes: of all that travels of a token: batch * kv_heads * (head_dim +
            value_head_dim) * element size of the rank's own batch and heads, for keys and values;
            and the batch of a key mask that is split like them.

    Raises:
        ValueError: values that do not fit, or sequences of different lengths.
        TypeError: an argument of another type.
    """
    rank = len(listed("grid_size", grid_size))
    grid = per_axis("grid_size", grid_size, rank)
    if len(listed("parts", parts)) != rank:
        raise ValueError(
            f"parts: got {parts!r}, {len(parts)} elements; must be {rank}, one per spatial axis"
        )
    counts = tuple(
        tuple(
            integer("parts", n, 1) for n in (listed("parts", x) if isinstance(x, Sequence) else [x])
        )
        for x in parts
    )
    window = window_options(
        rank,
        kernel_size=kernel_size,
        stride=stride,
        dilation=dilation,
        is_causal=is_causal,
        boundary=boundary,
    )
    halos = halos_of(grid, counts, window)
    at = tuple(integer("part", i, 0) for i in listed("part", part))
    most = [len(axis.held) for axis in halos.axes]
    if len(at) != rank or any(i >= n for i, n in zip(at, most, strict=True)):
        raise ValueError(f"part: got {part!r}; must be below {most}, one per spatial axis")
    each = integer("token_bytes", token_bytes, 0)
    return HaloBytes(
        each * sum(halos.tokens(at, other) for other in halos.takers(at)),
        each * sum(halos.tokens(other, at) for other in halos.givers(at)),
    )
