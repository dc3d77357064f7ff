"""PyTorch functions and modules, subject by subject. Random problems: test_torch_random.py."""

from __future__ import annotations

import copy
import io
import logging
import os
import pickle
from types import SimpleNamespace

import cases
import oracle
import pytest
from test_package import run_python

torch = pytest.importorskip("torch")

from torch_cases import AV, FUSED, GRIDS, MIXED, MODULES, QK, fused_inputs, randn  # noqa: E402

import natten  # noqa: E402
import natten.functional as F  # noqa: E402


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_fused_is_unfused_with_softmax(rank):
    heads = 2
    q, k, v, rpb, ak, av = fused_inputs(rank, heads=heads, kv_heads=heads, value_dim=3)
    fused = FUSED[rank](
        q, k, v, rpb=rpb, additional_keys=ak, additional_values=av, scale=0.7, **MIXED[rank]
    )
    q, k, v, ak, av = (x.movedim(-2, 1) for x in (q, k, v, ak, av))
    attn = QK[rank](0.7 * q, k, rpb=rpb, additional_keys=ak, **MIXED[rank]).softmax(-1)
    unfused = AV[rank](attn, v, additional_values=av, **MIXED[rank])
    torch.testing.assert_close(fused.movedim(-2, 1), unfused)


def test_whole_axis_is_sdpa():
    q, k, v = (randn(2, 9, 4, 8) for _ in range(3))
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    for causal in (False, True):
        want = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal)
        torch.testing.assert_close(F.na1d(q, k, v, 9, is_causal=causal).transpose(1, 2), want)
        torch.testing.assert_close(natten.attention(q, k, v, causal).transpose(1, 2), want)


@pytest.mark.parametrize(("length", "kv_length"), [(5, 5), (3, 7), (7, 3), (1, 4), (4, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_own_key_length(length, kv_length, causal):
    q, k, v = randn(2, length, 4, 6), randn(2, kv_length, 2, 6), randn(2, kv_length, 2, 5)
    expanded = (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in expanded), is_causal=causal, scale=0.3
    ).transpose(1, 2)
    torch.testing.assert_close(natten.attention(q, k, v, causal, 0.3), want)
    assert torch.autograd.gradcheck(
        lambda *x: natten.attention(*x, is_causal=causal, return_lse=True), (q, k, v)
    )


def test_attention_takes_no_mask_and_no_dropout():
    q = randn(1, 4, 1, 3)
    assert torch.equal(
        natten.attention(q, q, q, attn_mask=None, dropout_p=0.0), natten.attention(q, q, q)
    )
    for more in (dict(attn_mask=torch.ones(4, 4, dtype=bool)), dict(dropout_p=0.1)):
        with pytest.raises(NotImplementedError, match="takes no mask and no dropout"):
            natten.attention(q, q, q, **more)


@pytest.mark.parametrize("bad", [None, 3, [1.0], "x"])
def test_arguments_that_are_no_tensors(bad):
    q = randn(1, 6, 1, 2)
    with pytest.raises(TypeError, match=r"^query: got .*must be a torch.Tensor"):
        F.na1d(bad, q, q, 3)
    with pytest.raises(TypeError, match=r"^key: got .*must be a torch.Tensor"):
        natten.attention(q, bad, q)
    if bad is not None:
        with pytest.raises(TypeError, match=r"^additional_keys: got .*must be a torch.Tensor"):
            F.na1d_qk(*[q.movedim(2, 1)] * 2, 3, additional_keys=bad)


def test_attention_without_queries_or_batch():
    k = v = randn(2, 4, 1, 3)
    assert natten.attention(randn(2, 0, 1, 3), k, v).shape == (2, 0, 1, 3)
    out, lse = natten.attention(randn(0, 5, 1, 3), k[:0], v[:0], return_lse=True)
    assert out.shape == (0, 5, 1, 3)
    assert lse.shape == (0, 5, 1)


def test_merge_attentions_is_exact():
    q = randn(2, 6, 4, 5)
    parts = [(randn(2, n, 2, 5), randn(2, n, 2, 3)) for n in (4, 1, 7)]

    def merged(q, *flat):
        results = [
            natten.attention(q, k, v, return_lse=True)
            for k, v in zip(flat[::2], flat[1::2], strict=True)
        ]
        return natten.merge_attentions([o for o, _ in results], [lse for _, lse in results])

    flat = [x for part in parts for x in part]
    keys, values = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    want = natten.attention(q, keys, values, return_lse=True)
    torch.testing.assert_close(merged(q, *flat), want)
    got = torch.autograd.grad([x.sin().sum() for x in merged(q, *flat)], [q, *flat])
    expected = torch.autograd.grad([x.sin().sum() for x in want], [q, *flat])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_merge_attentions_of_special_values():
    def tensors(arrays, requires_grad=False):
        return [torch.tensor(x, requires_grad=requires_grad) for x in arrays]

    def gradients(outputs, lses):
        inputs = tensors(outputs, True), tensors(lses, True)
        output, lse = natten.merge_attentions(*inputs)
        (output.sum() + lse.sum()).backward()
        return [[x.grad for x in xs] for xs in inputs]

    def merge(outputs, lses):
        return natten.merge_attentions(tensors(outputs), tensors(lses))

    cases.check_merges(merge, gradients)


@pytest.mark.parametrize("backend", [None, "naive"])
def test_queries_that_see_nothing(backend):
    """Scores are -inf in head 0: output 0, logsumexp -inf, no gradients in any mode."""
    q, k, v = (randn(1, 7, 2, 3) for _ in range(3))
    rpb = randn(2, 5, grad=False)
    rpb[0] = -torch.inf
    rpb.requires_grad_()

    def function(*inputs):
        *x, rpb = inputs
        return natten.na1d(*x, kernel_size=3, rpb=rpb, return_lse=True, backend=backend)

    output, lse = function(q, k, v, rpb)
    assert (output[:, :, 0] == 0).all() and torch.isneginf(lse[:, :, 0]).all()
    inputs = (q, k, v, rpb)
    first = torch.autograd.grad(output.sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), inputs)
    for grad in (*first, *second):
        assert ((grad[0] if grad.ndim == 2 else grad[:, :, 0]) == 0).all()
        assert torch.isfinite(grad).all()
    tangents = tuple(torch.ones_like(x) for x in inputs)
    primal, tangent = torch.func.jvp(function, inputs, tangents)
    for x in (tangent[0], primal[0]):
        assert (x[:, :, 0] == 0).all() and torch.isfinite(x).all()


def test_merge_attentions_refuses():
    out, lse = torch.ones(1, 2, 3), torch.ones(1, 2)
    with pytest.raises(ValueError, match="at least one"):
        natten.merge_attentions([], [])
    with pytest.raises(ValueError, match="2 and 1"):
        natten.merge_attentions([out, out], [lse])
    with pytest.raises(ValueError, match=r"lse_tensors: got shape \[2\]"):
        natten.merge_attentions([out], [lse[0]])
    with pytest.raises(TypeError, match="outputs: got dtypes"):
        natten.merge_attentions([out, out.double()], [lse, lse])


def test_layouts_are_read_right():
    """Any strides, negative views and zero tensors give what dense copies give."""
    base = randn(4, 8, 6, 2, 5, grad=False)
    want = F.na2d(*(base[i].contiguous()[None] for i in range(3)), kernel_size=3)
    channels_last = base.movedim(-1, 0).contiguous().movedim(0, -1)  # innermost stride is not 1
    torch.testing.assert_close(F.na2d(*channels_last[:3, None], kernel_size=3), want)
    expanded = base[:, :1, :1].expand(4, 8, 6, 2, 5)
    dense = F.na2d(*expanded[:3, None].contiguous(), kernel_size=3)
    torch.testing.assert_close(F.na2d(*expanded[:3, None], kernel_size=3), dense)
    negative = torch._neg_view(base)
    dense = F.na2d(*(-base)[:3, None], kernel_size=3)
    torch.testing.assert_close(F.na2d(*negative[:3, None], kernel_size=3), dense)
    zeros = torch._efficientzerotensor((1, 8, 6, 2, 5), dtype=torch.float64)
    torch.testing.assert_close(F.na2d(zeros, base[:1], base[1:2], 3), F.na2d(
        torch.zeros_like(base[:1]), base[:1], base[1:2], 3))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_memory_between_elements_is_copied(dtype):
    """As of views of files and of bytes."""

    def shifted(x):
        memory = bytearray(x.numel() * x.element_size() + 1)
        y = torch.frombuffer(memory, dtype=dtype, count=x.numel(), offset=1).view(x.shape).copy_(x)
        assert y.data_ptr() % y.element_size()
        return y

    q, k, v, grad = (torch.randn(1, 7, 2, 4).to(dtype) for _ in range(4))
    inputs = [shifted(x).requires_grad_() for x in (q, k, v)]
    others = [x.clone().requires_grad_() for x in (q, k, v)]
    got, want = (F.na1d(*x, kernel_size=3, dilation=2) for x in (inputs, others))
    assert torch.equal(got, want)
    for x, y in zip(
        torch.autograd.grad(got, inputs, shifted(grad)),
        torch.autograd.grad(want, others, grad),
        strict=True,
    ):
        assert torch.equal(x, y)
    with pytest.raises(ValueError, match="kernel_size: got"):
        F.na1d(*inputs, kernel_size=8)


@pytest.mark.parametrize("backend", ["vectorized", "naive", "composed"])
def test_cut_windows_that_no_memory_holds(backend):
    q, k, v, *_ = fused_inputs(1)
    window = dict(kernel_size=2**40, boundary="cut", backend=backend)
    got, want = F.na1d(q, k, v, **window), F.attention(q, k, v)
    torch.testing.assert_close(got, want)
    for x, y in zip(*(torch.autograd.grad(o.sum(), (q, k, v)) for o in (got, want)), strict=True):
        torch.testing.assert_close(x, y)


def test_only_wanted_gradients():
    q, k, v, *_ = fused_inputs(1)
    for wanted in ([q], [k], [v], [q, v]):
        some = torch.autograd.grad(F.na1d(q, k, v, 3).sum(), wanted)
        every = torch.autograd.grad(F.na1d(q, k, v, 3).sum(), [q, k, v])
        for w, s in zip(wanted, some, strict=True):
            index = next(i for i, x in enumerate((q, k, v)) if x is w)
            assert torch.equal(s, every[index])


def test_gradient_through_logsumexp_alone():
    q, k, v, *_ = fused_inputs(1)
    (grad,) = torch.autograd.grad(F.na1d(q, k, v, 3, return_lse=True)[1].sum(), q)
    assert grad.abs().sum() > 0


def test_misspelt_is_causal():
    q = randn(1, 6, 1, 2)
    with pytest.warns(UserWarning, match="is_causal"):
        out = F.na1d(q, q, q, 3, is_casual=True)
    assert torch.equal(out, F.na1d(q, q, q, 3, is_causal=True))
    x = q.movedim(2, 1)
    with pytest.warns(UserWarning, match="is_causal"):
        attn = F.na1d_qk(x, x, 3, is_casual=True)
    assert torch.equal(attn, F.na1d_qk(x, x, 3, is_causal=True))
    for is_causal in (True, (True,), (False,)):
        with pytest.raises(TypeError, match=r"^is_casual: got False beside is_causal"):
            F.na1d(q, q, q, 3, is_causal=is_causal, is_casual=False)


def test_backend_argument():
    q = randn(1, 6, 1, 2)
    assert torch.equal(F.na1d(q, q, q, 3, backend="naive"), F.na1d(q, q, q, 3, backend="naive"))
    with pytest.raises(ValueError, match=r'backend: got "nonsense"; must be one of .*naive'):
        F.na1d(q, q, q, 3, backend="nonsense")


def test_nan_reaches_only_those_who_see_it():
    q, k, v = (randn(1, 12, 1, 4, grad=False) for _ in range(3))
    k[0, 6] = torch.nan
    out = F.na1d(q, k, v, 3, backend="naive")
    assert out.isnan().any(-1).flatten().nonzero().flatten().tolist() == [5, 6, 7]


LARGE = {
    "rank 1": dict(shape=(96,), kernel_size=(31,)),
    "rank 2": dict(shape=(10, 9), kernel_size=(5, 4)),
    "causal": dict(shape=(10, 9), kernel_size=(5, 4), is_causal=(True, False)),
    "general": dict(shape=(96,), kernel_size=(96,)),
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("backend", ["vectorized", "naive"])
def test_gradients_of_large_scores(backend, name, capsys):
    """Where one key has the whole weight of most queries, differences of nearly equal numbers are
    all that is left: as well as in dense attention in float32."""
    case = {"is_causal": (False,) * len(LARGE[name]["shape"]), **LARGE[name]}
    shape, rank = case.pop("shape"), len(case["kernel_size"])
    grid = oracle.Grid(
        SimpleNamespace(shape=shape, **case, stride=(1,) * rank, dilation=(1,) * rank)
    )
    seen = torch.from_numpy(grid.seen)

    def dense(q, k, v):
        q, k, v = (x.flatten(1, rank).transpose(1, 2) for x in (q, k, v))
        scores = (q @ k.transpose(-1, -2)).masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).unflatten(1, shape)

    def ours(*tensors):
        if name == "general":
            return F.attention(*tensors, scale=1.0, backend=backend)
        return FUSED[rank](*tensors, **case, scale=1.0, backend=backend)

    def gradients(function, inputs, incoming, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*inputs), inputs[:2], incoming.to(dtype))

    for size in (1, 10, 100, 1e3, 1e4):
        q, k, v, g = torch.randn(4, 2, *shape, 2, 16, generator=torch.manual_seed(3))
        q *= size / 16**0.5  # the standard deviation of scores
        line = k.flatten(1, rank)
        line[:, 1::4] = (
            line[:, ::4][:, : line[:, 1::4].shape[1]] + line[:, 1::4] / size
        )  # close keys
        k = line.unflatten(1, shape)
        exact = gradients(dense, (q, k, v), g, torch.float64)
        errors = [
            [((a - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True)]
            for got in (gradients(f, (q, k, v), g, torch.float32) for f in (ours, dense))
        ]
        ratios = [a / b for a, b in zip(*errors, strict=True)]
        with capsys.disabled():
            print(f"\nscores of {size:g}, {name}, {backend}: {ratios} times the error of dense")
        assert max(ratios) <= 10, (size, errors)


# ---- refusals ----


def refusal_cases():
    q = randn(1, 6, 6, 4, 3, grad=False)
    k = v = randn(1, 6, 6, 2, 3, grad=False)
    extra = randn(1, 2, 2, 3, grad=False)

    def na(q=q, k=k, v=v, kernel_size=3, **more):
        return lambda: F.na2d(q, k, v, kernel_size, **more)

    yield "rank", ValueError, "query", na(q[0], k[0], v[0])
    yield "rank of query", ValueError, "query", na(q=q[..., 0])
    for name, one in dict(kernel_size=1, dilation=1, stride=1, is_causal=True).items():
        for bad in ((one,), (one, one, one), ()):
            yield f"length of {name}", ValueError, name, na(**{name: bad})
    for name in ("q_tile_shape", "kv_tile_shape", "backward_q_tile_shape",
                 "backward_kv_tile_shape", "backward_kv_splits"):  # fmt: skip
        yield f"length of {name}", ValueError, name, na(**{name: (4, 4, 4)})
        yield f"value of {name}", ValueError, name, na(**{name: (4, 0)})
    for name in ("kernel_size", "dilation", "stride"):
        yield f"{name} of 0", ValueError, name, na(**{name: (1, 0)})
        yield f"negative {name}", ValueError, name, na(**{name: -1})
        yield f"{name} not an integer", TypeError, name, na(**{name: 1.5})
        yield f"{name} a string", TypeError, name, na(**{name: "3"})
    yield "stride beyond kernel", ValueError, "stride", na(stride=4)
    yield "window beyond axis", ValueError, "kernel_size", na(kernel_size=7)
    yield "dilated window beyond axis", ValueError, "kernel_size", na(dilation=(1, 3))
    yield "heads that do not divide", ValueError, "key", na(q=q[:, :, :, :3])
    yield "value heads", ValueError, "value", na(v=v[:, :, :, :1])
    yield "batch", ValueError, "key", na(k=k.expand(2, 6, 6, 2, 3))
    yield "spatial shape", ValueError, "value", na(v=v[:, :5])
    yield "head dim", ValueError, "key", na(k=k[..., :2])
    yield "empty head dim", ValueError, "query", na(q=q[..., :0])
    yield "no heads", ValueError, "query", na(q=q[:, :, :, :0])
    yield "empty axis", ValueError, "query", na(q=q[:, :0], k=k[:, :0], v=v[:, :0])
    yield "mixed dtypes", TypeError, "key", na(k=k.float())
    for dtype in (torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64):
        bad = [x.to(dtype) for x in (q, k, v)]
        yield f"{dtype}", TypeError, "query", na(*bad)
    for scale in (float("nan"), float("inf"), -float("inf")):
        yield f"scale {scale}", ValueError, "scale", na(scale=scale)
    yield "scale a string", TypeError, "scale", na(scale="x")
    for shape in ((4, 5), (4, 5, 4), (2, 5, 5), (4, 5, 5, 1)):
        yield f"rpb {shape}", ValueError, "rpb", na(rpb=randn(*shape, grad=False))
    yield "rpb dtype", TypeError, "rpb", na(rpb=torch.zeros(4, 5, 5))
    yield "keys alone", ValueError, "additional_values", na(additional_keys=extra)
    yield "values alone", ValueError, "additional_keys", na(additional_values=extra)
    yield "additional counts", ValueError, "additional_values", na(
        additional_keys=extra, additional_values=extra[:, :1])  # fmt: skip
    yield "additional heads", ValueError, "additional_keys", na(
        additional_keys=extra[:, :, :1], additional_values=extra)  # fmt: skip

    x = q.movedim(-2, 1)
    attn = randn(1, 4, 6, 6, 9, grad=False)
    yield "qk heads", ValueError, "key", lambda: F.na2d_qk(x, x[:, :2], 3)
    yield "qk rpb", ValueError, "rpb", lambda: F.na2d_qk(x, x, 3, rpb=randn(4, 3, 3))
    yield "qk additional", ValueError, "additional_keys", lambda: F.na2d_qk(
        x, x, 3, additional_keys=extra)  # fmt: skip
    yield "qk stride", ValueError, "stride", lambda: F.na2d_qk(x, x, 3, stride=5)
    yield "av slots", ValueError, "attn", lambda: F.na2d_av(attn[..., :8], x, 3)
    yield "av additional slots", ValueError, "attn", lambda: F.na2d_av(
        attn, x, 3, additional_values=randn(1, 4, 2, 3))  # fmt: skip
    yield "av grid", ValueError, "value", lambda: F.na2d_av(attn, x[:, :, :5], 3)
    yield "av dtype", TypeError, "value", lambda: F.na2d_av(attn, x.float(), 3)
    yield "attention dims", ValueError, "query", lambda: natten.attention(q, q[0], q[0])
    yield "attention key dims", ValueError, "key", lambda: natten.attention(q[0], q, q)
    yield "attention no keys", ValueError, "key", lambda: natten.attention(
        q[0], k[0, :, :0], v[0, :, :0])  # fmt: skip
    yield "attention value length", ValueError, "value", lambda: natten.attention(
        q[0], k[0], v[0, :, :3])  # fmt: skip


@pytest.mark.parametrize(
    ("error", "argument", "call"),
    [pytest.param(*rest, id=name) for name, *rest in refusal_cases()],
)
def test_refusal(error, argument, call):
    with pytest.raises(error, match=rf"^{argument}: ") as raised:
        call()
    assert len(str(raised.value)) > len(argument) + 10  # says more than the name
    q = randn(1, 4, 1, 2)
    assert F.na1d(q, q, q, 3).isfinite().all()  # the library stays usable


def test_meta_tensors_give_shapes():
    q = torch.empty(1, 6, 1, 2, device="meta")
    assert F.na1d(q, q, q, 3).shape == q.shape
    with pytest.raises(ValueError, match=r"^kernel_size: "):
        F.na1d(q, q, q, 7)


def test_mixed_devices_are_refused():
    q = torch.randn(1, 6, 1, 2)
    with pytest.raises(ValueError, match=r"^key: is on meta; must be on the device of query, cpu"):
        F.na1d(q, q.to("meta"), q, 3)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("bad", [dict(kernel_size=0), dict(dilation=0), dict(stride=4)])
@pytest.mark.parametrize("bias", [False, True])
def test_modules_refuse_impossible_neighborhoods(rank, bad, bias):
    (name,) = bad
    with pytest.raises(ValueError, match=rf"^{name}: "):
        MODULES[rank](8, 2, **{"kernel_size": 3, "rel_pos_bias": bias, **bad})


def test_device_without_kernels():
    if not torch.cuda.is_available() or natten.has_cuda():
        pytest.skip(
            "needs a CUDA device and no kernels for it; test_torch_composed.py needs neither"
        )
    qkv = torch.randn(3, 1, 6, 1, 2)
    torch.testing.assert_close(F.na1d(*qkv.cuda(), 3).cpu(), F.na1d(*qkv, 3))
    with pytest.raises(ValueError, match="NATTEN_WITH_CUDA=ON"):
        F.na1d(*qkv.cuda(), 3, backend="simt")


# ---- modules ----


@pytest.fixture
def fused_on():
    natten.use_fused_na()
    yield
    natten.use_fused_na(False)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_module_fused_and_unfused_agree(rank, bias):
    module = MODULES[rank](8, 2, rel_pos_bias=bias, **MIXED[rank]).double()
    x = randn(2, *GRIDS[rank], 8)
    results = []
    for fused in (False, True):
        natten.use_fused_na(fused)
        try:
            out = module(x)
        finally:
            natten.use_fused_na(False)
        grads = torch.autograd.grad(out.sin().sum(), [x, *module.parameters()])
        results.append([out, *grads])
    assert results[0][0].shape == x.shape
    for unfused, fused in zip(*results, strict=True):
        torch.testing.assert_close(unfused, fused)


def test_module_is_what_it_says():
    """The module's result from its parameters and the fused function."""
    module = natten.NeighborhoodAttention2D(6, 3, (3, 2), rel_pos_bias=True, qk_scale=0.2).double()
    assert set(module.state_dict()) == {"qkv.weight", "qkv.bias", "rpb", "proj.weight", "proj.bias"}
    assert module.rpb.shape == (3, 5, 3)
    x = randn(1, 4, 5, 6)
    q, k, v = (y.unflatten(-1, (3, 2)) for y in module.qkv(x).chunk(3, -1))
    out = F.na2d(q, k, v, (3, 2), rpb=module.rpb, scale=0.2).flatten(-2)
    torch.testing.assert_close(module(x), module.proj(out))


def test_module_options():
    module = natten.NeighborhoodAttention1D(8, 2, 3, qkv_bias=False)
    assert "qkv.bias" not in module.state_dict() and module.rpb is None
    assert "rpb" not in module.state_dict()
    assert "kernel_size=(3,)" in repr(module)
    with pytest.raises(ValueError, match="num_heads: got 3; must divide dim, 8"):
        natten.NeighborhoodAttention1D(8, 3, 3)
    with pytest.raises(ValueError, match=r"x: got shape \[4, 8\]"):
        module(torch.zeros(4, 8))
    with pytest.raises(ValueError, match="kernel_size"):
        natten.NeighborhoodAttention2D(8, 2, (3, 3, 3))


def test_module_dropout(fused_on, caplog):
    module = natten.NeighborhoodAttention1D(8, 2, 3, attn_drop=0.5)
    x = torch.randn(1, 9, 8)
    with caplog.at_level(logging.INFO, "natten"):
        assert not torch.equal(module(x), module(x))  # dropout acts although fused is on
    assert "attention dropout" in caplog.text
    module.eval()
    assert torch.equal(module(x), module(x))


def test_module_copies_and_pickles():
    module = natten.NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True)
    x = torch.randn(1, 4, 4, 8)
    want = module(x)
    assert torch.equal(copy.deepcopy(module)(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), want)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    fresh = natten.NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True)
    fresh.load_state_dict(torch.load(buffer))
    assert torch.equal(fresh(x), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_module_dtypes(dtype):
    module = natten.NeighborhoodAttention1D(8, 2, 3, rel_pos_bias=True).to(dtype)
    out = module(torch.randn(2, 6, 8, dtype=dtype))
    assert out.dtype == dtype and out.isfinite().all()
    out.sum().backward()
    assert module.rpb.grad.dtype == dtype


def test_module_trains():
    """A module learns to copy the token to the left, which a wrong gradient would prevent."""
    module = natten.NeighborhoodAttention1D(8, 1, 3, rel_pos_bias=True)
    optimizer = torch.optim.Adam(module.parameters(), 0.03)
    first = last = None
    for _ in range(300):
        x = torch.randn(8, 10, 8)
        loss = (module(x)[:, 1:] - x[:, :-1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = first or loss.item(), loss.item()
    assert last < 0.3 * first


def test_runs_on_the_threads_of_torch():
    """Starts none of its own, follows torch.set_num_threads; any number gives the same bits."""
    code = """
import os, torch, natten.functional as F
def threads(): return len(os.listdir("/proc/self/task"))
torch.manual_seed(0)
x, y = torch.randn(1, 32, 32, 4, 32), torch.randn(512, 512)
torch.set_num_threads(1)
before = threads()
one = F.na2d(x, x, x, 7)
assert threads() == before, "one thread was asked for"
torch.set_num_threads(3)
y @ y
y.exp()  # has started PyTorch's threads
before = threads()
assert torch.equal(F.na2d(x, x, x, 7), one)
assert threads() == before, f"{threads() - before} more threads"
"""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("needs /proc")
    run_python(code)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_works_in_forked_children():
    """There OpenMP's threads are missing."""
    code = """
import os, sys, torch, natten.functional as F
torch.set_num_threads(2)
x = torch.randn(1, 32, 32, 4, 32)
want = F.na2d(x, x, x, 7)
pid = os.fork()
if pid == 0:
    os._exit(0 if (F.na2d(x, x, x, 7).numpy() == want.numpy()).all() else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    run_python(code)
