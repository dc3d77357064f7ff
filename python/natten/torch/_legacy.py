"""Names from other NATTEN versions, as thin calls of the functions that do the work.

The migration page (docs/migration.md) says what to write in new code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from numbers import Integral
from typing import Any, Never, Unpack

from torch import SymInt, Tensor

from natten._args import Bools, Ints, UpstreamKeywords, by_name, check_extra, named
from natten.torch import _ops
from natten.torch._functional import (
    na1d,
    na1d_av,
    na1d_qk,
    na2d,
    na2d_av,
    na2d_qk,
    na3d,
    na3d_av,
    na3d_qk,
)
from natten.torch._private import refuses_script

_FUSED = {1: na1d, 2: na2d, 3: na3d}
_QK = {1: na1d_qk, 2: na2d_qk, 3: na3d_qk}


def _takes_depth(name: str, function: Callable[..., Tensor], first: int) -> Callable[..., Tensor]:
    """The function of rank 3, which also takes sizes as NATTEN has them for `name`: kernel_size_d,
    kernel_size, dilation_d and dilation, after `first` tensors or by name."""

    @functools.wraps(function)
    def takes(*args: Any, **kwargs: Any) -> Tensor:
        sizes = args[first : first + 4]
        if len(sizes) == 4 and all(isinstance(size, Integral | SymInt) for size in sizes):
            kernel_size_d, kernel_size, dilation_d, dilation = sizes
            window = (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)
            args = (*args[:first], *window, *args[first + 4 :])
        for option in ("kernel_size", "dilation"):
            depth, size = kwargs.pop(f"{option}_d", None), kwargs.get(option)
            if depth is not None and size is not None:
                kwargs[option] = (depth, size, size)
            elif depth is not None:
                raise TypeError(
                    f"{option}_d: got {depth!r} and no {option} by name; must be given both, or "
                    f"{option} as a tuple, ({option}_d, {option}, {option})"
                )
        return function(*args, **kwargs)

    takes.__name__ = takes.__qualname__ = name
    return takes


def _make_qk_with_bias(rank: int):
    @refuses_script
    @named("na{rank}d_qk_with_bias", rank, "natten.functional")
    def qk_with_bias(
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        kernel_size: Ints,
        dilation: Ints,
        additional_keys: Tensor | None = None,
    ) -> Tensor:
        """`na{rank}d_qk` as NATTEN 0.15 called it: `bias` is its `rpb`, or None."""
        return _QK[rank](
            query, key, kernel_size, dilation, additional_keys=additional_keys, rpb=bias
        )

    return qk_with_bias


def _make_qkrpb(rank: int):
    @refuses_script
    @named("natten{rank}dqkrpb", rank, "natten.functional")
    def qkrpb(
        query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: Ints, dilation: Ints
    ) -> Tensor:
        """`na{rank}d_qk` as NATTEN 0.14 called it; `rpb` may be None."""
        return _QK[rank](query, key, kernel_size, dilation, rpb=rpb)

    return qkrpb


na1d_qk_with_bias, na2d_qk_with_bias, na3d_qk_with_bias = map(_make_qk_with_bias, (1, 2, 3))
na3d_qk_with_bias = _takes_depth("na3d_qk_with_bias", na3d_qk_with_bias, 3)
natten1dqkrpb, natten2dqkrpb, natten3dqkrpb = map(_make_qkrpb, (1, 2, 3))
natten3dqkrpb = _takes_depth("natten3dqkrpb", natten3dqkrpb, 3)
# These differ from today's functions in the name only, those of rank 3 in what they take besides.
natten1dqk, natten2dqk, natten3dqk = na1d_qk, na2d_qk, _takes_depth("natten3dqk", na3d_qk, 2)
natten1dav, natten2dav, natten3dav = na1d_av, na2d_av, _takes_depth("natten3dav", na3d_av, 2)


class _Function:
    """The name of an autograd function of NATTEN 0.14, of which code calls `apply`."""

    apply: Callable[..., Tensor]


def _function(name: str, apply: Callable[..., Tensor]) -> type[_Function]:
    about = {"__doc__": _Function.__doc__, "__module__": "natten.functional"}
    return type(name, (_Function,), {**about, "apply": staticmethod(apply)})


NATTEN1DQKRPBFunction = _function("NATTEN1DQKRPBFunction", natten1dqkrpb)
NATTEN2DQKRPBFunction = _function("NATTEN2DQKRPBFunction", natten2dqkrpb)
NATTEN3DQKRPBFunction = _function("NATTEN3DQKRPBFunction", natten3dqkrpb)
NATTEN1DAVFunction = _function("NATTEN1DAVFunction", natten1dav)
NATTEN2DAVFunction = _function("NATTEN2DAVFunction", natten2dav)
NATTEN3DAVFunction = _function("NATTEN3DAVFunction", natten3dav)


@refuses_script
@by_name
def neighborhood_attention_generic(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    *by_position: Never,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    backend: str | None = None,
    q_tile_shape: Ints | None = None,
    kv_tile_shape: Ints | None = None,
    backward_q_tile_shape: Ints | None = None,
    backward_kv_tile_shape: Ints | None = None,
    backward_kv_splits: Ints | None = None,
    return_lse: bool = False,
    **upstream: Unpack[UpstreamKeywords],
) -> Tensor | tuple[Tensor, Tensor]:
    """`na1d`, `na2d` or `na3d`, by the rank of `query`. Heads-last.

    Args:
        query: [batch, *spatial, heads, head_dim] with one to three spatial axes.
        key, value, kernel_size, stride, dilation, is_causal, scale, additional_keys,
        additional_values, backend, q_tile_shape, kv_tile_shape, backward_q_tile_shape,
        backward_kv_tile_shape, backward_kv_splits, return_lse, and the names of NATTEN's kernels:
            as in `na2d`, by name after kernel_size.

    Returns:
        output [batch, *spatial, heads, value_head_dim]; with return_lse also logsumexp
        [batch, *spatial, heads].

    Raises:
        ValueError, TypeError: as `na2d`.
    """
    if by_position:
        check_extra("neighborhood_attention_generic", by_position)
    return _FUSED[_ops.rank_of(query)](
        query,
        key,
        value,
        kernel_size,
        stride=stride,
        dilation=dilation,
        is_causal=is_causal,
        scale=scale,
        additional_keys=additional_keys,
        additional_values=additional_values,
        return_lse=return_lse,
        backend=backend,
        q_tile_shape=q_tile_shape,
        kv_tile_shape=kv_tile_shape,
        backward_q_tile_shape=backward_q_tile_shape,
        backward_kv_tile_shape=backward_kv_tile_shape,
        backward_kv_splits=backward_kv_splits,
        **upstream,
    )
