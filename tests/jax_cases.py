"""Functions, arrays and comparisons that the JAX tests share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natten.jax as nj

FUSED = {1: nj.na1d, 2: nj.na2d, 3: nj.na3d}
QK = {1: nj.na1d_qk, 2: nj.na2d_qk, 3: nj.na3d_qk}
AV = {1: nj.na1d_av, 2: nj.na2d_av, 3: nj.na3d_av}
# Per rank: grid and a neighborhood that mixes even and odd kernels, stride, dilation and causality.
GRIDS = {1: (7,), 2: (5, 4), 3: (3, 4, 2)}
MIXED: dict[int, dict[str, Any]] = {
    1: dict(kernel_size=3, dilation=2, is_causal=True, stride=2),
    2: dict(kernel_size=(2, 3), dilation=(2, 1), is_causal=(False, True), stride=(1, 2)),
    3: dict(kernel_size=(3, 2, 2), dilation=(1, 2, 1), is_causal=(False, True, False), stride=1),
}
FUSED_NAMES = ("query", "key", "value", "rpb", "additional_keys", "additional_values")
QK_NAMES = ("query", "key", "rpb", "additional_keys")
AV_NAMES = ("attn", "value", "additional_values")
RANKS = pytest.mark.parametrize("rank", [1, 2, 3])


@pytest.fixture(autouse=True)
def float64():
    """64-bit types in every test of the files that import this."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def kernel_of(rank: int) -> tuple[int, ...]:
    return tuple(np.broadcast_to(MIXED[rank]["kernel_size"], rank).tolist())


def randn(*shape: int, seed: int = 0, dtype: str = "float64") -> jax.Array:
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(rng.standard_normal(shape).astype(jnp.dtype(dtype)))


def fused_shapes(rank, batch=2, heads=4, kv_heads=2, dim=3, value_dim=2, n=1):
    grid = GRIDS[rank]
    return (
        (batch, *grid, heads, dim),
        (batch, *grid, kv_heads, dim),
        (batch, *grid, kv_heads, value_dim),
        (heads, *(2 * k - 1 for k in kernel_of(rank))),
        (batch, n, kv_heads, dim),
        (batch, n, kv_heads, value_dim),
    )


def qk_shapes(rank, batch=2, heads=2, dim=3, n=2):
    grid = GRIDS[rank]
    rpb = (heads, *(2 * k - 1 for k in kernel_of(rank)))
    return ((batch, heads, *grid, dim),) * 2 + (rpb, (batch, heads, n, dim))


def av_shapes(rank, batch=2, heads=2, dim=3, n=2):
    grid = GRIDS[rank]
    slots = int(np.prod(kernel_of(rank))) + n
    return (
        (batch, heads, *grid, slots),
        (batch, heads, *grid, dim),
        (batch, heads, n, dim),
    )


def arrays_of(shapes, dtype="float64"):
    return tuple(randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes))


def fused(rank):
    """Fused attention of positional arrays, returning (output, logsumexp)."""
    return lambda *x: FUSED[rank](
        **dict(zip(FUSED_NAMES, x, strict=True)), **MIXED[rank], scale=0.7, return_lse=True
    )


def qk(rank):
    """Scores of positional arrays, with 0 for -inf so that they can be compared and summed."""

    def function(*x):
        attn = QK[rank](**dict(zip(QK_NAMES, x, strict=True)), **MIXED[rank])
        return jnp.where(jnp.isneginf(attn), 0.0, attn)

    return function


def av(rank):
    return lambda *x: AV[rank](**dict(zip(AV_NAMES, x, strict=True)), **MIXED[rank])


FAMILIES = {
    "fused": (fused, fused_shapes),
    "qk": (qk, qk_shapes),
    "av": (av, av_shapes),
}
ALL_FAMILIES = pytest.mark.parametrize("family", list(FAMILIES))


def fused_with(rank, **options):
    """(output, logsumexp) of the fused function, of its tensors in the order of FUSED_NAMES."""

    def attention(*x):
        named = dict(zip(FUSED_NAMES, x, strict=True))
        return FUSED[rank](**named, return_lse=True, **options)

    return attention


def unfused_with(rank, **options):
    """The same by qk and av."""

    def attention(q, k, v, rpb, ak, av):
        group = q.shape[-2] // k.shape[-2]
        k, v, ak, av = (jnp.moveaxis(jnp.repeat(x, group, -2), -2, 1) for x in (k, v, ak, av))
        q = jnp.moveaxis(q, -2, 1) * q.shape[-1] ** -0.5
        scores = QK[rank](q, k, rpb=rpb, additional_keys=ak, **options)
        output = AV[rank](jax.nn.softmax(scores), v, additional_values=av, **options)
        return jnp.moveaxis(output, 1, -2), jnp.moveaxis(jax.nn.logsumexp(scores, -1), 1, -1)

    return attention


def weighted_sum(function):
    """A scalar with a different gradient for every element of every result."""

    def scalar(*x):
        return sum(
            jnp.sum(r.astype(jnp.float64) * jnp.cos(jnp.arange(r.size).reshape(r.shape)))
            for r in jax.tree.leaves(function(*x))
        )

    return scalar


def results_and_gradients(function, count=3):
    """What a function of `count` arrays returns, and its gradients, compiled together."""
    gradients = jax.grad(weighted_sum(function), tuple(range(count)))
    return jax.jit(lambda *x: (function(*x), gradients(*x)))


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def assert_close(a, b, tolerance=1e-12):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def dense_attention(q, k, v, is_causal=False, scale=None):
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)
    scores = jnp.einsum("bqhd,bkhd->bqhk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))
        scores = jnp.where(mask[:, None], scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    return jnp.einsum("bqhk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v), lse
