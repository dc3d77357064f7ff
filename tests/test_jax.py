"""JAX functions, subject by subject. Random problems: test_jax_random.py."""

from __future__ import annotations

import functools
import inspect
import itertools
import pickle
import subprocess
import sys

import cases
import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax.test_util import check_grads  # noqa: E402
from jax_cases import (  # noqa: E402
    ALL_FAMILIES,
    AV_NAMES,
    FAMILIES,
    FUSED_NAMES,
    QK_NAMES,
    RANKS,
    arrays_of,
    assert_close,
    assert_same,
    dense_attention,
    float64,  # noqa: F401, a fixture
    fused,
    fused_shapes,
    randn,
    results_and_gradients,
    weighted_sum,
)

import natten.jax as nj  # noqa: E402
from natten._args import make_config  # noqa: E402

# Transformations.


@RANKS
@ALL_FAMILIES
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jit_is_bit_identical_to_eager(rank, family, dtype):
    make, shapes = FAMILIES[family]
    function, x = make(rank), arrays_of(shapes(rank), dtype)
    assert_same(function(*x), jax.jit(function)(*x))
    gradient = jax.grad(weighted_sum(function), tuple(range(len(x))))
    assert_same(gradient(*x), jax.jit(gradient)(*x))
    with jax.disable_jit():
        assert_same(function(*x), jax.jit(function)(*x))


@RANKS
def test_check_grads_fused(rank):
    x = arrays_of(fused_shapes(rank, batch=1, heads=2, kv_heads=1))
    check_grads(fused(rank), x, order=2, modes=["rev"])
    for i in (0, 1):  # output alone, logsumexp alone
        check_grads(lambda *x, i=i: fused(rank)(*x)[i], x, order=1, modes=["rev"])


@RANKS
@pytest.mark.parametrize("family", ["qk", "av"])
def test_check_grads_unfused(rank, family):
    make, shapes = FAMILIES[family]
    check_grads(make(rank), arrays_of(shapes(rank, batch=1)), order=2, modes=["rev"])


def test_second_derivative_of_unfused_attention():
    """Against dense attention over the whole axis, where a window of all tokens sees all."""
    q, k, v, g = (randn(1, 2, 5, 3, seed=i) for i in range(4))

    def local(q, k, v):
        return nj.na1d_av(jax.nn.softmax(nj.na1d_qk(q, k, 5)), v, 5)

    def dense(q, k, v):
        return jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ v

    def penalty(function):  # a gradient penalty, differentiated in all its arguments
        def first(q, k, v):
            return jax.grad(lambda *x: jnp.sum(function(*x) * g), (0, 1, 2))(q, k, v)

        return jax.grad(lambda *x: sum(jnp.sum(d**2) for d in first(*x)), (0, 1, 2))

    assert_close(*(jax.jit(penalty(f))(q, k, v) for f in (local, dense)), 1e-10)


def test_causal_softmax_has_finite_second_derivatives():
    x = arrays_of(((1, 1, 6, 2),) * 3)

    def function(q, k, v):
        attn = jax.nn.softmax(nj.na1d_qk(q, k, 4, is_causal=True))
        return nj.na1d_av(attn, v, 4, is_causal=True)

    check_grads(function, x, order=2, modes=["rev"])


@pytest.mark.parametrize("autodiff", ["reverse", "any"])
def test_only_gradients_that_are_used_are_computed(autodiff):
    q, k, v = (randn(1, 5, 1, 2, seed=i) for i in range(3))

    def function(q, k, v):
        return jnp.sum(nj.na1d(q, k, v, 3, autodiff=autodiff) ** 2)

    def outputs(argnums):  # the handler's bit mask
        text = jax.jit(jax.grad(function, argnums)).lower(q, k, v).as_text()
        line = next(x for x in text.splitlines() if 'op = "attention_backward"' in x)
        return line.split("outputs = ")[1][0]

    assert [outputs(0), outputs(1), outputs((0, 2))] == ["1", "2", "5"]
    assert_same(jax.jit(jax.grad(function, 1))(q, k, v), jax.grad(function, 1)(q, k, v))
    text = jax.jit(function).lower(q, k, v).as_text()
    assert "outputs = 1 " in text  # no logsumexp without need


SUBSETS = [
    (family, subset)
    for family, names in (("fused", FUSED_NAMES), ("qk", QK_NAMES), ("av", AV_NAMES))
    for size in range(1, len(names) + 1)
    for subset in itertools.combinations(range(len(names)), size)
]


@functools.cache
def per_example(family):
    """Results and gradients of one example, compiled once for all subsets."""
    make, shapes = FAMILIES[family]
    return results_and_gradients(make(2), len(shapes(2)))


@pytest.mark.parametrize(("family", "subset"), SUBSETS, ids=str)
def test_vmap_over_any_arguments(family, subset):
    """vmap, vmap of grad and grad of vmap, mapped at various axes, against a loop."""
    make, shapes = FAMILIES[family]
    size, x, axes = 3, [], []
    for i, shape in enumerate(shapes(2, batch=1)):
        axis = (i + len(subset)) % len(shape) if i in subset else None
        axes.append(axis)
        shape = shape if axis is None else (*shape[:axis], size, *shape[axis:])
        x.append(np.asarray(randn(*shape, seed=i)))
    function, everything = make(2), tuple(range(len(x)))
    mapped = jax.vmap(function, axes)
    scalar = jax.vmap(weighted_sum(function), axes)

    @jax.jit
    def all_at_once(*x):
        return (
            mapped(*x),
            jax.vmap(jax.grad(weighted_sum(function), everything), axes)(*x),
            jax.grad(lambda *x: jnp.sum(scalar(*x)), everything)(*x),
        )

    examples = [
        per_example(family)(
            *(a if axis is None else np.take(a, i, axis) for a, axis in zip(x, axes, strict=True))
        )
        for i in range(size)
    ]
    results, gradients, total = all_at_once(*x)
    want_results, want_gradients = jax.tree.map(lambda *a: np.stack(a), *examples)
    assert_close(results, want_results)
    assert_close(gradients, want_gradients)
    for got, want, axis in zip(total, want_gradients, axes, strict=True):
        assert_close(got, want.sum(0) if axis is None else np.moveaxis(want, 0, axis))


@RANKS
def test_nested_vmap_with_and_without_a_mapped_bias(rank):
    x = arrays_of(fused_shapes(rank))
    function = fused(rank)
    more_queries = jnp.stack([x[0], x[0] + 1])
    more_biases = jnp.stack([x[3], x[3] * 2, x[3] - 1])
    both = jax.vmap(
        jax.vmap(function, (0, None, None, None, None, None)),
        (None, None, None, 0, None, None),
    )
    got = both(more_queries, *x[1:3], more_biases, *x[4:])
    want = [[function(q, *x[1:3], b, *x[4:]) for q in more_queries] for b in more_biases]
    want = jax.tree.map(lambda *rows: jnp.stack(rows), *(
        jax.tree.map(lambda *a: jnp.stack(a), *row) for row in want
    ))  # fmt: skip
    assert_close(got, want)


@ALL_FAMILIES
def test_vmap_over_no_examples(family):
    make, shapes = FAMILIES[family]
    x = arrays_of(shapes(2))
    nothing = tuple(jnp.zeros((0, *a.shape)) for a in x)
    want = results_and_gradients(make(2), len(x))(*x)
    got = jax.vmap(results_and_gradients(make(2), len(x)))(*nothing)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == (0, *b.shape) and a.dtype == b.dtype


@pytest.mark.parametrize("family", ["qk", "av"])
def test_vmap_of_second_derivatives(family):
    make, shapes = FAMILIES[family]
    x = arrays_of(shapes(1, batch=1, n=1))
    function = make(1)

    def second(*x):
        def squares(*x):
            first = jax.grad(lambda *x: jnp.sum(function(*x) ** 2), tuple(range(len(x))))(*x)
            return sum(jnp.sum(g**2) for g in first)

        return jax.grad(squares, tuple(range(len(x))))(*x)

    stacked = tuple(jnp.stack([a, 2 * a, a - 1]) for a in x)
    want = [jax.jit(second)(*(a[i] for a in stacked)) for i in range(3)]
    want = jax.tree.map(lambda *a: np.stack(a), *want)
    assert_close(jax.jit(jax.vmap(second))(*stacked), want, 1e-10)


def test_scan_and_remat():
    q = randn(1, 6, 2, 3)

    def step(x, _):
        return x + nj.na1d(x, x, x, 3), None

    def scanned(x):
        return jnp.sum(jax.lax.scan(step, x, None, length=3)[0] ** 2)

    def unrolled(x):
        for _ in range(3):
            x, _ = step(x, None)
        return jnp.sum(x**2)

    assert_close(jax.grad(scanned)(q), jax.grad(unrolled)(q))
    assert_close(jax.grad(jax.checkpoint(unrolled))(q), jax.grad(unrolled)(q))


# Values that the random problems do not reach.


def test_one_function_differentiated_in_several_arguments_and_modes():
    """One jit, whose trace of the derivative rules is shared by all of these."""
    x = arrays_of(fused_shapes(1))
    compiled = jax.jit(fused(1))
    everything = jax.grad(weighted_sum(compiled), tuple(range(6)))(*x)
    for i in range(6):
        assert_close(jax.grad(weighted_sum(compiled), i)(*x), everything[i])
    assert_close(jax.value_and_grad(weighted_sum(compiled))(*x)[1], everything[0])
    only_lse = jax.grad(lambda *x: jnp.sum(compiled(*x)[1]), 2)(*x)
    assert not np.any(only_lse)  # values do not enter logsumexp


def test_without_64_bit_types():
    jax.config.update("jax_enable_x64", False)
    q, k, v = (np.random.default_rng(i).standard_normal((1, 5, 2, 3)) for i in range(3))
    output, lse = jax.jit(lambda q: nj.na1d(q, k, v, 3, scale=0.5, return_lse=True))(q)
    assert output.dtype == lse.dtype == jnp.float32
    gradient = jax.grad(lambda q: jnp.sum(nj.na1d(q, k, v, 3, is_causal=True)))(jnp.asarray(q))
    assert gradient.dtype == jnp.float32


def test_weak_types_do_not_spread():
    x = jax.lax.full((1, 5, 1, 2), 1.0)
    assert x.weak_type and not nj.na1d(x, x, x, 3).weak_type
    assert not jax.jit(lambda x: nj.na1d_qk(x, x, 1))(x).weak_type


@RANKS
@ALL_FAMILIES
def test_empty_batch(rank, family):
    make, shapes = FAMILIES[family]
    function, x = make(rank), arrays_of(shapes(rank, batch=0))
    full = make(rank)(*arrays_of(shapes(rank)))
    for got, want in zip(
        jax.tree.leaves(jax.jit(function)(*x)), jax.tree.leaves(full), strict=True
    ):
        assert got.shape == (0, *want.shape[1:])
    gradients = jax.grad(weighted_sum(function), tuple(range(len(x))))(*x)
    for a, g in zip(x, gradients, strict=True):
        assert g.shape == a.shape and not np.any(g)


@pytest.mark.parametrize("lengths", [(5, 5), (3, 7), (7, 3), (1, 4), (4, 1)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention(lengths, is_causal):
    queries, keys = lengths
    x = randn(2, queries, 4, 3), randn(2, keys, 2, 3, seed=1), randn(2, keys, 2, 5, seed=2)

    def ours(*x):
        return nj.attention(*x, is_causal, scale=0.4, return_lse=True)

    def theirs(*x):
        return dense_attention(*x, is_causal, 0.4)

    assert_close(*(results_and_gradients(f)(*x) for f in (ours, theirs)))
    mapped = jax.vmap(lambda q: ours(q, *x[1:]))(jnp.stack([x[0], x[0] + 1]))
    assert_close(jax.tree.map(lambda r: r[0], mapped), ours(*x))
    assert_close(nj.attention(*x), nj.attention(*x, scale=3**-0.5))


@pytest.mark.parametrize("sizes", [(7,), (3, 4), (1, 2, 4)])
def test_merge_attentions(sizes):
    q = randn(2, 5, 2, 3)
    k, v = randn(2, sum(sizes), 2, 3, seed=1), randn(2, sum(sizes), 2, 4, seed=2)
    ends = np.cumsum(sizes)[:-1]

    def merged(q, k, v):
        parts = [
            nj.attention(q, *part, return_lse=True)
            for part in zip(jnp.split(k, ends, 1), jnp.split(v, ends, 1), strict=True)
        ]
        return nj.merge_attentions([p[0] for p in parts], [p[1] for p in parts])

    def whole(q, k, v):
        return nj.attention(q, k, v, return_lse=True)

    assert_close(*(results_and_gradients(f)(q, k, v) for f in (merged, whole)))


def test_merge_attentions_of_special_values():
    def total(outputs, lses):
        output, lse = nj.merge_attentions(outputs, lses)
        return output.sum() + lse.sum()

    cases.check_merges(jax.jit(nj.merge_attentions), jax.jit(jax.grad(total, (0, 1))))


def test_queries_that_see_nothing():
    """Scores are -inf in head 0: output 0, logsumexp -inf, no gradients or tangents."""
    inputs = [randn(1, 7, 2, 3, seed=i) for i in range(3)]
    inputs.append(randn(2, 5, seed=4).at[0].set(-jnp.inf))

    def function(q, k, v, rpb):
        return nj.na1d(q, k, v, 3, rpb=rpb, return_lse=True, autodiff="any")

    def total(*inputs):
        return function(*inputs)[0].sum()

    @jax.jit
    def results(*inputs):
        tangent = jax.jvp(function, inputs, tuple(map(jnp.ones_like, inputs)))[1][0]
        return function(*inputs), tangent, jax.grad(total, (0, 1, 2, 3))(*inputs)

    (output, lse), tangent, grads = results(*inputs)
    assert np.all(np.isneginf(lse[:, :, 0]))
    for x in (output, tangent, *grads[:3]):
        assert np.all(x[:, :, 0] == 0) and np.all(np.isfinite(x))
    assert np.all(grads[3][0] == 0) and np.all(np.isfinite(grads[3]))


def test_merge_attentions_types_and_refusals():
    output, lse = randn(1, 5, 2, 3, dtype="bfloat16"), randn(1, 5, 2, dtype="float32")
    merged, merged_lse = nj.merge_attentions([output, output], [lse, lse])
    assert merged.dtype == jnp.bfloat16 and merged_lse.dtype == jnp.float32
    for outputs, lses, error, name in (
        ([], [], ValueError, "outputs, lse_tensors"),
        ([output], [lse, lse], ValueError, "outputs, lse_tensors"),
        ([output, output[:, :4]], [lse, lse], ValueError, "outputs"),
        ([output], [lse[..., None]], ValueError, "lse_tensors"),
        ([output, output.astype("float32")], [lse, lse], TypeError, "outputs"),
        ([output.astype(int)], [lse], TypeError, "outputs"),
        ([output], [lse.astype(int)], TypeError, "lse_tensors"),
    ):
        with pytest.raises(error, match=f"^{name}: got"):
            nj.merge_attentions(outputs, lses)


# Refusals, all while tracing.

F32 = jax.ShapeDtypeStruct((1, 6, 6, 4, 8), "float32")


def like(shape=F32.shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


HALF_HEADS = like((1, 6, 6, 2, 8))
HEADS_FIRST = like((1, 4, 6, 6, 8))
TOKENS, TOKENS_FIRST = like((1, 3, 4, 8)), like((1, 4, 3, 8))
REFUSED_FUSED = [
    (dict(kernel_size=(3, 3, 3)), ValueError, "kernel_size"),
    (dict(kernel_size=(3,)), ValueError, "kernel_size"),
    (dict(kernel_size=0), ValueError, "kernel_size"),
    (dict(kernel_size=7), ValueError, "kernel_size"),
    (dict(kernel_size=3.0), TypeError, "kernel_size"),
    (dict(kernel_size=None), TypeError, "kernel_size"),
    (dict(dilation=0), ValueError, "dilation"),
    (dict(dilation=(1, 1, 1)), ValueError, "dilation"),
    (dict(dilation=3), ValueError, "kernel_size"),
    (dict(stride=0), ValueError, "stride"),
    (dict(stride=4), ValueError, "stride"),
    (dict(is_causal=(True,)), ValueError, "is_causal"),
    (dict(scale=float("nan")), ValueError, "scale"),
    (dict(scale=float("inf")), ValueError, "scale"),
    (dict(scale="big"), TypeError, "scale"),
    (dict(query=like((1, 6, 4, 8))), ValueError, "query"),
    (dict(query=like(dtype="int32")), TypeError, "query"),
    (dict(query=like(dtype="complex64")), TypeError, "query"),
    (dict(query=None), TypeError, "query"),
    (dict(key=like((1, 6, 6, 3, 8)), value=like((1, 6, 6, 3, 8))), ValueError, "key"),
    (dict(key=like((2, 6, 6, 4, 8))), ValueError, "key"),
    (dict(key=like((1, 6, 5, 4, 8))), ValueError, "key"),
    (dict(key=like((1, 6, 6, 4, 7))), ValueError, "key"),
    (dict(key=like(dtype="float16")), TypeError, "key"),
    (dict(value=HALF_HEADS), ValueError, "value"),
    (dict(value=like(dtype="bfloat16")), TypeError, "value"),
    (dict(rpb=like((4, 5, 4))), ValueError, "rpb"),
    (dict(rpb=like((2, 5, 5))), ValueError, "rpb"),
    (dict(rpb=like((4, 5, 5), "float64")), TypeError, "rpb"),
    (dict(additional_keys=TOKENS), ValueError, "additional_values"),
    (dict(additional_values=TOKENS), ValueError, "additional_keys"),
    (
        dict(additional_keys=TOKENS, additional_values=like((1, 2, 4, 8))),
        ValueError,
        "additional_values",
    ),
    (dict(backend="nonsense"), ValueError, "backend"),
]
REFUSED_QK = [
    (dict(kernel_size=(3, 3, 3)), ValueError, "kernel_size"),
    (dict(stride=4), ValueError, "stride"),
    (dict(query=like((1, 4, 6, 8))), ValueError, "query"),
    (dict(key=like((1, 2, 6, 6, 8))), ValueError, "key"),
    (dict(key=like(HEADS_FIRST.shape, "int32")), TypeError, "key"),
    (dict(rpb=like((4, 5, 4))), ValueError, "rpb"),
    (dict(additional_keys=like((1, 2, 3, 8))), ValueError, "additional_keys"),
    (dict(backend="nonsense"), ValueError, "backend"),
]
REFUSED_AV = [
    (dict(attn=like((1, 4, 6, 6, 8))), ValueError, "attn"),
    (dict(attn=like((1, 4, 6, 6, 9), "float16")), TypeError, "value"),
    (dict(attn=like((1, 4, 5, 6, 9))), ValueError, "value"),
    (dict(additional_values=TOKENS_FIRST), ValueError, "attn"),
    (dict(dilation=3), ValueError, "kernel_size"),
]


def check_refusal(function, defaults, wrong, error, name):
    arguments = defaults | wrong
    arrays = {k: v for k, v in arguments.items() if isinstance(v, jax.ShapeDtypeStruct)}
    others = {k: v for k, v in arguments.items() if k not in arrays}
    # eval_shape traces and does nothing else; jit must not get further than that either.
    with pytest.raises(error, match=f"^{name}: "):
        jax.eval_shape(lambda arrays: function(**arrays, **others), arrays)
    zeros = {k: jnp.zeros(v.shape, v.dtype) for k, v in arrays.items()}
    with pytest.raises(error, match=f"^{name}: "):
        jax.jit(lambda arrays: function(**arrays, **others)).trace(zeros)
    with pytest.raises(error, match=f"^{name}: "):
        function(**zeros, **others)


@pytest.mark.parametrize(("wrong", "error", "name"), REFUSED_FUSED, ids=str)
def test_refusals_fused(wrong, error, name):
    defaults = {"query": F32, "key": F32, "value": F32, "kernel_size": 3}
    check_refusal(nj.na2d, defaults, wrong, error, name)


@pytest.mark.parametrize(("wrong", "error", "name"), REFUSED_QK, ids=str)
def test_refusals_qk(wrong, error, name):
    defaults = {"query": HEADS_FIRST, "key": HEADS_FIRST, "kernel_size": 3}
    check_refusal(nj.na2d_qk, defaults, wrong, error, name)


@pytest.mark.parametrize(("wrong", "error", "name"), REFUSED_AV, ids=str)
def test_refusals_av(wrong, error, name):
    defaults = {"attn": like((1, 4, 6, 6, 9)), "value": HEADS_FIRST, "kernel_size": 3}
    check_refusal(nj.na2d_av, defaults, wrong, error, name)


@pytest.mark.parametrize(
    ("wrong", "error", "name"),
    [
        (dict(key=like((8,))), ValueError, "key"),
        (dict(key=like((1, 3, 4, 7))), ValueError, "key"),
        (dict(key=like((1, 3, 3, 8)), value=like((1, 3, 3, 8))), ValueError, "key"),
        (dict(value=like((1, 4, 4, 8))), ValueError, "value"),
        (dict(query=like((1, 4, 8))), ValueError, "query"),
        (dict(query=like((1, 3, 4, 8), "int8")), TypeError, "query"),
        (dict(scale=float("nan")), ValueError, "scale"),
    ],
    ids=str,
)
def test_refusals_attention(wrong, error, name):
    defaults = {"query": TOKENS, "key": TOKENS, "value": TOKENS}
    check_refusal(nj.attention, defaults, wrong, error, name)


def test_traced_numbers_are_refused():
    q = randn(1, 5, 1, 2)
    with pytest.raises(TypeError, match=r"^scale: got"):
        jax.jit(lambda s: nj.na1d(q, q, q, 3, scale=s))(0.5)
    with pytest.raises(TypeError, match=r"^kernel_size: got"):
        jax.jit(lambda k: nj.na1d(q, q, q, k))(3)


def test_messages_are_the_cores():
    q = jnp.zeros((1, 5, 1, 2))
    message = (
        "kernel_size: got [3] with dilation 2 on axis 0; kernel_size * dilation must not exceed "
        "the axis, 5 tokens here (query, [1, 5, 1, 2], is read as [batch, *spatial, heads, "
        'head_dim]), unless its border cuts windows (boundary "cut")'
    )
    with pytest.raises(ValueError) as caught:
        jax.jit(lambda q: nj.na1d(q, q, q, 3, dilation=2))(q)
    assert str(caught.value) == message


# The package.


def test_names_signatures_and_pickling():
    for rank, suffix in itertools.product((1, 2, 3), ("", "_qk", "_av")):
        name = f"na{rank}d{suffix}"
        function = getattr(nj, name)
        assert function.__name__ == function.__qualname__ == name
        assert function.__module__ == "natten.jax"
        assert f"{rank}-D" in function.__doc__ and "{rank}" not in function.__doc__
        assert pickle.loads(pickle.dumps(function)) is function
        assert {"backend", "autodiff"} <= inspect.signature(function).parameters.keys()
    assert nj.custom_call_targets() == ["natten.jax.custom_call_targets"]


def test_version_of_the_ffi():
    from natten.jax import _ffi

    assert _ffi._offered_api_version() is not None
    for offered in ((0, 1), (0, 3), None):
        _ffi.check_api_version((0, 1), offered)
    for offered in ((0, 2), (1, 5)):
        with pytest.raises(ImportError, match="Install a newer jaxlib"):
            _ffi.check_api_version((0, 3), offered)


@pytest.mark.parametrize(
    ("package", "absent"),
    [("natten", ("torch", "jax")), ("natten.jax", ("torch",)), ("natten.jax", ("flax",))],
)
def test_imports_load_no_other_framework(package, absent):
    program = f"import sys, {package}; print([m for m in {absent} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def call_handler(*arrays, result=(1, 5, 2, 4), **changed):
    """The custom call itself, by which a program that somebody edited may call it."""
    attributes = {
        "op": "attention_forward",
        "config": np.array(make_config(1, 3), np.int64),
        "scale": np.float64(0),
        "backend": "",
        "inputs": np.int64(0b111),
        "outputs": np.int64(1),
        "has_workspace": np.bool_(False),
    }
    (target,) = nj.custom_call_targets()
    call = jax.ffi.ffi_call(target, [jax.ShapeDtypeStruct(result, jnp.float32)])
    (output,) = jax.block_until_ready(call(*arrays, **attributes | changed))
    return output


def test_the_handler_refuses_and_never_ends_the_process():
    x = jnp.ones((1, 5, 2, 4), jnp.float32)
    assert np.all(call_handler(x, x, x) == 1)
    for changed, message in (
        ({"op": "nothing"}, 'op: got "nothing"'),
        ({"op": 1}, "Failed to decode"),
        ({"op": "attention_backward"}, "logsumexp: missing"),
        ({"config": np.array([7], np.int64)}, "config: malformed"),
        ({"config": np.array([1, 9], np.int64)}, "config: malformed"),
        ({"config": np.array([-1, 9], np.int64)}, "config: malformed"),
        ({"config": np.array(make_config(1, 9), np.int64)}, "kernel_size: got"),
        ({"backend": "no"}, 'backend: got "no"'),
        ({"inputs": np.int64(0b1)}, "key: missing"),
        ({"inputs": np.int64(0b1111)}, "out of range"),
        ({"outputs": np.int64(0b11)}, "out of range"),
        ({"has_workspace": np.bool_(True)}, "out of range"),
        ({"result": (1, 5, 2, 3)}, "output: got shape"),
    ):
        with pytest.raises(Exception, match=f"INVALID_ARGUMENT.*{message}"):
            call_handler(x, x, x, **changed)
    for arrays, message in (
        ((x, x), "out of range"),
        ((x, x, x.astype(int)), "value: dtype must be"),
        ((x, x, jnp.ones((1,) * 12, jnp.float32)), "value: too many dimensions"),
    ):
        with pytest.raises(Exception, match=f"INVALID_ARGUMENT.*{message}"):
            call_handler(*arrays)
