"""Training on two processes gives what one process gives on the whole batch."""

from __future__ import annotations

import dataclasses
import traceback
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402
from cases import GRADIENT_BOUND  # noqa: E402
from ranks import environment_of_ranks, run_ranks  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import natten  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed"),
    pytest.mark.skipif(
        dist.is_available() and not dist.is_gloo_available(), reason="this PyTorch has no gloo"
    ),
]

PROCESSES, LIMIT_S = 2, 120
STEPS, BATCH, GRID, DIM = 4, 4, (6, 5), 8
WAYS = ["ddp", "ddp accumulating", "fsdp", "fsdp in bfloat16"]


class Block(nn.Module):
    def __init__(self, **neighborhood: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.attention = natten.NeighborhoodAttention2D(DIM, 2, rel_pos_bias=True, **neighborhood)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))


def make_model() -> nn.Module:
    torch.manual_seed(0)
    first = Block(kernel_size=3, is_causal=(True, False))
    second = Block(kernel_size=(2, 3), dilation=(3, 1), stride=(2, 1))
    return nn.Sequential(first, second, nn.Linear(DIM, DIM)).double()


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(2, BATCH, *GRID, DIM, generator=generator, dtype=torch.float64)
    return x[0], x[1]


def train(model: nn.Module, rank: int = 0, processes: int = 1, parts: int = 1) -> list[Tensor]:
    """The losses of a few steps on this rank's share of the batches, each in so many parts. The
    shares are equal, so the mean of the means over them is the mean over the batch."""
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
    losses = []
    for step in range(STEPS):
        x, target = (t[rank::processes] for t in batch_of(step))
        optimizer.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for i in range(parts):
            share = (model(x[i::parts]) - target[i::parts]).square().mean() / parts
            if hasattr(model, "no_sync") and i + 1 < parts:
                with model.no_sync():
                    share.backward()
            else:
                share.backward()
            loss += share.detach()
        optimizer.step()
        losses.append(loss)
    return losses


def distributed(way: str, rank: int) -> dict[str, Tensor]:
    """Losses, the mean over ranks, and the parameters that they lead to."""
    model = make_model()
    if way.startswith("ddp"):
        wrapped = nn.parallel.DistributedDataParallel(model)
        losses = train(wrapped, rank, PROCESSES, parts=2 if "accumulating" in way else 1)
        parameters = dict(model.named_parameters())
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh("cpu", (PROCESSES,))
        inner = outer = MixedPrecisionPolicy()
        if "bfloat16" in way:
            inner = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
            outer = dataclasses.replace(inner, output_dtype=torch.float64)
        for block in model[:2]:
            fully_shard(block, mesh=mesh, mp_policy=inner)
        fully_shard(model, mesh=mesh, mp_policy=outer)
        losses = train(model, rank, PROCESSES)
        parameters = {n: p.full_tensor() for n, p in model.named_parameters()}
    for loss in losses:
        dist.all_reduce(loss)
        loss /= PROCESSES
    return {"losses": torch.stack(losses), **{n: p.detach() for n, p in parameters.items()}}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES
    )
    results: dict[str, Any] = {}
    for fused in (False, True):
        natten.use_fused_na(fused)
        for way in WAYS:
            try:
                results[f"{way}, {fused}"] = distributed(way, rank)
            except Exception:  # for the test that is about this way
                results[f"{way}, {fused}"] = traceback.format_exc()
    torch.save(results, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, by the way to train. One start of processes serves all tests."""
    folder: Path = tmp_path_factory.mktemp("distributed")
    with environment_of_ranks():
        run_ranks(work, [str(folder)], PROCESSES, LIMIT_S)
    return [torch.load(folder / str(rank)) for rank in range(PROCESSES)]


@pytest.mark.long
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_like_one(way, fused, results):
    found = [of_rank[f"{way}, {fused}"] for of_rank in results]
    for x in found:
        assert isinstance(x, dict), x  # else what was raised
    natten.use_fused_na(fused)
    try:
        model = make_model()
        losses = torch.stack(train(model))
    finally:
        natten.use_fused_na(False)
    start = make_model().state_dict()
    want = {n: p - start[n] for n, p in model.state_dict().items()}  # what the steps changed
    assert all(change.norm() > 0.01 for change in want.values())
    bound = GRADIENT_BOUND["bfloat16"] if "bfloat16" in way else 1e-10
    for rank, x in enumerate(found):
        got = {n: p - start[n] for n, p in x.items() if n != "losses"}
        assert got.keys() == want.keys()
        pairs = [("losses", x["losses"], losses), *((n, got[n], want[n]) for n in want)]
        for name, value, expected in pairs:
            error = float((value - expected).norm() / expected.norm())
            assert error <= bound, f"rank {rank}, {name}: error {error:.3g}"


def test_sharded_results_are_those_of_every_rank(results):
    """Ranks hold the same parameters in the end, to the bit."""
    first, second = results
    for way, found in first.items():
        assert isinstance(found, dict), found
        for name, value in found.items():
            assert torch.equal(value, second[way][name]), f"{way}: {name}"
