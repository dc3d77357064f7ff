"""Counts of floating-point operations: by formula, by PyTorch's counter and by fvcore's."""

from __future__ import annotations

import importlib.util
import sys
from math import prod

import pytest

torch = pytest.importorskip("torch")

from test_package import run_python  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from torch_cases import AV, FUSED, MODULES, QK  # noqa: E402

import natten  # noqa: E402
from natten import flops  # noqa: E402
from natten.flops import (  # noqa: E402
    add_natten_handle,
    fna_flop_count,
    get_flops,
    na_av_flop_count,
    na_qk_flop_count,
)

needs_fvcore = pytest.mark.skipif(importlib.util.find_spec("fvcore") is None, reason="needs fvcore")

GRID = {1: (9,), 2: (6, 7), 3: (4, 5, 3)}
NEIGHBORHOOD = {
    1: dict(kernel_size=(4,), dilation=(2,), is_causal=(True,)),
    2: dict(kernel_size=(3, 5), dilation=(2, 1), is_causal=(False, True)),
    3: dict(kernel_size=(2, 3, 3), dilation=(2, 1, 1), is_causal=(True, False, False)),
}
BATCH, HEADS, KV_HEADS, DIM, VALUE_DIM, EXTRA = 2, 4, 2, 8, 6, 5


@pytest.fixture
def fused_modules():
    natten.use_fused_na()
    yield
    natten.use_fused_na(False)


def rows_and_slots(rank: int, extra: int = 0) -> tuple[int, int]:
    """Queries of all heads, and what each attends to."""
    return BATCH * HEADS * prod(GRID[rank]), prod(NEIGHBORHOOD[rank]["kernel_size"]) + extra


def counted(run) -> int:
    """FLOPs of `run()` by PyTorch's counter."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def fused_tensors(rank: int, extra: int = 0, rpb: bool = False):
    def randn(*shape):
        return torch.randn(*shape, requires_grad=True)

    tensors = {
        "query": randn(BATCH, *GRID[rank], HEADS, DIM),
        "key": randn(BATCH, *GRID[rank], KV_HEADS, DIM),
        "value": randn(BATCH, *GRID[rank], KV_HEADS, VALUE_DIM),
    }
    if rpb:
        tensors["rpb"] = randn(HEADS, *(2 * k - 1 for k in NEIGHBORHOOD[rank]["kernel_size"]))
    if extra:
        tensors["additional_keys"] = randn(BATCH, extra, KV_HEADS, DIM)
        tensors["additional_values"] = randn(BATCH, extra, KV_HEADS, VALUE_DIM)
    return tensors


def unfused_tensors(rank: int, extra: int):
    """query, key, value, additional keys, additional values, heads-first."""

    def randn(*grid):
        return torch.randn(BATCH, HEADS, *grid, DIM, requires_grad=True)

    grid = GRID[rank]
    tokens = [randn(extra), randn(extra)] if extra else [None, None]
    return [randn(*grid), randn(*grid), randn(*grid), *tokens]


# By hand.


def test_counts_of_a_small_case():
    """2-D, 3 x 3 window: 2 batches, 20 tokens, 4 heads of 8 channels."""
    shape = (2, 4, 5, 4, 8)
    arguments = dict(kernel_size=3, dilation=1, is_causal=False, is_heads_last=True)
    product = 2 * 20 * 4 * 9 * 8  # multiplications of query and key
    assert na_qk_flop_count(shape, shape, **arguments, return_macs=True) == product
    assert na_qk_flop_count(shape, shape, **arguments) == 2 * product
    attn = (*shape[:-1], 9)
    assert na_av_flop_count(attn, shape, **arguments, return_macs=True) == product
    assert na_av_flop_count(attn, shape, **arguments) == 2 * product
    assert fna_flop_count(shape, shape, shape, **arguments, return_macs=True) == 2 * product
    assert fna_flop_count(shape, shape, shape, **arguments) == 4 * product


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("heads_last", [True, False])
@pytest.mark.parametrize("extra", [0, EXTRA])
def test_formulas(rank, heads_last, extra):
    grid, neighborhood = GRID[rank], NEIGHBORHOOD[rank]
    rows, slots = rows_and_slots(rank, extra)
    options = dict(**neighborhood, is_heads_last=heads_last, additional=extra)

    def shape(heads, dim):
        return (BATCH, *grid, heads, dim) if heads_last else (BATCH, heads, *grid, dim)

    query, value = shape(HEADS, DIM), shape(HEADS, VALUE_DIM)
    qk, av = rows * slots * DIM, rows * slots * VALUE_DIM
    assert na_qk_flop_count(query, query, **options) == 2 * qk
    assert na_av_flop_count(shape(HEADS, slots), value, **options) == 2 * av
    grouped = query, shape(KV_HEADS, DIM), shape(KV_HEADS, VALUE_DIM)
    assert fna_flop_count(*grouped, **options) == 2 * (qk + av)
    assert fna_flop_count(*grouped, **options, return_macs=True) == qk + av


def test_borders_masks_and_parts_change_no_count():
    """By convention windows count as full. Of a part only its own queries count."""
    x, heads_first = torch.randn(1, 8, 6, 2, 4), torch.randn(1, 2, 8, 6, 4)
    mask = torch.rand(1, 8, 6) < 0.5
    want = 48 * 2 * 9 * 4 * 2
    for more in (
        dict(boundary="cut"),
        dict(boundary=("shift", "circular")),
        dict(key_mask=mask),
        dict(grid_size=(8, 6)),
    ):
        assert counted(lambda more=more: natten.na2d(x, x, x, 3, **more)) == 2 * want
        assert counted(lambda more=more: QK[2](heads_first, heads_first, 3, **more)) == want
    part = dict(query_offset=(2, 0), key_mask=mask)
    assert counted(lambda: natten.na2d(x[:, 2:4], x, x, 3, **part)) == 2 * want // 4
    tensors = [x.clone().requires_grad_() for _ in range(3)]

    def both(**more):
        return counted(lambda: natten.na2d(*tensors, 3, **more).sum().backward())

    assert both(key_mask=mask, boundary="cut") == both() == 7 * want


def test_formulas_take_one_value_for_all_axes_lists_and_sizes():
    shape = torch.zeros(1, 6, 7, 2, 8).shape
    want = 2 * 42 * 2 * 9 * 16
    for kernel_size, dilation, is_causal in (
        (3, 1, False),
        (3, None, None),
        ([3, 3], [1, 2], [True, False]),
        ((3, 3), 2, (False, True)),
    ):
        assert fna_flop_count(shape, shape, shape, kernel_size, dilation, is_causal, True) == want


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(kernel_size=0), ValueError, "kernel_size: got"),
        (dict(kernel_size=8), ValueError, "kernel_size: got .* must not exceed the axis"),
        (dict(kernel_size=(3, 3, 3)), ValueError, "kernel_size: got .* 3 elements"),
        (dict(kernel_size=2.5), TypeError, "kernel_size: got 2.5"),
        (dict(dilation=0), ValueError, "dilation: got"),
        (dict(is_causal=(True,)), ValueError, "is_causal: got"),
        (dict(additional=-1), ValueError, "additional"),
        (dict(q_shape=(3, 4)), ValueError, r"q_shape: got \[3, 4\]; must have 4, 5 or 6"),
        (dict(k_shape=(1, 6, 7, 3, 8)), ValueError, "heads"),
        (dict(k_shape=(1, 6, 7, 2, 9)), ValueError, "key: got shape"),
        (dict(v_shape=(1, 6, 6, 2, 8)), ValueError, "value: got shape"),
        (dict(v_shape=(1, 6, 2, 8)), ValueError, "value: got 4 dimensions"),
    ],
)
def test_formulas_refuse_what_the_operations_refuse(change, error, message):
    shape = (1, 6, 7, 2, 8)
    call = dict(
        q_shape=shape, k_shape=shape, v_shape=shape, kernel_size=3, dilation=1, is_causal=False,
        is_heads_last=True,
    )  # fmt: skip
    fna_flop_count(**call)
    with pytest.raises(error, match=message):
        fna_flop_count(**call | change)


def test_unfused_formulas_refuse_what_the_operations_refuse():
    with pytest.raises(ValueError, match="key: got shape"):
        na_qk_flop_count((1, 2, 6, 7, 8), (1, 1, 6, 7, 8), 3, 1, False, False)
    with pytest.raises(ValueError, match="attn: got 10 slots"):
        na_av_flop_count((1, 2, 6, 7, 10), (1, 2, 6, 7, 8), 3, 1, False, False)


# PyTorch's counter.


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("extra", [0, EXTRA])
def test_torch_counts_fused(rank, extra):
    rows, slots = rows_and_slots(rank, extra)
    tensors = fused_tensors(rank, extra, rpb=True)
    output = None

    def forward():
        nonlocal output
        output = FUSED[rank](**tensors, **NEIGHBORHOOD[rank])

    forward_flops = counted(forward)
    assert forward_flops == 2 * rows * slots * (DIM + VALUE_DIM)
    assert forward_flops == fna_flop_count(
        *(tensors[name].shape for name in ("query", "key", "value")),
        **NEIGHBORHOOD[rank],
        is_heads_last=True,
        additional=extra,
    )
    # Scores again; gradients of weights; of queries, keys and values.
    assert counted(output.sum().backward) == 2 * rows * slots * (3 * DIM + 2 * VALUE_DIM)


@pytest.mark.parametrize(
    "wanted, products",
    [
        # Which of DIM and VALUE_DIM each product has, over window slots and over extra slots.
        (["query"], lambda w, e: (w + e) * (2 * DIM + VALUE_DIM)),
        (["key"], lambda w, e: (w + e) * (DIM + VALUE_DIM) + w * DIM),
        (["value"], lambda w, e: (w + e) * DIM + w * VALUE_DIM),
        (["rpb"], lambda w, e: (w + e) * (DIM + VALUE_DIM)),
        (["additional_keys"], lambda w, e: (w + e) * (DIM + VALUE_DIM) + e * DIM),
        (["additional_values"], lambda w, e: (w + e) * DIM + e * VALUE_DIM),
        (["query", "value"], lambda w, e: (w + e) * (2 * DIM + VALUE_DIM) + w * VALUE_DIM),
    ],
)
def test_torch_counts_the_gradients_that_are_wanted(wanted, products):
    rank = 2
    rows, window = rows_and_slots(rank)
    tensors = fused_tensors(rank, EXTRA, rpb=True)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in wanted)
    output = FUSED[rank](**tensors, **NEIGHBORHOOD[rank])
    assert counted(output.sum().backward) == 2 * rows * products(window, EXTRA)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("extra", [0, EXTRA])
def test_torch_counts_unfused(rank, extra):
    rows, slots = rows_and_slots(rank, extra)
    product = 2 * rows * slots * DIM
    query, key, value, extra_keys, extra_values = unfused_tensors(rank, extra)
    attn = output = None

    def qk():
        nonlocal attn
        attn = QK[rank](query, key, additional_keys=extra_keys, **NEIGHBORHOOD[rank])

    def av():
        nonlocal output
        weights = attn.detach().softmax(-1).requires_grad_()
        output = AV[rank](weights, value, additional_values=extra_values, **NEIGHBORHOOD[rank])

    assert counted(qk) == product
    assert product == na_qk_flop_count(
        query.shape, key.shape, **NEIGHBORHOOD[rank], is_heads_last=False, additional=extra
    )
    assert counted(av) == product
    assert counted(lambda: attn.nan_to_num().sum().backward()) == 2 * product
    assert counted(output.sum().backward) == 2 * product


def test_torch_counts_the_first_call_of_a_process():
    """Which loads natten.torch while the counter is active."""
    code = """
import torch, natten
from torch.utils.flop_counter import FlopCounterMode
x = torch.zeros(1, 4, 1, 1)
with FlopCounterMode(display=False) as counter:
    natten.na1d(x, x, x, kernel_size=3)
print(counter.get_total_flops())
"""
    assert run_python(code).split() == [str(2 * 2 * 4 * 3)]


@pytest.mark.parametrize("is_causal", [False, True])
def test_torch_counts_attention(is_causal):
    query = torch.randn(2, 5, HEADS, DIM)
    key, value = torch.randn(2, 9, KV_HEADS, DIM), torch.randn(2, 9, KV_HEADS, VALUE_DIM)

    def attention(*tensors):
        return natten.attention(*tensors, is_causal=is_causal)

    tensors = query, key, value
    flops = 2 * (2 * 5 * HEADS) * 9 * (DIM + VALUE_DIM)
    assert counted(lambda: attention(*tensors)) == flops
    # In forward mode the same of unfused operations, then two products of tangents for each.
    assert counted(lambda: torch.func.jvp(attention, tensors, tensors)) == 3 * flops


def module_and_macs(rank: int, qkv_bias: bool = True) -> tuple[nn.Module, torch.Tensor, int, int]:
    """A module, its input, MACs of its linear maps, MACs of its attention."""
    dim, tokens = HEADS * DIM, BATCH * prod(GRID[rank])
    module = MODULES[rank](dim, HEADS, **NEIGHBORHOOD[rank], qkv_bias=qkv_bias)
    rows, slots = rows_and_slots(rank)
    return (
        module,
        torch.randn(BATCH, *GRID[rank], dim),
        tokens * dim * 4 * dim,
        2 * rows * slots * DIM,
    )


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_torch_counts_module_unfused(rank, qkv_bias):
    module, x, linear, attention = module_and_macs(rank, qkv_bias)
    assert counted(lambda: module(x)) == 2 * (linear + attention)
    x.requires_grad_()
    assert counted(lambda: module(x).sum().backward()) == 3 * 2 * (linear + attention)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_torch_counts_module_fused(rank, fused_modules):
    module, x, linear, attention = module_and_macs(rank)
    assert counted(lambda: module(x)) == 2 * (linear + attention)
    x.requires_grad_()
    flops = counted(lambda: module(x).sum().backward())
    assert flops == 2 * (3 * linear + (1 + 2.5) * attention)


# fvcore's counter.


@needs_fvcore
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_fvcore_counts_module_unfused(rank, qkv_bias):
    module, x, linear, attention = module_and_macs(rank, qkv_bias)
    assert get_flops(module, x, disable_warnings=True) == linear + attention


@needs_fvcore
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_fvcore_counts_module_fused(rank, fused_modules):
    module, x, linear, attention = module_and_macs(rank)
    assert get_flops(module, x, disable_warnings=True) == linear + attention


class Call(nn.Module):
    """A function as a module, which is what fvcore traces."""

    def __init__(self, function, **options):
        super().__init__()
        self.function, self.options = function, options

    def forward(self, *tensors):
        return self.function(*tensors, **self.options)


@needs_fvcore
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_fvcore_counts_additional_tokens_and_grouped_heads(rank):
    rows, slots = rows_and_slots(rank, EXTRA)
    query, key, value, *extra = fused_tensors(rank, EXTRA).values()

    def fused(query, key, value, extra_keys, extra_values):
        return FUSED[rank](
            query, key, value, additional_keys=extra_keys, additional_values=extra_values,
            **NEIGHBORHOOD[rank],
        )  # fmt: skip

    macs = get_flops(Call(fused), (query, key, value, *extra), disable_warnings=True)
    assert macs == rows * slots * (DIM + VALUE_DIM)

    def unfused(query, key, value, extra_keys, extra_values):
        attn = QK[rank](query, key, additional_keys=extra_keys, **NEIGHBORHOOD[rank])
        return AV[rank](attn, value, additional_values=extra_values, **NEIGHBORHOOD[rank])

    macs = get_flops(Call(unfused), tuple(unfused_tensors(rank, EXTRA)), disable_warnings=True)
    assert macs == rows * slots * 2 * DIM


@needs_fvcore
def test_fvcore_counts_attention():
    query, key = torch.randn(2, 5, HEADS, DIM), torch.randn(2, 9, KV_HEADS, DIM)
    model = Call(natten.attention, is_causal=True)
    macs = get_flops(model, (query, key, key), disable_warnings=True)
    assert macs == (2 * 5 * HEADS) * 9 * 2 * DIM


@needs_fvcore
def test_fvcore_counts_by_module_and_operator():
    from fvcore.nn import FlopCountAnalysis

    module, x, linear, attention = module_and_macs(2)
    counter = FlopCountAnalysis(nn.Sequential(module, nn.Linear(x.shape[-1], 3)), x)
    assert add_natten_handle(counter) is counter
    counter.unsupported_ops_warnings(False)
    by_module = counter.by_module()
    assert by_module["0"] == linear + attention
    assert by_module["1"] == x.numel() * 3
    assert counter.by_operator()["qk"] == counter.by_operator()["av"] == attention // 2
    assert not any("natten" in name for name in counter.unsupported_ops())


@needs_fvcore
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("extra", [0, EXTRA])
def test_fvcore_handles_of_older_versions(rank, extra):
    """Which models import to count operations by tables of their own."""
    from fvcore.nn import FlopCountAnalysis

    rows, slots = rows_and_slots(rank, extra)

    def unfused(query, key, value, keys=None, values=None):
        attn = QK[rank](query, key, additional_keys=keys, **NEIGHBORHOOD[rank])
        return AV[rank](attn, value, additional_values=values, **NEIGHBORHOOD[rank])

    inputs = tuple(x for x in unfused_tensors(rank, extra) if x is not None)
    for qk, av in ((f"qk_{rank}d_rpb_flop", f"av_{rank}d_flop"), ("qk_rpb_flop", "av_flop")):
        handles = {"natten::qk": getattr(flops, qk), "natten::av": getattr(flops, av)}
        counter = FlopCountAnalysis(Call(unfused), inputs).set_op_handle(**handles)
        counter.unsupported_ops_warnings(False)
        assert dict(counter.by_operator()) == {"qk": rows * slots * DIM, "av": rows * slots * DIM}


@needs_fvcore
def test_fvcore_warnings_can_be_disabled(caplog):
    module, x, *_ = module_and_macs(1)
    get_flops(module.eval(), x)
    assert any("Unsupported operator aten::softmax" in message for message in caplog.messages)
    caplog.clear()
    get_flops(module, x, disable_warnings=True)
    assert not any("Unsupported operator" in message for message in caplog.messages)


def test_fvcore_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "fvcore.nn", None)  # importing it fails
    with pytest.raises(ImportError, match="pip install fvcore"):
        get_flops(nn.Linear(2, 2), torch.zeros(1, 2))
