"""The functions of `natten.jax`: public signatures, and derivatives over the primitives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Never, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from natten import _core
from natten._args import (
    ALLOW_NO_KEYS,
    SEPARATE_KEY_GRID,
    UNKNOWN_OFFSETS,
    Bools,
    Boundaries,
    Config,
    Ints,
    as_part,
    attention_flags,
    check_extra,
    check_lengths,
    check_merge,
    integer,
    listed,
    make_config,
    named,
    offset_per_axis,
    options_of,
    product_flags,
    real_scale,
    with_flags,
)
from natten._kernel import _DEFAULT, COMPOSED, check_name, taken_as, tell_meaning
from natten._merge import merge
from natten.jax import _derivatives, _halos, _primitives
from natten.jax._partitioning import extended_keys, vary_alike
from natten.jax._primitives import Operation, Setup

# The fused functions return `output`, or `(output, logsumexp)` with return_lse=True. Neither a
# union nor overloads for every rank would help callers more than this.
FusedResult: TypeAlias = Any
Tensors: TypeAlias = tuple[Array | None, ...]

# Where a part of a grid begins: Python's integers are fixed when a function is traced, arrays of
# integers are read when it runs.
Offsets: TypeAlias = Ints | Array | Sequence[int | Array]

# Of examples, one integer for each, fixed or read likewise.
Lengths: TypeAlias = Sequence[int] | np.ndarray | Array

# With autodiff="any" users get the primitives, whose rules (`_derivatives.py`) hold in every mode;
# with "reverse" the same under a custom_vjp, which bars forward mode. Its rules call primitives, so
# that their results can be differentiated again.


def _attention(setup: Setup, wants_lse: bool, tensors: Tensors) -> tuple[Array, Array | None]:
    output, lse = _primitives.attention_forward(setup, tensors, (True, wants_lse))
    assert output is not None
    return output, lse


def _attention_forward(
    setup: Setup, wants_lse: bool, tensors: Tensors
) -> tuple[tuple[Array, Array | None], Any]:
    output, lse = _attention(setup, True, tensors)  # the backward needs logsumexp
    return (output, lse if wants_lse else None), (tensors, lse)


def _attention_backward(
    setup: Setup, wants_lse: bool, residuals: Any, gradients: tuple[Array, Array | None]
) -> tuple[Tensors]:
    tensors, lse = residuals
    wanted = tuple(t is not None for t in tensors[: _derivatives.TENSORS])
    results = _primitives.attention_backward(setup, (*tensors, lse, *gradients), wanted)
    return (tuple(_derivatives.padded(results, len(tensors))),)


_attention_reverse = jax.custom_vjp(_attention, nondiff_argnums=(0, 1))
_attention_reverse.defvjp(_attention_forward, _attention_backward)


def _unfused(operation: Operation, setup: Setup, tensors: Tensors) -> Array:
    (result,) = operation(setup, tensors, (True,))
    assert result is not None
    return result


def _unfused_forward(operation: Operation, setup: Setup, tensors: Tensors) -> tuple[Array, Tensors]:
    return _unfused(operation, setup, tensors), tensors


def _unfused_backward(
    operation: Operation, setup: Setup, tensors: Tensors, gradient: Array
) -> tuple[Tensors]:
    needed = [t is not None for t in tensors]
    results = _derivatives.REVERSE[operation](setup, tensors, needed, (gradient,))
    return (tuple(_derivatives.padded(results, len(tensors))),)


_unfused_reverse = jax.custom_vjp(_unfused, nondiff_argnums=(0, 1))
_unfused_reverse.defvjp(_unfused_forward, _unfused_backward)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Calls outside of jit would else be traced each time, which takes ten times as long."""
    return jax.jit(function, static_argnums=(0, 1), inline=True)


# By the name of the argument autodiff.
_ATTENTION = {"reverse": _compiled(_attention_reverse), "any": _compiled(_attention)}
_UNFUSED = {"reverse": _compiled(_unfused_reverse), "any": _compiled(_unfused)}


# What users call.


def as_array(name: str, value: ArrayLike) -> Array:
    if isinstance(value, Array):  # converting it is slow where it is differentiated
        return value
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError):
        got = "None" if value is None else type(value).__name__
        raise TypeError(f"{name}: got {got}; must be an array") from None


def _as_arrays(**values: ArrayLike | None) -> Tensors:
    optional = ("rpb", "additional_keys", "additional_values", "key_mask")
    return tuple(
        None if value is None and name in optional else as_array(name, value)  # type: ignore[arg-type]
        for name, value in values.items()
    )


def _config(
    rank: int, window: Sequence[Any], parts: Sequence[Any], key: Any, first_axis: int
) -> tuple[Config, Array | None]:
    """The config of a call, and its offsets where they are read at run time. `window`: as
    `make_config` takes it; `parts`: query_offset, key_offset and grid_size. `first_axis`: that of
    the keys' grid."""
    query_offset, key_offset, grid_size = parts
    if _is_array(key_offset) and grid_size is None:
        raise ValueError(
            "grid_size: missing; must be given where key_offset is an array, which is read when "
            "the program runs"
        )
    if grid_size is None and not (query_offset is None and key_offset is None):
        begins_at_0 = not any(offset_per_axis("key_offset", key_offset or 0, rank))
        if begins_at_0 and key.ndim == rank + 3:  # the keys, which operations on biases lack
            grid_size = key.shape[first_axis : first_axis + rank]
    offsets, flags = None, 0
    if _is_array(query_offset) or _is_array(key_offset):
        rows = _row("query_offset", query_offset, rank), _row("key_offset", key_offset, rank)
        offsets, flags = jnp.stack(rows), UNKNOWN_OFFSETS
        query_offset = key_offset = None
    config = make_config(
        rank,
        *window,
        query_offset=query_offset,
        key_offset=key_offset,
        grid_size=grid_size,
        flags=flags,
    )
    return config, offsets


# Of each spatial axis of the grid, the axes of a mesh that split it.
AxisNames: TypeAlias = str | Sequence[str | Sequence[str] | None]


def _prepared(
    operation: Operation,
    rank: int,
    tensors: Tensors,
    window: Sequence[Any],
    parts: Sequence[Any],
    axis_names: AxisNames | None,
) -> tuple[Tensors, Config]:
    """All inputs of an operation, and its config. `tensors`: with the key mask as the last;
    `axis_names`: spatial_axis_names, where the function has been given any."""
    if axis_names is None:
        axis = operation.inputs[1].axis_of("K", rank)
        assert axis is not None
        config, offsets = _config(rank, window, parts, tensors[1], axis)
        return (*tensors, offsets, None), config
    for name, value in zip(("query_offset", "key_offset", "grid_size"), parts, strict=True):
        if value is not None:
            raise ValueError(
                f"{name}: got {value!r} together with spatial_axis_names, which say where parts "
                "lie; must be None"
            )
    mesh_axes = _mesh_axes(axis_names, rank)
    mesh = _sizes_of(mesh_axes)
    sizes = [math.prod(mesh[name] for name in names) for names in mesh_axes]
    config = make_config(rank, *window)
    grid = _check_parts(operation, rank, tensors, config, sizes)
    if all(size == 1 for size in sizes):
        return (*tensors, None, None), config
    halos = _halos.halos_of(mesh, mesh_axes, grid, options_of(config))
    *arrays, offsets = vary_alike((*tensors, _halos.offsets_of(halos)))
    with_halos = extended_keys(operation.inputs[: len(arrays)], arrays, halos)
    return (*with_halos, offsets, None), as_part(config, grid)


def _mesh_axes(value: Any, rank: int) -> list[tuple[str, ...]]:
    """spatial_axis_names as the names of each axis."""
    must = (
        f"must be one entry per spatial axis, {rank}: None, the name of an axis of a mesh, or a "
        "tuple of such names"
    )
    try:
        entries = [
            () if x is None else (x,) if isinstance(x, str) else tuple(x)
            for x in ([value] if isinstance(value, str) else value)
        ]
    except TypeError:
        raise TypeError(f"spatial_axis_names: got {value!r}; {must}") from None
    every = [name for names in entries for name in names]
    if not all(isinstance(name, str) for name in every):
        raise TypeError(f"spatial_axis_names: got {value!r}; {must}")
    if len(entries) != rank:
        raise ValueError(f"spatial_axis_names: got {value!r}, {len(entries)} entries; {must}")
    if len(set(every)) != len(every):
        raise ValueError(f"spatial_axis_names: got {value!r}; must not name an axis twice")
    return entries


def _sizes_of(mesh_axes: Sequence[tuple[str, ...]]) -> dict[str, int]:
    """By name, in the order of the mesh."""
    sizes = {}
    for name in itertools.chain(*mesh_axes):
        try:
            sizes[name] = jax.lax.psum(1, name)
        except NameError:
            raise ValueError(
                f"spatial_axis_names: got {name!r}; must be an axis of a mesh that jax.shard_map "
                "has split the arrays by, where the function is called"
            ) from None
    of_mesh = jax.sharding.get_abstract_mesh().axis_names
    return {name: sizes[name] for name in (*of_mesh, *sizes) if name in sizes}


def _check_parts(
    operation: Operation, rank: int, tensors: Tensors, config: Config, sizes: Sequence[int]
) -> tuple[int, ...]:
    """Raises where parts do not make a grid that the call is possible on. Returns its size."""
    wholes: list[Any] = []
    part = None
    for role, x in zip(operation.inputs, tensors, strict=False):
        if x is None:
            wholes.append(None)
            continue
        shape = list(x.shape)
        axis = role.axis_of("QK", rank)
        if axis is not None and x.ndim == role.ndim(rank):
            of_grid = slice(axis, axis + rank)
            got, part = shape[of_grid], part or (role.name, shape[of_grid])
            if got != part[1]:
                raise ValueError(
                    f"{role.name}: got a part of {got} tokens; must be {part[1]}, that of "
                    f"{part[0]}: spatial_axis_names split all of them alike"
                )
            shape[of_grid] = [a * b for a, b in zip(got, sizes, strict=True)]
        wholes.append((shape, x.dtype.name))
    outputs = [True if role.is_required else None for role in operation.outputs]
    _core.plan(operation.name, config, None, "", wholes, outputs, None)
    assert part is not None
    return tuple(a * b for a, b in zip(part[1], sizes, strict=True))


def _is_array(offset: Any) -> bool:
    """Whether an offset is read at run time."""
    return isinstance(offset, (Array, np.ndarray)) or (
        isinstance(offset, Sequence) and any(isinstance(x, Array) for x in offset)
    )


def _row(name: str, value: Any, rank: int) -> Array:
    """An offset as one integer per axis, of 64 bits where JAX has them."""
    dtype = jax.dtypes.canonicalize_dtype(np.int64)
    if isinstance(value, (Array, np.ndarray)):
        _check_integers(name, value, ((), (rank,)), f"integers of shape () or ({rank},)")
        return jnp.broadcast_to(jnp.asarray(value).astype(dtype), (rank,))
    if not _is_array(value):
        values: Sequence[Any] = offset_per_axis(name, 0 if value is None else value, rank)
    else:
        offset_per_axis(name, [0 if isinstance(x, Array) else x for x in value], rank)
        values = value
    most = np.iinfo(dtype).max
    for x in values:
        if isinstance(x, Array):
            _check_integers(name, x, ((),), "integers, one per spatial axis")
        elif not -most <= x <= most:
            raise ValueError(f"{name}: got {x}; must be an integer of {dtype.name} among arrays")
    return jnp.stack([jnp.asarray(x).astype(dtype) for x in values])


def _check_integers(
    name: str, value: Array | np.ndarray, shapes: Sequence[tuple[int, ...]], must: str
) -> None:
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"{name}: got an array of {value.dtype.name}; must be {must}")
    if value.shape not in shapes:
        raise ValueError(f"{name}: got an array of shape {value.shape}; must be {must}")


def _call(
    functions: Mapping[str, Callable[..., Any]], autodiff: str, backend: str | None, *args: Any
) -> Any:
    if not isinstance(autodiff, str) or autodiff not in functions:
        raise ValueError(f'autodiff: got {autodiff!r}; must be "reverse" or "any"')
    if backend == COMPOSED:  # what is made of JAX's operations works as they do
        autodiff = "any"
    try:
        return functions[autodiff](*args)
    except TypeError as error:
        # JAX's words. Where it raises them later, as for a jvp of a jit, they cannot be replaced.
        if "custom_vjp function" not in str(error):
            raise
        raise TypeError(
            f'autodiff: got "{autodiff}", which bars forward-mode differentiation (jvp, linearize, '
            'jacfwd); for that it must be autodiff="any"'
        ) from error


def _setup(config: Any, scale: float | None, backend: str | None) -> Setup:
    if backend not in (None, ""):
        check_name(backend)
        tell_meaning(backend)
    return Setup(config, scale, taken_as(backend) if backend else _DEFAULT)


def _call_fused(
    tensors: Tensors,
    config: Any,
    scale: float | None,
    return_lse: bool,
    backend: str | None,
    autodiff: str,
) -> FusedResult:
    setup = _setup(with_flags(config, attention_flags(scale)), real_scale(scale), backend)
    arguments = setup, bool(return_lse), vary_alike(tensors)
    output, logsumexp = _call(_ATTENTION, autodiff, setup.backend, *arguments)
    return (output, logsumexp) if return_lse else output


def _call_unfused(
    operation: Operation, tensors: Tensors, config: Any, backend: str | None, autodiff: str
) -> Array:
    setup = _setup(with_flags(config, product_flags()), None, backend)
    return _call(_UNFUSED, autodiff, setup.backend, operation, setup, vary_alike(tensors))


def _make_fused(rank: int) -> Callable[..., FusedResult]:
    @named("na{rank}d", rank, "natten.jax")
    def fused(
        query: ArrayLike,
        key: ArrayLike,
        value: ArrayLike,
        kernel_size: Ints,
        *by_position: Never,
        stride: Ints = 1,
        dilation: Ints = 1,
        is_causal: Bools | None = False,
        boundary: Boundaries = "shift",
        rpb: ArrayLike | None = None,
        key_mask: ArrayLike | None = None,
        scale: float | None = None,
        additional_keys: ArrayLike | None = None,
        additional_values: ArrayLike | None = None,
        query_offset: Offsets | None = None,
        key_offset: Offsets | None = None,
        grid_size: Ints | None = None,
        spatial_axis_names: AxisNames | None = None,
        return_lse: bool = False,
        backend: str | None = None,
        autodiff: str = "reverse",
    ) -> FusedResult:
        """Fused {rank}-D neighborhood attention, heads-last.

        Every token attends to a window of `kernel_size` tokens around it; the weights are never
        stored. `spatial` below stands for {rank} axes. Works under jit, vmap over any array
        and grad of any order; the second and later derivatives store the weights.

        Heads are last here and first in `na{rank}d_qk`. An array in the wrong layout is an array of
        another grid, and raises no error where that grid is large enough for the window.

        Args:
            query: [batch, *spatial, heads, head_dim], float64, float32, bfloat16 or float16.
            key: [batch, *spatial, kv_heads, head_dim]; kv_heads divides heads (grouped-query).
            value: [batch, *spatial, kv_heads, value_head_dim].
            kernel_size: window size, one for all axes or one per axis. kernel_size * dilation must
                not exceed the axis, unless its boundary is "cut". This and all that follow, except
                arrays, are static: Python values, not traced ones. Pass everything after it by
                name: next came dilation in NATTEN before 0.20, and stride since then.
            stride: how many neighboring queries share one window; 1 to kernel_size.
            dilation: distance between the tokens of a window.
            is_causal: whether a token sees only itself and earlier ones, a bool for all axes or
                one per axis (None is False).
            boundary: what happens to a window at the border of the grid, one name for all axes or
                one per axis: "shift" moves it inwards, "cut" leaves the slots outside empty, and
                "circular" lets it go on at the other end. A circular axis must be a multiple of
                dilation times stride, and cannot be causal.
            rpb: bias [heads, 2 * kernel_size[0] - 1, ...] by relative position, added to scores.
            key_mask: bool [batch or 1, *spatial of key], True where a key may be seen. Hidden keys
                have no weight and no gradients, whatever they hold. A query that sees no key gets
                output 0 and logsumexp -inf.
            scale: factor on the scores; head_dim ** -0.5 by default.
            additional_keys: [batch, n, kv_heads, head_dim], more keys, which every query sees.
            additional_values: [batch, n, kv_heads, value_head_dim].
            query_offset: where query is a part of a larger grid: its first token there, one number
                for all axes or one per axis. An array of integers, or a list that holds some, is
                read when the program runs, so one program serves all parts; errors in it are then
                runtime errors of JAX. Results equal those rows of the whole problem.
            key_offset: the first token of key and value, likewise. These may reach beyond the grid.
                Other than 0 it needs grid_size.
            grid_size: tokens of the whole grid, per axis; by default those of key.
            spatial_axis_names: inside `jax.shard_map`, for each spatial axis the axis of the mesh
                that splits it, a tuple of such axes, or None. The arrays are then the parts of this
                device, all with the same spatial shape, and the keys and values that windows need
                beyond them come from other devices (by collective-permute only). The three
                arguments above must be None. Bias and additional tokens are the same on all
                devices.
            return_lse: also return logsumexp.
            backend: name of the implementation to use; by default the first that accepts the call.
            autodiff: "reverse", with which forward mode raises a TypeError, or "any", with which
                every mode works. Forward mode stores the weights.

        Returns:
            output [batch, *spatial, heads, value_head_dim], of the dtype of query; with return_lse
            also logsumexp [batch, *spatial, heads], float32 (float64 for float64), the natural
            logarithm of the sum of exp(score), which is differentiable too.

        Raises:
            ValueError: a shape or value that does not fit; the message says which and why.
            TypeError: an argument of another type; an unsupported or mismatched dtype.
                Both are raised when traced.
        """
        if by_position:
            check_extra(f"na{rank}d", by_position)
        tensors = _as_arrays(
            query=query,
            key=key,
            value=value,
            rpb=rpb,
            additional_keys=additional_keys,
            additional_values=additional_values,
            key_mask=key_mask,
        )
        window = kernel_size, dilation, is_causal, stride, boundary
        parts = query_offset, key_offset, grid_size
        tensors, config = _prepared(
            _primitives.attention_forward, rank, tensors, window, parts, spatial_axis_names
        )
        return _call_fused(tensors, config, scale, return_lse, backend, autodiff)

    return fused


def _make_qk(rank: int) -> Callable[..., Array]:
    @named("na{rank}d_qk", rank, "natten.jax")
    def qk(
        query: ArrayLike,
        key: ArrayLike,
        kernel_size: Ints,
        dilation: Ints = 1,
        additional_keys: ArrayLike | None = None,
        is_causal: Bools | None = False,
        rpb: ArrayLike | None = None,
        *,
        stride: Ints = 1,
        boundary: Boundaries = "shift",
        key_mask: ArrayLike | None = None,
        query_offset: Offsets | None = None,
        key_offset: Offsets | None = None,
        grid_size: Ints | None = None,
        spatial_axis_names: AxisNames | None = None,
        backend: str | None = None,
        autodiff: str = "reverse",
    ) -> Array:
        """Scores of {rank}-D neighborhood attention, heads-first. No scale is applied.

        Heads are first here and last in `na{rank}d`; see there.

        Works under jit, vmap and grad of any order.

        Args:
            query, key: [batch, heads, *spatial, head_dim], of the same dtype (see `na{rank}d`).
            additional_keys: [batch, heads, n, head_dim]; their n scores follow the window's.
            rpb: bias [heads, 2 * kernel_size[0] - 1, ...] by relative position.
            key_mask: bool [batch or 1, *spatial of key], as in `na{rank}d`.
            kernel_size, dilation, is_causal, stride, boundary, query_offset, key_offset, grid_size,
                spatial_axis_names, backend, autodiff: as in `na{rank}d`.

        Returns:
            attn [batch, heads, *spatial, slots], of the dtype of query; slots = product of
            kernel_size, in row-major window order, plus n. Slots that causality, a cut border or
            the mask leave empty hold -inf and have zero gradients.

        Raises:
            ValueError, TypeError: as `na{rank}d`.
        """
        tensors = _as_arrays(
            query=query,
            key=key,
            rpb=rpb,
            additional_keys=additional_keys,
            key_mask=key_mask,
        )
        window = kernel_size, dilation, is_causal, stride, boundary
        parts = query_offset, key_offset, grid_size
        tensors, config = _prepared(
            _primitives.qk, rank, tensors, window, parts, spatial_axis_names
        )
        return _call_unfused(_primitives.qk, tensors, config, backend, autodiff)

    return qk


def _make_av(rank: int) -> Callable[..., Array]:
    @named("na{rank}d_av", rank, "natten.jax")
    def av(
        attn: ArrayLike,
        value: ArrayLike,
        kernel_size: Ints,
        dilation: Ints = 1,
        additional_values: ArrayLike | None = None,
        is_causal: Bools | None = False,
        *,
        stride: Ints = 1,
        boundary: Boundaries = "shift",
        key_mask: ArrayLike | None = None,
        query_offset: Offsets | None = None,
        key_offset: Offsets | None = None,
        grid_size: Ints | None = None,
        spatial_axis_names: AxisNames | None = None,
        backend: str | None = None,
        autodiff: str = "reverse",
    ) -> Array:
        """Sums of values over {rank}-D neighborhoods, weighted by attn, heads-first.

        Heads are first here and last in `na{rank}d`; see there.

        Works under jit, vmap and grad of any order.

        Args:
            attn: [batch, heads, *spatial, slots], as `na{rank}d_qk` returns; slots that causality,
                a cut border or the mask leave empty are ignored.
            value: [batch, heads, *spatial, head_dim], of the dtype of attn.
            additional_values: [batch, heads, n, head_dim], for the last n slots.
            key_mask: bool [batch or 1, *spatial of value], as in `na{rank}d`.
            kernel_size, dilation, is_causal, stride, boundary, query_offset, key_offset, grid_size,
                spatial_axis_names, backend, autodiff: as in `na{rank}d`.

        Returns:
            output [batch, heads, *spatial, head_dim], of the dtype of attn.

        Raises:
            ValueError, TypeError: as `na{rank}d`.
        """
        tensors = _as_arrays(
            attn=attn,
            value=value,
            additional_values=additional_values,
            key_mask=key_mask,
        )
        window = kernel_size, dilation, is_causal, stride, boundary
        parts = query_offset, key_offset, grid_size
        tensors, config = _prepared(
            _primitives.av, rank, tensors, window, parts, spatial_axis_names
        )
        return _call_unfused(_primitives.av, tensors, config, backend, autodiff)

    return av


na1d, na2d, na3d = map(_make_fused, (1, 2, 3))
na1d_qk, na2d_qk, na3d_qk = map(_make_qk, (1, 2, 3))
na1d_av, na2d_av, na3d_av = map(_make_av, (1, 2, 3))


def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    is_causal: bool | None = False,
    scale: float | None = None,
    return_lse: bool = False,
    *,
    seqlens_Q: Lengths | None = None,
    seqlens_KV: Lengths | None = None,
    cumulative_seqlen_Q: Lengths | None = None,
    cumulative_seqlen_KV: Lengths | None = None,
    max_seqlen_Q: int | None = None,
    max_seqlen_KV: int | None = None,
    backend: str | None = None,
    autodiff: str = "reverse",
) -> FusedResult:
    """Softmax attention of every query to all keys, heads-last. Takes no mask and no dropout.

    Works under jit, vmap and grad of any order, as `na1d` does.

    Examples of different lengths may lie one after another in arrays of batch 1; each then attends
    to its own keys. An example may be empty: queries of one without keys get output 0 and logsumexp
    -inf. Forward mode, and second derivatives, store weights of all queries and all keys.

    Args:
        query: [batch, tokens, heads, head_dim], float64, float32, bfloat16 or float16.
        key: [batch, key_tokens, kv_heads, head_dim]; kv_heads divides heads (grouped-query).
        value: [batch, key_tokens, kv_heads, value_head_dim].
        is_causal: whether query i sees only keys 0 to i (also where the lengths differ).
        scale: factor on the scores, a Python number; head_dim ** -0.5 by default.
        return_lse: also return logsumexp.
        seqlens_Q, seqlens_KV: lengths of the examples in query, and in key and value. A sequence
            of integers, or a numpy array, is fixed when a function is traced. A JAX array
            [examples] is read when it runs, so one program serves all lengths of the same number of
            examples; errors in it are then runtime errors of JAX.
        cumulative_seqlen_Q, cumulative_seqlen_KV: instead of these, 0 and the sums of lengths up
            to the end of each example, likewise.
        max_seqlen_Q, max_seqlen_KV: with the sums, the largest length, or more; Python integers.
        backend: name of the implementation to use; by default the first that accepts the call.
        autodiff: as in `na1d`.

    Returns:
        output [batch, tokens, heads, value_head_dim]; with return_lse also logsumexp
        [batch, tokens, heads], as `na1d`.

    Raises:
        ValueError, TypeError: as `na1d`.
    """
    query, key, value = (
        as_array(name, x) for name, x in (("query", query), ("key", key), ("value", value))
    )
    given = {
        "seqlens_Q": seqlens_Q,
        "seqlens_KV": seqlens_KV,
        "cumulative_seqlen_Q": cumulative_seqlen_Q,
        "cumulative_seqlen_KV": cumulative_seqlen_KV,
    }
    lengths = _lengths((query, key, value), given, max_seqlen_Q, max_seqlen_KV)
    flags = SEPARATE_KEY_GRID if lengths is None else SEPARATE_KEY_GRID | ALLOW_NO_KEYS
    config = make_config(1, 1, is_causal=is_causal, flags=flags)
    tensors = (query, key, value, None, None, None, None, None, lengths)
    return _call_fused(tensors, config, scale, return_lse, backend, autodiff)


def _lengths(
    tensors: Sequence[Array],
    given: Mapping[str, Lengths | None],
    max_seqlen_Q: int | None,
    max_seqlen_KV: int | None,
) -> Array | None:
    """What the arguments of `attention` say of its examples, as `_primitives.LENGTHS`."""
    said = check_lengths(given, max_seqlen_Q, max_seqlen_KV)
    if said is None:
        return None
    sides, most = said
    is_cumulative = sides[0] == "cumulative_seqlen_Q"
    for name, x in zip(("query", "key", "value"), tensors, strict=True):
        if x.ndim != 4 or x.shape[0] != 1:
            raise ValueError(
                f"{name}: got shape {list(x.shape)}; with lengths of examples it must be "
                "[1, sum of lengths, heads, dim]"
            )
    values = [_row_of_lengths(name, given[name], is_cumulative) for name in sides]
    if values[0].shape != values[1].shape:
        raise ValueError(
            f"{sides[1]}: got {values[1].shape[0]} numbers; must be {values[0].shape[0]}, as many "
            f"as in {sides[0]}"
        )
    numbers = [None if x is None else integer(name, x, 1) for name, x in most.items()]
    ends = values
    if not is_cumulative:
        ends = [
            (np if isinstance(x, np.ndarray) else jnp).concatenate([x[:1] * 0, x.cumsum()])
            for x in values
        ]
    if all(isinstance(x, np.ndarray) for x in ends):  # known now: so are errors
        inputs = [(x.shape, x.dtype.name) for x in tensors]
        config = make_config(1, 1, flags=SEPARATE_KEY_GRID | ALLOW_NO_KEYS)
        packing = (*(x.tolist() for x in ends), *numbers)
        _core.plan(
            "attention_forward", config, None, "", [*inputs, *[None] * 4], [True, None], None,
            packing,
        )  # fmt: skip
    dtype = jax.dtypes.canonicalize_dtype(np.int64)
    last = [np.iinfo(dtype).max if n is None else n for n in numbers]
    return jnp.stack(
        [
            jnp.append(jnp.asarray(x).astype(dtype), np.array(n, dtype))
            for x, n in zip(ends, last, strict=True)
        ]
    )


def _row_of_lengths(name: str, value: Any, is_cumulative: bool) -> Any:
    """Integers as a JAX array, or as one of numpy where they are known."""
    must = "integers [examples + 1]" if is_cumulative else "integers [examples], one or more"
    if not isinstance(value, (Array, np.ndarray)):
        value = np.array([integer(name, x) for x in listed(name, value)], np.int64)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"{name}: got an array of {value.dtype.name}; must be {must}")
    if value.ndim != 1 or value.shape[0] == 0:
        raise ValueError(f"{name}: got shape {list(value.shape)}; must be {must}")
    return value.astype(np.int64) if isinstance(value, np.ndarray) else value


def merge_attentions(
    outputs: Sequence[ArrayLike], lse_tensors: Sequence[ArrayLike]
) -> tuple[Array, Array]:
    """Combines attention over disjoint sets of keys into attention over their union, exactly.

    Works under every JAX transformation.

    Args:
        outputs: arrays [batch, *spatial, heads, value_head_dim] of one dtype.
        lse_tensors: the logsumexp of each, [batch, *spatial, heads], float32 or float64; -inf where
            a set holds no keys, whose output is ignored.

    Returns:
        (output, logsumexp), shaped like each of the arguments; output has the dtype of outputs,
        logsumexp is float32 (float64 for float64).

    Raises:
        ValueError: nothing to merge, or shapes that differ.
        TypeError: dtypes that differ or are not supported.
    """
    parts = [as_array("outputs", x) for x in listed("outputs", outputs)]
    lses = [as_array("lse_tensors", x) for x in listed("lse_tensors", lse_tensors)]
    check_merge(*([(x.shape, x.dtype.name) for x in arrays] for arrays in (parts, lses)))
    first = parts[0]
    statistic = jnp.promote_types(first.dtype, jnp.float32)
    output, lse = merge(
        jnp,
        [x.astype(statistic) for x in parts],
        [x.astype(statistic) for x in lses],
        lambda mask, x: jnp.where(mask, 0, x),
        jax.lax.stop_gradient,
    )
    return output.astype(first.dtype), lse
