"""What it costs that processes exchange halos, and what that predicts.

    python benchmarks/link.py [--processes 2] [--rounds 9] [--json link.json]

Messages go between neighbors in a ring of gloo's processes, of one core each, both ways at once, so
that each process receives 1 KiB to 8 MiB. In turn with them are timed halos, by `halo_exchange`,
and forward calls on a grid that is cut into rows, as benchmarks/mesh.py has them. `latency + bytes
/ bandwidth` is fitted to the medians of messages, and to those of halos, which are put together and
taken apart besides. Beside the medians are shown

    halo    what the fit to halos says
    call    that, and the time of one process with as many threads
    simulate    of the same calls: what natten.simulate says, with `latency` and `link` of the fit
"""

from __future__ import annotations

import argparse
import functools
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
from mesh import HEAD_DIM, HEADS, drawn, join, of_halo, running, timed
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

import natten
from natten import _core
from natten._calibration import fit

SIZES = tuple(2**n for n in range(10, 24))  # bytes of messages
GRIDS = ((256, 3), (256, 13), (384, 7), (512, 13))  # tokens per axis, and the window


def attend(window: int, *x: Tensor) -> Tensor:
    return natten.na2d(*x, kernel_size=window)


def one_process(threads: int, pipe: Connection) -> None:
    """The undivided call, in one process."""
    torch.set_num_threads(threads)
    while told := pipe.recv():
        size, window = told
        inputs = drawn(size, size)
        pipe.send(timed(functools.partial(attend, window), inputs, False, False))


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
        held = drawn(size // count, size, rank)
        return [DTensor.from_local(x, mesh, [Shard(1)], run_check=False) for x in held]

    def halo(size: int, window: int) -> float:
        def exchange(*ends: Tensor) -> Tensor:
            return natten.distributed.halo_exchange(ends, (window, 1), boundary="cut")[0][0]

        return timed(exchange, [of_halo(x, window) for x in tensors(size)[1:]], False, True)

    def call(size: int, window: int) -> float:
        return timed(functools.partial(attend, window), tensors(size), False, True)

    ways = {"message": message, "halo": halo, "call": call}
    while told := pipe.recv():
        name, *numbers = told
        pipe.send(ways[name](*numbers))
    dist.destroy_process_group()


def measure(count: int, rounds: int, told: list[tuple[Any, ...]]) -> dict[tuple[Any, ...], float]:
    """Medians of seconds, of the slowest process each time."""
    with tempfile.TemporaryDirectory() as folder:
        jobs: list[tuple[Callable[..., None], tuple]] = [(one_process, (count,))]
        jobs += [(rank_of, (rank, count, folder)) for rank in range(count)]
        found: dict[tuple[Any, ...], list[float]] = {}
        with running(jobs) as (one, *ranks):
            for _ in range(rounds + 1):
                for what in told:
                    asked = [one] if what[0] == "whole" else ranks
                    for pipe in asked:
                        pipe.send(what[1:] if what[0] == "whole" else what)
                    found.setdefault(what, []).append(max(pipe.recv() for pipe in asked))
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
    told += [(way, *grid) for grid in grids for way in ("halo", "call", "whole")]
    seconds = measure(count, args.rounds, told)
    halos = [
        max(
            natten.distributed.halo_bytes(
                (size, size), (count, 1), window, part=(rank, 0), boundary="cut",
                token_bytes=HEADS * 2 * HEAD_DIM * 4,
            ).received
            for rank in range(count)
        )
        for size, window in grids
    ]  # fmt: skip
    fits: dict[str, tuple[float, float]] = {}
    for name, received, keys in (
        ("message", sizes, [("message", size) for size in sizes]),
        ("halo", halos, [("halo", *grid) for grid in grids]),
    ):
        rows = np.array([[1.0, n] for n in received])
        latency, of_byte = fit(rows, np.array([seconds[key] for key in keys]))
        fits[name] = float(latency), float(of_byte)
        bandwidth = f"{1e-9 / of_byte:.2f} GB/s" if of_byte else "not found"
        print(f"{name:8}  latency {latency * 1e3:.3f} ms, bandwidth {bandwidth}")

    latency, of_byte = fits["halo"]
    _core.set_num_threads(1)  # of each process that is simulated
    shown: list[dict[str, Any]] = []
    for (size, window), halo in zip(grids, halos, strict=True):
        exchange = latency + halo * of_byte
        call = seconds["call", size, window]
        found = [
            ("halo", seconds["halo", size, window], exchange),
            ("call", call, seconds["whole", size, window] + exchange),
        ]
        if not args.tiny:  # its prices alone take six seconds
            simulated = natten.simulate(
                (size, size), window, heads=HEADS, head_dim=HEAD_DIM, mesh=(count, 1),
                link=1 / of_byte if of_byte else None, latency=latency,
            )  # fmt: skip
            found.append(("simulate", call, simulated.seconds))
        for name, measured, predicted in found:
            shown.append({"what": name, "size": size, "window": window,
                          "measured": measured, "predicted": predicted})  # fmt: skip
            print(f"{name:8}  {size}², window {window:2}²: measured {measured * 1e3:8.2f} ms, "
                  f"predicted {predicted * 1e3:8.2f} ms, {predicted / measured:.2f}")  # fmt: skip
    if args.json:
        figures = {"processor": processor(), "torch": torch.__version__, "processes": count,
                   "latency and seconds per byte": fits, "rows": shown}  # fmt: skip
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
