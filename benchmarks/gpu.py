"""Times neighborhood attention on a GPU beside other ways to compute it, in one run.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json --markdown gpu.md
    python benchmarks/gpu.py --quick                            # three cases, ours and flex
    python benchmarks/gpu.py --cases flux_na80 --ways ours flex --rounds 31
    python benchmarks/gpu.py --cases flux_na80 --ways ours ours_64_rows ours_keys
    python benchmarks/gpu.py --device cpu --tiny                # to try it; times mean nothing

Prints milliseconds, useful TFLOP/s (4 * batch * heads * tokens * window * head_dim for the forward
pass, 3.5 times that for forward and backward; what a mask throws away does not count), the share
of the ceiling, and how many times as fast as FlexAttention a way is. The ceiling is a matrix
product of 8192^3 of the same type, timed in turn with the others; float32 is computed without
TF32, where a case is not in tf32. All are timed by events of the GPU and figures are medians of
rounds in which all ways take turns; before each call 2 GB are written, which empties the caches and
gives Python time to enqueue the call.

    ours          natten, by the backend that the case names: fna or simt
    ours_64_rows  the same with blocks of 64 queries where it takes 128; forward only
    ours_keys     the same with `use_kv_parallelism_in_fused_na`, not deterministic; backward only
    flex          FlexAttention, compiled, tokens in row-major order
    sdpa_cudnn    scaled_dot_product_attention over all tokens, counted by the window; forward only
    sdpa_flash    the same by the other kernels

Before ours is timed, some of its results are compared with attention that is written out; those of
flex are compared with ours, gradients too. A way that computes something else is reported, not
timed, and makes the exit status 1; so does a failure of ours. Last come the targets that the
kernels were designed for, met or missed, which leave the status as it is. The figures are written
after each case.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from cases import PASSES, TOLERANCES, Case, Row, Skip, Wrong, case_named, medians, sees
from tensors import Attention, call_of, ours, tensors_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from ways import check, flex, full

import natten

Inputs = Sequence[Tensor]
Call = Callable[[], object]


@dataclass(frozen=True)
class Timed:
    case: Case
    precision: str = "bfloat16"  # an element type, or tf32: float32 where all may use TF32
    backend: str | None = "fna"
    milliseconds: float | None = None  # targets of ours, forward
    times_flex: float | None = None
    tflops: float | None = None
    narrow: tuple[int, ...] | None = None  # 64 queries, half of what ours takes


FLUX, HUNYUAN = (256, 256), (30, 48, 80)
ALL = [  # those with targets first, in case time runs out
    Timed(Case("1d_32k_w2048", 1, 1, (32768,), 128, (2048,)), milliseconds=0.12, narrow=(64,)),
    Timed(
        Case("flux_na80", 1, 24, FLUX, 128, (80, 80)),
        milliseconds=22,
        times_flex=1.4,
        narrow=(8, 8),
    ),
    Timed(
        Case("hunyuan_na", 1, 24, HUNYUAN, 128, (18, 24, 24)),
        milliseconds=80,
        times_flex=1.4,
        narrow=(4, 4, 4),
    ),
    Timed(Case("flux_na80s16", 1, 24, FLUX, 128, (80, 80), stride=16), milliseconds=17),
    Timed(case_named("2d_128_k13"), "float32", "simt", tflops=3),
    Timed(replace(case_named("2d_128_k13"), name="2d_128_k13_tf32"), "tf32"),
    Timed(Case("1d_32k_w2048s256", 1, 1, (32768,), 128, (2048,), stride=256)),
    Timed(Case("1d_32k_w2048s2048", 1, 1, (32768,), 128, (2048,), stride=2048)),
    Timed(Case("hunyuan_na_s16_8_8", 1, 24, HUNYUAN, 128, (18, 24, 24), stride=(16, 8, 8))),
]
QUICK = ("1d_32k_w2048", "flux_na80", "2d_128_k13")
TINY = [
    Timed(
        Case("1d_tiny", 1, 2, (64,), 16, (16,), stride=4),
        "float32",
        None,
        milliseconds=1e9,
        narrow=(64,),
    ),
    Timed(Case("3d_tiny", 1, 1, (4, 6, 5), 16, (3, 4, 4), stride=(2, 2, 1)), "tf32", None),
]


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Skip(f"took more than {seconds} s to prepare")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Clock:
    """Seconds that a call takes on a device."""

    def __init__(self, device: str) -> None:
        self.is_gpu = device != "cpu"
        self.flushed = torch.empty(2**31 if self.is_gpu else 1, dtype=torch.uint8, device=device)

    def __call__(self, call: Call) -> float:
        if not self.is_gpu:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def sdpa(backend: SDPBackend) -> Callable[[Case, Inputs], Attention]:
    def build(case: Case, inputs: Inputs) -> Attention:
        attend = full(case, inputs)

        def run(*qkv: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return attend(*qkv)

        return run

    return build


def key_parallel(attend: Attention) -> Attention:
    def run(*qkv: Tensor) -> Tensor:
        natten.use_kv_parallelism_in_fused_na(True)
        try:
            return attend(*qkv)
        finally:
            natten.use_kv_parallelism_in_fused_na(False)

    return run


def variant(way: str, timed: Timed, pass_name: str) -> Attention | None:
    """Ours in another way, for the cases and passes that have it."""
    if way == "ours_64_rows" and timed.narrow and pass_name == "forward":
        return ours(timed.case, timed.backend, q_tile_shape=timed.narrow)
    if way == "ours_keys" and timed.backend != "simt" and pass_name != "forward":
        return key_parallel(ours(timed.case, timed.backend))
    return None


VARIANTS = ("ours_64_rows", "ours_keys")
# Each with its passes. What sdpa computes is checked by `full`.
OTHERS = {
    "flex": (flex, tuple(PASSES)),
    "sdpa_cudnn": (sdpa(SDPBackend.CUDNN_ATTENTION), ("forward",)),
    "sdpa_flash": (sdpa(SDPBackend.FLASH_ATTENTION), ("forward",)),
}


def spot_check(case: Case, precision: str, inputs: Inputs, output: Tensor) -> None:
    """Compares the results of some tokens with attention as it is defined."""
    generator = torch.Generator().manual_seed(1)
    some = torch.randint(case.tokens, (32,), generator=generator).to(output.device)
    mask = sees(case, some[:, None], torch.arange(case.tokens, device=output.device))
    query, key, value, result = (x.detach()[0].flatten(0, -3) for x in (*inputs, output))
    worst = 0.0
    for head in range(case.heads):
        q, k, v = query[some, head].double(), key[:, head].double(), value[:, head].double()
        scores = (q @ k.T * case.head_dim**-0.5).masked_fill(~mask, -torch.inf)
        want = scores.softmax(-1) @ v
        error = torch.linalg.norm(result[some, head].double() - want) / torch.linalg.norm(want)
        worst = max(worst, error.item())
    if not worst < TOLERANCES[precision]:
        raise Wrong(f"WRONG: differs from attention written out by {worst:.1e}")


def time_pass(
    timed: Timed, ways: list[str], pass_name: str, clock: Clock, rounds: int, limit: int
) -> Iterator[Row]:
    case, precision, device = timed.case, timed.precision, clock.flushed.device
    is_tf32 = precision == "tf32"
    natten.use_tf32_in_gemm_na(is_tf32)
    torch.backends.cuda.matmul.allow_tf32 = is_tf32
    dtype = "float32" if is_tf32 else precision
    inputs, gradient = tensors_of(case, dtype, device)
    if pass_name == "forward":
        inputs = [x.detach() for x in inputs]
    head = {"case": case.name, "dtype": precision, "pass": pass_name}
    # Other ways are compared with ours, so it is there in any case.
    calls: dict[str, Call] = {
        "ours": call_of(ours(case, timed.backend), inputs, gradient, pass_name)
    }
    try:
        references = calls["ours"]()
        if pass_name == "forward":
            spot_check(case, precision, inputs, references[0])
    except Exception as error:
        yield {**skipped({**head, "way": "ours"}, error), "wrong": True}
        return
    for way in [name for name in VARIANTS if name in ways]:
        attend = variant(way, timed, pass_name)
        if attend is None:
            continue
        try:
            call = call_of(attend, inputs, gradient, pass_name)
            check(call(), references, precision)
            calls[way] = call
        except Exception as error:
            yield {**skipped({**head, "way": way}, error), "wrong": True}
    for way in [name for name in OTHERS if name in ways]:
        build, passes = OTHERS[way]
        if pass_name not in passes:
            continue
        try:
            with time_limit(limit):
                call = call_of(build(case, inputs), inputs, gradient, pass_name)
                results = call()
                if way == "flex":
                    check(results, references, precision)
                calls[way] = call
        except Exception as error:
            yield skipped({**head, "way": way}, error)
        results = None
    del references

    size = 8192 if clock.is_gpu else 64
    square = torch.randn(size, size, dtype=getattr(torch, dtype), device=device)
    calls["product"] = lambda: square @ square
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    first = time.perf_counter()
    for i in range(rounds):
        for name, call in calls.items():
            times[name].append(clock(call))
        if i >= 2 and time.perf_counter() - first > limit:
            break
    flops = PASSES[pass_name] * case.flops
    for name in [name for name in calls if name != "product"]:
        pairs = list(zip(times["product"], times[name], strict=True))
        row = medians(flops, times[name], [flops / (2 * size**3) * p / t for p, t in pairs])
        row["rounds"] = len(times[name])
        if "flex" in calls:
            row["times_flex"] = round(
                statistics.median(f / t for f, t in zip(times["flex"], times[name], strict=True)), 3
            )
        yield {**head, "way": name, **row}
    yield {**head, "way": "product", **medians(2 * size**3, times["product"], [1.0])}


def skipped(head: Row, error: Exception) -> Row:
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
    text = str(error).strip() or type(error).__name__
    return {**head, "skipped": text.splitlines()[0][:200], "wrong": isinstance(error, Wrong)}


def verdicts(all_timed: Sequence[Timed], rows: Sequence[Row]) -> list[Row]:
    """The targets, of ours and forward."""
    found = []
    for timed in all_timed:
        row = next(
            (
                row
                for row in rows
                if (row["case"], row["pass"], row["way"]) == (timed.case.name, "forward", "ours")
            ),
            {},
        )
        tflops = row["gflops"] / 1e3 if "gflops" in row else None
        for what, target, got, is_upper in (
            ("milliseconds", timed.milliseconds, row.get("milliseconds"), True),
            ("times as fast as flex", timed.times_flex, row.get("times_flex"), False),
            ("useful TFLOP/s", timed.tflops, tflops, False),
        ):
            if target is not None:
                met = None if got is None else got <= target if is_upper else got >= target
                found.append(
                    {
                        "case": timed.case.name,
                        "what": what,
                        "target": target,
                        "got": got,
                        "met": met,
                    }
                )
    return found


COLUMNS = ("case", "dtype", "pass", "way", "ms", "useful TFLOP/s", "of the ceiling", "x flex")


def cells(row: Row) -> list[str]:
    named = [row[name] for name in ("case", "dtype", "pass", "way")]
    if "skipped" in row:
        return [*named, "skipped: " + row["skipped"].replace("|", "/"), "", "", ""]
    times_flex = f"{row['times_flex']:.2f}" if "times_flex" in row else "-"
    return [
        *named,
        f"{row['milliseconds']:.3f}",
        f"{row['gflops'] / 1e3:.1f}",
        f"{row['ratio']:.3f}",
        times_flex,
    ]


def markdown(figures: Row) -> str:
    verdict = {True: "met", False: "missed", None: "not measured"}
    lines = [f"- {name}: {value}" for name, value in figures["machine"].items()]
    lines += ["", *table(COLUMNS, map(cells, figures["rows"]))]
    targets = [
        [t["case"], t["what"], str(t["target"]), str(t["got"]), verdict[t["met"]]]
        for t in figures["targets"]
    ]
    lines += ["", *table(("case", "target of", "target", "measured", ""), targets), ""]
    return "\n".join(lines)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]] | Iterator[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]


def machine(device: str) -> Row:
    found: Row = {"torch": torch.__version__}
    if device != "cpu":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=[t.case.name for t in ALL], metavar="CASE")
    parser.add_argument(
        "--ways", nargs="+", choices=["ours", *VARIANTS, *OTHERS], default=["ours", *OTHERS]
    )
    parser.add_argument("--passes", nargs="+", choices=list(PASSES), default=list(PASSES))
    parser.add_argument("--rounds", type=int, default=15, help="the median is reported")
    parser.add_argument(
        "--limit", type=int, default=60, help="seconds to prepare a way, or to time"
    )
    parser.add_argument("--budget", type=int, default=3600, help="seconds; later cases are skipped")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)}; ours and flex")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny problems instead")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--markdown", type=Path, help="file to write tables to")
    args = parser.parse_args()
    if args.quick:
        args.cases, args.ways, args.rounds = args.cases or QUICK, ["ours", "flex"], 7
    chosen = TINY if args.tiny else [t for t in ALL if not args.cases or t.case.name in args.cases]

    rows: list[Row] = []
    figures: Row = {"machine": machine(args.device), "rows": rows, "targets": []}
    print(*(f"{name}: {value}" for name, value in figures["machine"].items()), sep="\n")
    clock = Clock(args.device)
    start = time.perf_counter()
    for timed in chosen:
        if time.perf_counter() - start > args.budget:
            rows.append(
                {"case": timed.case.name, "dtype": timed.precision, "pass": "", "way": "ours",
                 "skipped": "no time left"}
            )  # fmt: skip
            print(*(f"{cell:18}" for cell in cells(rows[-1])), flush=True)
            continue
        for pass_name in args.passes:
            for row in time_pass(timed, args.ways, pass_name, clock, args.rounds, args.limit):
                rows.append(row)
                print(*(f"{cell:18}" for cell in cells(row)), flush=True)
        figures["targets"] = verdicts(chosen, rows)
        if args.json:
            args.json.write_text(json.dumps(figures, indent=1))
        if args.markdown:
            args.markdown.write_text(markdown(figures))
    for line in markdown({**figures, "rows": []}).splitlines()[-len(figures["targets"]) - 2 :]:
        print(line)
    return int(any(row.get("wrong") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
