"""Everything of JAX that is used here and that JAX does not promise to keep.

A version of JAX that lacks a name, or has changed what it does, is dealt with in this file alone.
tests/test_private_names.py says which names are gone, and that no other file uses such.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)
from jax.extend.core import Primitive
from jax.interpreters.ad import (
    Zero,
    instantiate_zeros,
    is_undefined_primal,
    primitive_jvps,
    primitive_transposes,
)
from jax.interpreters.batching import primitive_batchers
from jax.interpreters.mlir import LoweringRuleContext, lower_fun, register_lowering
from jax.interpreters.partial_eval import dce_rules


def define_dead_code_elimination(
    primitive: Primitive, rule: Callable[[list[bool], Any], tuple[list[bool], Any]]
) -> None:
    """`rule`: (which results are used, equation) to (which operands are used, equation or None)."""

    def any_version(used: list[bool], *rest: Any) -> tuple[list[bool], Any]:
        *_, equation = rest  # after which references are read later, since JAX 0.12
        return rule(used, equation)

    dce_rules[primitive] = any_version


def asks_for_devices(primitive: Primitive) -> None:
    """JAX tells the lowering of a primitive the devices and their mesh only if asked to."""
    prim_requires_devices_during_lowering.add(primitive)


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The axes of a mesh, mapped by `shard_map`, along which an array may vary."""
    aval: Any = jax.typeof(x)
    return aval.vma if hasattr(aval, "vma") else aval.mat.varying  # JAX renamed it


def made_varying(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, axes, to="varying")
    return jax.lax.pvary(x, axes)  # type: ignore[attr-defined]  # in older versions of JAX


def mapped_axes(context: LoweringRuleContext) -> tuple[frozenset[str], tuple[str, ...]]:
    """(the axes of a mesh that `shard_map` has split a lowered function by, all axes of it)."""
    axis_context: Any = context.module_context.axis_context
    mapped = frozenset(getattr(axis_context, "manual_axes", ()))
    return mapped, tuple(axis_context.mesh.axis_names) if mapped else ()


def platforms_of(context: LoweringRuleContext) -> tuple[str, ...]:
    """What a function is lowered for."""
    of_rule: Any = getattr(context, "platforms", None)  # some of the module's
    return tuple(of_rule or context.module_context.platforms)


def outside_of_meshes() -> contextlib.AbstractContextManager[Any]:
    """A context in which arrays that are made belong to no mesh, as what one device computes.

    The functions that `custom_partitioning` is given are traced in the caller's context. Under
    `jax.set_mesh` with explicit axes, `psum` would there have shardings inside its sum of two
    numbers since JAX 0.12, which XLA refuses ("Unsupported reduction computation").
    """
    if not hasattr(jax.sharding, "use_abstract_mesh"):  # nor set_mesh, in older versions
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def is_partitioned_by_shardy() -> bool:
    return getattr(jax.config, "jax_use_shardy_partitioner", True)


__all__ = [
    "ArrayMapping",
    "CompoundFactor",
    "LoweringRuleContext",
    "Primitive",
    "SdyShardingRule",
    "Zero",
    "asks_for_devices",
    "custom_partitioning",
    "define_dead_code_elimination",
    "instantiate_zeros",
    "is_partitioned_by_shardy",
    "is_undefined_primal",
    "lower_fun",
    "made_varying",
    "mapped_axes",
    "outside_of_meshes",
    "platforms_of",
    "primitive_batchers",
    "primitive_jvps",
    "primitive_transposes",
    "register_lowering",
    "varying_axes",
]
