"""The tensors of libnatten's operations, from its own table (libnatten/include/natten/roles.h)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from natten import _core

GRIDS = "QKR"  # the letters of `Role.dims` that stand for one axis per rank


@dataclasses.dataclass(frozen=True)
class Role:
    """One tensor of an operation."""

    name: str
    dims: str
    is_output: bool
    is_required: bool
    is_statistic: bool
    is_mask: bool

    def axis_of(self, dims: str, rank: int) -> int | None:
        """The axis of the first of `dims` that the tensor has, or None."""
        axis = 0
        for dim in self.dims:
            if dim in dims:
                return axis
            axis += rank if dim in GRIDS else 1
        return None

    def ndim(self, rank: int) -> int:
        return sum(rank if dim in GRIDS else 1 for dim in self.dims)


def roles_of(op: str) -> tuple[tuple[Role, ...], tuple[Role, ...]]:
    """(inputs, outputs) of an operation, in the order in which the binding takes them."""
    roles = [Role(*row) for row in _core.roles(op)]
    return tuple(r for r in roles if not r.is_output), tuple(r for r in roles if r.is_output)


def fold_dims(mapped: Iterable[Role], wanted: Iterable[Role]) -> str:
    """The dimension that vmap folds a mapped axis into, for `Role.axis_of`: the batch, or the heads
    where each example has a bias, or a gradient of one, of its own. `mapped` are the inputs that
    have the axis, `wanted` the outputs.

    In both the mapped axis is the slower one. That keeps the heads that share a key-value head
    together, as both kinds of heads are folded alike.
    """
    return "HG" if any("R" in role.dims for role in (*mapped, *wanted)) else "B"
