"""One grid over many processes: trains attention on a globe that no process holds all of.

    torchrun --nproc-per-node 4 examples/distributed.py [--steps 30]

Every rank has a rectangle of latitudes and longitudes. Tokens beyond it come from the ranks around
it, as far as windows reach. The losses are those of one process.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

import natten

LATITUDES, LONGITUDES, DIM, HEADS = 25, 48, 16, 2  # 25 rows do not cut evenly
WINDOW = {"kernel_size": (3, 5), "boundary": ("cut", "circular")}  # longitude goes round


class Model(nn.Module):
    """Two layers of neighborhood attention. They take tensors and DTensors alike."""

    def __init__(self) -> None:
        super().__init__()
        self.first = natten.NeighborhoodAttention2D(DIM, HEADS, rel_pos_bias=True, **WINDOW)
        self.second = natten.NeighborhoodAttention2D(DIM, HEADS, rel_pos_bias=True, **WINDOW)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.gelu(x + self.first(x)))


def make(mesh: DeviceMesh | None) -> tuple[Model, torch.optim.Optimizer]:
    """A model, whose parameters every rank of the mesh holds, and what trains it."""
    torch.manual_seed(0)
    model = Model().double()
    if mesh is not None:
        distribute_module(model, mesh)
    return model, torch.optim.AdamW(model.parameters(), 1e-2)


def fields(mesh: DeviceMesh | None, step: int) -> tuple[Tensor, Tensor]:
    """What the model sees, and what is to come of it: a wind blows from the west."""
    random = torch.Generator().manual_seed(step)
    shape = (2, LATITUDES, LONGITUDES, DIM)
    now = torch.randn(shape, generator=random, dtype=torch.float64)
    later = now.roll(1, 2)
    if mesh is None:
        return now, later
    placements = [Shard(1), Shard(2)]  # each rank takes its part of what all of them have made
    return (
        distribute_tensor(now, mesh, placements, src_data_rank=None),
        distribute_tensor(later, mesh, placements, src_data_rank=None),
    )


def train(
    mesh: DeviceMesh | None, model: Model, optimizer: torch.optim.Optimizer, steps: range
) -> list[float]:
    """The losses; without a mesh, of one process by itself."""
    losses = []
    for step in steps:
        now, later = fields(mesh, step)
        loss = (model(now) - later).square().sum() / later.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        share = loss.detach()
        if mesh is not None:
            share = share.to_local()  # type: ignore[attr-defined]
            dist.all_reduce(share)
        losses.append(float(share))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    steps = parser.parse_args().steps
    natten.use_fused_na()
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    rows = max(n for n in range(1, ranks + 1) if ranks % n == 0 and n * n <= ranks)
    mesh = init_device_mesh("cpu", (rows, ranks // rows), mesh_dim_names=("latitude", "longitude"))
    losses = train(mesh, *make(mesh), range(steps))
    traffic = natten.distributed.halo_bytes(
        (LATITUDES, LONGITUDES), tuple(mesh.shape), part=mesh.get_coordinate() or (),
        token_bytes=2 * 2 * DIM * 8, **WINDOW,
    )  # fmt: skip
    print(f"rank {dist.get_rank()} at {mesh.get_coordinate()}: {traffic} in each layer", flush=True)
    if dist.get_rank() == 0:
        alone = train(None, *make(None), range(steps))
        print("step  loss      of one process")
        for step in range(0, steps, max(1, steps // 10)):
            print(f"{step:4}  {losses[step]:.6f}  {alone[step]:.6f}")
        assert max(abs(a - b) for a, b in zip(losses, alone, strict=True)) < 1e-9
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
