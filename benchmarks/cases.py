"""What the benchmarks time: cases and passes, and what all of them report.

Neither PyTorch nor JAX nor natten is imported here: a benchmark of one framework runs without the
other, whose threads would disturb it. The definition of the neighborhood is written out once more,
for other ways to compute it, on the integer arrays of any framework; those ways are checked against
ours before they are timed.
"""

from __future__ import annotations

import argparse
import functools
import math
import operator
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = Any  # of numpy, PyTorch or JAX
Row = dict[str, Any]

PASSES = {"forward": 1.0, "forward+backward": 3.5}  # and what each counts of `Case.flops`

MAX_BYTES = 4e9  # of what a way needs only because it is not written for neighborhoods

# By how much a way may differ from ours, as norm of the difference to norm of the result.
TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "tf32": 1e-2, "float16": 1e-2, "bfloat16": 5e-2}


def window(
    token: Array,
    length: int,
    kernel: int,
    stride: int,
    dilation: int,
    is_causal: bool,
    is_cut: bool = False,
) -> tuple[Array, Array]:
    """Begin and end of what tokens of an axis see, as positions in their dilation groups."""
    position = token // dilation
    size = (length - token % dilation + dilation - 1) // dilation
    first = position // stride * stride
    if is_causal:
        leader = (first + stride - 1).clip(max=size - 1)
        return (leader - kernel + 1).clip(min=0), position + 1
    begin = (first + stride // 2).clip(max=size - 1) - kernel // 2
    if is_cut:
        return begin.clip(min=0), (begin + kernel).clip(max=size)
    begin = begin.clip(min=0).clip(max=size - kernel)
    return begin, begin + kernel


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    heads: int
    grid: tuple[int, ...]
    head_dim: int
    kernel: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int = 1
    is_causal: bool = False
    has_bias: bool = False
    boundary: str = "shift"  # or "cut"

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of query, key, value and, where the case has it, the relative position bias; and of a
        gradient of the output."""
        heads_last = (self.batch, *self.grid, self.heads, self.head_dim)
        bias = [(self.heads, *(2 * k - 1 for k in self.kernel))] if self.has_bias else []
        return [heads_last] * 3 + bias + [heads_last]

    @property
    def flops(self) -> float:
        """Of the forward pass, for the pairs of tokens that are in a neighborhood."""
        pairs = 1
        for axis, length in enumerate(self.grid):
            begin, end = self.window(axis, np.arange(length))
            pairs *= int((end - begin).sum())
        return 4 * self.batch * self.heads * pairs * self.head_dim

    def window(self, axis: int, token: Array) -> tuple[Array, Array]:
        stride = self.stride if isinstance(self.stride, int) else self.stride[axis]
        return window(
            token, self.grid[axis], self.kernel[axis], stride, self.dilation, self.is_causal,
            self.boundary == "cut",
        )  # fmt: skip


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

# Layers of published models, with the batches that these run in.
MODELS = [
    # DiNAT-Mini, a training step on 224^2 images: its four stages, and the dilations of each.
    Case("dinat_56", 8, 2, (56, 56), 32, (7, 7), has_bias=True),
    Case("dinat_56d8", 8, 2, (56, 56), 32, (7, 7), dilation=8, has_bias=True),
    Case("dinat_28", 8, 4, (28, 28), 32, (7, 7), has_bias=True),
    Case("dinat_28d4", 8, 4, (28, 28), 32, (7, 7), dilation=4, has_bias=True),
    Case("dinat_14", 8, 8, (14, 14), 32, (7, 7), has_bias=True),
    Case("dinat_14d2", 8, 8, (14, 14), 32, (7, 7), dilation=2, has_bias=True),
    Case("dinat_7", 8, 16, (7, 7), 32, (7, 7), has_bias=True),
    # HDiT (k-diffusion, oxford_flowers) on 64^2 patches of one image: its two levels of windows.
    Case("hdit_64", 1, 2, (64, 64), 64, (7, 7)),
    Case("hdit_32", 1, 4, (32, 32), 64, (7, 7)),
    # All-In-One on 300 s of music, 100 frames a second, four stems: some of its eleven dilations.
    Case("allin1_d1", 4, 2, (30000,), 12, (5,), has_bias=True),
    Case("allin1_d32", 4, 2, (30000,), 12, (5,), dilation=32, has_bias=True),
    Case("allin1_d1024", 4, 2, (30000,), 12, (5,), dilation=1024, has_bias=True),
    # A tile of a video decoder as LTX-2 has it.
    Case("ltx_377", 1, 16, (4, 16, 16), 64, (3, 7, 7)),
    # AlphaFold 3's atoms: blocks of 32 atoms see 128 around them; five samples.
    Case("af3_atoms", 5, 4, (4608,), 32, (128,), stride=32, boundary="cut"),
]

# Windows of hundreds to thousands of keys, of video, images and text.
LARGE = [
    Case("3d_20_k13", 1, 2, (20, 20, 20), 64, (13, 11, 11)),
    Case("3d_24_k9_d128", 1, 1, (12, 24, 40), 128, (9, 11, 11)),
    Case("3d_24_k12_d128", 1, 2, (12, 24, 32), 128, (12, 7, 7)),
    Case("2d_64_k33_d128", 1, 2, (64, 64), 128, (33, 33)),
    Case("1d_8k_w1023_d128", 1, 2, (8192,), 128, (1023,)),
]
SETS = {"cases": CASES, "models": MODELS, "large": LARGE}


def coordinates(case: Case, *tokens: Array) -> Iterator[tuple[int, list[Array]]]:
    """Each axis, the last one first, and where on it tokens numbered in row-major order are."""
    for axis, length in reversed(list(enumerate(case.grid))):
        yield axis, [token % length for token in tokens]
        tokens = tuple(token // length for token in tokens)


def sees(case: Case, query: Array, key: Array) -> Array:
    """Whether tokens see others."""
    conditions = []
    for axis, (i, j) in coordinates(case, query, key):
        begin, end = case.window(axis, i)
        position = j // case.dilation
        conditions += [position >= begin, position < end]
        if case.dilation > 1:
            conditions.append(i % case.dilation == j % case.dilation)
    return functools.reduce(operator.and_, conditions)


def bias_index(case: Case, query: Array, key: Array) -> Array:
    """The place of pairs of tokens among the biases of a head; any place where they are apart."""
    index, size = 0, 1
    for axis, (i, j) in coordinates(case, query, key):
        reach = case.kernel[axis] - 1
        distance = (j // case.dilation - i // case.dilation).clip(-reach, reach)
        index = index + (distance + reach) * size
        size *= 2 * reach + 1
    return index


class Skip(Exception):
    """A way cannot compute a case."""


class Wrong(Skip):
    """A way computed something else."""


def check(results: Sequence[Array], references: Sequence[Array], dtype: str) -> None:
    """Raises `Wrong`. The arrays are float64, made from results of type `dtype`."""

    def norm(x: Array) -> float:
        return float((x * x).sum()) ** 0.5

    for result, reference in zip(results, references, strict=True):
        if result.shape != reference.shape:
            raise Wrong(f"WRONG: shape {list(result.shape)}; ours is {list(reference.shape)}")
        difference = norm(result - reference) / norm(reference)
        if not difference < TOLERANCES[dtype]:
            raise Wrong(f"WRONG: differs from ours by {difference:.1e}")


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def medians(flops: float, times: Sequence[float], ratios: Sequence[float]) -> Row:
    """What is reported of a way."""
    return {
        "milliseconds": round(1e3 * statistics.median(times), 4),
        "gflops": round(flops / statistics.median(times) / 1e9, 2),
        "ratio": round(statistics.median(ratios), 4),
    }


def show(row: Row) -> None:
    head = f"{row['case']:17} {row['dtype']:8} {row['way']:9}"
    if "skipped" in row:
        print(f"{head} {row.get('pass', ''):16} skipped: {row['skipped']}", flush=True)
    else:
        print(
            f"{head} {row['pass']:16} {row['milliseconds']:9.2f} ms "
            f"{row['gflops']:7.1f} GFLOP/s ({row['ratio']:.3f})",
            flush=True,
        )


def processor() -> str:
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return models[0] if models else platform.machine()


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*SETS, *(case.name for case in CASES + MODELS)]
    dtypes = ["float32", "bfloat16", "float16", "float64"]
    parser.add_argument(
        "--cases", nargs="+", choices=names, default=["cases"], metavar="CASE",
        help="names, or sets: cases (the default) and models, layers of published models",
    )  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=["float32"], metavar="DTYPE")
    parser.add_argument("--repeats", type=int, default=7, help="the median is reported")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    return parser


def case_named(name: str) -> Case:
    return next(case for case in CASES + MODELS if case.name == name)


def cases_named(names: Sequence[str]) -> list[Case]:
    """Of cases and of sets of them."""
    return [case for name in names for case in SETS.get(name) or [case_named(name)]]
