"""The unfused operations under NATTEN's 0.14 names, in plain PyTorch operations.

Written from the definition and sharing no code with the library: it gathers the neighbors of every
token and leaves the gradients to PyTorch. Published models run with these instead of the library's.
"""

from __future__ import annotations

import torch
from oracle import axis_windows
from torch import Tensor


def neighborhood(shape: tuple[int, ...], kernel_size: int, dilation: int) -> tuple[Tensor, Tensor]:
    """[tokens, slots], both row-major: the neighbor's token number, and the number of its relative
    position in a bias table of 2 * kernel_size - 1 entries along each axis."""
    k = kernel_size
    neighbor = relative = torch.zeros(1, 1, dtype=torch.int64)
    for length in shape:
        window = torch.tensor(axis_windows(length, k, 1, dilation, False))  # [length, k]
        distance = window // dilation - torch.arange(length)[:, None] // dilation + k - 1
        neighbor = _combine(neighbor * length, window)
        relative = _combine(relative * (2 * k - 1), distance)
    return neighbor, relative


def _combine(outer: Tensor, inner: Tensor) -> Tensor:
    """Sums over all pairs of tokens and all pairs of slots of two axes."""
    return (outer[:, None, :, None] + inner[None, :, None, :]).flatten(2).flatten(0, 1)


def _qkrpb(
    query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int
) -> Tensor:
    neighbor, relative = neighborhood(query.shape[2:-1], kernel_size, dilation)
    keys = key.flatten(2, -2)[:, :, neighbor]  # [batch, heads, tokens, slots, dim]
    scores = (query.flatten(2, -2).unsqueeze(-2) * keys).sum(-1)
    if rpb is not None:
        scores = scores + rpb.flatten(1)[:, relative]
    return scores.unflatten(2, query.shape[2:-1])


def _av(attn: Tensor, value: Tensor, kernel_size: int, dilation: int) -> Tensor:
    neighbor, _ = neighborhood(value.shape[2:-1], kernel_size, dilation)
    values = value.flatten(2, -2)[:, :, neighbor]
    return (attn.flatten(2, -2).unsqueeze(-1) * values).sum(-2).unflatten(2, value.shape[2:-1])


natten1dqkrpb = natten2dqkrpb = _qkrpb
natten1dav = natten2dav = _av
