"""Derivatives of the operators.

The unfused operators are linear in each argument, and the derivative of each is made of the others,
so they can be differentiated in reverse any number of times:

    qk(q, k)            dq = av(g, k)    dk = av_transpose(g, q)    drpb = rpb_scatter(g)
    av(a, v)            da = qk(g, v)    dv = av_transpose(a, g)
    av_transpose(a, q)  da = qk(q, g)    dq = av(a, g)
    rpb_scatter(a)      da = rpb_gather(g)
    rpb_gather(rpb)     drpb = rpb_scatter(g)

Inside derivatives empty slots hold 0, which keeps them linear.

The first derivative of fused attention is fused too. Higher ones are those of the same attention
composed of the unfused operators, which store the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from natten._args import EMPTY_SLOTS_ZERO, Config, with_flags
from natten.torch import _ops


class Attention(Function):
    """(query, key, value, rpb, additional_keys, additional_values, config, scale, backend) ->
    (output, logsumexp)."""

    @staticmethod
    def forward(*args):
        return _ops.attention_forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.config, ctx.scale, ctx.backend = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_output: Tensor | None, grad_logsumexp: Tensor | None):
        *inputs, logsumexp = ctx.saved_tensors
        query, value = inputs[0], inputs[2]
        if grad_output is None:
            grad_output = query.new_zeros((*query.shape[:-1], value.shape[-1]))
        wanted = [bool(need) for need in ctx.needs_input_grad[: len(inputs)]]
        gradients = iter(
            AttentionBackward.apply(
                *inputs, logsumexp, grad_output, grad_logsumexp,
                ctx.config, ctx.scale, ctx.backend, wanted,
            )
        )  # fmt: skip
        return *(next(gradients) if want else None for want in wanted), None, None, None


class AttentionBackward(Function):
    """(the six inputs of Attention, logsumexp, grad_output, grad_logsumexp, config, scale, backend,
    wanted) -> the wanted gradients. A function of the inputs and incoming gradients alone:
    logsumexp only saves recomputing it."""

    @staticmethod
    def forward(*args):
        return tuple(_ops.attention_backward(*args))

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.config, ctx.scale, ctx.backend, ctx.wanted = inputs
        ctx.save_for_backward(*tensors[:6], *tensors[7:])

    @staticmethod
    def backward(ctx, *grads):
        *inputs, grad_output, grad_logsumexp = ctx.saved_tensors
        with torch.enable_grad():
            # Fresh aliases: in the caller's graph the inputs may depend on one another.
            leaves = [
                x if x is None else x.view_as(x).requires_grad_()
                for x in (*inputs, grad_output, grad_logsumexp)
            ]
            *inputs, grad_output, grad_logsumexp = leaves
            output, logsumexp = _composed(*inputs, ctx.config, ctx.scale, ctx.backend)
            results = [output, logsumexp][: 1 if grad_logsumexp is None else 2]
            incoming = [grad_output, grad_logsumexp][: len(results)]
            wanted = [x for x, want in zip(inputs, ctx.wanted, strict=True) if want]
            firsts = torch.autograd.grad(results, wanted, incoming, create_graph=True)
        present = [x for x in leaves if x is not None]
        seconds = iter(
            torch.autograd.grad(
                firsts, present, grads, create_graph=torch.is_grad_enabled(), allow_unused=True
            )
        )
        out = [None if x is None else next(seconds) for x in leaves]
        return *out[:6], None, *out[6:], None, None, None, None


def _composed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    config: Config,
    scale: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Fused attention composed of the unfused operators, in float32 at least."""
    dtype, group = query.dtype, query.shape[-2] // key.shape[-2]
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def heads_first(x: Tensor, repeats: int = 1) -> Tensor:
        return x.to(wide).repeat_interleave(repeats, dim=-2).movedim(-2, 1)

    def additional(x: Tensor | None) -> Tensor | None:
        return None if x is None else heads_first(x, group)

    scale = query.shape[-1] ** -0.5 if scale is None else scale
    attn = Qk.apply(
        heads_first(query) * scale,
        heads_first(key, group),
        None if rpb is None else rpb.to(wide),
        additional(additional_keys),
        config,
        backend,
    )
    values = heads_first(value, group), additional(additional_values)
    output = Av.apply(attn.softmax(-1), *values, config, backend)
    return output.movedim(1, -2).to(dtype), attn.logsumexp(-1).movedim(1, -1)


class Qk(Function):
    """(query, key, rpb, additional_keys, config, backend) -> attn"""

    @staticmethod
    def forward(*args):
        return _ops.qk(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, _, additional_keys, ctx.config, ctx.backend = inputs
        ctx.save_for_backward(query, key, additional_keys)

    @staticmethod
    def backward(ctx, grad):
        query, key, additional_keys = ctx.saved_tensors
        options = ctx.config, ctx.backend
        grad_query = grad_key = grad_rpb = grad_additional = None
        if ctx.needs_input_grad[0]:
            grad_query = Av.apply(grad, key, additional_keys, *options)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
            grad_key, grad_additional = _transpose(grad, query, key, additional_keys, *options)
        if ctx.needs_input_grad[2]:
            grad_rpb = RpbScatter.apply(grad, *options)
        return grad_query, grad_key, grad_rpb, grad_additional, None, None


class Av(Function):
    """(attn, value, additional_values, config, backend) -> output"""

    @staticmethod
    def forward(*args):
        return _ops.av(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        attn, value, additional_values, ctx.config, ctx.backend = inputs
        ctx.save_for_backward(attn, value, additional_values)

    @staticmethod
    def backward(ctx, grad):
        attn, value, additional_values = ctx.saved_tensors
        options = ctx.config, ctx.backend
        grad_attn = grad_value = grad_additional = None
        if ctx.needs_input_grad[0]:
            grad_attn = _linear_qk(grad, value, additional_values, *options)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_value, grad_additional = _transpose(attn, grad, value, additional_values, *options)
        return grad_attn, grad_value, grad_additional, None, None


class AvTranspose(Function):
    """(attn, query, grid of the keys, number of additional tokens, config, backend) ->
    (key, additional_keys)"""

    @staticmethod
    def forward(*args):
        return _ops.av_transpose(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        attn, query, _, ctx.additional, ctx.config, ctx.backend = inputs
        ctx.save_for_backward(attn, query)

    @staticmethod
    def backward(ctx, grad_key, grad_additional):
        attn, query = ctx.saved_tensors
        additional = grad_additional if ctx.additional else None
        options = ctx.config, ctx.backend
        grad_attn = grad_query = None
        if ctx.needs_input_grad[0]:
            grad_attn = _linear_qk(query, grad_key, additional, *options)
        if ctx.needs_input_grad[1]:
            grad_query = Av.apply(attn, grad_key, additional, *options)
        return grad_attn, grad_query, None, None, None, None


class RpbGather(Function):
    """(rpb, shape of attn, config, backend) -> attn"""

    @staticmethod
    def forward(*args):
        return _ops.rpb_gather(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, ctx.config, ctx.backend = inputs

    @staticmethod
    def backward(ctx, grad):
        return RpbScatter.apply(grad, ctx.config, ctx.backend), None, None, None


class RpbScatter(Function):
    """(attn, config, backend) -> gradient of rpb"""

    @staticmethod
    def forward(*args):
        return _ops.rpb_scatter(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        attn, config, ctx.backend = inputs
        ctx.config = with_flags(config, EMPTY_SLOTS_ZERO)
        ctx.attn_shape = tuple(attn.shape)

    @staticmethod
    def backward(ctx, grad):
        return RpbGather.apply(grad, ctx.attn_shape, ctx.config, ctx.backend), None, None


def _linear_qk(
    query: Tensor, key: Tensor, additional_keys: Tensor | None, config: Config, backend: str
) -> Tensor:
    """qk as derivatives need it: without bias, and 0 in empty slots."""
    return Qk.apply(
        query, key, None, additional_keys, with_flags(config, EMPTY_SLOTS_ZERO), backend
    )


def _transpose(
    attn: Tensor,
    query: Tensor,
    key: Tensor,
    additional: Tensor | None,
    config: Config,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Gradients shaped like `key` (or value) and `additional`, None where that is None."""
    count = 0 if additional is None else additional.shape[2]
    grad, grad_additional = AvTranspose.apply(
        attn, query, tuple(key.shape[2:-1]), count, config, backend
    )
    return grad, None if additional is None else grad_additional
