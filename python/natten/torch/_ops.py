"""libnatten's operations as PyTorch operators `torch.ops.natten.*`, without derivatives.

They go through PyTorch's dispatcher, not straight to the binding: it resolves what a tensor's
memory alone does not show (conjugate and negative views, wrapper subclasses).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from natten import _core

_library = torch.library.Library("natten", "DEF")

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Spec = tuple[Sequence[int], str]


def _readable(x: Tensor | None) -> Tensor | None:
    """`x` with an innermost stride of 1, which is all that the kernels ask of a layout."""
    if x is None or x.dim() == 0 or x.stride(-1) == 1 or x.shape[-1] <= 1:
        return x
    return x.contiguous()


def _run(
    op: str,
    config: Sequence[int],
    scale: float | None,
    backend: str,
    inputs: Sequence[Tensor | None],
    outputs: Sequence[bool | Spec | None],
) -> list[Tensor | None]:
    """Checks a call, allocates its outputs and runs it. `outputs`: True or a spec where wanted."""
    inputs = [_readable(x) for x in inputs]
    specs, _ = _core.plan(op, config, scale, backend, inputs, outputs)
    device = next(x.device for x in inputs if x is not None)
    results = [
        None if spec is None else torch.empty(spec[0], dtype=_DTYPES[spec[1]], device=device)
        for spec in specs
    ]
    _core.run(op, config, scale, backend, inputs, results, torch.get_num_threads())
    return results


def _define(schema: str):
    """Registers the decorated function as the kernel of `torch.ops.natten.<its name>`."""

    def register(kernel):
        name = kernel.__name__
        _library.define(f"{name}{schema}")
        _library.impl(name, kernel, "CPU")
        _library.impl(name, kernel, "CUDA")
        return getattr(torch.ops.natten, name).default

    return register


_FUSED_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? rpb, "
    "Tensor? additional_keys, Tensor? additional_values"
)
_OPTIONS = "int[] config, float? scale, str backend"


@_define(f"({_FUSED_INPUTS}, {_OPTIONS}) -> (Tensor output, Tensor logsumexp)")
def attention_forward(*args):
    *inputs, config, scale, backend = args
    return tuple(_run("attention_forward", config, scale, backend, inputs, [True, True]))


@_define(
    f"({_FUSED_INPUTS}, Tensor logsumexp, Tensor grad_output, Tensor? grad_logsumexp, "
    f"{_OPTIONS}, bool[] wanted) -> Tensor[]"
)
def attention_backward(*args):
    """The gradients of the first six arguments of which `wanted` is true, in that order."""
    *inputs, config, scale, backend, wanted = args
    outputs = [True if want else None for want in wanted]
    results = _run("attention_backward", config, scale, backend, inputs, outputs)
    return [result for result in results if result is not None]


@_define(
    "(Tensor query, Tensor key, Tensor? rpb, Tensor? additional_keys, int[] config, str backend)"
    " -> Tensor"
)
def qk(*args):
    *inputs, config, backend = args
    return _run("qk", config, None, backend, inputs, [True])[0]


@_define(
    "(Tensor attn, Tensor value, Tensor? additional_values, int[] config, str backend) -> Tensor"
)
def av(*args):
    *inputs, config, backend = args
    return _run("av", config, None, backend, inputs, [True])[0]


@_define(
    "(Tensor attn, Tensor query, int[] key_grid, int additional, int[] config, str backend)"
    " -> (Tensor, Tensor)"
)
def av_transpose(attn, query, key_grid, additional, config, backend):
    """`(key [B, H, *key_grid, D], additional_keys [B, H, additional, D])`."""
    batch, heads, dim = query.shape[0], query.shape[1], query.shape[-1]
    dtype = DTYPE_NAMES[query.dtype]
    specs = [((batch, heads, *grid, dim), dtype) for grid in (key_grid, (additional,))]
    return tuple(_run("av_transpose", config, None, backend, [attn, query], specs))


@_define("(Tensor rpb, int[] attn_shape, int[] config, str backend) -> Tensor")
def rpb_gather(rpb, attn_shape, config, backend):
    spec = (tuple(attn_shape), DTYPE_NAMES[rpb.dtype])
    return _run("rpb_gather", config, None, backend, [rpb], [spec])[0]


@_define("(Tensor attn, int[] config, str backend) -> Tensor")
def rpb_scatter(attn, config, backend):
    return _run("rpb_scatter", config, None, backend, [attn], [True])[0]
