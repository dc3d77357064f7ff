"""Times neighborhood attention on the CPU beside other ways to compute it, in one run.

    python benchmarks/cpu.py                                 # ours, all cases, float32
    python benchmarks/cpu.py --ways all --json all.json --plot all.png
    python benchmarks/cpu.py --cases 2d_64_k7 --ways ours flex --dtypes float32 bfloat16
    python benchmarks/cpu.py --from-json all.json --plot all.png
    python benchmarks/cpu.py --memory

Prints useful GFLOP/s, and in brackets the ratio to a float32 matrix product of 2048^3 on the same
threads, timed in turn with each row: machines are noisy, ratios less so. Useful means
4 * batch * heads * tokens * window * head_dim for the forward pass and 3.5 times that for forward
and backward; work that a mask throws away does not count. Causal windows are full but at the start.
Before a way is timed, its results are compared with ours; one that computes something else is
reported, not timed, and makes the exit status 1.

    ours          the backend that natten chooses
    naive         natten's readable reference backend
    composed      natten's backend made of PyTorch's own operations
    gather        keys gathered into [.., tokens, window, head_dim], einsum, softmax, einsum
    flex          FlexAttention, compiled before it is timed, tokens in row-major order; no backward
    sdpa_mask     scaled_dot_product_attention with the neighborhood as a boolean mask, built before
    sdpa_full     scaled_dot_product_attention over all tokens, counted by the window
    qk, av        natten's unfused operations, heads-first; each counts half of a forward pass

With --memory every case and pass of ours runs once in a process of its own, which has run another,
tiny case before. That prints the peak resident memory above that with the inputs in place, and what
the results need: output, logsumexp, gradients and one float per token and head. (Linux only.)
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path

import cases
import torch
from cases import (
    PASSES,
    Case,
    Row,
    Skip,
    Wrong,
    cases_named,
    medians,
    parser_of,
    processor,
    seconds,
)
from tensors import call_of, ours, tensors_of
from ways import WAYS, check

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "performance.png"


def machine() -> Row:
    return {
        "cpu": processor(),
        "cpu_capability_of_torch": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **{name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "NATTEN_CPU_ISA")},
    }


def time_case(case: Case, dtype: str, ways: list[str], repeats: int) -> list[Row]:
    rows = []
    square = torch.randn(2048, 2048)
    inputs, gradient = tensors_of(case, dtype)
    references = {name: call_of(ours(case), inputs, gradient, name)() for name in PASSES}
    for way_name in ways:
        way = WAYS[way_name]
        head = {"case": case.name, "dtype": dtype, "way": way_name}
        try:
            run = way.build(case, inputs)
            for name in way.passes:
                call = call_of(run, inputs, gradient, name)
                results = call()
                if not way.is_checked_when_built:
                    check(results, references[name])
                del results
                products, times = [], []
                for _ in range(repeats if way_name == "ours" else min(repeats, 3)):
                    products.append(seconds(lambda: square @ square))
                    times.append(seconds(call))
                flops = PASSES[name] * way.share * case.flops
                ratios = [
                    flops / (2 * 2048**3) * p / t for p, t in zip(products, times, strict=True)
                ]
                rows.append({**head, "pass": name, **medians(flops, times, ratios)})
                show(rows[-1])
        except Skip as reason:
            rows.append({**head, "skipped": str(reason), "wrong": isinstance(reason, Wrong)})
            show(rows[-1])
    return rows


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def peak_memory(case: Case, dtype: str, pass_name: str) -> Row:
    """Runs in a fresh process."""
    tiny = Case("tiny", 1, 1, (2,), 8, (1,))
    inputs, gradient = tensors_of(tiny, dtype)
    call_of(ours(tiny), inputs, gradient, pass_name)()

    inputs, gradient = tensors_of(case, dtype)
    call = call_of(ours(case), inputs, gradient, pass_name)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = resident("VmRSS")
    results = call()
    peak = resident("VmHWM") - before
    statistic = 8 if dtype == "float64" else 4
    needed = gradient.nbytes + case.batch * case.tokens * case.heads * statistic
    if pass_name != "forward":
        needed += sum(x.nbytes for x in results) + case.batch * case.tokens * case.heads * statistic
    return {
        "case": case.name,
        "dtype": dtype,
        "pass": pass_name,
        "input_bytes": sum(x.nbytes for x in inputs),
        "needed_bytes": needed,
        "peak_bytes": peak,
        "excess_bytes_per_thread": (peak - needed) // torch.get_num_threads(),
    }


def measure_memory(case: Case, dtype: str) -> list[Row]:
    # The allocator then returns what is freed, so that nothing old is used again unseen.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    rows = []
    for name in PASSES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(peak_memory, (case, dtype, name)))
        show(rows[-1])
    return rows


def show(row: Row) -> None:
    if "way" in row:
        cases.show(row)
    else:
        head = f"{row['case']:17} {row['dtype']:8}"
        needed, peak, excess = (
            row[name] / 2**20 for name in ("needed_bytes", "peak_bytes", "excess_bytes_per_thread")
        )
        print(
            f"{head} {row['pass']:16} needs {needed:7.2f} MiB, peak {peak:7.2f} MiB, "
            f"{excess:6.2f} MiB of excess per thread",
            flush=True,
        )


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--ways", nargs="+", choices=["all", *WAYS], default=["ours"])
    parser.add_argument("--others", action="store_const", dest="ways", const=["all"])
    parser.add_argument("--memory", action="store_true", help="instead of times")
    parser.add_argument("--from-json", type=Path, help="file to read the figures from")
    parser.add_argument("--plot", type=Path, nargs="?", const=PICTURE, help="picture to draw")
    args = parser.parse_args()
    if args.memory and args.plot:
        parser.error("--plot draws times, not memory")

    if args.from_json:
        figures = json.loads(args.from_json.read_text())
        for row in figures["rows"]:
            show(row)
    else:
        rows: list[Row] = []
        figures = {"machine": machine(), "rows": rows}
        print(*(f"{name}: {value}" for name, value in figures["machine"].items()), sep="\n")
        ways = list(WAYS) if "all" in args.ways else args.ways
        for case in cases_named(args.cases):
            for dtype in args.dtypes:
                if args.memory:
                    rows += measure_memory(case, dtype)
                else:
                    rows += time_case(case, dtype, ways, args.repeats)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    if args.plot:
        import chart

        chart.draw(figures["machine"], figures["rows"], args.plot)
    return int(any(row.get("wrong") for row in figures["rows"]))


if __name__ == "__main__":
    sys.exit(main())
