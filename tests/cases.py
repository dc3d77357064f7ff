"""Random problems that every framework's tests share, and the bounds they must meet."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import oracle
import pytest

SEED = int(os.environ.get("NATTEN_TEST_SEED", "20260731"))
# How many random problems a test of functions draws, where not as many as it says.
COUNT = int(os.environ.get("NATTEN_TEST_CASES", "0"))
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
    boundary: tuple[str, ...] | None = None  # None: shift on every axis
    # Which part of a grid queries and keys are. `shape` is that of the queries.
    key_shape: tuple[int, ...] | None = None  # None: as the queries'
    query_offset: tuple[int, ...] | None = None
    key_offset: tuple[int, ...] | None = None
    grid_size: tuple[int, ...] | None = None
    mask_batch: int | None = None  # batch of the key mask, or 1; None: there is no mask

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def neighborhood(self) -> dict[str, Any]:
        """The keyword arguments that describe the neighborhood, and which part is given."""
        options = asdict(self)
        names = ("kernel_size", "dilation", "is_causal", "stride", "boundary")
        parts = ("query_offset", "key_offset", "grid_size")
        window = {k: options[k] for k in names if options[k] is not None}
        return window | {k: options[k] for k in parts if options[k] is not None}

    @property
    def keys_shape(self) -> tuple[int, ...]:
        return self.shape if self.key_shape is None else self.key_shape

    @property
    def has_parts(self) -> bool:
        return any(x is not None for x in (self.query_offset, self.key_offset, self.grid_size))

    @property
    def slots(self) -> int:
        return math.prod(self.kernel_size) + self.additional

    def _arrays(self, shapes: dict[str, tuple[int, ...] | None]) -> Arrays:
        """Random normal, and the key mask."""
        rng = np.random.default_rng(self.seed)
        arrays = {
            name: round_to(self.dtype, rng.standard_normal(shape))
            for name, shape in shapes.items()
            if shape is not None
        }
        if self.mask_batch is not None:
            share = rng.choice([0.1, 0.5, 0.9, 1.0])  # of keys that are hidden
            arrays["key_mask"] = rng.random((self.mask_batch, *self.keys_shape)) >= share
        return arrays

    def fused_arrays(self) -> Arrays:
        """Arguments of the fused operation, and the gradients of its results, heads-last."""
        b, n, grid, biased = self.batch, self.additional, self.shape, self.rpb
        keys = self.keys_shape
        return self._arrays(
            {
                "query": (b, *grid, self.heads, self.head_dim),
                "key": (b, *keys, self.kv_heads, self.head_dim),
                "value": (b, *keys, self.kv_heads, self.value_dim),
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
        keys = self.keys_shape
        return self._arrays(
            {
                "query": (b, h, *grid, d),
                "key": (b, h, *keys, d),
                "rpb": (h, *(2 * k - 1 for k in self.kernel_size)) if self.rpb else None,
                "additional_keys": (b, h, n, d) if n else None,
                "attn": (b, h, *grid, self.slots),
                "value": (b, h, *keys, d),
                "additional_values": (b, h, n, d) if n else None,
                "grad_attn": (b, h, *grid, self.slots),
                "grad_output": (b, h, *grid, d),
            }
        )


def hide(arrays: Arrays, name: str, axis: int) -> Arrays:
    """The arrays with NaN, infinity and large numbers in the keys or values that the mask hides, of
    every head. `axis`: the first of the grid."""
    x, mask = arrays[name].copy(), arrays["key_mask"]
    spatial = tuple(range(1, mask.ndim))
    mask = np.broadcast_to(mask, (len(x), *mask.shape[1:]))
    rows = np.moveaxis(x, [axis + i - 1 for i in spatial], spatial)  # a view
    rows[~mask] = np.resize([NAN, INF, -INF, 1e4], rows[~mask].shape)
    return {**arrays, name: x}


def random_axis(rng: np.random.Generator, longest: int, boundary: str) -> tuple[int, int, int, int]:
    """(length, kernel_size, stride, dilation). Stride and dilation are often 1."""
    length = int(rng.integers(1, longest + 1))
    most = length + 3 if boundary == "cut" else length
    k = int(rng.integers(1, most + 1)) if rng.random() < 0.3 else None
    k = k or int(rng.integers(1, min(most, 5) + 1))
    strides, dilations = range(1, k + 1), range(1, length // k + 1)
    if boundary == "cut":
        dilations = range(1, max(dilations.stop, 4))
    if boundary == "circular":
        dilations = [d for d in dilations if length % d == 0]
    stride, dilation = 1, 1
    if rng.random() < 0.5:
        dilation = int(rng.choice(dilations))
    if boundary == "circular":
        strides = [s for s in strides if length // dilation % s == 0]
    if rng.random() < 0.5:
        stride = int(rng.choice(strides))
    return length, k, stride, dilation


def random_part(
    rng: np.random.Generator, length: int, window: tuple[int, int, int, bool, str]
) -> tuple[int, int, int, int]:
    """(offset of the queries, their number, offset of the keys, their number) of one axis."""
    boundary = window[-1]
    offset = int(rng.integers(0, length))
    count = int(rng.integers(1, length - offset + 1))
    if rng.random() < 0.3:
        return offset, count, 0, length
    begin, end = oracle.axis_key_range(offset, count, length, *window)
    if rng.random() < 0.6:  # more than the windows need, beyond borders as well
        begin, end = begin - int(rng.integers(0, 4)), end + int(rng.integers(0, 4))
    if boundary == "circular":
        turn = length * int(rng.integers(-1, 2))
        begin, end = begin + turn, min(begin + length, end) + turn
    return offset, count, begin, end - begin


def random_case(rng: np.random.Generator) -> Case:
    rank = int(rng.integers(1, 4))
    longest = {1: 40, 2: 10, 3: 6}[rank]
    boundary = ["shift"] * rank
    if rng.random() < 0.35:
        boundary = [str(rng.choice(["shift", "cut", "circular"])) for _ in range(rank)]
    causal = [bool(b != "circular" and rng.random() < 0.3) for b in boundary]
    axes = [random_axis(rng, longest, b) for b in boundary]
    shape, kernel, stride, dilation = zip(*axes, strict=True)
    parts: dict[str, Any] = {}
    if rng.random() < 0.25:
        windows = zip(kernel, stride, dilation, causal, boundary, strict=True)
        drawn = [random_part(rng, n, w) for n, w in zip(shape, windows, strict=True)]
        query_offset, queries, key_offset, keys = zip(*drawn, strict=True)
        parts = dict(
            query_offset=query_offset, key_offset=key_offset, key_shape=keys, grid_size=shape
        )
        if keys == shape and not any(key_offset):  # which then need not be said
            del parts["key_offset"], parts["grid_size"]
        shape = queries
    batch = int(rng.choice([0, 1, 2], p=[0.03, 0.57, 0.4]))
    kv_heads = int(rng.integers(1, 3))
    head_dim = int(rng.choice([1, 2, 3, 8, 13, 16]))
    return Case(
        seed=int(rng.integers(2**31)),
        shape=shape,
        kernel_size=kernel,
        stride=stride,
        dilation=dilation,
        is_causal=tuple(causal),
        batch=batch,
        heads=kv_heads * int(rng.integers(1, 4)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=head_dim if rng.random() < 0.5 else int(rng.integers(1, 12)),
        dtype=str(rng.choice(DTYPES)),
        scale=None if rng.random() < 0.7 else round(float(rng.uniform(-1, 1)), 3),
        rpb=bool(rng.random() < 0.4),
        additional=int(rng.integers(1, 4)) if rng.random() < 0.3 else 0,
        boundary=None if set(boundary) == {"shift"} else tuple(boundary),
        mask_batch=int(rng.choice([1, batch])) if rng.random() < 0.25 else None,
        **parts,
    )


def random_cases(count: int, seed: int = SEED) -> list[Case]:
    rng = np.random.default_rng(seed)
    return [random_case(rng) for _ in range(count)]


def of_module(case: Case) -> Case:
    """The case on its whole grid, as a module has it."""
    return replace(
        case,
        shape=case.grid_size or case.keys_shape,
        kv_heads=case.heads,
        value_dim=case.head_dim,
        additional=0,
        **dict.fromkeys(("key_shape", "query_offset", "key_offset", "grid_size")),
    )


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
    """Collects the largest error by kind of case and dtype, and prints it as a table."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.count: dict[tuple[str, str], int] = defaultdict(int)
        self.worst: dict[tuple[str, str, str], float] = defaultdict(float)

    def check(self, case: Case, got: Arrays, want: Arrays, scale: float = 0.0) -> None:
        """Asserts that the results of a case are within their bounds. `scale`: the norm of the
        incoming gradient, which errors are measured against where the reference is zero."""
        kinds = self._kinds_of(case)
        for kind in kinds:
            self.count[kind, case.dtype] += 1
        assert got.keys() == want.keys()
        for name, result in got.items():
            direction = "gradient" if name.startswith("grad_") else "forward"
            bound = (GRADIENT_BOUND if direction == "gradient" else FORWARD_BOUND)[case.dtype]
            error = relative_error(result, want[name], scale)
            for kind in kinds:
                key = (kind, case.dtype, direction)
                self.worst[key] = max(self.worst[key], error)
            assert error <= bound, f"{name}: error {error:.3g} exceeds {bound:g} for {case}"

    @staticmethod
    def _kinds_of(case: Case) -> list[str]:
        """What a case is counted under; several have it each time."""
        boundaries = sorted(set(case.boundary or ["shift"]))
        kinds = [f"rank {case.rank}", boundaries[0] if len(boundaries) == 1 else "several"]
        if case.has_parts:
            kinds.append("part")
        if case.mask_batch is not None:
            kinds.append("key mask")
        return kinds

    def table(self) -> str:
        lines = [
            f"{self.title}: largest relative error",
            "         dtype     cases  forward   gradient",
        ]
        order = ["shift", "cut", "circular", "several", "part", "key mask"]  # after the ranks
        for kind, dtype in sorted(
            self.count, key=lambda k: (order.index(k[0]) if k[0] in order else -1, k)
        ):
            forward, gradient = (self.worst[kind, dtype, d] for d in ("forward", "gradient"))
            lines.append(
                f"{kind:<8} {dtype:9} {self.count[kind, dtype]:5}  {forward:.2e}  {gradient:.2e}"
            )
        return "\n".join(lines)
