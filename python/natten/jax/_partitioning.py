"""How a call is split over devices: by batch, by heads and by the axes of the grid.

Which dimensions these are, the letters of `Role.dims` say. Where the grid is split, devices
exchange the halos of keys and values (`_halos.py`); its axes need not be divided by devices. An
array that is split otherwise is gathered first, or refused where its type holds the sharding
(meshes with explicit axes).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from natten._roles import GRIDS, Role
from natten.jax import _halos
from natten.jax._halos import Axes, Halos
from natten.jax._private import (
    ArrayMapping,
    CompoundFactor,
    LoweringRuleContext,
    SdyShardingRule,
    custom_partitioning,
    is_partitioned_by_shardy,
    made_varying,
    mapped_axes,
    outside_of_meshes,
    varying_axes,
)

# Of a grid that is split: the offsets of queries and keys, and the size of the grid.
Part: TypeAlias = tuple[Any, tuple[int, ...]]
# Computes a call on shards; the shapes are those of the shards of its results, by output.
Run: TypeAlias = Callable[[Sequence[Any], Sequence[tuple[int, ...]], Part | None], Sequence[Any]]

# The axes over which the dimensions B, M, H, G, Q and K of a call are split (`Role.dims`); of Q and
# K, one entry per axis of the grid.
Split: TypeAlias = Mapping[str, Sequence[Axes]]


def axes_of(entry: Any) -> Axes:
    """An entry of a PartitionSpec as a tuple."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _entry(axes: Axes) -> Any:
    """The inverse of `axes_of`."""
    return None if not axes else axes[0] if len(axes) == 1 else axes


def spec_of(role: Role, split: Split, rank: int) -> PartitionSpec:
    """How one tensor of a call is split."""
    entries: list[Any] = []
    for dim in role.dims:
        entries += map(_entry, split.get(dim) or [()] * (rank if dim in GRIDS else 1))
    return PartitionSpec(*entries)


def _heads(
    roles: Sequence[Role], shapes: Sequence[Sequence[int]], rank: int
) -> tuple[int, int, bool]:
    """(heads, heads that share a key-value head, whether all do, so that each device needs it)."""
    sizes = {
        dim: shape[axis]
        for role, shape in zip(roles, shapes, strict=True)
        for dim in "HG"
        if (axis := role.axis_of(dim, rank)) is not None
    }
    heads = sizes["H"]
    key_heads = sizes.get("G", heads)
    return heads, heads // key_heads, key_heads == 1 < heads


def vary_alike(tensors: Sequence[jax.Array | None]) -> tuple[jax.Array | None, ...]:
    """Inside `shard_map`: arrays that are the same on all shards become ones that may vary, as
    others do, so that their gradients are summed over shards."""
    varying = [frozenset() if x is None else varying_axes(x) for x in tensors]
    union = frozenset().union(*varying)
    return tuple(
        x if x is None or v == union else made_varying(x, tuple(sorted(union - v)))
        for x, v in zip(tensors, varying, strict=True)
    )


def split_of_types(
    roles: Sequence[Role],
    avals: Sequence[Any],
    rank: int,
    is_grid_splittable: bool,
    of_results: Sequence[Axes],
) -> Split:
    """The split that the types of the inputs hold; none but where a mesh has explicit axes.
    `of_results`: of the grid, where no input has it.

    Raises ValueError where an input is not split alike, or by what cannot be.
    """
    specs = [aval.sharding.spec for aval in avals]

    def first(dims: str, i: int = 0, default: Axes = ()) -> Axes:
        """As the first input that has the dimension is split."""
        for role, spec in zip(roles, specs, strict=True):
            if (axis := role.axis_of(dims, rank)) is not None:
                return axes_of(spec[axis + i])
        return default

    grid: list[Axes] = [()] * rank
    if is_grid_splittable:
        grid = [first("QK", i, axes) for i, axes in enumerate(of_results or grid)]
    split = _split(first("BM"), first("H"), grid, roles, [aval.shape for aval in avals], rank)
    for role, aval, spec in zip(roles, avals, specs, strict=True):
        if role.is_mask and aval.shape[0] == 1:  # split or not, each device has it
            split = {**split, "M": [axes_of(spec[0])]}
        if tuple(spec) != tuple(spec_of(role, split, rank)):
            raise ValueError(
                f"{role.name}: got sharding {spec}; must be {spec_of(role, split, rank)}. Only "
                "batch, heads and the axes of a whole grid can be split, and alike in all arrays; "
                "use jax.sharding.reshard first"
            )
    return split


def _split(
    batch: Axes,
    heads: Axes,
    grid: Sequence[Axes],
    roles: Sequence[Role],
    shapes: Sequence[Sequence[int]],
    rank: int,
) -> Split:
    *_, is_shared = _heads(roles, shapes, rank)
    of_mask = batch if _is_mask_split(roles, shapes) else ()
    by_dim = {"B": batch, "M": of_mask, "H": heads, "G": () if is_shared else heads}
    return {dim: [axes] for dim, axes in by_dim.items()} | {"Q": grid, "K": grid}


def _is_mask_split(roles: Sequence[Role], shapes: Sequence[Sequence[int]]) -> bool:
    """Whether a key mask has the batch, and not one for all."""
    return any(role.is_mask and shape[0] > 1 for role, shape in zip(roles, shapes, strict=True))


def _split_of_shards(
    mesh: Mapping[str, int],
    roles: Sequence[Role],
    tensors: Sequence[Any],
    rank: int,
    is_grid_splittable: bool,
) -> Split:
    """The split that keeps the most of how tensors (shapes with shardings) are split."""
    shapes = [x.shape for x in tensors]
    heads, group, is_shared = _heads(roles, shapes, rank)

    def most(dims: str, size: int | None, taken: Axes, i: int = 0) -> Axes:
        """`size`: what the axes must divide, if not the dimension itself; 0 for anything."""
        candidates = [
            _dividing(
                mesh,
                x.shape[axis + i] if size is None else size,
                axes_of(x.sharding.spec[axis + i]),
                taken,
            )
            for role, x in zip(roles, tensors, strict=True)
            if (axis := role.axis_of(dims, rank)) is not None
            and x.sharding is not None  # not known yet
        ]
        return max(candidates, key=lambda axes: math.prod(mesh[a] for a in axes), default=())

    batch = most("BM", None, ())
    # Heads stay with the key-value head that they share, unless all share one.
    by_heads = most("H", heads, batch) if is_shared else most("HG", heads // group, batch)
    taken, grid = batch + by_heads, []
    for i in range(rank):
        grid.append(most("QK", 0, taken, i) if is_grid_splittable else ())
        taken += grid[-1]
    return _split(batch, by_heads, grid, roles, shapes, rank)


def _dividing(mesh: Mapping[str, int], size: int, axes: Axes, taken: Axes) -> Axes:
    """As many of the first axes as are not taken and divide a size into equal parts."""
    kept: Axes = ()
    for axis in axes:
        size, rest = divmod(size, mesh[axis])
        if rest or axis in taken:
            break
        kept += (axis,)
    return kept


def _sharding_rule(
    mesh: Mapping[str, int],
    roles: Sequence[Role],
    shapes: Sequence[Sequence[int]],
    rank: int,
    inputs: int,
    is_grid_splittable: bool,
) -> SdyShardingRule:
    """The same for the partitioner Shardy: tensors share the factors that batch, heads and the axes
    of the grid have, and no other."""
    heads, group, is_shared = _heads(roles, shapes, rank)
    shared: dict[str, Any] = {"B": "batch", "H": "heads", "G": "heads"}
    if _is_mask_split(roles, shapes):
        shared["M"] = "batch"
    sizes: dict[str, Any] = {}
    if is_shared or any(heads // group % size for size in mesh.values()):
        # Over axes that key-value heads cannot be split over, Shardy would split heads by parts of
        # axes, which have no names.
        shared["G"] = "heads" if group == 1 else "kv_heads"
    elif group > 1:
        shared["H"] = CompoundFactor("heads", "group")
        sizes["group"] = group
    mappings = []
    for i, role in enumerate(roles):
        factors = []
        for dim in role.dims:
            count = rank if dim in GRIDS else 1
            of_grid = is_grid_splittable and dim in "QK"
            factors += [
                f"grid{j}" if of_grid else shared.get(dim) or f"{dim.lower()}{i}x{j}"
                for j in range(count)
            ]
        mappings.append(ArrayMapping(*factors))
    return SdyShardingRule(tuple(mappings[:inputs]), tuple(mappings[inputs:]), **sizes)


def partitionable(
    run: Run,
    inputs: Sequence[Role],
    outputs: Sequence[Role],
    shapes: Sequence[tuple[int, ...]],
    rank: int,
    window: Mapping[str, Any] | None,
    context: LoweringRuleContext,
) -> Callable[..., Sequence[Any]]:
    """A function of arrays that XLA splits over devices. `shapes`: of inputs and outputs.
    `window`: its options by name, one value per axis; none where all queries see all of as many
    keys; None where the grid cannot be split."""
    roles = (*inputs, *outputs)
    output_shapes = shapes[len(inputs) :]
    is_grid_splittable = window is not None

    def whole(*arrays: Any) -> Sequence[Any]:
        return run(arrays, output_shapes, None)

    if _is_inside_shard_map(context):
        return whole

    def infer(mesh: Mesh, args: Sequence[Any], results: Sequence[Any]) -> Sequence[Any]:
        mesh, args, _ = _with_names(mesh, args, ())
        split = _split_of_shards(mesh.shape, inputs, args, rank, is_grid_splittable)
        return [NamedSharding(mesh, spec_of(role, split, rank)) for role in outputs]

    def partition(mesh: Mesh, args: Sequence[Any], results: Sequence[Any]) -> Any:
        mesh, args, results = _with_names(mesh, args, results)
        split = _split_of_shards(mesh.shape, roles, (*args, *results), rank, is_grid_splittable)
        shardings = [NamedSharding(mesh, spec_of(role, split, rank)) for role in roles]
        of_results = shardings[len(inputs) :]
        shards = [
            _shard_shape(mesh.shape, s.spec, x)
            for s, x in zip(of_results, output_shapes, strict=True)
        ]
        halos, grid = _halos_of(mesh.shape, split, roles, shapes, rank, window)

        def of_shards(*arrays: Any) -> Sequence[Any]:
            with outside_of_meshes():
                if not halos.axes:
                    computed = run(arrays, shards, None)
                else:
                    computed = _with_halos(run, inputs, outputs, arrays, shards, halos, grid)
                return [
                    _summed(x, _missing(role, split))
                    for role, x in zip(outputs, computed, strict=True)
                ]

        return mesh, of_shards, of_results, tuple(shardings[: len(inputs)])

    def rule(mesh: Mesh, *types: Any) -> SdyShardingRule:
        return _sharding_rule(mesh.shape, roles, shapes, rank, len(inputs), is_grid_splittable)

    function = custom_partitioning(whole)
    function.def_partition(partition, infer_sharding_from_operands=infer, sharding_rule=rule)
    return function


def _halos_of(
    mesh: Mapping[str, int],
    split: Split,
    roles: Sequence[Role],
    shapes: Sequence[tuple[int, ...]],
    rank: int,
    window: Mapping[str, Any] | None,
) -> tuple[Halos, tuple[int, ...]]:
    """(of the keys of each device, the size of the grid)."""
    grid: tuple[int, ...] = next(
        (
            tuple(shape[axis : axis + rank])
            for role, shape in zip(roles, shapes, strict=True)
            if (axis := role.axis_of("QK", rank)) is not None
        ),
        (0,) * rank,
    )
    return _halos.halos_of(mesh, split["Q"], grid, window or None), grid


def _shard_shape(
    mesh: Mapping[str, int], spec: PartitionSpec, shape: Sequence[int]
) -> tuple[int, ...]:
    """Of arrays as XLA splits them, also where devices do not divide them: then the last have less
    than that, or nothing."""
    parts = [math.prod(mesh[name] for name in axes_of(entry)) for entry in spec]
    return tuple(-(-n // count) for n, count in zip(shape, parts, strict=True))


def _with_halos(
    run: Run,
    inputs: Sequence[Role],
    outputs: Sequence[Role],
    arrays: Sequence[Any],
    shards: Sequence[tuple[int, ...]],
    halos: Halos,
    grid: tuple[int, ...],
) -> Sequence[Any]:
    """A call on a part of the grid: what comes with keys is exchanged before, and what becomes of
    them sent home afterwards."""
    rank = halos.rank
    arrays = [
        _halos.to_end(x, halos, role.axis_of("QK", rank), _filling(role))
        for role, x in zip(inputs, arrays, strict=True)
    ]
    arrays = extended_keys(inputs, arrays, halos)
    axes = [role.axis_of("K", rank) for role in outputs]
    shapes = [
        shape if axis is None else _halos.extended_shape(shape, halos, axis)
        for axis, shape in zip(axes, shards, strict=True)
    ]
    results = _halos.sent_home(run(arrays, shapes, (_halos.offsets_of(halos), grid)), halos, axes)
    return [
        _halos.to_begin(x, halos, role.axis_of("QK", rank))
        for role, x in zip(outputs, results, strict=True)
    ]


def _filling(role: Role) -> float:
    """What queries have that are no device's own, so that nothing comes of them: all weights are
    0 where logsumexp is infinite, and gradients are where all that comes in is."""
    return math.inf if role.name == "logsumexp" else 0.0


def extended_keys(roles: Sequence[Role], arrays: Sequence[Any], halos: Halos) -> list[Any]:
    """What comes with keys with its halos, which travel together; all else as it is."""
    return _halos.extended(arrays, halos, [role.axis_of("K", halos.rank) for role in roles])


def _missing(role: Role, split: Split) -> Axes:
    """The axes over which a call is split, but not this output of it: a bias has no batch and no
    grid, and all heads may share one key-value head. Each device has a part of the sum that its
    gradient is."""
    there = {axis for dim in role.dims for axes in split.get(dim, ()) for axis in axes}
    every = (axis for dim in "BHQ" for axes in split[dim] for axis in axes)
    return tuple(axis for axis in every if axis not in there)


def _summed(x: Any, axes: Axes) -> Any:
    return jax.lax.psum(x, axes) if axes else x


def _is_inside_shard_map(context: LoweringRuleContext) -> bool:
    """Whether arrays are split already.

    JAX cannot tell how those axes of a mesh split them that shard_map was told to leave alone. Over
    these XLA gathers; its older partitioner would end the process instead.
    """
    mapped, all_axes = mapped_axes(context)
    if mapped != set(all_axes) and not is_partitioned_by_shardy():
        raise NotImplementedError(
            f"jax.shard_map: got axis_names={set(mapped)} of a mesh with {all_axes};"
            " must be all of them, unless the partitioner is Shardy: "
            'jax.config.update("jax_use_shardy_partitioner", True)'
        )
    return bool(mapped)


def _with_names(mesh: Mesh, args: Sequence[Any], results: Sequence[Any]) -> Any:
    """Where JAX knows no mesh, shardings have no names, and everything is gathered."""
    if not mesh.empty:
        return mesh, args, results
    known = next(x.sharding for x in args if x.sharding is not None)
    devices = sorted(known.device_set, key=lambda device: device.id)
    mesh = Mesh(np.array(devices), ("device",))

    def unsplit(tensors: Sequence[Any]) -> list[Any]:
        return [
            jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*[None] * x.ndim))
            )
            for x in tensors
        ]

    return mesh, unsplit(args), unsplit(results)
