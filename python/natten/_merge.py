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
    clear: Callable[[Any, Any], Any],
    constant: Callable[[Any], Any] = lambda x: x,
) -> tuple[Any, Any]:
    """(output, logsumexp) of results over disjoint sets of keys, in the types that sums have.

    docs/semantics.md has the rule. xp: numpy, torch or jax.numpy. clear(mask, array): the array
    with 0 where the mask, which broadcasts, is true. constant: takes an array out of
    differentiation.
    """
    # Any shift gives the same result; this one keeps exp in range. It must be finite, as neither
    # -inf - -inf (all sets are empty) nor inf - inf is a number.
    top = constant(functools.reduce(xp.maximum, lses))
    shift = xp.where(xp.isfinite(top), top, xp.zeros_like(top))
    # A set without keys has weight 0, and its output may hold anything, NaN too. Masks on both
    # sides of exp and of the product keep its gradients 0 as well.
    empty = [lse == -math.inf for lse in lses]
    weights = [
        clear(none, xp.exp(clear(none, lse) - shift)) for none, lse in zip(empty, lses, strict=True)
    ]
    total = functools.reduce(operator.add, weights)
    all_empty = total == 0
    total = xp.where(all_empty, xp.ones_like(total), total)  # keeps both gradients finite
    lse = xp.where(all_empty, xp.full_like(total, -math.inf), shift + xp.log(total))
    # What is cleared of a product need not be kept for its derivative, as the inputs are.
    terms = (
        clear(none[..., None], output * clear(none, weight / total)[..., None])
        for none, weight, output in zip(empty, weights, outputs, strict=True)
    )
    return functools.reduce(operator.add, terms), lse
