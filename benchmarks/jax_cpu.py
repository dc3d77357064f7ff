"""Times natten.jax inside jit beside the C++ library itself and JAX's attention, in one run.

    python benchmarks/jax_cpu.py                              # all cases, float32, and small calls
    python benchmarks/jax_cpu.py --ways cpp jit --repeats 31  # what jit costs on large calls
    python benchmarks/jax_cpu.py --calls                      # what it costs on small ones
    python benchmarks/jax_cpu.py --calls --threads 1          # the same on one thread
    python benchmarks/jax_cpu.py --cases 1d_8k_w127 --dtypes bfloat16 --json jax.json

Prints useful GFLOP/s, as cpu.py does, and in brackets how many times as fast as `cpp` a way is: the
median over rounds in which the two take turns. Before a way is timed, its results are compared with
those of `cpp`; one that computes something else is reported, not timed, and makes the exit status
1. PyTorch is not loaded, as its threads stay awake for a while and would disturb the others.

    cpp         the library called directly, on its own threads, with outputs that are there
                already; with backward, attention_forward and then attention_backward. It takes
                turns with itself: how far its ratio is from 1 is noise
    jit         natten.jax inside jit, on XLA's threads; with backward, its vjp
    dpa_mask    jax.nn.dot_product_attention with the neighborhood as a boolean mask, and a bias by
                pairs of tokens where the case has one
    dpa_local   the same with local_window_size: in 1-D, without dilation, stride or bias. Where a
                window would reach past an end it is clipped, while ours is shifted and stays full.
                So results are compared a window away from the ends; causal windows everywhere

For the last two XLA stores the scores of all pairs of tokens, two or three times over. They are
skipped where that is too much memory, and timed three times at most.

XLA takes memory for results from malloc at each call. Where glibc has returned that of earlier ones
to the system, the page faults are part of the time of `jit`: a few percent, and more in the first
calls. With MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=8000000000 in the environment
it keeps the memory.

Small calls are forward, on 16 tokens, one head of 8 channels and a window of 3x3. In the chains the
result of each call is the query of the next one:

    compute          what one problem more in a batch adds to a direct call, on one thread: next to
                     nothing is paid for the call
    C++ call         a direct call from Python, on numpy's arrays
    in jit           what one call more adds to a chain that jit unrolled
    in a loop        the same for a chain by lax.fori_loop
    overhead in jit  in jit, less compute
    jitted call      natten.jax.na2d from Python, waiting for the result
    jitted x * 2     the same for what JAX does in no time
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import (
    MAX_BYTES,
    PASSES,
    Array,
    Case,
    Row,
    Skip,
    Wrong,
    bias_index,
    cases_named,
    check,
    medians,
    parser_of,
    processor,
    seconds,
    sees,
    show,
)

import natten.jax
from natten import _core
from natten._args import make_config
from natten._roles import roles_of

Attention = Callable[..., jax.Array]  # query, key, value[, bias] -> output, all heads-last
Call = Callable[[], Sequence[Array]]  # a pass


def arrays_of(case: Case, dtype: str) -> tuple[list[jax.Array], jax.Array]:
    """The inputs and a gradient of the output, by `Case.shapes`. The same numbers every time."""
    random = np.random.default_rng(0)
    *inputs, gradient = (jnp.asarray(random.standard_normal(s), dtype) for s in case.shapes)
    return inputs, gradient


def zeros(shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jnp.zeros(shape, dtype).block_until_ready()


def direct(
    case: Case,
    inputs: Sequence[Array],
    gradient: Array,
    pass_name: str,
    allocate: Callable[[tuple[int, ...], str], Array] = zeros,
) -> Call:
    """Calls of the library, with outputs that `allocate` makes once. By default these are arrays of
    JAX, whose memory is written to: so alignment and pages are as in jit, and numpy has no
    bfloat16."""
    config = make_config(
        len(case.grid), case.kernel, case.dilation, case.is_causal, case.stride, case.boundary
    )

    def prepare(op: str, given: dict[str, Array], wanted: Sequence[str]) -> Callable[[], list]:
        sources, targets = roles_of(op)
        inputs = [given.get(role.name) for role in sources]
        asked = [role.name in wanted or None for role in targets]
        outputs = _core.run(op, config, None, "", inputs, asked, None, allocate)
        return lambda: _core.run(op, config, None, "", inputs, outputs)

    names = ["query", "key", "value", "rpb"][: len(inputs)]
    given = dict(zip(names, inputs, strict=True))
    if pass_name == "forward":
        forward = prepare("attention_forward", given, ["output"])
        return lambda: forward()[:1]
    forward = prepare("attention_forward", given, ["output", "logsumexp"])
    given |= {"logsumexp": forward()[1], "grad_output": gradient}
    backward = prepare("attention_backward", given, [f"grad_{name}" for name in names])

    def run() -> Sequence[Array]:
        forward()
        return backward()[: len(names)]

    return run


def ours(case: Case) -> Attention:
    function = getattr(natten.jax, f"na{len(case.grid)}d")

    def run(query: Array, key: Array, value: Array, bias: Array | None = None) -> jax.Array:
        return function(
            query,
            key,
            value,
            case.kernel,
            stride=case.stride,
            dilation=case.dilation,
            is_causal=case.is_causal,
            boundary=case.boundary,
            rpb=bias,
        )

    return run


def check_able(case: Case, inputs: Sequence[Array]) -> None:
    """Whether XLA's `dot_product_attention` can compute a case."""
    dtype = inputs[0].dtype.name
    if dtype == "float64":
        raise Skip("its softmax is in float32")
    if dtype == "float16":
        raise Skip("XLA has no product of float16 with float32 sums on CPUs")
    needed = 4 * case.batch * case.heads * case.tokens**2
    if needed > MAX_BYTES:
        raise Skip(f"the scores need {needed / 1e9:.1f} GB")


def dot_product(case: Case, *qkv: Array, **options: Any) -> jax.Array:
    flat = (x.reshape(case.batch, case.tokens, case.heads, case.head_dim) for x in qkv)
    return jax.nn.dot_product_attention(*flat, **options).reshape(qkv[0].shape)


def masked(case: Case, inputs: Sequence[Array]) -> Attention:
    check_able(case, inputs)
    token = np.arange(case.tokens, dtype=np.int32)
    mask = jnp.asarray(sees(case, token[:, None], token))
    if not case.has_bias:
        # Arrays of a Partial are arguments of what is compiled; constants would be folded.
        return jax.tree_util.Partial(
            lambda mask, *qkv: dot_product(case, *qkv, mask=mask[None, None]), mask
        )
    place = jnp.asarray(bias_index(case, token[:, None], token))
    return jax.tree_util.Partial(
        lambda mask, place, q, k, v, bias: dot_product(
            case, q, k, v, mask=mask[None, None], bias=bias.reshape(case.heads, -1)[None, :, place]
        ),
        mask,
        place,
    )


def local(case: Case, inputs: Sequence[Array]) -> Attention:
    if len(case.grid) > 1 or case.dilation > 1 or case.stride > 1 or case.has_bias:
        raise Skip("local_window_size is a plain window in 1-D")
    check_able(case, inputs)
    (kernel,) = case.kernel
    left = kernel - 1 if case.is_causal else kernel // 2
    return lambda *qkv: dot_product(
        case, *qkv, is_causal=case.is_causal, local_window_size=(left, kernel - 1 - left)
    )


def away_from_ends(case: Case, x: np.ndarray) -> np.ndarray:
    """Tokens, on the axis after the batch, whose output and gradients no shifted window changes."""
    return x if case.is_causal else x[:, case.kernel[0] : -case.kernel[0]]


def everywhere(case: Case, x: np.ndarray) -> np.ndarray:
    return x


def program(
    pass_name: str, attention: Attention, inputs: Sequence[Array], gradient: Array
) -> Sequence[jax.Array]:
    if pass_name == "forward":
        return [attention(*inputs)]
    return jax.vjp(attention, *inputs)[1](gradient)


def compiled(
    build: Callable[[Case, Sequence[Array]], Attention],
    case: Case,
    inputs: Sequence[Array],
    gradient: Array,
    pass_name: str,
) -> Call:
    run = jax.jit(partial(program, pass_name))
    arguments = jax.tree_util.Partial(build(case, inputs)), inputs, gradient
    return lambda: jax.block_until_ready(run(*arguments))


@dataclass(frozen=True)
class Way:
    build: Callable[[Case, Sequence[Array], Array, str], Call]
    compared: Callable[[Case, np.ndarray], np.ndarray] = everywhere
    repeats: int = 3  # at most


WAYS = {
    "cpp": Way(direct, repeats=sys.maxsize),
    "jit": Way(partial(compiled, lambda case, inputs: ours(case)), repeats=sys.maxsize),
    "dpa_mask": Way(partial(compiled, masked)),
    "dpa_local": Way(partial(compiled, local), away_from_ends),
}


def wide(arrays: Sequence[Array]) -> list[np.ndarray]:
    return [np.array(x, np.float64) for x in arrays]


def time_case(case: Case, dtype: str, ways: Sequence[str], repeats: int) -> list[Row]:
    rows = []
    inputs, gradient = arrays_of(case, dtype)
    cpp = {name: direct(case, inputs, gradient, name) for name in PASSES}
    references = {name: wide(call()) for name, call in cpp.items()}
    for way_name in ways:
        way = WAYS[way_name]
        head = {"case": case.name, "dtype": dtype, "way": way_name}
        try:
            for name, factor in PASSES.items():
                call = way.build(case, inputs, gradient, name)
                parts = [way.compared(case, x) for x in wide(call())]
                check(parts, [way.compared(case, x) for x in references[name]], dtype)
                turns = [
                    (seconds(cpp[name]), seconds(call)) for _ in range(min(repeats, way.repeats))
                ]
                times, ratios = [b for _, b in turns], [a / b for a, b in turns]
                figures = medians(factor * case.flops, times, ratios)
                rows.append({**head, "pass": name, **figures})
                show(rows[-1])
        except Skip as reason:
            rows.append({**head, "skipped": str(reason), "wrong": isinstance(reason, Wrong)})
            show(rows[-1])
    return rows


TINY = Case("tiny", 1, 1, (4, 4), 8, (3, 3))
LINKS = 100  # by which a long chain of calls, or a large batch, is longer than a short one
REPEATS = 100  # of a small call in a round


def time_calls(rounds: int) -> Row:
    """Microseconds of small calls, by the names in the docstring."""
    attention = ours(TINY)
    inputs, _ = arrays_of(TINY, "float32")

    def chain(links: int) -> Callable[..., jax.Array]:
        def run(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            for _ in range(links):
                query = attention(query, key, value)
            return query

        return jax.jit(run)

    def loop(links: int) -> Callable[..., jax.Array]:
        def run(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, links, lambda _, x: attention(x, key, value), query)

        return jax.jit(run)

    def repeated(run: Callable[[], object]) -> None:
        for _ in range(REPEATS):
            run()

    def on_one_thread(run: Callable[[], object]) -> None:
        threads = _core.num_threads()
        _core.set_num_threads(1)
        run()
        _core.set_num_threads(threads)

    def waiting(run: Callable[..., jax.Array], *arrays: jax.Array) -> Callable[[], object]:
        return lambda: run(*arrays).block_until_ready()

    def direct_from_numpy(case: Case) -> Call:
        """DLPack takes three times as long with JAX's arrays as with those of numpy."""
        inputs, gradient = jax.tree.map(np.asarray, arrays_of(case, "float32"))
        return direct(case, inputs, gradient, "forward", np.empty)

    compute = direct_from_numpy(replace(TINY, batch=1 + LINKS)), direct_from_numpy(TINY)
    # The longer and the shorter of two calls that differ by LINKS, or one call alone.
    variants: dict[str, list[Callable[[], object]]] = {
        "compute": [partial(on_one_thread, call) for call in compute],
        "C++ call": [direct_from_numpy(TINY)],
        "in jit": [waiting(chain(1 + LINKS), *inputs), waiting(chain(1), *inputs)],
        "in a loop": [waiting(loop(1 + LINKS), *inputs), waiting(loop(1), *inputs)],
        "jitted call": [waiting(chain(1), *inputs)],
        "jitted x * 2": [waiting(jax.jit(lambda x: x * 2), inputs[0])],
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(1 + rounds):
        for name, calls in variants.items():
            first, *second = [seconds(partial(repeated, run)) / REPEATS for run in calls]
            if turn > 0:  # the first one warms up
                times[name].append((first - second[0]) / LINKS if second else first)
    times["overhead in jit"] = [
        a - b for a, b in zip(times["in jit"], times["compute"], strict=True)
    ]
    return {name: round(1e6 * statistics.median(t), 2) for name, t in times.items()}


def machine() -> Row:
    variables = "NATTEN_CPU_ISA", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"
    return {
        "cpu": processor(),
        "jax": jax.__version__,
        "threads": _core.num_threads(),
        **{name: os.environ.get(name) for name in variables},
    }


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--calls", action="store_true", help="only small calls")
    parser.add_argument("--threads", type=int, default=_core.num_threads())
    args = parser.parse_args()
    _core.set_num_threads(args.threads)
    os.environ["NPROC"] = str(args.threads)  # XLA's pool has so many, if set before it starts
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", "float64" in args.dtypes)

    figures: dict[str, Any] = {"machine": machine(), "rows": []}
    print(*(f"{name}: {value}" for name, value in figures["machine"].items()), sep="\n")
    figures["calls"] = time_calls(args.repeats)
    print("small calls, microseconds:")
    print(*(f"    {name:15} {time:7.2f}" for name, time in figures["calls"].items()), sep="\n")
    if not args.calls:
        for case in cases_named(args.cases):
            for dtype in args.dtypes:
                figures["rows"] += time_case(case, dtype, args.ways, args.repeats)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    return int(any(row.get("wrong") for row in figures["rows"]))


if __name__ == "__main__":
    sys.exit(main())
