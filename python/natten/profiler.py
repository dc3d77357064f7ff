"""Times neighborhood attention on this machine: `python -m natten.profiler`.

    python -m natten.profiler -i 64 64 -w 7 7 -n 8 -d 64
    python -m natten.profiler -i 16 32 32 -w 5 7 7 -s 1 2 2 -n 4 --dtype bf16 --backprop --peers
    python -m natten.profiler -i 256 256 -w 80 80 -n 24 -d 128 --dtype fp16 --dry-run

Options are those of NATTEN's profiler, and some more. Runs on a CUDA device where there is one that
natten has kernels for, else on the CPU; by PyTorch where that is installed, else by JAX or numpy.
docs/profiling.md says how to read what it prints.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from natten import _core, context
from natten._kernel import COMPOSED, check_name, chosen_backend
from natten._simulate import GPUS, Layer, duration, make_layer, quantity, simulate
from natten.simulator import add_problem, pyplot, save, table, text_of, window_of

__all__ = ["main", "parser"]

FRAMEWORKS = ("torch", "jax", "numpy")
SDPA = {"cudnn": "CUDNN_ATTENTION", "fav2": "FLASH_ATTENTION", "xformers": "EFFICIENT_ATTENTION"}
PEERS = ("flex", "sdpa, mask", "sdpa, all tokens")
OPS = {"forward": "attention_forward", "backward": "attention_backward"}
# The side of the matrices of the product that is timed beside.
PRODUCT, PRODUCT_ON_GPU = 2048, 8192
SECONDS = 1.0  # after which a row is not timed again, nor warmed up further
Run = Callable[[], Any]


class Refused(Exception):
    """What cannot be timed, and why."""


@dataclass(frozen=True)
class Problem:
    layer: Layer
    additional: int
    device: str

    @property
    def flops(self) -> dict[str, float]:
        """By pass, of pairs of a query and a key that it sees."""
        layer = self.layer
        pairs = 1.0
        for queries, _ in _core.windows(layer.config(), layer.grid, layer.grid):
            pairs *= sum(end - begin for *_, begin, end in queries)
        pairs += math.prod(layer.grid) * self.additional
        pairs *= layer.batch * layer.heads
        d, dv = layer.head_dim, layer.value_dim
        return {"forward": 2 * pairs * (d + dv), "backward": 2 * pairs * (3 * d + 2 * dv)}


@dataclass(frozen=True)
class Choice:
    """A backend and its tiles, for one pass."""

    backend: str = ""
    q_tile: tuple[int, ...] | None = None
    kv_tile: tuple[int, ...] | None = None

    def __str__(self) -> str:
        tiles = [f"{text_of(t)}" if t else "default" for t in (self.q_tile, self.kv_tile)]
        return self.backend + (f" {' / '.join(tiles)}" if self.q_tile or self.kv_tile else "")

    def options(self, pass_name: str) -> dict[str, Any]:
        """Arguments of `na1d`, `na2d` and `na3d`."""
        prefix = "backward_" if pass_name == "backward" else ""
        tiles = {"q_tile_shape": self.q_tile, "kv_tile_shape": self.kv_tile}
        return {prefix + name: tile for name, tile in tiles.items() if tile}


@dataclass(frozen=True)
class Timing:
    """A row of the table."""

    pass_name: str
    backend: str
    seconds: float = 0.0
    flops_per_second: float = 0.0  # of useful ones
    of_product: float = 0.0  # of the matrix product's FLOP/s
    predicted: float | None = None
    refusal: str = ""


@dataclass
class Framework:
    """The tensors of a problem in a framework. `attend(choices)` returns what runs each pass."""

    name: str
    attend: Callable[[dict[str, Choice], bool], dict[str, Run]]
    product: Run
    product_flops: float
    wait: Run = field(default=lambda: None)  # for the device
    peers: dict[str, Callable[[bool], dict[str, Run]]] = field(default_factory=dict)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _function(module: Any, rank: int) -> Any:
    return getattr(module, f"na{rank}d")


def _torch(problem: Problem) -> Framework:
    import torch

    import natten.functional as F

    layer = problem.layer
    dtype = getattr(torch, layer.dtype)
    torch.manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=problem.device)

    inputs = [
        tensor(layer.batch, *layer.grid, heads, dim).requires_grad_()
        for heads, dim in (
            (layer.heads, layer.head_dim),
            (layer.kv_heads, layer.head_dim),
            (layer.kv_heads, layer.value_dim),
        )
    ]
    gradient = tensor(layer.batch, *layer.grid, layer.heads, layer.value_dim)
    extra: dict[str, Any] = {}
    if problem.additional:
        for name, dim in (("keys", layer.head_dim), ("values", layer.value_dim)):
            extra[f"additional_{name}"] = tensor(
                layer.batch, problem.additional, layer.kv_heads, dim
            ).requires_grad_()
    wanted = [*inputs, *extra.values()]

    def passes(call: Callable[..., torch.Tensor], backward: bool) -> dict[str, Run]:
        def forward() -> torch.Tensor:
            with torch.no_grad():
                return call(*inputs)

        if not backward:
            return {"forward": forward}
        output = call(*inputs)
        grads = gradient.reshape(output.shape)
        return {
            "forward": forward,
            "backward": lambda: torch.autograd.grad(
                output, wanted if output.ndim == gradient.ndim else inputs, grads, retain_graph=True
            ),
        }

    def attend(choices: dict[str, Choice], backward: bool) -> dict[str, Run]:
        options: dict[str, Any] = {**layer.window, **extra}
        for name, choice in choices.items():
            options.update(choice.options(name))
        options["backend"] = choices["forward"].backend or None
        kernel_size = options.pop("kernel_size")
        function = _function(F, layer.rank)
        return passes(lambda q, k, v: function(q, k, v, kernel_size, **options), backward)

    from natten import _peers

    peers = {} if problem.additional else _peers.ways(layer, problem.device, passes)
    on_gpu = problem.device.startswith("cuda")
    side = PRODUCT_ON_GPU if on_gpu else PRODUCT
    kind = dtype if on_gpu else torch.float32
    square = torch.randn(side, side, dtype=kind, device=problem.device)
    return Framework(
        "torch",
        attend,
        lambda: square @ square,
        2.0 * side**3,
        torch.cuda.synchronize if on_gpu else (lambda: None),
        peers,
    )


def _jax(problem: Problem) -> Framework:
    import jax
    import jax.numpy as jnp

    import natten.jax

    layer = problem.layer
    if layer.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    key = jax.random.key(0)

    def array(*shape: int) -> Any:
        return jax.random.normal(key, shape, dtype=jnp.dtype(layer.dtype))

    inputs = [
        array(layer.batch, *layer.grid, heads, dim)
        for heads, dim in (
            (layer.heads, layer.head_dim),
            (layer.kv_heads, layer.head_dim),
            (layer.kv_heads, layer.value_dim),
        )
    ]
    gradient = array(layer.batch, *layer.grid, layer.heads, layer.value_dim)
    names = [f"additional_{x}" for x in ("keys", "values") if problem.additional]
    inputs += [
        array(layer.batch, problem.additional, layer.kv_heads, dim)
        for dim in (layer.head_dim, layer.value_dim)[: len(names)]
    ]

    def attend(choices: dict[str, Choice], backward: bool) -> dict[str, Run]:
        options: dict[str, Any] = dict(layer.window)
        for name, choice in choices.items():
            options.update(choice.options(name))
        options["backend"] = choices["forward"].backend or None
        kernel_size = options.pop("kernel_size")
        function = _function(natten.jax, layer.rank)

        def call(q: Any, k: Any, v: Any, *more: Any) -> Any:
            return function(q, k, v, kernel_size, **options, **dict(zip(names, more, strict=True)))

        compiled = jax.jit(call)
        runs = {"forward": lambda: jax.block_until_ready(compiled(*inputs))}
        if backward:
            _, pull = jax.vjp(call, *inputs)
            back = jax.jit(lambda f, g: f(g))
            runs["backward"] = lambda: jax.block_until_ready(back(pull, gradient))
        return runs

    square = jax.random.normal(key, (PRODUCT, PRODUCT), dtype=jnp.float32)
    multiply = jax.jit(lambda x: x @ x)
    return Framework(
        "jax", attend, lambda: jax.block_until_ready(multiply(square)), 2.0 * PRODUCT**3
    )


def _numpy(problem: Problem) -> Framework:
    import numpy as np

    layer = problem.layer
    if layer.dtype == "bfloat16":
        raise Refused("dtype: numpy has no bfloat16; PyTorch or JAX has to be installed for it")
    rng = np.random.default_rng(0)

    def attend(choices: dict[str, Choice], backward: bool) -> dict[str, Run]:
        runs: dict[str, Run] = {}
        for name in list(OPS)[: 2 if backward else 1]:
            lists = layer.tensors(OPS[name], layer.grid, layer.grid, ("grad_logsumexp",))
            inputs, outputs = (
                [None if x is None else rng.standard_normal(x[0]).astype(x[1]) for x in given]
                for given in lists
            )
            config = layer.config(**choices[name].options(name))
            runs[name] = functools.partial(
                _core.run, OPS[name], config, None, choices[name].backend, inputs, outputs
            )
        return runs

    if problem.additional:
        raise Refused("--add-kv: needs PyTorch or JAX")
    square = rng.standard_normal((PRODUCT, PRODUCT)).astype("float32")
    return Framework("numpy", attend, lambda: square @ square, 2.0 * PRODUCT**3)


_MAKERS = {"torch": _torch, "jax": _jax, "numpy": _numpy}


def seconds_of(run: Run, wait: Run) -> float:
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def repeat(run: Run, framework: Framework, most: int) -> list[float]:
    times: list[float] = []
    while len(times) < most and (len(times) < 1 or sum(times) < SECONDS):
        times.append(seconds_of(run, framework.wait))
    return times


def time_pass(run: Run, framework: Framework, warmup: int, steps: int) -> tuple[float, float]:
    """Seconds of a run, and those of the matrix product in turn with it; medians."""
    if warmup:
        repeat(run, framework, warmup)
    products: list[float] = []
    times: list[float] = []
    while len(times) < steps and (len(times) < 3 or sum(times) < SECONDS):
        products.append(seconds_of(framework.product, framework.wait))
        times.append(seconds_of(run, framework.wait))
    return statistics.median(times), statistics.median(products)


def answers(problem: Problem, pass_name: str, choice: Choice) -> list[tuple[str, str, bool]]:
    """What each backend says of a pass: name, why it refuses or "", whether it runs."""
    layer, op = problem.layer, OPS[pass_name]
    sizes = layer.tensors(op, layer.grid, layer.grid, ("grad_logsumexp",))
    config = layer.config(**choice.options(pass_name))
    return _core.explain(op, config, None, choice.backend, sizes[0], problem.device, sizes[1])


def tiles_of(problem: Problem, pass_name: str, backend: str) -> list[Choice]:
    """The pairs of tiles that a backend takes; none where it has no use for them."""
    rank = problem.layer.rank

    def takes(q: Any, kv: Any) -> bool:
        try:
            rows = answers(problem, pass_name, Choice(backend, q, kv))
        except ValueError:
            return False
        return any(name == backend and not refusal for name, refusal, _ in rows)

    # No kernel for tiles has such; those without only check that it is positive.
    if takes((3,) * rank, None):
        return []
    shapes = [
        tuple(1 << b for b in bits)
        for bits in itertools.product(range(10), repeat=rank)
        if 3 <= sum(bits) <= 9
    ]
    q = [shape for shape in shapes if takes(shape, None)]
    kv = [shape for shape in shapes if takes(None, shape)]
    return [Choice(backend, *pair) for pair in itertools.product(q, kv)]


def backends_of(problem: Problem, pass_name: str, given: Choice) -> list[str]:
    """All that may run a pass, the default first."""
    if given.backend:
        return [given.backend]
    rows = answers(problem, pass_name, Choice())
    return [name for name, refusal, _ in rows if not refusal and name != "naive"]


def configuration_of(problem: Problem, pass_name: str, choice: Choice) -> str:
    """How the tuner has a pass cut; empty where that is the backend's own way."""
    if choice.backend == COMPOSED:  # of which libnatten knows nothing
        return ""
    layer, op = problem.layer, OPS[pass_name]
    sizes = layer.tensors(op, layer.grid, layer.grid, ("grad_logsumexp",))
    config = layer.config(**choice.options(pass_name))
    text, _ = _core.tuned(op, config, None, choice.backend, sizes[0], problem.device, sizes[1])
    return "" if text == "default" else text


def prediction(problem: Problem, choice: Choice, pass_name: str) -> float | None:
    """What `natten.simulate` says of a pass, where it knows the device and counts the backend."""
    layer = problem.layer
    if problem.device == "cpu":
        device = "cpu" if choice.backend in ("", "fused", "vectorized") else None
    else:
        import torch

        name = torch.cuda.get_device_name(problem.device).lower().replace("h200", "h100")
        device = next((gpu for gpu in GPUS if gpu in name), None)
        if choice.backend not in ("", "fused", "fna"):
            device = None
    if device is None or problem.additional:
        return None
    tiles: dict[str, Any] = (
        {} if device == "cpu" else {"q_tile_shape": choice.q_tile, "kv_tile_shape": choice.kv_tile}
    )
    window: dict[str, Any] = dict(layer.window)
    result = simulate(
        layer.grid, window.pop("kernel_size"), **window, batch=layer.batch, heads=layer.heads,
        kv_heads=layer.kv_heads, head_dim=layer.head_dim, value_dim=layer.value_dim,
        dtype=layer.dtype, backward=pass_name == "backward", device=device, **tiles,
    )  # fmt: skip
    of_pass = result.passes if pass_name == "forward" else result.passes[1:]
    return sum(p.seconds for p in of_pass)


def time_choices(
    problem: Problem,
    framework: Framework,
    choices: dict[str, Choice],
    args: argparse.Namespace,
    warmup: int,
    predicts: bool,
) -> list[Timing]:
    runs = framework.attend(choices, "backward" in choices)
    rows = []
    for name, run in runs.items():
        choice = choices[name]
        named = choice if choice.backend not in ("", "fused") else _named(problem, name, choice)
        label = f"{named} {configuration_of(problem, name, named)}".rstrip()
        seconds, product = time_pass(run, framework, warmup, args.steps)
        rate = problem.flops[name] / seconds
        predicted = prediction(problem, choice, name) if predicts else None
        share = rate / (framework.product_flops / product)
        rows.append(Timing(name, label, seconds, rate, share, predicted))
    return rows


def time_alone(
    pass_name: str,
    name: str,
    run: Run,
    problem: Problem,
    framework: Framework,
    options: argparse.Namespace | PeerOptions,
) -> Timing:
    """Of a pass that is not natten's."""
    seconds, product = time_pass(run, framework, options.warmup_steps, options.steps)
    rate = problem.flops[pass_name] / seconds
    return Timing(pass_name, name, seconds, rate, rate / (framework.product_flops / product))


def _named(problem: Problem, pass_name: str, choice: Choice) -> Choice:
    """The choice with the name of the backend that runs it."""
    for name, _, is_chosen in answers(problem, pass_name, choice):
        if is_chosen:
            return Choice(name, choice.q_tile, choice.kv_tile)
    return choice


class PeerOptions(NamedTuple):
    """Of the command line, for the process that times peers."""

    backprop: bool
    warmup_steps: int
    steps: int
    threads: int


def time_peer(
    name: str, framework: Framework, problem: Problem, options: PeerOptions
) -> Iterator[Timing]:
    """A row for each pass of a peer, or one that says why there is none."""
    try:
        runs = framework.peers[name](options.backprop)
        for run in runs.values():
            run()  # compiles
    except Exception as error:  # whatever a compiler of theirs raises
        yield Timing("forward", name, refusal=f"not timed: {_first_line(error)[:120]}")
        return
    for pass_name, run in runs.items():
        yield time_alone(pass_name, name, run, problem, framework, options)
    if options.backprop and "backward" not in runs:
        yield Timing("backward", name, refusal="not timed: has no backward pass on a CPU")


def _send_peers(
    names: Sequence[str], problem: Problem, options: PeerOptions, to: Connection
) -> None:
    """Sends the rows of each peer, and None after them."""
    # So that no compiler outlives this process where it is ended.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    import torch

    torch.set_num_threads(options.threads)
    framework = _torch(problem)
    for name in names:
        for row in time_peer(name, framework, problem, options):
            to.send(row)
        to.send(None)


def _receive_peers(
    names: list[str], seconds: float, child: BaseProcess, from_child: Connection
) -> Iterator[Timing]:
    """Rows that a process sends, and why it stopped short. Takes off `names` what is done."""
    pass_name = "forward"
    end = time.monotonic() + seconds
    while names:
        why = ""
        try:
            if not from_child.poll(max(end - time.monotonic(), 0.0)):
                why = f"took more than {seconds:g} s (--peer-seconds)"
            elif row := from_child.recv():
                yield row
                pass_name = "backward"
                continue
        except EOFError:
            child.join()
            why = f"its process ended, with {child.exitcode}"
        name = names.pop(0)
        if why:
            yield Timing(pass_name, name, refusal=f"not timed: {why}")
            return
        pass_name = "forward"
        end = time.monotonic() + seconds


def time_peers(problem: Problem, framework: Framework, args: argparse.Namespace) -> list[Timing]:
    """In a process of their own, which can be ended where a compiler, or all pairs of tokens, take
    too long."""
    if not framework.peers:
        why = (
            "additional tokens" if problem.additional else f"are PyTorch's, not {framework.name}'s"
        )
        return [Timing("forward", "peers", refusal=f"not timed: {why}")]
    import torch

    options = PeerOptions(args.backprop, args.warmup_steps, args.steps, torch.get_num_threads())
    spawn = multiprocessing.get_context("spawn")
    rows: list[Timing] = []
    names = list(PEERS)
    while names:
        from_child, to_parent = spawn.Pipe(duplex=False)
        child = spawn.Process(target=_send_peers, args=(names, problem, options, to_parent))
        child.start()
        to_parent.close()
        try:
            rows += _receive_peers(names, args.peer_seconds, child, from_child)
        finally:
            child.terminate()
            child.join(5)
            child.kill()
            child.join()
    return rows


def show(rows: Sequence[Timing]) -> None:
    cells = [["pass", "backend", "time", "useful", "of product", "predicted"]]
    for r in rows:
        if r.refusal:
            cells.append([r.pass_name, f"{r.backend}: {r.refusal}"])
            continue
        cells.append(
            [
                r.pass_name,
                r.backend,
                duration(r.seconds),
                f"{quantity(r.flops_per_second)}FLOP/s",
                f"{100 * r.of_product:.1f} %",
                "-" if r.predicted is None else duration(r.predicted),
            ]
        )
    print(table(cells))


def dry_run(problem: Problem, args: argparse.Namespace) -> None:
    """What could be timed."""
    for pass_name in list(OPS)[: 2 if args.backprop else 1]:
        rows = answers(problem, pass_name, Choice())
        if not rows:
            print(f"{pass_name} pass: libnatten is built without kernels for {problem.device}")
        for name, refusal, is_chosen in rows:
            state = f"no: {refusal}" if refusal else "the default" if is_chosen else "yes"
            print(f"{pass_name} pass, {name}: {state}")
            configs = [] if refusal else tiles_of(problem, pass_name, name)
            most = args.max_configs or len(configs)
            for config in configs[:most]:
                print(f"  --q-tile {text_of(config.q_tile)} --kv-tile {text_of(config.kv_tile)}")
            if len(configs) > most:
                print(f"  {len(configs) - most} more; --max-configs 0 shows all")


@contextlib.contextmanager
def tuner() -> Iterator[Callable[[str], None]]:
    """Gives what sets the tuner's mode; afterwards it is what it was."""
    before = (*_core.tuning()[:2], context._switches.tuning)

    def use(mode: str) -> None:
        _core.set_tuning(mode, mode)
        context._switches.tuning = True

    try:
        yield use
    finally:
        _core.set_tuning(*before[:2])
        context._switches.tuning = before[2]


def optimize(
    problem: Problem,
    framework: Framework,
    given: dict[str, Choice],
    args: argparse.Namespace,
    use: Callable[[str], None],
) -> dict[str, Choice]:
    """The fastest backend of each pass, as libnatten's tuner has it run, whose choices later calls
    read."""
    limits = (args.optimize_warmup_steps, 5, 2.0, False)
    _core.set_tuning(forward_limits=limits, backward_limits=limits)
    best = dict(given)
    for pass_name in given:
        backends = backends_of(problem, pass_name, best[pass_name])
        if not backends:
            print(f"{pass_name} pass: no fused backend")
        timed = []
        for backend in backends:
            choice = replace(given[pass_name], backend=backend)
            trial = {**best, pass_name: choice}
            if pass_name == "forward" and "backward" in trial:
                trial["backward"] = replace(given["backward"], backend=backend)
            use("tune")
            run = framework.attend(trial, pass_name == "backward")[pass_name]
            run()
            use("read")
            seconds, _ = time_pass(run, framework, args.optimize_warmup_steps, args.steps)
            timed.append((seconds, choice))
            cut = configuration_of(problem, pass_name, choice) or "default"
            print(f"{pass_name} pass: {duration(seconds)}, {choice}: {cut}")
        if timed:
            best[pass_name] = min(timed, key=lambda row: row[0])[1]
        if pass_name == "forward" and "backward" in best:
            # It is run by the backend of the forward pass.
            best["backward"] = replace(given["backward"], backend=best["forward"].backend)
    return best


def plot(rows: Sequence[Timing], title: str, path: Path) -> None:
    """Useful FLOP/s of each row."""
    plt = pyplot()
    done = [r for r in rows if not r.refusal]
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.4 * len(done)), layout="constrained")
    labels = [f"{r.pass_name}, {r.backend}" for r in done]
    axes.barh(labels, [r.flops_per_second / 1e9 for r in done], color="#3182bd")
    axes.invert_yaxis()
    axes.set_xlabel("useful GFLOP/s")
    axes.set_title(title, fontsize=10)
    save(figure, axes, path)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m natten.profiler",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_problem(result, "fp16")
    add = result.add_argument
    add("--backward-q-tile", type=int, nargs="+", help="as --q-tile, of the backward pass")
    add("--backward-kv-tile", type=int, nargs="+", help="as --kv-tile, of the backward pass")
    add("--add-kv", type=int, default=0, help="additional tokens")
    add("--backend", default="", help="one of natten's, or cudnn, fav2, xformers: PyTorch's own")
    add("--dry-run", action="store_true", help="lists backends and tiles, and runs nothing")
    add("--max-configs", type=int, default=10, help="how many of these are listed; 0: all")
    add(
        "--optimize",
        action="store_true",
        help="has the tuner choose, and takes the fastest backend",
    )
    add("--warmup-steps", type=int, default=10)
    add("--optimize-warmup-steps", type=int, default=5)
    add("--steps", type=int, default=20, help="timed runs, fewer where they take seconds")
    add("--peers", action="store_true", help="FlexAttention and PyTorch's attention beside")
    add("--peer-seconds", type=float, default=120.0, help="that each of these may take at most")
    add("--device", help="cpu, cuda, cuda:1; default: cuda where natten has kernels for it")
    add("--framework", choices=FRAMEWORKS, help="default: the first of these that is installed")
    add("--no-prediction", action="store_true", help="does not ask the simulator")
    add("--json", type=Path, metavar="FILE", help="writes all figures")
    add("--plot", type=Path, metavar="FILE", help="draws the table; needs matplotlib")
    for name in ("--fmha-backend", "--schedule"):
        add(name, help=argparse.SUPPRESS)  # NATTEN's, without effect
    for name in ("--persistent", "--compile", "--try-fuse-add-kv"):
        add(name, action="store_true", help=argparse.SUPPRESS)
    return result


def _tile(values: list[int] | None) -> tuple[int, ...] | None:
    return tuple(values) if values else None


def _problem(args: argparse.Namespace) -> tuple[Problem, str]:
    """The problem, and the framework that runs it."""
    found = (name for name in FRAMEWORKS if importlib.util.find_spec(name))
    framework = args.framework or next(found, None)
    if framework is None or importlib.util.find_spec(framework) is None:
        raise Refused(f"{framework or 'numpy'} is not installed")
    device = args.device
    if device is None:
        has_gpu = framework == "torch" and "fna" in _core.backends("cuda")
        device = "cuda:0" if has_gpu and _core.compute_capability() >= 80 else "cpu"
    if device != "cpu" and framework != "torch":
        raise Refused(f"--device: got {device}; only PyTorch's tensors are timed there")
    if device != "cpu" and not args.dry_run:
        import torch

        try:
            torch.empty(0, device=device)
        except Exception as error:  # no such device, or none that PyTorch is built for
            raise Refused(f"--device: got {device}; {_first_line(error)}") from None
    window = window_of(args)
    layer = make_layer(
        tuple(args.input_size), window["kernel_size"], window["stride"], window["dilation"],
        window["is_causal"], window["boundary"], args.batch_size, args.heads, args.dim,
        args.dtype, args.heads_kv, args.dim_value,
    )  # fmt: skip
    if args.add_kv < 0:
        raise ValueError(f"--add-kv: got {args.add_kv}; must be at least 0")
    return Problem(layer, args.add_kv, device), framework


def profile(args: argparse.Namespace) -> int:
    problem, name = _problem(args)
    if args.optimize and name == "jax":
        raise Refused(
            "--optimize: calls of JAX are not timed by the tuner; must be without, or "
            "with --framework torch or numpy"
        )
    layer = problem.layer
    if args.dry_run:
        dry_run(problem, args)
        return 0
    if name == "torch" and problem.device == "cpu":
        import torch

        _core.set_num_threads(torch.get_num_threads())  # those that the simulator asks for
    print(
        f"{text_of(layer.grid)} tokens, window {text_of(layer.window['kernel_size'])}, "
        f"{layer.dtype}, {problem.device}, {name}"
    )
    framework = _MAKERS[name](problem)
    passes = list(OPS)[: 2 if args.backprop else 1]
    rows: list[Timing] = []
    if args.backend in SDPA:
        if args.backend not in framework.peers:
            raise Refused(f"--backend: got {args.backend}; needs PyTorch and a CUDA device")
        for pass_name, run in framework.peers[args.backend](args.backprop).items():
            rows.append(time_alone(pass_name, args.backend, run, problem, framework, args))
    else:
        backend = chosen_backend(args.backend or None)
        if backend and name != "numpy":  # which has no `composed`
            check_name(backend, problem.device.partition(":")[0])
        backward = Choice(backend, _tile(args.backward_q_tile), _tile(args.backward_kv_tile))
        forward = Choice(backend, _tile(args.q_tile), _tile(args.kv_tile))
        choices = dict(zip(OPS, (forward, backward), strict=True))
        choices = {pass_name: choices[pass_name] for pass_name in passes}
        with tuner() as use:
            if args.optimize:
                choices = optimize(problem, framework, choices, args, use)
            rows += time_choices(
                problem, framework, choices, args, args.warmup_steps, not args.no_prediction
            )
    if args.peers:
        rows += time_peers(problem, framework, args)
    show(rows)
    if args.json:
        facts = {
            "problem": {**asdict(layer), "additional": args.add_kv},
            "device": problem.device,
            "framework": name,
            "version": _core.version,
            "rows": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(facts, indent=1))
    if args.plot:
        kernel = text_of(layer.window["kernel_size"])
        plot(rows, f"{text_of(layer.grid)} tokens, window {kernel}, {layer.dtype}", args.plot)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    of_line = parser()
    args = of_line.parse_args(arguments)
    if args.plot:
        pyplot()
    try:
        return profile(args)
    except (Refused, ValueError, TypeError, NotImplementedError, ImportError) as error:
        print(f"{of_line.prog}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
