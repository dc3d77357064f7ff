"""JAX functions on a CUDA device: the random problems of the CPU tests against the same oracle."""

from __future__ import annotations

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import natten  # noqa: E402


def _device():
    try:
        return jax.devices("cuda")[0]
    except RuntimeError:  # JAX has no such platform
        return None


if not natten.has_cuda() or _device() is None:
    pytest.skip(
        "needs a CUDA device, JAX for CUDA, and a build with kernels", allow_module_level=True
    )

import cases  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import oracle  # noqa: E402
from jax_cases import (  # noqa: E402
    ALL_FAMILIES,
    FAMILIES,
    RANKS,
    arrays_of,
    float64,  # noqa: F401, a fixture
    results_and_gradients,
)
from test_jax_random import (  # noqa: E402
    call_and_differentiate,
    context_of,
    of_names,
    statistic,
    to_jax,
    to_numpy,
)

import natten.jax as nj  # noqa: E402

COUNT = 100


@pytest.fixture(autouse=True)
def on_cuda():
    with jax.default_device(_device()):
        yield


def test_fused(capsys):
    names = ("query", "key", "value", "rpb", "additional_keys", "additional_values")
    errors = cases.Errors("jax fused on CUDA")
    for case in cases.random_cases(COUNT, cases.SEED + 3):
        arrays = case.fused_arrays()
        function = (nj.na1d, nj.na2d, nj.na3d)[case.rank - 1]
        (output, lse), gradients = call_and_differentiate(
            lambda f=function, c=case, **x: f(
                **(c.neighborhood | x), scale=c.scale, return_lse=True
            ),
            of_names(case, arrays, names),
            (to_jax(arrays["grad_output"], case.dtype),
             to_jax(arrays["grad_logsumexp"], statistic(case))),
            context_of(case, arrays),
        )  # fmt: skip
        assert output.devices() == {_device()}
        got = {"output": output, "logsumexp": lse, **gradients}
        scale = float(np.linalg.norm(arrays["grad_output"]))
        errors.check(case, to_numpy(got), oracle.fused(case, arrays), scale)
    with capsys.disabled():
        print(f"\n{errors.table()}")


@RANKS
@ALL_FAMILIES
def test_as_on_the_cpu(family, rank):
    make, shapes = FAMILIES[family]
    inputs = arrays_of(shapes(rank))
    run = results_and_gradients(make(rank), len(inputs))
    got = run(*inputs)
    with jax.default_device(jax.devices("cpu")[0]):
        want = run(*(jax.device_put(x, jax.devices("cpu")[0]) for x in inputs))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-10, atol=1e-10)


def test_in_a_loop():
    """Calls among other work of one program, whose memory XLA uses again and again."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 30, 30, 2, 32)), jnp.float32)

    def step(x, _):
        gradient = jax.grad(lambda x: jnp.sum(nj.na2d(x, x, x, kernel_size=5) ** 2))(x)
        return x - 0.01 * gradient, jnp.sum(gradient)

    run = jax.jit(lambda x: jax.lax.scan(step, x, length=20))
    first, again = run(x), run(x)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_backends():
    x = jnp.ones((1, 8, 2, 4), jnp.float32)
    assert jnp.all(nj.na1d(x, x, x, 3, backend="simt") == 1)
    with pytest.raises(ValueError, match="must be one of fna, gemm, simt"):
        nj.na1d(x, x, x, 3, backend="naive")
