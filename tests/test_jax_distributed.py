"""Grids that are split over devices along their spatial axes, in JAX: random problems on meshes of
2, 4 and 8 devices, by `jit` with shardings and inside `shard_map`, against the undivided call; the
same in several processes, which run this file."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import cases  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402
from jax_cases import FUSED_NAMES, float64  # noqa: E402, F401, one is a fixture

import natten  # noqa: E402
import natten.jax as nj  # noqa: E402
from natten.jax import _halos  # noqa: E402

IN_PROCESSES = __name__ == "__main__"
if not IN_PROCESSES and len(jax.devices()) < 8:
    pytest.skip("needs 8 devices (see conftest.py)", allow_module_level=True)

P = PartitionSpec
HAS_EXPLICIT_AXES = jax.__version_info__ >= (0, 9)
FUSED = (nj.na1d, nj.na2d, nj.na3d)
QK = (nj.na1d_qk, nj.na2d_qk, nj.na3d_qk)
AV = (nj.na1d_av, nj.na2d_av, nj.na3d_av)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A call, and the mesh that splits it."""

    seed: int
    mesh: dict[str, int]  # sizes by name, in order
    batch_axes: tuple[str, ...]
    head_axes: tuple[str, ...]
    spatial: tuple[tuple[str, ...], ...]  # mesh axes that split each axis of the grid
    grid: tuple[int, ...]
    window: dict[str, Any]
    batch: int
    heads: int
    kv_heads: int
    dtype: str
    rpb: bool
    additional: int
    mask_batch: int | None

    @property
    def rank(self) -> int:
        return len(self.grid)

    @property
    def is_even(self) -> bool:
        parts = [int(np.prod([self.mesh[n] for n in axes], dtype=int)) for axes in self.spatial]
        return not any(n % count for n, count in zip(self.grid, parts, strict=True))

    def options(self, is_mapped: bool) -> dict[str, Any]:
        return self.window | ({"spatial_axis_names": self.spatial} if is_mapped else {})

    def array(self, *shape: int, salt: int) -> np.ndarray:
        x = np.random.default_rng([self.seed, salt]).standard_normal(shape)
        return cases.round_to(self.dtype, x)


def _axis(
    rng: np.random.Generator, parts: int, longest: int, is_even: bool = True
) -> tuple[int, dict[str, Any]]:
    """A length, which parts divide where they are even, and the options of a window that fits."""
    length = parts * int(rng.integers(1, longest + 1))
    if not is_even:
        length = int(rng.integers(1, parts * longest + 1))
    boundary = str(rng.choice(["shift", "cut", "circular"]))
    is_causal = boundary != "circular" and rng.random() < 0.3
    if boundary == "circular":
        dilation = int(rng.choice([d for d in (1, 2, 3) if length % d == 0]))
        kernel_size = int(rng.integers(1, min(7, length // dilation) + 1))
        strides = [s for s in range(1, kernel_size + 1) if length // dilation % s == 0]
    else:
        most = length + 2 if boundary == "cut" else length
        dilation = int(rng.integers(1, min(3, most) + 1))
        kernel_size = int(rng.integers(1, max(1, min(7, most // dilation)) + 1))
        strides = list(range(1, kernel_size + 1))
    stride = 1 if rng.random() < 0.5 else int(rng.choice(strides))
    return length, {
        "kernel_size": kernel_size, "stride": stride, "dilation": dilation,
        "is_causal": bool(is_causal), "boundary": boundary,
    }  # fmt: skip


def draw(seed: int, most_devices: int = 8, is_even: bool = True) -> Problem:
    rng = np.random.default_rng([cases.SEED, seed])
    rank = int(rng.integers(1, 4))
    counts = [c for c in ((2,), (4,), (2, 2), (8,), (4, 2), (2, 4), (2, 2, 2))
              if np.prod(c) <= most_devices]  # fmt: skip
    sizes = counts[int(rng.integers(len(counts)))]
    names = [str(n) for n in rng.permutation(["x", "y", "z"])[: len(sizes)]]
    mesh = dict(zip(names, sizes, strict=True))
    splits: list[list[str]] = [[] for _ in range(rank + 2)]  # of the grid, batch and heads
    for i, name in enumerate(rng.permutation(names)):
        splits[int(rng.integers(rank if i == 0 or rng.random() < 0.7 else rank + 2))].append(
            str(name)
        )
    parts = [int(np.prod([mesh[n] for n in names])) for names in splits]
    axes = [_axis(rng, p, (12, 5, 3)[rank - 1], is_even) for p in parts[:rank]]
    heads = parts[rank + 1] * 2
    return Problem(
        seed=seed,
        mesh=mesh,
        batch_axes=tuple(splits[rank]),
        head_axes=tuple(splits[rank + 1]),
        spatial=tuple(map(tuple, splits[:rank])),
        grid=tuple(length for length, _ in axes),
        window={name: tuple(w[name] for _, w in axes) for name in axes[0][1]},
        batch=parts[rank],
        heads=heads,
        kv_heads=heads // int(rng.choice([1, 2])),
        dtype=str(rng.choice(["float64", "float32", "float32", "bfloat16"])),
        rpb=bool(rng.random() < 0.4),
        additional=int(rng.choice([0, 0, 2])),
        mask_batch=[None, 1, parts[rank]][int(rng.choice([0, 0, 1, 2]))],
    )


def entry(axes: tuple[str, ...]) -> Any:
    return axes or None


def arrays_of(problem: Problem, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arrays by name, how each is split). grad_*: what comes in from outside."""
    p = problem
    b, h, grid = entry(p.batch_axes), entry(p.head_axes), tuple(map(entry, p.spatial))
    arrays: dict[str, np.ndarray] = {}
    specs: dict[str, P] = {}

    def add(name: str, shape: tuple[int, ...], spec: P) -> None:
        arrays[name], specs[name] = p.array(*shape, salt=len(arrays)), spec

    if kind == "fused":
        add("query", (p.batch, *p.grid, p.heads, 3), P(b, *grid, h))
        add("key", (p.batch, *p.grid, p.kv_heads, 3), P(b, *grid, h))
        add("value", (p.batch, *p.grid, p.kv_heads, 2), P(b, *grid, h))
    else:
        slots = int(np.prod(p.window["kernel_size"])) + p.additional
        add("query", (p.batch, p.heads, *p.grid, 3), P(b, h, *grid))
        add("key", (p.batch, p.heads, *p.grid, 3), P(b, h, *grid))
        add("attn", (p.batch, p.heads, *p.grid, slots), P(b, h, *grid))
        add("value", (p.batch, p.heads, *p.grid, 2), P(b, h, *grid))
    if p.rpb:
        add("rpb", (p.heads, *(2 * k - 1 for k in p.window["kernel_size"])), P(h))
    if p.additional:
        for name, dim in (("additional_keys", 3), ("additional_values", 2)):
            if kind == "fused":
                add(name, (p.batch, p.additional, p.kv_heads, dim), P(b, None, h))
            else:
                add(name, (p.batch, p.heads, p.additional, dim), P(b, h))
    if p.mask_batch is not None:
        rng = np.random.default_rng([p.seed, 99])
        mask = rng.random((p.mask_batch, *p.grid)) < 0.7
        arrays["key_mask"] = mask
        specs["key_mask"] = P(b if p.mask_batch > 1 else None, *grid)
        for name in ("key", "value"):
            hidden = ~np.expand_dims(mask, -1 if kind == "fused" else 1)[..., None]
            arrays[name] = np.where(hidden, np.nan, arrays[name])
    return arrays, specs


def function_of(problem: Problem, kind: str, is_mapped: bool) -> Any:
    """Results of named arrays: a tuple."""
    options, i = problem.options(is_mapped), problem.rank - 1

    def fused(x: dict[str, Any]) -> Any:
        return FUSED[i](**x, **options, return_lse=True)

    def unfused(x: dict[str, Any]) -> Any:
        mask = {n: x[n] for n in ("key_mask",) if n in x}
        of_qk = {n: x[n] for n in ("query", "key", "rpb", "additional_keys") if n in x}
        of_av = {n: x[n] for n in ("attn", "value", "additional_values") if n in x}
        return QK[i](**of_qk, **options, **mask), AV[i](**of_av, **options, **mask)

    return fused if kind == "fused" else unfused


def both(function: Any) -> Any:
    """Results and gradients of named arrays, for what comes in from outside."""

    def results(x: dict[str, Any], mask: dict[str, Any], incoming: Any) -> Any:
        results, pull_back = jax.vjp(lambda x: function(x | mask), x)
        return results, pull_back(incoming)[0]

    return results


def padded(mesh: Mesh, shape: tuple[int, ...], spec: P) -> list[tuple[int, int]]:
    """What must be behind an array for devices to divide all of its axes."""
    names = [(e,) if isinstance(e, str) else e or () for e in spec]
    parts = [int(np.prod([mesh.shape[n] for n in axes], dtype=int)) for axes in names]
    parts += [1] * (len(shape) - len(parts))
    return [(0, -n % count) for n, count in zip(shape, parts, strict=True)]


def expected_of(problem: Problem, arrays: dict[str, Any], incoming: Any, kind: str) -> Any:
    """Of the undivided call: its results and gradients, and the gradients in float64."""
    function = jax.jit(both(function_of(problem, kind, False)))
    mask = {n: x for n, x in arrays.items() if n == "key_mask"}

    def cast(x: Any, dtype: str) -> Any:
        return jax.tree.map(lambda a: jnp.asarray(a).astype(dtype), x)

    x = {n: a for n, a in arrays.items() if n != "key_mask"}
    statistic = "float64" if problem.dtype == "float64" else "float32"
    second = statistic if kind == "fused" else problem.dtype
    incoming = incoming[0].astype(problem.dtype), incoming[1].astype(second)
    results = function(cast(x, problem.dtype), mask, incoming)
    exact = results
    if problem.dtype != "float64":
        exact = function(cast(x, "float64"), mask, cast(incoming, "float64"))
    return incoming, *jax.device_get((results, exact[1]))


def check(problem: Problem, kind: str, mode: str, devices: Any = None, place: Any = None) -> None:
    """`mode`: how the call is split. `place`: makes a global array."""
    p = problem
    devices = np.array(devices if devices is not None else jax.devices())
    shape = tuple(p.mesh.values())
    rng = np.random.default_rng([cases.SEED, p.seed, 1])
    devices = rng.permutation(devices[: int(np.prod(shape))]).reshape(shape)
    if mode == "explicit":
        types = (jax.sharding.AxisType.Explicit,) * len(shape)
        mesh = Mesh(devices, tuple(p.mesh), axis_types=types)
    else:
        mesh = Mesh(devices, tuple(p.mesh))
    arrays, specs = arrays_of(p, kind)
    names = ("query", "attn") if kind == "unfused" else ("query", "query")
    is_mapped = mode.startswith("shard_map")
    plain = function_of(p, kind, False)
    # Results are split as queries are.
    query = specs[names[0]]
    of_results = (query, query) if kind == "unfused" else (query, P(*query[: p.rank + 2]))
    shapes = jax.eval_shape(
        plain,
        {n: jax.ShapeDtypeStruct(a.shape, bool if n == "key_mask" else p.dtype)
         for n, a in arrays.items()},
    )  # fmt: skip
    incoming = [jnp.asarray(p.array(*s.shape, salt=50 + i)) for i, s in enumerate(shapes)]
    incoming, (results, gradients), exact = expected_of(p, arrays, incoming, kind)

    def default_place(a: Any, spec: P) -> Any:
        return jax.device_put(a, NamedSharding(mesh, spec))

    place = default_place if place is None else functools.partial(place, mesh)

    def placed(a: Any, spec: P) -> Any:
        """With NaN behind what JAX would not place."""
        is_mask = a.dtype == bool
        padding = padded(mesh, a.shape, spec)
        return place(jnp.pad(a, padding, constant_values=True if is_mask else jnp.nan), spec)

    def cut(a: Any, shape: tuple[int, ...], spec: P) -> Any:
        """The array itself, which is split into parts that are not equal."""
        a = jax.lax.slice(a, [0] * a.ndim, shape)
        return jax.lax.with_sharding_constraint(a, NamedSharding(mesh, spec))

    def filled(a: Any, spec: P) -> Any:
        a = jax.lax.with_sharding_constraint(a, NamedSharding(mesh, spec))
        a = jnp.pad(a, padded(mesh, a.shape, spec))
        return jax.lax.with_sharding_constraint(a, NamedSharding(mesh, spec))

    def of_cut(x: dict[str, Any], mask: dict[str, Any], incoming: Any) -> Any:
        x, mask = ({n: cut(a, arrays[n].shape, specs[n]) for n, a in d.items()} for d in (x, mask))
        incoming = tuple(
            cut(a, s.shape, spec) for a, s, spec in zip(incoming, shapes, of_results, strict=True)
        )
        results, gradients = both(function)(x, mask, incoming)
        return (
            [filled(a, spec) for a, spec in zip(results, of_results, strict=True)],
            {n: filled(a, specs[n]) for n, a in gradients.items()},
        )

    x = {
        n: placed(jnp.asarray(a).astype(bool if n == "key_mask" else p.dtype), specs[n])
        for n, a in arrays.items()
    }
    mask = {n: x.pop(n) for n in ("key_mask",) if n in x}
    incoming = tuple(placed(a, s) for a, s in zip(incoming, of_results, strict=True))
    function = plain
    if is_mapped:
        function = jax.shard_map(
            function_of(p, kind, True), mesh=mesh, in_specs=({n: specs[n] for n in arrays},),
            out_specs=of_results, check_vma=mode == "shard_map",
        )  # fmt: skip
    before = jax.config.jax_use_shardy_partitioner
    try:
        jax.config.update("jax_use_shardy_partitioner", mode != "gspmd")
        split = both(function) if p.is_even else of_cut
        run = jax.jit(split).lower(x, mask, incoming).compile()
        got_results, got_gradients = run(x, mask, incoming)
    finally:
        jax.config.update("jax_use_shardy_partitioner", before)
    found = collectives(run.as_text())
    is_split = any(p.spatial)
    is_reduced = p.rpb or p.additional
    # A grid may be split into parts that need nothing of each other.
    assert found <= {"collective-permute"} | ({"all-reduce"} if is_reduced else set()), found
    assert "collective-permute" in found or not is_split or not needs_others(p), p
    for i, (got, want) in enumerate(zip(got_results, results, strict=True)):
        assert got.dtype == want.dtype
        assert_shards(got, want, np.testing.assert_array_equal, f"result {i} of {p}")
        if mode != "shard_map":
            want_sharding = NamedSharding(mesh, of_results[i])
            assert got.sharding.is_equivalent_to(want_sharding, got.ndim), (got.sharding, p)
    bound = cases.GRADIENT_BOUND[p.dtype]
    norm = sum(
        np.linalg.norm(np.asarray(p.array(*s.shape, salt=50 + i))) for i, s in enumerate(shapes)
    )
    for name, got in got_gradients.items():
        assert got.sharding.is_equivalent_to(NamedSharding(mesh, specs[name]), got.ndim), (name, p)
        if name in ("query", "attn"):
            equal = np.testing.assert_array_equal
            assert_shards(got, gradients[name], equal, f"gradient of {name} of {p}")
        scale = np.linalg.norm(exact[name])
        if scale <= 1e-9 * norm:
            scale = norm

        def close(a: Any, b: Any, message: str, scale: float = scale) -> None:
            error = np.linalg.norm(np.asarray(a, np.float64) - b) / scale
            assert error <= bound, f"{message}: {error}"

        assert_shards(got, exact[name], close, f"gradient of {name} of {p}")
    if p.mask_batch is not None and not IN_PROCESSES:
        for name in ("key", "value"):
            hidden = ~np.expand_dims(arrays["key_mask"], -1 if kind == "fused" else 1)[..., None]
            shape = arrays[name].shape
            got = np.asarray(got_gradients[name], np.float64)[tuple(map(slice, shape))]
            assert not got[np.broadcast_to(hidden, shape)].any()


def assert_shards(got: Any, want: Any, compare: Any, message: str) -> None:
    """Each process compares what it has. `got` may have 0 behind what is wanted."""
    want = np.pad(want, [(0, a - b) for a, b in zip(got.shape, want.shape, strict=True)])
    for shard in got.addressable_shards:
        compare(np.asarray(shard.data), want[shard.index], message)


def collectives(text: str) -> set[str]:
    names = r" (all-gather|all-to-all|collective-permute|all-reduce)(?:-start)?\("
    return set(re.findall(names, text))


def needs_others(problem: Problem) -> bool:
    """Whether any part needs keys of another, by the definition."""
    for i, names in enumerate(problem.spatial):
        parts = int(np.prod([problem.mesh[n] for n in names]))
        length = -(-problem.grid[i] // parts)
        window = {name: values[i] for name, values in problem.window.items()}
        for first in range(0, problem.grid[i], length):
            last = min(first + length, problem.grid[i])
            begin, end = natten.key_range(first, last - first, problem.grid[i], **window)
            if begin < first or end > last:
                return True
    return False


MODES = ("shardy", "gspmd", "shard_map", "shard_map unchecked") + (
    ("explicit",) if HAS_EXPLICIT_AXES else ()
)
COUNT = 25
SEEDS = pytest.mark.parametrize(
    "seeds",
    [range(len(MODES)), pytest.param(range(len(MODES), COUNT), marks=pytest.mark.long)],
    ids=["few", "rest"],
)


@SEEDS
def test_random_problems(seeds):
    """Results and the gradient of queries have the bits of the undivided call, other gradients are
    within the bounds, and nothing is gathered. Each problem by one of the ways to split it."""
    for seed in seeds:
        kind = "unfused" if seed % 3 == 2 else "fused"
        check(draw(seed), kind, MODES[seed % len(MODES)])


@pytest.mark.parametrize(
    "seeds",
    [range(2), pytest.param(range(2, 7), marks=pytest.mark.long)],
    ids=["few", "rest"],
)
def test_parts_that_are_not_equal(seeds):
    """The same of grids that the mesh does not divide, which are parts of arrays that it does."""
    for seed in seeds:
        problem = next(p for p in (draw(2000 + 50 * seed + i, 8, False) for i in range(50))
                       if not p.is_even)  # fmt: skip
        check(problem, "unfused" if seed % 3 == 2 else "fused", MODES[seed % 2])


def test_what_is_sent_is_the_surface():
    """Of random windows on a grid in up to eight parts: keys and values that a part needs and does
    not have, by the definition, are as many as all devices are sent, forward and backward."""
    rng, everything = np.random.default_rng([cases.SEED, 7]), 0
    for counts, is_even in (((8,), True), ((2, 4), True), ((3, 2), False)):
        axes = [_axis(rng, n, 9 // len(counts), is_even) for n in counts]
        grid, rank = tuple(length for length, _ in axes), len(counts)
        mesh = Mesh(np.array(jax.devices()[: np.prod(counts)]).reshape(counts), ("x", "y")[:rank])
        split = NamedSharding(mesh, P(None, *mesh.axis_names))
        window = {name: tuple(w[name] for _, w in axes) for name in axes[0][1]}

        def call(*x: Any, window: Any = window, split: Any = split, grid: Any = grid) -> Any:
            x = [jax.lax.slice(a, [0] * a.ndim, (2, *grid, 1, 3)) for a in x]
            x = [jax.lax.with_sharding_constraint(a, split) for a in x]
            out, pull_back = jax.vjp(functools.partial(FUSED[len(grid) - 1], **window), *x)
            results = [jax.lax.with_sharding_constraint(a, split) for a in (out, *pull_back(out))]
            results = [jnp.pad(a, padded(split.mesh, a.shape, split.spec)) for a in results]
            return [jax.lax.with_sharding_constraint(a, split) for a in results]

        extra = padded(mesh, (2, *grid, 1, 3), split.spec)
        shape = tuple(n + more for n, (_, more) in zip((2, *grid, 1, 3), extra, strict=True))
        x = [jax.ShapeDtypeStruct(shape, "float32")] * 3
        text = jax.jit(call, in_shardings=split, out_shardings=split).lower(*x).compile().as_text()
        # Keys and values in one message, as one axis. Those of the forward pass come once more in
        # the backward, unless XLA finds that they are there.
        pattern = r"f32\[(\d+)\]\S* collective-permute\(.*source_target_pairs=\{(\S*)\}[,\n]"
        messages = re.findall(pattern, text)
        assert len(messages) == len(re.findall(r" collective-permute(?:-start)?\(", text))
        sent = sum(4 * int(n) * (pairs.count("},{") + 1) for n, pairs in messages)
        needed, said, token_bytes = 0, 0, 2 * (3 + 3) * 4
        for part in np.ndindex(counts):
            there, missing = 1, 1
            for i, (length, options) in enumerate(axes):
                size = -(-length // counts[i])
                own = range(min(part[i] * size, length), min((part[i] + 1) * size, length))
                tokens = set(own)
                if own:
                    begin, end = natten.key_range(own[0], len(own), length, **options)
                    tokens = {t % length for t in range(begin, end)}
                there, missing = there * len(tokens & set(own)), missing * len(tokens)
            needed += missing - there
            said += natten.distributed.halo_bytes(
                grid, counts, part=part, token_bytes=token_bytes, **window
            ).received
        assert said == token_bytes * needed
        assert sent in (2 * said, 3 * said), (sent, said, counts, grid, window)
        everything += needed
    assert everything


def test_messages_of_random_meshes():
    """Carried out in numpy, axis after axis, on grids that meshes need not divide: parts then hold
    what the windows of their queries see, and each has received what `halo_bytes` says."""
    rng = np.random.default_rng([cases.SEED, 9])
    for case in range(30):
        counts = [int(n) for n in rng.integers(2, 6, rng.integers(1, 4))]
        axes = [_axis(rng, n, (6, 4, 3)[len(counts) - 1], is_even=False) for n in counts]
        grid, names = [length for length, _ in axes], ["x", "y", "z"][: len(counts)]
        window = {name: tuple(w[name] for _, w in axes) for name in axes[0][1]}
        mesh = {n: counts[names.index(n)] for n in rng.permutation(names).tolist()}
        halos = _halos.halos_of(mesh, [(n,) for n in names], grid, window)
        places = np.arange(np.prod(counts)).reshape([mesh[n] for n in mesh])
        places = places.transpose([list(mesh).index(n) for n in names])
        of_place = {int(places[part]): part for part in np.ndindex(*counts)}
        tokens = 1 + np.arange(np.prod(grid)).reshape(grid)
        arrays, received = {}, dict.fromkeys(of_place, 0)
        for place, part in of_place.items():
            held = [range(i * h.length, min((i + 1) * h.length, h.grid))
                    for i, h in zip(part, halos.axes, strict=True)]  # fmt: skip
            missing = [(h.length - len(r), 0) for h, r in zip(halos.axes, held, strict=True)]
            arrays[place] = np.pad(tokens[np.ix_(*held)], missing)
        for at, messages in enumerate(halos.messages):
            halo, before = halos.axes[at], arrays
            padding = [(0, 0)] * len(counts)
            padding[at] = (halo.before, halo.after)
            arrays = {place: np.pad(x, padding) for place, x in before.items()}
            for message in messages:
                takers = {int(places[part]) for part in itertools.product(*message.takers)}
                assert sorted(takers) == sorted(taker for _, taker in message.pairs), case
                for giver, taker in message.pairs:
                    sent = before[giver][tuple(slice(*ends) for ends in message.held)]
                    begin = zip(message.needed, sent.shape, strict=True)
                    arrays[taker][tuple(slice(b, b + n) for b, n in begin)] = sent
                    received[taker] += sent.size
        for place, part in of_place.items():
            said = natten.distributed.halo_bytes(
                grid, counts, part=part, token_bytes=1, **window
            ).received
            assert received[place] == said, (case, grid, counts, window)
            where, which = [], []
            for i, (n, options), h in zip(part, axes, halos.axes, strict=True):
                own = range(i * h.length, min((i + 1) * h.length, n))
                needed = range(*natten.key_range(own[0], len(own), n, **options)) if own else []
                first = min(i * h.length, n - h.length) - h.before
                at = [t - first for t in needed]
                is_ring = options["boundary"] == "circular" and h.extended_length >= n
                where.append([t % n if is_ring else t for t in at])
                which.append([t % n for t in needed])
            np.testing.assert_array_equal(arrays[place][np.ix_(*where)], tokens[np.ix_(*which)])


@pytest.mark.parametrize("count", [10, pytest.param(12, marks=pytest.mark.long)])
def test_attention_whose_tokens_are_split(count):
    """Keys and values go round the ring, their gradients too, and nothing is gathered. Of 10 tokens
    the last of four devices has one."""
    rng = np.random.default_rng([cases.SEED, 8])
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    split = NamedSharding(mesh, P(None, "x"))
    x = [jnp.asarray(rng.standard_normal((2, 12, h, 3)), "float32") for h in (4, 2, 2)]

    def call(*x: Any) -> Any:
        results = []
        for is_causal in (False, True):
            function = functools.partial(nj.attention, is_causal=is_causal, return_lse=True)
            out, pull_back = jax.vjp(function, *x)
            results += [*out, *pull_back(jax.tree.map(jnp.cos, out))]
        return results

    def on_devices(*x: Any) -> Any:
        x = [jax.lax.with_sharding_constraint(a[:, :count], split) for a in x]
        results = [jax.lax.with_sharding_constraint(a, split) for a in call(*x)]
        padding = [jnp.pad(a, padded(mesh, a.shape, split.spec)) for a in results]
        return [jax.lax.with_sharding_constraint(a, split) for a in padding]

    placed = [jax.device_put(a, split) for a in x]
    run = jax.jit(on_devices).lower(*placed).compile()
    assert collectives(run.as_text()) == {"collective-permute"}
    wants = jax.jit(call)(*(a[:, :count] for a in x))
    for i, (got, want) in enumerate(zip(run(*placed), wants, strict=True)):
        assert got.sharding.is_equivalent_to(split, got.ndim)
        got = np.asarray(got)[:, :count]
        if i % 5 < 3:  # all but gradients of keys and values
            np.testing.assert_array_equal(got, want)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


# One small problem, transformed and refused.

WINDOW = {"kernel_size": (3, 2), "boundary": ("circular", "shift"), "is_causal": (False, True)}
SPEC = P(None, "x", "y")


def small(**options: Any) -> tuple[Any, list[Any], Mesh]:
    """A call, its query, key and value, and a mesh of two by two devices."""
    rng = np.random.default_rng(cases.SEED)
    x = [jnp.asarray(rng.standard_normal((2, 8, 6, 2, 3))) for _ in range(3)]
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    return functools.partial(nj.na2d, **WINDOW, **options), x, mesh


def mapped(function: Any, mesh: Mesh, specs: Any = SPEC, names: Any = ("x", "y")) -> Any:
    call = functools.partial(function, spatial_axis_names=names)
    return jax.shard_map(
        lambda *x: call(*x), mesh=mesh, in_specs=specs, out_specs=SPEC, check_vma=False
    )


@pytest.mark.long
@pytest.mark.parametrize("mode", ["jit", "shard_map"])
def test_composed(mode):
    function, x, mesh = small(backend="composed")
    split = function if mode == "jit" else mapped(function, mesh)
    placed = [jax.device_put(a, NamedSharding(mesh, SPEC)) for a in x]

    def gradients(function: Any, x: Any) -> Any:
        result, pull_back = jax.vjp(function, *x)
        return result, pull_back(jnp.cos(result))

    run = jax.jit(lambda *x: gradients(split, x)).lower(*placed).compile()
    assert collectives(run.as_text()) == {"collective-permute"}
    wants = jax.jit(lambda *x: gradients(functools.partial(function, backend=None), x))(*x)
    for got, want in zip(jax.tree.leaves(run(*placed)), jax.tree.leaves(wants), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("mode", ["jit", pytest.param("shard_map", marks=pytest.mark.long)])
def test_vmap(mode):
    """Over queries only, and over all; keys that the examples share are exchanged once."""
    function, x, mesh = small()
    split = function if mode == "jit" else mapped(function, mesh)
    for axes in ((1, None, None), (0, 0, 0)):
        stacked = [a if i is None else jnp.stack([a, a * 0.5 - 1], i) for i, a in zip(axes, x)]  # noqa: B905
        specs = [SPEC if i is None else P(*SPEC[:i], None, *SPEC[i:]) for i in axes]
        placed = [
            jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(stacked, specs, strict=True)
        ]
        run = jax.jit(jax.vmap(split, axes)).lower(*placed).compile()
        assert collectives(run.as_text()) == {"collective-permute"}
        np.testing.assert_array_equal(run(*placed), jax.vmap(function, axes)(*stacked))


def test_forward_mode_inside_shard_map():
    function, x, mesh = small(autodiff="any")
    t = tuple(a[::-1] for a in x)
    got = jax.jit(lambda *x: jax.jvp(mapped(function, mesh), x, t))(*x)
    want = jax.jvp(function, tuple(x), t)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (("x", "z"), ValueError, "got 'z'; must be an axis of a mesh that jax.shard_map has split"),
        (("x",), ValueError, r"got \('x',\), 1 entries; must be one entry per spatial axis, 2"),
        ("x", ValueError, "got 'x', 1 entries; must be one entry per spatial axis, 2"),
        (("x", ("y", "x")), ValueError, r"got \(.*\); must not name an axis twice"),
        (("x", 3), TypeError, r"got \('x', 3\); must be one entry per spatial axis"),
        (5, TypeError, "got 5; must be one entry per spatial axis"),
    ],
)
def test_names_that_are_refused(names, error, message):
    function, x, mesh = small()
    with pytest.raises(error, match=f"^spatial_axis_names: {message}"):
        mapped(function, mesh, names=names)(*x)


def test_what_cannot_be_split():
    function, x, mesh = small()
    with pytest.raises(
        ValueError, match=r"^spatial_axis_names: got 'x'; must be an axis of a mesh"
    ):
        function(*x, spatial_axis_names=("x", "y"))
    for given in ({"query_offset": 0}, {"key_offset": (0, 0)}, {"grid_size": (8, 6)}):
        (name,) = given
        with pytest.raises(ValueError, match=f"^{name}: got .* together with spatial_axis_names"):
            mapped(functools.partial(function, **given), mesh)(*x)
    with pytest.raises(ValueError, match=r"^key: got a part of \[8, 6\] tokens; must be \[4, 3\]"):
        mapped(function, mesh, (SPEC, P(), SPEC))(*x)
    with pytest.raises(
        ValueError, match=r"^value: got a part of \[8, 3\] tokens; must be \[4, 3\]"
    ):
        mapped(function, mesh, (SPEC, SPEC, P(None, None, "y")))(*x)
    with pytest.raises(ValueError, match=r"^kernel_size: got \[9, 2\]"):  # more than the whole grid
        mapped(functools.partial(function, kernel_size=(9, 2)), mesh)(*x)
    with pytest.raises(ValueError, match=r"^stride"):  # circular: of the whole grid, too
        mapped(functools.partial(function, stride=(3, 1)), mesh)(*x)


# Several processes.


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.mark.long
def test_several_processes():
    """Two, each with two devices."""
    count = 2
    flags = "--xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, str(count), f"localhost:{free_port()}"]
    processes = [
        subprocess.Popen(
            [*command, str(i)], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i in range(count)
    ]  # fmt: skip
    try:
        outputs = [p.communicate(timeout=200)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    for p, output in zip(processes, outputs, strict=True):
        assert p.returncode == 0, output
        assert f"{PROCESS_PROBLEMS} problems" in output


@pytest.mark.long
def test_the_example():
    script = Path(__file__).parent.parent / "examples" / "sharding_grid.py"
    run = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "'all-gather': 0, 'all-to-all': 0" in run.stdout


PROCESS_PROBLEMS = 4


def in_process(count: int, address: str, number: int) -> None:
    """What one process of `test_several_processes` runs."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=count, process_id=number)

    def place(mesh: Mesh, x: Any, spec: P) -> Any:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])

    devices = jax.devices()
    assert len(devices) == 2 * count == 2 * len(jax.local_devices())
    drawn = map(draw, range(1000, 1100))
    problems = [p for p in drawn if np.prod([*p.mesh.values()]) == len(devices)]
    for i, problem in enumerate(problems[:PROCESS_PROBLEMS]):
        mode = ("shardy", "shard_map")[i % 2]
        check(problem, "unfused" if i == 2 else "fused", mode, devices, place)
    print(f"{PROCESS_PROBLEMS} problems")
    jax.distributed.shutdown()


if __name__ == "__main__":
    in_process(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
