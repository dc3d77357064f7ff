"""One grid over processes of one core each, beside one process with as many threads.

    python benchmarks/mesh.py [--processes 2] [--rounds 5] [--json mesh.json]

The grid of 1024 x 1024 tokens, 4 heads of 32, windows of 13 x 13, is cut into rows of tokens. In
turns are timed

    whole      one process with as many threads as there are processes
    mesh       every process its part, with the halos that come from the others
    compute    a process's part alone, of keys and values that hold the halo already
    exchange   the halos alone

of a forward call, and with --backward of a forward and a backward call. Of processes the slowest
counts. `speed` is whole / mesh. With --link nothing arrives sooner than a link of so many bytes per
second, and of each direction, would bring it; `hidden` is the share of the exchange that mesh does
not take beyond compute.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import processor
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import natten

HEADS, HEAD_DIM = 4, 32


def timed(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], backward: bool, is_rank: bool
) -> float:
    """Seconds of a call; ranks begin together."""
    inputs = [x.detach().requires_grad_(backward) for x in inputs]
    if is_rank:
        dist.barrier()
    start = time.perf_counter()
    out = function(*inputs)
    if backward:
        torch.autograd.grad(out, inputs, out.detach())
    return time.perf_counter() - start


def drawn(rows: int, size: int, seed: int = 0) -> list[Tensor]:
    """Query, key and value."""
    torch.manual_seed(seed)
    return [torch.randn(1, rows, size, HEADS, HEAD_DIM) for _ in range(3)]


def whole(size: int, window: int, threads: int, backward: bool, pipe: Connection) -> None:
    """One process, which times a call whenever it is told to."""
    torch.set_num_threads(threads)
    inputs = drawn(size, size)
    while pipe.recv():
        pipe.send(timed(lambda q, k, v: natten.na2d(q, k, v, window), inputs, backward, False))


class Later:
    """Waits until a time."""

    def __init__(self, end: float) -> None:
        self.end = end

    def wait(self) -> None:
        time.sleep(max(0.0, self.end - time.perf_counter()))


def slow_down(link: float) -> None:
    """Puts a link of so many bytes per second between processes."""
    post = dist.batch_isend_irecv

    def posted(operations: list[dist.P2POp]) -> list[Any]:
        count = sum(op.tensor.nbytes for op in operations if op.op is dist.irecv)
        end = time.perf_counter() + count / link
        return [*post(operations), Later(end)]

    dist.batch_isend_irecv = posted


def join(rank: int, count: int, folder: str) -> DeviceMesh:
    """Makes this process one of `count` on a mesh, with a core of its own."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count
    )
    return init_device_mesh("cpu", (count,))


def of_halo(x: DTensor, window: int) -> DTensor:
    """The rows at both ends of a part, which others need. They stand for the part: all of it would
    be copied to where the halo is put beside it."""
    rows = x.to_local()
    ends = rows[:, [*range(window // 2), *range(rows.shape[1] - window // 2, rows.shape[1])]]
    return DTensor.from_local(ends, x.device_mesh, [Shard(1)], run_check=False)


def part(
    rank: int,
    count: int,
    folder: str,
    size: int,
    window: int,
    backward: bool,
    link: float | None,
    pipe: Connection,
) -> None:
    """One of the ranks, likewise, by what it is told."""
    if link:
        slow_down(link)
    mesh = join(rank, count, folder)
    rows = size // count
    held = drawn(rows, size, rank)
    inputs = [DTensor.from_local(x, mesh, [Shard(1)], run_check=False) for x in held]
    (begin, end), _ = natten.key_range((rank * rows, 0), (rows, size), (size, size), window)
    around = [held[0], *(torch.randn(1, end - begin, size, HEADS, HEAD_DIM) for _ in range(2))]

    def compute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return natten.na2d(q, k, v, window, query_offset=(rank * rows, 0), key_offset=(begin, 0),
                           grid_size=(size, size))  # fmt: skip

    ends: list[Tensor] = [of_halo(x, window) for x in inputs[1:]]

    def exchange(*tensors: Tensor) -> Tensor:
        found, _ = natten.distributed.halo_exchange(tensors, (window, 1), boundary="cut")
        return torch.cat([x.flatten() for x in found])

    ways = {
        "mesh": (lambda q, k, v: natten.na2d(q, k, v, window), inputs),
        "compute": (compute, around),
        "exchange": (exchange, ends),
    }
    while name := pipe.recv():
        pipe.send(timed(*ways[name], backward, True))
    dist.destroy_process_group()


@contextmanager
def running(jobs: list[tuple[Callable[..., None], tuple]]) -> Iterator[list[Connection]]:
    """A process for each job, and the pipe to it."""
    context = multiprocessing.get_context("forkserver")  # imports this file once for all
    pipes, processes = [], []
    for function, args in jobs:
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=function, args=(*args, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        yield pipes
    finally:
        for pipe in pipes:
            pipe.send(None)
        for process in processes:
            process.join()


def measure(
    count: int, size: int, window: int, rounds: int, backward: bool, link: float | None
) -> dict[str, float]:
    """Medians of seconds."""
    with tempfile.TemporaryDirectory() as folder:
        jobs: list[tuple[Callable[..., None], tuple]] = [(whole, (size, window, count, backward))]
        jobs += [(part, (r, count, folder, size, window, backward, link)) for r in range(count)]
        found: dict[str, list[float]] = {}
        with running(jobs) as (one, *ranks):
            for _ in range(rounds + 1):
                one.send("whole")
                found.setdefault("whole", []).append(one.recv())
                for name in ("mesh", "compute", "exchange"):
                    for rank in ranks:
                        rank.send(name)
                    found.setdefault(name, []).append(max(rank.recv() for rank in ranks))
    return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--window", type=int, default=13)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--link", type=float, help="bytes per second")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.size % args.processes:
        parser.error("--size must be a multiple of --processes")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    times = measure(args.processes, args.size, args.window, args.rounds, args.backward, args.link)
    speed = times["whole"] / times["mesh"]
    hidden = (times["compute"] + times["exchange"] - times["mesh"]) / times["exchange"]
    for name, seconds in times.items():
        print(f"{name:9} {seconds * 1e3:9.1f} ms")
    print(f"speed     {speed:9.3f}")
    if args.link:
        print(f"hidden    {hidden:9.3f}")
    if args.json:
        shown = {"processor": processor(), "torch": torch.__version__, **vars(args), **times}
        shown = {name: value for name, value in shown.items() if name != "json"}
        args.json.write_text(json.dumps(shown, indent=2) + "\n")


if __name__ == "__main__":
    main()
