"""What it costs that processes exchange halos: latency and bandwidth, and what they predict.

    python benchmarks/link.py [--processes 2] [--rounds 9] [--json link.json]

Messages go between neighbors in a ring of gloo's processes, of one core each, both ways at once, so
that each process receives 1 KiB to 8 MiB. `latency + bytes / bandwidth` is fitted to the medians of
their times. In turn with them are timed halos, by `halo_exchange`, and forward calls on a grid that
is cut into rows, as benchmarks/mesh.py has them. Beside their medians are shown

    halo    latency + halo_bytes / bandwidth
    call    what natten.simulate says for the mesh, with the two as `latency` and `link`
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from cases import processor
from mesh import HEAD_DIM, HEADS, join, of_halo, running, timed
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

import natten
from natten import _core
from natten._calibration import fit

SIZES = tuple(2**n for n in range(10, 24))  # bytes of messages
GRIDS = ((256, 3), (256, 13), (384, 7), (512, 25))  # tokens per axis, and the window


def rank_of(rank: int, count: int, folder: str, pipe: Connection) -> None:
    """One of the processes, which does what it is told and says the seconds."""
    mesh = join(rank, count, folder)
    neighbors = {(rank - 1) % count, (rank + 1) % count}

    def message(size: int) -> float:
        operations = [
            dist.P2POp(way, torch.zeros(size // len(neighbors), dtype=torch.uint8), neighbor)
            for way in (dist.irecv, dist.isend)
            for neighbor in neighbors
        ]
        dist.barrier()
        start = time.perf_counter()
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        return time.perf_counter() - start

    def tensors(size: int) -> list[Tensor]:
        torch.manual_seed(rank)
        held = [torch.randn(1, size // count, size, HEADS, HEAD_DIM) for _ in range(3)]
        return [DTensor.from_local(x, mesh, [Shard(1)], run_check=False) for x in held]

    def halo(size: int, window: int) -> float:
        def exchange(*ends: Tensor) -> Tensor:
            return natten.distributed.halo_exchange(ends, (window, 1), boundary="cut")[0][0]

        return timed(exchange, [of_halo(x, window) for x in tensors(size)[1:]], False, True)

    def call(size: int, window: int) -> float:
        return timed(lambda q, k, v: natten.na2d(q, k, v, window), tensors(size), False, True)

    ways = {"message": message, "halo": halo, "call": call}
    while told := pipe.recv():
        name, *numbers = told
        pipe.send(ways[name](*numbers))
    dist.destroy_process_group()


def measure(count: int, rounds: int, told: list[tuple[Any, ...]]) -> dict[tuple[Any, ...], float]:
    """Medians of seconds, of the slowest process each time."""
    with tempfile.TemporaryDirectory() as folder:
        jobs: list[tuple[Callable[..., None], tuple]] = [
            (rank_of, (rank, count, folder)) for rank in range(count)
        ]
        found: dict[tuple[Any, ...], list[float]] = {}
        with running(jobs) as ranks:
            for _ in range(rounds + 1):
                for what in told:
                    for rank in ranks:
                        rank.send(what)
                    found.setdefault(what, []).append(max(rank.recv() for rank in ranks))
    return {what: statistics.median(seconds[1:]) for what, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tiny", action="store_true", help="to see that it runs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    count, grids = args.processes, ((32, 5),) if args.tiny else GRIDS
    sizes = SIZES[::4] if args.tiny else SIZES
    told = [("message", size) for size in sizes]
    told += [(way, *grid) for grid in grids for way in ("halo", "call")]
    seconds = measure(count, args.rounds, told)

    rows = np.array([[1.0, size] for size in sizes])
    latency, of_byte = fit(rows, np.array([seconds["message", size] for size in sizes]))
    shown: list[dict[str, Any]] = []

    def show(name: str, size: int, window: int, predicted: float) -> None:
        measured = seconds[name, size, window]
        shown.append({"what": name, "size": size, "window": window,
                      "measured": measured, "predicted": predicted})  # fmt: skip
        print(f"{name}  {size}² window {window:2}²  measured {measured * 1e3:8.3f} ms  "
              f"predicted {predicted * 1e3:8.3f} ms  {predicted / measured:5.2f}")  # fmt: skip

    print(f"latency {latency * 1e6:.0f} us, bandwidth {1e-9 / of_byte:.2f} GB/s")
    _core.set_num_threads(1)  # of each process
    for size, window in grids:
        halo = max(
            natten.distributed.halo_bytes(
                (size, size), (count, 1), window, part=(rank, 0), boundary="cut",
                token_bytes=HEADS * 2 * HEAD_DIM * 4,
            ).received
            for rank in range(count)
        )  # fmt: skip
        show("halo", size, window, latency + halo * of_byte)
    for size, window in grids:
        simulated = natten.simulate(
            (size, size), window, heads=HEADS, head_dim=HEAD_DIM, mesh=(count, 1),
            link=1 / of_byte, latency=latency,
        )  # fmt: skip
        show("call", size, window, simulated.seconds)
    if args.json:
        found = {"processor": processor(), "torch": torch.__version__, "processes": count,
                 "latency": latency, "bandwidth": 1 / of_byte, "rows": shown}  # fmt: skip
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
