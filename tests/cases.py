"""Random problems that every framework's tests share, and the bounds they must meet."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pytest

SEED = int(os.environ.get("NATTEN_TEST_SEED", "20260731"))
DTYPES = ("float64", "float32", "bfloat16", "float16")

# Bounds on ||result - reference|| / ||reference||, from the same rounded inputs.
FORWARD_BOUND = {"float64": 1e-13, "float32": 1e-6, "float16": 2e-3, "bfloat16": 1e-2}
GRADIENT_BOUND = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 2e-2}

Arrays = dict[str, np.ndarray]


def round_to(dtype: str, x: np.ndarray) -> np.ndarray:
    """float64 values that the element type represents exactly, without needing its numpy type."""
    if dtype == "bfloat16":
        bits = x.astype(np.float32).view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return (rounded & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
    return x.astype(dtype).astype(np.float64)


INF, NAN = math.inf, math.nan
# Merging two sets: (their logsumexps, their outputs, logsumexp of the union, its output). The same
# cases as in cpp_tests/attention_test.cpp.
MERGES = (
    ((0, 0), (1, 3), math.log(2), 2),
    ((1000, 1000), (1, 3), 1000 + math.log(2), 2),  # beyond exp
    ((-1000, -1000), (1, 3), -1000 + math.log(2), 2),
    ((-INF, 0.5), (7, 3), 0.5, 3),
    ((-INF, 0.5), (NAN, 3), 0.5, 3),  # an empty set's output is ignored
    ((0.5, -INF), (3, INF), 0.5, 3),
    ((-INF, -INF), (7, 3), -INF, 0),
    ((-INF, -INF), (NAN, INF), -INF, 0),
    ((0, -1000), (3, NAN), 0, NAN),  # small, not empty
    ((0, 0), (NAN, 3), math.log(2), NAN),
    ((0, 0), (INF, 3), math.log(2), INF),
    ((NAN, 0), (1, 3), NAN, NAN),
    ((-INF, NAN), (1, 3), NAN, NAN),
    ((INF, 0), (1, 3), INF, NAN),
    ((INF, -INF), (1, 3), INF, NAN),
    ((INF, NAN), (1, 3), NAN, NAN),
)


def check_merges(merge: Any, gradients: Any = None) -> None:
    """`merge(outputs, lses)` of lists of two arrays gives (output, lse); `gradients`, likewise, the
    gradients of the sum of both results, as two such lists."""
    lses = np.array([m[0] for m in MERGES], np.float32).T
    outputs = np.array([m[1] for m in MERGES], np.float32).T[..., None]
    want_lse, want = (np.array([m[i] for m in MERGES], np.float32) for i in (2, 3))
    for order in ([0, 1], [1, 0]):
        arguments = list(outputs[order]), list(lses[order])
        output, lse = (np.asarray(x) for x in merge(*arguments))
        assert output.dtype == lse.dtype == np.float32
        np.testing.assert_allclose(output[:, 0], want, rtol=1e-6)
        np.testing.assert_allclose(lse, want_lse, rtol=1e-6)
        if gradients is None:
            continue
        empty = np.isneginf(lses[order])
        for grad in gradients(*arguments):
            rows = np.stack([np.asarray(x).reshape(len(MERGES)) for x in grad])
            assert (rows[empty] == 0).all(), "a set without keys has no part in the result"
            assert np.isfinite(rows[:, np.isfinite(want)]).all()


@dataclass(frozen=True)
class Case:
    """One problem. The last fields say which optional arguments take part."""

    seed: int
    shape: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: str
    scale: float | None
    rpb: bool
    additional: int

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def neighborhood(self) -> dict[str, Any]:
        """The keyword arguments that describe the neighborhood."""
        return {k: asdict(self)[k] for k in ("kernel_size", "dilation", "is_causal", "stride")}

    @property
    def slots(self) -> int:
        return math.prod(self.kernel_size) + self.additional

    def _arrays(self, shapes: dict[str, tuple[int, ...] | None]) -> Arrays:
        rng = np.random.default_rng(self.seed)
        return {
            name: round_to(self.dtype, rng.standard_normal(shape))
            for name, shape in shapes.items()
            if shape is not None
        }

    def fused_arrays(self) -> Arrays:
        """Arguments of the fused operation, and the gradients of its results, heads-last."""
        b, n, grid, biased = self.batch, self.additional, self.shape, self.rpb
        return self._arrays(
            {
                "query": (b, *grid, self.heads, self.head_dim),
                "key": (b, *grid, self.kv_heads, self.head_dim),
                "value": (b, *grid, self.kv_heads, self.value_dim),
                "rpb": (self.heads, *(2 * k - 1 for k in self.kernel_size)) if biased else None,
                "additional_keys": (b, n, self.kv_heads, self.head_dim) if n else None,
                "additional_values": (b, n, self.kv_heads, self.value_dim) if n else None,
                "grad_output": (b, *grid, self.heads, self.value_dim),
                "grad_logsumexp": (b, *grid, self.heads),
            }
        )

    def unfused_arrays(self) -> Arrays:
        """Arguments of qk (query to additional_keys) and av (attn to additional_values), and the
        gradients of their results, heads-first."""
        b, n, h, grid, d = self.batch, self.additional, self.heads, self.shape, self.head_dim
        return self._arrays(
            {
                "query": (b, h, *grid, d),
                "key": (b, h, *grid, d),
                "rpb": (h, *(2 * k - 1 for k in self.kernel_size)) if self.rpb else None,
                "additional_keys": (b, h, n, d) if n else None,
                "attn": (b, h, *grid, self.slots),
                "value": (b, h, *grid, d),
                "additional_values": (b, h, n, d) if n else None,
                "grad_attn": (b, h, *grid, self.slots),
                "grad_output": (b, h, *grid, d),
            }
        )


def random_case(rng: np.random.Generator) -> Case:
    rank = int(rng.integers(1, 4))
    longest = {1: 40, 2: 10, 3: 6}[rank]
    shape, kernel, stride, dilation = [], [], [], []
    for _ in range(rank):
        length = int(rng.integers(1, longest + 1))
        k = int(rng.integers(1, length + 1)) if rng.random() < 0.3 else None
        k = k or int(rng.integers(1, min(length, 5) + 1))
        shape.append(length)
        kernel.append(k)
        stride.append(int(rng.integers(1, k + 1)) if rng.random() < 0.5 else 1)
        dilation.append(int(rng.integers(1, length // k + 1)) if rng.random() < 0.5 else 1)
    kv_heads = int(rng.integers(1, 3))
    head_dim = int(rng.choice([1, 2, 3, 8, 13, 16]))
    return Case(
        seed=int(rng.integers(2**31)),
        shape=tuple(shape),
        kernel_size=tuple(kernel),
        stride=tuple(stride),
        dilation=tuple(dilation),
        is_causal=tuple(bool(rng.random() < 0.3) for _ in range(rank)),
        batch=int(rng.choice([0, 1, 2], p=[0.03, 0.57, 0.4])),
        heads=kv_heads * int(rng.integers(1, 4)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=head_dim if rng.random() < 0.5 else int(rng.integers(1, 12)),
        dtype=str(rng.choice(DTYPES)),
        scale=None if rng.random() < 0.7 else round(float(rng.uniform(-1, 1)), 3),
        rpb=bool(rng.random() < 0.4),
        additional=int(rng.integers(1, 4)) if rng.random() < 0.3 else 0,
    )


def random_cases(count: int, seed: int = SEED) -> list[Case]:
    rng = np.random.default_rng(seed)
    return [random_case(rng) for _ in range(count)]


def long_unless(quick: bool, *values: Any) -> Any:
    """Values of a parametrised test, which is a long one unless `quick`."""
    return pytest.param(*values, marks=() if quick else pytest.mark.long)


def a_tenth_and_the_rest(count: int, seed: int = SEED) -> pytest.MarkDecorator:
    """Parametrises a test by `drawn`, a list of random cases; the longer list makes a long test."""
    drawn = random_cases(count, seed)
    rest = pytest.param(drawn[count // 10 :], marks=pytest.mark.long)
    return pytest.mark.parametrize("drawn", [drawn[: count // 10], rest], ids=["tenth", "rest"])


def relative_error(got: np.ndarray, want: np.ndarray, scale: float = 0.0) -> float:
    """||got - want|| / ||want||; where `want` is zero up to rounding, over `scale` instead."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    empty = np.isneginf(want)
    assert np.array_equal(np.isneginf(got), empty), "-inf in the wrong places"
    got, want = got[~empty], want[~empty]
    norm = float(np.linalg.norm(want))
    if norm <= 1e-9 * scale:
        norm = scale
    error = float(np.linalg.norm(got - want))
    return error / norm if error else 0.0


class Errors:
    """Collects the largest error by rank and dtype, and prints it as a table."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.count: dict[tuple[int, str], int] = defaultdict(int)
        self.worst: dict[tuple[int, str, str], float] = defaultdict(float)

    def check(self, case: Case, got: Arrays, want: Arrays, scale: float = 0.0) -> None:
        """Asserts that the results of a case are within their bounds. `scale`: the norm of the
        incoming gradient, which errors are measured against where the reference is zero."""
        self.count[case.rank, case.dtype] += 1
        assert got.keys() == want.keys()
        for name, result in got.items():
            kind = "gradient" if name.startswith("grad_") else "forward"
            bound = (GRADIENT_BOUND if kind == "gradient" else FORWARD_BOUND)[case.dtype]
            error = relative_error(result, want[name], scale)
            key = (case.rank, case.dtype, kind)
            self.worst[key] = max(self.worst[key], error)
            assert error <= bound, f"{name}: error {error:.3g} exceeds {bound:g} for {case}"

    def table(self) -> str:
        lines = [
            f"{self.title}: largest relative error",
            "rank dtype     cases  forward   gradient",
        ]
        for rank, dtype in sorted(self.count):
            forward, gradient = (self.worst[rank, dtype, kind] for kind in ("forward", "gradient"))
            lines.append(
                f"{rank:<4} {dtype:9} {self.count[rank, dtype]:5}  {forward:.2e}  {gradient:.2e}"
            )
        return "\n".join(lines)
