"""Derivatives of the JAX functions, of every order and mode, against dense attention."""

from __future__ import annotations

import functools
import re
from types import SimpleNamespace

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import oracle  # noqa: E402
from cases import long_unless  # noqa: E402
from jax.test_util import check_grads  # noqa: E402
from jax_cases import (  # noqa: E402
    AV,
    FUSED_NAMES,
    GRIDS,
    MIXED,
    QK,
    arrays_of,
    av_shapes,
    float64,  # noqa: F401, a fixture
    fused_shapes,
    fused_with,
    qk_shapes,
    randn,
    unfused_with,
)
from jax_cases import dense_attention as dense_attention_to_all  # noqa: E402

import natten.jax as nj  # noqa: E402

MODES = pytest.mark.parametrize("autodiff", ["reverse", "any"])
KINDS = pytest.mark.parametrize("kind", ["fused", "unfused"])


def assert_close(got, want, tolerance=1e-12):
    """Relative to the largest element of each array."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        size = np.max(np.abs(b), initial=0.0)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * size)


# (query, key, value, rpb, additional_keys, additional_values) -> (output, logsumexp), three times.


def dense(rank):
    neighborhood = {n: np.broadcast_to(x, rank).tolist() for n, x in MIXED[rank].items()}
    return dense_on(oracle.Grid(SimpleNamespace(shape=GRIDS[rank], **neighborhood)))


def dense_on(grid, key_mask=None):
    """Dense masked attention, which JAX differentiates by itself."""

    def attention(q, k, v, rpb, ak, av):
        def flat(x):
            return x.reshape(x.shape[0], -1, *x.shape[-2:])

        group = q.shape[-2] // k.shape[-2]
        k, v = (
            jnp.repeat(jnp.concatenate([flat(x), extra], 1), group, 2)
            for x, extra in ((k, ak), (v, av))
        )
        scores = jnp.einsum("bqhd,bkhd->bqhk", flat(q), k) * q.shape[-1] ** -0.5
        bias = rpb.reshape(rpb.shape[0], -1)[:, np.maximum(grid.relative, 0)].swapaxes(0, 1)
        bias = jnp.where(grid.seen[:, None], bias, -jnp.inf)  # [queries, heads, keys]
        scores += jnp.concatenate([bias, jnp.zeros((*bias.shape[:2], ak.shape[1]))], -1)
        if key_mask is not None:
            mask = key_mask.reshape(len(key_mask), 1, 1, -1)
            mask = jnp.pad(mask, [(0, 0)] * 3 + [(0, ak.shape[1])], constant_values=True)
            scores = jnp.where(mask, scores, -jnp.inf)
        output = jnp.einsum("bqhk,bkhd->bqhd", jax.nn.softmax(scores), v)
        lse = jax.nn.logsumexp(scores, -1)
        return output.reshape(*q.shape[:-1], -1), lse.reshape(q.shape[:-1])

    return attention


def fused(rank, autodiff):
    return fused_with(rank, **MIXED[rank], autodiff=autodiff)


def unfused(rank, autodiff):
    return unfused_with(rank, **MIXED[rank], autodiff=autodiff)


LIBRARY = {"fused": fused, "unfused": unfused}


# Derivatives: (function, its arguments) -> arrays.


def scalar(function):
    """A scalar that is linear in nothing."""

    def result(*x):
        return sum(
            jnp.sum(jnp.sin(r + jnp.arange(r.size).reshape(r.shape)))
            for r in jax.tree.leaves(function(*x))
        )

    return result


def directions(x):
    """A direction in which to differentiate, unlike x."""
    return tuple(jnp.cos(a + i) for i, a in enumerate(x))


def gradient(function):
    return lambda *x: jax.grad(function, tuple(range(len(x))))(*x)


def of_two(transform):
    """A transformation of a function of the first and the last argument, as it is of that size."""

    def derivative(f, x):
        def function(pair):
            return f(pair[0], *x[1:-1], pair[1])

        return transform(function)((x[0], x[-1]))

    return derivative


def grad_of_grad(f, x):
    return gradient(scalar(gradient(scalar(f))))(*x)


IN_REVERSE = {
    "vjp": lambda f, x: jax.vjp(f, *x)[1](directions(f(*x))),
    "vjp of the first result": lambda f, x: gradient(scalar(lambda *x: f(*x)[0]))(*x),
    "vjp of the last result": lambda f, x: gradient(scalar(lambda *x: f(*x)[-1]))(*x),
    "jacrev": of_two(jax.jacrev),
    "jacrev of jacrev": of_two(lambda f: jax.jacrev(jax.jacrev(scalar(f)))),
    "grad of grad": grad_of_grad,
    "third order": lambda f, x: gradient(scalar(gradient(scalar(gradient(scalar(f))))))(*x),
    "grad of remat of grad": lambda f, x: grad_of_grad(jax.checkpoint(f), x),
    "grad of jit of grad": lambda f, x: grad_of_grad(jax.jit(f), x),
    "forward over reverse": lambda f, x: jax.jvp(gradient(scalar(f)), x, directions(x)),
    "hessian": of_two(lambda f: jax.hessian(scalar(f))),
}
FORWARD = {
    "jvp": lambda f, x: jax.jvp(f, x, directions(x)),
    "linearize": lambda f, x: jax.linearize(f, *x)[1](*directions(x)),
    "jvp of jit": lambda f, x: jax.jvp(jax.jit(f), x, directions(x)),
    "jacfwd": of_two(jax.jacfwd),
    "jacrev of jacfwd": of_two(lambda f: jax.jacrev(jax.jacfwd(scalar(f)))),
    "reverse over forward": lambda f, x: gradient(
        scalar(lambda *x: jax.jvp(f, x, directions(x))[1])
    )(*x),
    "forward over forward": lambda f, x: jax.jvp(
        lambda *x: jax.jvp(f, x, directions(x)), x, directions(directions(x))
    ),
    "third order, forward over reverse over reverse": lambda f, x: jax.jvp(
        gradient(scalar(gradient(scalar(f)))), x, directions(x)
    )[1],
    "third order, reverse over forward over reverse": lambda f, x: gradient(
        scalar(lambda *x: jax.jvp(gradient(scalar(f)), x, directions(x))[1])
    )(*x),
}
DERIVATIVES = IN_REVERSE | FORWARD
CASES = [("reverse", name) for name in IN_REVERSE] + [("any", name) for name in DERIVATIVES]
# Compilation takes most of the time, so rank 2 has all of them and the other ranks these.
FEW = ("vjp", "grad of grad", "jvp", "jacfwd", "hessian", "reverse over forward")
QUICK = [("reverse", "vjp"), ("reverse", "grad of grad"), ("any", "jvp"), ("any", "hessian")]
FEW_DERIVATIVES = pytest.mark.parametrize(
    ("autodiff", "name"),
    [long_unless(case in QUICK, *case) for case in CASES if case[1] in FEW],
    ids=str,
)

# Per rank: which arguments examples have of their own.
MAPPED = {
    1: (0, 0, 0, 0, 0, 0),
    2: (0, None, 0, None, None, 0),
    3: (None, 0, None, 0, None, None),
}


def problem(rank):
    return arrays_of(fused_shapes(rank, batch=1, heads=2, kv_heads=1, dim=2, value_dim=2))


def examples(rank):
    return tuple(
        x if axis is None else jnp.stack([x, 0.5 - x])
        for x, axis in zip(problem(rank), MAPPED[rank], strict=True)
    )


def in_one_call(name, rank):
    """The derivative of all examples of a function, by vmap under jit."""

    def derivative(function):
        mapped = jax.vmap(lambda *x: DERIVATIVES[name](function, x), MAPPED[rank])
        return jax.jit(mapped)(*examples(rank))

    return derivative


@functools.cache
def expected(name, rank):
    return in_one_call(name, rank)(dense(rank))


@pytest.mark.parametrize(
    ("rank", "autodiff", "name"),
    [
        long_unless(rank == 2 and case in QUICK, rank, *case)
        for rank in (1, 2, 3)
        for case in CASES
        if rank == 2 or case[1] in FEW
    ],
    ids=str,
)
@KINDS
def test_vmap_and_jit_of_every_derivative(rank, kind, autodiff, name):
    got = in_one_call(name, rank)(LIBRARY[kind](rank, autodiff))
    assert_close(got, expected(name, rank))


@pytest.mark.long
@KINDS
@FEW_DERIVATIVES
def test_derivatives_without_jit(kind, autodiff, name):
    got = DERIVATIVES[name](LIBRARY[kind](1, autodiff), problem(1))
    assert_close(got, jax.tree.map(lambda x: x[0], expected(name, 1)))


@pytest.mark.parametrize(("queries", "keys", "is_causal"), [(3, 5, True), (4, 2, False)])
@FEW_DERIVATIVES
def test_attention_to_all_keys(queries, keys, is_causal, autodiff, name):
    x = arrays_of(((1, queries, 2, 2), (1, keys, 1, 2), (1, keys, 1, 3)))

    def ours(*x):
        return nj.attention(*x, is_causal, 0.4, return_lse=True, autodiff=autodiff)

    def theirs(*x):
        return dense_attention_to_all(*x, is_causal, 0.4)

    derivative = jax.jit(DERIVATIVES[name], static_argnums=0)
    assert_close(derivative(ours, x), derivative(theirs, x))


# The unfused functions one by one, against finite differences.


@pytest.mark.long
@MODES
@pytest.mark.parametrize("function", ["qk", "av"])
def test_check_grads_unfused(function, autodiff):
    table, shapes = (QK, qk_shapes) if function == "qk" else (AV, av_shapes)
    names = {"qk": ("query", "key", "rpb", "additional_keys"),
             "av": ("attn", "value", "additional_values")}[function]  # fmt: skip

    def call(*x):
        result = table[2](**dict(zip(names, x, strict=True)), **MIXED[2], autodiff=autodiff)
        return jnp.where(jnp.isneginf(result), 0.0, result)

    modes = ["rev"] if autodiff == "reverse" else ["fwd", "rev"]
    check_grads(call, arrays_of(shapes(2, batch=1)), order=3, modes=modes)


def test_tangents_of_empty_slots_are_zero():
    q, k = randn(1, 1, 5, 2), randn(1, 1, 5, 2, seed=1)
    rpb = randn(1, 7)

    def scores(q, k, rpb):
        return nj.na1d_qk(q, k, 4, is_causal=True, rpb=rpb, autodiff="any")

    x = q, k, rpb
    for i in range(3):  # one at a time, and all
        tangents = [a if i == j else jnp.zeros_like(a) for j, a in enumerate(x)]
        result, tangent = jax.jvp(scores, x, tuple(tangents))
        empty = np.isneginf(result)
        assert empty.sum() == 6 and not np.any(np.asarray(tangent)[empty])
        assert np.all(np.asarray(tangent)[~empty])
    _, tangent = jax.jvp(scores, x, x)
    assert not np.any(np.asarray(tangent)[empty])


# What is computed.


def operations(function, *x):
    """The library's operations that a function calls."""
    return sorted(re.findall(r" natten_(\w+)\[", str(jax.make_jaxpr(function)(*x))))


@MODES
def test_the_first_derivative_is_fused(autodiff):
    x, f = problem(2), fused(2, autodiff)
    stacked = tuple(jnp.stack([a, a + 1]) for a in x)
    for function, arguments in (
        (gradient(scalar(f)), x),
        (gradient(scalar(jax.jit(f))), x),
        (jax.vmap(gradient(scalar(f))), stacked),
        (gradient(scalar(jax.vmap(f))), stacked),
    ):
        assert operations(function, *arguments) == ["attention_backward", "attention_forward"]


def test_forward_mode_differentiates_what_is_composed():
    x, f = problem(2), fused(2, "any")
    found = operations(lambda *x: jax.jvp(f, x, x), *x)
    assert found == ["attention_forward", "attention_tangent"]
    compiled = jax.jit(lambda *x: jax.jvp(f, x, x)).lower(*x).as_text()
    assert 'op = "qk"' in compiled and 'op = "attention_backward"' not in compiled


@KINDS
def test_modes_give_the_same_bits_in_reverse(kind):
    x = problem(2)
    a, b = (gradient(scalar(LIBRARY[kind](2, mode)))(*x) for mode in ("reverse", "any"))
    for left, right in zip(a, b, strict=True):
        np.testing.assert_array_equal(left, right)


# Other transformations and arguments.


@KINDS
def test_linear_transpose(kind):
    """Of a derivative: that of the pullback is the tangent, and the reverse."""
    x, f = problem(1), LIBRARY[kind](1, "any")
    results, pullback = jax.vjp(f, *x)
    (got,) = jax.linear_transpose(pullback, results)(directions(x))
    want = jax.jvp(f, x, directions(x))[1]
    assert_close(got, want)
    push = jax.linearize(f, *x)[1]
    assert_close(jax.linear_transpose(push, *x)(directions(results)), pullback(directions(results)))
    # In one of the results only.
    (got,) = jax.linear_transpose(
        lambda g: pullback((g, jnp.zeros_like(results[1]))), results[0]
    )(directions(x))  # fmt: skip
    assert_close(got, want[0])


def test_scan():
    q = randn(1, 6, 2, 3)

    def step(x, _):
        return x + nj.na1d(x, x, x, 3, autodiff="any"), None

    def scanned(x):
        return jax.lax.scan(step, x, None, length=3)[0]

    def unrolled(x):
        for _ in range(3):
            x, _ = step(x, None)
        return x

    for derivative in (FORWARD["jvp"], FORWARD["reverse over forward"], grad_of_grad):
        derivative = jax.jit(derivative, static_argnums=0)
        assert_close(derivative(scanned, (q,)), derivative(unrolled, (q,)))


@pytest.mark.long
@KINDS
@pytest.mark.parametrize("i", range(6), ids=FUSED_NAMES)
def test_all_other_arguments_are_constant(kind, i):
    x = problem(1)

    def block(f):
        function = jax.hessian(lambda a: scalar(f)(*x[:i], a, *x[i + 1 :]))
        return jax.jit(function)(x[i])

    want = block(dense(1))
    for autodiff in ("reverse", "any"):
        assert_close(block(LIBRARY[kind](1, autodiff)), want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_low_precision(dtype):
    """Tangents and second derivatives keep the type, and are rounded from float32 once."""
    x = arrays_of(fused_shapes(1, batch=1, heads=2, kv_heads=1, dim=2), dtype)
    wide = tuple(a.astype("float64") for a in x)
    t = tuple(0.5 * a for a in x)
    wide_t = tuple(a.astype("float64") for a in t)
    f = fused(1, "any")
    tangents = jax.jvp(f, x, t)[1]
    assert [a.dtype for a in tangents] == [dtype, "float32"]
    eps = {"float32": 1e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    for got, want, relative in zip(tangents, jax.jvp(f, wide, wide_t)[1], (eps, 1e-6), strict=True):
        np.testing.assert_allclose(got.astype("float64"), want, rtol=relative, atol=3e-6)

    def backward(*x):  # linear in the results, so that its tangent has no terms but the library's
        return jax.vjp(f, *x)[1](jax.tree.map(jnp.ones_like, f(*x)))

    tangents = jax.jvp(backward, x, t)[1]
    assert all(a.dtype == dtype for a in tangents)
    for got, want in zip(tangents, jax.jvp(backward, wide, wide_t)[1], strict=True):
        np.testing.assert_allclose(got.astype("float64"), want, rtol=2 * eps, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", ["jvp", "grad of grad", "reverse over forward"])
def test_no_examples_and_an_empty_batch(name):
    f, derivative = fused(2, "any"), DERIVATIVES[name]
    x = problem(2)
    want = jax.eval_shape(lambda *x: derivative(f, x), *x)
    nothing = tuple(jnp.zeros((0, *a.shape)) for a in x)
    got = jax.vmap(lambda *x: derivative(f, x))(*nothing)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == (0, *b.shape) and a.dtype == b.dtype
    empty = tuple(a if i == 3 else a[:0] for i, a in enumerate(x))
    for a in jax.tree.leaves(derivative(f, empty)):
        assert not np.any(a)


# Refusals.

CALLS = {
    "na1d": lambda x, **o: nj.na1d(x, x, x, 3, **o),
    "na1d_qk": lambda x, **o: nj.na1d_qk(x, x, 3, **o),
    "na1d_av": lambda x, **o: nj.na1d_av(x[..., :3], x, 3, **o),
    "attention": lambda x, **o: nj.attention(x, x, x, **o),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_forward_mode_is_barred_unless_asked_for(call):
    x = randn(1, 4, 4, 3)
    for options in ({}, {"autodiff": "reverse"}):
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(lambda x, o=options: call(x, **o), (x,), (x,))
    jax.jvp(lambda x: call(x, autodiff="any"), (x,), (x,))
    with pytest.raises(ValueError, match=r'^autodiff: got \'forward\'; must be "reverse" or "any"'):
        call(x, autodiff="forward")
