"""The modules NeighborhoodAttention1D, 2D and 3D for flax.nnx."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

import natten.jax as natten_jax
from natten._args import Bools, Ints, per_axis
from natten.flax import _convert


class _NeighborhoodAttention(nnx.Module):
    """Multi-head self attention of every token over a window around it, {rank}-D.

    Maps [batch, *spatial, dim] to the same shape: a linear map to query, key and value,
    neighborhood attention, a linear map.

    Args:
        dim: channels; a multiple of num_heads.
        num_heads: number of heads.
        kernel_size: window size, one for all axes or one per axis.
        dilation: distance between neighbors.
        is_causal: whether a token sees only itself and those before it, per axis.
        rel_pos_bias: learn a bias by relative position, the parameter `rpb`
            [num_heads, 2 * kernel_size[0] - 1, ...].
        qkv_bias: whether the first linear map has a bias.
        qk_scale: factor on the scores; (dim / num_heads) ** -0.5 by default.
        attn_drop: dropout on attention weights. The fused operation has none, so a module with
            attn_drop > 0 uses the unfused ones unless it is deterministic (`module.eval()`).
        proj_drop: dropout on the result.
        stride: that many neighboring queries share one window.
        dtype: what to compute in; by default what the input and the parameters promote to.
        param_dtype: of the parameters.
        rngs: for the parameters, and for dropout where there is any.

    Raises:
        ValueError: an argument that does not fit.
    """

    rank: int

    def __init_subclass__(cls, *args: Any, **kwargs: Any) -> None:
        super().__init_subclass__(*args, **kwargs)
        cls.__module__ = "natten.flax"  # where users import it from
        cls.__doc__ = (_NeighborhoodAttention.__doc__ or "").replace("{rank}", str(cls.rank))

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: Ints,
        dilation: Ints = 1,
        is_causal: Bools = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        stride: Ints = 1,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if num_heads < 1 or dim % num_heads != 0:
            raise ValueError(f"num_heads: got {num_heads}; must divide dim, {dim}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        self.kernel_size = per_axis("kernel_size", kernel_size, self.rank)
        self.dilation = per_axis("dilation", dilation, self.rank)
        self.is_causal = tuple(map(bool, per_axis("is_causal", is_causal, self.rank)))
        self.stride = per_axis("stride", stride, self.rank)
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.qkv = nnx.Linear(dim, 3 * dim, use_bias=qkv_bias, rngs=rngs, **types)
        self.proj = nnx.Linear(dim, dim, rngs=rngs, **types)
        rpb_shape = (num_heads, *(2 * k - 1 for k in self.kernel_size))
        init = jax.nn.initializers.truncated_normal(stddev=0.02)
        self.rpb = nnx.Param(init(rngs.params(), rpb_shape, param_dtype)) if rel_pos_bias else None
        # Without dropout `rngs` need not have a stream for it.
        self.attn_drop = nnx.Dropout(attn_drop, rngs=rngs if attn_drop else None)
        self.proj_drop = nnx.Dropout(proj_drop, rngs=rngs if proj_drop else None)

    def __call__(
        self,
        x: ArrayLike,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """[batch, *spatial, dim] -> [batch, *spatial, dim].

        Args:
            x: the input.
            deterministic: True switches dropout off; by default as `train()` and `eval()` set it.
            rngs: for dropout, instead of those given to the constructor.

        Raises:
            ValueError: x does not have the dimensions above, or kernel_size * dilation exceeds one
                of them.
        """
        x = jnp.asarray(x)
        rank = self.rank
        if x.ndim != rank + 2:
            raise ValueError(
                f"x: got shape {x.shape}; must be [batch, *spatial, dim] with {rank} spatial "
                f"{'axis' if rank == 1 else 'axes'}"
            )
        if deterministic is None:
            deterministic = self.attn_drop.deterministic
        qkv = self.qkv(x)
        # [batch, *spatial, heads, head_dim] each
        qkv = qkv.reshape(*x.shape[:-1], 3, self.num_heads, self.head_dim)
        query, key, value = (qkv[..., i, :, :] for i in range(3))
        rpb = None if self.rpb is None else self.rpb[...].astype(qkv.dtype)
        window: dict[str, Any] = {
            "kernel_size": self.kernel_size,
            "dilation": self.dilation,
            "is_causal": self.is_causal,
            "stride": self.stride,
        }
        if deterministic or self.attn_drop.rate == 0:
            out = _FUSED[rank](query, key, value, rpb=rpb, scale=self.scale, **window)
        else:
            # Heads first; softmax in float32 at least, as the fused operation does.
            query, key, value = (jnp.moveaxis(t, -2, 1) for t in (query, key, value))
            scores = _QK[rank](query * self.scale, key, rpb=rpb, **window)
            statistic = jnp.promote_types(scores.dtype, jnp.float32)
            attn = jax.nn.softmax(scores.astype(statistic), axis=-1).astype(scores.dtype)
            attn = self.attn_drop(attn, deterministic=False, rngs=rngs)
            out = jnp.moveaxis(_AV[rank](attn, value, **window), 1, -2)
        out = self.proj(out.reshape(x.shape))
        return self.proj_drop(out, deterministic=deterministic, rngs=rngs)


_FUSED = {1: natten_jax.na1d, 2: natten_jax.na2d, 3: natten_jax.na3d}
_QK = {1: natten_jax.na1d_qk, 2: natten_jax.na2d_qk, 3: natten_jax.na3d_qk}
_AV = {1: natten_jax.na1d_av, 2: natten_jax.na2d_av, 3: natten_jax.na3d_av}


class NeighborhoodAttention1D(_NeighborhoodAttention):
    rank = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    rank = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    rank = 3


def _parameters(module: _NeighborhoodAttention) -> dict[str, Any]:
    """A module's `nnx.Param`s, nested as in `from_torch`; None where it has none."""
    linears = {"qkv": module.qkv, "proj": module.proj}
    return {
        "rpb": module.rpb,
        **{name: {"kernel": x.kernel, "bias": x.bias} for name, x in linears.items()},
    }


def load_torch(
    module: _NeighborhoodAttention, state_dict: Mapping[str, Any], prefix: str = ""
) -> None:
    """Replaces the parameters of a module, in place, by those of its PyTorch counterpart.

    Args:
        module: may be part of a larger model.
        state_dict, prefix: as in `from_torch`. Values are converted to the module's param_dtype.

    Raises:
        ValueError: state_dict does not hold exactly the module's parameters, or shapes differ; the
            module is unchanged then.
    """
    new = _convert.by_path(_convert.from_torch(state_dict, prefix))
    own = _convert.by_path(_parameters(module))
    if own.keys() != new.keys():
        raise ValueError(
            f"state_dict: holds {', '.join(sorted(new))}; must hold {', '.join(sorted(own))}, the "
            "parameters of the module"
        )
    for path, parameter in own.items():
        if new[path].shape != parameter[...].shape:
            raise ValueError(
                f"state_dict: got shape {new[path].shape} for {path}; must be "
                f"{parameter[...].shape}, as in the module"
            )
    for path, parameter in own.items():
        parameter[...] = jnp.asarray(new[path], parameter[...].dtype)


def to_torch(module: _NeighborhoodAttention) -> dict[str, np.ndarray]:
    """The parameters of a module as the state dictionary of its PyTorch counterpart.

    Returns:
        name -> numpy array of the parameter's dtype, for
        `torch_module.load_state_dict({k: torch.from_numpy(v) for k, v in ....items()})`. (numpy
        arrays of bfloat16 are not known to PyTorch; convert those to float32 first.)
    """
    params = _convert.by_path(_parameters(module))
    return _convert.to_state_dict({path: p[...] for path, p in params.items()})
