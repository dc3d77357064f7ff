"""Compares the speed of two builds of natten, call by call in turn.

    pip install --target old --no-deps .       # here, or in a checkout of another commit
    pip install --target new --no-deps .
    python benchmarks/compare.py old new [--cases CASE ...] [--dtypes DTYPE ...] [--repeats 31]

Each build runs in a process of its own and the two take turns, so that both see the same moods of
the machine. Prints the median time of each, and how many times as fast as the first the second is:
the median over the turns, with the quartiles in brackets. Prefix a build with variables to compare
settings of one: NATTEN_CPU_ISA=avx2,new
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from cases import PASSES, Case, cases_named, parser_of, seconds
from tensors import call_of, ours, tensors_of


def prepare(folder: str, variables: dict[str, str]) -> None:
    os.environ.update(variables)
    sys.path.insert(0, folder)
    import natten

    if Path(folder) not in Path(natten.__file__).parents:
        raise ImportError(f"{folder} holds no natten: got {natten.__file__}")


def measure(case: Case, dtype: str, pass_name: str, state: dict = {}) -> float:  # noqa: B006
    """Runs in a build's process, whose calls `state` keeps."""
    key = (case, dtype, pass_name)
    if key not in state:
        state.clear()
        inputs, gradient = tensors_of(case, dtype)
        state[key] = call_of(ours(case), inputs, gradient, pass_name)
        state[key]()
    return seconds(state[key])


def start(build: str) -> ProcessPoolExecutor:
    *settings, folder = build.split(",")
    variables = dict(setting.split("=", 1) for setting in settings)
    return ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), prepare, (str(Path(folder).resolve()), variables)
    )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("builds", nargs=2, metavar="BUILD", help="[VARIABLE=VALUE,...]FOLDER")
    parser.set_defaults(repeats=31)
    args = parser.parse_args()
    rows = []
    with start(args.builds[0]) as first, start(args.builds[1]) as second:
        for case in cases_named(args.cases):
            for dtype in args.dtypes:
                for name in PASSES:
                    call = (measure, case, dtype, name)
                    turns = [
                        (first.submit(*call).result(), second.submit(*call).result())
                        for _ in range(args.repeats)
                    ]
                    times = [1e3 * statistics.median(column) for column in zip(*turns, strict=True)]
                    low, ratio, high = statistics.quantiles((a / b for a, b in turns), n=4)
                    rows.append(
                        {
                            "case": case.name,
                            "dtype": dtype,
                            "pass": name,
                            "milliseconds": [round(time, 3) for time in times],
                            "speed": round(ratio, 4),
                        }
                    )
                    print(
                        f"{case.name:17} {dtype:8} {name:16} {times[0]:9.2f} ms {times[1]:9.2f} ms"
                        f"   x {ratio:.3f} ({low:.3f} to {high:.3f})",
                        flush=True,
                    )
    if args.json:
        args.json.write_text(json.dumps({"builds": args.builds, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
