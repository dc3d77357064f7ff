"""JAX functions on parts of a grid, whose offsets may be arrays, with borders that cut or wrap and
with key masks: derivatives, transformations and refusals. Random problems: test_jax_random.py."""

from __future__ import annotations

import contextlib
import functools
from types import SimpleNamespace

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import cases  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import oracle  # noqa: E402
from jax import export  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402
from jax_cases import (  # noqa: E402
    FUSED,
    FUSED_NAMES,
    RANKS,
    arrays_of,
    assert_same,
    float64,  # noqa: F401, a fixture
    fused_with,
    randn,
    unfused_with,
)
from test_jax_derivatives import (  # noqa: E402
    DERIVATIVES,
    FEW,
    KINDS,
    assert_close,
    dense_on,
    directions,
    gradient,
    operations,
    scalar,
)

import natten.jax as nj  # noqa: E402

P = PartitionSpec

# Per rank: a window with every boundary, and a part of a grid; keys overhang on some axes.
WINDOWS = {
    1: dict(kernel_size=(3,), dilation=(2,), stride=(2,), is_causal=(False,), boundary=("cut",)),
    2: dict(
        kernel_size=(3, 2), dilation=(1, 2), stride=(1, 1), is_causal=(False, True),
        boundary=("circular", "shift"),
    ),
    3: dict(
        kernel_size=(2, 3, 3), dilation=(1, 1, 1), stride=(1, 2, 1),
        is_causal=(True, False, False), boundary=("cut", "shift", "circular"),
    ),
}  # fmt: skip
PARTS = {
    1: dict(query_offset=(5,), key_offset=(1,), grid_size=(9,)),
    2: dict(query_offset=(4, 1), key_offset=(-3, -1), grid_size=(5, 5)),
    3: dict(query_offset=(2, 1, 3), key_offset=(1, 0, 2), grid_size=(4, 4, 4)),
}
QUERIES = {1: (3,), 2: (1, 3), 3: (1, 2, 1)}
KEYS = {1: (9,), 2: (4, 5), 3: (2, 4, 3)}
OFFSETS = ("query_offset", "key_offset")
ARE_ARRAYS = pytest.mark.parametrize("are_arrays", [False, True], ids=["numbers", "arrays"])


def options(rank, offsets=None):
    """Window and part; `offsets`, if they are given, in place of those of the part."""
    given = {} if offsets is None else dict(zip(OFFSETS, offsets, strict=True))
    return WINDOWS[rank] | PARTS[rank] | given


def offsets_of(rank):
    return tuple(jnp.asarray(PARTS[rank][name]) for name in OFFSETS)


def mask_of(rank, batch=2, seed=0):
    """Half of the keys. Additional tokens are seen by all queries."""
    return jnp.asarray(np.random.default_rng([rank, seed]).random((batch, *KEYS[rank])) < 0.5)


def problem(rank, batch=2, heads=2, kv_heads=1, dim=2, n=1):
    rpb = (heads, *(2 * k - 1 for k in WINDOWS[rank]["kernel_size"]))
    keys = (batch, *KEYS[rank], kv_heads, dim)
    extra = (batch, n, kv_heads, dim)
    return arrays_of(((batch, *QUERIES[rank], heads, dim), keys, keys, rpb, extra, extra))


def dense(rank, mask):
    window = WINDOWS[rank] | PARTS[rank]
    grid = oracle.Grid(SimpleNamespace(shape=QUERIES[rank], key_shape=KEYS[rank], **window))
    return dense_on(grid, mask)


def fused(rank, autodiff, mask, offsets=None):
    return fused_with(rank, **options(rank, offsets), key_mask=mask, autodiff=autodiff)


def unfused(rank, autodiff, mask, offsets=None):
    return unfused_with(rank, **options(rank, offsets), key_mask=mask, autodiff=autodiff)


LIBRARY = {"fused": fused, "unfused": unfused}


# Derivatives.


@functools.cache
def expected(rank, name):
    return jax.jit(lambda *x: DERIVATIVES[name](dense(rank, mask_of(rank)), x))(*problem(rank))


IN_REVERSE = ("vjp", "grad of grad", "hessian")


@pytest.mark.parametrize(
    ("rank", "autodiff", "name"),
    [
        cases.long_unless(rank == 2 and name in ("vjp", "jvp", "hessian"), rank, autodiff, name)
        for rank in (1, 2, 3)
        for name in FEW
        for autodiff in (("reverse", "any") if name in IN_REVERSE else ("any",))
    ],
    ids=str,
)
@KINDS
@ARE_ARRAYS
def test_derivatives(kind, rank, autodiff, name, are_arrays):
    """Mask and offsets are arguments of the compiled function."""

    @jax.jit
    def derivative(x, mask, offsets):
        offsets = offsets if are_arrays else None
        return DERIVATIVES[name](LIBRARY[kind](rank, autodiff, mask, offsets), x)

    got = derivative(problem(rank), mask_of(rank), offsets_of(rank))
    assert_close(got, expected(rank, name))


@KINDS
@pytest.mark.parametrize("autodiff", ["reverse", "any"])
def test_masks_and_offsets_have_no_gradient(kind, autodiff):
    x, mask, offsets = problem(1), mask_of(1), offsets_of(1)

    def function(query, mask, query_offset, key_offset):
        f = LIBRARY[kind](1, autodiff, mask, (query_offset, key_offset))
        return scalar(f)(query, *x[1:])

    arguments = x[0], mask, *offsets
    gradients = jax.jit(jax.grad(function, (0, 1, 2, 3), allow_int=True))(*arguments)
    assert [g.dtype == jax.dtypes.float0 for g in gradients] == [False, True, True, True]
    assert_close(gradients[0], jax.grad(function)(*arguments))
    if autodiff == "any":
        zeros = [np.zeros(a.shape, jax.dtypes.float0) for a in arguments[1:]]
        _, tangent = jax.jvp(function, arguments, (x[0], *zeros))
        _, want = jax.jvp(lambda q: function(q, *arguments[1:]), x[:1], x[:1])
        assert_close(tangent, want)


@KINDS
@ARE_ARRAYS
def test_other_transformations(kind, are_arrays):
    """Each gives what the plain derivative does."""
    x, mask = problem(2), mask_of(2)
    offsets = offsets_of(2) if are_arrays else None
    f = LIBRARY[kind](2, "any", mask, offsets)
    want = expected(2, "vjp")
    incoming = directions(f(*x))
    again = jax.jit(lambda *x: jax.vjp(jax.checkpoint(f), *x)[1](incoming))(*x)
    assert_close(again, want)
    results, pull_back = jax.vjp(f, *x)
    (pushed,) = jax.linear_transpose(pull_back, results)(directions(x))
    assert_close(pushed, jax.jvp(f, x, directions(x))[1])

    def step(total, scale):
        return total + scalar(f)(x[0] * scale, *x[1:]), None

    scales = jnp.array([0.5, 1.5])
    scanned = jax.jit(jax.grad(lambda s: jax.lax.scan(step, 0.0, s)[0]))(scales)
    assert_close(scanned, jax.grad(lambda s: step(0.0, s[0])[0] + step(0.0, s[1])[0])(scales))


def test_the_first_derivative_is_fused():
    for offsets in (None, offsets_of(2)):
        f = fused(2, "any", mask_of(2), offsets)
        found = operations(gradient(scalar(f)), *problem(2))
        assert found == ["attention_backward", "attention_forward"]


# vmap.

MAPPED = {
    "mask": ("mask",),
    "queries and mask": ("query", "mask"),
    "values and shared mask": ("value",),
    "bias": ("rpb",),
    "bias and mask": ("rpb", "mask"),  # one by one
    "offsets": ("offsets",),  # one by one
    "everything": (*FUSED_NAMES, "mask", "offsets"),
}


@pytest.mark.parametrize("batch", [(1, 1), (2, 2), (2, 1)], ids=["1", "2", "2, one mask"])
@pytest.mark.parametrize(
    ("kind", "mapped"),
    [
        cases.long_unless(kind == "fused" or "mask" in mapped, kind, mapped)
        for kind in LIBRARY
        for mapped in MAPPED
    ],
)
def test_vmap(kind, mapped, batch):
    """Results and gradients of three examples that differ in some arguments, against a loop."""
    count = 3
    names = MAPPED[mapped]
    x = problem(2, batch=batch[0])
    mask = mask_of(2, batch[1])
    offsets = jnp.stack(offsets_of(2))
    axes = [1 if name in names else None for name in FUSED_NAMES]
    stacked = [
        a if axis is None else jnp.stack([a, 0.5 * a, a + 1], axis)
        for a, axis in zip(x, axes, strict=True)
    ]
    masks = jnp.stack([mask_of(2, batch[1], seed) for seed in range(count)], -1)
    # The first axis is circular: offsets may go around it, and together along it.
    moves = jnp.array([[[0, 0], [0, 0]], [[0, 0], [5, 0]], [[-2, 0], [-2, 0]]])
    parts = offsets + moves

    @jax.jit
    def of_one(mask, offsets, *x):
        f = LIBRARY[kind](2, "reverse", mask, (offsets[0], offsets[1]))
        return f(*x), gradient(scalar(f))(*x)

    of_mask, of_parts = ("mask" in names or None) and -1, ("offsets" in names or None) and 0
    got = jax.jit(jax.vmap(of_one, (of_mask, of_parts, *axes)))(
        mask if of_mask is None else masks, offsets if of_parts is None else parts, *stacked
    )
    for i in range(count):
        examples = (
            a if axis is None else jnp.take(a, i, axis)
            for a, axis in zip(stacked, axes, strict=True)
        )
        mask_i = mask if of_mask is None else masks[..., i]
        want = of_one(mask_i, offsets if of_parts is None else parts[i], *examples)
        assert_close(jax.tree.map(lambda r, i=i: r[i], got), want)


def custom_calls(function, *x):
    return jax.jit(function).lower(*x).as_text().count("stablehlo.custom_call @natten")


def test_vmap_over_masks_is_one_call():
    x, mask = problem(2), mask_of(2)
    masks = jnp.stack([mask, ~mask])

    def call(mask):
        return fused(2, "reverse", mask)(*x)

    text = jax.jit(jax.vmap(call)).lower(masks).as_text()
    assert text.count("stablehlo.custom_call @natten") == 1 and "while" not in text


def test_vmap_over_no_examples():
    x, mask, offsets = problem(1), mask_of(1), jnp.stack(offsets_of(1))

    def call(mask, offsets):
        return fused(1, "reverse", mask, (offsets[0], offsets[1]))(*x)

    got = jax.vmap(call)(jnp.zeros((0, *mask.shape), bool), jnp.zeros((0, *offsets.shape), int))
    for a, b in zip(got, call(mask, offsets), strict=True):
        assert a.shape == (0, *b.shape) and a.dtype == b.dtype


# One program for all parts.


@RANKS
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_one_program_serves_all_parts(rank, dtype):
    """Each step along the last axis has the bits of the whole; nothing is compiled again."""
    grid = (4,) * (rank - 1) + (7,)
    window = dict(kernel_size=3, boundary=("cut", "circular", "shift")[:rank][::-1])
    q, k, v = arrays_of([(1, *grid, 2, 4)] * 3, dtype)
    traces = []

    @jax.jit
    def part(q, at):
        traces.append("part")
        return FUSED[rank](
            q, k, v, **window, query_offset=(0,) * (rank - 1) + (at,), return_lse=True
        )

    whole = FUSED[rank](q, k, v, **window, return_lse=True)
    for at in range(grid[-1] - 1):
        got = part(jax.lax.dynamic_slice_in_dim(q, at, 2, rank), at)
        for a, b in zip(got, whole, strict=True):
            assert_same(a, jax.lax.dynamic_slice_in_dim(b, at, 2, rank))
    assert len(traces) == 1 and part._cache_size() == 1


@pytest.mark.parametrize("form", ["scalar", "per axis", "of each axis", "int8", "uint32", "numpy"])
def test_forms_of_offsets(form):
    q, k, v = randn(1, 2, 2, 1, 3), randn(1, 6, 6, 1, 3, seed=1), randn(1, 6, 6, 1, 3, seed=2)
    offset = {
        "scalar": jnp.asarray(3),
        "per axis": jnp.array([3, 3]),
        "of each axis": (3, jnp.asarray(3)),
        "int8": jnp.asarray(3, "int8"),
        "uint32": jnp.asarray([3, 3], "uint32"),
        "numpy": np.array([3, 3]),
    }[form]
    assert_same(nj.na2d(q, k, v, 3, query_offset=offset), nj.na2d(q, k, v, 3, query_offset=(3, 3)))


def test_without_64_bit_types():
    jax.config.update("jax_enable_x64", False)
    q, k = randn(1, 2, 1, 3, dtype="float32"), randn(1, 6, 1, 3, seed=1, dtype="float32")
    got = jax.jit(lambda at: nj.na1d(q, k, k, 3, query_offset=at, key_offset=-1, grid_size=8))(2)
    assert_same(got, nj.na1d(q, k, k, 3, query_offset=2, key_offset=-1, grid_size=8))
    with pytest.raises(ValueError, match=r"^key_offset: got -4294967296; must be .* int32"):
        nj.na1d(q, k, k, 3, query_offset=jnp.asarray(2), key_offset=-(2**32), grid_size=8)


def test_what_is_wrong_with_a_part_is_told_when_it_runs():
    q, k = randn(1, 2, 1, 3), randn(1, 4, 1, 3, seed=1)

    @jax.jit
    def part(query_offset, key_offset):
        return nj.na1d(q, k, k, 3, query_offset=query_offset, key_offset=key_offset, grid_size=9)

    assert part(3, 2).shape == q.shape
    for offsets, message in (
        ((3, 1), r"key: got tokens 1 to 4 on axis 0; the windows of queries 3 to 4 need tokens 2"),
        ((8, 5), r"query_offset: got 8 with 2 queries on axis 0; they must lie on the grid, 9"),
        ((-1, 0), r"query_offset: got \[-1\]; must be at least 0"),
    ):
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=message):
            part(*offsets).block_until_ready()
    assert part(0, 0).shape == q.shape  # nothing is broken


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stream_in_a_scan(rank, dtype):
    """A token, or a frame, a step against a cache: the bits of a causal call on the whole."""
    grid = (6, 3, 4)[:rank]
    window = dict(
        kernel_size=(4,) + (3,) * (rank - 1),
        is_causal=(True,) + (False,) * (rank - 1),
        boundary="cut",
    )
    q, k, v = arrays_of([(1, *grid, 2, 4)] * 3, dtype)

    def stream(q, k, v):
        def step(cache, at):
            new = [jax.lax.dynamic_slice_in_dim(x, at, 1, 1) for x in (q, k, v)]
            cache = [
                jax.lax.dynamic_update_slice_in_dim(c, x, at, 1)
                for c, x in zip(cache, new[1:], strict=True)
            ]
            where = (at,) + (0,) * (rank - 1)
            return cache, FUSED[rank](new[0], *cache, **window, query_offset=where)

        # What is not written yet is not read: NaN would show.
        empty = [jnp.full_like(k, jnp.nan), jnp.full_like(v, jnp.nan)]
        _, frames = jax.lax.scan(step, empty, jnp.arange(grid[0]))
        return jnp.moveaxis(frames[:, :, 0], 0, 1)

    def whole(q, k, v):
        return FUSED[rank](q, k, v, **window)

    assert_same(*(jax.jit(function)(q, k, v) for function in (stream, whole)))
    gradients = (jax.jit(gradient(scalar(function)))(q, k, v) for function in (stream, whole))
    for a, b in zip(*gradients, strict=True):
        assert cases.relative_error(a, b) <= cases.GRADIENT_BOUND[dtype]


def test_export_of_a_program_for_all_parts():
    pytest.importorskip("flatbuffers", reason="jax.export saves programs with it")
    x, mask, offsets = problem(2), mask_of(2), offsets_of(2)

    def call(mask, offsets, *x):
        return fused(2, "reverse", mask, offsets)(*x)

    checks = [export.DisabledSafetyCheck.custom_call(t) for t in nj.custom_call_targets()]
    program = export.export(jax.jit(call), disabled_checks=checks)(mask, offsets, *x)
    loaded = export.deserialize(program.serialize(vjp_order=1))
    for shift in (0, -1):  # the first axis is circular
        moved = tuple(o + jnp.array([shift, 0]) for o in offsets)
        assert_same(loaded.call(mask, moved, *x), call(mask, moved, *x))
    incoming = jax.tree.map(jnp.cos, call(mask, offsets, *x))
    got = jax.vjp(lambda *x: loaded.call(mask, offsets, *x), *x)[1](incoming)
    assert_close(got, jax.vjp(lambda *x: call(mask, offsets, *x), *x)[1](incoming))


# Masks.


@pytest.mark.parametrize("autodiff", ["reverse", "any"])
@pytest.mark.parametrize("boundary", ["shift", "cut", "circular"])
def test_hidden_keys_have_no_part_in_anything(boundary, autodiff):
    """Whatever they hold. A query that sees nothing has output 0 and logsumexp -inf."""
    mask = np.random.default_rng(3).random((2, 6, 5)) < 0.6
    mask[1, :, [4, 0, 1, 2]] = False  # all that the first column sees, whatever the boundary
    x = arrays_of([(2, 6, 5, 2, 3)] * 3)
    hidden = ~mask[..., None, None]
    bad = x[0], *(jnp.where(hidden, jnp.nan, a) for a in x[1:])

    @jax.jit
    def results(*x):
        def f(*x):
            return nj.na2d(
                *x, 3, boundary=boundary, key_mask=mask, return_lse=True, autodiff=autodiff
            )

        (output, lse), pull_back = jax.vjp(f, *x)
        return (output, lse), pull_back((jnp.cos(output), jnp.ones_like(lse)))

    (output, lse), gradients = results(*bad)
    for a in (output, *gradients):
        assert np.all(np.isfinite(a))
    for a in gradients[1:]:
        assert np.all(np.where(hidden, a, 0) == 0)
    alone = np.isneginf(lse)
    assert alone[1, :, 0].all() and not alone[0].all()
    assert np.all(output[alone] == 0) and np.all(gradients[0][alone] == 0)
    assert_same(((output, lse), gradients), results(*x))


@pytest.mark.parametrize("name", ["jvp", "grad of grad", "reverse over forward"])
def test_derivatives_where_queries_see_nothing(name):
    """Against a call without these queries: their derivatives are 0."""
    x = arrays_of([(1, 8, 1, 2)] * 3)
    mask = jnp.arange(8)[None] < 3  # queries 4 to 7 see nothing
    options = dict(boundary="cut", return_lse=True, autodiff="any")

    def masked(*x):
        output, lse = nj.na1d(*x, 3, key_mask=mask, **options)
        return output, lse[:, :4]

    def without(*x):
        output, lse = nj.na1d(*(a[:, :4] for a in x), 3, key_mask=mask[:, :4], **options)
        return jnp.pad(output, ((0, 0), (0, 4), (0, 0), (0, 0))), lse

    got, want = (jax.jit(lambda *x, f=f: DERIVATIVES[name](f, x))(*x) for f in (masked, without))
    assert_close(got, want)


# Several devices.

needs_devices = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs 4 devices (conftest.py)")
HAS_EXPLICIT_AXES = jax.__version_info__ >= (0, 9)
MESHES = ["auto", "shardy"] + ["explicit"] * HAS_EXPLICIT_AXES


@contextlib.contextmanager
def mesh_of(kind):
    """Two by two devices; the context has the partitioner that the kind of mesh says."""
    before = jax.config.jax_use_shardy_partitioner
    devices = np.array(jax.devices()[:4])
    try:
        jax.config.update("jax_use_shardy_partitioner", kind != "auto")
        if kind == "explicit":
            types = (jax.sharding.AxisType.Explicit,) * 2
            yield jax.make_mesh((2, 2), ("data", "model"), axis_types=types, devices=devices)
        else:
            yield Mesh(devices.reshape(2, 2), ("data", "model"))
    finally:
        jax.config.update("jax_use_shardy_partitioner", before)


def put(mesh, specs, arrays):
    return jax.tree.map(
        lambda s, a: jax.device_put(a, NamedSharding(mesh, s)),
        specs,
        arrays,
        is_leaf=lambda s: isinstance(s, P),
    )


TOKEN, EXTRA = P("data", None, None, "model"), P("data", None, "model")
SPECS = [TOKEN] * 3 + [P("model"), EXTRA, EXTRA]
ON_MESHES = pytest.mark.parametrize("mesh", MESHES)
MASKS = pytest.mark.parametrize("of_batch", [True, False], ids=["mask of batch", "one mask"])


@needs_devices
@ON_MESHES
@MASKS
@KINDS
def test_sharding_by_batch_and_heads(kind, mesh, of_batch):
    x = problem(2, batch=4, heads=4, kv_heads=2)
    mask, offsets = mask_of(2, 4 if of_batch else 1), offsets_of(2)

    def results(mask, offsets, *x):
        f = LIBRARY[kind](2, "reverse", mask, offsets)
        return f(*x), gradient(scalar(f))(*x)

    with mesh_of(mesh) as devices:
        specs = [P("data") if of_batch else P(), (P(), P()), *SPECS]
        arguments = put(devices, specs, [mask, offsets, *x])
        compiled = jax.jit(results).lower(*arguments).compile()
        got = compiled(*arguments)
    text = compiled.as_text()
    assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))
    assert_close(got, results(mask, offsets, *x), 1e-10)


@needs_devices
@ON_MESHES
@MASKS
def test_vmap_over_masks_where_the_batch_is_split(mesh, of_batch):
    x = problem(2, batch=4, heads=4, kv_heads=2)
    masks = jnp.stack([mask_of(2, 4 if of_batch else 1, seed) for seed in range(3)])

    def results(mask, *x):
        f = fused(2, "reverse", mask)
        return f(*x), jax.grad(scalar(f))(*x)

    mapped = jax.vmap(results, (0, *[None] * len(x)))
    with mesh_of(mesh) as devices:
        specs = [P(None, "data") if of_batch else P(), *SPECS]
        got = jax.jit(mapped)(*put(devices, specs, [masks, *x]))
    assert_close(got, mapped(masks, *x), 1e-10)


@needs_devices
@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="needs jax.shard_map")
@pytest.mark.parametrize("checks", [True, False])
def test_a_grid_over_devices(checks):
    """Each device has a part of the queries; the program is one for all, and so are its gradients'
    sums over devices."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    q, k, v = arrays_of([(1, 8, 3, 2, 4)] * 3)
    mask = jnp.asarray(np.random.default_rng(0).random((1, 8, 3)) < 0.7)
    window = dict(kernel_size=3, boundary=("circular", "cut"), key_mask=mask)

    def part(q, k, v):
        return nj.na2d(q, k, v, **window, query_offset=(2 * jax.lax.axis_index("x"), 0))

    spread = jax.shard_map(
        part, mesh=mesh, in_specs=(P(None, "x"), P(), P()), out_specs=P(None, "x"), check_vma=checks
    )

    def whole(q, k, v):
        return nj.na2d(q, k, v, **window)

    for f in (lambda f: f, lambda f: gradient(scalar(f))):
        assert_close(*(jax.jit(f(function))(q, k, v) for function in (spread, whole)))


# Refusals, while tracing.

X = jax.ShapeDtypeStruct((2, 6, 5, 2, 3), "float32")


def like(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (dict(boundary="reflect"), ValueError, "boundary: got 'reflect'; must be one of shift, c"),
        (dict(boundary=1), TypeError, "boundary: got 1; must be one of shift, cut, circular"),
        (dict(boundary=("cut",)), ValueError, "boundary: got ('cut',), 1 elements"),
        (dict(boundary="circular", is_causal=True), ValueError, "is_causal: got true on axis 0"),
        (dict(boundary="circular", stride=2), ValueError, "stride: got 2 on axis 1"),
        (dict(boundary="circular", dilation=2), ValueError, "kernel_size: got [3, 3]"),
        (dict(key_mask=like("float32", 2, 6, 5)), TypeError, "key_mask: got dtype float32; must b"),
        (dict(key_mask=like("int8", 2, 6, 5)), TypeError, "key_mask: got dtype int8; must be bool"),
        (dict(key_mask=like("bool", 3, 6, 5)), ValueError,
         "key_mask: got shape [3, 6, 5]; batch must be 1 or 2, to match query"),
        (dict(key_mask=like("bool", 2, 6, 4)), ValueError, "key_mask: got shape [2, 6, 4]; the s"),
        (dict(key_mask=like("bool", 6, 5)), ValueError, "key_mask: got 2 dimensions"),
        (dict(key_mask="all"), TypeError, "key_mask: got str; must be an array"),
        (dict(query_offset=1.0), TypeError, "query_offset: got 1.0; must be an integer or 2"),
        (dict(query_offset=True), TypeError, "query_offset: got True"),
        (dict(query_offset=(0,)), ValueError, "query_offset: got (0,), 1 elements"),
        (dict(query_offset=like("float32")), TypeError, "query_offset: got an array of float32"),
        (dict(query_offset=like("bool")), TypeError, "query_offset: got an array of bool"),
        (dict(query_offset=like("int32", 3)), ValueError, "query_offset: got an array of shape (3"),
        (dict(key_offset=like("int32")), ValueError, "grid_size: missing; must be given where key"),
        (dict(key_offset=1), ValueError, "key_offset: got [1, 1] without grid_size"),
        (dict(query_offset=1), ValueError, "query_offset: got 1 with 6 queries on axis 0"),
        (dict(query_offset=like("int32"), grid_size=(5, 5)), ValueError, "query_offset: got 0 wit"),
        (dict(query_offset=like("int32"), grid_size=(6, 2)), ValueError, "kernel_size: got [3, 3]"),
        (dict(grid_size=like("int32")), TypeError, "grid_size: got "),
        (dict(grid_size=(9, 9)), ValueError, "key: got tokens 0 to 5 on axis 0; the windows of"),
    ],
    ids=str,
)  # fmt: skip
def test_refusals(bad, error, message):
    arrays = {n: a for n, a in bad.items() if isinstance(a, jax.ShapeDtypeStruct)}
    static = {n: a for n, a in bad.items() if n not in arrays}
    with pytest.raises(error) as caught:
        jax.eval_shape(lambda x, a: nj.na2d(x, x, x, 3, **static, **a), X, arrays)
    assert str(caught.value).startswith(message)


def test_refusals_of_offsets_among_numbers():
    x = jnp.zeros((1, 6, 5, 1, 2))

    def call(*offset):
        return nj.na2d(x, x, x, 3, query_offset=offset)

    for offset, error, message in (
        ((jnp.asarray(1),), ValueError, "query_offset: got .* 1 elements"),
        ((jnp.asarray(1), 0.5), TypeError, "query_offset: got .* must be an integer"),
        ((jnp.asarray(1.0), 0), TypeError, "query_offset: got an array of float64; must be int"),
        ((jnp.asarray([1, 2]), 0), ValueError, r"query_offset: got an array of shape \(2,\)"),
    ):
        with pytest.raises(error, match=f"^{message}"):
            call(*offset)


def test_unfused_functions_refuse_alike():
    query, key, value = (jnp.zeros((2, 1, 6, 5, 3)) for _ in range(3))
    attn = jnp.zeros((2, 1, 6, 5, 9))
    for call in (
        lambda **o: nj.na2d_qk(query, key, 3, **o),
        lambda **o: nj.na2d_av(attn, value, 3, **o),
    ):
        with pytest.raises(TypeError, match=r"^key_mask: got dtype"):
            call(key_mask=jnp.zeros((2, 6, 5)))
        with pytest.raises(ValueError, match=r"^grid_size: missing"):
            call(key_offset=jnp.asarray(0))
        with pytest.raises(ValueError, match=r"^boundary: got"):
            call(boundary="wrap")
