"""Ways to compute neighborhood attention, for cpu.py. They take and return heads-last tensors.

PyTorch's attention wants heads first: the transposes are part of each call, and are views.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from cases import PASSES, Attention, Case, ours, tensors_of
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import natten.functional as F

Inputs = Sequence[Tensor]

# Of the norm of the difference to the norm of our result, by which a way may be off.
TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


class Skip(Exception):
    """Why a way cannot compute a case."""


class Wrong(Skip):
    """A way computed something else."""


def check(results: Inputs, references: Inputs) -> None:
    for result, reference in zip(results, references, strict=True):
        if result.shape != reference.shape:
            raise Wrong(f"WRONG: shape {list(result.shape)} instead of {list(reference.shape)}")
        difference = (result.double() - reference.double()).norm() / reference.double().norm()
        if not difference < TOLERANCES[str(reference.dtype).removeprefix("torch.")]:
            raise Wrong(f"WRONG: differs from ours by {difference:.1e}")


def heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.flatten(1, -3).transpose(1, 2) for x in tensors]


def heads_last(case: Case, x: Tensor) -> Tensor:
    return x.transpose(1, 2).unflatten(1, case.grid)


def sees(case: Case, query: Tensor, key: Tensor) -> Tensor:
    """Whether a token sees another, both given as numbers in row-major order."""
    seen = []
    for axis, length in reversed(list(enumerate(case.grid))):
        begin, end = case.window(axis, query % length)
        position = key % length // case.dilation
        seen += [position >= begin, position < end]
        if case.dilation > 1:
            seen += [query % length % case.dilation == key % length % case.dilation]
        query, key = query // length, key // length
    return torch.stack(torch.broadcast_tensors(*seen)).all(0) if False else _all(seen)


def _all(conditions: list[Tensor]) -> Tensor:
    result = conditions[0]
    for condition in conditions[1:]:
        result = result & condition
    return result
