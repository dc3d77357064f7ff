"""Small problems of every rank for the tests of the PyTorch adapter."""

from __future__ import annotations

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


def randn(*shape, dtype=torch.float64, grad=True):
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


def fused_inputs(rank, heads=2, kv_heads=1, dim=3, value_dim=2, n=1):
    grid = GRIDS[rank]
    kernel = MIXED[rank]["kernel_size"]
    kernel = (kernel,) if isinstance(kernel, int) else kernel
    return (
        randn(2, *grid, heads, dim),
        randn(2, *grid, kv_heads, dim),
        randn(2, *grid, kv_heads, value_dim),
        randn(heads, *(2 * k - 1 for k in kernel)),
        randn(2, n, kv_heads, dim),
        randn(2, n, kv_heads, value_dim),
    )


def neighborhood_of(rank):
    """MIXED[rank] with one value per axis."""
    return {
        name: value if isinstance(value, tuple) else (value,) * rank
        for name, value in MIXED[rank].items()
    }


def dense_attention(rank):
    """(query, key, value, rpb, additional_keys, additional_values) -> (output, logsumexp) of GRIDS
    and MIXED as dense masked attention, which PyTorch differentiates by itself."""
    grid = oracle.Grid(SimpleNamespace(shape=GRIDS[rank], **neighborhood_of(rank)))
    seen, relative = torch.from_numpy(grid.seen), torch.from_numpy(grid.relative)

    def attention(q, k, v, rpb, ak, av):
        group = q.shape[-2] // k.shape[-2]
        k, v = (
            torch.cat([x.flatten(1, rank), extra], 1).repeat_interleave(group, 2)
            for x, extra in ((k, ak), (v, av))
        )
        scores = torch.einsum("bqhd,bkhd->bqhk", q.flatten(1, rank), k) * q.shape[-1] ** -0.5
        # [queries, heads, keys]
        bias = rpb.flatten(1)[:, relative.clamp(min=0)].transpose(0, 1)
        bias = bias.masked_fill(~seen[:, None], -torch.inf)
        scores = scores + torch.cat([bias, bias.new_zeros(*bias.shape[:2], ak.shape[1])], -1)
        output = torch.einsum("bqhk,bkhd->bqhd", scores.softmax(-1), v)
        return output.unflatten(1, GRIDS[rank]), scores.logsumexp(-1).unflatten(1, GRIDS[rank])

    return attention


def fused_attention(rank):
    """The same by the library's fused operation."""

    def attention(q, k, v, rpb, ak, av):
        return FUSED[rank](
            q, k, v, rpb=rpb, additional_keys=ak, additional_values=av, return_lse=True,
            **MIXED[rank],
        )  # fmt: skip

    return attention


def unfused_attention(rank):
    """The same by the library's unfused operations."""

    def attention(q, k, v, rpb, ak, av):
        group = q.shape[-2] // k.shape[-2]
        k, v, ak, av = (x.repeat_interleave(group, -2).movedim(-2, 1) for x in (k, v, ak, av))
        scores = QK[rank](
            q.movedim(-2, 1) * q.shape[-1] ** -0.5, k, rpb=rpb, additional_keys=ak, **MIXED[rank]
        )
        output = AV[rank](scores.softmax(-1), v, additional_values=av, **MIXED[rank])
        return output.movedim(1, -2), scores.logsumexp(-1).movedim(1, -1)

    return attention
