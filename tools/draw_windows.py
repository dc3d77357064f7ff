"""Draws the pictures of docs/semantics.md, docs/many-devices.md and the README into docs/images.

The windows come from the library itself (`natten._core.window`), so the pictures cannot drift from
what it computes.

    python tools/draw_windows.py [--out docs/images]
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

import natten
from natten import _core
from natten._args import BOUNDARIES
from natten._halos import halos_of

INK = "#333333"
GRID = "#c9ced6"
EMPTY = "#f6f7f9"
WINDOW = "#8ec7f2"
QUERY = "#d9480f"
SHARER = "#f7b48a"  # further queries of the same window
PALE = "#dcecf8"  # windows of queries that are not given
FONT = 11


@dataclass(frozen=True)
class Neighborhood:
    """One value per axis, named as in the library."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...] = (1, 1, 1)
    dilation: tuple[int, ...] = (1, 1, 1)
    is_causal: tuple[bool, ...] = (False, False, False)
    boundary: tuple[str, ...] = ("shift", "shift", "shift")

    def window(self, query: tuple[int, ...], shape: tuple[int, ...]) -> set[tuple[int, ...]]:
        """The tokens that `query` attends to on a grid of that shape."""
        axes = [
            _core.window(
                False,
                token,
                length,
                self.kernel_size[axis],
                self.stride[axis],
                self.dilation[axis],
                self.is_causal[axis],
                BOUNDARIES.index(self.boundary[axis]),
            )
            for axis, (token, length) in enumerate(zip(query, shape, strict=True))
        ]
        return set(itertools.product(*axes))

    def sharers(self, query: tuple[int, ...], shape: tuple[int, ...]) -> set[tuple[int, ...]]:
        """All queries with the window of `query`, itself among them."""
        own = self.window(query, shape)
        tokens = itertools.product(*map(range, shape))
        return {token for token in tokens if self.window(token, shape) == own}


def draw_cells(axes: Axes, colors: Mapping[Any, str], shape: tuple[int, int]) -> None:
    """A grid of `shape` cells, rows downwards, in the color of their (row, column)."""
    rows, columns = shape
    for row, column in itertools.product(range(rows), range(columns)):
        color = colors.get((row, column), EMPTY)
        axes.add_patch(
            Rectangle((column, row), 1, 1, facecolor=color, edgecolor=GRID, linewidth=0.7)
        )
    axes.set_xlim(-0.05, columns + 0.05)
    axes.set_ylim(rows + 0.05, -0.05)
    axes.set_aspect("equal")
    axes.axis("off")


def add_dot(axes: Axes, row: float, column: float) -> None:
    """Marks a query, also for readers who see no color."""
    axes.plot(column + 0.5, row + 0.5, "o", color="white", markersize=3.2)


def add_legend(figure: plt.Figure, entries: dict[str, str], y: float = 0.0) -> None:
    """One row of colored squares with names, below everything."""
    handles = [Patch(facecolor=c, edgecolor=GRID, label=name) for name, c in entries.items()]
    figure.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, y),
        ncols=len(handles),
        frameon=False,
        fontsize=FONT,
        labelcolor=INK,
    )


def draw_2d() -> plt.Figure:
    """Windows on a grid: the picture that opens the README."""
    shape = (14, 14)
    panels: list[tuple[str, Neighborhood, tuple[int, int]]] = [
        ("inside", Neighborhood((5, 5)), (6, 6)),
        ("corner", Neighborhood((5, 5)), (0, 12)),
        ("dilation = 2", Neighborhood((5, 5), dilation=(2, 2)), (6, 6)),
        ("causal rows", Neighborhood((5, 5), is_causal=(True, False)), (8, 6)),
        ("stride = 3", Neighborhood((7, 7), stride=(3, 3)), (6, 8)),
        ("stride = kernel_size", Neighborhood((5, 5), stride=(5, 5)), (6, 8)),
    ]
    figure, row = plt.subplots(1, len(panels), figsize=(14, 2.95))
    for axes, (title, neighborhood, query) in zip(row, panels, strict=True):
        colors = dict.fromkeys(neighborhood.window(query, shape), WINDOW)
        colors |= dict.fromkeys(neighborhood.sharers(query, shape), SHARER)
        colors[query] = QUERY
        draw_cells(axes, colors, shape)
        add_dot(axes, *query)
        axes.set_title(title, fontsize=FONT + 2, color=INK)
    add_legend(
        figure, {"query": QUERY, "its window": WINDOW, "queries that share the window": SHARER}
    )
    figure.subplots_adjust(left=0.01, right=0.99, top=0.91, bottom=0.13, wspace=0.06)
    return figure


def draw_axis(axes: Axes, title: str, neighborhood: Neighborhood, length: int = 12) -> None:
    """Which keys each query sees along an axis."""
    colors = {}
    for query in range(length):
        for (key,) in neighborhood.window((query,), (length,)):
            colors[query, key] = QUERY if key == query else WINDOW
    draw_cells(axes, colors, (length, length))
    name_tokens(axes, title, range(length), range(length))


def name_tokens(axes: Axes, title: str, queries: range, keys: range) -> None:
    """Numbers rows by queries and columns by keys."""
    axes.set_title(title, fontsize=FONT + 2, color=INK, pad=32)
    small = {"fontsize": FONT - 3, "color": INK}
    for column, key in enumerate(keys):
        axes.text(column + 0.5, -0.2, str(key), ha="center", va="bottom", **small)
    for row, query in enumerate(queries):
        axes.text(-0.25, row + 0.5, str(query), ha="right", va="center", **small)
    axes.text(len(keys) / 2, -0.85, "key", ha="center", va="bottom", fontsize=FONT, color=INK)
    axes.text(
        -1.25, len(queries) / 2, "query", ha="right", va="center", rotation=90, fontsize=FONT,
        color=INK,
    )  # fmt: skip


def draw_1d() -> plt.Figure:
    """Which keys each query sees along an axis of 12 tokens."""
    panels = [
        ("kernel_size = 5", Neighborhood((5,))),
        ("kernel_size = 4", Neighborhood((4,))),
        ("kernel_size = 3, dilation = 2", Neighborhood((3,), dilation=(2,))),
        ("kernel_size = 4, causal", Neighborhood((4,), is_causal=(True,))),
        ("kernel_size = 5, stride = 2", Neighborhood((5,), stride=(2,))),
        ("kernel_size = 4, stride = 4", Neighborhood((4,), stride=(4,))),
    ]
    figure, grid = plt.subplots(2, 3, figsize=(11, 8.5))
    for axes, (title, neighborhood) in zip(grid.flat, panels, strict=True):
        draw_axis(axes, title, neighborhood)
    add_legend(figure, {"key that the query sees": WINDOW, "the query itself": QUERY})
    figure.subplots_adjust(left=0.05, right=0.99, top=0.91, bottom=0.06, wspace=0.18, hspace=0.26)
    return figure


def draw_3d() -> plt.Figure:
    """A video: causal in time, a window in space."""
    shape = (6, 9, 9)
    neighborhood = Neighborhood((4, 5, 5), is_causal=(True, False, False))
    query = (4, 3, 4)
    window = neighborhood.window(query, shape)
    figure, row = plt.subplots(1, shape[0], figsize=(13, 2.85))
    for frame, axes in enumerate(row):
        colors = {(r, c): WINDOW for t, r, c in window if t == frame}
        if frame == query[0]:
            colors[query[1:]] = QUERY
            add_dot(axes, *query[1:])
        draw_cells(axes, colors, shape[1:])
        note = " (query)" if frame == query[0] else " (future)" if frame > query[0] else ""
        axes.set_title(f"frame {frame}{note}", fontsize=FONT + 1, color=INK)
    add_legend(figure, {"query": QUERY, "its window": WINDOW})
    figure.subplots_adjust(left=0.01, right=0.99, top=0.9, bottom=0.13, wspace=0.08)
    return figure


def draw_borders_1d() -> plt.Figure:
    """Which keys each query sees, by boundary, without and with dilation."""
    figure, grid = plt.subplots(2, 3, figsize=(11, 8.5))
    for column, boundary in enumerate(("shift", "cut", "circular")):
        plain = Neighborhood((5,), boundary=(boundary,))
        draw_axis(grid[0, column], f'"{boundary}", kernel_size = 5', plain)
        dilated = Neighborhood((3,), dilation=(2,), boundary=(boundary,))
        draw_axis(grid[1, column], "kernel_size = 3, dilation = 2", dilated)
    add_legend(figure, {"key that the query sees": WINDOW, "the query itself": QUERY})
    figure.subplots_adjust(left=0.05, right=0.99, top=0.91, bottom=0.06, wspace=0.18, hspace=0.26)
    return figure


def draw_borders_2d() -> plt.Figure:
    """The window of a query near a corner, by boundary."""
    shape, query = (10, 14), (1, 1)
    panels = [
        ('"shift"', ("shift", "shift")),
        ('"cut"', ("cut", "cut")),
        ('"circular"', ("circular", "circular")),
        ('("cut", "circular")', ("cut", "circular")),
    ]
    figure, row = plt.subplots(1, len(panels), figsize=(13, 2.95))
    for axes, (title, boundary) in zip(row, panels, strict=True):
        neighborhood = Neighborhood((5, 7), boundary=boundary)
        colors = dict.fromkeys(neighborhood.window(query, shape), WINDOW)
        colors[query] = QUERY
        draw_cells(axes, colors, shape)
        add_dot(axes, *query)
        axes.set_title(title, fontsize=FONT + 2, color=INK)
    add_legend(figure, {"query": QUERY, "its window": WINDOW})
    figure.subplots_adjust(left=0.01, right=0.99, top=0.91, bottom=0.13, wspace=0.06)
    return figure


def draw_parts() -> plt.Figure:
    """The keys that a part of the queries needs; on a circular axis they are drawn unwrapped."""
    length, kernel_size = 12, 5
    panels = [
        ('queries 4 to 6, "shift"', "shift", range(4, 7)),
        ('queries 0 to 2, "shift"', "shift", range(3)),
        ('queries 0 to 2, "circular"', "circular", range(3)),
    ]
    margin = kernel_size // 2
    keys = range(-margin, length)
    figure, row = plt.subplots(1, len(panels), figsize=(12.5, 4.5))
    for axes, (title, boundary, given) in zip(row, panels, strict=True):
        neighborhood = Neighborhood((kernel_size,), boundary=(boundary,))
        begin, end = natten.key_range(
            given.start, len(given), length, kernel_size, boundary=boundary
        )
        colors = {}
        for query in range(length):
            window = neighborhood.window((query,), (length,))
            # A key at the other end lies beyond the border, next to the query.
            wraps = boundary == "circular" and query < margin
            places = {k - length if wraps and k > length // 2 else k for (k,) in window}
            for key in places:
                color = QUERY if key == query else WINDOW
                colors[query, key + margin] = color if query in given else PALE
        draw_cells(axes, colors, (length, len(keys)))
        name_tokens(axes, f"{title}: ({begin}, {end})", range(length), keys)
        axes.add_patch(
            Rectangle(
                (begin + margin, given.start), end - begin, len(given), fill=False,
                edgecolor=INK, linewidth=2,
            )
        )  # fmt: skip
    add_legend(
        figure,
        {"windows of the part": WINDOW, "of other queries": PALE, "its queries": QUERY},
    )
    figure.subplots_adjust(left=0.05, right=0.99, top=0.84, bottom=0.09, wspace=0.16)
    return figure


def draw_halos() -> plt.Figure:
    """What one of 3 x 4 parts needs of the others."""
    shape, parts = (12, 16), (3, 4)
    panels = [
        ("5 x 5, inside", Neighborhood((5, 5)), (1, 1)),
        ("5 x 5, in a corner", Neighborhood((5, 5)), (0, 3)),
        ("circular columns", Neighborhood((5, 5), boundary=("cut", "circular", "cut")), (1, 3)),
        ("causal rows", Neighborhood((5, 5), is_causal=(True, False, False)), (1, 1)),
        ("13 x 3: of several parts", Neighborhood((13, 3), boundary=("cut",) * 3), (2, 1)),
    ]
    figure, row = plt.subplots(1, len(panels), figsize=(14, 2.75))
    for axes, (title, neighborhood, part) in zip(row, panels, strict=True):
        window = {name: tuple(values[:2]) for name, values in vars(neighborhood).items()}
        counts = tuple((n,) for n in parts)
        halos = halos_of(shape, counts, **window)  # type: ignore[arg-type]
        needed, held = (
            set(
                itertools.product(
                    *(
                        [token % n for token in range(*r)]
                        for r, n in zip(ranges, shape, strict=True)
                    )
                )
            )
            for ranges in (halos.needed(part), halos.held(part))
        )
        draw_cells(axes, dict.fromkeys(needed, WINDOW) | dict.fromkeys(held, SHARER), shape)
        for begin, _ in halos.axes[0].held[1:]:
            axes.axhline(begin, color=INK, linewidth=1.2)
        for begin, _ in halos.axes[1].held[1:]:
            axes.axvline(begin, color=INK, linewidth=1.2)
        axes.set_title(title, fontsize=FONT + 1, color=INK)
    add_legend(figure, {"the part of a rank": SHARER, "its halo, which others send": WINDOW})
    figure.subplots_adjust(left=0.01, right=0.99, top=0.9, bottom=0.13, wspace=0.06)
    return figure


PICTURES = {
    "neighborhoods": draw_2d,
    "windows_1d": draw_1d,
    "windows_3d": draw_3d,
    "borders_1d": draw_borders_1d,
    "borders_2d": draw_borders_2d,
    "parts": draw_parts,
    "halos": draw_halos,
}


def main() -> None:
    """Writes every picture and prints its path and size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    default = Path(__file__).resolve().parent.parent / "docs" / "images"
    parser.add_argument("--out", type=Path, default=default, help="folder (default: docs/images)")
    folder: Path = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        path = folder / f"{name}.png"
        figure = draw()
        figure.savefig(path, dpi=110, facecolor="white", metadata={"Software": None})
        plt.close(figure)
        print(f"{path}: {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
