"""Helpers for code around the operations. Imports neither PyTorch nor JAX."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from natten._args import Bools, Ints, integer, per_axis, window_options
from natten.context import get_device_cc
from natten.utils import log


def __getattr__(name: str) -> ModuleType:
    if name in ("checks", "device", "varlen"):  # the last of which loads PyTorch
        return import_module(f"natten.utils.{name}")
    raise AttributeError(f"module 'natten.utils' has no attribute {name!r}")


def check_all_args(
    na_dim: int, kernel_size: Ints, dilation: Ints | None, is_causal: Bools | None
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    """The three arguments as tuples of `na_dim` elements, one per spatial axis.

    Each may be one value for all axes, or a tuple or list; None is the default, 1 and False.
    Whether the values fit the lengths of the axes is for the operations to check.

    Raises:
        ValueError: na_dim is not 1, 2 or 3, or a sequence has another length.
        TypeError: elements that are not integers, or not bools for is_causal.
    """
    if integer("na_dim", na_dim) not in (1, 2, 3):
        raise ValueError(f"na_dim: got {na_dim!r}; must be 1, 2 or 3")
    window = window_options(na_dim, kernel_size=kernel_size, dilation=dilation, is_causal=is_causal)
    return window["kernel_size"], window["dilation"], window["is_causal"]


def get_num_na_weights(kernel_size: Sequence[int]) -> int:
    """Attention weights per token: the product of a kernel size given per axis.

    Raises:
        TypeError: one integer, which does not tell the number of axes.
    """
    if not isinstance(kernel_size, Sequence):
        raise TypeError(f"kernel_size: got {kernel_size!r}; must be a tuple, one element per axis")
    return math.prod(per_axis("kernel_size", kernel_size, len(kernel_size)))


__all__ = ["check_all_args", "get_device_cc", "get_num_na_weights", "log"]
