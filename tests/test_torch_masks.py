"""Masks of keys in PyTorch: what they hide has no part in anything, whatever it holds."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import cases
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from test_torch_random import run_fused, run_unfused  # noqa: E402
from torch_cases import (  # noqa: E402
    AV,
    FUSED,
    MODULES,
    QK,
    fused_attention,
    fused_inputs,
    key_mask_of,
    options_of,
    randn,
    unfused_attention,
)

import natten  # noqa: E402
import natten.functional as F  # noqa: E402

COUNTS = pytest.mark.parametrize("count", [30, cases.long_unless(False, 200)])
MAKE = pytest.mark.parametrize("make", [fused_attention, unfused_attention])
both_kinds = pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])


@pytest.fixture(autouse=True)
def _as_before():
    torch.manual_seed(0)
    yield
    natten.use_fused_na(False)


def masked_cases(count: int, seed: int) -> list[cases.Case]:
    rng = np.random.default_rng(seed)
    drawn = (case for case in map(cases.random_case, itertools.repeat(rng)) if case.batch)
    return [
        replace(case, mask_batch=case.batch if case.seed % 2 else 1)
        for case in itertools.islice(drawn, count)
    ]


# ---- what is hidden ----


def check_hidden(case: cases.Case, arrays: cases.Arrays, run: Any, axis: int) -> None:
    """The same bits whether hidden keys and values hold numbers, or NaN and infinity; they get
    gradients of 0."""
    hidden = arrays
    for name in ("key", "value"):
        hidden = cases.hide(hidden, name, axis)
    results, want = run(case, hidden), run(case, arrays)
    mask = np.broadcast_to(arrays["key_mask"], (case.batch, *case.keys_shape))
    for name, x in want.items():
        np.testing.assert_array_equal(results[name], x, f"{name} of {case}")
        assert not np.isnan(x).any(), f"{name} of {case}"
        if name in ("grad_key", "grad_value"):
            grid = range(axis, axis + case.rank)
            rows = np.moveaxis(x, list(grid), range(1, 1 + case.rank))
            assert (rows[~mask] == 0).all(), f"{name} of {case}"


@COUNTS
def test_hidden_keys_of_the_fused_operation(count):
    for case in masked_cases(count, cases.SEED + count):
        check_hidden(case, case.fused_arrays(), run_fused, 1)


@COUNTS
def test_hidden_keys_of_the_unfused_operations(count):
    for case in masked_cases(count, cases.SEED + 1 + count):
        for i in (0, 1):
            check_hidden(case, case.unfused_arrays(), lambda *x, i=i: run_unfused(*x)[i], 2)


def test_slots_of_hidden_keys():
    """-inf after qk; whatever they hold is ignored by av."""
    mask = torch.tensor([[True, False, True, True, False, False]])
    q, k, v = (torch.randn(2, 3, 6, 4, dtype=torch.float64) for _ in range(3))
    options: dict[str, Any] = dict(kernel_size=3, boundary="cut", key_mask=mask)
    attn = F.na1d_qk(q, k, **options)
    rows = ((-1, 0, 1), (0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (4, 5, 6))
    seen = torch.tensor([[0 <= j < 6 and bool(mask[0, j]) for j in row] for row in rows])
    assert torch.equal(attn > -torch.inf, seen.expand(2, 3, 6, 3))
    unmasked = F.na1d_qk(q, k, 3, boundary="cut", backend="naive")
    assert torch.equal(
        F.na1d_qk(q, k, **options, backend="naive"), unmasked.masked_fill(~seen, -torch.inf)
    )
    for anything in (0.0, torch.nan, torch.inf):
        weights = torch.where(seen, torch.ones(()).double(), anything).expand(2, 3, 6, 3).clone()
        weights.requires_grad_()
        value = torch.where(mask[:, None, :, None], v, anything).requires_grad_()
        out = F.na1d_av(weights, value, **options)
        dense = torch.where(mask[:, None, :, None], v, 0)
        band = (torch.arange(6) - torch.arange(6)[:, None]).abs() <= 1
        torch.testing.assert_close(out, band.double() @ dense)
        grads = torch.autograd.grad(out.sum(), [weights, value])
        assert all(x.isfinite().all() for x in grads)
        assert (grads[0][~seen.expand(2, 3, 6, 3)] == 0).all()
        assert (grads[1][:, :, ~mask[0]] == 0).all()


@MAKE
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_hidden_keys_in_higher_derivatives(make, rank):
    def derivatives(*inputs):
        inputs = tuple(x.detach().requires_grad_() for x in inputs)
        results = make(rank, True)(*inputs)
        first = torch.autograd.grad(sum(x.sin().sum() for x in results), inputs, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), inputs)
        tangents = tuple(torch.ones_like(x) for x in inputs)
        ours = make(rank, True)
        dual = torch.func.jvp(ours, tuple(x.detach() for x in inputs), tangents)
        return [*results, *first, *second, *dual[1]]

    inputs = list(fused_inputs(rank, part=True))
    want = derivatives(*inputs)
    mask = key_mask_of(rank)
    for i in (1, 2):
        inputs[i] = torch.where(mask[..., None, None], inputs[i], torch.nan)
    for got, x in zip(derivatives(*inputs), want, strict=True):
        assert torch.equal(got, x) and x.isfinite().all()


# ---- queries that see nothing ----


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("backend", [None, "naive"])
def test_queries_that_see_nothing(rank, backend):
    """The second example sees no key: output 0, logsumexp -inf, all gradients 0. The first
    sees all of them, as if there were no mask."""
    options = dict(options_of(rank, True), backend=backend)
    mask = torch.ones_like(options.pop("key_mask"))
    mask[1] = False
    q, k, v, rpb, *_ = fused_inputs(rank, part=True)

    def function(q, k, v, rpb, mask=mask):
        return FUSED[rank](q, k, v, rpb=rpb, return_lse=True, key_mask=mask, **options)

    inputs = (q, k, v, rpb)
    output, lse = function(*inputs)
    assert (output[1] == 0).all() and torch.isneginf(lse[1]).all()
    of_first = (*(x[:1].detach().requires_grad_() for x in (q, k, v)), rpb)
    want, want_lse = function(*of_first, mask=torch.ones_like(mask[:1]))
    assert torch.equal(output[:1], want) and torch.equal(lse[:1], want_lse)

    def grads(results, inputs):
        first = torch.autograd.grad(results.sin().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), inputs)
        return [*first, *second]

    for got, expected in zip(grads(output, inputs), grads(want, of_first), strict=True):
        if got.shape == rpb.shape:
            torch.testing.assert_close(got, expected)
        else:
            torch.testing.assert_close(got[:1], expected)
            assert (got[1] == 0).all()
    tangents = tuple(torch.ones_like(x) for x in inputs)
    primal, tangent = torch.func.jvp(lambda *x: function(*x)[0], inputs, tangents)
    assert (primal[1] == 0).all() and (tangent[1] == 0).all() and tangent.isfinite().all()


def test_additional_tokens_are_seen_where_keys_are_not():
    q, k, v, _, ak, av = fused_inputs(2)
    mask = torch.zeros(1, *k.shape[1:3], dtype=torch.bool)
    got = F.na2d(q, k, v, 3, additional_keys=ak, additional_values=av, key_mask=mask)
    want = natten.attention(q.flatten(1, 2), ak, av).view_as(got)
    torch.testing.assert_close(got, want)


def test_a_mask_that_hides_nothing_changes_nothing():
    q, k, v, rpb, *_ = fused_inputs(2)
    mask = torch.ones(1, *k.shape[1:3], dtype=torch.bool)
    options: dict[str, Any] = dict(
        kernel_size=3, rpb=rpb[:, :, :5].expand(2, 3, 5), backend="naive"
    )
    options["kernel_size"] = (2, 3)
    assert torch.equal(F.na2d(q, k, v, key_mask=mask, **options), F.na2d(q, k, v, **options))


# ---- layouts ----


def test_layouts_of_masks():
    q, k, v, *_ = fused_inputs(2, part=True)
    mask = key_mask_of(2)
    options = options_of(2, True)

    def attend(mask):
        return FUSED[2](q, k, v, **dict(options, key_mask=mask))

    want = attend(mask)
    shape = mask.shape
    views = {
        "transposed": mask.transpose(1, 2).contiguous().transpose(1, 2),
        "batch innermost": mask.movedim(0, -1).contiguous().movedim(-1, 0),
        "steps": mask.repeat_interleave(2, -1)[..., ::2],
        "steps of rows": mask.repeat_interleave(2, 1)[:, 1::2],
        "offset": torch.nn.functional.pad(mask, (1, 2))[..., 1:-2],
        "computed": torch.where(mask, 1.0, -1.0) > 0,
    }
    for name, view in views.items():
        assert torch.equal(view, mask) and torch.equal(attend(view), want), name
    for view in (mask[:1].expand(shape), mask[:, :1].expand(shape), mask[..., :1].expand(shape)):
        assert torch.equal(attend(view), attend(view.clone(memory_format=torch.contiguous_format)))
    assert torch.equal(attend(mask[:1]), attend(mask[:1].expand(shape)))


# ---- modules ----


@both_kinds
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("boundary", ["shift", "cut", "circular"])
@pytest.mark.parametrize("batch", [1, 2])
def test_module(fused, rank, boundary, batch):
    """What it says, from its parameters and the fused function."""
    natten.use_fused_na(fused)
    module = MODULES[rank](8, 2, 3, rel_pos_bias=True, boundary=boundary).double()
    with torch.no_grad():
        module.rpb.normal_()
    assert module.boundary == (boundary,) * rank
    x = randn(2, *(6, 5, 3)[:rank], 8)
    mask = torch.rand(batch, *x.shape[1:-1]) < 0.5
    mask[-1] = False  # of some examples, nothing is seen
    q, k, v = (y.unflatten(-1, (2, 4)) for y in module.qkv(x).chunk(3, -1))
    attended = FUSED[rank](q, k, v, 3, rpb=module.rpb, boundary=boundary, key_mask=mask)
    want = module.proj(attended.flatten(-2))
    got = module(x, mask)
    torch.testing.assert_close(got, want)
    assert torch.equal(got[-1], module.proj.bias.expand_as(got[-1]))
    assert torch.equal(got, module(x, key_mask=mask))
    results = [
        torch.autograd.grad(out.sin().sum(), [x, *module.parameters()]) for out in (got, want)
    ]
    torch.testing.assert_close(*results)
    assert not torch.allclose(module(x), got)


@both_kinds
def test_module_with_dropout(fused):
    """Of attention weights, where a query sees nothing: 0, not NaN."""
    natten.use_fused_na(fused)
    module = MODULES[2](8, 2, 3, attn_drop=0.5)
    x = torch.randn(2, 5, 6, 8, requires_grad=True)
    mask = torch.ones(2, 5, 6, dtype=torch.bool)
    mask[1] = False
    with torch.autograd.detect_anomaly(check_nan=True):
        out = module(x, mask)
        out.sum().backward()
    assert torch.equal(out[1], module.proj.bias.expand_as(out[1]))
    assert x.grad.isfinite().all() and not x.grad[1].any()
    assert not torch.equal(module(x, mask)[0], out[0])


@both_kinds
def test_module_of_padded_images(fused):
    """A smaller image, padded, among larger ones: as if it were alone, at a cut border."""
    natten.use_fused_na(fused)
    module = MODULES[2](8, 2, 5, boundary="cut").double()
    small = randn(1, 4, 5, 8)
    padded = torch.nn.functional.pad(small, (0, 0, 0, 2, 0, 3), value=torch.nan)
    mask = torch.zeros(1, 7, 7, dtype=torch.bool)
    mask[:, :4, :5] = True
    torch.testing.assert_close(module(padded, mask)[:, :4, :5], module(small))


def test_module_of_a_grid_smaller_than_its_kernel():
    module = MODULES[2](8, 2, 7, boundary=("cut", "circular"), rel_pos_bias=True)
    assert "boundary=('cut', 'circular')" in repr(module)
    assert module(torch.randn(1, 3, 9, 8)).shape == (1, 3, 9, 8)
    with pytest.raises(ValueError, match="must not exceed the axis, 5 tokens"):
        module(torch.randn(1, 9, 5, 8))
    module = MODULES[1](8, 2, 5, stride=4, dilation=3, boundary="circular")  # 8 positions at least
    assert module(torch.randn(1, 24, 8)).shape == (1, 24, 8)
    assert MODULES[1](8, 2, 2**40, boundary="cut").kernel_size == (2**40,)


# ---- autocast ----


@MAKE
def test_autocast_leaves_masks(make):
    inputs = [x.float().detach() for x in fused_inputs(2, part=True)]
    with torch.autocast("cpu", torch.bfloat16):
        got = make(2, True)(*inputs)
    assert got[0].dtype == torch.bfloat16
    if make is fused_attention:
        for x, want in zip(got, make(2, True)(*(x.bfloat16() for x in inputs)), strict=True):
            assert torch.equal(x, want)


def test_masks_of_other_transforms():
    """A mask that does not depend on what is differentiated, made inside a transform."""
    q, k, v, *_ = (x.detach() for x in fused_inputs(1))

    def loss(q):
        return F.na1d(q, k, v, 3, key_mask=k.detach()[..., 0, 0] > 0).square().sum()

    want = torch.autograd.grad(loss(q.requires_grad_()), q)[0]
    assert torch.equal(torch.func.grad(loss)(q.detach()), want)


def test_empty_masks_are_told():
    x = torch.randn(1, 2, 6, 4)
    with pytest.raises(ValueError, match=r"^key_mask: got shape \[0, 6\]; batch must be 1"):
        QK[1](x, x, 3, key_mask=torch.ones(0, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"^key_mask: got shape \[2, 6\]"):
        AV[1](torch.ones(1, 2, 6, 3), x, 3, key_mask=torch.ones(2, 6, dtype=torch.bool))
