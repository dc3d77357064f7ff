"""The functions of `natten.jax`: public signatures, and derivatives over the primitives."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from natten._args import (
    EMPTY_SLOTS_ZERO,
    HAS_SCALE,
    SEPARATE_KEY_GRID,
    Bools,
    Ints,
    make_config,
    real_scale,
    with_flags,
)
from natten.jax import _primitives
from natten.jax._primitives import Setup

# The fused functions return `output`, or `(output, logsumexp)` with return_lse=True. Neither a
# union nor overloads for every rank would help callers more than this.
FusedResult: TypeAlias = Any
Tensors: TypeAlias = tuple[Array | None, ...]

# Derivatives. Every rule below calls custom_vjp functions, never primitives, so that its result can
# be differentiated again.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
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
    results = _primitives.attention_backward(
        setup, (*tensors, lse, *gradients), tuple(t is not None for t in tensors)
    )
    return (tuple(results),)


_attention.defvjp(_attention_forward, _attention_backward)


# Each of the next three is bilinear in its first and its other tensors, and its derivatives are
# the other two: qk scores queries with what they see, av sums what queries see, av_transpose sums
# over the queries that see a key.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _qk(
    setup: Setup, query: Array, key: Array, rpb: Array | None, additional_keys: Array | None
) -> Array:
    return _one(_primitives.qk(setup, (query, key, rpb, additional_keys), (True,)))


def _qk_backward(setup: Setup, tensors: Tensors, grad_attn: Array) -> Tensors:
    query, key, rpb, additional_keys = tensors
    assert query is not None and key is not None
    grad_query = _av(setup, grad_attn, key, additional_keys)
    grad_rpb = None if rpb is None else _rpb_scatter(setup, grad_attn)
    grad_key, grad_additional = _av_transpose(setup, _tokens(additional_keys), grad_attn, query)
    return grad_query, grad_key, grad_rpb, grad_additional


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _av(setup: Setup, attn: Array, value: Array, additional_values: Array | None) -> Array:
    return _one(_primitives.av(setup, (attn, value, additional_values), (True,)))


def _av_backward(setup: Setup, tensors: Tensors, grad_output: Array) -> Tensors:
    attn, value, additional_values = tensors
    assert attn is not None and value is not None
    grad_attn = _qk(_linear(setup), grad_output, value, None, additional_values)
    return grad_attn, *_av_transpose(setup, _tokens(additional_values), attn, grad_output)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _av_transpose(
    setup: Setup, additional: int | None, attn: Array, query: Array
) -> tuple[Array, Array | None]:
    """(sum over window slots, sum over `additional` more slots or None)."""
    batch, heads, *_, dim = query.shape
    # The number of additional tokens shows in no operand by itself, so their shape is passed.
    wanted = False if additional is None else (batch, heads, additional, dim)
    key, additional_keys = _primitives.av_transpose(setup, (attn, query), (True, wanted))
    assert key is not None
    return key, additional_keys


def _av_transpose_backward(
    setup: Setup, additional: int | None, tensors: Tensors, gradients: tuple[Array, Array | None]
) -> Tensors:
    attn, query = tensors
    assert attn is not None and query is not None
    grad_key, grad_additional = gradients
    return (
        _qk(_linear(setup), query, grad_key, None, grad_additional),
        _av(setup, attn, grad_key, grad_additional),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rpb_scatter(setup: Setup, attn: Array) -> Array:
    return _one(_primitives.rpb_scatter(setup, (attn,), (True,)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rpb_gather(setup: Setup, shape: tuple[int, ...], rpb: Array) -> Array:
    return _one(_primitives.rpb_gather(setup, (rpb,), (shape,)))


def _rpb_scatter_backward(setup: Setup, tensors: tuple[Array], grad_rpb: Array) -> tuple[Array]:
    (attn,) = tensors
    return (_rpb_gather(_linear(setup), attn.shape, grad_rpb),)


def _rpb_gather_backward(
    setup: Setup, shape: tuple[int, ...], _: tuple[Array], grad_attn: Array
) -> tuple[Array]:
    return (_rpb_scatter(setup, grad_attn),)


def _keeping_tensors(function: Callable[..., Any], statics: int) -> Callable[..., Any]:
    """The forward rule that keeps all tensors for the backward rule."""

    def forward(*args: Any) -> tuple[Any, Tensors]:
        return function(*args), args[statics:]

    return forward


_qk.defvjp(_keeping_tensors(_qk, 1), _qk_backward)
_av.defvjp(_keeping_tensors(_av, 1), _av_backward)
_av_transpose.defvjp(_keeping_tensors(_av_transpose, 2), _av_transpose_backward)
_rpb_scatter.defvjp(_keeping_tensors(_rpb_scatter, 1), _rpb_scatter_backward)
_rpb_gather.defvjp(_keeping_tensors(_rpb_gather, 2), _rpb_gather_backward)


def _linear(setup: Setup) -> Setup:
    """Derivatives are 0 where a causal window leaves slots empty, not -inf."""
    return dataclasses.replace(setup, config=with_flags(setup.config, EMPTY_SLOTS_ZERO))


def _one(results: list[Array | None]) -> Array:
    (result,) = results
    assert result is not None
    return result


def _tokens(additional: Array | None) -> int | None:
    return None if additional is None else additional.shape[2]


# What users call.


def _as_array(name: str, value: ArrayLike) -> Array:
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: got {type(value)}; must be an array") from None


def _as_arrays(**values: ArrayLike | None) -> Tensors:
    optional = ("rpb", "additional_keys", "additional_values")
    return tuple(
        None if value is None and name in optional else _as_array(name, value)  # type: ignore[arg-type]
        for name, value in values.items()
    )


def _named(rank: int, suffix: str = "") -> Callable[[Callable], Callable]:
    """Names the function that a factory made for one rank, and fills the rank into its doc."""

    def name(function: Callable) -> Callable:
        function.__name__ = function.__qualname__ = f"na{rank}d{suffix}"
        function.__module__ = "natten.jax"
        function.__doc__ = (function.__doc__ or "").replace("{rank}", str(rank))
        return function

    return name


def _fused(
    tensors: Tensors, config: Any, scale: float | None, return_lse: bool, backend: str | None
) -> FusedResult:
    if scale is not None:
        config = with_flags(config, HAS_SCALE)
    setup = Setup(config, real_scale(scale), backend or "")
    output, logsumexp = _attention(setup, bool(return_lse), tensors)
    return (output, logsumexp) if return_lse else output


def _make_fused(rank: int) -> Callable[..., FusedResult]:
    @_named(rank)
    def fused(
        query: ArrayLike,
        key: ArrayLike,
        value: ArrayLike,
        kernel_size: Ints,
        dilation: Ints = 1,
        is_causal: Bools = False,
        rpb: ArrayLike | None = None,
        scale: float | None = None,
        additional_keys: ArrayLike | None = None,
        additional_values: ArrayLike | None = None,
        *,
        stride: Ints = 1,
        return_lse: bool = False,
        backend: str | None = None,
    ) -> FusedResult:
        """Fused {rank}-D neighborhood attention, heads-last.

        Every token attends to a window of `kernel_size` tokens around it; the weights are never
        stored. `spatial` below stands for {rank} axes. Works under jit, grad and vmap over any
        array. Can be differentiated once, in reverse mode; for higher derivatives use
        `na{rank}d_qk` and `na{rank}d_av`.

        Args:
            query: [batch, *spatial, heads, head_dim], float64, float32, bfloat16 or float16.
            key: [batch, *spatial, kv_heads, head_dim]; kv_heads divides heads (grouped-query).
            value: [batch, *spatial, kv_heads, value_head_dim].
            kernel_size: window size, one for all axes or one per axis. kernel_size * dilation must
                not exceed the axis. This and all that follow, except arrays, are static: Python
                values, not traced ones.
            dilation: distance between neighbors.
            is_causal: whether a token sees only itself and those before it, per axis.
            rpb: bias [heads, 2 * kernel_size[0] - 1, ...] by relative position, added to scores.
            scale: factor on the scores; head_dim ** -0.5 by default.
            additional_keys: [batch, n, kv_heads, head_dim], keys that every token sees besides.
            additional_values: [batch, n, kv_heads, value_head_dim].
            stride: that many neighboring queries share one window; 1 to kernel_size.
            return_lse: also return logsumexp.
            backend: name of the implementation to use; by default the first that can.

        Returns:
            output [batch, *spatial, heads, value_head_dim], of the dtype of query; with return_lse
            also logsumexp [batch, *spatial, heads], float32 (float64 for float64), the natural
            logarithm of the sum of exp(score), differentiable too (`merge_attentions` uses it).

        Raises:
            ValueError: a shape or value that does not fit; the message says which and why.
            TypeError: an unsupported or mismatched dtype. Both are raised when traced.
            NotImplementedError: a second derivative.
        """
        config = make_config(rank, kernel_size, dilation, is_causal, stride)
        tensors = _as_arrays(
            query=query,
            key=key,
            value=value,
            rpb=rpb,
            additional_keys=additional_keys,
            additional_values=additional_values,
        )
        return _fused(tensors, config, scale, return_lse, backend)

    return fused


def _make_qk(rank: int) -> Callable[..., Array]:
    @_named(rank, "_qk")
    def qk(
        query: ArrayLike,
        key: ArrayLike,
        kernel_size: Ints,
        dilation: Ints = 1,
        additional_keys: ArrayLike | None = None,
        is_causal: Bools = False,
        rpb: ArrayLike | None = None,
        *,
        stride: Ints = 1,
        backend: str | None = None,
    ) -> Array:
        """Scores of {rank}-D neighborhood attention, heads-first. No scale is applied.

        Works under jit, vmap and grad of any order, in reverse mode.

        Args:
            query, key: [batch, heads, *spatial, head_dim], of the same dtype (see `na{rank}d`).
            additional_keys: [batch, heads, n, head_dim]; their n scores follow the window's.
            rpb: bias [heads, 2 * kernel_size[0] - 1, ...] by relative position.
            kernel_size, dilation, is_causal, stride, backend: as in `na{rank}d`.

        Returns:
            attn [batch, heads, *spatial, slots], of the dtype of query; slots = product of
            kernel_size, in row-major window order, plus n. Slots that causal masking leaves empty
            hold -inf and have zero gradients.

        Raises:
            ValueError, TypeError: as `na{rank}d`.
        """
        config = make_config(rank, kernel_size, dilation, is_causal, stride)
        tensors = _as_arrays(query=query, key=key, rpb=rpb, additional_keys=additional_keys)
        return _qk(Setup(config, None, backend or ""), *tensors)

    return qk


def _make_av(rank: int) -> Callable[..., Array]:
    @_named(rank, "_av")
    def av(
        attn: ArrayLike,
        value: ArrayLike,
        kernel_size: Ints,
        dilation: Ints = 1,
        additional_values: ArrayLike | None = None,
        is_causal: Bools = False,
        *,
        stride: Ints = 1,
        backend: str | None = None,
    ) -> Array:
        """Sums of values over {rank}-D neighborhoods, weighted by attn, heads-first.

        Works under jit, vmap and grad of any order, in reverse mode.

        Args:
            attn: [batch, heads, *spatial, slots], as `na{rank}d_qk` returns; slots that causal
                masking leaves empty are ignored.
            value: [batch, heads, *spatial, head_dim], of the dtype of attn.
            additional_values: [batch, heads, n, head_dim], for the last n slots.
            kernel_size, dilation, is_causal, stride, backend: as in `na{rank}d`.

        Returns:
            output [batch, heads, *spatial, head_dim], of the dtype of attn.

        Raises:
            ValueError, TypeError: as `na{rank}d`.
        """
        config = make_config(rank, kernel_size, dilation, is_causal, stride)
        tensors = _as_arrays(attn=attn, value=value, additional_values=additional_values)
        return _av(Setup(config, None, backend or ""), *tensors)

    return av


na1d, na2d, na3d = map(_make_fused, (1, 2, 3))
na1d_qk, na2d_qk, na3d_qk = map(_make_qk, (1, 2, 3))
na1d_av, na2d_av, na3d_av = map(_make_av, (1, 2, 3))


def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    *,
    backend: str | None = None,
) -> FusedResult:
    """Attention of every query to all keys. There is no mask and no dropout.

    Works under jit, grad (once, in reverse mode) and vmap.

    Args:
        query: [batch, tokens, heads, head_dim], float64, float32, bfloat16 or float16.
        key: [batch, key_tokens, kv_heads, head_dim]; kv_heads divides heads (grouped-query).
        value: [batch, key_tokens, kv_heads, value_head_dim].
        is_causal: whether query i sees only keys 0 to i (also where the lengths differ).
        scale: factor on the scores, a Python number; head_dim ** -0.5 by default.
        return_lse: also return logsumexp.
        backend: name of the implementation to use; by default the first that can.

    Returns:
        output [batch, tokens, heads, value_head_dim]; with return_lse also logsumexp
        [batch, tokens, heads], as `na1d`.

    Raises:
        ValueError, TypeError, NotImplementedError: as `na1d`.
    """
    query, key, value = (
        _as_array(name, x) for name, x in (("query", query), ("key", key), ("value", value))
    )
    # One window that spans all keys. A key without dimensions is refused by libnatten.
    window = key.shape[1] if key.ndim > 1 else 1
    config = make_config(1, window, is_causal=is_causal, flags=SEPARATE_KEY_GRID)
    return _fused((query, key, value, None, None, None), config, scale, return_lse, backend)


def merge_attentions(
    outputs: Sequence[ArrayLike], lse_tensors: Sequence[ArrayLike]
) -> tuple[Array, Array]:
    """Combines attention over disjoint sets of keys into attention over their union, exactly.

    Works under every JAX transformation.

    Args:
        outputs: arrays [batch, *spatial, heads, value_head_dim] of one dtype.
        lse_tensors: the logsumexp of each, [batch, *spatial, heads]. Where it is -inf, a set holds
            no keys and its output is ignored.

    Returns:
        (output, logsumexp), shaped like each of the arguments; output has the dtype of outputs,
        logsumexp is float32 (float64 for float64).

    Raises:
        ValueError: no arrays, as many of one as of the other are not given, or shapes differ.
        TypeError: dtypes that differ or are not floating point.
    """
    parts = [_as_array("outputs", x) for x in outputs]
    lses = [_as_array("lse_tensors", x) for x in lse_tensors]
    if not parts or len(parts) != len(lses):
        raise ValueError(
            f"lse_tensors: got {len(lses)} arrays for {len(parts)} outputs; there must be one for "
            "each, and at least one"
        )
    first = parts[0]
    for x in parts:
        if x.shape != first.shape or x.ndim < 1:
            raise ValueError(
                f"outputs: got shapes {[p.shape for p in parts]}; must be the same, "
                "[batch, *spatial, heads, value_head_dim]"
            )
        if x.dtype != first.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"outputs: got dtypes {[p.dtype.name for p in parts]}; must be one floating dtype"
            )
    for x in lses:
        if x.shape != first.shape[:-1]:
            raise ValueError(
                f"lse_tensors: got shape {x.shape}; must be {first.shape[:-1]}, to match outputs"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"lse_tensors: got dtype {x.dtype.name}; must be floating point")
    statistic = jnp.promote_types(first.dtype, jnp.float32)
    lse = jnp.stack([x.astype(statistic) for x in lses])
    # Any shift gives the same result; this one keeps exp in range. Where all sets are empty it must
    # be finite, as -inf - -inf is not.
    shift = jax.lax.stop_gradient(lse.max(axis=0))
    shift = jnp.where(shift == -jnp.inf, 0.0, shift)
    weights = jnp.exp(lse - shift)
    total = weights.sum(axis=0)
    is_empty = total == 0
    total = jnp.where(is_empty, 1.0, total)  # keeps the gradients of both branches finite
    weights = (weights / total)[..., None]
    # An output over no keys may hold anything, NaN too.
    terms = (
        jnp.where(w > 0, x.astype(statistic), 0.0) * w for w, x in zip(weights, parts, strict=True)
    )
    output = functools.reduce(jnp.add, terms)
    return output.astype(first.dtype), jnp.where(is_empty, -jnp.inf, shift + jnp.log(total))
