"""JAX functions against the oracle, on random problems of every kind."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import cases  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import oracle  # noqa: E402

import natten.jax as nj  # noqa: E402

COUNT = 510


@pytest.fixture(autouse=True)
def _float64():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def to_jax(x: np.ndarray, dtype: str) -> jax.Array:
    return jnp.asarray(x.astype(jnp.dtype(dtype)))


def of_names(case: cases.Case, arrays: cases.Arrays, names: tuple[str, ...]) -> dict:
    return {n: to_jax(arrays[n], case.dtype) for n in names if n in arrays}


def to_numpy(arrays: dict) -> cases.Arrays:
    return {n: np.asarray(x, np.float64) for n, x in arrays.items()}


def statistic(case: cases.Case) -> str:
    return "float64" if case.dtype == "float64" else "float32"


def call_and_differentiate(
    function: Callable[..., Any], inputs: dict, incoming: Any
) -> tuple[Any, dict]:
    """Results and named gradients, in one quick compilation, as that is what takes the time."""

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def both(inputs: dict, incoming: Any) -> tuple[Any, dict]:
        results, pullback = jax.vjp(lambda x: function(**x), inputs)
        return results, *pullback(incoming)

    results, gradients = both(inputs, incoming)
    return results, {f"grad_{n}": g for n, g in gradients.items()}


def test_fused(capsys):
    names = ("query", "key", "value", "rpb", "additional_keys", "additional_values")
    errors = cases.Errors("jax fused")
    for case in cases.random_cases(COUNT, cases.SEED + 2):
        arrays = case.fused_arrays()
        function = (nj.na1d, nj.na2d, nj.na3d)[case.rank - 1]
        (output, lse), gradients = call_and_differentiate(
            lambda f=function, c=case, **x: f(
                **x, **c.neighborhood, scale=c.scale, return_lse=True
            ),
            of_names(case, arrays, names),
            (to_jax(arrays["grad_output"], case.dtype),
             to_jax(arrays["grad_logsumexp"], statistic(case))),
        )  # fmt: skip
        assert output.dtype == case.dtype and lse.dtype == statistic(case)
        assert not output.weak_type and not lse.weak_type
        got = {"output": output, "logsumexp": lse, **gradients}
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

        def results(
            qk_inputs: dict, av_inputs: dict, qk: Any = qk, av: Any = av, case: Any = case
        ) -> tuple[jax.Array, jax.Array]:
            return qk(**qk_inputs, **case.neighborhood), av(**av_inputs, **case.neighborhood)

        (attn, output), gradients = call_and_differentiate(
            results,
            {
                "qk_inputs": of_names(case, arrays, ("query", "key", "rpb", "additional_keys")),
                "av_inputs": of_names(case, arrays, ("attn", "value", "additional_values")),
            },
            tuple(to_jax(arrays[n], case.dtype) for n in ("grad_attn", "grad_output")),
        )
        assert attn.dtype == case.dtype and output.dtype == case.dtype
        for result, kind, incoming, want in (
            ({"attn": attn}, "qk", "grad_attn", qk_want),
            ({"output": output}, "av", "grad_output", av_want),
        ):
            grads = {f"grad_{n}": g for n, g in gradients[f"grad_{kind}_inputs"].items()}
            scale = float(np.linalg.norm(arrays[incoming]))
            errors.check(case, to_numpy(result | grads), want, scale)
    with capsys.disabled():
        print(f"\n{errors.table()}")
