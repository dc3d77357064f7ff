"""What the parts of a grid that is split over devices need of each other.

A device that has a part of the queries, keys and values needs more keys and values than these: the
*halo*, which the windows of its queries reach beyond its part. It comes from as many neighbors as
the windows reach. Every device has an extended part of one shape, so that one program serves all;
where nobody needs a token of it, as beyond a border of the grid, there is nothing sent and it is 0.

Of an axis that devices do not divide the last parts hold fewer tokens, or none. Arrays are of one
shape all the same, and have anything behind those tokens. They are moved to the end of their part
first: then each part is a stretch of the grid that lies on it, if with tokens that are others'.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natten._halos import Axis, Range, axis_of

Axes: TypeAlias = tuple[str, ...]  # of a mesh
Arrays: TypeAlias = tuple[Array, ...]


@dataclasses.dataclass(frozen=True)
class Halo:
    """Of one axis of the grid. An extended part is its halo before, the part, its halo after."""

    axis: int
    mesh_axes: tuple[tuple[str, int], ...]  # that split it, with their sizes; the slowest first
    grid: int  # tokens of the whole axis
    length: int  # of a part
    before: int
    after: int
    # Whether an extended part is all of the axis and in its order, wherever the part itself lies.
    is_in_order: bool

    @property
    def parts(self) -> int:
        return math.prod(size for _, size in self.mesh_axes)

    @property
    def extended_length(self) -> int:
        return self.before + self.length + self.after

    @property
    def is_even(self) -> bool:
        return self.length * self.parts == self.grid

    def part(self) -> Any:
        """The number of the part of the device that asks."""
        part: Any = 0
        for name, size in self.mesh_axes:
            part = part * size + jax.lax.axis_index(name)
        return part

    def begin(self) -> Any:
        """The first token of its part, as a stretch of the grid."""
        begin = self.part() * self.length
        return begin if self.is_even else jnp.minimum(begin, self.grid - self.length)

    def key_begin(self) -> Any:
        """The first token of its extended part."""
        begin = self.begin()
        return jnp.zeros_like(begin) if self.is_in_order else begin - self.before

    def place(self, number: int) -> Any:
        """Where a token lies that is the given one from the halo's first."""
        return (self.begin() - self.before + number) % self.grid if self.is_in_order else number

    def _short(self) -> Any:
        """How many tokens its part holds less than it could."""
        return jnp.minimum(self.part() * self.length - self.begin(), self.length)

    def to_end(self, x: Array, axis: int, fill: float) -> Array:
        """Moves the tokens of a part to its end; `fill` comes before them."""
        padded = jax.lax.pad(x, jnp.array(fill, x.dtype), _padding(x.ndim, axis, self.length, 0))
        first = self.length - self._short()
        return jax.lax.dynamic_slice_in_dim(padded, first, self.length, axis)

    def to_begin(self, x: Array, axis: int) -> Array:
        """Moves them back; 0 comes after them."""
        padded = jax.lax.pad(x, jnp.zeros((), x.dtype), _padding(x.ndim, axis, 0, self.length))
        return jax.lax.dynamic_slice_in_dim(padded, self._short(), self.length, axis)


@dataclasses.dataclass(frozen=True)
class Message:
    """A box of tokens that devices send each other. Its ranges are one per axis that is split."""

    held: tuple[Range, ...]  # of the part of the giver, which is extended along the axes before
    needed: tuple[int, ...]  # where the box begins in the extended part of the taker
    takers: tuple[tuple[int, ...], ...]  # along each axis, the parts that need it
    pairs: tuple[tuple[int, int], ...]  # giver and taker, as JAX's collectives number devices


@dataclasses.dataclass(frozen=True)
class Halos:
    """Of all axes of a grid that are split."""

    rank: int
    axes: tuple[Halo, ...]
    messages: tuple[tuple[Message, ...], ...]  # that bring the halo of each axis, in turn
    name: Any  # of all axes of the mesh that take part, as JAX's collectives take it

    def placed(self, first_axis: int) -> list[tuple[Halo, int]]:
        """With the axes of an array, of which the first of the grid is given."""
        return [(halo, first_axis + halo.axis) for halo in self.axes]

    def received(
        self, arrays: Arrays, at: int, first_axis: int
    ) -> Iterator[tuple[Message, list[Any], Arrays]]:
        """What brings the halo of one axis, each box of all arrays in one message, and where it
        begins in an extended part. Who does not need it receives 0."""
        for message in self.messages[at]:
            sent = list(arrays)
            begins: list[Any] = [0] * arrays[0].ndim
            boxes = zip(self.placed(first_axis), message.held, message.needed, strict=True)
            for i, ((halo, axis), held, needed) in enumerate(boxes):
                sent = [jax.lax.slice_in_dim(x, *held, axis=axis) for x in sent]
                begins[axis] = halo.place(needed) if i == at else needed
            yield message, begins, self._sent(sent, message.pairs)

    def _sent(self, arrays: Sequence[Array], pairs: Any) -> Arrays:
        if len(arrays) == 1:
            return (jax.lax.ppermute(arrays[0], self.name, pairs),)
        message = jnp.concatenate([x.ravel() for x in arrays])
        ends = np.cumsum([x.size for x in arrays])[:-1].tolist()
        flat = jnp.split(jax.lax.ppermute(message, self.name, pairs), ends)
        return tuple(y.reshape(x.shape) for x, y in zip(arrays, flat, strict=True))

    def is_taker(self, message: Message) -> Any:
        """Whether the device that asks needs a message."""
        answers = []
        for halo, takers in zip(self.axes, message.takers, strict=True):
            if len(takers) < halo.parts:
                part = halo.part()
                stretches = _stretches(takers)
                answers.append(_any((low <= part) & (part < high) for low, high in stretches))
        return functools.reduce(jnp.logical_and, answers) if answers else True


def _padding(rank: int, axis: int, before: int, after: int) -> list[tuple[int, int, int]]:
    padding = [(0, 0, 0)] * rank
    padding[axis] = (before, after, 0)
    return padding


def _any(answers: Iterable[Any]) -> Any:
    return functools.reduce(jnp.logical_or, answers)


def _stretches(numbers: Sequence[int]) -> list[Range]:
    """Numbers that rise, as ranges."""
    found: list[Range] = []
    for n in numbers:
        if found and found[-1][1] == n:
            found[-1] = (found[-1][0], n + 1)
        else:
            found.append((n, n + 1))
    return found


def _indices(begins: Sequence[Any]) -> list[Array]:
    """Of one type, as that of an index of a device is not Python's."""
    return [jnp.asarray(begin, np.int32) for begin in begins]


def _put(x: Array, shape: Sequence[int], begins: Sequence[Any]) -> Array:
    """`x` at some place of an array that is 0 elsewhere."""
    if not all(isinstance(begin, int) for begin in begins):
        return jax.lax.dynamic_update_slice(jnp.zeros(shape, x.dtype), x, _indices(begins))
    padding = [(b, n - b - m, 0) for b, n, m in zip(begins, shape, x.shape, strict=True)]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), padding)


def _own(arrays: Arrays, halos: Halos, at: int, first_axis: int) -> list[Array]:
    """Parts in extended parts whose halo is 0, along one axis."""
    halo, axis = halos.placed(first_axis)[at]
    begins: list[Any] = [0] * arrays[0].ndim
    begins[axis] = halo.place(halo.before)
    shapes = [(*x.shape[:axis], halo.extended_length, *x.shape[axis + 1 :]) for x in arrays]
    return [_put(x, shape, begins) for x, shape in zip(arrays, shapes, strict=True)]


def _written(arrays: Arrays, halos: Halos, at: int, first_axis: int) -> Arrays:
    """Parts with their halos along one axis."""
    results = _own(arrays, halos, at, first_axis)
    for message, begins, received in halos.received(arrays, at, first_axis):
        is_taker, indices = halos.is_taker(message), _indices(begins)
        for i, y in enumerate(received):
            if is_taker is not True:  # what is there instead may be of another message
                y = jnp.where(is_taker, y, jax.lax.dynamic_slice(results[i], indices, y.shape))
            # Not by concatenate, which makes XLA of JAX 0.6 end the process where handlers read it.
            results[i] = jax.lax.dynamic_update_slice(results[i], y, indices)
    return tuple(results)


def _added(arrays: Arrays, halos: Halos, at: int, first_axis: int) -> Arrays:
    """The same by a sum. Its transpose, which sends home what belongs to halos, takes slices
    only; under check_vma JAX 0.6 has none of dynamic_update_slice."""
    results = _own(arrays, halos, at, first_axis)
    for _, begins, received in halos.received(arrays, at, first_axis):
        results = [x + _put(y, x.shape, begins) for x, y in zip(results, received, strict=True)]
    return tuple(results)


_extended = jax.custom_jvp(_written, nondiff_argnums=(1, 2, 3))


@_extended.defjvp
def _extended_jvp(
    halos: Halos, at: int, first_axis: int, primals: Any, tangents: Any
) -> tuple[Arrays, Arrays]:
    (arrays,), (of_arrays,) = primals, tangents
    results = _extended(arrays, halos, at, first_axis)
    return results, _added(of_arrays, halos, at, first_axis)


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
        for at in range(len(halos.axes)):
            arrays = function(arrays, halos, at, first_axis)
        return arrays

    return _together(of_kind, arrays, first_axes)


def extended_shape(shape: Sequence[int], halos: Halos, first_axis: int) -> tuple[int, ...]:
    lengths = list(shape)
    for halo, axis in halos.placed(first_axis):
        lengths[axis] = halo.extended_length
    return tuple(lengths)


def sent_home(arrays: Sequence[Any], halos: Halos, first_axes: Sequence[int | None]) -> list[Any]:
    """The transpose of `extended`: what belongs to halos is added to the parts that it is of."""

    def of_kind(arrays: Arrays, first_axis: int) -> Arrays:
        for at, (halo, axis) in reversed(list(enumerate(halos.placed(first_axis)))):
            function = functools.partial(_added, halos=halos, at=at, first_axis=first_axis)
            parts = tuple(
                jax.ShapeDtypeStruct((*x.shape[:axis], halo.length, *x.shape[axis + 1 :]), x.dtype)
                for x in arrays
            )
            (arrays,) = jax.linear_transpose(function, parts)(arrays)
        return arrays

    return _together(of_kind, arrays, first_axes)


def to_end(x: Any, halos: Halos, first_axis: int | None, fill: float = 0) -> Any:
    """A part whose tokens are moved to its end, along all axes that devices do not divide."""
    for halo, axis in halos.placed(first_axis) if first_axis is not None else ():
        x = x if halo.is_even else halo.to_end(x, axis, fill)
    return x


def to_begin(x: Any, halos: Halos, first_axis: int | None) -> Any:
    """The inverse."""
    for halo, axis in halos.placed(first_axis) if first_axis is not None else ():
        x = x if halo.is_even else halo.to_begin(x, axis)
    return x


def offsets_of(halos: Halos) -> Array:
    """query_offset and key_offset of the device that asks: two rows of one number per axis."""
    dtype = jax.dtypes.canonicalize_dtype(np.int64)
    queries, keys = [jnp.zeros((), dtype)] * halos.rank, [jnp.zeros((), dtype)] * halos.rank
    for halo in halos.axes:
        queries[halo.axis] = halo.begin().astype(dtype)
        keys[halo.axis] = halo.key_begin().astype(dtype)
    return jnp.stack([jnp.stack(queries), jnp.stack(keys)])


def halos_of(
    mesh: Mapping[str, int],
    split: Sequence[Axes],
    grid: Sequence[int],
    window: Mapping[str, Any] | None,
) -> Halos:
    """`mesh`: the sizes of its axes, in their order. `split`: the mesh axes that split each axis of
    the grid. `window`: its options by name, each with one value per axis; None where all queries
    see all keys."""
    return _halos_of(
        tuple(mesh.items()),
        tuple(split),
        tuple(grid),
        None if window is None else tuple(window.items()),
    )


@functools.lru_cache(maxsize=1024)
def _halos_of(
    mesh: tuple[tuple[str, int], ...],
    split: tuple[Axes, ...],
    grid: tuple[int, ...],
    window: tuple[tuple[str, tuple], ...] | None,
) -> Halos:
    sizes, needs = dict(mesh), []
    for axis, (names, length) in enumerate(zip(split, grid, strict=True)):
        mesh_axes = tuple((name, sizes[name]) for name in names)
        if math.prod(size for _, size in mesh_axes) == 1:
            continue
        if window is None:  # of as many keys, around the ring
            options: Any = (("kernel_size", length), ("boundary", "circular"))
        else:
            options = tuple((name, values[axis]) for name, values in window)
        needs.append(_Needs.of(axis, mesh_axes, length, options, window is None))
    taking_part = [name for need in needs for name, _ in need.halo.mesh_axes]
    name = tuple(name for name, _ in mesh if name in taking_part)
    # JAX numbers devices in the mesh's order, whatever that of the names is.
    numbers = np.arange(math.prod(sizes[n] for n in name)).reshape([sizes[n] for n in name])
    numbers = numbers.transpose([name.index(n) for n in taking_part])
    numbers = numbers.reshape([need.halo.parts for need in needs])
    return Halos(
        len(grid),
        tuple(need.halo for need in needs),
        tuple(tuple(_messages(needs, at, numbers)) for at in range(len(needs))),
        name[0] if len(name) == 1 else name,
    )


@dataclasses.dataclass(frozen=True)
class _Needs:
    """What the parts along one axis need, in numbers of their extended parts."""

    halo: Halo
    axis: Axis
    needed: tuple[tuple[Range, ...], ...]  # of each part; at most two ranges, at the seam of a ring

    @classmethod
    def of(cls, number: int, mesh_axes: Any, length: int, window: Any, is_in_order: bool) -> _Needs:
        parts = math.prod(size for _, size in mesh_axes)
        axis = axis_of(length, (parts,), window)
        of_part = -(-length // parts)
        begins = [min(i * of_part, length - of_part) for i in range(parts)]
        reach = [axis.needed_of((begin, begin + of_part)) for begin in begins]
        before = max(0, *(begin - low for begin, (low, _) in zip(begins, reach, strict=True)))
        after = max(
            0, *(high - begin - of_part for begin, (_, high) in zip(begins, reach, strict=True))
        )
        is_ring = axis.is_circular and before + of_part + after >= length
        if is_ring:  # all of the axis, with every token once
            before = min((parts - 1) // 2 * of_part, length - of_part)
            after = length - of_part - before
        total = before + of_part + after
        needed = []
        for begin, held, need in zip(begins, axis.held, axis.needed, strict=True):
            low, high = (token - (begin - before) for token in need)
            turns = (low // length * length,) if is_ring else (0,)
            turns += tuple(turn + length for turn in turns if is_ring)
            clipped = [(max(low - turn, 0), min(high - turn, total)) for turn in turns]
            is_empty = held[0] == held[1]
            needed.append(tuple((a, b) for a, b in clipped if a < b and not is_empty))
        halo = Halo(number, mesh_axes, length, of_part, before, after, is_in_order)
        return cls(halo, axis, tuple(needed))

    def _held(self, part: int) -> Range:
        """What a part holds, in numbers of its tokens once these are at its end."""
        begin, end = self.axis.held[part]
        return self.halo.length - (end - begin), self.halo.length

    def boxes(self) -> dict[tuple[Range, int], tuple[list[int], list[int]]]:
        """(what givers send, where takers need it) to givers and takers, in turn."""
        found: dict[Any, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        halo = self.halo
        for taker, needed in enumerate(self.needed):
            first = min(taker * halo.length, halo.grid - halo.length) - halo.before
            for (low, high), giver in itertools.product(needed, range(halo.parts)):
                if giver == taker:
                    continue
                for piece in self.axis.pieces_of(giver, (first + low, first + high)):
                    begin = self._held(giver)[0] + piece.held
                    givers, takers = found[(begin, begin + piece.tokens), low + piece.needed]
                    givers.append(giver)
                    takers.append(taker)
        return found

    def same(self, is_extended: bool) -> dict[tuple[Range, int], tuple[list[int], list[int]]]:
        """The same of halos that travel along other axes: parts of one number here."""
        found: dict[Any, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for part, needed in enumerate(self.needed):
            held = self._held(part)
            for low, high in needed if is_extended else (held,) if held[0] < held[1] else ():
                for numbers in found[(low, high), low]:
                    numbers.append(part)
        return found


def _messages(needs: Sequence[_Needs], at: int, numbers: Any) -> Iterator[Message]:
    """What brings the halo of one axis. It travels with the halos of the axes before, as far as
    they are needed: corners come through two neighbors. `numbers`: of devices, by their parts."""
    along = [
        need.boxes() if i == at else need.same(is_extended=i < at) for i, need in enumerate(needs)
    ]
    for boxes in itertools.product(*(found.items() for found in along)):
        givers, takers = (numbers[np.ix_(*(box[1][side] for box in boxes))] for side in (0, 1))
        yield Message(
            tuple(held for (held, _), _ in boxes),
            tuple(needed for (_, needed), _ in boxes),
            tuple(tuple(takers) for _, (_, takers) in boxes),
            tuple(zip(givers.ravel().tolist(), takers.ravel().tolist(), strict=True)),
        )
