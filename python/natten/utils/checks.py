"""`check_all_args` with a stride, as NATTEN 0.20 and newer has it here. `natten.utils` has that of
0.17, without."""

from __future__ import annotations

from natten import utils
from natten._args import Bools, Ints, window_options


def check_all_args(
    na_dim: int,
    kernel_size: Ints,
    stride: Ints | None,
    dilation: Ints | None,
    is_causal: Bools | None,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    """The four arguments as tuples of `na_dim` elements, one per spatial axis.

    Each may be one value for all axes, or a tuple or list; None is the default, 1 and False.
    Whether the values fit the lengths of the axes is for the operations to check.

    Raises:
        ValueError: na_dim is not 1, 2 or 3, or a sequence has another length.
        TypeError: elements that are not integers, or not bools for is_causal.
    """
    window, dilations, causal = utils.check_all_args(na_dim, kernel_size, dilation, is_causal)
    return window, window_options(na_dim, stride=stride)["stride"], dilations, causal


__all__ = ["check_all_args"]
