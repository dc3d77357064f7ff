"""What the parts of a grid that is split over devices need of each other.

A device that has a part of the queries, keys and values needs more keys and values than these: the
*halo*, which the windows of its queries reach beyond its part. It comes from as many neighbors as
the windows reach. Every device has an extended part of one shape, so that one program serves all;
where nobody needs a token of it, as beyond a border of the grid, there is nothing sent and it is 0.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natten._halos import axis_of

Axes: TypeAlias = tuple[str, ...]  # of a mesh
Arrays: TypeAlias = tuple[Array, ...]


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Tokens next to each other of an extended part, which come from one neighbor."""

    begin: int
    end: int
    step: int  # how many parts further the neighbor is
    parts: tuple[int, ...]  # that need them


@dataclasses.dataclass(frozen=True)
class Halo:
    """Of one axis of the grid."""

    mesh_axes: tuple[tuple[str, int], ...]  # that split it, with their sizes; the slowest first
    places: tuple[int, ...]  # of each part among the devices of these axes in the mesh's order
    name: Any  # of these axes in the mesh's order, as JAX's collectives take it
    length: int  # of a part
    before: int  # tokens of an extended part before the part itself...
    after: int  # ...and behind it
    stretches: tuple[Stretch, ...]

    def begin(self) -> Array:
        """The first token of the part of the device that asks."""
        part: Any = 0
        for name, size in self.mesh_axes:
            part = part * size + jax.lax.axis_index(name)
        return part * self.length

    def received(self, arrays: Arrays, axis: int) -> Iterator[tuple[int, Arrays]]:
        """Where something of other parts belongs in the extended parts, and what it is of each
        array, in one message. Devices that do not need it receive 0."""
        for stretch in self.stretches:
            begin, end = (
                place - self.before - stretch.step * self.length
                for place in (stretch.begin, stretch.end)
            )
            sent = [jax.lax.slice_in_dim(x, begin, end, axis=axis) for x in arrays]
            count = len(self.places)
            pairs = [
                (self.places[(part + stretch.step) % count], self.places[part])
                for part in stretch.parts
            ]
            if len(sent) == 1:
                yield stretch.begin, (jax.lax.ppermute(sent[0], self.name, pairs),)
                continue
            message = jnp.concatenate([x.ravel() for x in sent])
            ends = np.cumsum([x.size for x in sent])[:-1].tolist()
            flat = jnp.split(jax.lax.ppermute(message, self.name, pairs), ends)
            yield (
                stretch.begin,
                tuple(y.reshape(x.shape) for x, y in zip(sent, flat, strict=True)),
            )

    def padded(self, x: Array, axis: int, begin: int) -> Array:
        """`x`, which begins at some place of the extended part, and 0 elsewhere."""
        padding = [(0, 0, 0)] * x.ndim
        whole = self.before + self.length + self.after
        padding[axis] = (begin, whole - begin - x.shape[axis], 0)
        return jax.lax.pad(x, jnp.zeros((), x.dtype), padding)


# Per axis of a grid; None where it is not split.
Halos: TypeAlias = tuple[Halo | None, ...]


def _written(arrays: Arrays, halo: Halo, axis: int) -> Arrays:
    """Parts with their halos along an axis of the arrays."""
    results = [halo.padded(x, axis, halo.before) for x in arrays]
    for begin, received in halo.received(arrays, axis):
        # Not by concatenate, which makes XLA of JAX 0.6 end the process where handlers read it.
        results = [
            jax.lax.dynamic_update_slice_in_dim(x, y, begin, axis)
            for x, y in zip(results, received, strict=True)
        ]
    return tuple(results)


def _added(arrays: Arrays, halo: Halo, axis: int) -> Arrays:
    """The same by a sum. Its transpose, which sends home what belongs to halos, takes slices
    only; under check_vma JAX 0.6 has none of dynamic_update_slice."""
    results = [halo.padded(x, axis, halo.before) for x in arrays]
    for begin, received in halo.received(arrays, axis):
        results = [x + halo.padded(y, axis, begin) for x, y in zip(results, received, strict=True)]
    return tuple(results)


_extended = jax.custom_jvp(_written, nondiff_argnums=(1, 2))


@_extended.defjvp
def _extended_jvp(halo: Halo, axis: int, primals: Any, tangents: Any) -> tuple[Arrays, Arrays]:
    (arrays,), (of_arrays,) = primals, tangents
    return _extended(arrays, halo, axis), _added(of_arrays, halo, axis)


def _together(
    function: Callable[[Arrays, int], Arrays],
    arrays: Sequence[Any],
    first_axes: Sequence[int | None],
) -> list[Any]:
    """`function(arrays, axis)` of those arrays together that are of one type and have the grid at
    the same axis. What is None, or has no grid, stays as it is."""
    kinds = [
        None if x is None or axis is None else (x.dtype, axis)
        for x, axis in zip(arrays, first_axes, strict=True)
    ]
    results = list(arrays)
    for kind in dict.fromkeys(kinds):
        if kind is None:
            continue
        at = [i for i, other in enumerate(kinds) if other == kind]
        found = function(tuple(arrays[i] for i in at), kind[1])
        for i, x in zip(at, found, strict=True):
            results[i] = x
    return results


def extended(arrays: Sequence[Any], halos: Halos, first_axes: Sequence[int | None]) -> list[Any]:
    """Parts of keys and what comes with them, with their halos. `first_axes`: those of the grid."""

    def of_kind(arrays: Arrays, first_axis: int) -> Arrays:
        function = _extended if jnp.issubdtype(arrays[0].dtype, jnp.inexact) else _written
        for axis, halo in enumerate(halos, first_axis):
            if halo is not None:
                arrays = function(arrays, halo, axis)
        return arrays

    return _together(of_kind, arrays, first_axes)


def extended_shape(shape: Sequence[int], halos: Halos, first_axis: int) -> tuple[int, ...]:
    more = [0 if halo is None else halo.before + halo.after for halo in halos]
    rest = len(shape) - first_axis - len(more)
    return tuple(np.add(shape, [*[0] * first_axis, *more, *[0] * rest]).tolist())


def sent_home(arrays: Sequence[Any], halos: Halos, first_axes: Sequence[int | None]) -> list[Any]:
    """The transpose of `extended`: what belongs to halos is added to the parts that it is of."""

    def of_kind(arrays: Arrays, first_axis: int) -> Arrays:
        for axis, halo in reversed(list(enumerate(halos, first_axis))):
            if halo is not None:
                function = functools.partial(_added, halo=halo, axis=axis)
                parts = tuple(
                    jax.ShapeDtypeStruct(
                        (*x.shape[:axis], halo.length, *x.shape[axis + 1 :]), x.dtype
                    )
                    for x in arrays
                )
                (arrays,) = jax.linear_transpose(function, parts)(arrays)
        return arrays

    return _together(of_kind, arrays, first_axes)


def offsets_of(halos: Halos) -> Array:
    """query_offset and key_offset of the device that asks: two rows of one number per axis."""
    dtype = jax.dtypes.canonicalize_dtype(np.int64)
    queries = [jnp.zeros((), dtype) if h is None else h.begin().astype(dtype) for h in halos]
    keys = [q if h is None else q - h.before for q, h in zip(queries, halos, strict=True)]
    return jnp.stack([jnp.stack(queries), jnp.stack(keys)])


def halos_of(
    mesh: Mapping[str, int],
    split: Sequence[Axes],
    grid: Sequence[int],
    window: Mapping[str, Any],
) -> Halos:
    """`mesh`: the sizes of its axes, in their order. `split`: the mesh axes that split each axis of
    the grid. `window`: its options by name, each with one value per axis."""
    return tuple(
        _halo(
            tuple((name, mesh[name]) for name in names),
            tuple(name for name in mesh if name in names),
            length,
            tuple((name, values[i]) for name, values in window.items()),
        )
        for i, (names, length) in enumerate(zip(split, grid, strict=True))
    )


@functools.lru_cache(maxsize=1024)
def _halo(
    mesh_axes: tuple[tuple[str, int], ...],
    in_order: Axes,
    grid: int,
    options: tuple[tuple[str, Any], ...],
) -> Halo | None:
    sizes = [size for _, size in mesh_axes]
    parts = math.prod(sizes)
    if parts == 1:
        return None
    # JAX numbers the devices of several axes in the mesh's order, whatever that of the names is.
    numbers = np.arange(parts).reshape([dict(mesh_axes)[name] for name in in_order])
    places = numbers.transpose([in_order.index(name) for name, _ in mesh_axes]).ravel().tolist()
    length = grid // parts
    begins = [i * length for i in range(parts)]
    whole = axis_of(grid, (parts,), options)
    needs = whole.needed
    before = max(0, *(begin - need[0] for begin, need in zip(begins, needs, strict=True)))
    after = max(0, *(need[1] - begin - length for begin, need in zip(begins, needs, strict=True)))
    is_ring = whole.is_circular and before + length + after >= grid
    if is_ring:  # all of the axis, with every token once
        before = (parts - 1) // 2 * length
        after = grid - length - before
    total = before + length + after
    needed = []  # per part, of its extended part
    for begin, need in zip(begins, needs, strict=True):
        low, high = (token - (begin - before) for token in need)
        if is_ring:
            low, high = low % grid, low % grid + high - low
        needed.append([(low, high), (low - grid, high - grid)] if is_ring else [(low, high)])
    cuts = {0, total, before, before + length}
    cuts.update(range(before % length, total, length))
    cuts.update(x for part in needed for pair in part for x in pair if 0 < x < total)
    stretches: list[Stretch] = []
    for begin, end in itertools.pairwise(sorted(cuts)):
        step = (begin - before) // length
        if step == 0:
            continue
        receivers = tuple(
            i for i, part in enumerate(needed) if any(a <= begin and end <= b for a, b in part)
        )
        last = stretches[-1] if stretches else None
        if not receivers:
            continue
        if last and (last.end, last.step, last.parts) == (begin, step, receivers):
            stretches[-1] = dataclasses.replace(last, end=end)
        else:
            stretches.append(Stretch(begin, end, step, receivers))
    name = in_order if len(in_order) > 1 else in_order[0]
    return Halo(mesh_axes, tuple(places), name, length, before, after, tuple(stretches))
