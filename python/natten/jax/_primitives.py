"""One JAX primitive per operation of libnatten, all made by one class from libnatten's own table.

Shapes, dtypes and refusals come from `natten._core.plan`, so a bad call raises while it is traced,
with libnatten's own message. Derivatives are made of these operations in `_derivatives.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir, partial_eval

from natten import _core
from natten._args import Config
from natten._roles import Role, fold_dims, roles_of
from natten.jax import _ffi

# What is asked of an output: its shape where only the caller knows it, else whether it is wanted.
Wanted: TypeAlias = bool | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Setup:
    """The part of a call that is not a tensor."""

    config: Config
    scale: float | None
    backend: str


class Operation:
    """Calls one operation of libnatten, by its name there."""

    def __init__(self, name: str, inputs: Sequence[Role], outputs: Sequence[Role]) -> None:
        self.name = name
        self.inputs, self.outputs = inputs, outputs
        self.primitive = Primitive(f"natten_{name}")
        self.primitive.multiple_results = True
        self.primitive.def_impl(self._run)
        self.primitive.def_abstract_eval(self._abstract_eval)
        batching.primitive_batchers[self.primitive] = self._batch
        partial_eval.dce_rules[self.primitive] = self._drop_unused
        for platform in _ffi.PLATFORMS:
            mlir.register_lowering(self.primitive, self._lower, platform=platform)
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
    ) -> tuple[list[tuple[tuple[int, ...], str]], int]:
        """((shape, dtype name) of each result, bytes of workspace)."""
        specs = iter([(a.shape, a.dtype.name) for a in avals])
        inputs = [next(specs) if g else None for g in given]
        outputs = [
            (w, avals[0].dtype.name) if isinstance(w, tuple) else (True if w else None)
            for w in wanted
        ]
        results, workspace = _core.plan(
            self.name, setup.config, setup.scale, setup.backend, inputs, outputs
        )
        return [(tuple(r[0]), r[1]) for r in results if r is not None], workspace

    def _abstract_eval(self, *avals: Any, **params: Any) -> list[Any]:
        results, _ = self._plan(avals, **params)
        return [_aval(avals[0], shape, dtype) for shape, dtype in results]

    def _lower(
        self,
        ctx: mlir.LoweringRuleContext,
        *operands: Any,
        setup: Setup,
        given: tuple[bool, ...],
        wanted: tuple[Wanted, ...],
    ) -> Sequence[Any]:
        _, workspace = self._plan(ctx.avals_in, setup, given, wanted)
        results = list(ctx.avals_out)
        if workspace:
            results.append(_aval(ctx.avals_in[0], (workspace,), "uint8"))
        lower = jax.ffi.ffi_lowering(_ffi.TARGET)
        return lower(
            ctx.replace(avals_out=results),
            *operands,
            op=self.name,
            config=np.array(setup.config, np.int64),
            scale=np.float64(setup.scale or 0.0),
            backend=setup.backend,
            inputs=_bits(given),
            outputs=_bits(w is not False for w in wanted),
            has_workspace=np.bool_(workspace > 0),
        )[: len(ctx.avals_out)]

    def _batch(
        self,
        arrays: Sequence[jax.Array],
        mapped_axes: Sequence[int | None],
        *,
        setup: Setup,
        given: tuple[bool, ...],
        wanted: tuple[Wanted, ...],
    ) -> tuple[list[jax.Array], list[int]]:
        """vmap: folds the mapped axis into the batch or the heads (`fold_dims`)."""
        rank = setup.config[0]
        size = next(
            x.shape[axis] for x, axis in zip(arrays, mapped_axes, strict=True) if axis is not None
        )
        if size == 0:  # no example to fold: what one would return says the shapes
            examples = [
                jax.ShapeDtypeStruct(x.shape if axis is None else _without(x.shape, axis), x.dtype)
                for x, axis in zip(arrays, mapped_axes, strict=True)
            ]
            results, _ = self._plan(examples, setup, given, wanted)
            return [jnp.zeros((0, *shape), dtype) for shape, dtype in results], [0] * len(results)
        inputs = [role for role, g in zip(self.inputs, given, strict=True) if g]
        dims = fold_dims(
            (r for r, axis in zip(inputs, mapped_axes, strict=True) if axis is not None),
            (r for r, w in zip(self.outputs, wanted, strict=True) if w is not False),
        )
        folded = []
        for role, x, mapped in zip(inputs, arrays, mapped_axes, strict=True):
            axis = role.axis_of(dims, rank)
            if axis is None:  # a bias that all examples share
                folded.append(x)
                continue
            if mapped is None:
                x = jnp.expand_dims(x, axis)
                x = jnp.broadcast_to(x, (*x.shape[:axis], size, *x.shape[axis + 1 :]))
            else:
                x = jnp.moveaxis(x, mapped, axis)
            shape = x.shape
            folded.append(x.reshape(*shape[:axis], size * shape[axis + 1], *shape[axis + 2 :]))
        folded_wanted = list(wanted)
        axes = []
        for i, (role, w) in enumerate(zip(self.outputs, wanted, strict=True)):
            if w is False:
                continue
            axis = role.axis_of(dims, rank)
            assert axis is not None, "a wanted gradient of a bias folds into the heads"
            axes.append(axis)
            if w is not True:
                folded_wanted[i] = (*w[:axis], size * w[axis], *w[axis + 1 :])
        results = self.primitive.bind(
            *folded, setup=setup, given=given, wanted=tuple(folded_wanted)
        )
        return [
            x.reshape(*x.shape[:axis], size, x.shape[axis] // size, *x.shape[axis + 1 :])
            for x, axis in zip(results, axes, strict=True)
        ], axes

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


def _aval(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """The type of a result, made from an operand's, which holds more than shape and dtype."""
    return like.update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False)


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


def _bits(flags: Iterable[bool]) -> np.int64:
    return np.int64(sum(1 << i for i, flag in enumerate(flags) if flag))


attention_forward = Operation("attention_forward", *roles_of("attention_forward"))
attention_backward = Operation("attention_backward", *roles_of("attention_backward"))
qk = Operation("qk", *roles_of("qk"))
av = Operation("av", *roles_of("av"))
av_transpose = Operation("av_transpose", *roles_of("av_transpose"))
rpb_gather = Operation("rpb_gather", *roles_of("rpb_gather"))
rpb_scatter = Operation("rpb_scatter", *roles_of("rpb_scatter"))
