"""What counts of work cost on this processor, in seconds, from a few measurements.

A pass takes its counts (`_core.work_of`) times a price each, shared by the threads that have a part
of it. Prices are fitted to the times of problems drawn once and for all, so that relative errors
are least and no price is negative.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from natten import _core
from natten._files import write_whole
from natten._simulate import Layer, make_layer

if TYPE_CHECKING:
    import numpy as np

# The counts that have a price; the last is a pass as such. Scores and sums are multiply-adds of
# different kernels, but of one kind in each pass, which has prices of its own.
COUNTS = ("executed", "weights", "masked", "tiles", "calls", "packs", "packed", "moved", "pass")
FORMAT = 1  # of a file of prices
SECONDS = 6.0  # after which nothing more is measured
PROBLEMS = 48
TURNS = 3  # of all problems; the best time counts, as others are those of a disturbed machine


@dataclasses.dataclass(frozen=True)
class Prices:
    """Seconds per unit of each of COUNTS, of the passes of an operation by name."""

    of_pass: dict[str, tuple[float, ...]]
    threads: int

    def seconds(self, works: Sequence[dict[str, Any]]) -> list[float]:
        return [
            sum(
                p * x
                for p, x in zip(self.of_pass[w["name"]], _counts(w, self.threads), strict=True)
            )
            for w in works
        ]


def _counts(work: dict[str, Any], threads: int) -> list[float]:
    """Of the thread that has most to do."""
    units = max(work["units"], 1)
    share = math.ceil(units / threads) / units
    known = {**work, "moved": work["read"] + work["written"]}
    return [known[name] * share for name in COUNTS[:-1]] + [1.0]


def random_layer(rng: random.Random, dtype: str, most_flops: float) -> Layer:
    """A problem of any rank, window, stride, dilation and head dim."""
    while True:
        rank = rng.randint(1, 3)
        longest = (4096, 96, 24)[rank - 1]
        grid = tuple(rng.randint(longest // 8, longest) for _ in range(rank))
        dilation = tuple(rng.choice((1, 1, 1, 2, 3)) for _ in grid)
        most = [length // d for length, d in zip(grid, dilation, strict=True)]
        widest = (512, 31, 11)[rank - 1]
        kernel = tuple(rng.randint(1, min(m, widest)) for m in most)
        stride = tuple(rng.choice((1, 1, rng.randint(1, k))) for k in kernel)
        causal = tuple(rng.random() < 0.15 for _ in grid)
        # Circular grids have a backward pass of their own.
        wraps = rng.random() < 0.4
        boundary = tuple(
            "circular" if wraps and s == d == 1 and not c else "shift"
            for s, d, c in zip(stride, dilation, causal, strict=True)
        )
        heads, head_dim = rng.choice((1, 2, 4, 8)), rng.choice((16, 32, 48, 64, 96, 128))
        flops = 4 * heads * math.prod(grid) * math.prod(kernel) * head_dim
        if most_flops / 50 <= flops <= most_flops:
            return make_layer(
                grid, kernel, stride, dilation, causal, boundary, 1, heads, head_dim, dtype
            )


def runner(layer: Layer, op: str, skip: Sequence[str]) -> Callable[[], object]:
    """Runs an operation on random numbers, on the library's own threads."""
    import numpy as np

    rng = np.random.default_rng(0)
    lists = layer.tensors(op, layer.grid, layer.grid, skip)
    inputs, outputs = (
        [None if x is None else rng.standard_normal(x[0]).astype(x[1]) for x in given]
        for given in lists
    )
    config = layer.config()
    return lambda: _core.run(op, config, None, "vectorized", inputs, outputs)


def time_of(run: Callable[[], object]) -> float:
    """Of one thread what it computes, which takes no longer on a busy machine."""
    clock = time.thread_time if _core.num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return clock() - start


def fit(rows: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Prices, none negative, with which `rows @ prices` is closest to `seconds`, relatively: by
    Lawson and Hanson's active sets."""
    import numpy as np

    a = rows / seconds[:, None]
    scale = np.sqrt((a * a).sum(0))
    scale[scale == 0] = 1
    a, b = a / scale, np.ones(len(a))
    x, free = np.zeros(a.shape[1]), np.zeros(a.shape[1], bool)
    for _ in range(3 * a.shape[1]):
        gain = np.where(free, -np.inf, a.T @ (b - a @ x))
        if gain.max() <= 1e-9:
            break
        free[gain.argmax()] = True
        while True:
            trial = np.zeros_like(x)
            trial[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
            if trial[free].min() > 0:
                x = trial
                break
            out = free & (trial <= 0)
            step = (x[out] / np.maximum(x[out] - trial[out], 1e-300)).min()
            x = x + step * (trial - x)
            free &= x > 1e-15
            if not free.any():
                break
    return x / scale


def _measure(dtype: str, op: str) -> Prices:
    import numpy as np

    threads = _core.num_threads()
    rng = random.Random(1)
    end = time.perf_counter() + SECONDS
    # Of the backward pass also queries' gradients alone, which tells its passes apart.
    no_keys = ("grad_logsumexp", "grad_key", "grad_value")
    kinds: list[Sequence[str]] = [("grad_logsumexp",)]
    if op == "attention_backward":
        kinds.append(no_keys)
    names: dict[str, int] = {}
    cases: list[tuple[list[dict[str, Any]], Layer, Sequence[str], list[float]]] = []
    for number in range(PROBLEMS):
        # From problems that fit a cache to those that do not.
        layer = random_layer(rng, dtype, (3e7, 1e8, 4e8)[number % 3])
        for skip in kinds:
            works = layer.work(op, "cpu", threads, skip=skip)
            for work in works:
                names.setdefault(work["name"], len(names))
            cases.append((works, layer, skip, []))
    # On a busy machine fewer problems have to do, yet more than there are prices.
    least = 2 * len(names) * len(COUNTS)
    for turn in range(TURNS):
        for number, (_, layer, skip, times) in enumerate(cases):
            if time.perf_counter() > end and (turn > 0 or number >= least):
                break
            run = runner(layer, op, skip)
            times += [time_of(run), time_of(run)]
    cases = [case for case in cases if case[-1]]
    rows = np.zeros((len(cases), len(names) * len(COUNTS)))
    for row, (works, *_) in zip(rows, cases, strict=True):
        for work in works:
            at = names[work["name"]] * len(COUNTS)
            row[at : at + len(COUNTS)] = _counts(work, threads)
    prices = fit(rows, np.array([min(times) for *_, times in cases]))
    return Prices(
        {
            name: tuple(map(float, prices[i * len(COUNTS) : (i + 1) * len(COUNTS)]))
            for name, i in names.items()
        },
        threads,
    )


def _identity(dtype: str, op: str) -> dict[str, Any]:
    """All that prices depend on."""
    return {
        "format": FORMAT,
        "version": _core.version,
        "machine": _core.build_info()["machine"],
        "threads": _core.num_threads(),
        "dtype": dtype,
        "op": op,
    }


def _read(path: Path, identity: dict[str, Any]) -> Prices | None:
    """None where the file is not there, is torn, or speaks of something else."""
    try:
        held = json.loads(path.read_text())
        if held["identity"] != identity:
            return None
        prices = {str(name): tuple(map(float, row)) for name, row in held["prices"].items()}
        fits = all(len(row) == len(COUNTS) for row in prices.values())
        return Prices(prices, identity["threads"]) if fits and prices else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _write(path: Path, identity: dict[str, Any], prices: Prices) -> None:
    """At once, so that no other process reads a part of it. Where that fails nothing is kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"identity": identity, "prices": prices.of_pass})
        write_whole(path, lambda draft: draft.write_text(text))
    except OSError as error:
        from natten._log import logger

        logger.debug("the simulator's measurements are not kept: %s", error)


@functools.lru_cache
def _prices(dtype: str, op: str, threads: int) -> Prices:
    folder = os.environ.get("NATTEN_CACHE_DIR")
    identity = _identity(dtype, op)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(folder) / f"simulator-{digest}.json" if folder else None
    prices = _read(path, identity) if path else None
    if prices is None:
        prices = _measure(dtype, op)
        if path:
            _write(path, identity, prices)
    return prices


def calibrated(dtype: str, op: str) -> Prices:
    """The prices of an operation, measured when they are first asked for."""
    try:
        import numpy  # noqa: F401
    except ImportError:
        raise ImportError(
            "natten.simulate measures this processor with numpy, which is not installed: "
            "pip install numpy"
        ) from None
    # numpy has no bfloat16, which costs what float16 does: both are converted to float32.
    return _prices("float16" if dtype == "bfloat16" else dtype, op, _core.num_threads())
