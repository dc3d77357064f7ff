"""Grids over many processes: what DTensors hold of one goes to where windows need it.

Every rank knows from the sizes and the mesh alone which tokens each of the others holds and needs
(`natten._halos`), so it sends each of them one message with all that that one needs of keys, values
and mask, corners included, and waits for as many. Then it calls the library on its own part, with
`query_offset`, `key_offset` and `grid_size`. Backward sends the gradients of those tokens home,
where they are added.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from natten import _core
from natten._args import (
    PART_OPTIONS,
    SEPARATE_KEY_GRID,
    Bools,
    Boundaries,
    Config,
    Ints,
    listed,
    options_of,
    window_options,
    with_parts,
)
from natten._halos import Block, Halos, Part, Piece, Range, chunks, halos_of
from natten._roles import GRIDS, Role
from natten.torch import _ops

# ---- what travels, and to whom ----


Box = tuple[slice, ...]  # of tokens, a slice per axis of the grid


class Message(NamedTuple):
    """What goes to, or comes from, one other rank."""

    peer: int  # its rank in the default group
    boxes: tuple[Box, ...]  # in what the giver holds


class BlockOfKeys(NamedTuple):
    """What windows of some of the queries need."""

    shape: tuple[int, ...]
    own: tuple[tuple[Box, Box], ...]  # (box of what this rank holds, the same in the block)
    # (message, which of its boxes, box of that, the same in the block)
    taken: tuple[tuple[int, int, Box, Box], ...]


# Queries' elements of a part, below which it is computed as one block: more calls take longer than
# what they spare, to copy keys and values and to wait for others.
_LEAST_TO_CUT = 2**18


class Exchange(NamedTuple):
    """What one rank does with the halos of a grid."""

    group: Any  # of the ranks that hold the grid
    held: tuple[int, ...]  # the shape of what this rank holds
    given: tuple[Message, ...]
    taken: tuple[Message, ...]
    blocks: tuple[BlockOfKeys, ...]  # that messages are taken for


class Flight:
    """Tensors of what this rank holds, on their way to ranks whose windows see it, and what comes
    from others for its own; or the gradients of all that, on their way home.

    `post` and `unpack` are what `_Send` and `_Receive` do, `post_home` and `unpack_home` their
    transposes, `_SendHome` and `_ReceiveHome`. What passes between the two of a pair is here; for
    autograd it is one number, so that it knows their order.
    """

    def __init__(
        self,
        exchange: Exchange,
        tensors: Sequence[Tensor],
        axes: Sequence[int],
        wanted: Sequence[bool],
    ) -> None:
        """`axes`: the first axis of the grid of each tensor; `wanted`: which have gradients. The
        tensors may be any that have their types, and their axes beside those of the grid."""
        self.exchange = exchange
        self.axes = tuple(axes)
        self.wanted = tuple(wanted)
        self.kinds = [x.new_empty(0) for x in tensors]
        rank = len(exchange.held)
        self.around = [
            (x.shape[:axis], x.shape[axis + rank :]) for x, axis in zip(tensors, axes, strict=True)
        ]
        self.next: Flight | None = None  # of the derivative
        self.tensors: Sequence[Tensor] = ()
        self.own: list[tuple[int, Box, Tensor]] = []  # gradients of what this rank holds itself
        self.arriving: list[list[list[Tensor]]] = []  # per message, tensor and box
        self.works: list[Any] = []

    def following(self) -> Flight:
        """The flight of the derivative."""
        kept = [i for i, want in enumerate(self.wanted) if want]
        flight = Flight(self.exchange, [], [], [True] * len(kept))
        flight.axes = tuple(self.axes[i] for i in kept)
        flight.kinds = [self.kinds[i] for i in kept]
        flight.around = [self.around[i] for i in kept]
        return flight

    def _new(self, i: int, shape: Sequence[int], fill: int | None = None) -> Tensor:
        """A tensor like one of the flight's, of some part of the grid."""
        before, after = self.around[i]
        whole = (*before, *shape, *after)
        return self.kinds[i].new_empty(whole) if fill is None else self.kinds[i].new_zeros(whole)

    def _packed(self, message: Message) -> tuple[Tensor, list[list[Tensor]]]:
        """Memory for a message, and in it the boxes of each tensor. Bytes, so that one message
        holds tensors of several types."""
        shapes = [
            [(*before, *(s.stop - s.start for s in box), *after) for box in message.boxes]
            for before, after in self.around
        ]
        sizes = [
            [math.prod(shape) * kind.element_size() for shape in of_tensor]
            for kind, of_tensor in zip(self.kinds, shapes, strict=True)
        ]
        packed = self.kinds[0].new_empty(sum(map(sum, sizes)), dtype=torch.uint8)
        at = 0
        boxes: list[list[Tensor]] = []
        for kind, of_tensor, of_sizes in zip(self.kinds, shapes, sizes, strict=True):
            boxes.append([])
            for shape, size in zip(of_tensor, of_sizes, strict=True):
                boxes[-1].append(packed[at : at + size].view(kind.dtype).view(shape))
                at += size
        return packed, boxes

    def _start(
        self,
        incoming: Sequence[Message],
        outgoing: Sequence[tuple[Message, Tensor]],
    ) -> None:
        """Posts all receives and sends. Nobody waits here."""
        operations = []
        for message in incoming:
            packed, boxes = self._packed(message)
            self.arriving.append(boxes)
            operations.append(dist.P2POp(dist.irecv, packed, message.peer, self.exchange.group))
        for message, packed in outgoing:
            operations.append(dist.P2POp(dist.isend, packed, message.peer, self.exchange.group))
        operations = [op for op in operations if op.tensor.numel()]
        try:
            self.works = dist.batch_isend_irecv(operations) if operations else []
        except RuntimeError as error:
            raise _failed(error) from error

    def _wait(self) -> list[list[list[Tensor]]]:
        """What has arrived."""
        try:
            for work in self.works:
                work.wait()
        except RuntimeError as error:
            raise _failed(error) from error
        arrived, self.arriving, self.works = self.arriving, [], []
        return arrived

    def post(self, tensors: Sequence[Tensor]) -> None:
        outgoing = []
        for message in self.exchange.given:
            packed, boxes = self._packed(message)
            for x, axis, places in zip(tensors, self.axes, boxes, strict=True):
                for box, place in zip(message.boxes, places, strict=True):
                    place.copy_(x[_at(axis, box)])
            outgoing.append((message, packed))
        self.tensors = tensors
        self._start(self.exchange.taken, outgoing)

    def unpack(self) -> list[list[Tensor]]:
        """Of each block all tensors."""
        tensors, self.tensors = self.tensors, ()
        blocks = [
            [self._new(i, block.shape) for i in range(len(tensors))]
            for block in self.exchange.blocks
        ]
        for block, results in zip(self.exchange.blocks, blocks, strict=True):
            for x, axis, result in zip(tensors, self.axes, results, strict=True):
                for held, needed in block.own:
                    result[_at(axis, needed)].copy_(x[_at(axis, held)])
        arrived = self._wait()
        for block, results in zip(self.exchange.blocks, blocks, strict=True):
            for i, (axis, result) in enumerate(zip(self.axes, results, strict=True)):
                for message, number, box, needed in block.taken:
                    given = arrived[message][i][number]
                    result[_at(axis, needed)].copy_(given[_at(axis, box)])
        return blocks

    def post_home(self, blocks: Sequence[Sequence[Tensor]]) -> None:
        """`blocks`: gradients of what `unpack` returns; none where nobody asked for it."""
        outgoing = []
        for message in self.exchange.taken:
            packed, boxes = self._packed(message)
            packed.zero_()
            outgoing.append((message, packed, boxes))
        for block, grads in zip(self.exchange.blocks, blocks, strict=bool(blocks)):
            for i, (axis, grad) in enumerate(zip(self.axes, grads, strict=True)):
                for held, needed in block.own:
                    self.own.append((i, held, grad[_at(axis, needed)]))
                for number, which, box, needed in block.taken:
                    place = outgoing[number][2][i][which]
                    place[_at(axis, box)].add_(grad[_at(axis, needed)])
        self._start(self.exchange.given, [(message, packed) for message, packed, _ in outgoing])

    def unpack_home(self, insides: Sequence[Tensor], is_spare: bool) -> list[Tensor]:
        """Gradients of what this rank holds. `insides`: what those have of windows that see
        nothing else, of each tensor, or nothing; `is_spare`: whether they may be written to."""
        own, self.own = self.own, []
        results = [
            self._new(i, self.exchange.held, 0)
            if not insides
            else insides[i]
            if is_spare and insides[i].is_contiguous()
            else insides[i].clone(memory_format=torch.contiguous_format)
            for i in range(len(self.axes))
        ]
        for i, held, grad in own:
            results[i][_at(self.axes[i], held)].add_(grad)
        for message, of_tensors in zip(self.exchange.given, self._wait(), strict=True):
            for axis, result, boxes in zip(self.axes, results, of_tensors, strict=True):
                for box, grad in zip(message.boxes, boxes, strict=True):
                    result[_at(axis, box)].add_(grad)
        return results


def _at(axis: int, box: Box) -> Box:
    return (slice(None),) * axis + box


def _failed(error: RuntimeError) -> RuntimeError:
    return RuntimeError(
        "natten: ranks that hold parts of one grid could not exchange what their windows need. "
        "Another rank has ended, has raised an error of its own, or was called otherwise, or this "
        "one waited longer than the timeout of its process group (torch.distributed's "
        f"init_process_group sets it): {error}"
    )


class _Send(torch.autograd.Function):
    """Those of the tensors that have gradients, for queries that need nothing else; and that all of
    them are on their way."""

    @staticmethod
    def forward(ctx: Any, flight: Flight, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.flight = flight
        flight.post(tensors)
        kept = [x.view_as(x) for x, want in zip(tensors, flight.wanted, strict=True) if want]
        return *kept, tensors[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        flight = ctx.flight
        home, flight.next = flight.next, None
        if home is None:  # of a rank that gives and needs nothing
            home = flight.following()
            home.post_home(())
        is_spare = not torch.is_grad_enabled()
        *insides, departed = grads
        found = iter(_ReceiveHome.apply(home, is_spare, departed, *insides))
        return None, *(next(found) if want else None for want in flight.wanted)


class _Receive(torch.autograd.Function):
    """What blocks of queries need, one block after the other."""

    @staticmethod
    def forward(ctx: Any, flight: Flight, departed: Tensor) -> tuple[Tensor, ...]:
        ctx.flight = flight
        results = [x for block in flight.unpack() for x in block]
        ctx.mark_non_differentiable(
            *(x for x, want in zip(results, itertools.cycle(flight.wanted)) if not want)
        )
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        flight = ctx.flight
        flight.next = flight.following()
        wanted = zip(grads, itertools.cycle(flight.wanted))
        return None, _SendHome.apply(flight.next, *(grad for grad, want in wanted if want))


class _SendHome(torch.autograd.Function):
    """The transpose of `_Receive`."""

    @staticmethod
    def forward(ctx: Any, flight: Flight, *grads: Tensor) -> Tensor:
        ctx.flight = flight
        count = len(flight.axes)
        flight.post_home([grads[i : i + count] for i in range(0, len(grads), count)])
        return flight.kinds[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, departed: Tensor) -> Any:
        return None, *_Receive.apply(ctx.flight.next, departed)


class _ReceiveHome(torch.autograd.Function):
    """The transpose of `_Send`."""

    @staticmethod
    def forward(
        ctx: Any, flight: Flight, is_spare: bool, departed: Tensor, *insides: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.flight = flight
        return tuple(flight.unpack_home(insides, is_spare))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        flight = ctx.flight
        flight.next = flight.following()
        *insides, departed = _Send.apply(flight.next, *grads)
        if not flight.exchange.blocks:
            flight.next.unpack()  # which waits until all is sent
        return None, None, departed, *insides


class _Cut(torch.autograd.Function):
    """A tensor of queries in boxes."""

    @staticmethod
    def forward(ctx: Any, axis: int, boxes: tuple[Box, ...], x: Tensor) -> tuple[Tensor, ...]:
        ctx.options = axis, boxes, x.shape
        return tuple(x[_at(axis, box)] for box in boxes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        axis, boxes, shape = ctx.options
        return None, None, _Joined.apply(axis, boxes, [grads[0].new_empty(shape)], *grads)


class _Joined(torch.autograd.Function):
    """The transpose of `_Cut`: the boxes in `memory`, where some may lie already."""

    @staticmethod
    def forward(
        ctx: Any, axis: int, boxes: tuple[Box, ...], memory: list[Tensor], *parts: Tensor
    ) -> Tensor:
        ctx.options = axis, boxes
        (whole,) = memory
        for box, part in zip(boxes, parts, strict=True):
            place = whole[_at(axis, box)]
            if place.data_ptr() != part.data_ptr():
                place.copy_(part)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        axis, boxes = ctx.options
        return None, None, None, *_Cut.apply(axis, boxes, grad)


class _Shared(torch.autograd.Function):
    """Tensors that ranks hold alike, for work that each of them does a share of: their gradients
    are added up over the axes of the mesh that share it."""

    @staticmethod
    def forward(ctx: Any, mesh: DeviceMesh, dims: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.options = mesh, dims
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        mesh, all_dims = ctx.options
        sums: list[Tensor | None] = []
        for grad, dims, need in zip(grads, all_dims, ctx.needs_input_grad[2:], strict=True):
            if not need:
                sums.append(None)
                continue
            total = grad.clone(memory_format=torch.contiguous_format)
            for dim in dims:
                if mesh.size(dim) > 1:
                    _reduce(total, dist.ReduceOp.SUM, mesh, dim)
            sums.append(total)
        return None, None, *sums


def _reduce(x: Tensor, operation: Any, mesh: DeviceMesh, dim: int) -> None:
    try:
        dist.all_reduce(x, operation, group=mesh.get_group(dim))
    except RuntimeError as error:
        raise _failed(error) from error


def _groups(mesh: DeviceMesh) -> tuple[Any, ...]:
    """The groups of a mesh. Meshes of the same ranks are equal, even where they have other groups,
    or those of a default group that has ended; what is remembered of a mesh is so of its groups."""
    return tuple([mesh.get_group(dim) for dim in range(mesh.ndim)])


@functools.lru_cache(maxsize=64)
def _group_of(mesh: DeviceMesh, dims: tuple[int, ...], groups: tuple[Any, ...]) -> Any:
    """The group of the ranks whose places in the mesh differ from this one's along `dims` only.
    `groups`: as `_groups` says."""
    if len(dims) == 1:
        return groups[dims[0]]
    at = _coordinate(mesh)
    kept = tuple(slice(None) if dim in dims else i for dim, i in enumerate(at))
    ranks = sorted(mesh.mesh[kept].flatten().tolist())
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    return dist.new_group(ranks, use_local_synchronization=True)


def _coordinate(mesh: DeviceMesh) -> list[int]:
    at = mesh.get_coordinate()
    if at is None:
        raise ValueError("query: this rank is none of its mesh; only ranks of the mesh may call")
    return list(at)


class Grid(NamedTuple):
    """How a grid lies on a mesh."""

    mesh: DeviceMesh
    groups: tuple[Any, ...]  # of the mesh
    dims: tuple[tuple[int, ...], ...]  # of the mesh, which cut each axis, one after the other
    halos: Halos

    @property
    def part(self) -> Part:
        """The part of this rank."""
        return self.part_at(_coordinate(self.mesh))

    def part_at(self, coordinate: Sequence[int]) -> Part:
        return tuple([_number(self.mesh, dims, coordinate) for dims in self.dims])

    def rank_of(self, part: Part) -> int:
        """The rank that has a part, of those that are where this one is in the rest of the mesh."""
        at = _coordinate(self.mesh)
        for dims, number in zip(self.dims, part, strict=True):
            for dim in reversed(dims):
                number, at[dim] = divmod(number, self.mesh.size(dim))
        return int(self.mesh.mesh[tuple(at)])


def _number(mesh: DeviceMesh, dims: Sequence[int], coordinate: Sequence[int]) -> int:
    """Which of `chunks` a place of the mesh has."""
    number = 0
    for dim in dims:
        number = number * mesh.size(dim) + coordinate[dim]
    return number


@functools.lru_cache(maxsize=256)
def _exchange_of(grid: Grid, blocks: tuple[Block, ...]) -> Exchange | None:
    """None where no axis is cut."""
    cut = tuple(sorted(dim for dims in grid.dims for dim in dims if grid.mesh.size(dim) > 1))
    if not cut:
        return None
    part, halos = grid.part, grid.halos

    def message(peer: Part, giver: Part, taker: Part) -> Message:
        boxes = halos.boxes(giver, halos.needed(taker))
        return Message(grid.rank_of(peer), tuple(box for box, _ in map(_slices, boxes)))

    givers = halos.givers(part)
    taken = tuple(message(giver, giver, part) for giver in givers)

    def keys_of(block: Block) -> BlockOfKeys:
        found = []
        for i, giver in enumerate(givers):
            for held, needed in map(_slices, halos.boxes(giver, block.needed)):
                for j, box in enumerate(taken[i].boxes):
                    both = [
                        (max(s.start, t.start), min(s.stop, t.stop))
                        for s, t in zip(held, box, strict=True)
                    ]
                    if all(begin < end for begin, end in both):
                        found.append((i, j, _shifted(both, box), _shifted(both, held, needed)))
        own = tuple(map(_slices, halos.boxes(part, block.needed)))
        return BlockOfKeys(_lengths(block.needed), own, tuple(found))

    return Exchange(
        _group_of(grid.mesh, cut, grid.groups),
        _lengths(halos.held(part)),
        tuple(message(taker, part, taker) for taker in halos.takers(part)),
        taken,
        tuple(keys_of(block) for block in blocks if not block.is_inside),
    )


def _slices(box: Sequence[Piece]) -> tuple[Box, Box]:
    """A box of pieces in what the giver holds, and in what is needed."""
    return (
        tuple([slice(p.held, p.held + p.tokens) for p in box]),
        tuple([slice(p.needed, p.needed + p.tokens) for p in box]),
    )


def _shifted(ranges: Sequence[Range], origin: Box, place: Box | None = None) -> Box:
    """Ranges, counted from where a box begins; or as they are when it is put at a place."""
    to = [0] * len(origin) if place is None else [s.start for s in place]
    return tuple(
        slice(begin - o.start + t, end - o.start + t)
        for (begin, end), o, t in zip(ranges, origin, to, strict=True)
    )


def _lengths(ranges: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    return tuple([end - begin for begin, end in ranges])


# ---- whether all ranks make the same call ----

_agreed: set[tuple[Any, ...]] = set()
_MOST_ARGUMENTS = 12  # of a call, as `_agree` counts them


def _agree(
    mesh: DeviceMesh, device: torch.device, call: Mapping[str, Hashable], refused: bool = False
) -> None:
    """Raises on every rank where one of them refuses its call, or has been given another: before
    anything is sent, which some rank would wait for in vain. Asks the others once for each call
    that is new; a call that all ranks have made before costs nothing."""
    key = (_groups(mesh), mesh, *call.items())
    if not refused and key in _agreed:
        return
    hashes = []
    for value in call.values():  # and as many zeros as make any two calls comparable
        digest = hashlib.blake2b(repr(value).encode(), digest_size=7).digest()
        hashes.append(int.from_bytes(digest, "little"))
    hashes += [0] * (_MOST_ARGUMENTS - len(hashes))
    # The largest of each, and the negative smallest.
    sums = torch.tensor(
        [dist.get_rank() + 1 if refused else 0, *hashes, *(-n for n in hashes)],
        dtype=torch.int64,
        device=device,
    )
    for dim in range(mesh.ndim):
        if mesh.size(dim) > 1:
            _reduce(sums, dist.ReduceOp.MAX, mesh, dim)
    if refused:
        return
    refuser, *bounds = sums.tolist()
    if refuser:
        raise ValueError(
            f"natten: rank {refuser - 1} refused this call, and so do the others; its own error "
            "says why"
        )
    largest, smallest = bounds[: len(hashes)], [-n for n in bounds[len(hashes) :]]
    for (name, value), high, low in zip(call.items(), largest, smallest, strict=False):
        if high != low:
            shown: object = value
            if name == "the window" and isinstance(value, tuple):  # a config without its flags
                shown = options_of((*value, 0))
            raise ValueError(
                f"{name}: got {shown!r} on rank {dist.get_rank()}, and something else on another; "
                "must be the same on all ranks of the mesh"
            )
    if len(_agreed) >= 4096:
        _agreed.clear()
    _agreed.add(key)


def _refused(mesh: DeviceMesh, device: torch.device, call: Mapping[str, Hashable]) -> None:
    """Tells the others that this rank is about to raise an error."""
    with contextlib.suppress(RuntimeError):  # that error matters more
        _agree(mesh, device, call, refused=True)


def _described(x: Any, needs_grad: bool) -> Hashable:
    """What has to be the same of a tensor on all ranks."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    return (
        tuple(x.shape),
        x.dtype,
        tuple(x.placements) if isinstance(x, DTensor) else "no DTensor",
        "with gradient" if needs_grad else "without gradient",
    )


# ---- calls on DTensors ----


Letter = tuple[str, int]  # a letter of Role.dims, and which of its axes


def _letters(role: Role, rank: int) -> list[Letter]:
    """What each axis of a tensor is."""
    return [(dim, i) for dim in role.dims for i in range(rank if dim in GRIDS else 1)]


# Axes of other tensors that are cut where this one of the first is.
_LIKE = {"K": "Q", "G": "H", "M": "B"}


@torch.compiler.disable
def call(operator: _ops.Operator, args: Sequence[Any], local: Callable[..., Any]) -> Any:
    """Calls an operator on DTensors. `local`: the same on tensors of this rank."""
    inputs, extras, config, scale, backend = operator.split(args)
    first = inputs[0]
    if not isinstance(first, DTensor):
        given = next(r.name for r, x in zip(operator.inputs, inputs, strict=True)
                     if isinstance(x, DTensor))  # fmt: skip
        raise TypeError(
            f"{operator.inputs[0].name}: got a tensor that is no DTensor, and {given} is one; must "
            "be a DTensor too"
        )
    if extras:
        raise NotImplementedError(
            "query: got a DTensor with lengths of examples; must be a tensor of this rank"
        )
    mesh = first.device_mesh
    needs_grad = [
        torch.is_grad_enabled() and getattr(x, "requires_grad", False) is True for x in inputs
    ]
    description: dict[str, Hashable] = {
        "the function": operator.name,
        "the window": tuple(config[:-1]),
        "scale": scale,
        "backend": backend,
        "switches of natten.context": config[-1],
    }
    for role, x, need in zip(operator.inputs, inputs, needs_grad, strict=True):
        description[role.name] = _described(x, need)
    try:
        plan = _plan_of(operator, inputs, config, scale)
    except Exception:
        _refused(mesh, first.to_local().device, description)
        raise
    _agree(mesh, first.to_local().device, description)
    results = _computed(plan, operator, inputs, needs_grad, args[len(inputs) :], local)
    outputs = tuple(
        None if x is None else plan.distributed(role, x)
        for role, x in zip(operator.outputs, results, strict=True)
    )
    return outputs if len(outputs) > 1 else outputs[0]


class _Way(NamedTuple):
    """What becomes of one tensor of a call on the way to this rank's own."""

    local_shape: tuple[int, ...] | None  # None for a plain tensor
    shared: tuple[int, ...]  # axes of the mesh that share the work on it
    narrowed: tuple[tuple[int, int, int], ...]  # (axis, begin, length) to take of what is held
    picked: tuple[tuple[int, int, int], ...]  # (axis, that of the grid, length), of a whole grid
    grid_axis: int | None  # the first of the grid, where halos travel


class _Plan(NamedTuple):
    """How this rank takes part in a call."""

    grid: Grid
    sizes: dict[str, tuple[int, ...]]  # as of Operator.sizes
    cuts: dict[Letter, tuple[int, ...]]  # the axes of the mesh that cut the first tensor's
    ways: tuple[_Way | None, ...]  # None for an absent tensor

    def range_of(self, letter: Letter) -> tuple[int, int]:
        """What this rank has of an axis of the first tensor, or of one like it."""
        mesh = self.grid.mesh
        dims = self.cuts.get(letter, ())
        length = self.sizes[letter[0]][letter[1]]
        number = _number(mesh, dims, _coordinate(mesh))
        return chunks(length, [mesh.size(dim) for dim in dims])[number]

    def local_shape(self, role: Role) -> tuple[int, ...]:
        """The shape of this rank's part of an output."""
        ranges = map(self.range_of, _letters(role, len(self.grid.dims)))
        return _lengths(list(ranges))

    def distributed(self, role: Role, x: Tensor) -> Tensor:
        """An output of all ranks, of this one's part."""
        letters = _letters(role, len(self.grid.dims))
        placements: list[Placement] = [Replicate()] * self.grid.mesh.ndim
        for letter, dims in self.cuts.items():
            for dim in dims:
                placements[dim] = Shard(letters.index(letter))
        shape = torch.Size(n for dim in role.dims for n in self.sizes[dim])
        return _distributed(x, self.grid.mesh, placements, shape)


def _distributed(
    x: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: torch.Size
) -> Tensor:
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return DTensor.from_local(
        x, mesh, placements, run_check=False, shape=shape, stride=tuple(strides)
    )


def _computed(
    plan: _Plan,
    operator: _ops.Operator,
    inputs: Sequence[Tensor | None],
    needs_grad: Sequence[bool],
    options: Sequence[Any],
    local: Callable[..., Any],
) -> Sequence[Tensor | None]:
    """This rank's part of the outputs."""
    tensors = _local_tensors(plan, inputs, needs_grad)
    first = tensors[0]
    assert first is not None
    # All ranks are here, as those of a group make it together.
    blocks = _blocks_of(plan, first)
    exchange = _exchange_of(plan.grid, blocks)
    if first.numel() == 0:
        # No other rank needs keys of one without queries. Its part of the gradients is 0.
        nothing = first.sum()
        for x, need in zip(tensors[1:], needs_grad[1:], strict=True):
            if x is not None and need:
                nothing = nothing + x.sum()
        return [
            first.new_zeros(plan.local_shape(role), dtype=_ops.dtype_of(role, first.dtype))
            + nothing.to(_ops.dtype_of(role, first.dtype))
            for role in operator.outputs
        ]
    if exchange is None:
        results = local(operator, *tensors, *options)
        return results if isinstance(results, tuple) else (results,)
    return _of_blocks(plan, operator, exchange, blocks, tensors, options, local)


def _blocks_of(plan: _Plan, first: Tensor) -> tuple[Block, ...]:
    """In which blocks this rank computes its queries."""
    halos, part = plan.grid.halos, plan.grid.part
    blocks = halos.blocks(part)
    inside = math.prod(_lengths(blocks[0].queries)) * blocks[0].is_inside
    held = math.prod(_lengths(halos.held(part)))
    is_worth_it = 2 * inside >= held and first.numel() >= _LEAST_TO_CUT
    return blocks if is_worth_it else halos.whole(part)


def _of_blocks(
    plan: _Plan,
    operator: _ops.Operator,
    exchange: Exchange,
    blocks: Sequence[Block],
    tensors: Sequence[Tensor | None],
    options: Sequence[Any],
    local: Callable[..., Any],
) -> Sequence[Tensor | None]:
    """This rank's part of the outputs, computed block by block: first queries that need nothing of
    others, while all else is on its way."""
    config, *others = options
    rank, halos = len(plan.grid.dims), plan.grid.halos
    held = [begin for begin, _ in halos.held(plan.grid.part)]
    boxes = tuple(
        tuple(slice(b - h, e - h) for (b, e), h in zip(block.queries, held, strict=True))
        for block in blocks
    )
    axes = [None if way is None else way.grid_axis for way in plan.ways]
    travelling = [i for i, axis in enumerate(axes) if axis is not None]
    flight, sent, departed = _sent(
        exchange, [tensors[i] for i in travelling], [axes[i] for i in travelling]
    )
    # What each block has of each tensor.
    many: list[list[Any]] = [list(tensors) for _ in blocks]
    memory: list[Tensor] = []
    if len(blocks) > 1:
        for i, (role, x) in enumerate(zip(operator.inputs, tensors, strict=True)):
            if x is not None and (axis := role.axis_of("Q", rank)) is not None:
                for given, part in zip(many, _Cut.apply(axis, boxes, x), strict=True):
                    given[i] = part
        first = tensors[0]
        assert first is not None
        memory = [
            first.new_empty(plan.local_shape(role), dtype=_ops.dtype_of(role, first.dtype))
            for role in operator.outputs
        ]
    found_axes = (role.axis_of("Q", rank) for role in operator.outputs)
    output_axes = [axis for axis in found_axes if axis is not None]  # all have queries
    found: list[Sequence[Tensor]] = []
    arrived: Iterator[Tensor] | None = None
    for block, box, given in zip(blocks, boxes, many, strict=True):
        if block.is_inside:
            come: Iterator[Tensor] = iter(sent)
        else:
            if arrived is None:
                arrived = iter(_Receive.apply(flight, departed))
            come = arrived
        for i in travelling:
            given[i] = next(come)
        for i, way in enumerate(plan.ways):
            for picked_axis, of_grid, length in () if way is None else way.picked:
                tokens = torch.arange(*block.needed[of_grid], device=given[i].device) % length
                given[i] = given[i].index_select(picked_axis, tokens)
        parted = with_parts(
            config,
            [begin for begin, _ in block.queries],
            [begin for begin, _ in block.needed],
            [axis.length for axis in halos.axes],
        )
        places = [x[_at(axis, box)] for x, axis in zip(memory, output_axes, strict=bool(memory))]
        with _ops.outputs_at(places):
            results = local(operator, *given, parted, *others)
        found.append(results if isinstance(results, tuple) else (results,))
    if arrived is None:
        flight.unpack()  # which waits until all is sent
    if not memory:
        return found[0]
    return [
        None if parts[0] is None else _Joined.apply(axis, boxes, [whole], *parts)
        for axis, whole, parts in zip(output_axes, memory, zip(*found, strict=True), strict=True)
    ]


def _sent(
    exchange: Exchange, tensors: Sequence[Any], axes: Sequence[Any]
) -> tuple[Flight, list[Tensor], Tensor]:
    """(tensors on their way, the same for queries that need nothing else, that they are so).
    `axes`: the first of the grid."""
    is_recorded = torch.is_grad_enabled()
    wanted = [is_recorded and x.requires_grad for x in tensors]
    flight = Flight(exchange, tensors, axes, wanted)
    *differentiable, departed = _Send.apply(flight, *tensors)
    kept = iter(differentiable)
    return (
        flight,
        [next(kept) if want else x for x, want in zip(tensors, wanted, strict=True)],
        departed,
    )


def _local_tensors(
    plan: _Plan, inputs: Sequence[Tensor | None], needs_grad: Sequence[bool]
) -> list[Tensor | None]:
    """What this rank holds of the tensors that its part of the work needs, without halos."""
    mesh = plan.grid.mesh
    tensors = [x.to_local() if isinstance(x, DTensor) else x for x in inputs]
    shared = [
        (i, way.shared)
        for i, (way, need) in enumerate(zip(plan.ways, needs_grad, strict=True))
        if way is not None and way.shared and need
    ]
    if shared:
        results = _Shared.apply(
            mesh, tuple(dims for _, dims in shared), *(tensors[i] for i, _ in shared)
        )
        for (i, _), x in zip(shared, results, strict=True):
            tensors[i] = x
    for i, way in enumerate(plan.ways):
        if way is None:
            continue
        x = tensors[i]
        assert x is not None
        for axis, begin, length in way.narrowed:
            x = x.narrow(axis, begin, length)
        tensors[i] = x
    return tensors


def _plan_of(
    operator: _ops.Operator, inputs: Sequence[Tensor | None], config: Config, scale: float | None
) -> _Plan:
    """Raises where the tensors do not fit each other or the mesh."""
    first = inputs[0]
    assert isinstance(first, DTensor)
    mesh = first.device_mesh
    known: list[Any] = []
    for role, x in zip(operator.inputs, inputs, strict=True):
        if x is None and not role.is_required:
            known.append(None)
            continue
        _ops.check_tensor(role.name, x)
        assert x is not None
        placements = None
        if isinstance(x, DTensor):
            if x.device_mesh != mesh:
                raise ValueError(
                    f"{role.name}: is on {x.device_mesh}; must be on the mesh of "
                    f"{operator.inputs[0].name}, {mesh}"
                )
            placements = tuple(x.placements)
        elif role.is_required:
            raise TypeError(
                f"{role.name}: got a tensor that is no DTensor; must be a DTensor, as "
                f"{operator.inputs[0].name} is"
            )
        known.append((tuple(x.shape), _ops.dtype_name(x), placements))
    operator.check_devices(inputs)
    plan = _planned(operator, tuple(known), tuple(config), scale, mesh, _groups(mesh))
    for role, x, way in zip(operator.inputs, inputs, plan.ways, strict=True):
        if isinstance(x, DTensor) and way is not None:
            _check_held(role.name, x, way.local_shape)
    return plan


def _check_held(name: str, x: DTensor, expected: tuple[int, ...] | None) -> None:
    held = tuple(x.to_local().shape)
    if held != expected:
        raise ValueError(
            f"{name}: rank {dist.get_rank()} holds {list(held)} of {list(x.shape)}, placed "
            f"{list(x.placements)}; must hold {list(expected or ())}, as torch.chunk cuts"
        )


def _cuts(
    name: str, placements: Sequence[Placement] | None, letters: Sequence[Letter]
) -> dict[Letter, tuple[int, ...]]:
    """The axes of the mesh that cut each axis of a tensor, one after the other."""
    found: dict[Letter, tuple[int, ...]] = {}
    for dim, placement in enumerate(placements or ()):
        if type(placement) is Shard:
            letter = letters[placement.dim % len(letters)]
            found[letter] = (*found.get(letter, ()), dim)
        elif type(placement) is not Replicate:
            raise ValueError(
                f"{name}: got placements {list(placements or ())}; each must be Shard or "
                "Replicate, whose parts are contiguous and whole (redistribute it first)"
            )
    return found


@functools.lru_cache(maxsize=1024)
def _planned(
    operator: _ops.Operator,
    known: tuple[tuple[tuple[int, ...], str, tuple[Placement, ...] | None] | None, ...],
    config: Config,
    scale: float | None,
    mesh: DeviceMesh,
    groups: tuple[Any, ...],
) -> _Plan:
    """`known`: of each tensor the shape, the type and where it is placed."""
    rank = config[0]
    _core.plan(  # raises what libnatten says of the whole problem
        operator.name,
        config,
        scale,
        "",
        [None if x is None else x[:2] for x in known],
        [True] * len(operator.outputs),
        device=None,
    )
    for option in PART_OPTIONS:
        if (given := options_of(config).get(option.name)) is not None:
            raise ValueError(
                f"{option.name}: got {list(given)} for DTensors, which say themselves which part "
                "of the grid a rank has; must be None"
            )
    sizes = _sizes_of(operator, known, config)
    first, placed = operator.inputs[0], known[0]
    assert placed is not None
    cuts = _cuts(first.name, placed[2], _letters(first, rank))
    for letter in cuts:
        if letter[0] not in "BHQ":
            raise ValueError(
                f"{first.name}: got placements {list(placed[2] or ())}; its last axis must be "
                "whole on every rank"
            )
    dims = tuple(cuts.get(("Q", i), ()) for i in range(rank))
    if config[-1] & SEPARATE_KEY_GRID and any(dims):
        raise ValueError(
            f"{first.name}: got placements {list(placed[2] or ())}; tokens of `attention`, which "
            "see all keys, must be whole on every rank"
        )
    options = options_of(config)
    window = window_options(
        rank,
        **{
            name: options.get(name)
            for name in ("kernel_size", "stride", "dilation", "is_causal", "boundary")
        },
    )
    parts = tuple(tuple(mesh.size(dim) for dim in of_axis) for of_axis in dims)
    grid = Grid(mesh, groups, dims, halos_of(tuple(sizes["Q"]), parts, window))
    plan = _Plan(grid, sizes, cuts, ())
    ways = [
        None if x is None else _way_of(plan, first, placed[2], role, x[0], x[2])
        for role, x in zip(operator.inputs, known, strict=True)
    ]
    return plan._replace(ways=tuple(ways))


def _sizes_of(
    operator: _ops.Operator, known: Sequence[Any], config: Config
) -> dict[str, tuple[int, ...]]:
    shapes = [None if x is None else torch.empty(x[0], device="meta") for x in known]
    return operator.sizes(shapes, {}, config)


def _way_of(
    plan: _Plan,
    first: Role,
    placed_first: tuple[Placement, ...] | None,
    role: Role,
    shape: tuple[int, ...],
    placed: tuple[Placement, ...] | None,
) -> _Way:
    rank, mesh, cuts = len(plan.grid.dims), plan.grid.mesh, plan.cuts
    letters = _letters(role, rank)
    own = _cuts(role.name, placed, letters)
    like = {letter: (_LIKE.get(letter[0], letter[0]), letter[1]) for letter in letters}

    def refuse(why: str) -> NoReturn:
        got = "got no DTensor" if placed is None else f"got placements {list(placed)}"
        raise ValueError(
            f"{role.name}: {got} where {first.name} has {list(placed_first or ())}; {why}"
        )

    for letter, dims in own.items():
        if cuts.get(like[letter], ()) != dims:
            refuse(f"must be placed like {first.name}, or Replicate where that may be")
    whole = [letter for letter in letters if like[letter] in cuts and letter not in own]
    if role.is_required and any(like[letter][0] != "H" for letter in whole):
        refuse(f"must be placed like {first.name}, or Replicate along heads")
    is_grid_whole = {
        letter in whole for letter in letters if letter[0] == "K" and like[letter] in cuts
    }
    if len(is_grid_whole) > 1:
        refuse(f"must have all axes of the grid placed like {first.name}, or none")
    local, narrowed, picked = [], [], []
    for axis, (letter, length) in enumerate(zip(letters, shape, strict=True)):
        begin, end = 0, length
        if letter in own:
            sizes = [mesh.size(dim) for dim in own[letter]]
            begin, end = chunks(length, sizes)[_number(mesh, own[letter], _coordinate(mesh))]
        local.append(end - begin)
        if letter[0] in "HG" and like[letter] in cuts:
            _check_heads(plan, length, letter in own, refuse)
        if letter not in whole or (letter[0] == "M" and length == 1):
            continue
        if letter[0] == "K":
            picked.append((axis, letter[1], length))
            continue
        begin, end = plan.range_of(like[letter])
        if letter[0] in "HG":
            group = plan.sizes["H"][0] // length
            begin, end = begin // group, -(-end // group)
        narrowed.append((axis, begin, end - begin))
    taken = {dim for dims in own.values() for dim in dims}
    shared = sorted({dim for dims in cuts.values() for dim in dims} - taken)
    return _Way(
        None if placed is None else tuple(local),
        tuple(shared),
        tuple(narrowed),
        tuple(picked),
        role.axis_of("K", rank) if is_grid_whole == {False} else None,
    )


def _check_heads(plan: _Plan, count: int, is_cut: bool, refuse: Callable[[str], NoReturn]) -> None:
    """Raises where a rank would have queries' heads of which it has not all or only some of a
    group's. `count`: heads of the tensor, which groups share; `is_cut`: whether it is cut too."""
    heads, mesh = plan.sizes["H"][0], plan.grid.mesh
    counts = [mesh.size(dim) for dim in plan.cuts["H", 0]]
    group = heads // count
    for (begin, end), (low, high) in zip(chunks(heads, counts), chunks(count, counts), strict=True):
        if is_cut and (begin, end) != (low * group, high * group):
            refuse(
                f"its {count} heads and the {heads} of queries must be cut alike by {counts}; "
                "Replicate along heads serves where groups are whole"
            )
        if not is_cut and (begin % group or end % group) and begin // group != (end - 1) // group:
            refuse(
                f"groups of {group} heads must be whole, or a part of one, on each rank; "
                f"{heads} heads are cut by {counts}"
            )


def halo_exchange(
    tensors: Tensor | Sequence[Tensor],
    kernel_size: Ints,
    *,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools | None = False,
    boundary: Boundaries = "shift",
    first_axis: int = 1,
) -> tuple[Any, tuple[int, ...]]:
    """The tokens that the windows of this rank's part of a grid see, of the ranks that hold them.

        around, offset = natten.distributed.halo_exchange(x, (3, 3), boundary="cut")

    Every other rank gets one message with all that it needs of all tensors. Differentiable: the
    gradients of these tokens travel home and are added there. `natten.na1d` and its like do this
    by themselves.

    Args:
        tensors: a DTensor, or several of one mesh that lie on one grid and are cut alike along its
            axes: they travel together. All other axes may be placed in any way, alike on all ranks.
        kernel_size: the window, one per axis of the grid, or a number for one axis. A window of
            2 r + 1 with the boundary "cut" reaches r tokens to both sides.
        stride, dilation, is_causal, boundary: as in `natten.na1d`.
        first_axis: the first axis of the grid; 1 after a batch axis.

    Returns:
        (tensor, offset): this rank's plain tensor, or a tuple of them, and per axis the token of
        the grid that comes first in it. On a circular axis tokens count on beyond both ends.

    Raises:
        ValueError, TypeError: on all ranks, where any of them was called with what does not fit,
            or otherwise than the others.
        RuntimeError: another rank has ended, or failed.
    """
    many: list[Any] = [tensors] if isinstance(tensors, Tensor) else listed("tensors", tensors)
    if not many or not all(isinstance(x, DTensor) for x in many):
        raise TypeError(f"tensors: got {[type(x).__name__ for x in many]}; must be DTensors")
    mesh = many[0].device_mesh
    given = dict(kernel_size=kernel_size, stride=stride, dilation=dilation, is_causal=is_causal,
                 boundary=boundary)  # fmt: skip
    description: dict[str, Hashable] = {
        "the function": "halo_exchange",
        "the window": repr(given),
        "first_axis": first_axis,
        "tensors": tuple(
            _described(x, x.requires_grad and torch.is_grad_enabled()) for x in many
        ),
    }  # fmt: skip
    device = many[0].to_local().device
    try:
        grid = _grid_around(many, given, first_axis)
    except Exception:
        _refused(mesh, device, description)
        raise
    _agree(mesh, device, description)
    exchange = _exchange_of(grid, grid.halos.whole(grid.part))
    local = tuple(x.to_local() for x in many)
    if exchange is not None:
        flight, _, departed = _sent(exchange, local, (first_axis,) * len(local))
        local = _Receive.apply(flight, departed)
    offset = tuple(begin for begin, _ in grid.halos.needed(grid.part))
    return (local[0] if isinstance(tensors, Tensor) else local), offset


def _grid_around(many: Sequence[DTensor], window: dict[str, Any], first_axis: int) -> Grid:
    """The one grid on which tensors lie."""
    kernel_size = window["kernel_size"]
    rank = len(kernel_size) if isinstance(kernel_size, Sequence) else 1
    window = window_options(rank, **window)
    found = []
    for x in many:
        if x.dim() < first_axis + rank:
            raise ValueError(
                f"tensors: got shape {list(x.shape)}; must have {rank} axes from {first_axis} on"
            )
        cuts = _cuts("tensors", x.placements, [("", i) for i in range(x.dim())])
        axes = range(first_axis, first_axis + rank)
        dims = tuple(cuts.get(("", axis), ()) for axis in axes)
        found.append((x.device_mesh, tuple(x.shape[axis] for axis in axes), dims))
        if found[-1] != found[0]:
            raise ValueError(
                f"tensors: got {list(x.shape)}, placed {list(x.placements)}, with "
                f"{list(many[0].shape)}, placed {list(many[0].placements)}; must be on one mesh, "
                "alike along the axes of the grid"
            )
        local = list(x.shape)
        for (_, axis), of_axis in cuts.items():
            ranges = chunks(x.shape[axis], [x.device_mesh.size(dim) for dim in of_axis])
            at = _number(x.device_mesh, of_axis, _coordinate(x.device_mesh))
            local[axis] = ranges[at][1] - ranges[at][0]
        _check_held("tensors", x, tuple(local))
    mesh, shape, dims = found[0]
    parts = tuple(tuple(mesh.size(dim) for dim in of_axis) for of_axis in dims)
    return Grid(mesh, _groups(mesh), dims, halos_of(shape, parts, window))


# ---- modules ----


@torch.compiler.disable
def mapped(name: str, module: nn.Module, x: DTensor) -> Tensor:
    """`module(x)` of a module that maps every token by itself and keeps all axes but the last, on
    the tokens of each rank. PyTorch's own linear map of a DTensor would gather tokens that are cut
    along several axes. The parameters are alike on all ranks."""
    mesh = x.device_mesh
    parameters = dict(module.named_parameters())
    description: dict[str, Hashable] = {
        "the function": name,
        "x": (tuple(x.shape), x.dtype, tuple(x.placements)),
        "parameters": tuple(
            (n, tuple(p.shape), p.dtype, getattr(p, "placements", None))
            for n, p in parameters.items()
        ),
    }
    try:
        cuts = _cuts("x", x.placements, [("", i) for i in range(x.dim())])
        if ("", x.dim() - 1) in cuts:
            raise ValueError(
                f"x: got placements {list(x.placements)}; its last axis must be whole on every rank"
            )
        for n, p in parameters.items():
            if isinstance(p, DTensor) and not all(type(q) is Replicate for q in p.placements):
                raise ValueError(
                    f"{name}.{n}: got placements {list(p.placements)}; each must be Replicate"
                )
    except Exception:
        _refused(mesh, x.to_local().device, description)
        raise
    _agree(mesh, x.to_local().device, description)
    dims = tuple(sorted(dim for of_axis in cuts.values() for dim in of_axis))
    local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters.values()]
    local = _Shared.apply(mesh, (dims,) * len(local), *local) if local else []
    result = torch.func.functional_call(
        module, dict(zip(parameters, local, strict=True)), (x.to_local(),)
    )
    shape = torch.Size((*x.shape[:-1], result.shape[-1]))
    return _distributed(result, mesh, x.placements, shape)
