"""Which tokens each part of a grid holds, and which it needs of the others: its halo.

No framework takes part here: the parts of an axis are numbered along it, and adapters know which
rank or device has which.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
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

    def pieces(self, giver: int, taker: int) -> tuple[Piece, ...]:
        """What one part needs of another; on a circular axis maybe at both of its ends."""
        first, last = self.needed[taker]
        found = []
        for turn in (-self.length, 0, self.length) if self.is_circular else (0,):
            start, end = (token + turn for token in self.held[giver])
            low, high = max(start, first), min(end, last)
            if low < high:
                found.append(Piece(low - start, low - first, high - low))
        return tuple(found)


class Halos(NamedTuple):
    """A grid in parts."""

    axes: tuple[Axis, ...]

    def held(self, part: Part) -> tuple[Range, ...]:
        return tuple([axis.held[i] for axis, i in zip(self.axes, part, strict=True)])

    def needed(self, part: Part) -> tuple[Range, ...]:
        return tuple([axis.needed[i] for axis, i in zip(self.axes, part, strict=True)])

    def boxes(self, giver: Part, taker: Part) -> list[tuple[Piece, ...]]:
        """What one part needs of another: boxes of tokens, a piece per axis."""
        along = zip(self.axes, giver, taker, strict=True)
        return list(itertools.product(*(axis.pieces(g, t) for axis, g, t in along)))

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


def _needed(begin: int, count: int, *options: Any, **window: Any) -> Range:
    """`key_range` of one axis, also of no queries."""
    return key_range(begin, count, *options, **window) if count else (begin, begin)  # type: ignore[return-value]


@functools.lru_cache(maxsize=1024)
def halos_of(
    grid: tuple[int, ...],
    parts: tuple[tuple[int, ...], ...],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: tuple[bool, ...],
    boundary: tuple[str, ...],
) -> Halos:
    """`parts`: per axis the counts that `chunks` takes."""
    axes = []
    windows = zip(kernel_size, stride, dilation, is_causal, boundary, strict=True)
    for length, counts, (k, s, d, causal, border) in zip(grid, parts, windows, strict=True):
        held = chunks(length, counts)
        needed: tuple[Range, ...] = held  # where it is not cut, all of the axis is there
        if len(held) > 1:
            needed = tuple(
                _needed(
                    begin, end - begin, length, k,
                    stride=s, dilation=d, is_causal=causal, boundary=border,
                )
                for begin, end in held
            )  # fmt: skip
        axes.append(Axis(length, border == "circular", held, needed))
    return Halos(tuple(axes))


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
            with a key mask also its batch.

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
    halos = halos_of(grid, counts, **window)
    at = tuple(integer("part", i, 0) for i in listed("part", part))
    most = [len(axis.held) for axis in halos.axes]
    if len(at) != rank or any(i >= n for i, n in zip(at, most, strict=True)):
        raise ValueError(f"part: got {part!r}; must be below {most}, one per spatial axis")
    each = integer("token_bytes", token_bytes, 0)
    return HaloBytes(
        each * sum(halos.tokens(at, other) for other in halos.takers(at)),
        each * sum(halos.tokens(other, at) for other in halos.givers(at)),
    )
