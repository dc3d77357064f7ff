"""Small problems of every rank for the tests of the PyTorch adapter."""

from __future__ import annotations

import math
from types import SimpleNamespace

import oracle
import torch

import natten
import natten.functional as F

FUSED = {1: F.na1d, 2: F.na2d, 3: F.na3d}
QK = {1: F.na1d_qk, 2: F.na2d_qk, 3: F.na3d_qk}
AV = {1: F.na1d_av, 2: F.na2d_av, 3: F.na3d_av}
MODULES = {
    1: natten.NeighborhoodAttention1D,
    2: natten.NeighborhoodAttention2D,
    3: natten.NeighborhoodAttention3D,
}
# Per rank: grid and a neighborhood that mixes even and odd kernels, stride, dilation and causality.
GRIDS = {1: (7,), 2: (5, 4), 3: (3, 4, 2)}
MIXED = {
    1: dict(kernel_size=3, dilation=2, is_causal=True, stride=2),
    2: dict(kernel_size=(2, 3), dilation=(2, 1), is_causal=(False, True), stride=(1, 2)),
    3: dict(kernel_size=(3, 2, 2), dilation=(1, 2, 1), is_causal=(False, True, False), stride=1),
}


DEFAULTS = dict(dilation=1, stride=1, is_causal=False)
# A part of a grid whose borders are of each kind, with a mask: all that a call can say.
PARTS = {
    1: dict(kernel_size=4, stride=2, boundary="cut", query_offset=2, key_offset=1, grid_size=9),
    2: dict(kernel_size=(3, 4), dilation=(1, 2), stride=(1, 2), boundary=("circular", "shift"),
            is_causal=(False, True), query_offset=(3, 3), key_offset=(2, -1), grid_size=(6, 8)),
    3: dict(kernel_size=(2, 3, 2), dilation=(2, 1, 1), boundary=("cut", "circular", "shift"),
            query_offset=(1, 3, 0), key_offset=(-1, 2, 0), grid_size=(4, 4, 3)),
}  # fmt: skip
QUERIES_OF_PART = {1: (5,), 2: (3, 4), 3: (2, 1, 2)}
KEYS_OF_PART = {1: (9,), 2: (5, 8), 3: (4, 3, 2)}


def randn(*shape, dtype=torch.float64, grad=True):
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


def fused_inputs(rank, heads=2, kv_heads=1, dim=3, value_dim=2, n=1, part=False):
    grid, keys = (QUERIES_OF_PART, KEYS_OF_PART) if part else (GRIDS, GRIDS)
    kernel = neighborhood_of(rank, part)["kernel_size"]
    return (
        randn(2, *grid[rank], heads, dim),
        randn(2, *keys[rank], kv_heads, dim),
        randn(2, *keys[rank], kv_heads, value_dim),
        randn(heads, *(2 * k - 1 for k in kernel)),
        randn(2, n, kv_heads, dim),
        randn(2, n, kv_heads, value_dim),
    )


def key_mask_of(rank, device=None):
    """Hides two fifths of the keys of PARTS, others in each of two examples."""
    shape = (2, *KEYS_OF_PART[rank])
    return (torch.arange(math.prod(shape), device=device) % 5 % 2 == 0).view(shape)


def options_of(rank, part):
    """The arguments of a call besides its tensors and scale, key_mask among them."""
    return dict(**PARTS[rank], key_mask=key_mask_of(rank)) if part else MIXED[rank]


def neighborhood_of(rank, part=False):
    """MIXED[rank], or PARTS[rank], with one value per axis."""
    return {
        name: value if isinstance(value, tuple) else (value,) * rank
        for name, value in {**DEFAULTS, **(PARTS if part else MIXED)[rank]}.items()
    }


def dense_attention(rank, part=False):
    """(query, key, value, rpb, additional_keys, additional_values) -> (output, logsumexp) of GRIDS
    and MIXED, or PARTS, as dense masked attention, which PyTorch differentiates by itself. The mask
    is `key_mask_of` or given."""
    shape, keys = (QUERIES_OF_PART, KEYS_OF_PART) if part else (GRIDS, GRIDS)
    shape = shape[rank]
    grid = oracle.Grid(
        SimpleNamespace(shape=shape, key_shape=keys[rank], **neighborhood_of(rank, part))
    )
    in_window, relative = torch.from_numpy(grid.seen), torch.from_numpy(grid.relative)

    default_mask = key_mask_of(rank) if part else None

    def attention(q, k, v, rpb, ak, av, key_mask=default_mask):
        group = q.shape[-2] // k.shape[-2]
        k, v = (
            torch.cat([x.flatten(1, rank), extra], 1).repeat_interleave(group, 2)
            for x, extra in ((k, ak), (v, av))
        )
        scores = torch.einsum("bqhd,bkhd->bqhk", q.flatten(1, rank), k) * q.shape[-1] ** -0.5
        bias = rpb.flatten(1)[:, relative.clamp(min=0)].transpose(0, 1)  # [queries, heads, keys]
        seen = in_window if key_mask is None else in_window & key_mask.flatten(1).unsqueeze(1)
        bias = bias.masked_fill(~seen.unsqueeze(-2), -torch.inf)
        scores = scores + torch.cat([bias, bias.new_zeros(*bias.shape[:-1], ak.shape[1])], -1)
        output = torch.einsum("bqhk,bkhd->bqhd", scores.softmax(-1), v)
        return output.unflatten(1, shape), scores.logsumexp(-1).unflatten(1, shape)

    return attention


def fused_attention(rank, part=False):
    """The same by the library's fused operation."""
    options = options_of(rank, part)

    def attention(q, k, v, rpb, ak, av, **more):
        return FUSED[rank](
            q, k, v, rpb=rpb, additional_keys=ak, additional_values=av, return_lse=True,
            **options | more,
        )  # fmt: skip

    return attention


def unfused_attention(rank, part=False):
    """The same by the library's unfused operations."""
    options = options_of(rank, part)

    def attention(q, k, v, rpb, ak, av, **more):
        group = q.shape[-2] // k.shape[-2]
        k, v, ak, av = (x.repeat_interleave(group, -2).movedim(-2, 1) for x in (k, v, ak, av))
        scores = QK[rank](
            q.movedim(-2, 1) * q.shape[-1] ** -0.5, k, rpb=rpb, additional_keys=ak,
            **options | more,
        )  # fmt: skip
        output = AV[rank](scores.softmax(-1), v, additional_values=av, **options | more)
        return output.movedim(1, -2), scores.logsumexp(-1).movedim(1, -1)

    return attention
