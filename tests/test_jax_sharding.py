"""Calls split over devices, beyond what test_jax_transformations.py shows of every function."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402
from jax_cases import assert_close, float64, randn  # noqa: E402, F401, one is a fixture

import natten.jax as nj  # noqa: E402

if len(jax.devices()) < 4:
    pytest.skip("needs 4 devices (see conftest.py)", allow_module_level=True)

P = PartitionSpec
SPECS = (P("data", None, None, "model"),) * 3 + (P("model"),)
HAS_EXPLICIT_AXES = jax.__version_info__ >= (0, 9)
IS_EXPLICIT = pytest.mark.parametrize(
    "is_explicit",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(
                not HAS_EXPLICIT_AXES, reason="explicit axes are unfinished in this JAX"
            ),
        ),
    ],
)


def mesh_of(*shape, is_explicit=False):
    names = ("data", "model")[: len(shape)]
    devices = jax.devices()[: int(np.prod(shape))]
    if is_explicit:
        types = (jax.sharding.AxisType.Explicit,) * len(shape)
        return jax.make_mesh(shape, names, axis_types=types, devices=devices)
    return Mesh(np.array(devices).reshape(shape), names)


def arrays(batch=4, heads=4, kv_heads=2):
    tokens = (batch, 4, 6)
    return (
        randn(*tokens, heads, 3),
        randn(*tokens, kv_heads, 3, seed=1),
        randn(*tokens, kv_heads, 2, seed=2),
        randn(heads, 5, 5, seed=3),
    )


def attend(query, key, value, rpb=None, **options):
    return nj.na2d(query, key, value, 3, rpb=rpb, **options)


def loss(*x, **options):
    return jnp.sum(jnp.sin(attend(*x, **options)))


def gradients(*x, **options):
    return jax.grad(functools.partial(loss, **options), tuple(range(len(x))))(*x)


def put(x, mesh, specs=SPECS):
    return [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(x, specs, strict=True)]


def collectives(compiled):
    names = r" (all-gather|all-to-all|collective-permute|all-reduce)(?:-start)?\("
    return set(re.findall(names, compiled.as_text()))


def compiled(function, x):
    return jax.jit(function).lower(*x).compile()


def test_the_bias_gradient_alone_is_summed_over_devices():
    x = arrays()
    sharded = put(x, mesh_of(2, 2))
    run = compiled(gradients, sharded)
    (line,) = (line for line in run.as_text().splitlines() if " all-reduce(" in line)
    assert "f64[2,5,5]" in line  # of half of the heads
    assert_close(run(*sharded), gradients(*x), 1e-10)
    # Nothing is summed where only heads are split.
    by_heads = put(x, mesh_of(2, 2), (P(None, None, None, "model"),) * 3 + (P("model"),))
    assert not collectives(compiled(gradients, by_heads))


@pytest.mark.parametrize(
    "spec", [P(None, "data"), P("data", "model"), P(None, None, "data", "model"), P(*[None] * 4)]
)
def test_spatial_axes_exchange_halos(spec):
    """Random problems: test_jax_distributed.py."""
    x = arrays()[:3]
    sharded = put(x, mesh_of(2, 2), (spec,) * 3)
    for function in (attend, gradients):
        run = compiled(function, sharded)
        assert collectives(run) == ({"collective-permute"} if any(spec[1:3]) else set())
        assert_close(run(*sharded), function(*x), 1e-10)
    result = jax.jit(attend)(*sharded)
    assert result.sharding.is_equivalent_to(NamedSharding(mesh_of(2, 2), spec), result.ndim)


def test_what_is_gathered():
    """Tokens of attention to other keys than there are queries, and the grid of parts of grids."""
    x = arrays()[:3]
    mesh = mesh_of(2, 2)

    def to_all(*x):
        tokens = [a.reshape(a.shape[0], -1, *a.shape[3:]) for a in x]
        return nj.attention(tokens[0][:, :12], *tokens[1:])

    def of_part(*x):
        return attend(*x, query_offset=1, grid_size=(7, 8), boundary="cut", key_offset=0)

    for function, inputs in ((to_all, x), (of_part, (x[0][:, :2, :4], *x[1:]))):
        sharded = put(inputs, mesh, (P("data", "model"),) * 3)
        run = compiled(function, sharded)
        assert collectives(run) & {"all-gather", "all-reduce"}
        assert_close(run(*sharded), function(*inputs), 1e-10)


def test_channels_that_are_split_are_gathered():
    x = arrays(batch=2)[:3]
    specs = (P(None, None, None, None, "model"), P(), P(None, None, None, None, "model"))
    x = (jnp.concatenate([x[0], x[0][..., :1]], -1), jnp.pad(x[1], [(0, 0)] * 4 + [(0, 1)]), x[2])
    sharded = put(x, mesh_of(2, 2), specs)
    assert_close(jax.jit(attend)(*sharded), attend(*x))


def test_arrays_split_unlike_each_other():
    """The call is split as the one that is split the most; the others follow."""
    x = arrays()
    specs = (P("data"), P(None, None, None, "model"), P(), P())
    sharded = put(x, mesh_of(2, 2), specs)
    for function in (attend, gradients):
        assert_close(jax.jit(function)(*sharded), function(*x), 1e-10)
    result = jax.jit(attend)(*sharded)
    want = NamedSharding(mesh_of(2, 2), SPECS[0])
    assert result.sharding.is_equivalent_to(want, result.ndim)


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "shape"),
    [
        (4, 8, 4, (1, 4)),
        (4, 8, 2, (1, 4)),  # fewer key-value heads than devices
        (4, 6, 3, (1, 2)),  # 3 key-value heads on 2 devices
        (4, 4, 4, (4, 1)),
        (3, 4, 4, (2, 2)),  # batch 3 on 2 devices
        (1, 2, 1, (2, 2)),
    ],
)
def test_sizes_that_devices_divide_and_others(batch, heads, kv_heads, shape):
    x = arrays(batch, heads, kv_heads)
    mesh = mesh_of(*shape)
    # JAX 0.9 does not know fewer heads than devices.
    of_keys = SPECS[1] if kv_heads >= shape[1] else P("data")
    specs = (SPECS[0], of_keys, of_keys, SPECS[3])

    def constrained(function):
        """Unlike the arguments of jit, what it computes may be split unevenly."""

        def run(*x):
            x = [
                jax.lax.with_sharding_constraint(a, NamedSharding(mesh, s))
                for a, s in zip(x, specs, strict=True)
            ]
            return function(*x)

        return run

    for function in (attend, gradients):
        assert_close(jax.jit(constrained(function))(*x), function(*x), 1e-10)


def test_heads_split_over_more_devices_than_key_value_heads():
    """Groups stay with their key-value head: 2 of these on 4 devices are split in 2 parts."""
    x = arrays(heads=8, kv_heads=2)
    mesh = mesh_of(2, 2)
    split = ("data", "model")
    sharded = put(x, mesh, (P(None, None, None, split), P(), P(), P(split)))
    for function in (attend, gradients):
        assert_close(jax.jit(function)(*sharded), function(*x), 1e-10)


@IS_EXPLICIT
def test_heads_that_all_share_one_key_value_head(is_explicit):
    """Each device has the key-value head, and a part of the sum that its gradient is."""
    x = arrays(kv_heads=1)
    specs = (P("data", None, None, "model"), P("data"), P("data"), P("model"))
    sharded = put(x, mesh_of(2, 2, is_explicit=is_explicit), specs)
    for function, wanted in ((attend, set()), (gradients, {"all-reduce"})):
        run = compiled(function, sharded)
        assert collectives(run) == wanted
        assert_close(run(*sharded), function(*x), 1e-10)


@pytest.mark.long
@IS_EXPLICIT
@pytest.mark.parametrize("split", [P("data"), P(None, None, "data")], ids=["batch", "grid"])
def test_derivatives_of_higher_order(is_explicit, split):
    x = arrays(batch=2, heads=2, kv_heads=1)
    mesh = mesh_of(2, is_explicit=is_explicit)
    sharded = put(x, mesh, (split,) * 3 + (P(),))

    def twice(*x):
        return jax.grad(lambda *x: sum(jnp.sum(g**2) for g in gradients(*x)), (0, 1, 2, 3))(*x)

    def forward_over_reverse(*x):
        t = [jnp.cos(a) for a in x]
        return jax.jvp(functools.partial(gradients, autodiff="any"), x, tuple(t))[1]

    allowed = {"all-reduce"}
    if split[2:]:
        allowed.add("collective-permute")
    for function in (twice, forward_over_reverse):
        run = compiled(function, sharded)
        assert collectives(run) <= allowed
        assert_close(run(*sharded), function(*x), 1e-9)


@IS_EXPLICIT
@pytest.mark.parametrize("mapped", ["all", "query", "rpb"])
@pytest.mark.parametrize("split", ["batch", "heads", "both"])
def test_vmap(is_explicit, mapped, split):
    x = arrays()
    axes = tuple(0 if mapped in ("all", name) else None for name in ("query", "", "", "rpb"))
    stacked = [jnp.stack([a, 0.5 * a, a + 1]) if m == 0 else a for a, m in zip(x, axes)]  # noqa: B905
    keep = {"batch": ("data",), "heads": ("model",), "both": ("data", "model")}[split]
    specs = []
    for spec, m in zip(SPECS, axes, strict=True):
        entries = [s if s in keep else None for s in spec]
        specs.append(P(*([None] if m == 0 else []), *entries))
    mesh = mesh_of(2, 2, is_explicit=is_explicit)
    sharded = put(stacked, mesh, specs)
    for function in (attend, gradients):
        each = jax.vmap(function, axes)
        assert_close(jax.jit(each)(*sharded), each(*stacked), 1e-10)


@IS_EXPLICIT
def test_vmap_over_an_axis_that_is_split(is_explicit):
    x = arrays(batch=1)
    stacked = [jnp.stack([a, 0.5 * a]) for a in x[:3]]
    mesh = mesh_of(2, is_explicit=is_explicit)
    sharded = put(stacked, mesh, (P("data"),) * 3)
    each = jax.vmap(lambda *q: attend(*q, x[3]))
    if is_explicit:  # there a closure must say where it lies
        rpb = jax.device_put(x[3], NamedSharding(mesh, P()))
        each_sharded = jax.vmap(lambda *q: attend(*q, rpb))
    else:
        each_sharded = each
    run = compiled(each_sharded, sharded)
    assert not collectives(run)
    assert_close(run(*sharded), each(*stacked))
    # One that is shared by all examples is copied to all devices.
    shared = [sharded[0], *put(x[1:3], mesh, (P(), P()))]
    each = jax.vmap(attend, (0, None, None))
    assert_close(jax.jit(each)(*shared), each(stacked[0], *x[1:3]))


@pytest.mark.skipif(not HAS_EXPLICIT_AXES, reason="explicit axes are unfinished in this JAX")
def test_explicit_axes_are_checked_when_traced():
    x = arrays()
    mesh = mesh_of(2, 2, is_explicit=True)
    for specs, name in (
        ((P("data", "model"), P("data"), P("data"), P()), "key"),
        ((P("data"), P(), P("data"), P()), "key"),
        ((P(), P(), P(*[None] * 4, "data"), P()), "value"),
        ((*SPECS[:3], P()), "rpb"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: got sharding .*use jax.sharding.reshard"):
            jax.jit(attend)(*put(x, mesh, specs))
    result = jax.eval_shape(attend, *put(x, mesh))
    assert result.sharding.spec == P("data", None, None, "model", None)


@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="needs jax.set_mesh")
@IS_EXPLICIT
def test_calls_in_the_context_of_a_mesh(is_explicit):
    x = arrays()
    mesh = mesh_of(2, 2, is_explicit=is_explicit)
    with jax.set_mesh(mesh):
        sharded = put(x, mesh)
        assert_close(gradients(*sharded), gradients(*x), 1e-10)
        assert_close(attend(*x), jax.jit(attend)(*sharded))


def partly_mapped(*x):
    """shard_map over one of two axes; the batch is split there, the heads outside."""
    mesh = mesh_of(2, 2)
    return jax.shard_map(
        attend, mesh=mesh, in_specs=(P("data"),) * 3 + (P(),), out_specs=P("data"),
        axis_names={"data"},
    )(*x)  # fmt: skip


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="needs jax.shard_map")
def test_shard_map_over_some_axes(monkeypatch):
    x = arrays()
    sharded = put(x, mesh_of(2, 2))
    before = jax.config.jax_use_shardy_partitioner
    try:
        jax.config.update("jax_use_shardy_partitioner", True)
        assert_close(jax.jit(partly_mapped)(*sharded), attend(*x))
        jax.config.update("jax_use_shardy_partitioner", False)
        with pytest.raises(NotImplementedError, match="Shardy"):
            jax.jit(lambda *x: partly_mapped(*x))(*sharded)
    finally:
        jax.config.update("jax_use_shardy_partitioner", before)


def test_both_partitioners():
    x = arrays()
    before = jax.config.jax_use_shardy_partitioner
    try:
        for is_shardy in (False, True):
            jax.config.update("jax_use_shardy_partitioner", is_shardy)
            sharded = put(x, mesh_of(2, 2))
            run = compiled(lambda *x: gradients(*x), sharded)
            assert collectives(run) == {"all-reduce"}
            assert_close(run(*sharded), gradients(*x), 1e-10)
    finally:
        jax.config.update("jax_use_shardy_partitioner", before)


def test_shardings_without_names():
    """Where JAX knows no mesh, arrays are gathered."""
    from jax._src.sharding_impls import GSPMDSharding

    x = arrays()[:3]
    named = put(x, mesh_of(4), (P("data"),) * 3)
    shardings = [
        GSPMDSharding(tuple(jax.devices()[:4]), a.sharding._to_xla_hlo_sharding(a.ndim))
        for a in named
    ]
    run = jax.jit(attend, in_shardings=shardings).lower(*x).compile()
    assert "all-gather" in collectives(run)
    sharded = [jax.device_put(a, s) for a, s in zip(x, shardings, strict=True)]
    assert_close(run(*sharded), attend(*x))


def test_export_of_a_program_for_several_devices():
    export = pytest.importorskip("jax.export")
    pytest.importorskip("flatbuffers", reason="jax.export saves programs with it")
    mesh = mesh_of(4)
    by_batch = NamedSharding(mesh, P("data"))
    x = arrays()[:3]
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=(P("data"),) * 3, out_specs=P("data"))
    checks = [export.DisabledSafetyCheck.custom_call(t) for t in nj.custom_call_targets()]
    program = export.export(jax.jit(mapped, in_shardings=by_batch), disabled_checks=checks)(*x)
    loaded = export.deserialize(program.serialize())
    sharded = [jax.device_put(a, by_batch) for a in x]
    assert_close(jax.jit(loaded.call)(*sharded), attend(*x))


def test_export_refuses_symbolic_shapes():
    from jax import export

    (batch,) = export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, 4, 6, 2, 3), "float32")
    with pytest.raises(ValueError, match=r"^query: got shape \(batch, 4, 6, 2, 3\); sizes must"):
        export.export(jax.jit(attend))(x, x, x)


@pytest.mark.long
def test_the_example():
    script = Path(__file__).parent.parent / "examples" / "sharding.py"
    run = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "all-gather: none" in run.stdout
