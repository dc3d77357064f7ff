"""JAX functions against the oracle, on random problems of every kind."""

from __future__ import annotations

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import cases  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import oracle  # noqa: E402

import natten.jax as nj  # noqa: E402

COUNT = 520


@pytest.fixture(autouse=True)
def _float64():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def of_names(case: cases.Case, arrays: cases.Arrays, names: tuple[str, ...]) -> dict:
    return {n: jnp.asarray(arrays[n], case.dtype) for n in names if n in arrays}


def to_numpy(arrays: dict) -> cases.Arrays:
    return {n: np.asarray(x, np.float64) for n, x in arrays.items()}


def statistic(case: cases.Case) -> str:
    return "float64" if case.dtype == "float64" else "float32"


def gradients(pullback, incoming) -> dict:
    (grads,) = pullback(incoming)
    return {f"grad_{n}": g for n, g in grads.items()}


def test_fused(capsys):
    names = ("query", "key", "value", "rpb", "additional_keys", "additional_values")
    errors = cases.Errors("jax fused")
    for case in cases.random_cases(COUNT, cases.SEED + 2):
        arrays = case.fused_arrays()
        function = (nj.na1d, nj.na2d, nj.na3d)[case.rank - 1]
        (output, lse), pullback = jax.vjp(
            lambda x, f=function, c=case: f(**x, **c.neighborhood, scale=c.scale, return_lse=True),
            of_names(case, arrays, names),
        )
        incoming = (
            jnp.asarray(arrays["grad_output"], case.dtype),
            jnp.asarray(arrays["grad_logsumexp"], statistic(case)),
        )
        assert output.dtype == case.dtype and lse.dtype == statistic(case)
        assert not output.weak_type and not lse.weak_type
        got = {"output": output, "logsumexp": lse, **gradients(pullback, incoming)}
        scale = float(np.linalg.norm(arrays["grad_output"]))
        errors.check(case, to_numpy(got), oracle.fused(case, arrays), scale)
    with capsys.disabled():
        print(f"\n{errors.table()}")


def test_unfused(capsys):
    errors = cases.Errors("jax unfused")
    for case in cases.random_cases(COUNT, cases.SEED + 3):
        arrays = case.unfused_arrays()
        qk_want, av_want = oracle.unfused(case, arrays)
        qk = (nj.na1d_qk, nj.na2d_qk, nj.na3d_qk)[case.rank - 1]
        av = (nj.na1d_av, nj.na2d_av, nj.na3d_av)[case.rank - 1]
        attn, pullback = jax.vjp(
            lambda x, f=qk, c=case: f(**x, **c.neighborhood),
            of_names(case, arrays, ("query", "key", "rpb", "additional_keys")),
        )
        incoming = jnp.asarray(arrays["grad_attn"], case.dtype)
        assert attn.dtype == case.dtype
        got = {"attn": attn, **gradients(pullback, incoming)}
        errors.check(case, to_numpy(got), qk_want, float(np.linalg.norm(arrays["grad_attn"])))

        output, pullback = jax.vjp(
            lambda x, f=av, c=case: f(**x, **c.neighborhood),
            of_names(case, arrays, ("attn", "value", "additional_values")),
        )
        incoming = jnp.asarray(arrays["grad_output"], case.dtype)
        assert output.dtype == case.dtype
        got = {"output": output, **gradients(pullback, incoming)}
        errors.check(case, to_numpy(got), av_want, float(np.linalg.norm(arrays["grad_output"])))
    with capsys.disabled():
        print(f"\n{errors.table()}")
