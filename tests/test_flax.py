"""Flax modules, and weights from and to PyTorch."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

import jax.numpy as jnp  # noqa: E402
from cases import Case  # noqa: E402
from flax import nnx  # noqa: E402
from oracle import fused  # noqa: E402

import natten.flax as nf  # noqa: E402

MODULES = {
    1: nf.NeighborhoodAttention1D,
    2: nf.NeighborhoodAttention2D,
    3: nf.NeighborhoodAttention3D,
}
GRIDS = {1: (7,), 2: (5, 4), 3: (3, 4, 2)}
MIXED: dict[int, dict[str, Any]] = {
    1: dict(kernel_size=3, dilation=2, is_causal=True, stride=2),
    2: dict(kernel_size=(2, 3), dilation=(2, 1), is_causal=(False, True), stride=(1, 2)),
    3: dict(kernel_size=(3, 2, 2), dilation=(1, 2, 1), is_causal=(False, True, False), stride=1),
}
DIM, HEADS = 12, 3
RANKS = pytest.mark.parametrize("rank", [1, 2, 3])
BIASES = pytest.mark.parametrize(
    ("rel_pos_bias", "qkv_bias"), [(True, True), (False, True), (True, False)]
)


@pytest.fixture(autouse=True)
def _no_deprecated_calls():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        yield


def make(rank, seed=0, **options):
    options = MIXED[rank] | {"rel_pos_bias": True} | options
    module = MODULES[rank](DIM, HEADS, **options, rngs=nnx.Rngs(seed))
    for p in jax.tree.leaves(nnx.state(module, nnx.Param)):
        assert p.dtype == options.get("param_dtype", jnp.float32)
    # Biases start at zero, which would hide them.
    for p in (module.qkv.bias, module.proj.bias, module.rpb):
        if p is not None:
            p[...] = jnp.asarray(np.random.default_rng(seed).standard_normal(p.shape), p.dtype)
    return module


def images(rank, seed=0, dtype="float32"):
    x = np.random.default_rng(seed).standard_normal((2, *GRIDS[rank], DIM))
    return jnp.asarray(x.astype(jnp.dtype(dtype)))


def reference(module, x):
    """The module in numpy float64, over the oracle."""
    rank, dim = module.rank, DIM // HEADS
    weights = {k: np.asarray(v, np.float64) for k, v in nf.to_torch(module).items()}
    qkv = np.asarray(x, np.float64) @ weights["qkv.weight"].T + weights.get("qkv.bias", 0)
    qkv = qkv.reshape(*x.shape[:-1], 3, HEADS, dim)
    arrays = {name: qkv[..., i, :, :] for i, name in enumerate(("query", "key", "value"))}
    arrays["grad_output"] = np.zeros_like(arrays["value"])
    arrays["grad_logsumexp"] = arrays["grad_output"][..., 0]
    if "rpb" in weights:
        arrays["rpb"] = weights["rpb"]
    case = Case(
        seed=0, shape=GRIDS[rank], kernel_size=module.kernel_size, stride=module.stride,
        dilation=module.dilation, is_causal=module.is_causal, batch=x.shape[0], heads=HEADS,
        kv_heads=HEADS, head_dim=dim, value_dim=dim, dtype="float64", scale=module.scale,
        rpb="rpb" in weights, additional=0,
    )  # fmt: skip
    output = fused(case, arrays)["output"].reshape(x.shape)
    return output @ weights["proj.weight"].T + weights["proj.bias"]


@RANKS
@BIASES
@pytest.mark.parametrize("qk_scale", [None, 0.3])
def test_output(rank, rel_pos_bias, qkv_bias, qk_scale):
    module = make(rank, rel_pos_bias=rel_pos_bias, qkv_bias=qkv_bias, qk_scale=qk_scale)
    assert (module.rpb is None) == (not rel_pos_bias)
    assert (module.qkv.bias is None) == (not qkv_bias)
    x = images(rank)
    np.testing.assert_allclose(module(x), reference(module, x), rtol=1e-4, atol=1e-5)


@RANKS
def test_unfused_path_gives_the_same(rank):
    """Attention dropout takes the unfused operations; a tiny rate drops next to nothing."""
    module = make(rank, attn_drop=1e-12)
    x = images(rank)
    module.eval()
    want = module(x)
    module.train()
    np.testing.assert_allclose(module(x), want, rtol=1e-4, atol=1e-5)

    def loss(module, x):
        return jnp.sum(module(x) ** 2)

    got = nnx.grad(loss)(module, x)
    module.eval()
    want = nnx.grad(loss)(module, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("which", ["attn_drop", "proj_drop"])
def test_dropout(which):
    module = make(2, **{which: 0.5})
    x = images(2)
    assert np.any(module(x) != module(x))
    np.testing.assert_array_equal(module(x, deterministic=True), module(x, deterministic=True))
    keyed = [module(x, rngs=nnx.Rngs(dropout=3)) for _ in range(2)]
    np.testing.assert_array_equal(*keyed)
    module.eval()
    np.testing.assert_allclose(module(x), reference(module, x), rtol=1e-4, atol=1e-5)
    assert np.any(module(x, deterministic=False) != module(x))


def test_without_dropout_no_dropout_stream_is_needed():
    module = nf.NeighborhoodAttention1D(DIM, HEADS, 3, rngs=nnx.Rngs(params=0))
    assert module(images(1)).shape == images(1).shape


@RANKS
def test_transformations(rank):
    module, x = make(rank), images(rank)

    def loss(module, x):
        return jnp.mean(module(x) ** 2)

    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(module, x), module(x), atol=1e-5)
    value, gradients = nnx.jit(nnx.value_and_grad(loss))(module, x)
    assert len(jax.tree.leaves(gradients)) == 5
    graph, state = nnx.split(module)
    state = jax.tree.map(lambda p, g: p - 0.01 * g, state, gradients)
    assert loss(nnx.merge(graph, state), x) < value
    mapped = jax.vmap(lambda x: module(x[None])[0])(x)
    np.testing.assert_allclose(mapped, module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("attn_drop", [0.0, 1e-6])
def test_dtypes(dtype, attn_drop):
    module = make(2, dtype=dtype, attn_drop=attn_drop)
    x = images(2)
    out = module(x)
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), reference(module, x), atol=0.1)
    assert make(2, param_dtype=dtype)(images(2, dtype=dtype)).dtype == dtype


def test_initial_values():
    module = nf.NeighborhoodAttention2D(64, 8, 7, rel_pos_bias=True, rngs=nnx.Rngs(0))
    assert module.rpb[...].shape == (8, 13, 13)
    assert 0.01 < float(jnp.std(module.rpb[...])) < 0.025
    assert float(jnp.abs(module.rpb[...]).max()) <= 0.04
    assert not np.any(module.qkv.bias[...])


def test_refusals():
    rngs = nnx.Rngs(0)
    for arguments, error, name in (
        ((10, 3, 3), ValueError, "num_heads"),
        ((10, 0, 3), ValueError, "num_heads"),
        ((12, 3, (3, 3)), ValueError, "kernel_size"),
        ((12, 3, 2.5), TypeError, "kernel_size"),
        ((12, 3, 3, (1, 2)), ValueError, "dilation"),
    ):
        with pytest.raises(error, match=f"^{name}: "):
            nf.NeighborhoodAttention1D(*arguments, rngs=rngs)
    with pytest.raises(ValueError, match=r"^x: got shape"):
        make(2)(images(1))
    with pytest.raises(ValueError, match=r"^kernel_size: "):
        nf.NeighborhoodAttention1D(DIM, HEADS, 8, rngs=rngs)(images(1))


# Weights.


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]))


@RANKS
@BIASES
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_is_exact(rank, rel_pos_bias, qkv_bias, dtype):
    options = {"rel_pos_bias": rel_pos_bias, "qkv_bias": qkv_bias, "param_dtype": dtype}
    source, target = make(rank, 1, **options), make(rank, 2, **options)
    state_dict = nf.to_torch(source)
    assert state_dict["qkv.weight"].shape == (3 * DIM, DIM)
    assert ("rpb" in state_dict) == rel_pos_bias and ("qkv.bias" in state_dict) == qkv_bias
    nf.load_torch(target, state_dict)
    same(nf.to_torch(target), state_dict)
    x = images(rank, dtype=dtype)
    np.testing.assert_array_equal(np.asarray(target(x)), np.asarray(source(x)))
    nested = nf.from_torch(state_dict)
    assert nested.keys() == {"qkv", "proj"} | ({"rpb"} if rel_pos_bias else set())
    for name, linear in (("qkv", source.qkv), ("proj", source.proj)):
        parameters = {"kernel": linear.kernel, "bias": linear.bias}
        same(nested[name], {k: p[...] for k, p in parameters.items() if p is not None})


def test_loading_into_part_of_a_model():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nf.NeighborhoodAttention1D(DIM, HEADS, 3, rngs=rngs)
            self.second = nf.NeighborhoodAttention1D(DIM, HEADS, 3, rngs=rngs)

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


def test_refused_weights():
    module = make(1)
    before = nf.to_torch(module)
    good = dict(before)
    for wrong, message in (
        (good | {"norm.weight": np.ones(2)}, "norm.weight; must hold only"),
        ({k: v for k, v in good.items() if k != "rpb"}, "must hold .*rpb"),
        ({k: v for k, v in good.items() if k != "proj.weight"}, r"proj\.weight is missing"),
        (good | {"rpb": good["rpb"][1:]}, r"got shape \(2, 5\) for rpb; must be \(3, 5\)"),
        ({}, r"qkv\.weight is missing"),
    ):
        with pytest.raises(ValueError, match=f"^state_dict: .*{message}"):
            nf.load_torch(module, wrong)
    same(nf.to_torch(module), before)
    with pytest.raises(ValueError, match=r"other\.qkv\.weight is missing"):
        nf.load_torch(module, good, "other")


@RANKS
@pytest.mark.parametrize("rel_pos_bias", [False, True])
def test_same_output_as_pytorch(rank, rel_pos_bias):
    torch = pytest.importorskip("torch")
    import natten

    kind = getattr(natten, f"NeighborhoodAttention{rank}D")
    theirs = kind(DIM, HEADS, **MIXED[rank], rel_pos_bias=rel_pos_bias)
    ours = make(rank, rel_pos_bias=rel_pos_bias)
    nf.load_torch(ours, theirs.state_dict())
    x = images(rank)
    want = theirs(torch.from_numpy(np.array(x))).detach().numpy()
    np.testing.assert_allclose(ours(x), want, rtol=1e-4, atol=1e-6)
    back = {k: torch.from_numpy(v) for k, v in nf.to_torch(make(rank, 5)).items()}
    theirs = kind(DIM, HEADS, **MIXED[rank], rel_pos_bias=True)
    theirs.load_state_dict(back)
    want = theirs(torch.from_numpy(np.array(x))).detach().numpy()
    np.testing.assert_allclose(make(rank, 5)(x), want, rtol=1e-4, atol=1e-5)
    half = {k: v.to(torch.bfloat16) for k, v in theirs.state_dict().items()}
    assert nf.from_torch(half)["qkv"]["kernel"].dtype == jnp.bfloat16


def test_import_does_not_load_pytorch():
    program = "import sys, natten.flax; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr


def test_names():
    for rank, module in MODULES.items():
        assert module.__name__ == f"NeighborhoodAttention{rank}D"
        assert module.__module__ == "natten.flax"
        assert f"{rank}-D" in module.__doc__ and "{rank}" not in module.__doc__
