"""One JAX primitive per operation of libnatten, all made by one class from libnatten's own table.

Shapes, dtypes and errors come from `natten._core.plan`, so a bad call raises while it is traced,
with libnatten's own message. Backends are chosen when a call is lowered, as only then its platform
is known. Derivatives are made of these operations in `_derivatives.py`. For platforms that
libnatten has no kernels for, and where the backend `composed` is asked for, calls are lowered to
JAX's own operations (`_composed.py`).

Where offsets of parts are arrays, so that one program serves all parts, every operation has them as
one more input, which the handler reads at run time. All that depends on them is checked then. So it
is with the lengths of examples that follow each other.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from natten import _core
from natten._args import (
    ALLOW_NO_KEYS,
    UNKNOWN_OFFSETS,
    Config,
    as_part,
    is_whole_grid,
    options_of,
    sees_all_keys,
    with_window_of_all,
)
from natten._choices import tell
from natten._kernel import COMPOSED, tell_without_kernels
from natten._log import TELLS_CHOICES
from natten._roles import Role, roles_of
from natten.jax import _composed, _ffi
from natten.jax._folding import Fold
from natten.jax._partitioning import Part, partitionable, spec_of, split_of_types
from natten.jax._private import (
    LoweringRuleContext,
    Primitive,
    asks_for_devices,
    define_dead_code_elimination,
    lower_fun,
    mapped_axes,
    platforms_of,
    primitive_batchers,
    register_lowering,
)

# query_offset and key_offset, in two rows of one number per axis. It follows the key mask.
OFFSETS = Role(
    "offsets", "PA", is_output=False, is_required=False, is_statistic=False, is_mask=False
)
# Where examples lie that follow each other in arrays of batch 1: a row of cumulative_seqlen_Q and
# max_seqlen_Q, then one of keys'. It follows the offsets; only fused operations are given any.
LENGTHS = Role(
    "lengths", "PE", is_output=False, is_required=False, is_statistic=False, is_mask=False
)

# What is asked of an output: its shape where only the caller knows it, else whether it is wanted.
Wanted: TypeAlias = bool | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Setup:
    """The part of a call that is not a tensor."""

    config: Config
    scale: float | None
    backend: str
    # The axes of a mesh that split each axis of the grid, where no input has that and the type of
    # the result says so (meshes with explicit axes).
    grid: tuple[tuple[str, ...], ...] = ()


class Operation:
    """Calls one operation of libnatten, by its name there."""

    def __init__(self, name: str, inputs: Sequence[Role], outputs: Sequence[Role]) -> None:
        self.name = name
        self.inputs, self.outputs = inputs, outputs
        self.primitive = Primitive(f"natten_{name}")
        self.primitive.multiple_results = True
        asks_for_devices(self.primitive)
        self.primitive.def_impl(self._run)
        self.primitive.def_abstract_eval(self._abstract_eval)
        primitive_batchers[self.primitive] = self._batch
        define_dead_code_elimination(self.primitive, self._drop_unused)
        register_lowering(self.primitive, self._lower_elsewhere)
        for platform in _ffi.PLATFORMS:
            lower = functools.partial(self._lower, platform)
            register_lowering(self.primitive, lower, platform=platform)
        self._compiled = functools.lru_cache(maxsize=4096)(self._compile)

    def __call__(
        self, setup: Setup, inputs: Sequence[jax.Array | None], wanted: Sequence[Wanted]
    ) -> list[jax.Array | None]:
        """One result per output, None where it is not wanted; inputs may be absent (None)."""
        results = iter(
            self.primitive.bind(
                *(x for x in inputs if x is not None),
                setup=setup,
                given=tuple(x is not None for x in inputs),
                wanted=tuple(wanted),
            )
        )
        return [next(results) if w is not False else None for w in wanted]

    def _compile(self, **params: Any) -> Callable[..., list[jax.Array]]:
        return jax.jit(functools.partial(self.primitive.bind, **params))

    def _run(self, *arrays: jax.Array, **params: Any) -> list[jax.Array]:
        with jax.disable_jit(False):
            return self._compiled(**params)(*arrays)

    def _plan(
        self,
        avals: Sequence[Any],
        setup: Setup,
        given: tuple[bool, ...],
        wanted: tuple[Wanted, ...],
        platform: str | None = None,
    ) -> tuple[list[tuple[tuple[int, ...], str]], int]:
        """((shape, dtype name) of each result, bytes of workspace). While a function is traced JAX
        does not know the platform; without one no backend is chosen, and there is no workspace."""
        shapes = iter([(a.shape, a.dtype.name) for a in avals])
        every = [next(shapes) if g else None for g in given]
        inputs = [
            x
            for role, x in zip(self.inputs, every, strict=True)
            if role is not OFFSETS and role is not LENGTHS
        ]
        outputs = [
            (w, avals[0].dtype.name) if isinstance(w, tuple) else (True if w else None)
            for w in wanted
        ]
        backend = "" if setup.backend == COMPOSED else setup.backend
        # Any lengths do: the workspace depends on their number and sums alone.
        packing = None
        lengths, query, key = (every[i] for i in (self.inputs.index(LENGTHS), 0, 1))
        if lengths and query and key:
            ends = [0] * (lengths[0][1] - 2)
            packing = [*ends, query[0][1]], [*ends, key[0][1]], None, None
        results, workspace = _core.plan(
            self.name, setup.config, setup.scale, backend, inputs, outputs, platform, packing
        )
        specs = [None if r is None else (tuple(r[0]), r[1]) for r in results]
        if TELLS_CHOICES and platform is not None:
            tell(self.name, setup.config, setup.scale, setup.backend, inputs, specs, platform)
        return [spec for spec in specs if spec is not None], workspace

    def _roles(
        self, given: tuple[bool, ...], wanted: tuple[Wanted, ...]
    ) -> tuple[list[Role], list[Role]]:
        """Of the inputs and outputs that there are."""
        return (
            [role for role, g in zip(self.inputs, given, strict=True) if g],
            [role for role, w in zip(self.outputs, wanted, strict=True) if w is not False],
        )

    def _abstract_eval(
        self,
        *avals: Any,
        setup: Setup,
        given: tuple[bool, ...],
        wanted: tuple[Wanted, ...],
    ) -> list[Any]:
        rank = setup.config[0]
        inputs, outputs = self._roles(given, wanted)
        for role, aval in zip(inputs, avals, strict=True):
            if not all(isinstance(length, int) for length in aval.shape):
                raise ValueError(
                    f"{role.name}: got shape {aval.shape}; sizes must be numbers when a function "
                    "is traced. Export one program for each shape"
                )
        results, _ = self._plan(avals, setup, given, wanted)
        shapes = [*(aval.shape for aval in avals), *(shape for shape, _ in results)]
        is_splittable = _window_of(setup.config, [*inputs, *outputs], shapes) is not None
        split = split_of_types(inputs, avals, rank, is_splittable, setup.grid)
        first = avals[0]
        return [
            first.update(  # a type holds more than what is replaced here
                shape=shape,
                dtype=jnp.dtype(dtype),
                weak_type=False,
                sharding=NamedSharding(first.sharding.mesh, spec_of(role, split, rank)),
            )
            for role, (shape, dtype) in zip(outputs, results, strict=True)
        ]

    def _lower(
        self,
        platform: str,
        ctx: LoweringRuleContext,
        *operands: Any,
        setup: Setup,
        given: tuple[bool, ...],
        wanted: tuple[Wanted, ...],
    ) -> Any:
        if setup.backend == COMPOSED:
            return self._lower_composed(ctx, *operands, setup=setup, given=given, wanted=wanted)
        run = functools.partial(self._call, platform)
        return self._lower_split(run, ctx, *operands, setup=setup, given=given, wanted=wanted)

    def _lower_split(
        self,
        run: Callable[..., Sequence[Any]],
        ctx: LoweringRuleContext,
        *operands: Any,
        setup: Setup,
        given: tuple[bool, ...],
        wanted: tuple[Wanted, ...],
    ) -> Any:
        """What devices compute, each by `run`. It takes (setup, given, wanted, arrays, shapes of
        the results)."""

        def of_shards(
            arrays: Sequence[Any], shapes: Sequence[tuple[int, ...]], part: Part | None
        ) -> Sequence[Any]:
            if part is None:
                return run(setup, given, wanted, arrays, shapes)
            offsets, grid_size = part
            at = self.inputs.index(OFFSETS)
            before = sum(given[:at])
            config = as_part(with_window_of_all(setup.config, grid_size), grid_size)
            return run(
                dataclasses.replace(setup, config=config),
                (*given[:at], True, *given[at + 1 :]),
                wanted,
                [*arrays[:before], offsets, *arrays[before:]],
                shapes,
            )

        shapes = [aval.shape for aval in (*ctx.avals_in, *ctx.avals_out)]
        roles = self._roles(given, wanted)
        window = _window_of(setup.config, [*roles[0], *roles[1]], shapes)
        function = partitionable(of_shards, *roles, shapes, setup.config[0], window, ctx)
        return lower_fun(function, multiple_results=True)(ctx, *operands)

    def _lower_elsewhere(self, ctx: LoweringRuleContext, *operands: Any, **params: Any) -> Any:
        """For platforms that libnatten has no kernels for."""
        backend, platforms = params["setup"].backend, platforms_of(ctx)
        if backend not in ("", "fused", COMPOSED):
            if "cuda" in platforms:
                self._plan(ctx.avals_in, **params, platform="cuda")  # raises, and says how to build
            raise ValueError(
                f'backend: got "{backend}"; must be "{COMPOSED}" or None for '
                f"{', '.join(platforms)}, which libnatten has no kernels for here"
            )
        for platform in platforms if backend != COMPOSED else ():
            tell_without_kernels(platform, "JAX")
        return self._lower_composed(ctx, *operands, **params)

    def _lower_composed(self, ctx: LoweringRuleContext, *operands: Any, **params: Any) -> Any:
        if mapped_axes(ctx)[0]:  # inside `shard_map`
            return lower_fun(self._composed, multiple_results=True)(ctx, *operands, **params)

        def run(
            setup: Setup,
            given: tuple[bool, ...],
            wanted: tuple[Wanted, ...],
            arrays: Sequence[Any],
            shapes: Sequence[tuple[int, ...]],
        ) -> Sequence[Any]:
            asked = _of_shapes(wanted, shapes)
            params: dict[str, Any] = {"setup": setup, "given": given, "wanted": asked}
            # In a function of its own, as custom_partitioning takes none that has constants.
            return jax.jit(functools.partial(self._composed, **params))(*arrays)

        return self._lower_split(run, ctx, *operands, **params)

    def _composed(
        self,
        *arrays: jax.Array,
        setup: Setup,
        given: tuple[bool, ...],
        wanted: tuple[Wanted, ...],
    ) -> list[jax.Array]:
        """The operation made of JAX's own."""
        first, *_ = arrays
        if any(x.size == 0 for x in arrays[:2]):  # no queries, or no keys
            specs, _ = self._plan(arrays, setup, given, wanted)
            roles = [role for role, w in zip(self.outputs, wanted, strict=True) if w is not False]
            return [
                _composed.zeros(*spec, first) - (jnp.inf if role.name == "logsumexp" else 0)
                for role, spec in zip(roles, specs, strict=True)
            ]
        rest = iter(arrays)
        inputs = [next(rest) if g else None for g in given]
        results = _composed.OPERATIONS[self.name](setup, wanted, *inputs)
        return [x for x in results if x is not None]

    def _call(
        self,
        platform: str,
        setup: Setup,
        given: tuple[bool, ...],
        wanted: tuple[Wanted, ...],
        arrays: Sequence[Any],
        shapes: Sequence[tuple[int, ...]],
    ) -> Sequence[Any]:
        """The call on what one device has of the inputs, for results of these shapes."""
        asked = _of_shapes(wanted, shapes)
        results, workspace = self._plan(arrays, setup, given, asked, platform)
        if platform == "cpu" and setup.config[-1] & (UNKNOWN_OFFSETS | ALLOW_NO_KEYS):
            workspace = 0  # it depends on what is not known yet; libnatten allocates it
        if workspace:
            results.append(((workspace,), "uint8"))
        call = jax.ffi.ffi_call(
            _ffi.TARGET, [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results]
        )
        return call(
            *arrays,
            op=self.name,
            config=np.array(setup.config, np.int64),
            scale=np.float64(setup.scale or 0.0),
            backend=setup.backend,
            inputs=_bits(given),
            outputs=_bits(w is not False for w in wanted),
            has_workspace=np.bool_(workspace > 0),
        )[: len(shapes)]

    def _batch(
        self,
        arrays: Sequence[jax.Array],
        mapped_axes: Sequence[int | None],
        *,
        setup: Setup,
        given: tuple[bool, ...],
        wanted: tuple[Wanted, ...],
    ) -> tuple[list[jax.Array], tuple[int, ...]]:
        """vmap: folds the mapped axis into the batch or the heads (`fold_dims`), or where the call
        has no place for it runs examples one by one."""
        rank = setup.config[0]
        inputs, outputs = self._roles(given, wanted)
        tensors = list(zip(inputs, arrays, mapped_axes, strict=True))
        size = next(x.shape[axis] for _, x, axis in tensors if axis is not None)
        if size == 0:  # no example to fold: what one would return says the shapes
            examples = [
                jax.ShapeDtypeStruct(x.shape if axis is None else _without(x.shape, axis), x.dtype)
                for _, x, axis in tensors
            ]
            specs, _ = self._plan(examples, setup, given, wanted)
            return [jnp.zeros((0, *shape), dtype) for shape, dtype in specs], (0,) * len(specs)
        fold = Fold.of(tensors, outputs, rank)
        if any(axis is not None and not fold.has_place(role) for role, _, axis in tensors):
            one = functools.partial(self.primitive.bind, setup=setup, given=given, wanted=wanted)
            results = _one_by_one(one, arrays, mapped_axes)
            return results, (0,) * len(results)
        results = self.primitive.bind(
            *(fold.fold(role, x, axis) for role, x, axis in tensors),
            setup=setup,
            given=given,
            wanted=tuple(
                fold.shape(role, w) if isinstance(w, tuple) else w
                for role, w in zip(self.outputs, wanted, strict=True)
            ),
        )
        unfolded = [fold.unfold(role, x) for role, x in zip(outputs, results, strict=True)]
        return [x for x, _ in unfolded], tuple([axis for _, axis in unfolded])

    def _drop_unused(self, used: list[bool], eqn: Any) -> tuple[list[bool], Any]:
        """Dead code elimination: computes only the gradients that something uses."""
        if not any(used):
            return [False] * len(eqn.invars), None
        wanted = eqn.params["wanted"]
        present = [i for i, w in enumerate(wanted) if w is not False]
        kept = {
            i
            for i, is_used in zip(present, used, strict=True)
            if is_used or self.outputs[i].is_required or wanted[i] is not True
        }
        smaller = eqn.replace(
            params=eqn.params
            | {"wanted": tuple(w if i in kept else False for i, w in enumerate(wanted))},
            outvars=[v for i, v in zip(present, eqn.outvars, strict=True) if i in kept],
        )
        return [True] * len(eqn.invars), smaller


def _window_of(
    config: Config, roles: Sequence[Role], shapes: Sequence[tuple[int, ...]]
) -> dict[str, tuple] | None:
    """The options of a call's window as `partitionable` takes them; None: it cannot be split."""
    if is_whole_grid(config):
        return options_of(config)
    tokens = {
        shape[axis]
        for role, shape in zip(roles, shapes, strict=True)
        if (axis := role.axis_of("QK", config[0])) is not None
    }
    return {} if sees_all_keys(config) and len(tokens) == 1 else None


def _of_shapes(wanted: tuple[Wanted, ...], shapes: Sequence[tuple[int, ...]]) -> tuple[Wanted, ...]:
    """What is asked of outputs, where their results have these shapes."""
    rest = iter(shapes)
    sizes = [w is not False and next(rest) for w in wanted]
    return tuple(s if isinstance(w, tuple) else w for s, w in zip(sizes, wanted, strict=True))


def _one_by_one(
    function: Callable[..., list[jax.Array]],
    arrays: Sequence[jax.Array],
    mapped_axes: Sequence[int | None],
) -> list[jax.Array]:
    """`function` of each example; results have the mapped axis first."""

    def of_example(examples: list[jax.Array]) -> list[jax.Array]:
        rest = iter(examples)
        return function(
            *(x if a is None else next(rest) for x, a in zip(arrays, mapped_axes, strict=True))
        )

    mapped = [
        jnp.moveaxis(x, axis, 0)
        for x, axis in zip(arrays, mapped_axes, strict=True)
        if axis is not None
    ]
    return jax.lax.map(of_example, mapped)


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


def _bits(flags: Iterable[bool]) -> np.int64:
    return np.int64(sum(1 << i for i, flag in enumerate(flags) if flag))


def _operation(name: str) -> Operation:
    roles, outputs = roles_of(name)
    inputs: list[Role] = []
    for role in roles:
        inputs += [role, OFFSETS, LENGTHS] if role.is_mask else [role]
    return Operation(name, inputs, outputs)


attention_forward = _operation("attention_forward")
attention_backward = _operation("attention_backward")
qk = _operation("qk")
av = _operation("av")
av_transpose = _operation("av_transpose")
rpb_gather = _operation("rpb_gather")
rpb_scatter = _operation("rpb_scatter")
