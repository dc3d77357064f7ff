"""The modules NeighborhoodAttention1D, 2D and 3D for flax.nnx."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from natten._args import Bools, Boundaries, Ints, module_init
from natten.flax import _attend, _convert
from natten.flax._attend import Initializer


class _NeighborhoodAttention(_attend.SelfAttention, nnx.Module):
    _module = "natten.flax"
    _own = """
        rngs: for the parameters, and for dropout where there is any.
    """

    @module_init
    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: Ints,
        *,
        stride: Ints = 1,
        dilation: Ints = 1,
        is_causal: Bools | None = False,
        boundary: Boundaries = "shift",
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        qkv_kernel_init: Initializer = _attend.kernel_init,
        qkv_bias_init: Initializer = _attend.bias_init,
        proj_kernel_init: Initializer = _attend.kernel_init,
        proj_bias_init: Initializer = _attend.bias_init,
        rpb_init: Initializer = _attend.rpb_init,
        rngs: nnx.Rngs,
    ) -> None:
        self.dim, self.num_heads, self.qk_scale = dim, num_heads, qk_scale
        self.kernel_size, self.dilation = kernel_size, dilation
        self.is_causal, self.stride, self.boundary = is_causal, stride, boundary
        self.backend = backend
        self._check_arguments(rel_pos_bias, qkv_bias, attn_drop, proj_drop, dtype, param_dtype)
        if not isinstance(rngs, nnx.Rngs):
            got = "None" if rngs is None else type(rngs).__name__
            raise TypeError(f"rngs: got {got}; must be a flax.nnx.Rngs, such as nnx.Rngs(0)")
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        # Query, key and value have an axis of their own: devices that share the last one hold whole
        # heads of all three.
        self.qkv = nnx.LinearGeneral(
            dim,
            (3, dim),
            use_bias=qkv_bias,
            kernel_init=qkv_kernel_init,
            bias_init=qkv_bias_init,
            rngs=rngs,
            **types,
        )
        self.proj = nnx.Linear(
            dim, dim, kernel_init=proj_kernel_init, bias_init=proj_bias_init, rngs=rngs, **types
        )
        self.rpb = (
            nnx.Param(rpb_init(rngs.params(), self._rpb_shape, param_dtype))
            if rel_pos_bias
            else None
        )
        # Without dropout `rngs` need not have a stream for it.
        self.attn_drop = nnx.Dropout(attn_drop, rngs=rngs if attn_drop else None)
        self.proj_drop = nnx.Dropout(proj_drop, rngs=rngs if proj_drop else None)

    def __call__(
        self,
        x: ArrayLike,
        *,
        key_mask: ArrayLike | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """[batch, *spatial, dim] -> [batch, *spatial, dim].

        Args:
            x: the input.
            key_mask: bool [batch or 1, *spatial], True where a token may be seen. Tokens that see
                nothing get the bias of the last linear map.
            deterministic: True switches dropout off; by default as `train()` and `eval()` set it.
            rngs: for dropout, instead of those given to the constructor.

        Raises:
            ValueError: x or key_mask does not have the dimensions above, or kernel_size * dilation
                exceeds one of them.
            TypeError: key_mask is not of bools.
        """
        x = self._check_input(x)
        if deterministic is None:
            deterministic = self.attn_drop.deterministic
        drop = None
        if self.attn_drop.rate and not deterministic:
            drop = functools.partial(self.attn_drop, deterministic=False, rngs=rngs)
        rpb = None if self.rpb is None else self.rpb[...]
        out = self._attend(self.qkv(x), rpb, key_mask, drop)
        return self.proj_drop(self.proj(out), deterministic=deterministic, rngs=rngs)

    __call__.__qualname__ = "NeighborhoodAttention.__call__"  # by which errors of Python call it


class NeighborhoodAttention1D(_NeighborhoodAttention):
    rank = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    rank = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    rank = 3


def _parameters(module: _NeighborhoodAttention) -> dict[str, Any]:
    """The `nnx.Param`s that a module has, by dotted path."""
    parameters = {
        "qkv.kernel": module.qkv.kernel,
        "qkv.bias": module.qkv.bias,
        "rpb": module.rpb,
        "proj.kernel": module.proj.kernel,
        "proj.bias": module.proj.bias,
    }
    return {path: p for path, p in parameters.items() if p is not None}


def load_torch(
    module: _NeighborhoodAttention, state_dict: Mapping[str, Any], prefix: str = ""
) -> None:
    """Replaces the parameters of a module, in place, by those of its PyTorch counterpart.

    Args:
        module: an `nnx` module; may be part of a larger model. Its parameters stay on the devices
            that they are on.
        state_dict, prefix: as in `from_torch`. Values are converted to the module's param_dtype.

    Raises:
        ValueError: state_dict does not hold exactly the module's parameters, or shapes differ; the
            module is unchanged then.
    """
    new = _convert.by_path(_convert.from_torch(state_dict, prefix))
    own = _parameters(module)
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
        old = parameter[...]
        value = jnp.asarray(new[path], old.dtype)
        if not isinstance(old, jax.core.Tracer) and old.committed:  # someone placed it there
            value = jax.device_put(value, old.sharding)
        parameter[...] = value


def to_torch(module: _NeighborhoodAttention | Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The parameters of a module as the state dictionary of its PyTorch counterpart.

    Args:
        module: an `nnx` module, or the parameters of a `linen` module: a (frozen) dictionary, alone
            or under "params", with or without metadata around its arrays.

    Returns:
        name -> numpy array of the parameter's dtype, for
        `torch_module.load_state_dict({k: torch.from_numpy(v) for k, v in ....items()})`. (numpy
        arrays of bfloat16 are not known to PyTorch; convert those to float32 first.)

    Raises:
        ValueError: the dictionary holds other parameters, or lacks some, or their shapes are wrong.
    """
    if isinstance(module, Mapping):
        return _convert.to_state_dict(_convert.by_path(module.get("params", module)))
    return _convert.to_state_dict({path: p[...] for path, p in _parameters(module).items()})
