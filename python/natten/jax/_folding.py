"""vmap: folds the mapped axis of arrays into their batch or their heads, so that one call does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from natten._roles import Role, fold_dims

Mapped: TypeAlias = tuple[Role, Array, int | None]  # an input and its mapped axis, if it has one


@dataclasses.dataclass(frozen=True)
class Fold:
    """How the mapped axis of a call is folded."""

    dims: str  # into which dimension of a tensor, for `Role.axis_of`
    rank: int
    size: int  # of the mapped axis
    split: Any  # over which axes of a mesh it is split, as an entry of a PartitionSpec
    is_slower: bool  # than the dimension that it is folded into
    group: int  # heads that share a key-value head
    batch: int  # of one example...
    batch_split: Any  # ...and over which axes of a mesh it is split

    @classmethod
    def of(cls, inputs: Sequence[Mapped], outputs: Sequence[Role], rank: int) -> Fold:
        size, split = next(
            (x.shape[axis], jax.typeof(x).sharding.spec[axis])
            for _, x, axis in inputs
            if axis is not None
        )
        dims = fold_dims((role for role, _, axis in inputs if axis is not None), outputs)
        dims = dims.replace("B", "BM")
        # Of two dimensions that are merged only the slower one can be split over devices.
        is_slower = split is not None or not any(
            jax.typeof(x).sharding.spec[axis] is not None
            for role, x, mapped in inputs
            if (axis := _axis(role, dims, rank, mapped)) is not None
        )
        heads = {
            dim: x.shape[axis]
            for role, x, mapped in inputs
            for dim in "HG"
            if (axis := _axis(role, dim, rank, mapped)) is not None
        }
        group = heads["H"] // heads.get("G", heads["H"])
        batch, batch_split = next(
            (
                (x.shape[axis], jax.typeof(x).sharding.spec[axis])
                for role, x, mapped in inputs
                if (axis := _axis(role, "BM", rank, mapped)) is not None
            ),
            (1, None),  # a bias alone has none
        )
        return cls(dims, rank, size, split, is_slower, group, batch, batch_split)

    def has_place(self, role: Role) -> bool:
        """Whether an input of this role can differ by example."""
        return role.axis_of(self.dims, self.rank) is not None

    def fold(self, role: Role, x: Array, mapped: int | None) -> Array:
        """An input with its mapped axis folded."""
        axis = role.axis_of(self.dims, self.rank)
        if axis is None:  # all examples share it
            return x
        if role.is_mask:
            if (
                mapped is None and x.shape[0] == 1
            ):  # all of the batch, and of the examples, share it
                return x
            x, mapped = self._of_all_batch(x, mapped)
        if mapped is not None:
            x = jnp.moveaxis(x, mapped, 0)
        elif self.split is None:
            x = jax.lax.broadcast(x, (self.size,))
        else:
            sharding = jax.typeof(x).sharding
            sharding = NamedSharding(sharding.mesh, PartitionSpec(self.split, *sharding.spec))
            x = jax.lax.broadcast(x, (self.size,), out_sharding=sharding)
        before, dim, after = x.shape[1 : axis + 1], x.shape[axis + 1], x.shape[axis + 2 :]
        if self.is_slower:
            x = jnp.moveaxis(x, 0, axis)
        else:
            group = self._group_of(role)
            if group:
                x = x.reshape(self.size, *before, dim // math.prod(group), *group, *after)
            x = jnp.moveaxis(x, 0, axis + 1)
        return x.reshape(*before, self.size * dim, *after)

    def _of_all_batch(self, mask: Array, mapped: int | None) -> tuple[Array, int | None]:
        """A mask as large as the batch, which all of the batch may have shared."""
        if mapped is None or self.batch == 1:
            return mask, mapped
        mask = jnp.moveaxis(mask, mapped, 1)  # [batch or 1, examples, *keys]
        if mask.shape[0] == self.batch:
            return mask, 1
        sharding = None
        if self.batch_split is not None:
            of_mask = jax.typeof(mask).sharding
            spec = PartitionSpec(self.batch_split, *of_mask.spec[1:])
            sharding = NamedSharding(of_mask.mesh, spec)
        return jax.lax.broadcast(mask[0], (self.batch,), out_sharding=sharding), 1

    def unfold(self, role: Role, x: Array) -> tuple[Array, int]:
        """An output with the mapped axis again, and where it is."""
        axis = role.axis_of(self.dims, self.rank)
        assert axis is not None, "a wanted gradient of a bias folds into the heads"
        before, dim, after = x.shape[:axis], x.shape[axis] // self.size, x.shape[axis + 1 :]
        if self.is_slower:
            return x.reshape(*before, self.size, dim, *after), axis
        group = self._group_of(role)
        x = x.reshape(*before, dim // math.prod(group), self.size, *group, *after)
        x = jnp.moveaxis(x, axis + 1, 0)
        return x.reshape(self.size, *before, dim, *after), 0

    def shape(self, role: Role, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of an output with the mapped axis folded."""
        axis = role.axis_of(self.dims, self.rank)
        assert axis is not None
        return (*shape[:axis], self.size * shape[axis], *shape[axis + 1 :])

    def _group_of(self, role: Role) -> tuple[int, ...]:
        """Heads in a row that stay together, as they share a key-value head, if there are any."""
        has_group = self.group > 1 and "B" not in self.dims and "H" in role.dims
        return (self.group,) if has_group else ()


def _axis(role: Role, dims: str, rank: int, mapped: int | None) -> int | None:
    """`Role.axis_of` in an array that may have a mapped axis besides."""
    axis = role.axis_of(dims, rank)
    return axis if axis is None or mapped is None or axis < mapped else axis + 1
