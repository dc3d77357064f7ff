"""Flax modules for nnx and linen, and weights from and to PyTorch."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

import cases  # noqa: E402
import flax.linen as nn  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from cases import Case  # noqa: E402
from flax import nnx  # noqa: E402
from flax.core import FrozenDict  # noqa: E402
from jax.sharding import Mesh, PartitionSpec  # noqa: E402
from oracle import fused  # noqa: E402

import natten.flax as nf  # noqa: E402
import natten.flax.linen as nl  # noqa: E402
import natten.jax  # noqa: E402
from natten.flax import _attend  # noqa: E402

NNX = {
    1: nf.NeighborhoodAttention1D,
    2: nf.NeighborhoodAttention2D,
    3: nf.NeighborhoodAttention3D,
}
LINEN = {
    1: nl.NeighborhoodAttention1D,
    2: nl.NeighborhoodAttention2D,
    3: nl.NeighborhoodAttention3D,
}
CLASSES = {"nnx": NNX, "linen": LINEN}
GRIDS = {1: (7,), 2: (5, 4), 3: (3, 4, 2)}
MIXED: dict[int, dict[str, Any]] = {
    1: dict(kernel_size=3, dilation=2, is_causal=True, stride=2),
    2: dict(kernel_size=(2, 3), dilation=(2, 1), is_causal=(False, True), stride=(1, 2)),
    3: dict(kernel_size=(3, 2, 2), dilation=(1, 2, 1), is_causal=(False, True, False), stride=1),
}
DIM, HEADS = 12, 3
KINDS = pytest.mark.parametrize("kind", ["nnx", "linen"])
RANKS = pytest.mark.parametrize("rank", [1, 2, 3])
BIASES = pytest.mark.parametrize(
    ("rel_pos_bias", "qkv_bias"), [(True, True), (False, True), (True, False)]
)


@pytest.fixture(autouse=True)
def _no_deprecated_calls():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        yield


@pytest.fixture
def x64():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def images(rank, seed=0, dtype="float32"):
    x = np.random.default_rng(seed).standard_normal((2, *GRIDS[rank], DIM))
    return jnp.asarray(x.astype(jnp.dtype(dtype)))


class Built:
    """A module of either kind and its parameters, of which the output is a function."""

    def __init__(self, kind, rank, seed=0, **options):
        options = MIXED[rank] | {"rel_pos_bias": True} | options
        if kind == "nnx":
            self.module = NNX[rank](DIM, HEADS, **options, rngs=nnx.Rngs(seed))
            params = nnx.to_pure_dict(nnx.state(self.module, nnx.Param))
        else:
            self.module = LINEN[rank](DIM, HEADS, **options)
            init = functools.partial(self.module.init, deterministic=True)
            params = jax.eval_shape(init, jax.random.key(seed), images(rank))["params"]
        random = np.random.default_rng(seed)

        def draw(path, p):
            """Biases too, which start at zero."""
            assert p.dtype == options.get("param_dtype", jnp.float32)
            scale = DIM**-0.5 if path[-1].key == "kernel" else 1
            return jnp.asarray(scale * random.standard_normal(p.shape), p.dtype)

        self.params = jax.tree_util.tree_map_with_path(draw, params)
        self._jitted = jax.jit(self.apply, static_argnames="deterministic")

    def apply(self, params, x, seed=0, *, key_mask=None, deterministic=True):
        """The output; `seed` is that of dropout."""
        key = jax.random.key(seed)
        if isinstance(self.module, nn.Module):
            return self.module.apply(
                {"params": params}, x, deterministic, key_mask=key_mask, rngs={"dropout": key}
            )
        graph, state, rest = nnx.split(self.module, nnx.Param, ...)
        nnx.replace_by_pure_dict(state, params)
        module = nnx.merge(graph, state, rest)
        rngs = nnx.Rngs(dropout=key)
        return module(x, key_mask=key_mask, deterministic=deterministic, rngs=rngs)

    def __call__(self, x, seed=0, **options):
        return self._jitted(self.params, x, seed, **options)

    def gradients(self, x, **options):
        """Of the mean square of the output, by the parameters and x."""

        def loss(params, x):
            return jnp.mean(self.apply(params, x, **options).astype(jnp.float32) ** 2)

        return jax.jit(jax.grad(loss, (0, 1)))(self.params, x)


def make(rank, seed=0, **options):
    """An nnx module with biases that are not zero."""
    built = Built("nnx", rank, seed, **options)
    nf.load_torch(built.module, nf.to_torch(built.params))
    return built.module


def close(got, want, bound=1e-5):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= bound * np.linalg.norm(want)


def all_close(got, want, bound=1e-5):
    jax.tree.map(functools.partial(close, bound=bound), got, want)


def reference(module, params, x, key_mask=None):
    """A module in numpy float64, over the oracle."""
    rank, dim = module.rank, DIM // HEADS
    weights = {k: np.asarray(v, np.float64) for k, v in nf.to_torch(params).items()}
    qkv = np.asarray(x, np.float64) @ weights["qkv.weight"].T + weights.get("qkv.bias", 0)
    qkv = qkv.reshape(*x.shape[:-1], 3, HEADS, dim)
    arrays = {name: qkv[..., i, :, :] for i, name in enumerate(("query", "key", "value"))}
    arrays["grad_output"] = np.zeros_like(arrays["value"])
    arrays["grad_logsumexp"] = arrays["grad_output"][..., 0]
    if "rpb" in weights:
        arrays["rpb"] = weights["rpb"]
    if key_mask is not None:
        arrays["key_mask"] = np.asarray(key_mask)
    case = Case(
        seed=0, shape=GRIDS[rank], kernel_size=module.kernel_size, stride=module.stride,
        dilation=module.dilation, is_causal=module.is_causal, batch=x.shape[0], heads=HEADS,
        kv_heads=HEADS, head_dim=dim, value_dim=dim, dtype="float64", scale=module.scale,
        rpb="rpb" in weights, additional=0, boundary=module.boundary,
        mask_batch=None if key_mask is None else len(key_mask),
    )  # fmt: skip
    output = fused(case, arrays)["output"].reshape(x.shape)
    return output @ weights["proj.weight"].T + weights["proj.bias"]


@KINDS
@RANKS
@BIASES
@pytest.mark.parametrize("qk_scale", [None, 0.3])
def test_output(kind, rank, rel_pos_bias, qkv_bias, qk_scale):
    built = Built(kind, rank, rel_pos_bias=rel_pos_bias, qkv_bias=qkv_bias, qk_scale=qk_scale)
    shapes = {
        "qkv": {"kernel": (DIM, 3, DIM)} | ({"bias": (3, DIM)} if qkv_bias else {}),
        "proj": {"kernel": (DIM, DIM), "bias": (DIM,)},
    }
    if rel_pos_bias:
        shapes["rpb"] = (HEADS, *(2 * k - 1 for k in built.module.kernel_size))
    assert jax.tree.map(jnp.shape, built.params) == shapes
    close(built(images(rank)), reference(built.module, built.params, images(rank)))


def check_random(case: Case, errors: cases.Errors) -> None:
    """A module from what `qkv` gives to what `proj` gets, and back."""
    arrays = case.fused_arrays()
    dtype = jnp.dtype(case.dtype)
    x = jnp.zeros((case.batch, *case.shape, case.heads * case.head_dim), dtype)
    three = np.stack([arrays[name] for name in ("query", "key", "value")], axis=-3)
    given = {"qkv": jnp.asarray(three.reshape(*three.shape[:-2], x.shape[-1]), dtype)}
    if case.rpb:
        given["rpb"] = jnp.asarray(arrays["rpb"], dtype)
    mask = jnp.asarray(arrays["key_mask"]) if "key_mask" in arrays else None

    def output(given: dict[str, jax.Array]) -> jax.Array:
        module = NNX[case.rank](
            case.heads * case.head_dim,
            case.heads,
            **case.neighborhood,
            rel_pos_bias=case.rpb,
            qk_scale=case.scale,
            param_dtype=dtype,
            rngs=nnx.Rngs(0),
        )
        module.qkv = lambda _: given["qkv"]
        module.proj = lambda out: out
        if case.rpb:
            module.rpb = nnx.Param(given["rpb"])
        return module(x, key_mask=mask)

    got, pull_back = jax.vjp(output, given)
    (grads,) = pull_back(jnp.asarray(arrays["grad_output"], dtype).reshape(got.shape))
    arrays["grad_logsumexp"] = np.zeros_like(arrays["grad_logsumexp"])
    want = fused(case, arrays)
    del want["logsumexp"]
    grad_qkv = grads["qkv"].reshape(three.shape)
    results = {
        "output": got.reshape(want["output"].shape),
        **{f"grad_{n}": grad_qkv[..., i, :, :] for i, n in enumerate(("query", "key", "value"))},
    }
    if case.rpb:
        results["grad_rpb"] = grads["rpb"]
    scale = float(np.linalg.norm(arrays["grad_output"]))
    errors.check(case, {n: np.asarray(r, np.float64) for n, r in results.items()}, want, scale)


@cases.a_tenth_and_the_rest(cases.COUNT or 120, cases.SEED + 5)
def test_random_cases(x64, drawn, capsys):
    errors = cases.Errors("flax modules")
    for case in map(cases.of_module, drawn):
        check_random(case, errors)
    with capsys.disabled():
        print(f"\n{errors.table()}")


@KINDS
@RANKS
def test_float64(x64, kind, rank):
    built, x = Built(kind, rank, param_dtype="float64"), images(rank, dtype="float64")
    assert built(x).dtype == jnp.float64
    close(built(x), reference(built.module, built.params, x), 1e-12)


@KINDS
@RANKS
def test_unfused_path_gives_the_same(kind, rank):
    """Attention dropout takes the unfused operations; a tiny rate drops next to nothing."""
    built, x = Built(kind, rank, attn_drop=1e-12), images(rank)
    close(built(x, deterministic=False), built(x))
    all_close(built.gradients(x, deterministic=False), built.gradients(x), 1e-4)


BOUNDARIES = {
    1: dict(kernel_size=9, dilation=2, stride=1, is_causal=False, boundary="cut"),
    2: dict(kernel_size=3, dilation=1, stride=1, is_causal=False, boundary=("circular", "shift")),
    3: dict(
        kernel_size=2, dilation=1, stride=(1, 2, 1), is_causal=(True, False, False),
        boundary=("cut", "circular", "shift"),
    ),
}  # fmt: skip


def mask_of(rank, batch=2):
    """Half of the tokens; of the last example of several none."""
    mask = np.random.default_rng(rank).random((batch, *GRIDS[rank])) < 0.5
    mask[1:] = False
    return mask


@KINDS
@RANKS
@pytest.mark.parametrize("batch", [None, 1, 2])
def test_boundaries_and_masks(kind, rank, batch):
    """Fused and unfused; NaN in hidden tokens reaches no other. Where a token sees nothing the
    last linear map gets 0, not NaN."""
    x, mask = images(rank), None if batch is None else mask_of(rank, batch)
    built = Built(kind, rank, **BOUNDARIES[rank], attn_drop=1e-12)
    want = reference(built.module, built.params, x, mask)
    if mask is not None:
        seen = np.broadcast_to(mask, x.shape[:-1])[..., None]
        nan = jnp.where(seen, x, jnp.nan)
    for deterministic in (True, False):
        run = functools.partial(built, deterministic=deterministic)
        close(run(x, key_mask=mask), want)
        gradients = built.gradients(x, key_mask=mask, deterministic=deterministic)
        assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))
        if deterministic:
            first = gradients
        else:
            all_close(gradients, first, 1e-4)
        if mask is None:
            continue
        got = run(nan, key_mask=mask)
        np.testing.assert_array_equal(
            np.where(seen, got, 0), np.where(seen, run(x, key_mask=mask), 0)
        )
        if batch == 2:
            bias = np.broadcast_to(built.params["proj"]["bias"], x[1].shape)
            np.testing.assert_array_equal(run(x, key_mask=mask)[1], bias)


# Dropout.


@KINDS
@pytest.mark.parametrize("which", ["attn_drop", "proj_drop"])
def test_dropout(kind, which):
    built, x = Built(kind, 2, **{which: 0.5}), images(2)
    want = reference(built.module, built.params, x)
    close(built(x), want)
    dropped = np.asarray(built(x, deterministic=False, seed=3))
    np.testing.assert_array_equal(built(x, deterministic=False, seed=3), dropped)
    assert np.any(dropped != built(x, deterministic=False, seed=4))
    if which == "proj_drop":
        assert 0.4 < np.mean(dropped == 0) < 0.6
        close(dropped[dropped != 0], 2 * want[dropped != 0])
    else:
        # Dropout of weights is linear: the mean over keys is the output without.
        many = [built(x, deterministic=False, seed=seed) for seed in range(100)]
        close(np.mean(many, 0), want, 0.2)
        assert np.linalg.norm(dropped - want) > 0.2 * np.linalg.norm(want)


@pytest.mark.parametrize("which", ["attn_drop", "proj_drop"])
def test_nnx_dropout_follows_train_and_eval(which):
    module, x = make(2, **{which: 0.5}), images(2)
    assert np.any(module(x) != module(x))
    np.testing.assert_array_equal(module(x, deterministic=True), module(x, deterministic=True))
    module.eval()
    np.testing.assert_array_equal(module(x), module(x, deterministic=True))
    assert np.any(module(x, deterministic=False) != module(x))


@pytest.mark.parametrize("which", ["attn_drop", "proj_drop"])
def test_linen_is_deterministic_by_attribute_or_argument(which):
    built, x = Built("linen", 1, **{which: 0.5}), images(1)
    variables = {"params": built.params}
    with pytest.raises(ValueError, match="deterministic"):
        built.module.apply(variables, x)
    for deterministic in (True, False):
        module = built.module.clone(deterministic=deterministic)
        rngs = None if deterministic else {"dropout": jax.random.key(0)}
        np.testing.assert_array_equal(
            module.apply(variables, x, rngs=rngs),
            built.module.apply(variables, x, deterministic, rngs=rngs),
        )
        with pytest.raises(ValueError, match="deterministic"):
            module.apply(variables, x, deterministic, rngs=rngs)


def test_without_dropout_nothing_of_it_is_needed():
    module = NNX[1](DIM, HEADS, 3, rngs=nnx.Rngs(params=0))
    assert module(images(1)).shape == images(1).shape
    out, _ = LINEN[1](DIM, HEADS, 3).init_with_output({"params": jax.random.key(0)}, images(1))
    assert out.shape == images(1).shape


# Transformations.


@KINDS
@RANKS
def test_transformations(kind, rank):
    built, x = Built(kind, rank), images(rank)

    def loss(params):
        return jnp.mean(built.apply(params, x) ** 2)

    value, gradients = jax.jit(jax.value_and_grad(loss))(built.params)
    assert len(jax.tree.leaves(gradients)) == 5
    stepped = jax.tree.map(lambda p, g: p - 0.01 * g, built.params, gradients)
    assert loss(stepped) < value
    mapped = jax.vmap(lambda x: built.apply(built.params, x[None])[0])(x)
    close(mapped, built(x))


@KINDS
def test_remat(kind):
    built, x = Built(kind, 2), images(2)
    if kind == "nnx":
        graph, state = nnx.split(built.module)

        def loss(state, remat):
            def call(module, x):
                return module(x)

            call = nnx.remat(call) if remat else call
            return jnp.mean(call(nnx.merge(graph, state), x) ** 2)
    else:
        state = built.params
        again = nn.remat(LINEN[2])(DIM, HEADS, **MIXED[2], rel_pos_bias=True)

        def loss(state, remat):
            module = again if remat else built.module
            return jnp.mean(module.apply({"params": state}, x) ** 2)

    jitted = jax.jit(jax.grad(loss), static_argnums=1)
    all_close(jitted(state, True), jitted(state, False))
    traced = [str(jax.make_jaxpr(loss, static_argnums=1)(state, remat)) for remat in (False, True)]
    assert [bool(re.search("remat|checkpoint", text)) for text in traced] == [False, True]


LAYERS = 3


class Stack(nn.Module):
    """Layers of which every parameter has a first axis."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        return layers(LINEN[2](DIM, HEADS, 3, name="layers"), x, None)[0]


@KINDS
def test_scan_over_layers(kind):
    x = images(2)
    if kind == "nnx":

        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap
        def layers(rngs):
            return NNX[2](DIM, HEADS, 3, rngs=rngs)

        @nnx.jit
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, x):
            return layer(x)

        stack = layers(nnx.Rngs(0))
        got = run(stack, x)
        params = nnx.to_pure_dict(nnx.state(stack, nnx.Param))
    else:
        variables = Stack().init(jax.random.key(0), x)
        got = Stack().apply(variables, x)
        params = variables["params"]["layers"]
    assert params["qkv"]["kernel"].shape == (LAYERS, DIM, 3, DIM)
    for i in range(LAYERS):
        layer = {"params": jax.tree.map(lambda p, i=i: p[i], params)}
        x = LINEN[2](DIM, HEADS, 3).apply(layer, x)
    close(got, x)


@KINDS
def test_shapes_without_values(kind):
    want = jax.tree.map(jnp.shape, Built(kind, 3).params)
    if kind == "nnx":
        module = nnx.eval_shape(
            lambda: NNX[3](DIM, HEADS, **MIXED[3], rel_pos_bias=True, rngs=nnx.Rngs(0))
        )
        got = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    else:
        module = LINEN[3](DIM, HEADS, **MIXED[3], rel_pos_bias=True)
        got = jax.eval_shape(module.init, jax.random.key(0), images(3))["params"]
    assert all(isinstance(p, jax.ShapeDtypeStruct) for p in jax.tree.leaves(got))
    assert jax.tree.map(lambda p: p.shape, got) == want


def test_nnx_copies():
    module, x = make(2, attn_drop=0.5, proj_drop=0.5), images(2)
    module.eval()
    want = nnx.jit(lambda module, x: module(x))(module, x)
    pickled = pickle.loads(pickle.dumps(module))
    for copy in (nnx.merge(*nnx.split(module)), nnx.clone(module), pickled):
        np.testing.assert_array_equal(nnx.jit(lambda module, x: module(x))(copy, x), want)
    graph, state = nnx.split(module)
    hash(graph)
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    nnx.update(module, jax.tree.map(jnp.zeros_like, state))
    assert not np.any(module(x))
    nf.load_torch(module, nf.to_torch(params))
    close(module(x), want)


def test_linen_copies():
    built, x = Built("linen", 2), images(2)
    copy, params = pickle.loads(pickle.dumps((built.module.clone(name="a"), built.params)))
    assert copy.kernel_size == built.module.kernel_size
    np.testing.assert_array_equal(
        jax.jit(copy.apply)({"params": params}, x), jax.jit(built.apply)(built.params, x)
    )


class OwnNnx(nf.NeighborhoodAttention2D):
    """An nnx module that a user makes of ours."""


class OwnLinen(nl.NeighborhoodAttention2D):
    """A linen module that a user makes of ours."""


@pytest.mark.parametrize("cls", [OwnNnx, OwnLinen])
def test_subclasses_are_their_own(cls):
    assert cls.__module__ == __name__ and "that a user makes" in cls.__doc__
    module = cls(8, 2, 3, rngs=nnx.Rngs(0)) if cls is OwnNnx else cls(8, 2, 3)
    assert type(pickle.loads(pickle.dumps(module))) is cls


# Element types, initial values, refusals.


@KINDS
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("attn_drop", [0.0, 1e-6])
def test_dtypes(kind, dtype, attn_drop):
    built, x = Built(kind, 2, dtype=dtype, attn_drop=attn_drop), images(2)
    out = built(x, deterministic=False)
    assert out.dtype == dtype
    close(out, reference(built.module, built.params, x), 0.02)
    gradients, by_x = built.gradients(x)
    assert by_x.dtype == jnp.float32
    assert {g.dtype.name for g in jax.tree.leaves(gradients)} == {"float32"}


@KINDS
def test_attention_computes_in_dtype(kind, monkeypatch):
    seen = []

    def spy(*arrays, rpb, **options):
        seen.extend(array.dtype.name for array in (*arrays, rpb))
        return natten.jax.na2d(*arrays, rpb=rpb, **options)

    monkeypatch.setitem(_attend._FUSED, 2, spy)
    built = Built(kind, 2, dtype="bfloat16")
    seen.clear()  # linen draws parameters in a call
    jax.eval_shape(built.apply, built.params, images(2))
    assert seen == ["bfloat16"] * 4


@KINDS
def test_promotion_of_input_and_parameters(kind):
    for param_dtype, given, want in (
        ("float32", "bfloat16", "float32"),
        ("bfloat16", "float32", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float32", "int32", "float32"),
    ):
        built = Built(kind, 2, param_dtype=param_dtype)
        x = images(2, dtype=given)
        out = jax.eval_shape(built.apply, built.params, x)
        assert out.dtype == want
        if given != "int32":
            gradients, by_x = built.gradients(x)
            assert by_x.dtype == given
            assert {g.dtype.name for g in jax.tree.leaves(gradients)} == {param_dtype}
        if want == "float32":
            close(built(x), reference(built.module, built.params, x))


def test_initial_values():
    """The same as of a linear map from dim to 3 * dim channels."""
    module = NNX[2](64, 8, 7, rel_pos_bias=True, rngs=nnx.Rngs(0))
    linear = nnx.Linear(64, 3 * 64, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(module.qkv.kernel[...].reshape(64, -1), linear.kernel[...])
    assert not np.any(module.qkv.bias[...])

    class Linear(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3 * 64, name="qkv")(x)

    x = jnp.zeros((1, 8, 8, 64))
    want = Linear().init(jax.random.key(0), x)["params"]
    params = LINEN[2](64, 8, 7, rel_pos_bias=True).init(jax.random.key(0), x)["params"]
    kernel = params["qkv"]["kernel"].reshape(64, -1)
    np.testing.assert_array_equal(kernel, want["qkv"]["kernel"])

    for rpb in (module.rpb[...], params["rpb"]):
        assert rpb.shape == (8, 13, 13)
        assert 0.01 < float(jnp.std(rpb)) < 0.025
        assert float(jnp.abs(rpb).max()) <= 0.04


@KINDS
def test_initializers(kind):
    constants = {"qkv_kernel": 1, "qkv_bias": 2, "proj_kernel": 3, "proj_bias": 4, "rpb": 5}
    options = {f"{k}_init": jax.nn.initializers.constant(v) for k, v in constants.items()}
    if kind == "nnx":
        module = NNX[2](DIM, HEADS, 3, rel_pos_bias=True, rngs=nnx.Rngs(0), **options)
        params = nf.to_torch(module)
    else:
        module = LINEN[2](DIM, HEADS, 3, rel_pos_bias=True, **options)
        params = nf.to_torch(module.init(jax.random.key(0), images(2)))
    paths = {k: k.replace("_", ".").replace("kernel", "weight") for k in constants}
    for name, value in constants.items():
        assert np.all(params[paths[name]] == value)


@KINDS
def test_refusals(kind):
    rngs = {"rngs": nnx.Rngs(0)} if kind == "nnx" else {}
    for arguments, error, name in (
        ((10, 3, 3), ValueError, "num_heads"),
        ((10, 0, 3), ValueError, "num_heads"),
        ((12, 3, (3, 3)), ValueError, "kernel_size"),
        ((12, 3, 2.5), TypeError, "kernel_size"),
        ((12, 3, 0), ValueError, "kernel_size"),
    ):
        with pytest.raises(error, match=f"^{name}: "):
            CLASSES[kind][1](*arguments, **rngs)
    for options, error, name in (
        (dict(dilation=(1, 2)), ValueError, "dilation"),
        (dict(stride=4), ValueError, "stride"),
        (dict(boundary="wrap"), ValueError, "boundary"),
        (dict(boundary=2), TypeError, "boundary"),
        (dict(boundary="circular", is_causal=True), ValueError, "is_causal"),
        (dict(dtype=jnp.int32), TypeError, "dtype"),
        (dict(dtype="no dtype"), TypeError, "dtype"),
        (dict(dtype=jnp.float8_e4m3fn), TypeError, "dtype"),
        (dict(param_dtype=jnp.complex64), TypeError, "param_dtype"),
    ):
        with pytest.raises(error, match=f"^{name}: "):
            CLASSES[kind][1](12, 3, 3, **options, **rngs)
    built = Built(kind, 2)
    with pytest.raises(ValueError, match=r"^x: got shape .*must be \[batch, \*spatial, 12\]"):
        built(images(1))
    with pytest.raises(ValueError, match=r"^x: got shape"):
        built(images(2)[..., 1:])
    with pytest.raises(ValueError, match=r"^kernel_size: "):
        Built(kind, 1, kernel_size=4, dilation=2)(images(1))
    for mask, error in ((np.ones((2, 5, 3), bool), ValueError), (np.ones((2, 5, 4)), TypeError)):
        with pytest.raises(error, match=r"^key_mask: got"):
            built(images(2), key_mask=mask)


# Weights.


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        if isinstance(a[name], dict):
            same(a[name], b[name])
            continue
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]))


@KINDS
@RANKS
@BIASES
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_is_exact(kind, rank, rel_pos_bias, qkv_bias, dtype):
    options = {"rel_pos_bias": rel_pos_bias, "qkv_bias": qkv_bias, "param_dtype": dtype}
    source = Built(kind, rank, 1, **options)
    state_dict = nf.to_torch(source.params)
    assert state_dict["qkv.weight"].shape == (3 * DIM, DIM)
    assert ("rpb" in state_dict) == rel_pos_bias and ("qkv.bias" in state_dict) == qkv_bias
    same(nf.from_torch(state_dict), source.params)
    same(nf.to_torch(nf.from_torch(state_dict)), state_dict)
    if kind == "nnx":
        target = Built(kind, rank, 2, **options).module
        nf.load_torch(target, state_dict)
        same(nf.to_torch(target), state_dict)
    else:
        variables = {"params": source.params}
        for given in (variables, FrozenDict(variables), FrozenDict(source.params)):
            same(nf.to_torch(given), state_dict)
        boxed = jax.tree.map(lambda p: nn.Partitioned(p, (None,) * p.ndim), variables)
        same(nf.to_torch(boxed), state_dict)


def test_order_of_query_key_and_value():
    """PyTorch's rows are (query, key or value; head; channel of the head)."""
    weight = np.arange(3 * DIM * DIM, dtype=np.float32).reshape(3 * DIM, DIM)
    bias = np.arange(3 * DIM, dtype=np.float32)
    others = {"proj.weight": np.zeros((DIM, DIM)), "proj.bias": np.zeros(DIM)}
    qkv = nf.from_torch({"qkv.weight": weight, "qkv.bias": bias} | others)["qkv"]
    for which in range(3):
        rows = slice(which * DIM, (which + 1) * DIM)
        np.testing.assert_array_equal(qkv["kernel"][:, which], weight[rows].T)
        np.testing.assert_array_equal(qkv["bias"][which], bias[rows])


def test_loading_into_part_of_a_model():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = NNX[1](DIM, HEADS, 3, rngs=rngs)
            self.second = NNX[1](DIM, HEADS, 3, rngs=rngs)

        def __call__(self, x):
            return self.second(self.first(x))

    model = Model(nnx.Rngs(0))
    weights = {i: nf.to_torch(make(1, seed=i, rel_pos_bias=False)) for i in (1, 2)}
    state_dict = {f"blocks.{i}.attn.{k}": v for i in (1, 2) for k, v in weights[i].items()}
    state_dict["norm.weight"] = np.ones(DIM)
    nf.load_torch(model.first, state_dict, "blocks.1.attn")
    nf.load_torch(model.second, state_dict, prefix="blocks.2.attn.")
    same(nf.to_torch(model.first), weights[1])
    same(nf.to_torch(model.second), weights[2])
    # What was loaded is a copy.
    want = model(images(1))
    for values in weights.values():
        for value in values.values():
            value[...] = 0
    np.testing.assert_array_equal(model(images(1)), want)


def test_loading_while_tracing():
    state_dict = nf.to_torch(make(2, seed=1))

    @nnx.jit
    def loaded():
        module = NNX[2](DIM, HEADS, **MIXED[2], rel_pos_bias=True, rngs=nnx.Rngs(0))
        nf.load_torch(module, state_dict)
        return module

    same(nf.to_torch(loaded()), state_dict)


def test_refused_weights():
    module = make(1)
    before = nf.to_torch(module)
    good = dict(before)
    for wrong, message in (
        (good | {"norm.weight": np.ones(2)}, "norm.weight; must hold only"),
        ({k: v for k, v in good.items() if k != "rpb"}, "must hold .*rpb"),
        ({k: v for k, v in good.items() if k != "proj.weight"}, r"proj\.weight is missing"),
        (good | {"rpb": good["rpb"][1:]}, r"got shape \(2, 5\) for rpb; must be \(3, 5\)"),
        (good | {"qkv.bias": good["qkv.bias"][1:]}, r"got shape \(35,\) for qkv\.bias"),
        ({}, r"qkv\.weight is missing"),
    ):
        with pytest.raises(ValueError, match=f"^state_dict: .*{message}"):
            nf.load_torch(module, wrong)
    same(nf.to_torch(module), before)
    with pytest.raises(ValueError, match=r"other\.qkv\.weight is missing"):
        nf.load_torch(module, good, "other")
    params = nf.from_torch(good)
    for wrong, message in (
        ({"params": {"attn": params}}, r"got attn\.proj\.bias, .*; must hold only qkv\.kernel"),
        ({"qkv": params["qkv"]}, r"proj\.kernel is missing"),
        (params | {"qkv": {"kernel": np.ones((12, 36))}}, r"got shape \(12, 36\) for qkv\.kernel"),
    ):
        with pytest.raises(ValueError, match=f"^params: .*{message}"):
            nf.to_torch(wrong)


@KINDS
@RANKS
@BIASES
def test_same_output_as_pytorch(x64, kind, rank, rel_pos_bias, qkv_bias):
    torch = pytest.importorskip("torch")
    import natten

    torch.manual_seed(0)
    options = MIXED[rank] | {"rel_pos_bias": rel_pos_bias, "qkv_bias": qkv_bias}
    cls = getattr(natten, f"NeighborhoodAttention{rank}D")
    for dtype, bound in (("float32", 1e-5), ("float64", 1e-12)):
        theirs = cls(DIM, HEADS, **options, dtype=getattr(torch, dtype))
        torch.nn.init.normal_(theirs.proj.bias)
        ours, x = Built(kind, rank, param_dtype=dtype, **options), images(rank, dtype=dtype)

        def output():
            return theirs(torch.from_numpy(np.array(x))).detach()  # noqa: B023

        initial = ours(x)
        ours.params = nf.from_torch(theirs.state_dict())
        close(ours(x), output(), bound)
        ours = Built(kind, rank, param_dtype=dtype, **options)
        state_dict = {k: torch.from_numpy(v) for k, v in nf.to_torch(ours.params).items()}
        theirs.load_state_dict(state_dict)
        close(initial, output(), bound)
        if rel_pos_bias and qkv_bias:
            options |= BOUNDARIES[rank]
            theirs = cls(DIM, HEADS, **options, dtype=getattr(torch, dtype))
            ours, mask = Built(kind, rank, param_dtype=dtype, **options), mask_of(rank)
            ours.params = nf.from_torch(theirs.state_dict())
            with torch.no_grad():
                want = theirs(torch.from_numpy(np.array(x)), key_mask=torch.from_numpy(mask))
            close(ours(x, key_mask=mask), want, bound)
            options = MIXED[rank] | {"rel_pos_bias": True, "qkv_bias": True}
    half = {k: v.to(torch.bfloat16) for k, v in theirs.state_dict().items()}
    assert nf.from_torch(half)["qkv"]["kernel"].dtype == jnp.bfloat16


# Sharding.

SPECS = {
    "qkv": {"kernel": (None, None, "model"), "bias": (None, "model")},
    "rpb": ("model", None, None),
    "proj": {"kernel": ("model", None), "bias": (None,)},
}


def annotated(with_partitioning, **options):
    """Initializers with the names of SPECS."""
    normal = jax.nn.initializers.lecun_normal()
    return {
        f"{name}_init": with_partitioning(init, names, **options)
        for name, init, names in (
            ("qkv_kernel", normal, SPECS["qkv"]["kernel"]),
            ("qkv_bias", jax.nn.initializers.zeros, SPECS["qkv"]["bias"]),
            ("proj_kernel", normal, SPECS["proj"]["kernel"]),
            ("proj_bias", jax.nn.initializers.zeros, SPECS["proj"]["bias"]),
            ("rpb", jax.nn.initializers.normal(), SPECS["rpb"]),
        )
    }


def is_names(x):
    return isinstance(x, tuple)


@KINDS
@pytest.mark.parametrize("named", [True, False])
def test_sharding_metadata(kind, named):
    """Newer versions of Flax place nnx parameters as they are made, and need a mesh for it."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
    want = jax.tree.map(lambda names: PartitionSpec(*names), SPECS, is_leaf=is_names)
    if not named:
        want = jax.tree.map(lambda _: PartitionSpec(), SPECS, is_leaf=is_names)
    arguments = (DIM, HEADS, (2, 3))
    if kind == "nnx":
        options = annotated(nnx.with_partitioning, mesh=mesh) if named else {}
        module = NNX[2](*arguments, rel_pos_bias=True, **options, rngs=nnx.Rngs(0))
        assert nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(module))) == want
        state_dict = nf.to_torch(module)
        nf.load_torch(module, {k: v + 1 for k, v in state_dict.items()})
        assert nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(module))) == want
        plain = NNX[2](*arguments, rel_pos_bias=True, rngs=nnx.Rngs(0))
        np.testing.assert_array_equal(state_dict["qkv.weight"], nf.to_torch(plain)["qkv.weight"])
    else:
        options = annotated(nn.with_partitioning) if named else {}
        module = LINEN[2](*arguments, rel_pos_bias=True, **options)
        set_mesh = getattr(jax, "set_mesh", lambda mesh: mesh)  # the mesh itself in older JAX
        for context in (set_mesh(mesh), contextlib.nullcontext()):
            with context:
                variables = jax.jit(module.init)(jax.random.key(0), images(2))
            assert nn.get_partition_spec(variables)["params"] == want
        new = nf.from_torch(nf.to_torch(variables))
        restored = nn.meta.replace_boxed(variables, {"params": new})
        assert nn.get_partition_spec(restored)["params"] == want
        np.testing.assert_array_equal(
            module.apply(restored, images(2)), module.apply(variables, images(2))
        )


SHARDED = """
import jax, numpy as np
import test_flax as t
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))


def place(x, names):
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*names)))


options = dict(kernel_size=(2, 3), stride=(1, 2), is_causal=(False, True), rel_pos_bias=True)
x = np.random.default_rng(0).standard_normal((2, 5, 4, 16)).astype("float32")
state_dict = t.nf.to_torch(t.NNX[2](16, 4, **options, rngs=nnx.Rngs(0)))
params = t.nf.from_torch(state_dict)
module = t.LINEN[2](16, 4, **options)


def loss(params, x):
    out = module.apply({"params": params}, x)
    return (out**2).mean(), out


step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
want = step(params, x)
names = jax.tree.map(lambda names: names, t.SPECS, is_leaf=t.is_names)
sharded = jax.tree.map(lambda n, p: place(p, n), t.SPECS, params, is_leaf=t.is_names)
got = step(sharded, place(x, ("data",)))
assert len(sharded["qkv"]["kernel"].sharding.device_set) == 4
t.all_close(got, want)

# The grid of the input split: windows take no gather.
part = x[:, :4]
placed = place(part, (None, "data", "model"))
run = step.lower(params, placed).compile()
assert "collective-permute" in run.as_text() and "all-gather" not in run.as_text()
t.all_close(run(params, placed), step(params, part))

# nnx: placed, and then loaded into.
nnx_options = options | t.annotated(nnx.with_partitioning, mesh=mesh)
nnx_module = t.NNX[2](16, 4, **nnx_options, rngs=nnx.Rngs(1))
state = nnx.state(nnx_module)
nnx.update(nnx_module, jax.device_put(state, nnx.get_named_sharding(state, mesh)))
before = nnx_module.qkv.kernel[...].sharding
t.nf.load_torch(nnx_module, state_dict)
assert nnx_module.qkv.kernel[...].sharding == before, nnx_module.qkv.kernel[...].sharding
assert before.spec == PartitionSpec(None, None, "model")
plain = t.NNX[2](16, 4, **options, rngs=nnx.Rngs(1))  # without metadata
plain.qkv.kernel[...] = place(plain.qkv.kernel[...], before.spec)
assert plain.qkv.kernel[...].sharding == before
t.nf.load_torch(plain, state_dict)
assert plain.qkv.kernel[...].sharding == before, plain.qkv.kernel[...].sharding


def nnx_loss(module, x):
    out = module(x)
    return (out**2).mean(), out


placed = place(x, ("data",))
step = nnx.jit(nnx.value_and_grad(nnx_loss, argnums=(0, 1), has_aux=True))
(value, out), (by_params, by_x) = step(nnx_module, placed)
t.all_close(((value, out), (nnx.to_pure_dict(by_params), by_x)), want)
"""


def test_sharded_over_devices():
    """Parameters and input on four devices: the same results as on one."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    result = subprocess.run(
        [sys.executable, "-c", SHARDED],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env=environment,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(
    jax.__version_info__ < (0, 9), reason="explicit axes are unfinished in this JAX"
)
@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs 2 devices (see conftest.py)")
def test_batch_split_over_a_mesh_with_explicit_axes():
    """Types hold the sharding there; parameters are whole on each device."""

    def loss(module, x):
        return jnp.mean(module(x) ** 2)

    x = images(2)
    want = nnx.value_and_grad(loss)(make(2), x)
    types = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((2,), ("data",), axis_types=types, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        by_batch = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        got = nnx.jit(nnx.value_and_grad(loss))(make(2), jax.device_put(x, by_batch))
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# The package.


def test_import_loads_neither_pytorch_nor_the_linen_modules():
    program = "import sys, natten.flax; print({'torch', 'natten.flax.linen'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr


@KINDS
def test_names(kind):
    for rank, module in CLASSES[kind].items():
        assert module.__name__ == f"NeighborhoodAttention{rank}D"
        assert module.__module__ == {"nnx": "natten.flax", "linen": "natten.flax.linen"}[kind]
        assert f"{rank}-D" in module.__doc__ and "{" not in module.__doc__.split("Args:")[0]
        own = {"nnx": "\n    rngs: ", "linen": "\n    deterministic: "}[kind]
        assert own in module.__doc__ and "{own}" not in module.__doc__
        for name in inspect.signature(module.__init__).parameters:
            if name not in ("self", "parent", "name"):
                assert f"\n    {name}: " in module.__doc__ or f", {name}: " in module.__doc__
