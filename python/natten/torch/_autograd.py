"""Derivatives of the operators.

The unfused operators are linear in each argument, and the derivative of each is made of the others,
so they can be differentiated in reverse any number of times:

    qk(q, k)            dq = av(g, k)    dk = av_transpose(g, q)    drpb = rpb_scatter(g)
    av(a, v)            da = qk(g, v)    dv = av_transpose(a, g)
    av_transpose(a, q)  da = qk(q, g)    dq = av(a, g)
    rpb_scatter(a)      da = rpb_gather(g)
    rpb_gather(rpb)     drpb = rpb_scatter(g)

Inside derivatives empty slots hold 0, which keeps them linear.
"""

from __future__ import annotations

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

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
    @once_differentiable
    def backward(ctx, grad_output: Tensor | None, grad_logsumexp: Tensor | None):
        *inputs, logsumexp = ctx.saved_tensors
        query, value = inputs[0], inputs[2]
        if grad_output is None:
            grad_output = query.new_zeros((*query.shape[:-1], value.shape[-1]))
        wanted = [bool(need) for need in ctx.needs_input_grad[: len(inputs)]]
        gradients = iter(
            _ops.attention_backward(
                *inputs, logsumexp, grad_output, grad_logsumexp,
                ctx.config, ctx.scale, ctx.backend, wanted,
            )
        )  # fmt: skip
        return *(next(gradients) if want else None for want in wanted), None, None, None


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
            grad_key, grad_additional = _transpose(grad, query, additional_keys, *options)
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
            grad_value, grad_additional = _transpose(attn, grad, additional_values, *options)
        return grad_attn, grad_value, grad_additional, None, None


class AvTranspose(Function):
    """(attn, query, number of additional tokens, config, backend) -> (key, additional_keys)"""

    @staticmethod
    def forward(*args):
        return _ops.av_transpose(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        attn, query, ctx.additional, ctx.config, ctx.backend = inputs
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
        return grad_attn, grad_query, None, None, None


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
    attn: Tensor, query: Tensor, additional: Tensor | None, config: Config, backend: str
) -> tuple[Tensor, Tensor | None]:
    """Gradients of keys (or values) and of the additional ones, None where there are none."""
    count = 0 if additional is None else additional.shape[2]
    key, additional_key = AvTranspose.apply(attn, query, count, config, backend)
    return key, None if additional is None else additional_key
