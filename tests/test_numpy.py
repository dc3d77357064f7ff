"""The functions on numpy arrays: results, layouts, refusals, and what they leave unimported."""

from __future__ import annotations

import inspect
import tracemalloc
from collections.abc import Callable

import cases
import numpy as np
import oracle
import pytest
from test_package import run_python

import natten
import natten.numpy as na
from natten import _core

CASES = cases.COUNT * 4 // 3 or 270  # those of bfloat16, which numpy lacks, are left out
FUSED = (na.na1d, na.na2d, na.na3d)
QK = (na.na1d_qk, na.na2d_qk, na.na3d_qk)
AV = (na.na1d_av, na.na2d_av, na.na3d_av)


def numpy_cases(seed: int) -> list[cases.Case]:
    return [c for c in cases.random_cases(CASES, seed) if c.dtype != "bfloat16"]


def inputs_of(case: cases.Case, arrays: cases.Arrays, names: tuple[str, ...]) -> cases.Arrays:
    """The named arguments that the case has. Every other case gets views with gaps in memory, the
    rest read-only arrays."""
    inputs = {n: arrays[n].astype(case.dtype) for n in names if n in arrays}
    if "key_mask" in arrays:
        inputs["key_mask"] = arrays["key_mask"]
    if case.seed % 2:
        views = {n: np.stack([x, x], axis=1)[:, 1] for n, x in inputs.items()}
        if "key_mask" in arrays:  # of which even the innermost axis may have gaps
            views["key_mask"] = np.repeat(arrays["key_mask"], 2, axis=-1)[..., ::2]
        return views
    for x in inputs.values():
        x.flags.writeable = False
    return inputs


def normal(*shape: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


# Results


def test_fused(capsys):
    errors = cases.Errors("numpy fused")
    names = ("query", "key", "value", "rpb", "additional_keys", "additional_values")
    for case in numpy_cases(cases.SEED):
        arrays = case.fused_arrays()
        inputs = inputs_of(case, arrays, names)
        output, lse = FUSED[case.rank - 1](
            **inputs, **case.neighborhood, scale=case.scale, return_lse=True
        )
        assert output.dtype == case.dtype
        assert lse.dtype == ("float64" if case.dtype == "float64" else "float32")
        want = oracle.fused(case, arrays)
        got = {"output": output, "logsumexp": lse}
        errors.check(case, got, {n: want[n] for n in got})
    with capsys.disabled():
        print(f"\n{errors.table()}")


def test_unfused(capsys):
    errors = cases.Errors("numpy unfused")
    for case in numpy_cases(cases.SEED + 1):
        arrays = case.unfused_arrays()
        qk_want, av_want = oracle.unfused(case, arrays)
        inputs = inputs_of(case, arrays, ("query", "key", "rpb", "additional_keys"))
        attn = QK[case.rank - 1](**inputs, **case.neighborhood)
        assert attn.dtype == case.dtype
        errors.check(case, {"attn": attn}, {"attn": qk_want["attn"]})

        inputs = inputs_of(case, arrays, ("attn", "value", "additional_values"))
        output = AV[case.rank - 1](**inputs, **case.neighborhood)
        assert output.dtype == case.dtype
        errors.check(case, {"output": output}, {"output": av_want["output"]})
    with capsys.disabled():
        print(f"\n{errors.table()}")


def dense_attention(query, key, value, is_causal, scale):
    """(output, logsumexp) over all keys, one key-value head per head."""
    q, k, v = (x.swapaxes(1, 2) for x in (query, key, value))
    scores = scale * q @ k.swapaxes(-1, -2)
    if is_causal:
        scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
    weights = np.exp(scores)
    total = weights.sum(-1, keepdims=True)
    return (weights / total @ v).swapaxes(1, 2), np.log(total)[..., 0].swapaxes(1, 2)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("lengths", [(7, 11), (11, 7)])
def test_attention(lengths, is_causal, scale):
    query = normal(2, lengths[0], 3, 8, dtype="float64")
    key, value = normal(2, 2, lengths[1], 3, 8, dtype="float64", seed=1)
    output, lse = na.attention(query, key, value, is_causal, scale, return_lse=True)
    want = dense_attention(query, key, value, is_causal, scale or 8**-0.5)
    assert cases.relative_error(output, want[0]) < 1e-13
    assert cases.relative_error(lse, want[1]) < 1e-13
    assert np.array_equal(na.attention(query, key, value, is_causal, scale), output)


def test_grouped_heads_of_attention():
    query, key, value = normal(1, 7, 4, 8), normal(1, 9, 2, 8), normal(1, 9, 2, 5)
    repeated = (x.repeat(2, axis=2) for x in (key, value))
    assert np.array_equal(na.attention(query, key, value), na.attention(query, *repeated))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("offset", [0.0, 500.0])
def test_merged_parts_are_the_whole(dtype, offset):
    """Also where logsumexps exceed what exp can take."""
    query = normal(1, 6, 2, 4, dtype=dtype)
    key, value = normal(2, 1, 12, 2, 4, dtype=dtype, seed=1)
    query[..., 0], key[..., 0] = 1.0, 2 * offset
    parts = [
        na.attention(query, key[:, i : i + 4], value[:, i : i + 4], return_lse=True)
        for i in (0, 4, 8)
    ]
    output, lse = na.merge_attentions(*zip(*parts, strict=True))
    whole, whole_lse = na.attention(query, key, value, return_lse=True)
    assert output.dtype == lse.dtype == dtype
    assert offset == 0 or lse.min() > 490
    # Weights are exp of logsumexps, which are as exact as numbers of their size can be.
    bound = cases.FORWARD_BOUND[dtype] + float(np.spacing(np.abs(lse).max()))
    assert cases.relative_error(output, whole) <= bound
    assert cases.relative_error(lse, whole_lse) <= cases.FORWARD_BOUND[dtype]


def test_merging_special_values():
    cases.check_merges(na.merge_attentions)


def test_merging_one_part_changes_nothing():
    output, lse = normal(1, 5, 2, 4, dtype="float16"), normal(1, 5, 2)
    merged, merged_lse = na.merge_attentions([output], [lse])
    assert merged.dtype == "float16" and np.array_equal(merged, output)
    assert merged_lse.dtype == "float32" and np.array_equal(merged_lse, lse)


def test_queries_that_see_nothing():
    x = normal(2, 6, 7, 2, 4)
    mask = np.ones((2, 6, 7), bool)
    mask[1] = False
    output, lse = na.na2d(x, x, x, 3, key_mask=mask, return_lse=True)
    assert (output[1] == 0).all() and np.isneginf(lse[1]).all()
    want = na.na2d(x[:1], x[:1], x[:1], 3, key_mask=mask[:1])
    assert np.array_equal(output[:1], want)


def test_hidden_keys_hold_anything():
    for case in numpy_cases(cases.SEED + 2):
        if case.mask_batch is None:
            continue
        arrays = case.fused_arrays()
        hidden = cases.hide(cases.hide(arrays, "key", 1), "value", 1)
        names = ("query", "key", "value", "rpb", "additional_keys", "additional_values")
        options = dict(case.neighborhood, scale=case.scale, return_lse=True)
        got, want = (
            FUSED[case.rank - 1](**inputs_of(case, x, names), **options) for x in (hidden, arrays)
        )
        assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True)), case


def test_masks_that_are_lists_or_views():
    x = normal(1, 4, 1, 2)
    mask = np.array([[True, False, True, True]])
    want = na.na1d(x, x, x, 3, key_mask=mask)
    views = (
        mask.tolist(),
        np.repeat(mask, 2, axis=1)[:, ::2],
        np.flip(np.ascontiguousarray(np.flip(mask, 1)), 1),
        field_of_structs(mask[..., None])[..., 0],
        read_only(mask),
        np.broadcast_to(mask, (1, 4)),
    )
    assert all(np.array_equal(na.na1d(x, x, x, 3, key_mask=view), want) for view in views)


# Layouts


def field_of_structs(x: np.ndarray) -> np.ndarray:
    """Rows that begin at odd addresses, at distances that are no multiple of the element's size."""
    structs = np.zeros(x.shape[:-1], np.dtype([("a", "u1"), ("x", x.dtype, x.shape[-1:])]))
    structs["x"] = x
    return structs["x"]


def unaligned(x: np.ndarray) -> np.ndarray:
    room = np.zeros(x.nbytes + 1, np.uint8)
    room[1:] = np.frombuffer(x.tobytes(), np.uint8)
    return room[1:].view(x.dtype).reshape(x.shape)


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


def reversed_axis(axis: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: np.ascontiguousarray(np.flip(x, axis))[
        tuple(slice(None, None, -1 if i == axis % x.ndim else 1) for i in range(x.ndim))
    ]


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "heads first in memory": lambda x: np.ascontiguousarray(x.swapaxes(1, 3)).swapaxes(1, 3),
    "dims outermost in memory": lambda x: np.ascontiguousarray(x.swapaxes(0, -1)).swapaxes(0, -1),
    "Fortran order": np.asfortranarray,
    "gaps between tokens": lambda x: np.repeat(x, 3, axis=2)[:, :, 1::3],
    "gaps between elements": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "reversed rows": reversed_axis(1),
    "reversed heads": reversed_axis(3),
    "reversed elements": reversed_axis(-1),
    "read-only": read_only,
    "other byte order": lambda x: x.astype(x.dtype.newbyteorder()),
    "unaligned": unaligned,
    "field of structs": field_of_structs,
}


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    inputs = [normal(2, 5, 6, 3, 8, dtype=dtype, seed=i) for i in range(3)]
    want = na.na2d(*inputs, 3)
    views = [LAYOUTS[layout](x) for x in inputs]
    assert all(np.array_equal(v, x) for v, x in zip(views, inputs, strict=True))
    assert any(v.strides != inputs[0].strides for v in views) or layout in (
        "read-only",
        "other byte order",
        "unaligned",
    )
    got = na.na2d(*views, 3)
    assert got.dtype == np.dtype(dtype) and got.dtype.isnative
    assert np.array_equal(got, want)


def test_broadcast_batch():
    x = normal(1, 12, 2, 4)
    got = na.na1d(*(np.broadcast_to(x, (3, 12, 2, 4)),) * 3, 5)
    assert np.array_equal(got, np.repeat(na.na1d(x, x, x, 5), 3, axis=0))


def peak_bytes(function: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_outer_strides_need_no_copy():
    heads_first = normal(1, 2, 4096, 32)
    heads_last = heads_first.swapaxes(1, 2)
    for view, copies in ((heads_last, 0), (heads_last[..., ::-1], 1)):
        peak = peak_bytes(lambda view=view: na.na1d(view, view, view, 3))
        # The output, and copies of the three arguments if any.
        assert (1 + 3 * copies) * view.nbytes <= peak < (1 + 3 * copies + 0.5) * view.nbytes


def test_inputs_stay_as_they_are():
    inputs = [normal(1, 5, 6, 2, 4, seed=i) for i in range(3)]
    before = [x.copy() for x in inputs]
    na.na2d(*inputs, 3)
    assert all(np.array_equal(x, b) for x, b in zip(inputs, before, strict=True))


def test_batch_of_zero():
    x = np.zeros((0, 5, 6, 2, 4), np.float32)
    output, lse = na.na2d(x, x, x, 3, return_lse=True)
    assert output.shape == x.shape and lse.shape == x.shape[:-1]
    q = np.zeros((0, 2, 5, 6, 4), np.float32)
    attn = na.na2d_qk(q, q, 3)
    assert attn.shape == (0, 2, 5, 6, 9)
    assert na.na2d_av(attn, q, 3).shape == q.shape
    t = np.zeros((0, 5, 2, 4), np.float32)
    merged, merged_lse = na.merge_attentions(*zip(na.attention(t, t, t, return_lse=True)))
    assert merged.shape == t.shape and merged_lse.shape == t.shape[:-1]


def test_lists():
    arrays = [normal(1, 4, 1, 2, dtype="float64", seed=i) for i in range(3)]
    output, lse = na.na1d(*arrays, 3, return_lse=True)
    from_lists, lse_of_lists = na.na1d(*(x.tolist() for x in arrays), 3, return_lse=True)
    assert from_lists.dtype == "float64"
    assert np.array_equal(from_lists, output) and np.array_equal(lse_of_lists, lse)
    merged, merged_lse = na.merge_attentions([output.tolist()] * 2, [lse.tolist()] * 2)
    assert cases.relative_error(merged, output) < 1e-15
    assert cases.relative_error(merged_lse, lse + np.log(2)) < 1e-15


# Refusals

X = normal(1, 6, 7, 2, 4)
Q = normal(1, 2, 6, 7, 4)  # heads first
T = normal(1, 6, 2, 4)
M = np.ones((1, 6, 7), bool)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        # Types
        (
            lambda: na.na2d(X, X.astype("int64"), X, 3),
            TypeError,
            "key: got dtype int64; must be float",
        ),
        (lambda: na.na2d(X > 0, X, X, 3), TypeError, "query: got dtype bool"),
        (lambda: na.na2d(X, X, X * 1j, 3), TypeError, "value: got dtype complex64; must be float"),
        (lambda: na.na2d(X, X, X.astype(object), 3), TypeError, "value: got dtype object; must be"),
        (lambda: na.na2d(X, X, X.astype("g"), 3), TypeError, r"value: got dtype .*\(convert it"),
        (lambda: na.na2d("text", X, X, 3), TypeError, "query: got dtype str"),
        (lambda: na.na2d([[1.0], []], X, X, 3), TypeError, "query: got <class 'list'>; must be an"),
        (lambda: na.na2d(X, X.astype("float64"), X, 3), TypeError, "key: got dtype float64; must"),
        (
            lambda: na.na2d_qk(Q, Q.astype("int64"), 3),
            TypeError,
            "key: got dtype int64; must be float",
        ),
        (
            lambda: na.attention(T, T.astype("int64"), T),
            TypeError,
            "key: got dtype int64; must be flo",
        ),
        (lambda: na.na2d(X, X, X, 3.0), TypeError, "kernel_size: got 3.0; must be an integer"),
        (lambda: na.na2d(X, X, X, 3, scale="1 m"), TypeError, "scale: got '1 m'"),
        # Values and shapes
        (lambda: na.na2d(None, X, X, 3), TypeError, "query: got None; must be an array"),
        (lambda: na.attention(T, None, T), TypeError, "key: got None; must be an array"),
        (lambda: na.na2d(1.0, X, X, 3), ValueError, "query: got 0 dimensions"),
        (lambda: na.na3d(X, X, X, 3), ValueError, "query: got 5 dimensions, .* must have 6"),
        (lambda: na.na2d(X, X[:, :5], X, 3), ValueError, "key: got shape .*5, 7, 2, 4"),
        (lambda: na.na2d(X, X, X, (3, 9)), ValueError, r"kernel_size: got \[3, 9\]"),
        (lambda: na.na2d(X, X, X, (3, 3, 3)), ValueError, "kernel_size: got .*3 elements"),
        (lambda: na.na2d(X, X, X, 3, stride=4), ValueError, "stride: got"),
        (lambda: na.na2d(X, X, X, 3, scale=np.inf), ValueError, "scale: got inf"),
        (lambda: na.na2d(X, X, X, 3, additional_keys=T), ValueError, "additional_values"),
        (lambda: na.na2d_av(Q, Q, 3), ValueError, "attn: got 4 slots"),
        (lambda: na.na2d(X, X, X, 3, backend="no"), ValueError, 'backend: got "no"'),
        (lambda: na.attention(T[0], T, T), ValueError, "query: got 3 dimensions"),
        (lambda: na.attention(T, T[0], T), ValueError, "key: got 3 dimensions"),
        (lambda: na.attention(T, T[:, :0], T[:, :0]), ValueError, "must be at least 1"),
        # Masks and parts
        (
            lambda: na.na2d(X, X, X, 3, key_mask=X[..., 0, 0]),
            TypeError,
            "key_mask: got dtype float",
        ),
        (
            lambda: na.na2d(X, X, X, 3, key_mask=M.astype("int64")),
            TypeError,
            "key_mask: got dtype int64; must",
        ),
        (lambda: na.na2d(X, X, X, 3, key_mask="all"), TypeError, "key_mask: got dtype str"),
        (lambda: na.na2d(X, X, X, 3, key_mask=M[0]), ValueError, "key_mask: got 2 dimensions"),
        (lambda: na.na2d(X, X, X, 3, key_mask=M[:, 1:]), ValueError, r"key_mask: got shape \[1, 5"),
        (lambda: na.na2d_qk(Q, Q, 3, key_mask=M[:0]), ValueError, r"key_mask: got shape \[0, 6"),
        (lambda: na.na2d_qk(Q, Q, 3, key_offset=1), ValueError, "key_offset: got .* without grid"),
        (lambda: na.na2d(X, X[:, 1:], X, 3), ValueError, "key: got shape .* the spatial shape"),
        (lambda: na.na2d(X, X[:, 1:], X, 3, grid_size=9), ValueError, "value: got shape .* number"),
        # Merging
        (lambda: na.merge_attentions([], []), ValueError, "got 0 and 0 tensors"),
        (lambda: na.merge_attentions([T, T], [T[..., 0]]), ValueError, "got 2 and 1 tensors"),
        (lambda: na.merge_attentions([1.0], [1.0]), ValueError, r"outputs: got shape \[\]"),
        (lambda: na.merge_attentions([T, T[:, 1:]], [T[..., 0]] * 2), ValueError, "outputs: got s"),
        (lambda: na.merge_attentions([T], [T]), ValueError, "lse_tensors: got shape"),
        (lambda: na.merge_attentions([T.astype(int)], [T[..., 0]]), TypeError, "outputs: got dtyp"),
        (
            lambda: na.merge_attentions([T, T.astype("float64")], [T[..., 0]] * 2),
            TypeError,
            "outputs: got dtypes float32 and float64",
        ),
        (
            lambda: na.merge_attentions([T], [T[..., 0].astype("float16")]),
            TypeError,
            "lse_tensors: got dtype float16; must be float64 or float32",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_masked_arrays():
    x = np.ma.array(np.ones((1, 6, 1, 2)), mask=False)
    want = natten.numpy.na1d(*[np.ones((1, 6, 1, 2))] * 3, 3)
    np.testing.assert_array_equal(natten.numpy.na1d(x, x, x, 3), want)
    x[0, 3] = np.ma.masked
    with pytest.raises(TypeError, match=r"^key: got a masked array; .*key_mask"):
        natten.numpy.na1d(want, x, want, 3)


def test_bfloat16_is_refused():
    """numpy hands it over neither by DLPack nor by its buffer protocol."""
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    with pytest.raises(TypeError, match="query: got dtype bfloat16; must be float64, float32 or"):
        na.na2d(X.astype(bfloat16), X, X, 3)
    with pytest.raises(TypeError, match="outputs: got dtype bfloat16; must be float64, float32 or"):
        na.merge_attentions([T.astype(bfloat16)], [T[..., 0]])


# Backends, threads and other frameworks


def test_backends():
    """`na_kernel` and the argument choose; the argument goes first."""
    fast, naive = (na.na2d(X, X, X, 3, backend=name) for name in ("vectorized", "naive"))
    assert not np.array_equal(fast, naive)
    assert cases.relative_error(fast, naive) < 1e-6
    with natten.na_kernel("naive"):
        assert np.array_equal(na.na2d(X, X, X, 3), naive)
        assert np.array_equal(na.na2d(X, X, X, 3, backend="vectorized"), fast)
    assert np.array_equal(na.na2d(X, X, X, 3), fast)


def test_a_backend_that_cannot_run_a_call_says_why():
    x = normal(1, 1, 4100, 2)
    with natten.na_kernel("fused"), pytest.raises(ValueError, match="the window is too large"):
        na.na1d_qk(x, x, 4097)
    assert na.na1d_qk(x, x, 4097).shape == (1, 1, 4100, 4097)


def test_any_number_of_threads_gives_the_same_bits():
    x, q = normal(2, 30, 31, 2, 8), normal(2, 2, 30, 31, 8)
    before = _core.num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            _core.set_num_threads(count)
            attn = na.na2d_qk(q, q, 5)
            results.append((*na.na2d(x, x, x, 7, return_lse=True), attn, na.na2d_av(attn, q, 5)))
    finally:
        _core.set_num_threads(before)
    for result in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_same_bits_as_pytorch():
    torch = pytest.importorskip("torch")
    import natten.functional as F

    def check(function: Callable, *args, **options) -> None:
        theirs = getattr(F, function.__name__)
        tensors = [torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in args]
        # Pairs of results, or of the examples of one result.
        for got, want in zip(function(*args, **options), theirs(*tensors, **options), strict=True):
            assert np.array_equal(got, want.numpy())

    for dtype in ("float64", "float32", "float16"):
        x, q, t = (a.astype(dtype) for a in (X, Q, T))
        check(
            na.na2d, x, x, x, 3,
            stride=2, dilation=(2, 1), is_causal=(False, True), scale=0.2, return_lse=True,
        )  # fmt: skip
        check(na.na2d_qk, q, q, 5, is_causal=True)
        check(na.na2d_av, na.na2d_qk(q, q, 5), q, 5)
        check(na.attention, t, t, t, True, return_lse=True)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_arguments_are_those_of_the_other_adapters(framework):
    """Names, order and defaults; the others have a few more that are passed by name."""
    pytest.importorskip(framework)
    other = pytest.importorskip("natten.functional" if framework == "torch" else "natten.jax")
    for name in na.__all__:
        ours, theirs = (
            [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
            for f in (getattr(na, name), getattr(other, name))
        )
        theirs = [p for p in theirs if p in ours or p[1] is not inspect.Parameter.KEYWORD_ONLY]
        assert ours == theirs, name


def test_imports_no_framework():
    code = """
import sys
import natten
assert "numpy" not in sys.modules
import natten.numpy as na
x = [[[[1.0]]] * 4]
assert na.na1d(x, x, x, 3).shape == (1, 4, 1, 1) and natten.numpy is na
print(sorted({"torch", "jax", "flax"} & set(sys.modules)))
"""
    assert run_python(code).strip() == "[]"
