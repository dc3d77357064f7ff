"""Times neighborhood attention on the CPU beside other ways to compute it, in one run.

    python benchmarks/cpu.py [--cases NAME ...] [--dtype float32] [--repeats 7] [--json FILE]

Prints useful GFLOP/s, and in brackets the ratio to a float32 matrix product of 2048^3 on the same
threads, timed in turn with each row: machines are noisy, ratios less so. Useful means
4 * batch * heads * tokens * window * head_dim for the forward pass and 3.5 times that for forward
and backward; work that a mask throws away does not count. Causal windows are full but at the start.

    ours          the backend that natten chooses
    naive         natten's readable reference backend
    gather        keys gathered into [.., tokens, window, head_dim], einsum, softmax, einsum
    sdpa          full attention by scaled_dot_product_attention, counted by the window
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import natten.functional as F
from natten import _core


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    heads: int
    grid: tuple[int, ...]
    head_dim: int
    kernel: tuple[int, ...]
    dilation: int = 1
    is_causal: bool = False

    @property
    def flops(self) -> float:
        pairs = 1
        for length, k in zip(self.grid, self.kernel, strict=True):
            missing = k * (k - 1) // 2 if self.is_causal else 0  # at the start of the axis
            pairs *= length * k - missing
        return 4 * self.batch * self.heads * pairs * self.head_dim


CASES = [
    Case("1d_8k_w127", 1, 8, (8192,), 64, (127,)),
    Case("1d_8k_w127_causal", 1, 8, (8192,), 64, (127,), is_causal=True),
    Case("2d_nat56_k7", 4, 2, (56, 56), 32, (7, 7)),
    Case("2d_64_k7", 1, 8, (64, 64), 64, (7, 7)),
    Case("2d_128_k13", 1, 4, (128, 128), 64, (13, 13)),
    Case("2d_128_k13d4", 1, 4, (128, 128), 64, (13, 13), dilation=4),
    Case("3d_16_k577", 1, 4, (16, 32, 32), 64, (5, 7, 7)),
]

Tensors = tuple[Tensor, Tensor, Tensor]


def neighborhood(case: Case, backend: str | None) -> Callable[..., Tensor]:
    function = (F.na1d, F.na2d, F.na3d)[len(case.grid) - 1]
    return lambda q, k, v: function(
        q, k, v, case.kernel, case.dilation, case.is_causal, backend=backend
    )


def gather(case: Case) -> Callable[..., Tensor] | None:
    """What one writes without a kernel. Its memory grows with tokens * window."""
    pairs = math.prod(case.grid) * math.prod(case.kernel)
    if case.is_causal or 8 * case.batch * case.heads * pairs * case.head_dim > 4e9:
        return None
    index = torch.zeros(1, 1, dtype=torch.long)
    for length, k in zip(case.grid, case.kernel, strict=True):
        keys = torch.tensor(
            [_core.window(False, i, length, k, 1, case.dilation) for i in range(length)]
        )
        index = index[:, None, :, None] * length + keys[None, :, None, :]
        index = index.reshape(index.shape[0] * length, -1)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.flatten(1, -3) for x in (q, k, v))
        scores = torch.einsum("bthd,btkhd->bhtk", q, k[:, index]) * case.head_dim**-0.5
        return torch.einsum("bhtk,btkhd->bthd", scores.softmax(-1), v[:, index])

    return run


def sdpa(case: Case) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(
            *heads_first, is_causal=case.is_causal
        )

    return run


def with_backward(run: Callable[..., Tensor]) -> Callable[..., object]:
    return lambda *inputs: torch.autograd.grad(run(*inputs).sum(), inputs)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", nargs="*", default=[c.name for c in CASES])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=7, help="the median is reported")
    parser.add_argument("--others", action="store_true", help="also naive, gather and sdpa: slow")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    print(
        f"{torch.get_num_threads()} threads of torch, {_core.num_threads()} of natten; "
        f"torch {torch.__version__}, {args.dtype}, median of {args.repeats}"
    )
    square = torch.randn(2048, 2048)
    rows = []
    for case in (c for c in CASES if c.name in args.cases):
        shape = (case.batch, *case.grid, case.heads, case.head_dim)
        inputs = [
            torch.randn(shape).to(getattr(torch, args.dtype)).requires_grad_() for _ in range(3)
        ]
        ways: dict[str, Callable[..., Tensor] | None] = {"ours": neighborhood(case, None)}
        if args.others:
            ways |= {
                "naive": neighborhood(case, "naive"),
                "gather": gather(case),
                "sdpa": sdpa(case),
            }
        for way, run in ways.items():
            if run is None:
                continue
            for name, factor, timed in (
                ("forward", 1.0, run),
                ("forward+backward", 3.5, with_backward(run)),
            ):
                repeats = args.repeats if way == "ours" else min(args.repeats, 3)
                timed(*inputs)
                ratios, rates = [], []
                for _ in range(repeats):
                    product = 2 * 2048**3 / seconds(lambda: square @ square)
                    rate = factor * case.flops / seconds(lambda: timed(*inputs))  # noqa: B023
                    rates.append(rate / 1e9)
                    ratios.append(rate / product)
                row = {
                    "case": case.name,
                    "way": way,
                    "pass": name,
                    "dtype": args.dtype,
                    "gflops": round(statistics.median(rates), 2),
                    "ratio": round(statistics.median(ratios), 3),
                }
                rows.append(row)
                print(
                    f"{case.name:18} {way:7} {name:17} {row['gflops']:8.1f} GFLOP/s "
                    f"({row['ratio']:.3f})",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
