"""The modules NeighborhoodAttention1D, 2D and 3D."""

from __future__ import annotations

import math
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from natten import context
from natten._args import (
    Bools,
    Boundaries,
    Ints,
    UpstreamKeywords,
    by_name,
    check_extra,
    checked_window,
    flag,
    head_dim_of,
    module_init,
    module_scale,
    probability,
    window_of,
)
from natten._log import logger
from natten.torch import _functional, _nested, _ops
from natten.torch._autograd import without_empty_rows
from natten.torch._private import refuses_script


class _NeighborhoodAttention(nn.Module):
    """Multi-head self attention of every token over a window around it, {rank}-D.

    Maps [batch, *spatial, dim] to the same shape: a linear map to query, key and value,
    neighborhood attention, a linear map. Uses the unfused operations, which store the weights,
    until `natten.use_fused_na()` is called; both give the same result up to rounding.

    Args:
        dim: channels; a multiple of num_heads. `embed_dim` is another name of it.
        num_heads: number of heads.
        kernel_size: window size, one for all axes or one per axis. Pass everything after it by
            name: next came dilation in NATTEN before 0.20, and stride since then.
        stride: how many neighboring queries share one window.
        dilation: distance between the tokens of a window; None is 1.
        is_causal: whether a token sees only itself and earlier ones, per axis; None is False.
        boundary: what happens to a window at the border of the grid, per axis: "shift" moves it
            inwards, "cut" leaves the slots outside empty, "circular" lets it go on at the other
            end (see `natten.na{rank}d`).
        rel_pos_bias: learn a bias by relative position, the parameter `rpb`
            [num_heads, 2 * kernel_size[0] - 1, ...].
        qkv_bias: whether the first linear map has a bias.
        qk_scale: factor on the scores; (dim / num_heads) ** -0.5 by default.
        attn_drop: dropout on attention weights. The fused operation has none, so a module with
            attn_drop > 0 uses the unfused ones while it is training.
        proj_drop: dropout on the result.
        use_experimental_ops: accepted for compatibility; has no effect.
        device, dtype: of the parameters, as in PyTorch's own modules.
        attention_kwargs, backward_use_pt_reduction, run_persistent_kernel, kernel_schedule,
        torch_compile, try_fuse_additional_kv, xformers_kwargs: of NATTEN's own kernels; they have
            no effect here.

    Raises:
        ValueError: an argument that does not fit.
        TypeError: an argument of another type; is_causal takes no integers.
    """

    rank: int
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    stride: tuple[int, ...]
    boundary: tuple[str, ...]

    def __init_subclass__(cls) -> None:
        refuses_script(cls)
        if "rank" in vars(cls):  # one of the three below, not a subclass that users make of them
            cls.__module__ = "natten"  # where users import it from, and pickle too
            cls.__doc__ = (_NeighborhoodAttention.__doc__ or "").replace("{rank}", str(cls.rank))

    @module_init
    @by_name
    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: Ints,
        *,
        stride: Ints = 1,
        dilation: Ints | None = 1,
        is_causal: Bools | None = False,
        boundary: Boundaries = "shift",
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        use_experimental_ops: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **upstream: Unpack[UpstreamKeywords],
    ) -> None:
        super().__init__()
        check_extra(type(self).__name__, (), upstream)
        self.head_dim = head_dim_of(dim, num_heads)
        self.dim = self.embed_dim = dim
        self.num_heads = num_heads
        self.scale = module_scale(qk_scale, self.head_dim)
        window = checked_window(
            self.rank,
            kernel_size=kernel_size,
            dilation=dilation,
            is_causal=is_causal,
            stride=stride,
            boundary=boundary,
        )
        for name, value in window.items():
            setattr(self, name, value)
        has_bias = flag("qkv_bias", qkv_bias)
        self.qkv = nn.Linear(dim, 3 * dim, bias=has_bias, device=device, dtype=dtype)
        self.rpb: nn.Parameter | None
        if flag("rel_pos_bias", rel_pos_bias):
            shape = (num_heads, *(2 * k - 1 for k in self.kernel_size))
            self.rpb = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        else:
            self.register_parameter("rpb", None)
        self.attn_drop = nn.Dropout(probability("attn_drop", attn_drop))
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(probability("proj_drop", proj_drop))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a module that NATTEN pickled too: what its version has not gets the defaults."""
        super().__setstate__(state)
        has = vars(self)
        if "boundary" in has:
            return
        self.dim = self.embed_dim = self.num_heads * self.head_dim
        window = {name: has.get(name) for name in ("kernel_size", "dilation", "is_causal")}
        for name in ("kernel_size", "dilation"):
            if f"{name}_d" in has:  # that of the first of three axes, in 0.15
                window[name] = (has[f"{name}_d"], window[name], window[name])
        window |= {"stride": has.get("stride", 1), "boundary": "shift"}
        for name, value in checked_window(self.rank, **window).items():
            setattr(self, name, value)
        if "rpb" not in self._parameters:
            self.register_parameter("rpb", None)
        if "attn_drop" not in self._modules:
            self.attn_drop = nn.Dropout(0.0)

    def _drops_attention(self) -> bool:
        return self.training and self.attn_drop.p > 0

    def _uses_fused(self) -> bool:
        if not context.is_fused_na_enabled():
            return False
        if self._drops_attention():
            logger.info("attention dropout is on, which the fused operation lacks: using unfused")
            return False
        return True

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """[batch, *spatial, dim] -> [batch, *spatial, dim].

        `key_mask` is bool [batch or 1, *spatial], True where a token may be seen. For a token that
        sees none, attention gives 0.

        Also a nested tensor of examples [*spatial, dim], in the strided layout or, of rank 1, the
        jagged one; `key_mask` is then nested likewise, of [*spatial].

        Raises:
            ValueError: x does not have the dimensions above, or is too small for the windows.
            TypeError: x is no dense tensor, or not of the parameters' dtype.
        """
        rank = self.rank
        if not isinstance(x, Tensor):
            _ops.check_tensor("x", x)
        if x.is_nested:
            return self._of_examples(x, key_mask)
        # Another map may have taken the place of the linear one.
        dim = getattr(self.qkv, "in_features", 0) or (x.shape[-1] if x.dim() else "dim")
        if x.dim() != rank + 2 or x.shape[-1] != dim:
            raise ValueError(
                f"x: got shape {list(x.shape)}; must be [batch, *spatial, {dim}], channels last, "
                f"with {rank} spatial {'axis' if rank == 1 else 'axes'}"
            )
        qkv = self._map_to_qkv(x)
        query, key, value = (qkv.select(rank + 1, i) for i in range(3))
        out = self._attend(query, key, value, key_mask)
        return self.proj_drop(self._mapped("proj", out.flatten(-2)))

    forward.__qualname__ = "NeighborhoodAttention.forward"  # by which errors of Python call it

    def _mapped(self, name: str, x: Tensor) -> Tensor:
        """A map of every token by itself, `qkv` or `proj`."""
        if _functional.is_distributed(x):
            from natten.torch import _distributed

            return _distributed.mapped(name, getattr(self, name), x)
        return getattr(self, name)(x)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
        """Attention, heads-last; of dense tensors or of nested ones."""
        rank = self.rank
        if self._uses_fused():
            return _FUSED[rank](
                query, key, value, rpb=self.rpb, key_mask=key_mask, scale=self.scale,
                **window_of(self),
            )  # type: ignore[return-value]  # fmt: skip
        window = dict(**window_of(self), key_mask=key_mask)
        if query.is_nested:
            like = query
            query, key, value = (_heads_moved(x, -2, 0) for x in (query, key, value))
            attn = _QK[rank](query * self.scale, key, rpb=self.rpb, **window)
            weights = [self._weights(x, key_mask) for x in attn.unbind()]
            out = _AV[rank](_nested.joined(weights, query), value, **window)
            return _nested.joined([x.movedim(0, -2) for x in out.unbind()], like)
        query, key, value = (x.movedim(rank + 1, 1) for x in (query, key, value))
        attn = _QK[rank](query * self.scale, key, rpb=self.rpb, **window)
        return _AV[rank](self._weights(attn, key_mask), value, **window).movedim(1, rank + 1)

    def _weights(self, scores: Tensor, key_mask: Tensor | None) -> Tensor:
        if key_mask is None:
            weights = scores.softmax(dim=-1)
        else:
            scores, is_empty = without_empty_rows(scores)
            weights = scores.softmax(dim=-1).masked_fill(is_empty, 0.0)
        return self.attn_drop(weights) if self._drops_attention() else weights

    def _of_examples(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        """`forward` of a nested tensor. Maps are applied to the tokens of all examples at once."""
        rank = self.rank
        dim = getattr(self.qkv, "in_features", 0)
        examples = x.unbind()
        for i, example in enumerate(examples):
            if example.dim() != rank + 1 or (dim and example.shape[-1] != dim):
                raise ValueError(
                    f"x: got shape {list(example.shape)} for example {i}; must be "
                    f"[*spatial, {dim or 'dim'}], channels last, with {rank} spatial "
                    f"{'axis' if rank == 1 else 'axes'}"
                )
        grids = [example.shape[:-1] for example in examples]
        counts = [math.prod(grid) for grid in grids]
        qkv = self._map_to_qkv(torch.cat([example.flatten(0, -2) for example in examples]))

        def nested(tokens: Tensor) -> Tensor:
            parts = zip(tokens.split(counts), grids, strict=True)
            return _nested.joined([part.unflatten(0, grid) for part, grid in parts], x)

        query, key, value = (nested(qkv[:, i]) for i in range(3))
        out = self._attend(query, key, value, key_mask)
        tokens = torch.cat([example.flatten(0, rank - 1) for example in out.unbind()])
        return nested(self.proj_drop(self.proj(tokens.flatten(-2))))

    def _map_to_qkv(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., 3, num_heads, head_dim]."""
        qkv, channels = None, 3 * self.dim
        try:
            qkv = self._mapped("qkv", x)
            return qkv.unflatten(-1, (3, self.num_heads, self.head_dim))
        except RuntimeError as error:
            if qkv is not None and qkv.shape[-1] != channels:  # another map, or a part of it
                raise ValueError(
                    f"qkv: gave {qkv.shape[-1]} channels; must give {channels}, those of query, "
                    f"key and value of all {self.num_heads} heads"
                ) from error
            _ops.check_tensor("x", x, may_be_nested=True)
            if type(self.qkv) is not nn.Linear or isinstance(error, torch.OutOfMemoryError):
                raise
            weight = self.qkv.weight
            if x.device != weight.device:
                raise ValueError(
                    f"x: is on {x.device}; must be on the device of the parameters, {weight.device}"
                ) from error
            if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
                raise TypeError(
                    f"x: got dtype {_ops.dtype_name(x)}; must be {_ops.dtype_name(weight)}, as the "
                    "parameters are"
                ) from error
            raise

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, num_heads={self.num_heads}, "
            f"kernel_size={self.kernel_size}, dilation={self.dilation}, stride={self.stride}, "
            f"is_causal={self.is_causal}, boundary={self.boundary}, "
            f"has_bias={self.rpb is not None}"
        )


def _heads_moved(x: Tensor, source: int, destination: int) -> Tensor:
    """A nested tensor whose heads are elsewhere in its examples."""
    if x.layout == torch.jagged:
        return x.transpose(1, 2)
    return _nested.joined([part.movedim(source, destination) for part in x.unbind()], x)


_FUSED = {1: _functional.na1d, 2: _functional.na2d, 3: _functional.na3d}
_QK = {1: _functional.na1d_qk, 2: _functional.na2d_qk, 3: _functional.na3d_qk}
_AV = {1: _functional.na1d_av, 2: _functional.na2d_av, 3: _functional.na3d_av}


class NeighborhoodAttention1D(_NeighborhoodAttention):
    rank = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    rank = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    rank = 3
