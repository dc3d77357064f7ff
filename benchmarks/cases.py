"""What the benchmarks time: cases, their tensors and passes, and our attention.

Nothing here is imported from natten but inside `ours`, so that compare.py, which chooses builds for
its workers, needs none for itself. The definition of the neighborhood is written out once more, for
other ways to compute it; they are checked against ours before they are timed.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Attention = Callable[..., Tensor]  # query, key, value[, bias] -> output, all heads-last

PASSES = {"forward": 1.0, "forward+backward": 3.5}  # and what each counts of `Case.flops`


def window(
    token: Tensor, length: int, kernel: int, stride: int, dilation: int, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Begin and end of what tokens of an axis see, as positions in their dilation groups."""
    position = token // dilation
    size = (length - token % dilation + dilation - 1) // dilation
    first = position // stride * stride
    if is_causal:
        leader = torch.minimum(first + stride - 1, size - 1)
        return (leader - kernel + 1).clamp(min=0), position + 1
    leader = torch.minimum(first + stride // 2, size - 1)
    begin = torch.minimum((leader - kernel // 2).clamp(min=0), size - kernel)
    return begin, begin + kernel


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    heads: int
    grid: tuple[int, ...]
    head_dim: int
    kernel: tuple[int, ...]
    stride: int = 1
    dilation: int = 1
    is_causal: bool = False
    has_bias: bool = False

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def flops(self) -> float:
        """Of the forward pass, for the pairs of tokens that are in a neighborhood."""
        pairs = 1
        for axis, length in enumerate(self.grid):
            begin, end = self.window(axis, torch.arange(length))
            pairs *= int((end - begin).sum())
        return 4 * self.batch * self.heads * pairs * self.head_dim

    def window(self, axis: int, token: Tensor) -> tuple[Tensor, Tensor]:
        return window(
            token, self.grid[axis], self.kernel[axis], self.stride, self.dilation, self.is_causal
        )


CASES = [
    Case("1d_8k_w127", 1, 8, (8192,), 64, (127,)),
    Case("1d_8k_w127_causal", 1, 8, (8192,), 64, (127,), is_causal=True),
    Case("2d_nat56_k7", 4, 2, (56, 56), 32, (7, 7)),
    Case("2d_64_k7", 1, 8, (64, 64), 64, (7, 7)),
    Case("2d_64_k7s2", 1, 8, (64, 64), 64, (7, 7), stride=2),
    Case("2d_64_k7s7", 1, 8, (64, 64), 64, (7, 7), stride=7),
    Case("2d_64_k7d4", 1, 8, (64, 64), 64, (7, 7), dilation=4),
    Case("2d_64_k7_bias", 1, 8, (64, 64), 64, (7, 7), has_bias=True),
    Case("2d_128_k13", 1, 4, (128, 128), 64, (13, 13)),
    Case("2d_128_k13d4", 1, 4, (128, 128), 64, (13, 13), dilation=4),
    Case("3d_16_k577", 1, 4, (16, 32, 32), 64, (5, 7, 7)),
]


def tensors_of(case: Case, dtype: str) -> tuple[list[Tensor], Tensor]:
    """Query, key, value and, where the case has it, the relative position bias; and a gradient of
    the output. The same numbers every time."""
    torch.manual_seed(0)
    shapes = [(case.batch, *case.grid, case.heads, case.head_dim)] * 4
    if case.has_bias:
        shapes.insert(3, (case.heads, *(2 * k - 1 for k in case.kernel)))
    *inputs, gradient = (torch.randn(shape, dtype=getattr(torch, dtype)) for shape in shapes)
    return [x.requires_grad_() for x in inputs], gradient


def ours(case: Case, backend: str | None = None) -> Attention:
    import natten.functional as F

    function = getattr(F, f"na{len(case.grid)}d")

    def run(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        return function(
            query, key, value, case.kernel, case.dilation, case.is_causal, bias,
            stride=case.stride, backend=backend,
        )  # fmt: skip

    return run


def call_of(
    run: Attention, inputs: Sequence[Tensor], gradient: Tensor, pass_name: str
) -> Callable[[], tuple[Tensor, ...]]:
    """A pass as a function without arguments that returns its results."""
    if pass_name == "forward":
        return lambda: (run(*inputs),)
    return lambda: torch.autograd.grad(run(*inputs), inputs, gradient)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [case.name for case in CASES]
    dtypes = ["float32", "bfloat16", "float16", "float64"]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="CASE")
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=["float32"], metavar="DTYPE")
    parser.add_argument("--repeats", type=int, default=7, help="the median is reported")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    return parser


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)
