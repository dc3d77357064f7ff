"""Nested tensors: a batch of examples that differ in size.

They run in one parallel region, unless a gradient is wanted or the backend is `composed`: then each
is a call of its own, which PyTorch differentiates. Where gradients are wanted, or on CUDA, where a
parallel region is a launch for each, sequences of fused attention are one call of an operator that
has a derivative (`_packing.py`), in which they lie one after another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from natten import _core
from natten._args import PART_OPTIONS, SEPARATE_KEY_GRID, Config, options_of
from natten._choices import tell
from natten._log import TELLS_CHOICES
from natten._roles import Role
from natten.torch import _ops
from natten.torch._private import any_requires_grad, nested_view_from_buffer


def call(operator: _ops.Operator, *args: Any, composed: Callable[..., Any] | None = None) -> Any:
    """Calls an operator without extras, or what computes the same; every output is nested, laid out
    like the first input.

    An example has no batch axis, so that a nested tensor has as many dimensions as a dense one, or,
    in the strided layout, a batch axis of its own.
    """
    inputs, _, config, scale, backend = operator.split(args)
    for option in PART_OPTIONS:
        if (given := options_of(config).get(option.name)) is not None:
            raise ValueError(
                f"{option.name}: got {list(given)} for nested tensors, of which each example has a "
                "grid of its own; must be None"
            )
    first = inputs[0]
    has_own_batch = first.dim() == 1 + operator.inputs[0].ndim(config[0])
    wants_gradient = torch.is_grad_enabled() and any_requires_grad(*inputs)
    is_fused = operator is _ops.attention_forward and not composed
    if is_fused and not has_own_batch and (wants_gradient or first.is_cuda):
        packed_results = _call_packed(inputs, config, scale, backend)
        if packed_results is not None:
            return packed_results
    columns = [
        _examples(role, x, first, has_own_batch)
        for role, x in zip(operator.inputs, inputs, strict=True)
    ]
    examples = list(zip(*columns, strict=True))
    if composed or wants_gradient:
        options = args[len(inputs) :]
        results = [(composed or operator)(*example, *options) for example in examples]
        if len(operator.outputs) == 1:
            results = [(x,) for x in results]
        wholes = tuple(
            joined([x if has_own_batch else x.squeeze(0) for x in parts], first)
            for parts in zip(*results, strict=True)
        )
        return wholes if len(wholes) > 1 else wholes[0]
    sizes = [operator.sizes(x, {}, config) for x in examples]
    results = []
    for role in operator.outputs:
        shapes = [_ops.shape_of(role, s) for s in sizes]
        if not has_own_batch:
            shapes = [shape[1:] for shape in shapes]
        results.append(_empty(first, shapes, _ops.dtype_of(role, first.dtype)))
    outputs = zip(
        *([x if has_own_batch else x.unsqueeze(0) for x in parts] for _, parts in results),
        strict=True,
    )

    run_all(operator, list(zip(examples, outputs, strict=True)), config, scale, backend)
    nested = tuple(whole for whole, _ in results)
    return nested if len(nested) > 1 else nested[0]


def run_all(
    operator: _ops.Operator,
    calls: Sequence[tuple[Sequence[Tensor | None], Sequence[Tensor | None]]],
    config: Config,
    scale: float | None,
    backend: str,
) -> None:
    """Runs an operator's kernel for many (inputs, outputs), in one parallel region."""
    first = calls[0][0][0]
    assert first is not None  # of every operator

    def allocate(shape: tuple[int, ...], dtype: str) -> Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=first.device)

    _core.run_all(
        operator.name,
        config,
        scale,
        backend,
        calls,
        torch.get_num_threads(),
        allocate,
        _ops.stream_of(first) if first.is_cuda else None,
    )
    if TELLS_CHOICES:
        for tensors in calls:
            tell(operator.name, config, scale, backend, *tensors, str(first.device))


def _call_packed(
    inputs: Sequence[Tensor | None], config: Config, scale: float | None, backend: str
) -> tuple[Tensor, Tensor] | None:
    """Fused attention of sequences by one call, or None where that does not take them."""
    query, key, value, rpb, *additional, mask = inputs
    assert query is not None and key is not None and value is not None  # nobody has asked for less
    if config[0] != 1 or any(x is not None for x in additional):
        return None
    if rpb is not None and (rpb.is_nested or (torch.is_grad_enabled() and rpb.requires_grad)):
        return None
    nested = [query, key, value, *([] if mask is None else [mask])]
    if not all(_holds_sequences(x, query.layout) for x in nested):
        return None
    read: dict[int, list[int]] = {}  # of tensors that share their lengths
    queries, keys, *others = (_ends_of(x, read) for x in nested)
    packed = [_joined_tokens(x) for x in nested]
    # What is wrong where these do not fit, calls for each example say.
    has_one_grid = not config[-1] & SEPARATE_KEY_GRID
    if any(x != keys for x in others) or (has_one_grid and queries != keys):
        return None
    if len(queries) != len(keys) or any(a == b for a, b in itertools.pairwise(keys)):
        return None
    for tokens, ends in zip(packed, (queries, keys, *others), strict=True):
        if (ends[0], ends[-1]) != (0, tokens.shape[1]):
            return None
    output, logsumexp = _ops.packed_attention_forward(
        *packed[:3], rpb, None, None, packed[3] if len(packed) > 3 else None,
        *(torch.tensor(ends, device="cpu") for ends in (queries, keys)), None, None,
        config, scale, backend,
    )  # fmt: skip
    return _cut(output, queries, query), _cut(logsumexp, queries, query)


def _holds_sequences(x: Tensor, layout: torch.layout) -> bool:
    """Whether it is nested so, and its examples are [length, ...], alike in all else."""
    if not x.is_nested or x.layout != layout:
        return False
    if x.layout == torch.jagged:
        return _ragged_axis(x) == 0 and x.lengths() is None  # type: ignore[attr-defined]
    return len({part.shape[1:] for part in x.unbind()}) == 1


def _ends_of(x: Tensor, read: dict[int, list[int]]) -> list[int]:
    """0, and where each sequence ends; `read`: what has been read of offsets, which may lie on a
    device."""
    if x.layout != torch.jagged:
        return [0, *itertools.accumulate(part.shape[0] for part in x.unbind())]
    offsets = x.offsets()  # type: ignore[attr-defined]
    if id(offsets) not in read:
        read[id(offsets)] = offsets.tolist()
    return read[id(offsets)]


def _joined_tokens(x: Tensor) -> Tensor:
    """[1, sum of lengths, ...], the tokens of sequences."""
    return (x.values() if x.layout == torch.jagged else torch.cat(x.unbind())).unsqueeze(0)


def _cut(tokens: Tensor, ends: list[int], like: Tensor) -> Tensor:
    """The inverse of `_joined_tokens`, for a tensor laid out as another one."""
    if like.layout == torch.jagged:
        return torch.nested.nested_tensor_from_jagged(tokens[0], offsets=like.offsets())  # type: ignore[attr-defined]
    lengths = [b - a for a, b in itertools.pairwise(ends)]
    return torch.nested.as_nested_tensor(list(tokens[0].split(lengths)))


def _examples(
    role: Role, x: Tensor | None, first: Tensor, has_own_batch: bool
) -> list[Tensor | None]:
    """The parts of an input, one per example, with a batch axis."""
    count = first.size(0)
    if x is None or not (role.is_mask or "B" in role.dims):  # a bias that all examples share
        if x is not None and x.is_nested:
            raise ValueError(
                f"{role.name}: got a nested tensor; must be dense, one for all examples"
            )
        return [x] * count
    if not x.is_nested and (role.is_required or role.is_mask or has_own_batch):
        raise ValueError(f"{role.name}: got a dense tensor; must be nested, as the others are")
    if x.size(0) != count:
        raise ValueError(f"{role.name}: got {x.size(0)} examples; must be {count}, to match others")
    return [_ops.readable(part if has_own_batch else part.unsqueeze(0)) for part in x.unbind()]


def joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """A nested tensor of these parts, laid out as another one; PyTorch differentiates it."""
    if like.layout != torch.jagged:
        return torch.nested.as_nested_tensor(list(parts))
    axis, offsets, lengths = _ragged_axis(like), like.offsets(), like.lengths()  # type: ignore[attr-defined]
    pieces = list(parts)
    if lengths is not None:  # there may be gaps
        shape, end, pieces = list(parts[0].shape), 0, []
        for part, start in zip(parts, offsets.tolist(), strict=False):
            shape[axis] = start - end
            pieces += [part.new_zeros(shape), part]
            end = start + part.shape[axis]
        shape[axis] = like.values().shape[axis] - end
        pieces.append(parts[0].new_zeros(shape))
    return torch.nested.nested_tensor_from_jagged(
        torch.cat(pieces, axis), offsets=offsets, lengths=lengths, jagged_dim=axis + 1
    )


def _ragged_axis(x: Tensor) -> int:
    """The axis that differs from example to example, counted without that of the examples."""
    return next(i for i, n in enumerate(x.shape) if isinstance(n, torch.SymInt)) - 1


def _empty(
    first: Tensor, shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """(a nested tensor laid out like `first`, its parts)."""
    if first.layout != torch.jagged:
        return _empty_strided(shapes, dtype, first.device)
    axis = _ragged_axis(first)
    shape = list(shapes[0])
    shape[axis] = first.values().shape[axis]
    whole = torch.nested.nested_tensor_from_jagged(
        torch.empty(shape, dtype=dtype, device=first.device),
        offsets=first.offsets(),  # type: ignore[attr-defined]
        lengths=first.lengths(),  # type: ignore[attr-defined]
        jagged_dim=axis + 1,
    )
    return whole, list(whole.unbind())


def _empty_strided(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """What `torch.nested.as_nested_tensor` makes of parts, without copying them."""
    counts = [math.prod(shape) for shape in shapes]
    buffer = torch.empty(sum(counts), dtype=dtype, device=device)
    parts = [x.view(s) for x, s in zip(buffer.split(counts), shapes, strict=True)]
    layout = shapes, [x.stride() for x in parts], [x.storage_offset() for x in parts]
    # On the host, whatever the default device is.
    whole = nested_view_from_buffer(buffer, *(torch.tensor(x, device="cpu") for x in layout))
    return whole, parts
