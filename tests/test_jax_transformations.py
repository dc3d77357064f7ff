"""Every function under every transformation that docs/jax.md lists.

Results are compared with those of the plain call, derivatives of one mode with those of another;
test_jax_random.py and test_jax_derivatives.py compare both with oracles.
"""

from __future__ import annotations

import dataclasses
import functools
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from cases import long_unless  # noqa: E402
from jax import export  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402
from jax_cases import (  # noqa: E402
    AV,
    AV_NAMES,
    FUSED,
    FUSED_NAMES,
    MIXED,
    QK,
    QK_NAMES,
    arrays_of,
    assert_close,
    assert_same,
    av_shapes,
    float64,  # noqa: F401, a fixture
    fused_shapes,
    qk_shapes,
    randn,
)

import natten.jax as nj  # noqa: E402

PAGE = Path(__file__).parent.parent / "docs" / "jax.md"
DEVICES = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Function:
    """A function of positional arrays and autodiff, its arrays, and the letters of their
    dimensions: b batch, h heads, and - for the others, which cannot be split."""

    call: Callable[..., Any]
    arrays: tuple[jax.Array, ...]
    dims: tuple[str, ...]

    def __call__(self, *x):
        return self.call(*x, autodiff="reverse")

    def any(self, *x):
        return self.call(*x, autodiff="any")

    def scalar(self, *x, mode="reverse"):
        """With a different gradient for every element of every result, and linear in none."""
        results = jax.tree.leaves(self.call(*x, autodiff=mode))
        return sum(jnp.sum(jnp.sin(r + jnp.arange(r.size).reshape(r.shape))) for r in results)

    @property
    def all(self):
        return tuple(range(len(self.arrays)))


def make(rank: int, family: str) -> Function:
    spatial = "-" * rank
    if family == "fused":
        names, shapes = FUSED_NAMES, fused_shapes(rank, batch=4)
        token, rpb, additional = f"b{spatial}h-", f"h{spatial}", "b-h-"
        dims = (token,) * 3 + (rpb, additional, additional)
        function = functools.partial(FUSED[rank], return_lse=True)
    elif family == "qk":
        names, shapes = QK_NAMES, qk_shapes(rank, batch=4)
        dims = (f"bh{spatial}-",) * 2 + (f"h{spatial}", "bh--")
        function = QK[rank]
    else:
        names, shapes = AV_NAMES, av_shapes(rank, batch=4)
        dims = (f"bh{spatial}-",) * 2 + ("bh--",)
        function = AV[rank]

    def call(*x, autodiff):
        result = function(**dict(zip(names, x, strict=True)), **MIXED[rank], autodiff=autodiff)
        # Slots that causal masking leaves empty hold -inf, which cannot be summed.
        return jnp.where(jnp.isneginf(result), 0.0, result) if family == "qk" else result

    return Function(call, arrays_of(shapes), dims)


def attention(q, k, v, autodiff):
    return nj.attention(q, k, v, return_lse=True, autodiff=autodiff)


def merge(a, b, lse_a, lse_b, autodiff):
    return nj.merge_attentions([a, b], [lse_a, lse_b])


@functools.cache
def functions() -> dict[str, Function]:
    suffixes = {"fused": "", "qk": "_qk", "av": "_av"}
    made = {
        f"na{rank}d{suffix}": make(rank, family)
        for family, suffix in suffixes.items()
        for rank in (1, 2, 3)
    }
    shapes = ((4, 3, 4, 2), (4, 5, 2, 2), (4, 5, 2, 3))
    made["attention"] = Function(attention, arrays_of(shapes), ("b-h-",) * 3)
    shapes = ((4, 5, 2, 3),) * 2 + ((4, 5, 2),) * 2
    made["merge_attentions"] = Function(merge, arrays_of(shapes), ("b-h-",) * 2 + ("b-h",) * 2)
    return made


NAMES = [f"na{rank}d{suffix}" for suffix in ("", "_qk", "_av") for rank in (1, 2, 3)]
NAMES += ["attention", "merge_attentions"]

TRANSFORMATIONS: dict[str, Callable[[Function], None]] = {}


def transformation(name):
    def add(check):
        TRANSFORMATIONS[name] = check
        return check

    return add


def tangents_of(f: Function):
    return tuple(randn(*a.shape, seed=7 + i) for i, a in enumerate(f.arrays))


@functools.cache
def gradient(name: str):
    """By reverse mode. Compiled, as most derivatives here: without jit every operation is compiled
    by itself, at ten times the cost. test_jax_derivatives.py has derivatives without jit."""
    f = functions()[name]
    return jax.jit(jax.grad(f.scalar, f.all))(*f.arrays)


def name_of(f: Function) -> str:
    return next(name for name, g in functions().items() if g is f)


def assert_same_bits(f, got, want):
    """XLA fuses `merge_attentions`, plain jax.numpy, where it is compiled."""
    (assert_close if f is functions()["merge_attentions"] else assert_same)(got, want)


@transformation("`jit`")
def _(f):
    assert_same_bits(f, jax.jit(f)(*f.arrays), f(*f.arrays))


@transformation("`grad`, `value_and_grad`")
def _(f):
    value, gradients = jax.jit(jax.value_and_grad(f.scalar, f.all))(*f.arrays)
    assert_close(value, f.scalar(*f.arrays))
    # Central differences along one direction.
    t, h = tangents_of(f), 1e-6
    ahead, behind = (
        f.scalar(*(x + s * h * d for x, d in zip(f.arrays, t, strict=True))) for s in (1, -1)
    )
    slope = sum(jnp.vdot(g, d) for g, d in zip(gradients, t, strict=True))
    np.testing.assert_allclose((ahead - behind) / (2 * h), slope, rtol=1e-6, atol=1e-6)


@transformation("`vjp`, `jacrev`")
def _(f):
    results, pull_back = jax.vjp(f, *f.arrays)
    incoming = jax.tree.map(lambda r: randn(*r.shape, seed=3), results)
    pulled = pull_back(incoming)

    def some(x):  # three elements of the first result
        return jax.tree.leaves(f(x, *f.arrays[1:]))[0].ravel()[:3]

    rows = jax.jit(jax.jacrev(some))(f.arrays[0])
    want = [jax.jit(jax.grad(lambda x, i=i: some(x)[i]))(f.arrays[0]) for i in range(3)]
    assert_close(rows, jnp.stack(want))
    _, pushed = jax.jvp(f.any, f.arrays, tangents_of(f))
    forward = sum(
        jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (incoming, pushed)), strict=True)
    )
    reverse = sum(jnp.vdot(g, t) for g, t in zip(pulled, tangents_of(f), strict=True))
    assert_close(forward, reverse, 1e-10)


@transformation("`jvp`, `linearize`, `jacfwd`")
def _(f):
    t = tangents_of(f)
    value, slope = jax.jit(lambda x, t: jax.jvp(functools.partial(f.scalar, mode="any"), x, t))(
        f.arrays, t
    )
    assert_close(value, f.scalar(*f.arrays))
    want = sum(jnp.vdot(g, d) for g, d in zip(gradient(name_of(f)), t, strict=True))
    assert_close(slope, want, 1e-10)
    _, linear = jax.linearize(functools.partial(f.scalar, mode="any"), *f.arrays)
    assert_close(linear(*t), slope, 1e-10)
    along = jax.jacfwd(lambda s: f.any(f.arrays[0] + s * t[0], *f.arrays[1:]))(0.0)
    _, want = jax.jvp(lambda x: f.any(x, *f.arrays[1:]), f.arrays[:1], t[:1])
    assert_close(along, want, 1e-10)


@transformation("`grad` of `grad`, `hessian`")
def _(f):
    """The second derivative along two directions."""
    one, two = tangents_of(f), tuple(randn(*a.shape, seed=31) for a in f.arrays)

    def along(s, mode):
        x = (a + s[0] * b + s[1] * c for a, b, c in zip(f.arrays, one, two, strict=True))
        return f.scalar(*x, mode=mode)

    start = jnp.zeros(2)
    twice = jax.jit(jax.jacrev(jax.grad(functools.partial(along, mode="reverse"))))(start)
    hessian = jax.jit(jax.hessian(functools.partial(along, mode="any")))(start)
    assert_close(hessian, twice, 1e-9)
    assert np.any(twice)


@transformation("`vmap`")
def _(f):
    stacked = tuple(jnp.stack([a, 0.5 * a, a + 1], i % 2) for i, a in enumerate(f.arrays))
    axes = tuple(i % 2 for i in f.all)
    lowered = jax.jit(jax.vmap(f, axes)).lower(*stacked)
    # None in merge_attentions.
    assert lowered.as_text().count("stablehlo.custom_call @natten.jax.custom_call_targets") <= 1
    mapped = lowered.compile()(*stacked)
    gradient = jax.grad(f.scalar, f.all)
    gradients = jax.jit(jax.vmap(gradient, axes))(*stacked)
    of_one = jax.jit(gradient)
    for i in range(3):
        x = [jnp.take(a, i, axis) for a, axis in zip(stacked, axes, strict=True)]
        pick = functools.partial(jax.tree.map, lambda r, i=i: r[i])
        assert_close(pick(mapped), f(*x))
        assert_close(pick(gradients), of_one(*x), 1e-10)


@transformation("`scan`")
def _(f):
    def step(total, scale):
        return total + f.scalar(f.arrays[0] * scale, *f.arrays[1:]), None

    def scanned(scales):
        return jax.lax.scan(step, 0.0, scales)[0]

    def unrolled(scales):
        return sum(step(0.0, s)[0] for s in scales)

    scales = jnp.array([0.5, 1.5])
    assert_close(jax.jit(scanned)(scales), unrolled(scales))
    want = jax.jit(jax.grad(unrolled))(scales)
    assert_close(jax.jit(jax.grad(scanned))(scales), want, 1e-10)


@transformation("`remat` (`jax.checkpoint`)")
def _(f):
    again = jax.checkpoint(f.scalar)
    assert_close(jax.jit(jax.grad(again, f.all))(*f.arrays), gradient(name_of(f)), 1e-10)


@transformation("inside `custom_vjp`")
def _(f):
    @jax.custom_vjp
    def clipped(*x):
        return f.scalar(*x)

    def forward(*x):
        return jax.vjp(f.scalar, *x)

    def backward(pull_back, g):
        return tuple(2 * d for d in pull_back(g))

    clipped.defvjp(forward, backward)
    want = jax.tree.map(lambda g: 2 * g, gradient(name_of(f)))
    assert_close(jax.jit(jax.grad(clipped, f.all))(*f.arrays), want, 1e-10)


@transformation("donated buffers")
def _(f):
    def first(*x):
        return jax.tree.leaves(f(*x))[0]

    want = [np.asarray(a) for a in (first(*f.arrays), *gradient(name_of(f)))]

    def copies():
        return [a.copy() for a in f.arrays]

    donating = jax.jit(first, donate_argnums=f.all)
    assert_same_bits(f, donating(*copies()), jnp.asarray(want[0]))
    # Gradients have the shapes of the arrays, so that all of these buffers are used again.
    donating = jax.jit(jax.grad(f.scalar, f.all), donate_argnums=f.all)
    given = copies()
    assert_close(donating(*given), want[1:], 1e-10)
    assert all(a.is_deleted() for a in given)


@transformation("`eval_shape`")
def _(f):
    shapes = jax.eval_shape(f, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in f.arrays))
    for shape, result in zip(*map(jax.tree.leaves, (shapes, f(*f.arrays))), strict=True):
        assert (shape.shape, shape.dtype) == (result.shape, result.dtype)


@transformation("`lower`, `compile`")
def _(f):
    compiled = jax.jit(f).lower(*f.arrays).compile()
    assert_same_bits(f, compiled(*f.arrays), f(*f.arrays))


def exported(function, *x):
    checks = [export.DisabledSafetyCheck.custom_call(t) for t in nj.custom_call_targets()]
    return export.export(jax.jit(function), disabled_checks=checks)(*x)


@transformation("`jax.export`")
def _(f):
    pytest.importorskip("flatbuffers", reason="jax.export saves programs with it")
    data = exported(f, *f.arrays).serialize(vjp_order=1)
    loaded = export.deserialize(data)
    assert_close(loaded.call(*f.arrays), f(*f.arrays))
    pull_back = jax.vjp(loaded.call, *f.arrays)[1]
    incoming = jax.tree.map(jnp.cos, f(*f.arrays))
    assert_close(pull_back(incoming), jax.vjp(f, *f.arrays)[1](incoming), 1e-10)


@transformation("weak types")
def _(f):
    weak = [jax.lax.full(a.shape, 0.5) for a in f.arrays]
    assert all(a.weak_type for a in weak)
    results = f(*weak)
    assert not any(r.weak_type for r in jax.tree.leaves(results))
    assert_same(results, f(*(jnp.full(a.shape, 0.5, a.dtype) for a in f.arrays)))


@transformation("float64, float32, bfloat16, float16")
def _(f):
    want = jax.tree.leaves(f(*f.arrays))
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 5e-2), ("float16", 1e-2)):
        x = [  # logsumexp is never of half precision
            a.astype("float32" if dims == "b-h" else dtype)
            for a, dims in zip(f.arrays, f.dims, strict=True)
        ]
        results = jax.tree.leaves(jax.jit(f)(*x))
        assert results[0].dtype == dtype
        for r, w in zip(results, want, strict=True):
            assert np.linalg.norm(r.astype(float) - w) < tolerance * np.linalg.norm(w)


# Several devices.


def meshes():
    devices = np.array(jax.devices()[:DEVICES]).reshape(2, 2)
    yield Mesh(devices, ("data", "model"))
    if jax.__version_info__ >= (0, 9):  # in older versions of JAX explicit axes are unfinished
        types = (jax.sharding.AxisType.Explicit,) * 2
        yield jax.make_mesh((2, 2), ("data", "model"), axis_types=types, devices=jax.devices()[:4])


AXES = {"batch": {"b": "data"}, "heads": {"h": "model"}, "both": {"b": "data", "h": "model"}}
COLLECTIVES = re.compile(r" (all-gather|all-to-all|collective-permute|all-reduce)(?:-start)?\(")


def collectives(compiled) -> set[str]:
    return set(COLLECTIVES.findall(compiled.as_text()))


def specs_of(f, axes):
    return tuple(PartitionSpec(*(axes.get(d) for d in dims)) for dims in f.dims)


@transformation("`jit` with `NamedSharding`, by batch and heads")
def _(f):
    want = f(*f.arrays), gradient(name_of(f))
    for mesh in meshes():
        # Explicit axes are types, which JAX passes on by itself; the partitioner does the others.
        is_explicit = jax.sharding.AxisType.Explicit in mesh.axis_types
        for axes in [AXES["both"]] if is_explicit else AXES.values():
            specs = specs_of(f, axes)
            x = [
                jax.device_put(a, NamedSharding(mesh, s))
                for a, s in zip(f.arrays, specs, strict=True)
            ]
            forward = jax.jit(f).lower(*x).compile()
            assert not collectives(forward)
            got = forward(*x)
            assert_close(got, want[0])
            for r in jax.tree.leaves(got):
                assert not r.sharding.is_fully_replicated
            # Of gradients only that of a bias is summed over devices.
            backward = jax.jit(jax.grad(f.scalar, f.all)).lower(*x).compile()
            assert collectives(backward) <= {"all-reduce"}
            gradients = backward(*x)
            assert_close(gradients, want[1], 1e-10)
            for g, a in zip(gradients, x, strict=True):
                assert g.sharding.is_equivalent_to(a.sharding, a.ndim)


@transformation("`shard_map`")
def _(f):
    want = f(*f.arrays), gradient(name_of(f))
    specs = specs_of(f, AXES["both"])
    for mesh in meshes():
        for checks in (True, False):

            def mapped(*x, autodiff="reverse", mesh=mesh, checks=checks):
                # A result has the dimensions of the first array or its first ones.
                results = jax.eval_shape(f, *x)
                out = jax.tree.map(
                    lambda r: PartitionSpec(*(AXES["both"].get(d) for d in f.dims[0][: r.ndim])),
                    results,
                )
                return jax.shard_map(
                    functools.partial(f.call, autodiff=autodiff),
                    mesh=mesh, in_specs=specs, out_specs=out, check_vma=checks,
                )(*x)  # fmt: skip

            sharded = dataclasses.replace(f, call=mapped)
            x = [
                jax.device_put(a, NamedSharding(mesh, s))
                for a, s in zip(f.arrays, specs, strict=True)
            ]
            assert_close(jax.jit(sharded)(*x), want[0])
            got = jax.jit(jax.grad(sharded.scalar, f.all))(*x)
            assert_close(got, want[1], 1e-10)


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.parametrize(
    ("transformation", "name"),
    [
        # Each transformation of one function is quick enough, each function being one of them.
        long_unless(i % len(NAMES) == j, transformation, name)
        for i, transformation in enumerate(TRANSFORMATIONS)
        for j, name in enumerate(NAMES)
    ],
)
def test_transformation(name, transformation):
    if "sharding" in transformation.lower() or "shard_map" in transformation:
        if len(jax.devices()) < DEVICES:
            pytest.skip(f"needs {DEVICES} devices (see conftest.py)")
        if not hasattr(jax, "shard_map"):
            pytest.skip("needs a newer JAX")
    TRANSFORMATIONS[transformation](functions()[name])


def test_the_page_lists_them_all():
    rows = re.findall(r"^\| (.*?) +\| ✓", PAGE.read_text(), re.MULTILINE)
    assert rows == list(TRANSFORMATIONS)
    assert set(NAMES) == set(nj.__all__) - {"custom_call_targets"}


def test_exported_programs_run_in_a_fresh_process(tmp_path):
    pytest.importorskip("flatbuffers", reason="jax.export saves programs with it")
    programs, wanted = {}, {}
    for name, f in functions().items():
        programs[name] = bytes(exported(f, *f.arrays).serialize())
        wanted[name] = [np.asarray(r) for r in jax.tree.leaves(f(*f.arrays))]
    arrays = {name: [np.asarray(a) for a in f.arrays] for name, f in functions().items()}
    (tmp_path / "programs").write_bytes(pickle.dumps((programs, arrays)))
    script = """if True:
        import pickle, sys
        import jax, numpy as np
        from jax import export
        import natten.jax  # makes the custom call known
        jax.config.update("jax_enable_x64", True)
        programs, arrays = pickle.load(open("programs", "rb"))
        results = {
            name: jax.tree.leaves(export.deserialize(data).call(*arrays[name]))
            for name, data in programs.items()
        }
        results = jax.tree.map(np.asarray, results)
        pickle.dump(results, open("results", "wb"))
    """
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    results = pickle.loads((tmp_path / "results").read_bytes())
    for name, want in wanted.items():
        assert_close(results[name], want)
