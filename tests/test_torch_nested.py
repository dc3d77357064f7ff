"""Nested tensors: examples of different sizes in one call."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from torch_cases import AV, FUSED, QK  # noqa: E402

import natten  # noqa: E402
import natten.functional as F  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

GRIDS = {
    1: [(14,), (9,), (32,)],
    2: [(7, 9), (12, 5), (6, 6)],
    3: [(5, 6, 7), (8, 5, 5), (5, 9, 6)],
}
NEIGHBORHOOD = dict(kernel_size=5, is_causal=True, stride=2)
LAYOUTS = pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
RANKS = pytest.mark.parametrize("rank", [1, 2, 3])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    natten.use_fused_na(False)


def nested(parts, layout=torch.strided, like=None):
    """`like`: a jagged tensor whose lengths these examples share."""
    if layout == torch.jagged and like is not None:
        return torch.nested.nested_tensor_from_jagged(torch.cat(parts), like.offsets())
    return torch.nested.as_nested_tensor(parts, layout=layout)


def examples(rank, *shape, before=()):
    return [torch.randn(*before, *grid, *shape, dtype=torch.float64) for grid in GRIDS[rank]]


def assert_parts(got, want):
    assert got.is_nested
    for g, w in zip(got.unbind(), want, strict=True):
        assert torch.equal(g, w)


def layouts_of(rank):
    return (torch.strided, torch.jagged) if rank == 1 else (torch.strided,)


CASES = [(rank, layout) for rank in (1, 2, 3) for layout in layouts_of(rank)]


@pytest.mark.parametrize(("rank", "layout"), CASES)
@pytest.mark.parametrize("additional", [None, "nested", "dense"])
def test_fused(rank, layout, additional):
    q, k, v = examples(rank, 4, 6), examples(rank, 2, 6), examples(rank, 2, 3)
    rpb = torch.randn(4, *(9,) * rank, dtype=torch.float64)
    lengths = (1, 3, 2) if additional == "nested" else (2, 2, 2)
    extra = [[torch.randn(n, 2, d, dtype=torch.float64) for n in lengths] for d in (6, 3)]
    whole = {"nested": lambda x: nested(x, layout), "dense": torch.stack}.get(additional)
    query = nested(q, layout)
    keys, values = nested(k, layout, like=query), nested(v, layout, like=query)
    more = {} if whole is None else dict(zip(EXTRA, map(whole, extra), strict=True))
    output, lse = FUSED[rank](query, keys, values, rpb=rpb, return_lse=True, **NEIGHBORHOOD, **more)
    want = [
        FUSED[rank](
            *(x[i][None] for x in (q, k, v)), rpb=rpb, return_lse=True, **NEIGHBORHOOD,
            **{name: x[i][None] for name, x in zip(EXTRA, extra, strict=True) if more},
        )
        for i in range(3)
    ]  # fmt: skip
    assert output.layout == lse.layout == layout
    assert_parts(output, [o[0] for o, _ in want])
    assert_parts(lse, [x[0] for _, x in want])


EXTRA = ("additional_keys", "additional_values")


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("gradients", [False, True])
def test_another_default_device(layout, gradients):
    parts = [torch.randn(n, 2, 4) for n in (5, 7)]
    query = nested(parts, layout).requires_grad_(gradients)
    with torch.device("meta"), torch.set_grad_enabled(gradients):
        output, lse = FUSED[1](query, query, query, 3, return_lse=True)
    want = [FUSED[1](x[None], x[None], x[None], 3, return_lse=True) for x in parts]
    assert_parts(output, [o[0] for o, _ in want])
    assert_parts(lse, [x[0] for _, x in want])


@pytest.mark.parametrize(("rank", "layout"), CASES)
def test_unfused(rank, layout):
    if layout == torch.jagged:  # heads-first views of heads-last sequences, as a module makes them
        base = nested(examples(1, 2, 6), layout)
        query, value = base.transpose(1, 2), (2 * base).transpose(1, 2)
    else:
        query, value = (nested(examples(rank, 6, before=(2,))) for _ in range(2))
    attn = QK[rank](query, query, **NEIGHBORHOOD)
    want = [QK[rank](q[None], q[None], **NEIGHBORHOOD)[0] for q in query.unbind()]
    assert_parts(attn, want)
    weights = nested([w.softmax(-1) for w in want]) if layout == torch.strided else attn.softmax(-1)
    output = AV[rank](weights, value, **NEIGHBORHOOD)
    want = [
        AV[rank](w.softmax(-1)[None], v[None], **NEIGHBORHOOD)[0]
        for w, v in zip(want, value.unbind(), strict=True)
    ]
    for g, w in zip(output.unbind(), want, strict=True):
        torch.testing.assert_close(g, w)


def masks_of(rank, before=()):
    """Every third key is hidden, and all of the last example."""
    masks = [(torch.arange(math.prod(grid)) % 3 > 0).view(*before, *grid) for grid in GRIDS[rank]]
    masks[-1] = torch.zeros_like(masks[-1])
    return masks


@pytest.mark.parametrize(("rank", "layout"), CASES)
@pytest.mark.parametrize("boundary", ["shift", "cut"])
def test_masks(rank, layout, boundary):
    options = dict(NEIGHBORHOOD, boundary=boundary)
    q, masks = examples(rank, 2, 6), masks_of(rank)
    query = nested(q, layout)
    mask = nested(masks, layout, like=query)
    output, lse = FUSED[rank](query, query, query, key_mask=mask, return_lse=True, **options)
    want = [
        FUSED[rank](*[x[None]] * 3, key_mask=m[None], return_lse=True, **options)
        for x, m in zip(q, masks, strict=True)
    ]
    assert_parts(output, [o[0] for o, _ in want])
    assert_parts(lse, [x[0] for _, x in want])
    assert not output.unbind()[-1].any()

    if layout == torch.jagged:
        heads_first = query.transpose(1, 2)
    else:
        heads_first = nested([x.movedim(-2, 0).contiguous() for x in q])
    attn = QK[rank](heads_first, heads_first, key_mask=mask, **options)
    out = AV[rank](attn, heads_first, key_mask=mask, **options)
    for got, weights, x, m in zip(out.unbind(), attn.unbind(), q, masks, strict=True):
        x, more = x.movedim(-2, 0)[None], dict(options, key_mask=m[None])
        want = QK[rank](x, x, **more)
        assert torch.equal(weights, want[0])
        torch.testing.assert_close(got, AV[rank](want, x, **more)[0])


def test_masks_of_examples_with_a_batch_of_their_own():
    q = [torch.randn(2, 5, 6, 2, 4), torch.randn(3, 7, 5, 1, 2)]
    masks = [torch.rand(2, 5, 6) < 0.5, torch.rand(1, 7, 5) < 0.5]
    query, mask = nested(q), nested(masks)
    output = F.na2d(query, query, query, 3, key_mask=mask)
    want = [F.na2d(x, x, x, 3, key_mask=m) for x, m in zip(q, masks, strict=True)]
    assert_parts(output, want)


@RANKS
def test_examples_with_a_batch_of_their_own(rank):
    """They may also differ in batch, heads and head dim."""
    sizes = [(2, 3, 4), (1, 1, 6), (4, 2, 5)]
    q = [
        torch.randn(batch, *grid, heads, dim)
        for grid, (batch, heads, dim) in zip(GRIDS[rank], sizes, strict=True)
    ]
    extra = [torch.randn(b, n, h, d) for n, (b, h, d) in enumerate(sizes, 1)]
    query, more = nested(q), nested(extra)
    output = FUSED[rank](query, query, query, 3, additional_keys=more, additional_values=more)
    assert_parts(
        output,
        [
            FUSED[rank](x, x, x, 3, additional_keys=e, additional_values=e)
            for x, e in zip(q, extra, strict=True)
        ],
    )


@pytest.mark.parametrize("fused", [False, True])
@LAYOUTS
def test_module(fused, layout):
    natten.use_fused_na(fused)
    module = natten.NeighborhoodAttention1D(8, 2, 5, rel_pos_bias=True, is_causal=True).double()
    x = [torch.randn(n, 8, dtype=torch.float64) for n in (14, 9, 32)]
    output = module(nested(x, layout))
    assert output.layout == layout
    for got, example in zip(output.unbind(), x, strict=True):
        torch.testing.assert_close(got, module(example[None])[0])


@pytest.mark.parametrize("fused", [False, True])
@LAYOUTS
def test_module_with_a_mask(fused, layout):
    natten.use_fused_na(fused)
    module = natten.NeighborhoodAttention1D(8, 2, 5, rel_pos_bias=True, boundary="cut").double()
    x = [torch.randn(n, 8, dtype=torch.float64) for n in (14, 3, 32)]
    masks = [torch.arange(len(example)) % 3 > 0 for example in x]
    masks[-1][:] = False
    whole = nested(x, layout)
    output = module(whole, nested(masks, layout, like=whole))
    assert output.layout == layout
    for got, example, mask in zip(output.unbind(), x, masks, strict=True):
        torch.testing.assert_close(got, module(example[None], mask[None])[0])
    with pytest.raises(ValueError, match=r"^key_mask: got a dense tensor; must be nested"):
        module(whole, torch.ones(3, 32, dtype=torch.bool))


@pytest.mark.parametrize("fused", [False, True])
def test_module_under_autocast(fused):
    natten.use_fused_na(fused)
    module = natten.NeighborhoodAttention1D(8, 2, 5, rel_pos_bias=True)
    x = [torch.randn(n, 8) for n in (14, 9)]
    with torch.autocast("cpu", torch.bfloat16):
        output = module(nested(x, torch.jagged))
        want = [module(example[None])[0] for example in x]
    assert output.dtype == torch.bfloat16
    for got, w in zip(output.unbind(), want, strict=True):
        torch.testing.assert_close(got, w)


@LAYOUTS
@pytest.mark.parametrize("causal", [False, True])
def test_attention(layout, causal):
    """Every example attends to keys of its own number."""
    q = [torch.randn(n, 4, 6, dtype=torch.float64) for n in (5, 1, 9)]
    k, v = ([torch.randn(n, 2, d, dtype=torch.float64) for n in (3, 8, 2)] for d in (6, 5))
    query, key = nested(q, layout), nested(k, layout)
    output = natten.attention(query, key, nested(v, layout, like=key), causal, scale=0.3)
    assert output.layout == layout
    want = [natten.attention(*(x[i][None] for x in (q, k, v)), causal, 0.3)[0] for i in range(3)]
    assert_parts(output, want)


def loss_of(examples):
    """A sum of all of them that weighs each element differently."""
    weights = (torch.arange(1.0, x.numel() + 1, dtype=x.dtype).view_as(x).sin() for x in examples)
    return sum((x.masked_fill(x.isinf(), 0) * w).sum() for x, w in zip(examples, weights))  # noqa: B905


def assert_gradients(got, want, leaves, parts):
    """Of losses, with respect to nested or dense leaves and to lists of their examples."""
    got = torch.autograd.grad(loss_of(got), leaves)
    want = torch.autograd.grad(loss_of(want), [x for part in parts for x in part])
    for x, part in zip(got, parts, strict=True):
        of_part, want = want[: len(part)], want[len(part) :]
        assert x.is_nested == (len(part) > 1)
        for a, b in zip(x.unbind() if x.is_nested else [x], of_part, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def leaf(parts, layout, like=None):
    whole = nested([x.detach() for x in parts], layout, like)
    return whole.requires_grad_()


def required(parts):
    return [x.requires_grad_() for x in parts]


@pytest.mark.parametrize(("rank", "layout"), CASES)
@pytest.mark.parametrize("masked", [False, True])
@torch.enable_grad()
def test_gradients_of_fused(rank, layout, masked):
    options = dict(NEIGHBORHOOD, return_lse=True)
    q, k, v = (required(examples(rank, *s)) for s in ((4, 6), (2, 6), (2, 3)))
    rpb = torch.randn(4, *(9,) * rank, dtype=torch.float64, requires_grad=True)
    query = leaf(q, layout)
    key, value = leaf(k, layout, query), leaf(v, layout, query)
    masks = masks_of(rank) if masked else [None] * 3
    mask = nested(masks, layout, query) if masked else None
    output, lse = FUSED[rank](query, key, value, rpb=rpb, key_mask=mask, **options)
    assert output.layout == lse.layout == layout
    want = [
        FUSED[rank](
            *(x[i][None] for x in (q, k, v)), rpb=rpb, **options,
            key_mask=None if masks[i] is None else masks[i][None],
        )
        for i in range(3)
    ]  # fmt: skip
    assert_parts(output, [o[0] for o, _ in want])
    assert_gradients(
        [*output.unbind(), *lse.unbind()],
        [x[0] for xs in zip(*want, strict=True) for x in xs],
        (query, key, value, rpb),
        (q, k, v, [rpb]),
    )


@pytest.mark.parametrize(("rank", "layout"), CASES)
@torch.enable_grad()
def test_gradients_of_unfused(rank, layout):
    if layout == torch.jagged:
        q, v = (required(examples(1, 2, 6)) for _ in range(2))
        query = leaf(q, layout)
        value = leaf(v, layout, query)
        views = query.transpose(1, 2), value.transpose(1, 2)
        firsts = [[x.movedim(-2, 0)[None] for x in xs] for xs in (q, v)]
    else:
        q, v = (required(examples(rank, 6, before=(2,))) for _ in range(2))
        views = query, value = leaf(q, layout), leaf(v, layout)
        firsts = [[x[None] for x in xs] for xs in (q, v)]
    rpb = torch.randn(2, *(9,) * rank, dtype=torch.float64, requires_grad=True)
    attn = QK[rank](views[0], views[0], rpb=rpb, **NEIGHBORHOOD)
    output = AV[rank](attn, views[1], **NEIGHBORHOOD)
    wants = []
    for x, y in zip(*firsts, strict=True):
        scores = QK[rank](x, x, rpb=rpb, **NEIGHBORHOOD)
        wants += [AV[rank](scores, y, **NEIGHBORHOOD)[0]]
    assert_gradients(output.unbind(), wants, (query, value, rpb), (q, v, [rpb]))


@torch.enable_grad()
def test_second_derivatives():
    """Of the strided layout: PyTorch cannot differentiate `unbind` of the other twice."""
    q = required([torch.randn(n, 1, 2, dtype=torch.float64) for n in (3, 5)])

    def function(*parts):
        x = torch.nested.as_nested_tensor(list(parts))
        return tuple(F.na1d(x, x, x, 3).unbind())

    assert torch.autograd.gradcheck(function, q)
    assert torch.autograd.gradgradcheck(function, q)


@torch.enable_grad()
def test_gradients_of_narrowed_sequences():
    padded = torch.randn(3, 12, 2, 4, dtype=torch.float64, requires_grad=True)
    starts, lengths = torch.tensor([1, 2, 1]), torch.tensor([5, 10, 7])
    q = torch.nested.narrow(padded, 1, starts, lengths, layout=torch.jagged)
    output = F.na1d(q, q, q, 3)
    want = [
        F.na1d(*[padded[i, s : s + n][None]] * 3, 3)[0]
        for i, (s, n) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True))
    ]
    assert_parts(output, want)
    assert_gradients(output.unbind(), want, [padded], [[padded]])
    assert_parts(output + q, [a + b for a, b in zip(want, q.unbind(), strict=True)])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("rank", "layout"), CASES)
@torch.enable_grad()
def test_modules_and_their_gradients(rank, layout, masked, fused):
    natten.use_fused_na(fused)
    classes = (
        natten.NeighborhoodAttention1D,
        natten.NeighborhoodAttention2D,
        natten.NeighborhoodAttention3D,
    )
    module = classes[rank - 1](4, 2, 5, rel_pos_bias=True, is_causal=True).double()
    x = required(examples(rank, 4))
    whole = leaf(x, layout)
    masks = masks_of(rank) if masked else [None] * 3
    mask = nested(masks, layout, whole) if masked else None
    output = module(whole, mask)
    assert output.layout == layout
    want = [
        module(e[None], None if m is None else m[None])[0] for e, m in zip(x, masks, strict=True)
    ]
    for a, b in zip(output.unbind(), want, strict=True):
        torch.testing.assert_close(a, b)
    parameters = list(module.parameters())
    assert_gradients(output.unbind(), want, [whole, *parameters], [x, *([p] for p in parameters)])


def test_all_examples_run_in_one_call(monkeypatch):
    calls = []
    run_all = natten._core.run_all
    monkeypatch.setattr(natten._core, "run_all", lambda *a: (calls.append(len(a[4])), run_all(*a)))
    q = nested(examples(2, 2, 4))
    F.na2d(q, q, q, 3)
    assert calls == [3]


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@torch.enable_grad()
def test_sequences_with_gradients_are_one_call(monkeypatch, layout):
    calls = []
    run = natten._core.run
    monkeypatch.setattr(natten._core, "run", lambda *a: (calls.append(a[0]), run(*a))[1])
    x = leaf(examples(1, 2, 4), layout)
    rpb = torch.randn(2, 5, dtype=torch.float64)
    for function in (lambda: F.na1d(x, x, x, 3, rpb=rpb), lambda: natten.attention(x, x, x)):
        loss = sum(part.square().sum() for part in function().unbind())
        torch.autograd.grad(loss, x)
        assert calls == ["attention_forward", "attention_backward"]
        calls.clear()


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@torch.enable_grad()
def test_bad_sequences_with_gradients_are_refused(layout):
    x = leaf(examples(1, 2, 4), layout)
    with pytest.raises(ValueError, match=r"^kernel_size: .*must not exceed the axis, 9 tokens"):
        F.na1d(x, x, x, 10)
    other = leaf([part[:-1] for part in examples(1, 2, 4)], layout)
    with pytest.raises(ValueError, match=r"^key: .*spatial shape"):
        F.na1d(x, other, other, 3)
    with pytest.raises(ValueError, match=r"^value: got a dense tensor; must be nested"):
        F.na1d(x, x, torch.randn(3, 9, 2, 4, dtype=torch.float64), 3)


def test_narrowed_sequences():
    """Jagged tensors with gaps between the examples."""
    padded = torch.randn(3, 12, 2, 4)
    starts, lengths = torch.tensor([0, 2, 1]), torch.tensor([5, 10, 7])
    q = torch.nested.narrow(padded, 1, starts, lengths, layout=torch.jagged)
    want = [
        F.na1d(*[padded[i, s : s + n][None]] * 3, 3)[0]
        for i, (s, n) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True))
    ]
    assert_parts(F.na1d(q, q, q, 3), want)


def test_refusals():
    q = nested(examples(2, 2, 4))
    dense = torch.randn(3, 6, 6, 2, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^value: got a dense tensor; must be nested"):
        F.na2d(q, q, dense, 3)
    with pytest.raises(ValueError, match=r"^query: got a dense tensor; must be nested"):
        F.na2d(dense, q, q, 3)
    with pytest.raises(ValueError, match=r"^key: got 2 examples; must be 3"):
        F.na2d(q, nested(list(q.unbind()[:2])), q, 3)
    with pytest.raises(ValueError, match=r"^kernel_size: .*must not exceed the axis, 5 tokens"):
        F.na2d(q, q, q, 6)
    with pytest.raises(ValueError, match=r"^key: .*spatial shape"):
        F.na2d(q, nested(list(q.unbind()[::-1])), q, 3)
    with pytest.raises(ValueError, match=r"^rpb: got a nested tensor"):
        F.na2d(q, q, q, 3, rpb=nested([torch.randn(2, 5, 5)] * 3))
    with pytest.raises(ValueError, match=r"^key_mask: got a dense tensor; must be nested"):
        F.na2d(q, q, q, 3, key_mask=torch.ones(3, 6, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"^key_mask: got 2 examples; must be 3"):
        F.na2d(q, q, q, 3, key_mask=nested(masks_of(2)[:2]))
    with pytest.raises(ValueError, match=r"^key_mask: got shape .*spatial shape"):
        F.na2d(q, q, q, 3, key_mask=nested(masks_of(2)[::-1]))
    for name in ("query_offset", "key_offset", "grid_size"):
        with pytest.raises(ValueError, match=rf"^{name}: got \[3, 3\] for nested tensors"):
            F.na2d(q, q, q, 3, **{name: 3})
    with pytest.raises(ValueError, match=r"^query_offset: got \[0, 0\] for nested tensors"):
        F.na2d(q, q, q, 3, query_offset=0)
    with pytest.raises(ValueError, match="merge their values"):
        natten.merge_attentions([q], [q])
    with pytest.raises(ValueError, match="explain one of its examples"):
        natten.explain(q, q, q, 3)
    with pytest.raises(
        ValueError, match=r"^x: got shape \[5, 8\] for example 0; must be \[\*spatial"
    ):
        natten.NeighborhoodAttention2D(8, 2, 3)(nested([torch.randn(5, 8), torch.randn(6, 8)]))
    with pytest.raises(ValueError, match=r"^x: got shape \[6, 5, 7\] for example 1"):
        natten.NeighborhoodAttention2D(8, 2, 3)(
            nested([torch.randn(5, 5, 8), torch.randn(6, 5, 7)])
        )
