"""What computing one new token, row or frame against a cache costs on the CPU.

    python benchmarks/stream.py [--dtypes float32 bfloat16] [--repeats 31]

Of a causal stream the newest part of the queries is computed against a cache that holds what its
windows reach, and no more. Each call must read all keys and values of the cache once. Prints how
long it takes, how many bytes of keys and values per second that is, and beside it the bandwidth of
a copy: of as many bytes from one buffer to another, on the same threads, in turn with the calls;
each byte counts as read and as written. The two buffers take the processor's caches from the call.

    1d_token      one token, all 8192 before it
    2d_row        a row of 128, in a window of 64 rows and 3 columns
    3d_frame      a frame of 32x32, in a window of 16 frames and 3x3 places
    3d_frame_k77  the same with 7x7 places, where arithmetic counts as well
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from cases import TOLERANCES, Row, processor, seconds
from torch import Tensor

import natten
import natten.functional as F


@dataclass(frozen=True)
class Stream:
    name: str
    heads: int
    size: tuple[int, ...]  # of a new part, but for the axis of time
    kernel: tuple[int, ...]
    head_dim: int = 64


STREAMS = [
    Stream("1d_token", 16, (), (8192,)),
    Stream("2d_row", 8, (128,), (64, 3)),
    Stream("3d_frame", 4, (32, 32), (16, 3, 3)),
    Stream("3d_frame_k77", 4, (32, 32), (16, 7, 7)),
]
TINY = [
    Stream("1d_token", 2, (), (64,), 16),
    Stream("2d_row", 2, (8,), (4, 3), 16),
    Stream("3d_frame", 2, (6, 6), (3, 3, 3), 16),
]


def prepare(stream: Stream, dtype: str) -> tuple[Callable[..., Tensor], Tensor, Tensor]:
    """The call for the newest part, which takes the name of a backend; keys and values."""
    torch.manual_seed(0)
    now = 2 * stream.kernel[0]  # long enough ago did the stream begin
    rank = len(stream.kernel)
    window = {
        "kernel_size": stream.kernel,
        "is_causal": (True,) + (False,) * (rank - 1),
        "boundary": ("cut",) + ("shift",) * (rank - 1),
    }
    offset, grid = (now, *(0 for _ in stream.size)), (now + 1, *stream.size)
    (begin, end), *_ = natten.key_range(offset, (1, *stream.size), grid, **window)
    heads = (stream.heads, stream.head_dim)
    key, value = torch.randn(2, 1, end - begin, *stream.size, *heads).to(getattr(torch, dtype))
    query = torch.randn(1, 1, *stream.size, *heads).to(key.dtype)
    function = getattr(F, f"na{rank}d")

    def run(backend: str | None = None) -> Tensor:
        return function(
            query, key, value, **window, backend=backend,
            query_offset=offset, key_offset=(begin, *offset[1:]), grid_size=grid,
        )  # fmt: skip

    return run, key, value


def measure(stream: Stream, dtype: str, repeats: int) -> Row:
    run, key, value = prepare(stream, dtype)
    reference = run("naive").double()
    difference = float((run().double() - reference).norm() / reference.norm())
    if not difference < TOLERANCES[dtype]:
        raise AssertionError(f"{stream.name}: differs from the naive backend by {difference:.1e}")
    size = key.nbytes + value.nbytes
    source, target = torch.zeros(2, size, dtype=torch.uint8)
    turns = [(seconds(lambda: target.copy_(source)), seconds(run)) for _ in range(repeats + 1)][1:]
    copy = [2 * size / c for c, _ in turns]
    read = [size / r for _, r in turns]
    flops = 4 * math.prod(stream.kernel) * math.prod(stream.size) * stream.heads * stream.head_dim
    return {
        "stream": stream.name,
        "dtype": dtype,
        "milliseconds": round(1e3 * statistics.median(r for _, r in turns), 4),
        "mebibytes": round(size / 2**20, 2),
        "gbytes_per_second": round(statistics.median(read) / 1e9, 3),
        "gbytes_per_second_of_copy": round(statistics.median(copy) / 1e9, 3),
        "ratio": round(statistics.median(r / c for r, c in zip(read, copy, strict=True)), 4),
        "gflops": round(flops * statistics.median(read) / size / 1e9, 2),
    }


def show(row: Row) -> None:
    print(
        f"{row['stream']:13} {row['dtype']:8} {row['mebibytes']:7.1f} MiB"
        f" {row['milliseconds']:9.3f} ms {row['gbytes_per_second']:8.2f} GB/s,"
        f" a copy {row['gbytes_per_second_of_copy']:7.2f} GB/s ({row['ratio']:.2f})"
        f" {row['gflops']:8.1f} GFLOP/s",
        flush=True,
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    dtypes = ["float32", "bfloat16", "float16", "float64"]
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=["float32"], metavar="DTYPE")
    parser.add_argument("--repeats", type=int, default=31, help="the median is reported")
    parser.add_argument("--tiny", action="store_true", help="problems that show nothing but bugs")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    rows = []
    for stream in TINY if args.tiny else STREAMS:
        for dtype in args.dtypes:
            rows.append(measure(stream, dtype, args.repeats))
            show(rows[-1])
    if args.json:
        machine = {"cpu": processor(), "threads": torch.get_num_threads()}
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
