"""PyTorch's own attention on the neighborhoods of a layer, which the profiler times beside ours.

Windows come from libnatten (`_core.windows`), as a table per axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from natten import _core
from natten._simulate import Layer

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
Passes = Callable[[Call, bool], dict[str, Any]]

MOST_BYTES = 4e9  # while a mask is made
MASK_BYTES = 22  # of these, for each pair of tokens


def _sees(layer: Layer, device: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Whether tokens, by number, see others."""
    axes = []
    for axis, (queries, _) in enumerate(_core.windows(layer.config(), layer.grid, layer.grid)):
        group, position, _, begin, end = torch.tensor(queries, device=device).T.contiguous()
        length, dilation = layer.grid[axis], layer.window["dilation"][axis]
        turn = length // dilation if layer.window["boundary"][axis] == "circular" else None
        axes.append((length, group, position, begin, end - begin, turn))

    def sees(query: Tensor, key: Tensor) -> Tensor:
        result = None
        for length, group, position, begin, size, turn in reversed(axes):
            i, j = query % length, key % length
            query, key = query // length, key // length
            ahead = position[j] - begin[i]
            if turn is not None:
                ahead = ahead % turn
            here = (group[i] == group[j]) & (ahead >= 0) & (ahead < size[i])
            result = here if result is None else result & here
        assert result is not None
        return result

    return sees


def _first(x: Tensor) -> Tensor:
    """Heads first, and all tokens along one axis."""
    return x.flatten(1, -3).transpose(1, 2)


def ways(layer: Layer, device: str, passes: Passes) -> dict[str, Callable[[bool], dict[str, Any]]]:
    """By name, what builds the passes of a peer; it raises where there are none."""
    tokens = math.prod(layer.grid)
    gqa = layer.heads != layer.kv_heads

    def last(x: Tensor) -> Tensor:
        return x.transpose(1, 2).unflatten(1, layer.grid)

    def check_mask() -> None:
        needed = tokens**2 * MASK_BYTES
        if needed > MOST_BYTES:
            raise ValueError(f"making the mask of all pairs needs {needed / 1e9:.1f} GB")

    def flex(backward: bool) -> dict[str, Any]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        on_cpu = device == "cpu"
        if on_cpu:  # where the mask is made of all pairs before it is cut into blocks
            check_mask()
        if on_cpu and backward:
            backward = False  # there is none
        sees = _sees(layer, device)
        mask = create_block_mask(
            lambda b, h, q, k: sees(q, k), None, None, tokens, tokens, device, _compile=not on_cpu
        )
        compiled = torch.compile(flex_attention, dynamic=False)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if on_cpu:
                q, k, v = q.detach(), k.detach(), v.detach()
            output = compiled(_first(q), _first(k), _first(v), block_mask=mask, enable_gqa=gqa)
            return last(output)  # type: ignore[arg-type]

        return passes(call, backward)

    def masked(backward: bool) -> dict[str, Any]:
        check_mask()
        token = torch.arange(tokens, device=device)
        mask = _sees(layer, device)(token[:, None], token)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return last(
                scaled_dot_product_attention(
                    _first(q), _first(k), _first(v), attn_mask=mask, enable_gqa=gqa
                )
            )

        return passes(call, backward)

    def everything(backward: bool, kernel: SDPBackend | None = None) -> dict[str, Any]:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            def attend() -> Tensor:
                return last(
                    scaled_dot_product_attention(_first(q), _first(k), _first(v), enable_gqa=gqa)
                )

            if kernel is None:
                return attend()
            with sdpa_kernel(kernel):
                return attend()

        return passes(call, backward)

    result: dict[str, Callable[[bool], dict[str, Any]]] = {
        "flex": flex,
        "sdpa, mask": masked,
        "sdpa, all tokens": everything,
    }
    if device.startswith("cuda"):
        for name, kernel in (
            ("cudnn", SDPBackend.CUDNN_ATTENTION),
            ("fav2", SDPBackend.FLASH_ATTENTION),
            ("xformers", SDPBackend.EFFICIENT_ATTENTION),
        ):
            result[name] = lambda backward, kernel=kernel: everything(backward, kernel)  # type: ignore[misc]
    return result
