"""The cases in PyTorch: their tensors and passes, and our attention.

Nothing here is imported from natten but inside `ours`, so that compare.py, which chooses builds for
its workers, needs none for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from cases import Case
from torch import Tensor

Attention = Callable[..., Tensor]  # query, key, value[, bias] -> output, all heads-last


def tensors_of(
    case: Case, dtype: str, device: torch.device | str = "cpu"
) -> tuple[list[Tensor], Tensor]:
    """The inputs and a gradient of the output, by `Case.shapes`. The same numbers every time."""
    torch.manual_seed(0)
    *inputs, gradient = (
        torch.randn(shape, dtype=getattr(torch, dtype), device=device) for shape in case.shapes
    )
    return [x.requires_grad_() for x in inputs], gradient


def ours(case: Case, backend: str | None = None, **options: Any) -> Attention:
    """Our attention; `options` are further arguments of it."""
    import natten.functional as F

    function = getattr(F, f"na{len(case.grid)}d")

    def run(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        return function(
            query, key, value, case.kernel, stride=case.stride, dilation=case.dilation,
            is_causal=case.is_causal, rpb=bias, backend=backend,
            **{"boundary": case.boundary, **options},
        )  # fmt: skip

    return run


def call_of(
    run: Attention, inputs: Sequence[Tensor], gradient: Tensor, pass_name: str
) -> Callable[[], tuple[Tensor, ...]]:
    """A pass as a function without arguments that returns its results."""
    if pass_name == "forward":
        return lambda: (run(*inputs),)
    return lambda: torch.autograd.grad(run(*inputs), inputs, gradient)
