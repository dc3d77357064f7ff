"""What borders, key masks and parts of a grid cost on the CPU.

    python benchmarks/borders.py [--cases 2d_64_k7 ...] [--dtypes float32 ...] [--repeats 15]

For the 2-D and 3-D cases and both passes, all variants of a row take turns. Each figure is the
median over the turns of a ratio to the first variant, whose milliseconds are given:

    shift         boundary "shift", all queries, no mask
    cut           time per useful FLOP with boundary "cut", over that of shift. Useful are the pairs
                  of tokens that are in a neighborhood, as in cpu.py
    circular      the same with "circular"; "-" where the grid is no whole number of runs
    mask          time with a key mask that hides a tenth of the keys at random, over that of shift
    part          time of about a sixteenth of the queries, those from the middle of the first axis
                  on, against all keys, over the time of all; after it the share that they are
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable

import torch
from cases import PASSES, Case, Row, cases_named, parser_of, processor, seconds
from tensors import call_of, ours, tensors_of

from natten import _core
from natten._args import BOUNDARIES

Call = Callable[[], object]


def pairs(case: Case, boundary: str) -> int:
    """How many pairs of a query and a key in its neighborhood there are."""
    strides = case.stride if isinstance(case.stride, tuple) else (case.stride,) * len(case.grid)
    return math.prod(
        sum(
            len(
                _core.window(
                    False, token, length, kernel, stride, case.dilation, case.is_causal,
                    BOUNDARIES.index(boundary),
                )
            )
            for token in range(length)
        )
        for length, kernel, stride in zip(case.grid, case.kernel, strides, strict=True)
    )  # fmt: skip


def variants_of(case: Case, dtype: str, pass_name: str) -> tuple[dict[str, Call], dict[str, float]]:
    """The calls that take turns, and by what the time of each is divided: its share of the work."""
    inputs, gradient = tensors_of(case, dtype)
    whole = pairs(case, "shift")
    calls: dict[str, Call] = {"shift": call_of(ours(case), inputs, gradient, pass_name)}
    shares = {"shift": 1.0}
    for boundary in ("cut", "circular"):
        try:
            shares[boundary] = pairs(case, boundary) / whole
        except ValueError:
            continue  # a circular axis of such a length does not exist
        run = ours(case, boundary=boundary)
        calls[boundary] = call_of(run, inputs, gradient, pass_name)

    mask = torch.rand(case.batch, *case.grid) > 0.1
    calls["mask"] = call_of(ours(case, key_mask=mask), inputs, gradient, pass_name)
    shares["mask"] = 1.0

    count = max(1, case.grid[0] // 16)
    begin = case.grid[0] // 2
    query = inputs[0].detach()[:, begin : begin + count].clone().requires_grad_()
    offset = (begin,) + (0,) * (len(case.grid) - 1)
    run = ours(case, query_offset=offset, grid_size=case.grid)
    part = gradient[:, begin : begin + count].clone()
    calls["part"] = call_of(run, [query, *inputs[1:]], part, pass_name)
    shares["part"] = 1.0
    return calls, shares


def measure(case: Case, dtype: str, pass_name: str, repeats: int) -> Row:
    calls, shares = variants_of(case, dtype, pass_name)
    for call in calls.values():
        call()
    turns = [{name: seconds(call) for name, call in calls.items()} for _ in range(repeats)]
    row: Row = {
        "case": case.name,
        "dtype": dtype,
        "pass": pass_name,
        "milliseconds": round(1e3 * statistics.median(turn["shift"] for turn in turns), 4),
        "share_of_queries": max(1, case.grid[0] // 16) / case.grid[0],
    }
    for name in ("cut", "circular", "mask", "part"):
        row[name] = None
        if name in calls:
            ratio = statistics.median(turn[name] / turn["shift"] for turn in turns)
            row[name] = round(ratio / shares[name], 4)
    return row


def show(row: Row) -> None:
    ratios = "".join(
        f"{'-' if row[name] is None else format(row[name], '.3f'):>10}"
        for name in ("cut", "circular", "mask", "part")
    )
    print(
        f"{row['case']:17} {row['dtype']:8} {row['pass']:16} {row['milliseconds']:9.2f} ms"
        f"{ratios} of {row['share_of_queries']:.4f}",
        flush=True,
    )


def main() -> None:
    parser = parser_of(__doc__)
    parser.set_defaults(repeats=15)
    args = parser.parse_args()
    rows = []
    names = "".join(f"{name:>10}" for name in ("cut", "circular", "mask", "part"))
    print(f"{'':44}{'shift':>12}{names}")
    for case in cases_named(args.cases):
        if len(case.grid) == 1:
            continue
        for dtype in args.dtypes:
            for name in PASSES:
                rows.append(measure(case, dtype, name, args.repeats))
                show(rows[-1])
    if args.json:
        machine = {"cpu": processor(), "threads": torch.get_num_threads()}
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
