"""Tokens of a grid in the order of its tiles, as NATTEN 0.21 defines it, and back.

Along each axis token i belongs to dilation group g = i mod dilation, at position p = i div
dilation, which is place p mod tile of tile p div tile. Permuted tokens are ordered by tile, then by
place, both in row-major order of the axes, or with `flip_tiled_dims` in column-major order, which
has the first axis innermost. Dilation groups, ordered likewise, become a part of the batch. Grids
are padded with zeros at their ends, so that all groups have the same number of whole tiles.

Nothing here needs this order. It serves code that computes with it, such as masks that are sparse
by blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from natten._args import Ints, per_axis
from natten.torch import _ops

# What a split axis of the grid becomes, in the order of its parts.
_TILE, _PLACE, _GROUP = range(3)


class _Layout:
    """How the tokens of a grid are split and ordered."""

    def __init__(
        self, grid: Sequence[int], tile_shape: Ints, dilation: Ints | None, flip: bool
    ) -> None:
        rank = len(grid)
        self.tile = per_axis("tile_shape", tile_shape, rank)
        self.dilation = per_axis("dilation", 1 if dilation is None else dilation, rank)
        for name, value in (("tile_shape", self.tile), ("dilation", self.dilation)):
            if min(value) < 1:
                raise ValueError(f"{name}: got {list(value)}; must be positive")
        self.tiles = tuple(
            -(-length // (t * d))
            for length, t, d in zip(grid, self.tile, self.dilation, strict=True)
        )
        # Of a dilation group, and of all of them.
        self.padded = tuple(n * t for n, t in zip(self.tiles, self.tile, strict=True))
        self.padded_grid = tuple(n * d for n, d in zip(self.padded, self.dilation, strict=True))
        axes = range(rank)[::-1] if flip else range(rank)
        # Of the grid's axes split into three parts each, those that come first, and so on.
        self.order = [3 * axis + part for part in (_GROUP, _TILE, _PLACE) for axis in axes]
        self.parts = [
            n for parts in zip(self.tiles, self.tile, self.dilation, strict=True) for n in parts
        ]


def token_permute_operation(
    tensor: Tensor,
    tile_shape: Ints,
    dilation: Ints | None = None,
    flip_tiled_dims: bool = True,
    use_torch: bool = True,
) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """Orders tokens by tiles. Differentiable.

    Args:
        tensor: [batch, *spatial, heads, head_dim] with one to three spatial axes.
        tile_shape: tokens of a tile, one number for all axes or one per axis.
        dilation: likewise; None is 1.
        flip_tiled_dims: have the first axis innermost.
        use_torch: no effect.

    Returns:
        The tokens [batch * product of dilation, product of the padded grid, heads, head_dim], the
        grid, which `token_unpermute_operation` takes, and the padded grid of a dilation group.

    Raises:
        ValueError: tensor has other dimensions, or a number is not positive.
        TypeError: tensor is no dense tensor, or a number is no integer.
    """
    _ops.check_tensor("tensor", tensor)
    if tensor.dim() not in (4, 5, 6):
        raise ValueError(
            f"tensor: got shape {list(tensor.shape)}; must be [batch, *spatial, heads, head_dim] "
            "with one to three spatial axes"
        )
    batch, *grid, heads, dim = tensor.shape
    layout = _Layout(grid, tile_shape, dilation, flip_tiled_dims)
    missing = [n - length for n, length in zip(layout.padded_grid, grid, strict=True)]
    padding = [0, 0, 0, 0, *(n for axis in reversed(missing) for n in (0, axis))]
    split = torch.nn.functional.pad(tensor, padding).reshape(batch, *layout.parts, heads, dim)
    permuted = split.permute(0, *(1 + i for i in layout.order), -2, -1).reshape(
        batch * prod(layout.dilation), prod(layout.padded), heads, dim
    )
    return permuted, tuple(grid), layout.padded


def token_unpermute_operation(
    tensor: Tensor,
    token_layout_shape: Sequence[int],
    tile_shape: Ints,
    dilation: Ints | None = None,
    flip_tiled_dims: bool = True,
    use_torch: bool = True,
) -> Tensor:
    """The inverse of `token_permute_operation`, without the padding. Differentiable.

    Args:
        tensor: what that returned first.
        token_layout_shape: what it returned next, the grid.
        tile_shape, dilation, flip_tiled_dims: what it was given.
        use_torch: no effect.

    Returns:
        [batch, *token_layout_shape, heads, head_dim].

    Raises:
        ValueError: a shape that does not fit, or a number that is not positive.
        TypeError: tensor is no dense tensor, or a number is no integer.
    """
    _ops.check_tensor("tensor", tensor)
    grid = per_axis("token_layout_shape", token_layout_shape, len(token_layout_shape))
    if len(grid) not in (1, 2, 3):
        raise ValueError(
            f"token_layout_shape: got {list(grid)}; must have one length for each of one to three "
            "spatial axes"
        )
    layout = _Layout(grid, tile_shape, dilation, flip_tiled_dims)
    groups = prod(layout.dilation)
    if tensor.dim() != 4 or tensor.shape[0] % groups != 0 or tensor.shape[1] != prod(layout.padded):
        raise ValueError(
            f"tensor: got shape {list(tensor.shape)}; must be [batch * {groups}, "
            f"{prod(layout.padded)}, heads, head_dim] for this grid, tile_shape and dilation"
        )
    batch, (heads, dim) = tensor.shape[0] // groups, tensor.shape[2:]
    split = tensor.reshape(batch, *(layout.parts[i] for i in layout.order), heads, dim)
    back = [1 + layout.order.index(i) for i in range(len(layout.order))]
    padded = split.permute(0, *back, -2, -1).reshape(batch, *layout.padded_grid, heads, dim)
    return padded[(slice(None), *map(slice, grid))].contiguous()


__all__ = ["token_permute_operation", "token_unpermute_operation"]
