"""Ways to compute neighborhood attention, for cpu.py and gpu.py, on heads-last tensors.

PyTorch's attention wants heads first: the transposes are part of each call, and are views.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import cases
import torch
from cases import MAX_BYTES, PASSES, Case, Skip, bias_index, sees
from tensors import Attention, ours, tensors_of
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import natten.functional as F

Inputs = Sequence[Tensor]


def check(results: Inputs, references: Inputs, precision: str | None = None) -> None:
    dtype = precision or str(references[0].dtype).removeprefix("torch.")
    wide = ([x.detach().double() for x in xs] for xs in (results, references))
    cases.check(*wide, dtype)


def heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.flatten(1, -3).transpose(1, 2) for x in tensors]


def heads_last(case: Case, x: Tensor) -> Tensor:
    return x.transpose(1, 2).unflatten(1, case.grid)


def gather(case: Case, inputs: Inputs) -> Attention:
    """What one writes without a kernel. Its memory grows with tokens * window."""
    if case.is_causal or case.boundary == "cut":
        raise Skip("not all windows are full")
    window = math.prod(case.kernel)
    needed = 2 * inputs[0].nbytes * window
    if needed > MAX_BYTES:
        raise Skip(f"gathered keys and values need {needed / 1e9:.1f} GB")
    index = torch.zeros(1, 1, dtype=torch.long)
    for axis, (length, k) in enumerate(zip(case.grid, case.kernel, strict=True)):
        i = torch.arange(length)[:, None]
        position = case.window(axis, i)[0] + torch.arange(k)
        keys = position * case.dilation + i % case.dilation
        index = index[:, None, :, None] * length + keys[None, :, None, :]
        index = index.reshape(-1, index.shape[2] * k)
    place = bias_index(case, torch.arange(case.tokens)[:, None], index)

    def run(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = (x.flatten(1, -3) for x in (query, key, value))
        scores = torch.einsum("bthd,btkhd->bhtk", q, k[:, index]) * case.head_dim**-0.5
        if bias is not None:
            scores = scores + bias.flatten(1)[:, place]
        return torch.einsum("bhtk,btkhd->bthd", scores.softmax(-1), v[:, index]).view_as(query)

    return run


def flex(case: Case, inputs: Inputs) -> Attention:
    """FlexAttention, compiled here. On the CPU it has no backward pass and no float64."""
    device = inputs[0].device
    on_cpu = device.type == "cpu"
    bias = inputs[3].detach().flatten(1) if case.has_bias else None

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(case, query, key)

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert bias is not None
        return score + bias[head, bias_index(case, query, key)]

    torch.compiler.reset()
    # On the CPU blocks of 64 tokens skip more than those of 128, the default. Uncompiled, the mask
    # of all pairs is stored before it is cut into blocks.
    mask = create_block_mask(
        mask_mod, None, None, case.tokens, case.tokens, device,
        BLOCK_SIZE=64 if on_cpu else 128, _compile=not on_cpu,
    )  # fmt: skip
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        qkv = (x.detach() if on_cpu else x for x in (query, key, value))
        with torch.set_grad_enabled(not on_cpu):
            output = compiled(
                *heads_first(*qkv),
                score_mod=None if bias is None else score_mod,
                block_mask=mask,
            )
        return heads_last(case, output)

    try:
        run(*inputs)
    except Exception as error:
        raise Skip(f"does not compile: {str(error).splitlines()[0]}") from error
    return run


def masked(case: Case, inputs: Inputs) -> Attention:
    heads = case.heads if case.has_bias else 1
    needed = case.tokens**2 * heads * (inputs[0].itemsize if case.has_bias else 1)
    if needed > MAX_BYTES:
        raise Skip(f"the mask needs {needed / 1e9:.1f} GB")
    token = torch.arange(case.tokens)
    mask = sees(case, token[:, None], token)
    place = bias_index(case, token[:, None], token) if case.has_bias else None

    def run(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        biased = mask if bias is None else bias.flatten(1)[:, place].where(mask, -torch.inf)
        output = scaled_dot_product_attention(*heads_first(query, key, value), attn_mask=biased)
        return heads_last(case, output)

    return run


def full(case: Case, inputs: Inputs) -> Attention:
    """Attends to everything, so it is checked with windows that hold everything."""
    if case.has_bias:
        raise Skip("takes no bias")

    def run_on(grid: Case) -> Attention:
        causal = case.is_causal and len(case.grid) == 1
        return lambda *qkv: heads_last(
            grid, scaled_dot_product_attention(*heads_first(*qkv), is_causal=causal)
        )

    small = replace(case, grid=case.kernel, stride=1, dilation=1)
    dtype = str(inputs[0].dtype).removeprefix("torch.")
    small_inputs, _ = tensors_of(small, dtype, inputs[0].device)
    check([run_on(small)(*small_inputs)], [ours(small)(*small_inputs)])
    return run_on(case)


def unfused(case: Case, inputs: Inputs) -> tuple[Attention, Attention]:
    """Scores from queries and keys, and output from weights and values, on heads-first tensors of
    their own."""
    query, key, value = (x.detach().movedim(-2, 1).contiguous() for x in inputs[:3])
    query *= case.head_dim**-0.5
    bias = inputs[3].detach() if case.has_bias else None
    parameters = {
        "dilation": case.dilation,
        "is_causal": case.is_causal,
        "stride": case.stride,
        "boundary": case.boundary,
    }
    qk, av = (getattr(F, f"na{len(case.grid)}d_{name}") for name in ("qk", "av"))

    def scores(*_: Tensor) -> Tensor:
        return qk(query, key, case.kernel, rpb=bias, **parameters)

    weights = scores().softmax(-1)

    def output(*_: Tensor) -> Tensor:
        return av(weights, value, case.kernel, **parameters).movedim(1, -2)

    check([output()], [ours(case)(*inputs)])
    return scores, output


@dataclass(frozen=True)
class Way:
    build: Callable[[Case, Inputs], Attention]
    passes: Sequence[str] = tuple(PASSES)
    share: float = 1.0  # of `Case.flops`
    is_checked_when_built: bool = False


WAYS = {
    "ours": Way(lambda case, inputs: ours(case)),
    "naive": Way(lambda case, inputs: ours(case, "naive")),
    "composed": Way(lambda case, inputs: ours(case, "composed")),
    "gather": Way(gather),
    "flex": Way(flex, ["forward"]),
    "sdpa_mask": Way(masked),
    "sdpa_full": Way(full, is_checked_when_built=True),
    "qk": Way(lambda *given: unfused(*given)[0], ["forward"], 0.5, is_checked_when_built=True),
    "av": Way(lambda *given: unfused(*given)[1], ["forward"], 0.5, is_checked_when_built=True),
}
