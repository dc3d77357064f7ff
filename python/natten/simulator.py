"""Predicts what neighborhood attention costs: `python -m natten.simulator`.

    python -m natten.simulator -i 256 256 -w 80 80 -n 24 -d 128 --dtype bf16 --device h100
    python -m natten.simulator -i 30 48 80 -w 18 24 24 -n 24 -d 128 --device b200 --sweep stride
    python -m natten.simulator -i 64 64 -w 7 7 -n 8 --sweep kernel --plot kernel.png

Kernels are not run; docs/choosing-a-window.md says how to read what it prints. `natten.simulate` is
the same in Python.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from natten._args import BOUNDARIES
from natten._simulate import DTYPE_NAMES, GPUS, Simulation, duration, quantity, simulate

__all__ = ["main", "parser", "sweep"]

SWEEPS = ("stride", "kernel", "dilation", "tiles")


def boolean(text: str) -> bool:
    if text.lower() not in ("0", "1", "true", "false"):
        raise argparse.ArgumentTypeError(f"got {text!r}; must be True or False")
    return text.lower() in ("1", "true")


def dtype_named(text: str) -> str:
    names = {**DTYPE_NAMES, **{name: name for name in DTYPE_NAMES.values()}}
    if text not in names:
        raise argparse.ArgumentTypeError(f"got {text!r}; must be one of {', '.join(names)}")
    return names[text]


def add_problem(parser: argparse.ArgumentParser, default_dtype: str) -> None:
    """The options that say a problem, by NATTEN's names."""
    add = parser.add_argument
    add("-i", "--input-size", type=int, nargs="+", required=True, help="tokens per axis")
    add("-b", "--batch-size", type=int, default=1)
    add("-n", "--heads", type=int, default=1, help="heads of queries")
    add("--heads-kv", type=int, help="heads of keys and values, where they are fewer")
    add("-d", "--dim", type=int, default=64, help="head dim")
    add("--dim-value", type=int, help="head dim of values, where it is another")
    add("-w", "--window-size", type=int, nargs="+", help="kernel size; default: all tokens")
    add("-s", "--stride", type=int, nargs="+", default=[1])
    add("--dilation", type=int, nargs="+", default=[1])
    add("-c", "--causal", type=boolean, nargs="+", default=[False], help="True or False per axis")
    add("--boundary", choices=BOUNDARIES, nargs="+", default=["shift"])
    add(
        "--dtype",
        type=dtype_named,
        default=dtype_named(default_dtype),
        help="fp32, bf16, fp16, fp64",
    )
    add("--backprop", action="store_true", help="the backward pass as well as the forward pass")
    add("--q-tile", type=int, nargs="+", help="shape of tiles of queries, on GPUs")
    add("--kv-tile", type=int, nargs="+", help="shape of tiles of keys, on GPUs")


def one_or_all(values: Sequence[Any]) -> Any:
    """One value stands for every axis."""
    return values[0] if len(values) == 1 else tuple(values)


def window_of(args: argparse.Namespace) -> dict[str, Any]:
    """The window as functions take it."""
    return {
        "kernel_size": one_or_all(args.window_size or args.input_size),
        "stride": one_or_all(args.stride),
        "dilation": one_or_all(args.dilation),
        "is_causal": one_or_all(args.causal),
        "boundary": one_or_all(args.boundary),
    }


def problem_of(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `simulate`."""
    return {
        "input_size": tuple(args.input_size),
        **window_of(args),
        "batch": args.batch_size,
        "heads": args.heads,
        "kv_heads": args.heads_kv,
        "head_dim": args.dim,
        "value_dim": args.dim_value,
        "dtype": args.dtype,
        "backward": args.backprop,
        "q_tile_shape": tuple(args.q_tile) if args.q_tile else None,
        "kv_tile_shape": tuple(args.kv_tile) if args.kv_tile else None,
    }


def _spread(value: Any, rank: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,) * rank


def _powers(rank: int, bits: int) -> Iterator[tuple[int, ...]]:
    for shares in itertools.product(range(bits + 1), repeat=rank):
        if sum(shares) == bits:
            yield tuple(1 << share for share in shares)


def _values(what: str, problem: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a sweep goes through: a name for each, and the arguments that change."""
    grid = problem["input_size"]
    rank = len(grid)
    kernel, stride = _spread(problem["kernel_size"], rank), _spread(problem["stride"], rank)
    dilation = _spread(problem["dilation"], rank)
    if what == "tiles":
        for bits in (6, 7):
            for q, kv in itertools.product(_powers(rank, bits), _powers(rank, 6)):
                yield f"{text_of(q)} / {text_of(kv)}", {"q_tile_shape": q, "kv_tile_shape": kv}
        return
    if what == "kernel":
        steps = sorted({*(2**i + 1 for i in range(1, 24)), *(3 * 2**i + 1 for i in range(1, 23))})
        for k in steps:
            sizes = tuple(min(k, n // d) for n, d in zip(grid, dilation, strict=True))
            strides = tuple(map(min, stride, sizes))
            yield text_of(sizes), {"kernel_size": sizes, "stride": strides}
            if all(k >= n // d for n, d in zip(grid, dilation, strict=True)):
                return
    if what == "dilation":
        for i in range(24):
            most = [max(n // k, 1) for n, k in zip(grid, kernel, strict=True)]
            values = tuple(min(2**i, m) for m in most)
            yield text_of(values), {"dilation": values}
            if all(2**i >= m for m in most):
                return
    if what == "stride":
        widest = max(kernel)
        for s in sorted({*(2**i for i in range(24) if 2**i < widest), widest}):
            values = tuple(min(s, k) for k in kernel)
            yield text_of(values), {"stride": values}


def text_of(values: Any) -> str:
    return "x".join(map(str, values)) if isinstance(values, Sequence) else str(values)


@dataclasses.dataclass(frozen=True)
class Point:
    """One row of a sweep; without a prediction it says why."""

    value: str
    changes: dict[str, Any]
    simulation: Simulation | None
    refusal: str = ""


def sweep(what: str, **problem: Any) -> list[Point]:
    """Predictions for a problem, as arguments of `natten.simulate`, along one of its arguments:
    "stride", "kernel", "dilation" or "tiles", which are those of natten's kernels for GPUs."""
    if what not in SWEEPS:
        raise ValueError(f"sweep: got {what!r}; must be one of {', '.join(SWEEPS)}")
    if what == "tiles" and problem.get("device", "cpu") == "cpu":
        raise ValueError("sweep: got tiles, which only GPUs have; device is cpu")
    size = problem["input_size"]
    defaults = {"stride": 1, "dilation": 1}
    problem = {
        **defaults,
        **problem,
        "input_size": (size,) if isinstance(size, int) else tuple(size),
    }
    points, seen = [], set()
    for name, changes in _values(what, problem):
        if name in seen:
            continue
        seen.add(name)
        try:
            points.append(Point(name, changes, simulate(**{**problem, **changes})))
        except (ValueError, NotImplementedError) as error:
            points.append(Point(name, changes, None, str(error)))
    done = [p for p in points if p.simulation]
    if what == "tiles":
        # Most do not exist, which is no news; the fastest first.
        return sorted(done, key=lambda p: p.simulation.seconds)  # type: ignore[union-attr]
    return points


def _cells(point: Point, first: Simulation) -> list[str]:
    s = point.simulation
    if s is None:
        return [point.value, point.refusal]
    masked = sum(p.masked * p.executed_flops for p in s.passes) / max(s.executed_flops, 1)
    return [
        point.value,
        duration(s.seconds),
        f"{first.seconds / s.seconds:.2f}",
        f"{quantity(s.useful_flops / s.seconds)}FLOP/s",
        f"{s.executed_flops / s.useful_flops:.2f}" if s.useful_flops else "-",
        f"{100 * masked:.0f} %",
        f"{quantity(s.bytes)}B",
        f"{quantity(s.tiles)}".strip(),
    ]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns that are as wide as they have to be; a row with fewer cells ends with text."""
    full = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[i]) for row in full) for i in range(len(rows[0]))]
    widths[0] = max(len(row[0]) for row in rows)
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        if len(row) == len(rows[0]):
            cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        else:
            cells += row[1:]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def pyplot() -> Any:
    """matplotlib's, without a window. Exits with a message where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit(
            "--plot: needs matplotlib, which is not installed: pip install matplotlib"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot(what: str, points: Sequence[Point], title: str, path: Path) -> None:
    """Time of each value, and what is multiplied more than asked for."""
    plt = pyplot()
    done = [(p.value, p.simulation) for p in points[:24] if p.simulation]
    names = [value for value, _ in done]
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    times = [1e3 * s.seconds for _, s in done]
    ideal = [t * s.useful_flops / s.executed_flops for t, (_, s) in zip(times, done, strict=True)]
    axes.bar(names, times, color="#b9d9f3", label="predicted")
    axes.bar(names, ideal, color="#3182bd", label="of it, for pairs that see each other")
    axes.set_xlabel(what)
    axes.set_ylabel("milliseconds")
    axes.set_title(title, fontsize=10)
    axes.tick_params(axis="x", labelrotation=45 if len(names) > 8 else 0)
    axes.legend(frameon=False)
    save(figure, axes, path)


def save(figure: Any, axes: Any, path: Path) -> None:
    """Writes a picture of one diagram."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot().close(figure)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m natten.simulator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_problem(result, "fp32")
    add = result.add_argument
    add("--device", choices=["cpu", *GPUS], default="cpu")
    add(
        "--fixed-tiles", action="store_true", help="tiles of keys on a grid of their own (NATTEN's)"
    )
    add("--mesh", type=int, nargs="+", help="devices along each axis")
    add("--link", type=float, help="bytes per second between devices of the mesh")
    add("--latency", type=float, default=0.0, help="seconds that an exchange takes beyond that")
    add("--sweep", choices=SWEEPS)
    add("--plot", type=Path, metavar="FILE", help="draws the sweep; needs matplotlib")
    add("--json", type=Path, metavar="FILE", help="writes all figures")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    of_line = parser()
    args = of_line.parse_args(arguments)
    if args.plot and not args.sweep:
        of_line.error("--plot: draws a sweep; needs --sweep")
    if args.plot:
        pyplot()
    problem = {
        **problem_of(args),
        "device": args.device,
        "fixed_tiles": args.fixed_tiles,
        "mesh": one_or_all(args.mesh) if args.mesh else None,
        "link": args.link,
        "latency": args.latency,
    }
    try:
        if not args.sweep:
            points = [Point("", {}, simulate(**problem))]
            print(points[0].simulation)
        else:
            points = sweep(args.sweep, **problem)
            done = [p.simulation for p in points if p.simulation]
            if not done:
                raise ValueError("; ".join(p.refusal for p in points) or "nothing to sweep")
            print(f"Predictions: {done[0].device}")
            head = [args.sweep, "time", "speed", "useful", "executed", "masked", "moved", "tiles"]
            shown = points[:20] if args.sweep == "tiles" else points
            print(table([head, *(_cells(p, done[0]) for p in shown)]))
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        print(f"{of_line.prog}: {error}", file=sys.stderr)
        return 1
    if args.json:
        rows = [
            {
                **p.changes,
                **(dataclasses.asdict(p.simulation) if p.simulation else {"refusal": p.refusal}),
            }
            for p in points
        ]
        args.json.write_text(json.dumps({"problem": problem, "rows": rows}, indent=1))
    if args.plot:
        size = math.prod(problem["input_size"])
        title = (
            f"{text_of(problem['input_size'])} tokens ({quantity(size).strip()}), window "
            f"{text_of(problem['kernel_size'])}; {points[0].simulation.device}"  # type: ignore[union-attr]
            if points[0].simulation
            else text_of(problem["input_size"])
        )
        plot(args.sweep, points, title, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
