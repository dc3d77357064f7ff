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
from natten._halos import Halos, Part, chunks, halos_of
from natten._roles import GRIDS, Role
from natten.torch import _ops

# ---- what travels, and to whom ----


class Message(NamedTuple):
    """What goes to, or comes from, one other rank."""

    peer: int  # its rank in the default group
    held: tuple[tuple[slice, ...], ...]  # boxes of tokens, in what the giver holds
    needed: tuple[tuple[slice, ...], ...]  # the same boxes, in what the taker needs


class Exchange(NamedTuple):
    """What one rank does with the halos of a grid."""

    group: Any  # of the ranks that hold the grid
    held: tuple[int, ...]  # the shape of what this rank holds
    needed: tuple[int, ...]  # the shape of what it needs
    own: Message  # what it needs of its own
    given: tuple[Message, ...]
    taken: tuple[Message, ...]

    def run(self, tensors: Sequence[Tensor], axes: Sequence[int], is_return: bool) -> list[Tensor]:
        """What this rank needs, of tensors of what it holds; `is_return`: the gradients of what it
        holds, of those of what it needs. `axes`: the first axis of the grid of each."""
        outgoing, incoming = self.given, self.taken
        shape_before, shape_after = self.held, self.needed
        if is_return:
            outgoing, incoming = incoming, outgoing
            shape_before, shape_after = shape_after, shape_before
        rank = len(self.held)
        # Bytes, so that one message holds tensors of several types.
        results, token_bytes = [], 0
        for x, axis in zip(tensors, axes, strict=True):
            assert x.shape[axis : axis + rank] == shape_before
            shape = (*x.shape[:axis], *shape_after, *x.shape[axis + rank :])
            results.append(x.new_zeros(shape) if is_return else x.new_empty(shape))
            tokens = math.prod(x.shape[axis : axis + rank])
            token_bytes += x.numel() // tokens * x.element_size() if tokens else 0
        arrived, operations = [], []
        for message in incoming:
            size = token_bytes * sum(_volume(box) for box in message.needed)
            arrived.append(tensors[0].new_empty(size, dtype=torch.uint8))
            operations.append(dist.P2POp(dist.irecv, arrived[-1], message.peer, self.group))
        for message in outgoing:
            boxes = message.needed if is_return else message.held
            size = token_bytes * sum(_volume(box) for box in boxes)
            packed = tensors[0].new_empty(size, dtype=torch.uint8)
            for part, sent in _pairs(tensors, axes, boxes, packed):
                sent.copy_(part)
            operations.append(dist.P2POp(dist.isend, packed, message.peer, self.group))
        operations = [op for op in operations if op.tensor.numel()]
        try:
            waiting = dist.batch_isend_irecv(operations) if operations else []
        except RuntimeError as error:
            raise _failed(error) from error
        for x, result, axis in zip(tensors, results, axes, strict=True):
            for held, needed in zip(self.own.held, self.own.needed, strict=True):
                before, after = (needed, held) if is_return else (held, needed)
                result[_at(axis, after)].copy_(x[_at(axis, before)])
        try:
            for work in waiting:
                work.wait()
        except RuntimeError as error:
            raise _failed(error) from error
        for message, packed in zip(incoming, arrived, strict=True):
            boxes = message.held if is_return else message.needed
            for part, received in _pairs(results, axes, boxes, packed):
                if is_return:
                    part.add_(received)
                else:
                    part.copy_(received)
        return results


def _pairs(
    tensors: Sequence[Tensor],
    axes: Sequence[int],
    boxes: Sequence[tuple[slice, ...]],
    packed: Tensor,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(a box of a tensor, its place in a message), of all boxes and tensors."""
    at = 0
    for x, axis in zip(tensors, axes, strict=True):
        for box in boxes:
            part = x[(slice(None),) * axis + box]
            size = part.numel() * part.element_size()
            yield part, packed[at : at + size].view(part.dtype).view(part.shape)
            at += size


def _volume(box: tuple[slice, ...]) -> int:
    return math.prod(s.stop - s.start for s in box)


def _at(axis: int, box: tuple[slice, ...]) -> tuple[slice, ...]:
    return (slice(None),) * axis + box


def _failed(error: RuntimeError) -> RuntimeError:
    return RuntimeError(
        "natten: ranks that hold parts of one grid could not exchange what their windows need. "
        "Another rank has ended, has raised an error of its own, or was called otherwise, or this "
        "one waited longer than the timeout of its process group (torch.distributed's "
        f"init_process_group sets it): {error}"
    )


class _Halo(torch.autograd.Function):
    """What windows need, of what ranks hold."""

    @staticmethod
    def forward(
        ctx: Any, exchange: Exchange, axes: tuple[int, ...], is_return: bool, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.options = exchange, axes, is_return
        ctx.differentiable = [x.is_floating_point() for x in tensors]
        results = exchange.run(tensors, axes, is_return)
        ctx.mark_non_differentiable(*(x for x in results if not x.is_floating_point()))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        exchange, axes, is_return = ctx.options
        # All ranks have the same gradients to send, as they agreed on which tensors require them.
        wanted = [bool(need) for need in ctx.needs_input_grad[3:]]
        kept = [(grad, axis) for grad, axis, want in zip(grads, axes, wanted, strict=True) if want]
        home = iter(
            _Halo.apply(exchange, tuple(a for _, a in kept), not is_return, *(g for g, _ in kept))
        )
        return None, None, None, *(next(home) if want else None for want in wanted)


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
def _exchange_of(grid: Grid) -> Exchange | None:
    """None where no axis is cut."""
    cut = tuple(sorted(dim for dims in grid.dims for dim in dims if grid.mesh.size(dim) > 1))
    if not cut:
        return None
    part, halos = grid.part, grid.halos

    def message(peer: Part, giver: Part, taker: Part) -> Message:
        boxes = halos.boxes(giver, taker)
        return Message(
            grid.rank_of(peer),
            tuple(tuple(slice(p.held, p.held + p.tokens) for p in box) for box in boxes),
            tuple(tuple(slice(p.needed, p.needed + p.tokens) for p in box) for box in boxes),
        )

    return Exchange(
        _group_of(grid.mesh, cut, grid.groups),
        _lengths(halos.held(part)),
        _lengths(halos.needed(part)),
        message(part, part, part),
        tuple(message(taker, part, taker) for taker in halos.takers(part)),
        tuple(message(giver, giver, part) for giver in halos.givers(part)),
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
    picked: tuple[tuple[int, tuple[int, ...]], ...]  # (axis, indices) likewise
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
    exchange = _exchange_of(plan.grid)
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
    config, *others = options
    if exchange is not None:
        axes = [None if way is None else way.grid_axis for way in plan.ways]
        travelling = [i for i, axis in enumerate(axes) if axis is not None]
        arrived = _Halo.apply(
            exchange,
            tuple(axes[i] for i in travelling),
            False,
            *(tensors[i] for i in travelling),
        )
        for i, x in zip(travelling, arrived, strict=True):
            tensors[i] = x
        config = with_parts(config, *_offsets_and_size(plan.grid))
    results = local(operator, *tensors, config, *others)
    return results if isinstance(results, tuple) else (results,)


def _offsets_and_size(grid: Grid) -> tuple[list[int], list[int], list[int]]:
    """What this rank's call has of PART_OPTIONS."""
    return (
        [begin for begin, _ in grid.halos.held(grid.part)],
        [begin for begin, _ in grid.halos.needed(grid.part)],
        [axis.length for axis in grid.halos.axes],
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
        for axis, tokens in way.picked:
            x = x.index_select(axis, torch.tensor(tokens, dtype=torch.int64, device=x.device))
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
    grid = Grid(mesh, groups, dims, halos_of(tuple(sizes["Q"]), parts, **window))
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
            begin, end = plan.grid.halos.needed(plan.grid.part)[letter[1]]
            picked.append((axis, tuple(token % length for token in range(begin, end))))
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
    exchange = _exchange_of(grid)
    local = tuple(x.to_local() for x in many)
    if exchange is not None:
        local = _Halo.apply(exchange, (first_axis,) * len(local), False, *local)
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
    return Grid(mesh, _groups(mesh), dims, halos_of(shape, parts, **window))


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
