"""Neighborhood attention modules for `flax.linen`.

Their parameters have the names and shapes of those of the `nnx` modules in `natten.flax`, whose
`from_torch` and `to_torch` convert them from and to PyTorch.
"""

from __future__ import annotations

import functools
from dataclasses import KW_ONLY
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax.typing import ArrayLike, DTypeLike

from natten._args import Bools, Boundaries, Ints, module_init
from natten.flax import _attend
from natten.flax._attend import Initializer

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]


def _flat(init: Initializer) -> Initializer:
    """`init` for an array whose last two axes it sees as one."""

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        drawn = init(key, (*shape[:-2], shape[-2] * shape[-1]), dtype)
        # An array, or a box around one, which is a tree.
        return jax.tree.map(lambda array: array.reshape(shape), drawn)

    return initialize


class _QKV(nn.Module):
    """A linear map [..., dim] -> [..., 3, dim].

    `nn.DenseGeneral`, except for initializers with sharding metadata: that puts the names, which
    are those of the parameter's three axes, on the flat array first, and fails within a mesh.
    """

    dim: int
    use_bias: bool
    dtype: DTypeLike | None
    param_dtype: DTypeLike
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dim = self.dim
        kernel = self.param("kernel", _flat(self.kernel_init), (dim, 3, dim), self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", _flat(self.bias_init), (3, dim), self.param_dtype)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        out = jnp.tensordot(x, kernel, axes=1)
        return out if bias is None else out + bias


class _NeighborhoodAttention(_attend.SelfAttention, nn.Module):
    _module = "natten.flax.linen"
    _own = """
        deterministic: True switches dropout off. Where there is dropout, it must be given either
            here or in the call, and dropout draws from the stream "dropout".
    """

    dim: int
    num_heads: int
    kernel_size: Ints
    _: KW_ONLY
    stride: Ints = 1
    dilation: Ints = 1
    is_causal: Bools | None = False
    boundary: Boundaries = "shift"
    rel_pos_bias: bool = False
    qkv_bias: bool = True
    qk_scale: float | None = None
    attn_drop: float = 0.0
    proj_drop: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    qkv_kernel_init: Initializer = _attend.kernel_init
    qkv_bias_init: Initializer = _attend.bias_init
    proj_kernel_init: Initializer = _attend.kernel_init
    proj_bias_init: Initializer = _attend.bias_init
    rpb_init: Initializer = _attend.rpb_init
    deterministic: bool | None = None
    backend: str | None = None

    def __init_subclass__(cls, *args: Any, **kwargs: Any) -> None:
        has_own = "__init__" in vars(cls)
        super().__init_subclass__(*args, **kwargs)
        if not has_own:  # it was generated from the fields
            cls.__init__ = module_init(cls.__init__)  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        self._check_arguments(
            self.rel_pos_bias,
            self.qkv_bias,
            self.attn_drop,
            self.proj_drop,
            self.dtype,
            self.param_dtype,
        )
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        deterministic: bool | None = None,
        *,
        key_mask: ArrayLike | None = None,
    ) -> jax.Array:
        """[batch, *spatial, dim] -> [batch, *spatial, dim].

        Args:
            x: the input.
            deterministic: as in the constructor; to be given in one place only.
            key_mask: bool [batch or 1, *spatial], True where a token may be seen. Tokens that see
                nothing get the bias of the last linear map.

        Raises:
            ValueError: x or key_mask does not have the dimensions above, kernel_size * dilation
                exceeds one of them, or with dropout `deterministic` is given nowhere or twice.
            TypeError: key_mask is not of bools.
        """
        x = self._check_input(x)
        if self.attn_drop or self.proj_drop:
            deterministic = nn.merge_param("deterministic", self.deterministic, deterministic)
        qkv = _QKV(
            self.dim,
            self.qkv_bias,
            self.dtype,
            self.param_dtype,
            self.qkv_kernel_init,
            self.qkv_bias_init,
            name="qkv",
        )(x)
        rpb = None
        if self.rel_pos_bias:
            rpb = self.param("rpb", self.rpb_init, self._rpb_shape, self.param_dtype)
        drop = None
        if self.attn_drop and not deterministic:
            drop = functools.partial(nn.Dropout(self.attn_drop), deterministic=False)
        out = self._attend(qkv, rpb, key_mask, drop)
        out = nn.Dense(
            self.dim,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.proj_kernel_init,
            bias_init=self.proj_bias_init,
            name="proj",
        )(out)
        if self.proj_drop:
            out = nn.Dropout(self.proj_drop)(out, deterministic=deterministic)
        return out

    __call__.__qualname__ = "NeighborhoodAttention.__call__"  # by which errors of Python call it


class NeighborhoodAttention1D(_NeighborhoodAttention):
    rank = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    rank = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    rank = 3
