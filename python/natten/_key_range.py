"""`natten.key_range`: which keys a part of the queries needs."""

from __future__ import annotations

from collections.abc import Sequence

from natten import _core
from natten._args import Bools, Boundaries, Ints, make_config, offset_per_axis, per_axis

Range = tuple[int, int]


def key_range(
    query_offset: Ints,
    query_length: Ints,
    grid_size: Ints,
    kernel_size: Ints,
    *,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools | None = False,
    boundary: Boundaries = "shift",
) -> Range | tuple[Range, ...]:
    """The tokens whose keys a part of the queries sees, from the first to past the last.

        begin, end = natten.key_range(8, 4, 100, kernel_size=7)
        (top, bottom), (left, right) = natten.key_range((8, 0), (4, 64), (100, 64), 7)

    With keys and values of these tokens alone, at `key_offset=begin`, `na1d` gives of these queries
    what it gives of all.

    Args:
        query_offset: the first of the queries, per axis.
        query_length: their number, per axis.
        grid_size: tokens of the whole grid, per axis.
        kernel_size, stride, dilation, is_causal, boundary: the windows, as in `na1d`.

    Returns:
        (begin, end) where all arguments are single values, which are those of one axis; a tuple of
        such pairs, one per axis, where any argument is a sequence. Both lie on the grid. On a
        circular axis they count on beyond its ends: begin is at or before the first query, maybe
        below 0; only where all of the axis is needed they are (0, length).

    Raises:
        ValueError: values that do not fit, or sequences of different lengths.
        TypeError: an argument of another type.
    """
    arguments = (query_offset, query_length, grid_size, kernel_size, stride, dilation, is_causal,
                 boundary)  # fmt: skip
    lengths = [len(x) for x in arguments if isinstance(x, Sequence) and not isinstance(x, str)]
    rank = lengths[0] if lengths else 1
    config = make_config(
        rank,
        kernel_size,
        dilation,
        is_causal,
        stride,
        boundary,
        query_offset=offset_per_axis("query_offset", query_offset, rank),
        grid_size=per_axis("grid_size", grid_size, rank),
    )
    ranges = _core.key_range(config, per_axis("query_length", query_length, rank))
    return tuple(ranges) if lengths else ranges[0]
