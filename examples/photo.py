"""Neighborhood attention over a photograph, and pictures of who attends to whom.

Every pixel is a token. Scores are chosen, not learned: a pixel attends to pixels of a similar color
nearby, score = -|c - c'|^2 / (2 COLOR^2) - |p - p'|^2 / (2 REACH^2), so that attention is the
bilateral filter, which smooths surfaces and keeps edges. The color term is a product of a query
(c, 1) and a key (c, -|c|^2 / 2) up to a constant that softmax cancels; the term of distance is
what a relative position bias is for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle
from sklearn.datasets import load_sample_image
from torch import Tensor

from natten.functional import na2d

COLOR = 0.12  # difference in color, of 1, over which attention fades
REACH = 8.0  # the same for distance, in steps of the window
_SHRINK = 4  # pixels of the photograph per token, along either axis
_FRAME = "#0b57d0"
_QUERY = "#00e0ff"
_HEAT = LinearSegmentedColormap.from_list("heat", ["#00000000", "#ffd400d0", "#ff2a00ff"])


@dataclass(frozen=True)
class Case:
    """One picture: a query (row, column) and the neighborhood in which it attends."""

    name: str
    title: str
    query: tuple[int, int]
    kernel_size: int = 25
    dilation: int = 1
    stride: int = 1
    is_causal: tuple[bool, bool] = (False, False)

    @property
    def neighborhood(self) -> dict[str, Any]:
        """Arguments of the functions of `natten.functional`."""
        return {
            "kernel_size": self.kernel_size,
            "dilation": self.dilation,
            "stride": self.stride,
            "is_causal": self.is_causal,
        }


CASES = (
    Case("interior", "interior: a window around the query", (52, 82)),
    Case("border", "border: the window moves inwards", (60, 3)),
    Case("corner", "corner: the window moves inwards", (103, 157)),
    Case("dilated", "dilation = 4: every fourth pixel", (52, 82), kernel_size=17, dilation=4),
    Case("causal", "causal along rows: nothing below", (66, 90), is_causal=(True, False)),
    Case("strided", "stride = 25: a grid of blocks", (58, 94), stride=25),
)


def load_photo() -> Tensor:
    """A photograph that scikit-learn ships, [rows, columns, 3] with values from 0 to 1."""
    photo = torch.tensor(load_sample_image("china.jpg"), dtype=torch.float32) / 255
    rows, columns = (size // _SHRINK for size in photo.shape[:2])
    photo = photo[: rows * _SHRINK, : columns * _SHRINK]
    return photo.reshape(rows, _SHRINK, columns, _SHRINK, 3).mean((1, 3))


def query_and_key(photo: Tensor) -> tuple[Tensor, Tensor]:
    """Features [rows, columns, 4] whose products are similarities of color."""
    color = (photo - photo.mean((0, 1))) / COLOR
    one = torch.ones_like(color[..., :1])
    return torch.cat([color, one], -1), torch.cat([color, -color.square().sum(-1, True) / 2], -1)


def distance_bias(kernel_size: int) -> Tensor:
    """Relative position bias [1, 2 kernel_size - 1, 2 kernel_size - 1] that fades with distance."""
    offset = torch.arange(1 - kernel_size, kernel_size) / REACH
    return -(offset[:, None].square() + offset.square())[None] / 2


def attend(photo: Tensor, value: Tensor, case: Case, *, uniform: bool = False) -> Tensor:
    """Neighborhood attention of every pixel over `value` [rows, columns, channels].

    With `uniform` all pixels of a window have the same weight.
    """
    query, key = (features[None, :, :, None] for features in query_and_key(photo))
    bias = distance_bias(case.kernel_size)
    if uniform:
        query, bias = torch.zeros_like(query), torch.zeros_like(bias)
    out = na2d(query, key, value[None, :, :, None], rpb=bias, scale=1.0, **case.neighborhood)
    return out[0, :, :, 0]


def weights_of_query(photo: Tensor, case: Case, *, uniform: bool = False) -> Tensor:
    """How much the query of `case` attends to every pixel, [rows, columns]; 0 outside its window.

    An output is the weighted sum of the values, so its gradient by the values is the weights.
    """
    value = torch.zeros_like(photo[..., :1]).requires_grad_()
    output = attend(photo, value, case, uniform=uniform)
    output[case.query].sum().backward()
    assert value.grad is not None
    return value.grad[..., 0]


def _show(axes: Axes, photo: Tensor, window: Tensor, heat: Tensor, query: tuple[int, int]) -> None:
    """The photograph, gray and pale outside the window, under the heat of the weights."""
    gray = photo.mean(-1, keepdim=True).expand(-1, -1, 3)
    base = torch.where(window[..., None], photo, 0.45 + 0.45 * gray)
    axes.imshow(base.numpy(), interpolation="nearest")
    axes.imshow(heat.numpy(), cmap=_HEAT, vmin=0, vmax=float(heat.max()), interpolation="nearest")
    row, column = query
    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, color=_QUERY, lw=1.6))
    axes.axis("off")


def draw_case(photo: Tensor, case: Case) -> plt.Figure:
    """The window of one query in the photograph, and beside it the same enlarged."""
    window = weights_of_query(photo, case, uniform=True) > 0
    heat = weights_of_query(photo, case)
    rows, columns = (torch.nonzero(window.any(1 - axis)).flatten() for axis in (0, 1))
    top, bottom = int(rows[0]), int(rows[-1])
    left, right = int(columns[0]), int(columns[-1])

    figure, (whole, close) = plt.subplots(
        1, 2, figsize=(11, 4.6), width_ratios=(photo.shape[1] / photo.shape[0], 1)
    )
    for axes in (whole, close):
        _show(axes, photo, window, heat, case.query)
    corner = (left - 0.5, top - 0.5)
    size = (right - left + 1, bottom - top + 1)
    whole.add_patch(Rectangle(corner, *size, fill=False, color=_FRAME, lw=2))
    side = max(size) / 2 + 2  # a square around the window
    middle = ((left + right) / 2, (top + bottom) / 2)
    close.set_xlim(middle[0] - side, middle[0] + side)
    close.set_ylim(middle[1] + side, middle[1] - side)
    close.add_patch(Rectangle(corner, *size, fill=False, color=_FRAME, lw=2))
    figure.suptitle(case.title, fontsize=14)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.91, bottom=0.02, wspace=0.03)
    return figure


def draw_filtered(photo: Tensor) -> plt.Figure:
    """The photograph with noise, and what attention over it gives."""
    noise = torch.randn(photo.shape, generator=torch.Generator().manual_seed(0))
    noisy = (photo + 0.06 * noise).clamp(0, 1)
    smooth = attend(noisy, noisy, Case("", "", (0, 0), kernel_size=13))
    figure, row = plt.subplots(1, 2, figsize=(11, 4.1))
    titles = ("photograph with noise", "na2d over it, kernel_size = 13")
    for axes, image, title in zip(row, (noisy, smooth), titles, strict=True):
        axes.imshow(image.clamp(0, 1).numpy(), interpolation="nearest")
        axes.set_title(title, fontsize=14)
        axes.axis("off")
    figure.subplots_adjust(left=0.01, right=0.99, top=0.92, bottom=0.01, wspace=0.02)
    return figure


def draw_all(folder: Path) -> list[Path]:
    """Writes all pictures into `folder` and returns their paths."""
    photo = load_photo()
    figures = {f"window_{case.name}": draw_case(photo, case) for case in CASES}
    figures["filtered"] = draw_filtered(photo)
    paths = []
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=100, facecolor="white")
        plt.close(figure)
        paths.append(path)
    return paths
