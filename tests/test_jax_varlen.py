"""JAX's `attention` on examples of different lengths that lie one after another."""

from __future__ import annotations

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import cases  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax_cases import assert_close, assert_same, dense_attention, float64, randn  # noqa: E402, F401

import natten.jax as nj  # noqa: E402
from natten import _core  # noqa: E402

QUERIES, KEYS = [3, 0, 5, 2], [4, 2, 0, 3]
TENSORS = (1, 10, 4, 6), (1, 9, 2, 6), (1, 9, 2, 3)


def tensors():
    return [randn(*shape, seed=i + cases.SEED) for i, shape in enumerate(TENSORS)]


def separate(q, k, v, one, queries=QUERIES, keys=KEYS):
    """(output, logsumexp) by a call of `one` for each example that has keys and queries."""
    results, at, of_keys = [], 0, 0
    for n, m in zip(queries, keys, strict=True):
        parts = q[:, at : at + n], k[:, of_keys : of_keys + m], v[:, of_keys : of_keys + m]
        if n and m:
            results.append(one(*parts))
        else:
            shape = (1, n, q.shape[2])
            results.append((jnp.zeros((*shape, v.shape[3])), jnp.full(shape, -jnp.inf)))
        at, of_keys = at + n, of_keys + m
    return tuple(jnp.concatenate(x, 1) for x in zip(*results, strict=True))


def loss(results):
    output, lse = results
    return jnp.sin(output).sum() + jnp.where(jnp.isfinite(lse), jnp.cos(lse), 0).sum()


@pytest.mark.parametrize("causal", [False, True])
def test_separate_calls_and_gradients(causal):
    """Bit for bit; and as attention is defined."""
    q, k, v = tensors()

    def one(*x):
        return nj.attention(*x, causal, return_lse=True)

    want = separate(q, k, v, one)
    want_grads = jax.jit(jax.grad(lambda *x: loss(separate(*x, one)), (0, 1, 2)))(q, k, v)
    assert_close(want, separate(q, k, v, lambda *x: dense_attention(*x, causal)))

    @jax.jit
    def run(q, k, v, queries, keys):
        def function(*x):
            return nj.attention(*x, causal, return_lse=True, seqlens_Q=queries, seqlens_KV=keys)

        grads = jax.grad(lambda *x: loss(function(*x)), (0, 1, 2))(q, k, v)
        return function(q, k, v), grads

    assert_same(run(q, k, v, jnp.array(QUERIES), jnp.array(KEYS)), (want, want_grads))
    static = {"seqlens_Q": QUERIES, "seqlens_KV": np.array(KEYS)}
    assert_same(nj.attention(q, k, v, causal, return_lse=True, **static), want)
    ends = {
        "cumulative_seqlen_Q": (0, 3, 3, 8, 10),
        "cumulative_seqlen_KV": jnp.array([0, 4, 6, 6, 9], jnp.int32),
        "max_seqlen_Q": 5,
        "max_seqlen_KV": 7,
    }
    assert_same(nj.attention(q, k, v, causal, return_lse=True, **ends), want)
    # The same program for other lengths.
    for queries, keys in (([10, 0, 0, 0], [0, 9, 0, 0]), ([1, 4, 2, 3], [2, 2, 4, 1])):
        got = run(q, k, v, jnp.array(queries), jnp.array(keys))
        assert_same(got[0], separate(q, k, v, one, queries, keys))
        assert all(np.isfinite(x).all() for x in got[1])


@pytest.mark.parametrize("causal", [False, pytest.param(True, marks=pytest.mark.long)])
def test_other_derivatives(causal):
    """Forward mode and second derivatives, against those of attention as it is defined."""
    arrays = tensors()
    directions = [randn(*x.shape, seed=9) for x in arrays]

    def dense(*x):
        return separate(*x, lambda *x: dense_attention(*x, causal))

    def packed(autodiff, *x):
        return nj.attention(
            *x, causal, return_lse=True, autodiff=autodiff,
            seqlens_Q=jnp.array(QUERIES), seqlens_KV=jnp.array(KEYS),
        )  # fmt: skip

    def derivatives(forward, reverse):
        def run(arrays, directions):
            def gradient(function):
                return jax.grad(lambda x: loss(function(*x)))

            tangents = jax.jvp(forward, arrays, directions)[1]
            twice = jax.jvp(gradient(forward), (arrays,), (directions,))[1]
            squares = jax.grad(
                lambda x: sum((g**2).sum() for g in gradient(reverse)(x))
            )(arrays)  # fmt: skip
            return tangents, twice, squares

        return jax.jit(run)(arrays, directions)

    got = derivatives(lambda *x: packed("any", *x), lambda *x: packed("reverse", *x))
    assert_close(got, derivatives(dense, dense), 1e-10)


def test_vmap():
    q, k, v = tensors()
    many = jnp.array([QUERIES, [1, 4, 2, 3]])
    keys = jnp.array(KEYS)

    def run(q, queries):
        return nj.attention(q, k, v, return_lse=True, seqlens_Q=queries, seqlens_KV=keys)

    got = jax.jit(jax.vmap(run, (None, 0)))(q, many)
    both = [run(q, x) for x in many]
    assert_same(got, tuple(jnp.stack(x) for x in zip(*both, strict=True)))
    stacked = jnp.stack([q, 2 * q])
    got = jax.jit(jax.vmap(run, (0, None)))(stacked, many[0])
    both = [run(x, many[0]) for x in stacked]
    assert_same(got, tuple(jnp.stack(x) for x in zip(*both, strict=True)))


def test_it_is_one_call():
    """However many examples there are."""
    q, k, v = tensors()
    lowered = jax.jit(lambda *x: nj.attention(*x, seqlens_Q=QUERIES, seqlens_KV=KEYS)).lower(
        q, k, v
    )
    assert lowered.as_text().count("custom_call @natten") == 1


@pytest.mark.parametrize(
    ("lengths", "kind", "message"),
    [
        (([3, 0, 5, 1], KEYS), ValueError, "cumulative_seqlen_Q: got 9 .* sum of seqlens_Q"),
        (([3, -1, 6, 2], KEYS), ValueError, "got 2 after 3 .* may be negative"),
        (([10], KEYS), ValueError, "^seqlens_KV: got 4 numbers; must be 1"),
        (([], []), ValueError, r"^seqlens_Q: got shape \[0\]"),
        (([3.0, 7.0], [4, 5]), TypeError, "^seqlens_Q: got 3.0"),
        ((np.array([3.0, 7.0]), [4, 5]), TypeError, "^seqlens_Q: got an array of float64"),
        ((QUERIES, None), ValueError, "^seqlens_KV: missing"),
        ((None, KEYS), ValueError, "^seqlens_Q: missing"),
    ],
)
def test_bad_lengths(lengths, kind, message):
    with pytest.raises(kind, match=message):
        jax.eval_shape(
            lambda *x: nj.attention(*x, seqlens_Q=lengths[0], seqlens_KV=lengths[1]), *tensors()
        )


def test_other_refusals():
    q, k, v = tensors()
    good = {"seqlens_Q": QUERIES, "seqlens_KV": KEYS}
    ends = {"cumulative_seqlen_Q": [0, 10], "cumulative_seqlen_KV": [0, 9]}
    with pytest.raises(ValueError, match="must be the ones or the others"):
        nj.attention(q, k, v, **good, max_seqlen_Q=5)
    with pytest.raises(ValueError, match="must be the ones or the others"):
        nj.attention(q, k, v, **good, **ends)
    with pytest.raises(ValueError, match=r"^max_seqlen_KV: got 8; must be at least 9"):
        nj.attention(q, k, v, **ends, max_seqlen_Q=10, max_seqlen_KV=8)
    with pytest.raises(ValueError, match=r"^max_seqlen_Q: got 5 without"):
        nj.attention(q, k, v, max_seqlen_Q=5)
    with pytest.raises(ValueError, match=r"^query: got shape \[2, 10, 4, 6\]; with lengths"):
        nj.attention(jnp.concatenate([q, q]), k, v, **good)
    with pytest.raises(Exception, match="cumulative_seqlen_Q: got 9 as its last number"):
        run = jax.jit(lambda a: nj.attention(q, k, v, seqlens_Q=a, seqlens_KV=jnp.array(KEYS)))
        run(jnp.array([3, 0, 5, 1])).block_until_ready()
    traced = jax.jit(lambda *x: nj.attention(*x, **good)).trace(q, k, v)
    if not _core.backends("cuda"):  # the backend composed serves it
        assert "custom_call" not in traced.lower(lowering_platforms=("cuda",)).as_text()
        return
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("custom_call") == 1


@pytest.mark.parametrize("causal", [False, True])
def test_composed(causal):
    """By JAX's own operations, without a custom call."""
    lengths = {"seqlens_Q": jnp.array(QUERIES), "seqlens_KV": jnp.array(KEYS)}

    def run(backend, *x):
        def function(*x):
            return nj.attention(*x, causal, return_lse=True, backend=backend, **lengths)

        return function(*x), jax.grad(lambda *x: loss(function(*x)), (0, 1, 2))(*x)

    composed = jax.jit(lambda *x: run("composed", *x))
    assert "custom_call" not in composed.lower(*tensors()).as_text()
    assert_close(composed(*tensors()), jax.jit(lambda *x: run(None, *x))(*tensors()))


@pytest.mark.parametrize("backend", [None, "composed"])
def test_no_example_has_keys(backend):
    q, k, v = tensors()
    lengths = {"seqlens_Q": jnp.array(QUERIES), "seqlens_KV": jnp.zeros(4, int)}
    output, lse = nj.attention(q, k[:, :0], v[:, :0], return_lse=True, backend=backend, **lengths)
    assert output.shape == (1, 10, 4, 3) and not output.any()
    assert lse.shape == (1, 10, 4) and jnp.isneginf(lse).all()
