"""`merge_attentions` of every adapter, by the functions that numpy, PyTorch and JAX spell alike."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any


def merge(
    xp: Any,
    outputs: Sequence[Any],
    lses: Sequence[Any],
    constant: Callable[[Any], Any] = lambda x: x,
) -> tuple[Any, Any]:
    """(output, logsumexp) of results over disjoint sets of keys, in the types that sums have.

    docs/semantics.md has the rule. xp: numpy, torch or jax.numpy. constant: takes an array out of
    differentiation.
    """
    # Any shift gives the same result; this one keeps exp in range. It must be finite, as neither
    # -inf - -inf (all sets are empty) nor inf - inf is a number.
    top = constant(functools.reduce(xp.maximum, lses))
    shift = xp.where(xp.isfinite(top), top, xp.zeros_like(top))
    weights = [xp.exp(lse - shift) for lse in lses]
    total = functools.reduce(operator.add, weights)
    is_empty = total == 0
    total = xp.where(
        is_empty, xp.ones_like(total), total
    )  # keeps gradients of both branches finite
    lse = xp.where(is_empty, xp.full_like(total, -math.inf), shift + xp.log(total))
    # The output of a set without keys may hold anything, NaN too.
    terms = (
        xp.where((own == -math.inf)[..., None], xp.zeros_like(output), output)
        * (weight / total)[..., None]
        for own, weight, output in zip(lses, weights, outputs, strict=True)
    )
    return functools.reduce(operator.add, terms), lse
