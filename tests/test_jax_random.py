"""JAX functions on the random problems of test_torch_random.py: against the oracle, and, where
PyTorch is installed, against its bits."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import cases  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import oracle  # noqa: E402
from jax_cases import float64  # noqa: E402, F401, a fixture

import natten.jax as nj  # noqa: E402

if importlib.util.find_spec("torch"):
    from test_torch_random import run_fused, run_unfused
else:
    run_fused = run_unfused = None

COUNT = cases.COUNT or 510


def check_bits(case: cases.Case, got: cases.Arrays, want: cases.Arrays) -> None:
    assert got.keys() == want.keys()
    for name, x in got.items():
        np.testing.assert_array_equal(x, want[name], f"{name} of {case}")


def to_jax(x: np.ndarray, dtype: str) -> jax.Array:
    return jnp.asarray(x.astype(jnp.dtype(dtype)))


def of_names(case: cases.Case, arrays: cases.Arrays, names: tuple[str, ...]) -> dict:
    return {n: to_jax(arrays[n], case.dtype) for n in names if n in arrays}


def to_numpy(arrays: dict) -> cases.Arrays:
    return {n: np.asarray(x, np.float64) for n, x in arrays.items()}


def statistic(case: cases.Case) -> str:
    return "float64" if case.dtype == "float64" else "float32"


def context_of(case: cases.Case, arrays: cases.Arrays) -> dict:
    """The arguments of a problem that have no gradient: the key mask, and for every other part of
    a grid its offsets, which are read at run time then."""
    mask = {"key_mask": jnp.asarray(arrays["key_mask"])} if "key_mask" in arrays else {}
    if case.query_offset is None or case.seed % 2:
        return mask
    names = ("query_offset", "key_offset")
    options = case.neighborhood
    in_one = case.seed % 4 == 0  # else as a tuple of an array for each axis
    return mask | {
        n: jnp.asarray(options[n]) if in_one else tuple(map(jnp.asarray, options[n]))
        for n in names
        if n in options
    }


def call_and_differentiate(
    function: Callable[..., Any], inputs: dict, incoming: Any, context: dict
) -> tuple[Any, dict]:
    """Results and named gradients, in one compilation, as that is what takes the time. `context`:
    arguments without a gradient."""

    @jax.jit
    def both(inputs: dict, incoming: Any, context: dict) -> tuple[Any, dict]:
        results, pullback = jax.vjp(lambda x: function(**x, **context), inputs)
        return results, *pullback(incoming)

    results, gradients = both(inputs, incoming, context)
    return results, {f"grad_{n}": g for n, g in gradients.items()}


def with_hidden(arrays: cases.Arrays, names: tuple[str, ...], axis: int) -> cases.Arrays:
    """With NaN and infinity in the arrays that the key mask hides."""
    for name in names if "key_mask" in arrays else ():
        arrays = cases.hide(arrays, name, axis)
    return arrays


@cases.a_tenth_and_the_rest(COUNT)
def test_fused(drawn, capsys):
    names = ("query", "key", "value", "rpb", "additional_keys", "additional_values")
    errors = cases.Errors("jax fused")
    for case in drawn:
        arrays = with_hidden(case.fused_arrays(), ("key", "value"), 1)
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
        assert output.dtype == case.dtype and lse.dtype == statistic(case)
        assert not output.weak_type and not lse.weak_type
        got = {"output": output, "logsumexp": lse, **gradients}
        scale = float(np.linalg.norm(arrays["grad_output"]))
        errors.check(case, to_numpy(got), oracle.fused(case, arrays), scale)
        if run_fused:
            check_bits(case, to_numpy(got), run_fused(case, arrays))
    with capsys.disabled():
        print(f"\n{errors.table()}")


@cases.a_tenth_and_the_rest(COUNT, cases.SEED + 1)
def test_unfused(drawn, capsys):
    errors = cases.Errors("jax unfused")
    for case in drawn:
        arrays = with_hidden(case.unfused_arrays(), ("key", "value"), 2)
        qk_want, av_want = oracle.unfused(case, arrays)
        qk = (nj.na1d_qk, nj.na2d_qk, nj.na3d_qk)[case.rank - 1]
        av = (nj.na1d_av, nj.na2d_av, nj.na3d_av)[case.rank - 1]

        def results(
            qk_inputs: dict,
            av_inputs: dict,
            qk: Any = qk,
            av: Any = av,
            case: Any = case,
            **context: Any,
        ) -> tuple[jax.Array, jax.Array]:
            options = case.neighborhood | context
            return qk(**qk_inputs, **options), av(**av_inputs, **options)

        (attn, output), gradients = call_and_differentiate(
            results,
            {
                "qk_inputs": of_names(case, arrays, ("query", "key", "rpb", "additional_keys")),
                "av_inputs": of_names(case, arrays, ("attn", "value", "additional_values")),
            },
            tuple(to_jax(arrays[n], case.dtype) for n in ("grad_attn", "grad_output")),
            context_of(case, arrays),
        )
        assert attn.dtype == case.dtype and output.dtype == case.dtype
        bits = []
        for result, kind, incoming, want in (
            ({"attn": attn}, "qk", "grad_attn", qk_want),
            ({"output": output}, "av", "grad_output", av_want),
        ):
            grads = {f"grad_{n}": g for n, g in gradients[f"grad_{kind}_inputs"].items()}
            scale = float(np.linalg.norm(arrays[incoming]))
            errors.check(case, to_numpy(result | grads), want, scale)
            bits.append(to_numpy(result | grads))
        if run_unfused:
            for got, want in zip(bits, run_unfused(case, arrays), strict=True):
                check_bits(case, got, want)
    with capsys.disabled():
        print(f"\n{errors.table()}")
