"""The backend `composed`: libnatten's operations made of JAX's own, for any platform."""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import cases  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import oracle  # noqa: E402
from jax import export  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402
from jax_cases import (  # noqa: E402
    AV,
    AV_NAMES,
    FUSED,
    FUSED_NAMES,
    MIXED,
    QK,
    QK_NAMES,
    arrays_of,
    assert_close,
    av_shapes,
    dense_attention,
    float64,  # noqa: F401, a fixture
    fused_shapes,
    qk_shapes,
    randn,
)
from test_jax_random import (  # noqa: E402
    call_and_differentiate,
    context_of,
    of_names,
    statistic,
    to_jax,
    to_numpy,
    with_hidden,
)

import natten.jax as nj  # noqa: E402
from natten import _kernel  # noqa: E402
from natten.jax import _composed  # noqa: E402

P = PartitionSpec
COUNT = 12
TARGET = "natten.jax.custom_call_targets"
PLATFORMS = ("tpu", "rocm")
FAMILIES = {
    "fused": (FUSED, FUSED_NAMES, fused_shapes),
    "qk": (QK, QK_NAMES, qk_shapes),
    "av": (AV, AV_NAMES, av_shapes),
}


def set_small_tiles(patch: pytest.MonkeyPatch) -> None:
    """So that small problems have many tiles, and several steps of several tiles."""
    patch.setattr(_composed, "_LEAST_PAIRS", 60)
    patch.setattr(_composed, "_MOST_PAIRS", 60)
    patch.setattr(_composed, "_PAIRS_AT_ONCE", 200)
    patch.setattr(_composed, "_LONGEST_RUN", {1: 5, 2: 3, 3: 2})


def function_of(family: str, rank: int, **options: Any) -> Any:
    """A function of positional arrays. Slots without a key hold 0, which can be summed."""
    functions, names, _ = FAMILIES[family]

    def call(*x: jax.Array) -> Any:
        given = dict(zip(names, x, strict=True)) | MIXED[rank] | options
        result = functions[rank](**given)
        return jnp.where(jnp.isneginf(result), 0.0, result) if family == "qk" else result

    return call


def scalar_of(family: str, rank: int, **options: Any) -> Any:
    """Linear in none of its arrays."""
    function = function_of(family, rank, **options)

    def scalar(*x: jax.Array) -> jax.Array:
        return sum(
            jnp.sum(jnp.sin(r + jnp.arange(r.size).reshape(r.shape)))
            for r in jax.tree.leaves(function(*x))
        )

    return scalar


# Results and gradients.


@cases.a_tenth_and_the_rest(COUNT, cases.SEED + 2)
def test_fused(drawn, capsys):
    names = ("query", "key", "value", "rpb", "additional_keys", "additional_values")
    errors = cases.Errors("jax composed, fused")
    for case in drawn:
        arrays = with_hidden(case.fused_arrays(), ("key", "value"), 1)

        def function(case: Any = case, **x: Any) -> Any:
            options = case.neighborhood | x
            return FUSED[case.rank](
                **options, scale=case.scale, return_lse=True, backend="composed"
            )

        with pytest.MonkeyPatch.context() as patch:
            if case.seed % 2:
                set_small_tiles(patch)
            (output, lse), gradients = call_and_differentiate(
                function,
                of_names(case, arrays, names),
                (to_jax(arrays["grad_output"], case.dtype),
                 to_jax(arrays["grad_logsumexp"], statistic(case))),
                context_of(case, arrays),
            )  # fmt: skip
        assert output.dtype == case.dtype and lse.dtype == statistic(case)
        assert not output.weak_type and not lse.weak_type
        got = to_numpy({"output": output, "logsumexp": lse, **gradients})
        scale = float(np.linalg.norm(arrays["grad_output"]))
        errors.check(case, got, oracle.fused(case, arrays), scale)
    with capsys.disabled():
        print(f"\n{errors.table()}")


@cases.a_tenth_and_the_rest(COUNT, cases.SEED + 3)
def test_unfused(drawn, capsys):
    errors = cases.Errors("jax composed, unfused")
    for case in drawn:
        arrays = with_hidden(case.unfused_arrays(), ("key", "value"), 2)

        def results(qk: dict, av: dict, case: Any = case, **context: Any) -> Any:
            options = case.neighborhood | context | {"backend": "composed"}
            return QK[case.rank](**qk, **options), AV[case.rank](**av, **options)

        with pytest.MonkeyPatch.context() as patch:
            if case.seed % 2:
                set_small_tiles(patch)
            (attn, output), gradients = call_and_differentiate(
                results,
                {"qk": of_names(case, arrays, QK_NAMES), "av": of_names(case, arrays, AV_NAMES)},
                tuple(to_jax(arrays[n], case.dtype) for n in ("grad_attn", "grad_output")),
                context_of(case, arrays),
            )
        assert attn.dtype == case.dtype and output.dtype == case.dtype
        for result, kind, incoming, want in zip(
            ({"attn": attn}, {"output": output}),
            ("qk", "av"),
            ("grad_attn", "grad_output"),
            oracle.unfused(case, arrays),
            strict=True,
        ):
            grads = {f"grad_{n}": g for n, g in gradients[f"grad_{kind}"].items()}
            scale = float(np.linalg.norm(arrays[incoming]))
            errors.check(case, to_numpy(result | grads), want, scale)
    with capsys.disabled():
        print(f"\n{errors.table()}")


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention(is_causal, monkeypatch):
    set_small_tiles(monkeypatch)
    q, k, v = arrays_of(((2, 9, 4, 3), (2, 13, 2, 3), (2, 13, 2, 2)))
    if is_causal:
        k, v = k[:, :5], v[:, :5]
    options = {"is_causal": is_causal, "scale": 0.7}
    got = nj.attention(q, k, v, **options, return_lse=True, backend="composed")
    assert_close(got, dense_attention(q, k, v, **options))


def test_long_sums():
    """Of float32, over more terms than plain sums are good for."""
    q, k, v = (randn(1, n, 1, 4, seed=i) for i, n in enumerate((64, 20000, 20000)))
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    want = nj.attention(*(x.astype(jnp.float64) for x in (q, k, v)), backend="naive")
    got = nj.attention(q, k, v, backend="composed")
    assert cases.relative_error(got, want) <= cases.FORWARD_BOUND["float32"]


def test_memory():
    """Neither results nor gradients take memory for tokens times slots."""
    tokens, slots = 4096, 1025
    x = jax.ShapeDtypeStruct((1, tokens, 1, 8), jnp.float32)

    def total(*x: jax.Array) -> jax.Array:
        return jnp.sum(nj.na1d(*x, kernel_size=slots, backend="composed") ** 2)

    compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(x, x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * slots * 4 / 2


# Derivatives and transformations. They need no autodiff="any".


@pytest.mark.parametrize(
    "family", [cases.long_unless(family == "fused", family) for family in FAMILIES]
)
def test_forward_mode(family):
    x = arrays_of(FAMILIES[family][2](2))
    tangents = tuple(randn(*a.shape, seed=7 + i) for i, a in enumerate(x))
    results = [
        jax.jit(functools.partial(jax.jvp, function_of(family, 2, **options)))(x, tangents)
        for options in ({"backend": "composed"}, {"autodiff": "any"})
    ]
    assert_close(*results, 1e-11)


@pytest.mark.parametrize(
    ("family", "rank"),
    [
        cases.long_unless(family == "av", family, rank)
        for family, rank in (("fused", 1), ("qk", 3), ("av", 1))
    ],
)
def test_second_derivatives(family, rank):
    x = arrays_of(FAMILIES[family][2](rank))
    one, two = (tuple(randn(*a.shape, seed=i) for a in x) for i in (7, 8))

    def hessian(**options: Any) -> jax.Array:
        scalar = scalar_of(family, rank, **options)

        def along(s: jax.Array) -> jax.Array:
            return scalar(*(a + s[0] * b + s[1] * c for a, b, c in zip(x, one, two, strict=True)))

        return jax.jit(jax.hessian(along))(jnp.zeros(2))

    assert_close(hessian(backend="composed"), hessian(autodiff="any"), 1e-9)


@pytest.mark.long
def test_vmap_scan_and_remat(monkeypatch):
    """Gradients of several examples, each of a sum over steps that are computed again."""
    set_small_tiles(monkeypatch)
    x = arrays_of(fused_shapes(2))
    stacked = tuple(jnp.stack([a, 0.5 * a], i % 2) for i, a in enumerate(x))
    axes = tuple(i % 2 for i in range(len(x)))

    def gradients(backend: str | None) -> Any:
        scalar = jax.checkpoint(scalar_of("fused", 2, backend=backend))

        def scanned(*x: jax.Array) -> jax.Array:
            def step(total: jax.Array, scale: jax.Array) -> tuple[jax.Array, None]:
                return total + scalar(scale * x[0], *x[1:]), None

            return jax.lax.scan(step, 0.0, jnp.array([0.5, 1.5]))[0]

        return jax.jit(jax.vmap(jax.grad(scanned, tuple(range(len(x)))), axes))(*stacked)

    assert_close(gradients("composed"), gradients(None), 1e-11)


@pytest.mark.long
@pytest.mark.parametrize("is_mapped", [False, True], ids=["jit", "shard_map"])
@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="needs a newer JAX")
def test_sharding(is_mapped):
    """By batch and heads: what is split stays where it is, but for gradients of what is shared."""
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices (see conftest.py)")
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    token, more = P("data", None, None, "model", None), P("data", None, "model", None)
    specs = (token, token, token, P("model", None, None), more, more)
    x = arrays_of(fused_shapes(2, batch=4))
    function = function_of("fused", 2, backend="composed")
    if is_mapped:
        function = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=token)

    def both(*x: jax.Array) -> Any:
        result, pull_back = jax.vjp(function, *x)
        return result, pull_back(jnp.cos(result))

    split = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(x, specs, strict=True)]
    compiled = jax.jit(both).lower(*split).compile()
    function = function_of("fused", 2)
    assert_close(compiled(*split), jax.jit(both)(*x), 1e-11)
    text = compiled.as_text()
    assert not [c for c in ("all-gather", "all-to-all", "collective-permute") if c in text]


# Platforms.


@pytest.mark.parametrize(
    ("family", "rank"),
    [
        cases.long_unless(family == "fused" and rank == 2, family, rank)
        for family, rank in (("fused", 2), ("fused", 3), ("qk", 1), ("av", 3))
    ],
)
def test_lowers_for_other_platforms(family, rank):
    """Results and gradients, without a word about backends."""
    x = arrays_of(FAMILIES[family][2](rank))
    gradient = jax.jit(jax.value_and_grad(scalar_of(family, rank), tuple(range(len(x)))))
    program = export.export(gradient, platforms=PLATFORMS)(*x)
    assert program.platforms == PLATFORMS
    assert "custom_call" not in program.mlir_module()


def test_lowers_for_each_platform_what_it_needs():
    x = arrays_of(fused_shapes(2))
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in nj.custom_call_targets()]
    function = jax.jit(function_of("fused", 2))
    text = export.export(function, platforms=("cpu", "tpu"), disabled_checks=checks)(*x)
    assert text.mlir_module().count(f"custom_call @{TARGET}") == 1
    forward = jax.jit(lambda *x: jax.jvp(function_of("fused", 2, autodiff="any"), x, x))
    assert "custom_call" not in export.export(forward, platforms=("tpu",))(*x).mlir_module()


def test_exported_programs_run():
    pytest.importorskip("flatbuffers", reason="jax.export saves programs with it")
    x = arrays_of(fused_shapes(2))
    program = export.export(jax.jit(function_of("fused", 2, backend="composed")))(*x)
    assert "custom_call" not in program.mlir_module()
    got = export.deserialize(program.serialize()).call(*x)
    assert_close(got, function_of("fused", 2)(*x))


def test_is_told_once(monkeypatch, caplog):
    monkeypatch.setattr(_kernel, "_without_kernels", set())
    x = arrays_of(fused_shapes(1))
    with caplog.at_level(logging.WARNING, "natten"):
        for backend in ("composed", None, None):
            function = jax.jit(function_of("fused", 1, backend=backend))
            export.export(function, platforms=PLATFORMS)(*x)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(PLATFORMS), messages
    for platform, message in zip(PLATFORMS, messages, strict=True):
        assert f"no kernels for {platform} here" in message and '"composed"' in message


# Refusals.


def test_backends_without_kernels_are_refused():
    x = arrays_of(fused_shapes(1))
    function = jax.jit(function_of("fused", 1, backend="vectorized"))
    with pytest.raises(ValueError, match=r'^backend: got "vectorized"; must be "composed" .*tpu'):
        export.export(function, platforms=("tpu",))(*x)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kernel_size": 9},
        {"stride": 5},
        {"dilation": (0, 1)},
        {"scale": float("nan")},
        {"key": jnp.ones((2, 5, 4, 3, 3))},
        {"rpb": jnp.ones((4, 3, 3))},
        {"additional_keys": None},
        {"query_offset": (2, 0), "grid_size": (5, 4)},
        {"key_mask": jnp.ones((2, 5, 4))},
    ],
    ids=str,
)
def test_bad_arguments(wrong):
    """What other backends say."""
    given = dict(zip(FUSED_NAMES, arrays_of(fused_shapes(2)), strict=True)) | MIXED[2] | wrong
    errors = []
    for backend in ("composed", None):
        with pytest.raises((ValueError, TypeError)) as caught:
            nj.na2d(**given, backend=backend)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("offsets", [(-1, 0), (9, 0), (2, 3)], ids=str)
def test_lost_keys_are_told_by_nan(offsets):
    """Of offsets that are arrays, nothing can be raised. A query off the grid, or one whose keys
    are not all given, has no result; others have theirs."""
    grid, length = 10, 4
    query_offset, key_offset = offsets
    x = randn(1, grid, 1, 2)
    whole = nj.na1d(x, x, x, kernel_size=3)

    @jax.jit
    def of_part(query_offset: jax.Array, key_offset: jax.Array) -> jax.Array:
        query = x[:, jnp.clip(query_offset + jnp.arange(3), 0, grid - 1)]
        key = jax.lax.dynamic_slice_in_dim(x, key_offset, length, 1)
        return nj.na1d(
            query, key, key, 3, query_offset=query_offset, key_offset=key_offset, grid_size=grid,
            backend="composed",
        )  # fmt: skip

    got = of_part(jnp.asarray(query_offset), jnp.asarray(key_offset))[0, :, 0]
    for i, row in enumerate(got):
        query = query_offset + i
        keys = range(key_offset, key_offset + length)
        needed = range(min(max(query - 1, 0), grid - 3), min(max(query - 1, 0), grid - 3) + 3)
        if 0 <= query < grid and all(token in keys for token in needed):
            assert_close(row, whole[0, query, 0])
        else:
            assert np.isnan(row).all()


# Modules.


@pytest.mark.long
@pytest.mark.skipif(not importlib.util.find_spec("flax"), reason="needs Flax")
def test_modules():
    from flax import nnx

    from natten.flax import NeighborhoodAttention2D, linen

    x = randn(1, 5, 6, 8, dtype="float32")
    results = []
    for backend in ("composed", None):
        options: Any = {"kernel_size": 3, "rel_pos_bias": True, "backend": backend}
        module = NeighborhoodAttention2D(8, 2, **options, rngs=nnx.Rngs(0))
        of_linen = linen.NeighborhoodAttention2D(8, 2, **options)
        results.append((module(x), of_linen.init_with_output(jax.random.key(0), x)[0]))
    assert_close(*results, 1e-5)
    with pytest.raises(ValueError, match=r'^backend: got "none"'):
        NeighborhoodAttention2D(8, 2, 3, backend="none", rngs=nnx.Rngs(0))
