"""Derivatives of the primitives: tangents (jvp) and transposes.

The unfused operations are linear in each group of their inputs, and the derivative of each is made
of the others, so they can be differentiated any number of times:

    qk(q, k)            dq = av(g, k)    dk = av_transpose(g, q)    drpb = rpb_scatter(g)
    av(a, v)            da = qk(g, v)    dv = av_transpose(a, g)
    av_transpose(a, q)  da = qk(q, g)    dq = av(a, g)
    rpb_scatter(a)      da = rpb_gather(g)
    rpb_gather(rpb)     drpb = rpb_scatter(g)

Inside derivatives empty slots hold 0, which keeps them linear. The key mask, the offsets of
parts and the lengths of examples, the *context* of a call, have no derivatives and are passed on.

The tangent of fused attention is a primitive of its own, `attention_tangent`. It is linear in the
tangents, and its transpose is fused: `attention_backward`. So reverse mode, which transposes it,
never runs it. Where it does run, in forward mode, and for the derivatives of both, the same
attention is composed of the unfused operations, which store the weights.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from natten._args import EMPTY_SLOTS_ZERO, scale_or_default, with_flags
from natten._kernel import COMPOSED
from natten.jax._composed import Examples
from natten.jax._partitioning import axes_of
from natten.jax._primitives import (
    Operation,
    Setup,
    Wanted,
    attention_backward,
    attention_forward,
    av,
    av_transpose,
    qk,
    rpb_gather,
    rpb_scatter,
)
from natten.jax._private import (
    LoweringRuleContext,
    Zero,
    instantiate_zeros,
    is_undefined_primal,
    lower_fun,
    primitive_jvps,
    primitive_transposes,
)

Tensors: TypeAlias = Sequence[Any]  # None where there is none

# The six tensors of attention. The context follows them; in the inputs of derivatives, logsumexp
# follows that.
TENSORS = 6
COUNT = len(attention_forward.inputs)
CONTEXT = COUNT - TENSORS


def _linear(setup: Setup) -> Setup:
    """Derivatives are 0 where a causal window leaves slots empty, not -inf."""
    return dataclasses.replace(setup, config=with_flags(setup.config, EMPTY_SLOTS_ZERO))


def _shape(x: Any) -> Wanted:
    """The shape of an input that may be absent, or unknown in a transpose."""
    if x is None:
        return False
    return x.aval.shape if is_undefined_primal(x) else x.shape


def _bias_of(setup: Setup, rpb: Any, scores: Any, context: Tensors) -> Array:
    """The bias of every slot of scores, of which only the type is used. All of the batch has the
    same, unless each of it has a mask of its own."""
    aval = scores.aval if is_undefined_primal(scores) else jax.typeof(scores)
    mask = context[0]
    batch = 1 if mask is None else mask.shape[0]
    is_split = any(axes is not None for axes in aval.sharding.spec)  # on explicit axes
    setup = _linear(setup)
    if is_split:
        grid = tuple(map(axes_of, aval.sharding.spec[2:-1]))
        setup = dataclasses.replace(setup, grid=grid)
    (bias,) = rpb_gather(setup, (rpb, *context), ((batch, *aval.shape[1:]),))
    assert bias is not None
    if batch != 1:
        return bias
    return jax.lax.broadcast(
        bias[0], aval.shape[:1], out_sharding=aval.sharding if is_split else None
    )


def _slots(values: Iterable[Any], present: Iterable[Any]) -> list[Any]:
    """`values` in the places where something is present, None in the others."""
    rest = iter(values)
    return [next(rest) if p is not False else None for p in present]


def _present(values: Iterable[Any], present: Iterable[Any]) -> list[Any]:
    """The inverse of `_slots`."""
    return [x for x, p in zip(values, present, strict=True) if p is not False]


# The unfused operations: (setup, inputs, which of their gradients are needed, incoming gradients)
# to the gradients of the inputs but the context. An input whose gradient is needed may be unknown.


def _qk_reverse(setup: Setup, inputs: Tensors, needed: Sequence[bool], grads: Tensors) -> Tensors:
    query, key, _, additional, *context = inputs
    grad_query = grad_rpb = grad_key = grad_additional = None
    if needed[0]:
        (grad_query,) = av(setup, (*grads, key, additional, *context), (True,))
    if needed[1] or needed[3]:
        wanted = _shape(key), _shape(additional)
        grad_key, grad_additional = av_transpose(setup, (*grads, query, *context), wanted)
    if needed[2]:
        (grad_rpb,) = rpb_scatter(setup, (*grads, *context), (True,))
    return grad_query, grad_key, grad_rpb, grad_additional


def _av_reverse(setup: Setup, inputs: Tensors, needed: Sequence[bool], grads: Tensors) -> Tensors:
    attn, value, additional, *context = inputs
    grad_attn = grad_value = grad_additional = None
    if needed[0]:
        (grad_attn,) = qk(_linear(setup), (*grads, value, None, additional, *context), (True,))
    if needed[1] or needed[2]:
        wanted = _shape(value), _shape(additional)
        grad_value, grad_additional = av_transpose(setup, (attn, *grads, *context), wanted)
    return grad_attn, grad_value, grad_additional


def _av_transpose_reverse(
    setup: Setup, inputs: Tensors, needed: Sequence[bool], grads: Tensors
) -> Tensors:
    attn, query, *context = inputs
    grad_key, grad_additional = grads
    grad_attn = grad_query = None
    if needed[0]:
        keys = grad_key, None, grad_additional
        (grad_attn,) = qk(_linear(setup), (query, *keys, *context), (True,))
    if needed[1]:
        (grad_query,) = av(setup, (attn, grad_key, grad_additional, *context), (True,))
    return grad_attn, grad_query


def _rpb_scatter_reverse(
    setup: Setup, inputs: Tensors, needed: Sequence[bool], grads: Tensors
) -> Tensors:
    attn, *context = inputs
    return (_bias_of(setup, grads[0], attn, context),)


def _rpb_gather_reverse(
    setup: Setup, inputs: Tensors, needed: Sequence[bool], grads: Tensors
) -> Tensors:
    _, *context = inputs
    return rpb_scatter(setup, (*grads, *context), (True,))


REVERSE: dict[Operation, Callable[..., Tensors]] = {}


def _define_linear(
    operation: Operation, reverse: Callable[..., Tensors], *groups: tuple[int, ...]
) -> None:
    """Defines the rules of an operation that is linear in each group of its inputs."""

    def jvp(
        primals: Tensors,
        tangents: Tensors,
        *,
        setup: Setup,
        given: tuple[bool, ...],
        wanted: tuple[Wanted, ...],
    ) -> tuple[Tensors, Tensors]:
        results = operation.primitive.bind(*primals, setup=setup, given=given, wanted=wanted)
        primals, tangents = _slots(primals, given), _slots(tangents, given)
        bias = None
        if operation is qk:  # the bias is a term of its own
            bias = tangents[2]
            primals[2] = tangents[2] = None
        terms = []
        for group in groups:
            if any(_moves(tangents[i]) for i in group):
                inputs = [
                    instantiate_zeros(tangents[i]) if i in group else primals[i]
                    for i in range(len(primals))
                ]
                terms.append(_present(operation(_linear(setup), inputs, wanted), wanted))
        if _moves(bias):
            terms.append([_bias_of(setup, bias, results[0], primals[-CONTEXT:])])
        return results, [functools.reduce(jnp.add, parts) for parts in zip(*terms, strict=True)]

    def rule(
        setup: Setup, inputs: Tensors, needed: list[bool], grads: Tensors, wanted: Sequence[Wanted]
    ) -> Tensors:
        return reverse(setup, inputs, needed, _slots(map(instantiate_zeros, grads), wanted))

    REVERSE[operation] = reverse
    _define(operation, jvp, rule)


def _define(operation: Operation, jvp: Callable[..., Any], reverse: Callable[..., Tensors]) -> None:
    """Registers `jvp`, and `reverse` as the transpose in the inputs that are then unknown."""

    def transpose(
        grads: Tensors,
        *args: Any,
        setup: Setup,
        given: tuple[bool, ...],
        wanted: tuple[Wanted, ...],
    ) -> Tensors:
        if not any(map(_moves, grads)):
            return [Zero(x.aval) if is_undefined_primal(x) else None for x in args]
        inputs = _slots(args, given)
        needed = [is_undefined_primal(x) for x in inputs]
        results = padded(reverse(setup, inputs, needed, grads, wanted), len(inputs))
        return _present(
            (x if need else None for x, need in zip(results, needed, strict=True)), given
        )

    primitive_jvps[operation.primitive] = jvp
    primitive_transposes[operation.primitive] = transpose


def padded(gradients: Tensors, count: int) -> Tensors:
    """Gradients of the first of `count` inputs, and none of the others."""
    return [*gradients, *[None] * (count - len(gradients))]


def _moves(tangent: Any) -> bool:
    return tangent is not None and type(tangent) is not Zero


_define_linear(qk, _qk_reverse, (0,), (1, 3))
_define_linear(av, _av_reverse, (0,), (1, 2))
_define_linear(av_transpose, _av_transpose_reverse, (0,), (1,))
_define_linear(rpb_gather, _rpb_gather_reverse, (0,))
_define_linear(rpb_scatter, _rpb_scatter_reverse, (0,))


# Fused attention.


def _composed(setup: Setup, wanted: Sequence[Wanted], *tensors: Any) -> list[Array]:
    """What attention_forward computes, by unfused operations in float32 at least."""
    query, key, value, rpb, additional_keys, additional_values, *context = tensors
    if context[-1] is not None:
        return _composed_of_examples(setup, wanted, query, key, value, context[-1])
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    group = query.shape[-2] // key.shape[-2]
    scale = scale_or_default(setup.scale, query.shape[-1])

    def heads_first(x: Array) -> Array:
        return jnp.moveaxis(x.astype(dtype), -2, 1)

    def expanded(x: Array | None) -> Array | None:
        """Keys or values with as many heads as the queries have."""
        if x is None:
            return None
        x = heads_first(x)
        batch, heads, *rest = x.shape
        x = jnp.broadcast_to(x[:, :, None], (batch, heads, group, *rest))
        return x.reshape(batch, heads * group, *rest)

    rpb = None if rpb is None else rpb.astype(dtype)
    inputs = heads_first(query) * scale, expanded(key), rpb, expanded(additional_keys)
    (scores,) = qk(setup, (*inputs, *context), (True,))
    assert scores is not None
    # Where all scores are -inf there are no weights; they would be NaN.
    is_empty = jax.lax.stop_gradient(scores).max(axis=-1, keepdims=True) == -jnp.inf
    scores = jnp.where(is_empty, 0.0, scores)
    weights = jnp.where(is_empty, 0.0, jax.nn.softmax(scores, axis=-1))
    values = expanded(value), expanded(additional_values)
    (output,) = av(setup, (weights, *values, *context), (True,))
    assert output is not None
    logsumexp = jnp.where(is_empty[..., 0], -jnp.inf, jax.nn.logsumexp(scores, axis=-1))
    results = (
        jnp.moveaxis(output, 1, -2).astype(query.dtype),
        jnp.moveaxis(logsumexp, 1, -1),
    )
    return _present(results, wanted)


def _composed_of_examples(
    setup: Setup, wanted: Sequence[Wanted], query: Array, key: Array, value: Array, lengths: Array
) -> list[Array]:
    """`_composed` of examples that follow each other. Their lengths are not known, so the weights
    that are stored are those of all queries and all keys."""
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    queries, heads, dim = query.shape[1:]
    if key.shape[1] == 0:  # one that nobody sees
        key, value = (jnp.zeros((x.shape[0], 1, *x.shape[2:]), x.dtype) for x in (key, value))
    group = heads // key.shape[2]

    examples = Examples(lengths, queries, key.shape[1], setup.config)
    sees = examples.sees(jnp.arange(queries), jnp.arange(key.shape[1]))
    q = query.astype(dtype).reshape(-1, queries, heads // group, group, dim)
    scale = scale_or_default(setup.scale, dim)
    exact: dict[str, Any] = {"precision": jax.lax.Precision.HIGHEST}
    scores = jnp.einsum("bqhgd,bkhd->bhgqk", q * scale, key.astype(dtype), **exact)
    is_empty = ~sees.any(axis=-1, keepdims=True)
    scores = jnp.where(sees, scores, jnp.where(is_empty, 0.0, -jnp.inf))
    weights = jnp.where(is_empty, 0.0, jax.nn.softmax(scores, axis=-1))
    output = jnp.einsum("bhgqk,bkhd->bqhgd", weights, value.astype(dtype), **exact)
    logsumexp = jnp.where(is_empty[:, 0], -jnp.inf, jax.nn.logsumexp(scores, axis=-1))
    results = (
        output.reshape(*query.shape[:-1], -1).astype(query.dtype),
        jnp.moveaxis(logsumexp, -1, 1).reshape(query.shape[:-1]),
    )
    return _present(results, wanted)


def _composed_tangent(
    *arrays: Any, setup: Setup, given: tuple[bool, ...], wanted: tuple[Wanted, ...]
) -> list[Array]:
    """What attention_tangent computes."""
    inputs = _slots(arrays, given)
    tensors, tangents = inputs[:COUNT], inputs[COUNT + 1 :]
    return _tangent(functools.partial(_composed, setup, wanted), tensors, tangents)


def _composed_backward(
    *arrays: Any, setup: Setup, given: tuple[bool, ...], wanted: tuple[Wanted, ...]
) -> list[Array]:
    """What attention_backward computes. logsumexp only saves recomputing it, so that this is a
    function of the other inputs alone."""
    inputs = _slots(arrays, given)
    tensors, gradients = inputs[:COUNT], inputs[COUNT + 1 :]
    function = functools.partial(_composed, setup, [g is not None for g in gradients])

    def of_wanted(*moving: Array) -> list[Array]:
        return function(*_replace(tensors, padded(wanted, COUNT), moving))

    pull_back = jax.vjp(of_wanted, *_present(tensors[:TENSORS], wanted))[1]
    return list(pull_back([g for g in gradients if g is not None]))


def _replace(values: Tensors, which: Sequence[Any], replacements: Sequence[Any]) -> list[Any]:
    rest = iter(replacements)
    return [next(rest) if w else x for x, w in zip(values, which, strict=True)]


def _tangent(function: Callable[..., list[Array]], primals: Tensors, tangents: Tensors) -> Any:
    """The tangents of what `function` returns; primals and tangents may be absent."""
    moves = [_moves(t) for t in padded(tangents, len(primals))]

    def of_moving(*moving: Array) -> list[Array]:
        return function(*_replace(primals, moves, moving))

    moving = [x for x, m in zip(primals, moves, strict=True) if m]
    return jax.jvp(of_moving, moving, [t for t in tangents if _moves(t)])[1]


class _AttentionTangent(Operation):
    """(tensors, logsumexp, tangents of the tensors) to the tangents of output and logsumexp."""

    def __init__(self) -> None:
        inputs, outputs = attention_forward.inputs, attention_forward.outputs
        roles = (*inputs, outputs[1], *inputs[:TENSORS])
        super().__init__("attention_tangent", roles, outputs)

    def _plan(
        self,
        avals: Sequence[Any],
        setup: Setup,
        given: tuple[bool, ...],
        wanted: tuple[Wanted, ...],
        platform: str | None = None,
    ) -> tuple[list[tuple[tuple[int, ...], str]], int]:
        tensors = given[:COUNT]
        return attention_forward._plan(avals[: sum(tensors)], setup, tensors, wanted, platform)

    def _lower(self, platform: str, ctx: LoweringRuleContext, *operands: Any, **params: Any) -> Any:
        if params["setup"].backend == COMPOSED:
            return self._lower_composed(ctx, *operands, **params)
        return lower_fun(_composed_tangent, multiple_results=True)(ctx, *operands, **params)

    def _composed(
        self,
        *arrays: Any,
        setup: Setup,
        given: tuple[bool, ...],
        wanted: tuple[Wanted, ...],
    ) -> list[Array]:
        """By tiles, which store no weights."""
        inputs = _slots(arrays, given)

        def forward(*tensors: Any) -> list[Array]:
            given = tuple(x is not None for x in tensors)
            params: dict[str, Any] = {"setup": setup, "given": given, "wanted": wanted}
            return attention_forward._composed(*(x for x in tensors if x is not None), **params)

        return _tangent(forward, inputs[:COUNT], inputs[COUNT + 1 :])


attention_tangent = _AttentionTangent()


def _attention_jvp(
    primals: Tensors,
    tangents: Tensors,
    *,
    setup: Setup,
    given: tuple[bool, ...],
    wanted: tuple[Wanted, ...],
) -> tuple[Tensors, Tensors]:
    tensors = _slots(primals, given)
    output, logsumexp = attention_forward(setup, tensors, (True, True))  # the transpose needs both
    moving = [t if _moves(t) else None for t in _slots(tangents, given)[:TENSORS]]
    results = attention_tangent(setup, (*tensors, logsumexp, *moving), wanted)
    return _present((output, logsumexp), wanted), _present(results, wanted)


def _attention_tangent_transpose(
    setup: Setup, inputs: Tensors, needed: list[bool], grads: Tensors, wanted: Sequence[Wanted]
) -> Tensors:
    grad_output, grad_logsumexp = _slots(grads, wanted)
    gradients = (
        instantiate_zeros(grad_output),
        grad_logsumexp if _moves(grad_logsumexp) else None,
    )
    known = inputs[: COUNT + 1]
    results = attention_backward(setup, (*known, *gradients), needed[COUNT + 1 :])
    return *(None for _ in known), *results


def _attention_backward_transpose(
    setup: Setup, inputs: Tensors, needed: list[bool], grads: Tensors, wanted: Sequence[Wanted]
) -> Tensors:
    known = inputs[: COUNT + 1]
    tangents = [g if _moves(g) else None for g in _slots(grads, wanted)]
    results = attention_tangent(setup, (*known, *tangents), (True, needed[-1]))
    return *(None for _ in known), *results


def _jvp_of_composed(operation: Operation, composed: Callable[..., list[Array]]) -> Any:
    """The jvp of an operation by that of what it computes."""

    def jvp(primals: Tensors, tangents: Tensors, **params: Any) -> tuple[Tensors, Tensors]:
        results = operation.primitive.bind(*primals, **params)
        return results, _tangent(functools.partial(composed, **params), primals, tangents)

    return jvp


primitive_jvps[attention_forward.primitive] = _attention_jvp
_define(
    attention_tangent,
    _jvp_of_composed(attention_tangent, _composed_tangent),
    _attention_tangent_transpose,
)
_define(
    attention_backward,
    _jvp_of_composed(attention_backward, _composed_backward),
    _attention_backward_transpose,
)
