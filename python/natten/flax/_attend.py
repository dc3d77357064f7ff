"""What the modules for nnx and for linen share: arguments, and all between the two linear maps."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

import natten.jax as natten_jax
from natten._args import (
    Bools,
    Boundaries,
    Ints,
    checked_window,
    flag,
    head_dim_of,
    module_scale,
    per_axis,
    probability,
    scale_or_default,
    window_of,
)
from natten._kernel import check_name
from natten.jax._functions import as_array

_DTYPES = "float64", "float32", "bfloat16", "float16"

# (key, shape, dtype) -> array, or an array in the box that the framework's with_partitioning makes
Initializer: TypeAlias = Callable[..., Any]

_FUSED = {1: natten_jax.na1d, 2: natten_jax.na2d, 3: natten_jax.na3d}
_QK = {1: natten_jax.na1d_qk, 2: natten_jax.na2d_qk, 3: natten_jax.na3d_qk}
_AV = {1: natten_jax.na1d_av, 2: natten_jax.na2d_av, 3: natten_jax.na3d_av}


# Functions of this module, so that modules that hold them can be pickled.


def kernel_init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    return jax.nn.initializers.lecun_normal()(key, shape, dtype)


def bias_init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    return jnp.zeros(shape, dtype)


def rpb_init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    return jax.nn.initializers.truncated_normal(stddev=0.02)(key, shape, dtype)


def _softmax(scores: jax.Array) -> jax.Array:
    """0 where all scores are -inf, as the key mask makes them, and not NaN."""
    is_empty = jax.lax.stop_gradient(scores).max(axis=-1, keepdims=True) == -jnp.inf
    return jnp.where(is_empty, 0.0, jax.nn.softmax(jnp.where(is_empty, 0.0, scores), axis=-1))


def _check_dtype(name: str, value: DTypeLike) -> None:
    must = f"must be {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}"
    try:
        got = jnp.dtype(value).name
    except TypeError:
        raise TypeError(f"{name}: got {value!r}; {must}") from None
    if got not in _DTYPES:
        raise TypeError(f"{name}: got {got}; {must}")


class SelfAttention:
    """Multi-head self attention of every token over a window around it, {rank}-D.

    Maps [batch, *spatial, dim] to the same shape: a linear map to query, key and value,
    neighborhood attention, a linear map.

    Args:
        dim: channels; a multiple of num_heads. `embed_dim` is another name of it.
        num_heads: number of heads.
        kernel_size: window size, one for all axes or one per axis. Pass everything after it by
            name: next came dilation in NATTEN before 0.20, and stride since then.
        stride: how many neighboring queries share one window.
        dilation: distance between the tokens of a window.
        is_causal: whether a token sees only itself and earlier ones, per axis.
        boundary: what happens to a window at the border of the grid, one name for all axes or one
            per axis: "shift" moves it inwards, "cut" leaves the slots outside empty, "circular"
            lets it go on at the other end.
        rel_pos_bias: learn a bias by relative position, the parameter `rpb`
            [num_heads, 2 * kernel_size[0] - 1, ...].
        qkv_bias: whether the first linear map has a bias.
        qk_scale: factor on the scores; (dim / num_heads) ** -0.5 by default.
        attn_drop: dropout on attention weights. The fused operation has none, so a module with
            attn_drop > 0 uses the unfused ones unless it is deterministic.
        proj_drop: dropout on the result.
        backend: name of the implementation to use; by default the first that accepts the call.
        dtype: the type to compute in; by default that which input and parameters promote to.
        param_dtype: the type of the parameters.
        qkv_kernel_init: of `qkv.kernel` [dim, 3, dim]. It is called with shape [dim, 3 * dim], and
            for the bias with [3 * dim], so that it sees the true number of inputs. It may carry
            sharding metadata (`with_partitioning`), with one name per axis of the parameter, as may
            those below.
        qkv_bias_init: of `qkv.bias` [3, dim].
        proj_kernel_init: of `proj.kernel` [dim, dim].
        proj_bias_init: of `proj.bias` [dim].
        rpb_init: of `rpb`.
        {own}

    Raises:
        TypeError: a size that is no integer, is_causal that is no bool, a boundary that is no name,
            or a dtype in which nothing can be computed.
        ValueError: an argument that does not fit.
    """

    rank: ClassVar[int]
    _module: ClassVar[str]  # where users import it from
    _own: ClassVar[str]  # arguments of this kind of module, for the docstring

    dim: int
    num_heads: int
    kernel_size: Ints
    dilation: Ints
    is_causal: Bools | None
    stride: Ints
    boundary: Boundaries
    backend: str | None
    qk_scale: float | None

    def __init_subclass__(cls, *args: Any, **kwargs: Any) -> None:
        super().__init_subclass__(*args, **kwargs)
        if "rank" in vars(cls):  # one of the three, not a subclass that users make of them
            cls.__module__ = cls._module
            doc = inspect.cleandoc(SelfAttention.__doc__ or "")
            own = inspect.cleandoc(cls._own).replace("\n", "\n    ")
            cls.__doc__ = doc.replace("{own}", own).replace("{rank}", str(cls.rank))

    def _check_arguments(
        self,
        rel_pos_bias: bool,
        qkv_bias: bool,
        attn_drop: float,
        proj_drop: float,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
    ) -> None:
        """Raises on arguments that do not fit, and gives each one a value per axis."""
        flag("rel_pos_bias", rel_pos_bias)
        flag("qkv_bias", qkv_bias)
        probability("attn_drop", attn_drop)
        probability("proj_drop", proj_drop)
        if dtype is not None:
            _check_dtype("dtype", dtype)
        _check_dtype("param_dtype", param_dtype)
        head_dim = head_dim_of(self.dim, self.num_heads)
        if self.qk_scale is not None:
            self.qk_scale = module_scale(self.qk_scale, head_dim)
        if self.backend is not None:
            check_name(self.backend)
        for name, value in checked_window(self.rank, **window_of(self)).items():
            setattr(self, name, value)

    @property
    def embed_dim(self) -> int:
        return self.dim

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def scale(self) -> float:
        return scale_or_default(self.qk_scale, self.head_dim)

    @property
    def _rpb_shape(self) -> tuple[int, ...]:
        kernel_size = per_axis("kernel_size", self.kernel_size, self.rank)
        return (self.num_heads, *(2 * k - 1 for k in kernel_size))

    def _check_input(self, x: ArrayLike) -> jax.Array:
        x = as_array("x", x)
        if x.ndim != self.rank + 2 or x.shape[-1] != self.dim:
            raise ValueError(
                f"x: got shape {x.shape}; must be [batch, *spatial, {self.dim}], channels last, "
                f"with {self.rank} spatial {'axis' if self.rank == 1 else 'axes'}"
            )
        return x

    def _attend(
        self,
        qkv: jax.Array,
        rpb: jax.Array | None,
        key_mask: ArrayLike | None,
        drop: Callable[[jax.Array], jax.Array] | None,
    ) -> jax.Array:
        """[batch, *spatial, 3, dim] -> [batch, *spatial, dim].

        Args:
            qkv: query, key and value.
            rpb: the bias; it is converted to the dtype of qkv.
            key_mask: bool [batch or 1, *spatial], True where a token may be seen.
            drop: dropout of attention weights, if there is any.
        """
        rank = self.rank
        options = window_of(self) | {"key_mask": key_mask, "backend": self.backend}
        heads = qkv.reshape(*qkv.shape[:-1], self.num_heads, self.head_dim)
        query, key, value = (heads[..., i, :, :] for i in range(3))
        if rpb is not None:
            rpb = rpb.astype(qkv.dtype)
        if drop is None:
            out = _FUSED[rank](query, key, value, rpb=rpb, scale=self.scale, **options)
        else:
            # Heads first; softmax in float32 at least, as the fused operation does.
            query, key, value = (jnp.moveaxis(t, -2, 1) for t in (query, key, value))
            scores = _QK[rank](query * self.scale, key, rpb=rpb, **options)
            statistic = jnp.promote_types(scores.dtype, jnp.float32)
            attn = _softmax(scores.astype(statistic)).astype(scores.dtype)
            out = jnp.moveaxis(_AV[rank](drop(attn), value, **options), 1, -2)
        return out.reshape(*out.shape[:-2], self.dim)
