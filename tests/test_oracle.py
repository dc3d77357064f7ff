"""The oracle's hand-written gradients against PyTorch's autograd on the same dense attention."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import cases  # noqa: E402
import oracle  # noqa: E402


def dense_attention(case, grid, t):
    """Masked softmax attention in PyTorch operators, from the oracle's pair matrices alone."""
    b, group = case.batch, case.heads // case.kv_heads
    queries, tokens = grid.seen.shape

    def heads_first(name, count):
        return t[name].reshape(b, count, *t[name].shape[-2:]).transpose(1, 2)

    def keys(name, additional):
        x = heads_first(name, tokens)
        if case.additional:
            x = torch.cat([x, t[additional].transpose(1, 2)], 2)
        return x.repeat_interleave(group, 1)

    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    scores = scale * heads_first("query", queries) @ keys("key", "additional_keys").mT
    seen = torch.ones(b, 1, queries, tokens + case.additional, dtype=torch.bool)
    seen[..., :tokens] = torch.from_numpy(grid.seen)
    if case.mask_batch is not None:
        seen[..., :tokens] &= t["key_mask"].flatten(1)[:, None, None]
    if case.rpb:
        bias = t["rpb"].flatten(1)[:, torch.from_numpy(grid.relative)]
        scores = scores + torch.nn.functional.pad(bias, (0, case.additional))
    is_empty = ~seen.any(-1, keepdim=True)  # where softmax has nothing to divide
    scores = scores.masked_fill(~seen, -torch.inf).masked_fill(is_empty, 0)
    output = scores.softmax(-1).masked_fill(is_empty, 0) @ keys("value", "additional_values")
    lse = scores.logsumexp(-1).masked_fill(is_empty[..., 0], -torch.inf)
    return (
        output.transpose(1, 2).reshape(t["grad_output"].shape),
        lse.transpose(1, 2).reshape(t["grad_logsumexp"].shape),
    )


@pytest.mark.parametrize("case", cases.random_cases(60, seed=7), ids=lambda c: f"rank{c.rank}")
def test_fused_gradients(case):
    arrays = case.fused_arrays()
    tensors = {n: torch.from_numpy(np.array(x)) for n, x in arrays.items()}
    inputs = {n: x.requires_grad_() for n, x in tensors.items()
              if not n.startswith("grad_") and n != "key_mask"}  # fmt: skip
    results = dense_attention(case, oracle.Grid(case), tensors)
    incoming = [tensors["grad_output"], tensors["grad_logsumexp"]]
    grads = torch.autograd.grad(results, list(inputs.values()), incoming)
    want = {f"grad_{n}": g for n, g in zip(inputs, grads, strict=True)}
    want |= dict(zip(("output", "logsumexp"), results, strict=True))
    got = oracle.fused(case, arrays)
    assert got.keys() == want.keys()
    for name, x in got.items():
        np.testing.assert_allclose(x, want[name].detach().numpy(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", cases.random_cases(40, seed=8), ids=lambda c: f"rank{c.rank}")
def test_unfused_is_linear(case):
    """<g, f(x)> is bilinear, so each gradient g_x of it satisfies <g, f> = <g_x, x>."""
    arrays = case.unfused_arrays()
    qk, av = oracle.unfused(case, arrays)
    filled = np.where(np.isneginf(qk["attn"]), 0.0, qk["attn"])
    value = (arrays["grad_attn"] * filled).sum()
    bias = (qk["grad_rpb"] * arrays["rpb"]).sum() if case.rpb else 0.0
    by_key = (qk["grad_key"] * arrays["key"]).sum()
    if case.additional:
        by_key += (qk["grad_additional_keys"] * arrays["additional_keys"]).sum()
    for inner in ((qk["grad_query"] * arrays["query"]).sum(), by_key):
        np.testing.assert_allclose(inner + bias, value, rtol=1e-9, atol=1e-9)
    value = (arrays["grad_output"] * av["output"]).sum()
    by_value = (av["grad_value"] * arrays["value"]).sum()
    if case.additional:
        by_value += (av["grad_additional_values"] * arrays["additional_values"]).sum()
    for inner in ((av["grad_attn"] * arrays["attn"]).sum(), by_value):
        np.testing.assert_allclose(inner, value, rtol=1e-9, atol=1e-9)


def test_what_a_mask_hides_may_hold_anything():
    """So that tests may put NaN there."""
    masked = [c for c in cases.random_cases(60, seed=9) if c.mask_batch is not None]
    assert masked
    for case in masked:
        arrays = case.fused_arrays()
        hidden = cases.hide(cases.hide(arrays, "key", 1), "value", 1)
        assert case.batch == 0 or arrays["key_mask"].all() or np.isnan(hidden["key"]).any()
        for name, x in oracle.fused(case, hidden).items():
            np.testing.assert_array_equal(x, oracle.fused(case, arrays)[name])
        arrays = case.unfused_arrays()
        hidden = cases.hide(cases.hide(arrays, "key", 2), "value", 2)
        for got, want in zip(
            oracle.unfused(case, hidden), oracle.unfused(case, arrays), strict=True
        ):
            for name, x in got.items():
                np.testing.assert_array_equal(x, want[name])
