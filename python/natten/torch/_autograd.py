"""Derivatives of the operators, at PyTorch's dispatch key Autograd.

The unfused operators are linear in each argument, and the derivative of each is made of the others,
so they can be differentiated any number of times:

    qk(q, k)            dq = av(g, k)    dk = av_transpose(g, q)    drpb = rpb_scatter(g)
    av(a, v)            da = qk(g, v)    dv = av_transpose(a, g)
    av_transpose(a, q)  da = qk(q, g)    dq = av(a, g)
    rpb_scatter(a)      da = rpb_gather(g)
    rpb_gather(rpb)     drpb = rpb_scatter(g)

The mask of keys has no derivative; it goes along to each of them. Inside derivatives empty slots
hold 0, which keeps them linear. In forward mode the tangent of each
is the sum of the operator applied to one tangent at a time.

The first reverse derivative of fused attention is fused too. All others are those of the same
attention composed of the unfused operators, which store the weights.

As the rules sit at the dispatcher, below everything that can wrap a tensor, they hold in eager
mode, under `torch.func` transforms and while a graph is traced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from natten._args import (
    EMPTY_SLOTS_ZERO,
    Config,
    scale_or_default,
    window_size,
    with_flags,
    with_grid_size,
)
from natten.torch import _ops
from natten.torch._private import (
    SingleLevelFunction,
    allow_rules,
    any_requires_grad,
    are_transforms_active,
    forward_mode_levels,
    is_in_forward_mode,
    pulled_back,
    set_forward_mode,
)


class Rule(SingleLevelFunction):
    """The derivatives of one operator, as a PyTorch function."""

    operator: ClassVar[_ops.Operator]
    apply: ClassVar[Callable[..., Any]]  # PyTorch's

    def __init_subclass__(cls) -> None:
        _ops.library.impl(cls.operator.schema_name, cls.differentiate, "Autograd")
        cls.operator.differentiate = cls.differentiate

    @classmethod
    def differentiate(cls, *args: Any, kernel: Callable[..., Any] | None = None) -> Any:
        """The operator's kernel at the key Autograd. `kernel`: what is below, where that is known
        without the dispatcher."""
        if is_in_forward_mode() and _has_tangent(args):
            _refuse_forward_mode_that_is_nested()
            return cls.in_forward_mode(*args)
        if torch.is_grad_enabled() and any_requires_grad(*args):
            return cls.recorded(*args, kernel=kernel)
        return (kernel or cls.operator.below_autograd)(*args)

    @classmethod
    def recorded(cls, *args: Any, kernel: Callable[..., Any] | None = None) -> Any:
        """The outputs, with this rule's derivatives."""
        kernel = kernel or cls.operator.below_autograd
        if are_transforms_active():
            with allow_rules():
                return cls.apply(*args, kernel)
        return cls.apply(*args, kernel)

    @classmethod
    def in_forward_mode(cls, *args: Any) -> Any:
        """The outputs, with this rule's tangents."""
        return cls.recorded(*args)

    @classmethod
    def forward(cls, ctx: Any, *args_and_kernel: Any) -> Any:
        args, kernel = args_and_kernel[:-1], args_and_kernel[-1]
        if are_transforms_active():
            # A transform further out may want derivatives of what happens here.
            with torch.enable_grad(), set_forward_mode(True):
                outputs = kernel(*args)
        else:
            outputs = kernel(*args)
        count = len(cls.operator.inputs)
        ctx.options = args[count:]
        ctx.set_materialize_grads(False)
        cls.save(ctx, args[:count], outputs)
        return tuple(outputs) if isinstance(outputs, list) else outputs

    @staticmethod
    def save(ctx: Any, inputs: Sequence[Tensor | None], outputs: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @classmethod
    def backward(cls, ctx: Any, *grads: Tensor | None) -> Any:
        """The gradient of each argument; those after the tensors, the kernel last, have none."""
        options = [None] * (len(ctx.options) + 1)
        if grads[0] is None and all(grad is None for grad in grads):
            return *(None for _ in cls.operator.inputs), *options
        return *cls.reverse(ctx, *grads), *options

    @classmethod
    def jvp(cls, ctx: Any, *tangents: Tensor | None) -> Any:
        """The tangents of the outputs."""
        primals = [
            None if x is None else forward_ad.unpack_dual(x).primal for x in ctx.saved_tensors
        ]
        return cls.tangent(primals, tangents[: len(cls.operator.inputs)], *ctx.options)

    @staticmethod
    def reverse(ctx: Any, *grads: Any) -> Sequence[Tensor | None]:
        """The gradients of the inputs."""
        raise NotImplementedError

    @staticmethod
    def tangent(primals: Sequence[Any], tangents: Sequence[Any], *options: Any) -> Any:
        """The tangents of the outputs. `tangents` holds None where an input has none."""
        raise NotImplementedError


def _has_tangent(args: Sequence[Any]) -> bool:
    return any(
        isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in args
    )


def _refuse_forward_mode_that_is_nested() -> None:
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "natten: forward mode under torch.compile and torch.export is not supported; "
            "call torch.func.jvp outside of them"
        )
    if forward_mode_levels() > 1:
        raise NotImplementedError(
            "natten: forward mode inside forward mode is not supported; "
            "use forward over reverse, torch.func.jvp of torch.func.grad, or reverse over forward"
        )


def _or_zeros(x: Tensor | None, like: Tensor | None) -> Any:
    return torch.zeros_like(like) if x is None and like is not None else x


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


class Qk(Rule):
    operator = _ops.qk

    @staticmethod
    def save(ctx: Any, inputs: Sequence[Tensor | None], outputs: Any) -> None:
        query, key, _, *others = inputs
        ctx.save_for_backward(query, key, None, *others)
        ctx.save_for_forward(query, key, None, *others)

    @staticmethod
    def tangent(
        primals: Sequence[Any], tangents: Sequence[Any], config: Config, backend: str
    ) -> Any:
        query, key, _, additional, mask = primals
        query_t, key_t, rpb_t, additional_t, _ = tangents
        options: tuple[Any, ...] = mask, config, backend
        terms = []
        if query_t is not None:
            terms.append(_linear_qk(query_t, key, additional, *options))
        if key_t is not None or additional_t is not None:
            keys = _or_zeros(key_t, key), _or_zeros(additional_t, additional)
            terms.append(_linear_qk(query, *keys, *options))
        if rpb_t is not None:
            count = 0 if additional is None else additional.shape[2]
            config = with_grid_size(config, key.shape[2:-1])
            size = query.shape[0], query.shape[2:-1], count
            terms.append(_gather(rpb_t, *size, mask, config, backend))
        return _sum(terms)

    @staticmethod
    def reverse(ctx: Any, grad: Tensor) -> Sequence[Tensor | None]:
        query, key, _, additional, mask = ctx.saved_tensors
        config, backend = ctx.options
        options = mask, config, backend
        grad_query = grad_key = grad_rpb = grad_additional = None
        if ctx.needs_input_grad[0]:
            grad_query = _ops.av(grad, key, additional, *options)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
            grad_key, grad_additional = _transpose(grad, query, key, additional, *options)
        if ctx.needs_input_grad[2]:
            config = with_grid_size(config, key.shape[2:-1])
            grad_rpb = _ops.rpb_scatter(grad, mask, config, backend)
        return grad_query, grad_key, grad_rpb, grad_additional, None


class Av(Rule):
    operator = _ops.av

    @staticmethod
    def tangent(primals: Sequence[Any], tangents: Sequence[Any], *options: Any) -> Any:
        attn, value, additional, mask = primals
        attn_t, value_t, additional_t, _ = tangents
        terms = []
        if attn_t is not None:
            terms.append(_ops.av(attn_t, value, additional, mask, *options))
        if value_t is not None or additional_t is not None:
            values = _or_zeros(value_t, value), _or_zeros(additional_t, additional)
            terms.append(_ops.av(attn, *values, mask, *options))
        return _sum(terms)

    @staticmethod
    def reverse(ctx: Any, grad: Tensor) -> Sequence[Tensor | None]:
        attn, value, additional, mask = ctx.saved_tensors
        options = mask, *ctx.options
        grad_attn = grad_value = grad_additional = None
        if ctx.needs_input_grad[0]:
            grad_attn = _linear_qk(grad, value, additional, *options)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_value, grad_additional = _transpose(attn, grad, value, additional, *options)
        return grad_attn, grad_value, grad_additional, None


class AvTranspose(Rule):
    operator = _ops.av_transpose

    @staticmethod
    def tangent(primals: Sequence[Any], tangents: Sequence[Any], *options: Any) -> Any:
        attn, query, mask = primals
        attn_t, query_t, _ = tangents
        terms = []
        if attn_t is not None:
            terms.append(_ops.av_transpose(attn_t, query, mask, *options))
        if query_t is not None:
            terms.append(_ops.av_transpose(attn, query_t, mask, *options))
        return tuple(_sum(parts) for parts in zip(*terms, strict=True))

    @staticmethod
    def reverse(
        ctx: Any, grad_key: Tensor | None, grad_additional: Tensor | None
    ) -> Sequence[Tensor | None]:
        attn, query, mask = ctx.saved_tensors
        key_grid, count, *options = ctx.options
        options = mask, *options
        if grad_key is None:
            grad_key = query.new_zeros((*query.shape[:2], *key_grid, query.shape[-1]))
        if grad_additional is None and count:
            grad_additional = query.new_zeros((*query.shape[:2], count, query.shape[-1]))
        additional = grad_additional if count else None
        grad_attn = grad_query = None
        if ctx.needs_input_grad[0]:
            grad_attn = _linear_qk(query, grad_key, additional, *options)
        if ctx.needs_input_grad[1]:
            grad_query = _ops.av(attn, grad_key, additional, *options)
        return grad_attn, grad_query, None


class RpbGather(Rule):
    operator = _ops.rpb_gather

    @staticmethod
    def tangent(primals: Sequence[Any], tangents: Sequence[Any], *options: Any) -> Any:
        return _ops.rpb_gather(tangents[0], primals[1], *options)

    @staticmethod
    def save(ctx: Any, inputs: Sequence[Tensor | None], outputs: Any) -> None:
        _, mask = inputs
        ctx.save_for_backward(None, mask)
        ctx.save_for_forward(None, mask)

    @staticmethod
    def reverse(ctx: Any, grad: Tensor) -> Sequence[Tensor | None]:
        _, mask = ctx.saved_tensors
        return _ops.rpb_scatter(grad, mask, *ctx.options[-2:]), None


class RpbScatter(Rule):
    operator = _ops.rpb_scatter

    @staticmethod
    def tangent(primals: Sequence[Any], tangents: Sequence[Any], *options: Any) -> Any:
        return _ops.rpb_scatter(tangents[0], primals[1], *options)

    @staticmethod
    def save(ctx: Any, inputs: Sequence[Any], outputs: Any) -> None:
        attn, mask = inputs
        ctx.save_for_backward(None, mask)
        ctx.save_for_forward(None, mask)
        ctx.shape = attn.shape

    @staticmethod
    def reverse(ctx: Any, grad: Tensor) -> Sequence[Tensor | None]:
        _, mask = ctx.saved_tensors
        config, backend = ctx.options
        batch, _, *grid, slots = ctx.shape
        additional = slots - window_size(config, grid)
        return _gather(grad, batch, grid, additional, mask, config, backend), None


class Attention(Rule):
    operator = _ops.attention_forward
    backward_operator: ClassVar[_ops.Operator] = _ops.attention_backward

    @classmethod
    def in_forward_mode(cls, *args: Any) -> tuple[Tensor, Tensor]:
        return _composed(*args)

    @staticmethod
    def save(ctx: Any, inputs: Sequence[Tensor | None], outputs: Any) -> None:
        ctx.save_for_backward(*inputs, outputs[1])

    @classmethod
    def reverse(
        cls, ctx: Any, grad_output: Tensor | None, grad_logsumexp: Tensor | None
    ) -> Sequence[Tensor | None]:
        *inputs, logsumexp = ctx.saved_tensors
        query, value = inputs[0], inputs[2]
        if grad_output is None:
            grad_output = query.new_zeros((*query.shape[:-1], value.shape[-1]))
        *differentiable, _ = zip(inputs, ctx.needs_input_grad, strict=False)  # all but the mask
        tensors = [x if want else None for x, want in differentiable]
        inputs += [logsumexp, grad_output, grad_logsumexp]
        return [*cls.backward_operator.gradients(tensors, inputs, *ctx.options), None]


class AttentionBackward(Rule):
    """A function of the inputs of attention and the incoming gradients alone: logsumexp only saves
    recomputing it, so it has no gradient of its own."""

    operator = _ops.attention_backward

    @classmethod
    def differentiate(cls, *args: Any, kernel: Callable[..., Any] | None = None) -> list[Tensor]:
        return list(super().differentiate(*args, kernel=kernel))

    @classmethod
    def in_forward_mode(cls, *args: Any) -> list[Tensor]:
        return _composed_backward(*args)

    @staticmethod
    def save(ctx: Any, inputs: Sequence[Tensor | None], outputs: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(True)

    @classmethod
    def reverse(cls, ctx: Any, *grads: Tensor) -> Sequence[Tensor | None]:
        saved = ctx.saved_tensors
        takes = [
            x is not None and not role.is_mask
            for role, x in zip(cls.operator.inputs, saved, strict=True)
        ]

        def function(*tensors: Tensor) -> list[Tensor]:
            given = iter(tensors)
            inputs = [next(given) if take else x for take, x in zip(takes, saved, strict=True)]
            return cls.in_forward_mode(*inputs, *ctx.options)

        tensors = (x for take, x in zip(takes, saved, strict=True) if take)
        gradients = iter(pulled_back(function, tensors, list(grads)))
        results = [next(gradients) if take else None for take in takes]
        results[len(Attention.operator.inputs)] = None  # logsumexp
        return results


class PackedAttention(Attention):
    operator = _ops.packed_attention_forward
    backward_operator = _ops.packed_attention_backward

    @classmethod
    def in_forward_mode(cls, *args: Any) -> tuple[Tensor, Tensor]:
        examples = [_composed(*example) for example in examples_of(cls.operator, args)]
        output, logsumexp = (torch.cat(x, 1) for x in zip(*examples, strict=True))
        return output, logsumexp


class PackedAttentionBackward(AttentionBackward):
    operator = _ops.packed_attention_backward

    @classmethod
    def in_forward_mode(cls, *args: Any) -> list[Tensor]:
        examples = [_composed_backward(*example) for example in examples_of(cls.operator, args)]
        return [torch.cat(x, 1) for x in zip(*examples, strict=True)]


def examples_of(operator: _ops.Operator, args: Sequence[Any]) -> list[list[Any]]:
    """The arguments of an operator on many examples for each of them, without their lengths."""
    inputs, extras, *options = operator.split(args)
    *before, queries, keys, _, _ = extras.values()
    lengths = {"Q": queries.diff().tolist(), "K": keys.diff().tolist()}
    columns: list[Sequence[Any]] = []
    for role, x in zip(operator.inputs, inputs, strict=True):
        side = next((dim for dim in "QK" if dim in role.dims), None)
        if x is None or side is None:  # all examples share it
            columns.append([x] * len(lengths["Q"]))
        else:
            columns.append(x.split(lengths[side], 1))
    return [[*example, *before, *options] for example in zip(*columns, strict=True)]


class _Composed:
    """Fused attention composed of the unfused operators, heads-first and in float32 at least."""

    def __init__(
        self, inputs: Sequence[Any], config: Config, scale: float | None, backend: str
    ) -> None:
        query, key, value, rpb, additional_keys, additional_values, mask = inputs
        self.dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.group = query.shape[-2] // key.shape[-2]
        self.scale = scale_or_default(scale, query.shape[-1])
        config = with_grid_size(config, key.shape[1:-2])
        self.options: tuple[Any, ...] = mask, config, backend
        self.query = self.heads_first(query)
        self.keys = self.expanded(key), self.expanded(additional_keys)
        self.values = self.expanded(value), self.expanded(additional_values)
        rpb = None if rpb is None else rpb.to(self.dtype)
        scores = _ops.qk(self.query * self.scale, self.keys[0], rpb, self.keys[1], *self.options)
        scores, is_empty = without_empty_rows(scores)
        self.logsumexp = scores.logsumexp(-1).masked_fill(is_empty.squeeze(-1), -torch.inf)
        self.weights = scores.softmax(-1).masked_fill(is_empty, 0.0)

    def heads_first(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).movedim(-2, 1)

    def expanded(self, x: Tensor | None) -> Any:
        """Keys or values with as many heads as the queries have."""
        return None if x is None else self.heads_first(x).repeat_interleave(self.group, dim=1)


def without_empty_rows(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(scores with 0 where all of a query's are -inf, where that is): it has no weights; softmax
    would make NaN of them, in derivatives too."""
    if scores.shape[-1] == 0:  # there are no keys
        return scores, scores.new_ones((*scores.shape[:-1], 1), dtype=torch.bool)
    is_empty = scores.detach().amax(-1, keepdim=True) == -torch.inf
    return scores.masked_fill(is_empty, 0.0), is_empty


def _composed(*args: Any) -> tuple[Tensor, Tensor]:
    """What attention_forward computes."""
    *inputs, config, scale, backend = args
    a = _Composed(inputs, config, scale, backend)
    output = _ops.av(a.weights, *a.values, *a.options)
    return output.movedim(1, -2).to(inputs[0].dtype), a.logsumexp.movedim(1, -1)


def _composed_backward(*args: Any) -> list[Tensor]:
    """What attention_backward computes."""
    *inputs, _, grad_output, grad_logsumexp, wanted, config, scale, backend = args
    a = _Composed(inputs, config, scale, backend)
    grad = a.heads_first(grad_output)
    grad_weights = _linear_qk(grad, *a.values, *a.options)
    row = (a.weights * grad_weights).sum(-1, keepdim=True)
    if grad_logsumexp is not None:
        row = row - grad_logsumexp.movedim(-1, 1).unsqueeze(-1)
    grad_scores = a.weights * (grad_weights - row)
    grad_query = a.scale * _ops.av(grad_scores, *a.keys, *a.options)
    grad_keys = _transpose(grad_scores, a.scale * a.query, *a.keys, *a.options)
    grad_values = _transpose(a.weights, grad, *a.values, *a.options)
    grad_rpb = _ops.rpb_scatter(grad_scores, *a.options) if wanted[3] else None

    def heads_last(x: Tensor, group: int) -> Tensor:
        return x.unflatten(1, (-1, group)).sum(2).movedim(1, -2)

    results: list[Any] = [
        heads_last(grad_query, 1),
        heads_last(grad_keys[0], a.group),
        heads_last(grad_values[0], a.group),
        grad_rpb,
        *(None if x is None else heads_last(x, a.group) for x in (grad_keys[1], grad_values[1])),
    ]
    return [x.to(inputs[0].dtype) for x, want in zip(results, wanted, strict=True) if want]


def _linear_qk(
    query: Tensor,
    key: Tensor,
    additional_keys: Tensor | None,
    mask: Tensor | None,
    config: Config,
    backend: str,
) -> Tensor:
    """qk as derivatives need it: without bias, and 0 in empty slots."""
    config = with_flags(config, EMPTY_SLOTS_ZERO)
    return _ops.qk(query, key, None, additional_keys, mask, config, backend)


def _gather(
    rpb: Tensor,
    batch: int,
    grid: Sequence[int],
    additional: int,
    mask: Tensor | None,
    config: Config,
    backend: str,
) -> Tensor:
    """The bias of every slot, 0 in empty ones."""
    config = with_flags(config, EMPTY_SLOTS_ZERO)
    return _ops.rpb_gather(rpb, mask, batch, grid, additional, config, backend)


def _transpose(
    attn: Tensor,
    query: Tensor,
    key: Tensor,
    additional: Tensor | None,
    mask: Tensor | None,
    config: Config,
    backend: str,
) -> tuple[Any, Tensor | None]:
    """Gradients shaped like `key` (or value) and `additional`, None where that is None."""
    count = 0 if additional is None else additional.shape[2]
    grad, grad_additional = _ops.av_transpose.gradients(
        (key, additional), (attn, query, mask), key.shape[2:-1], count, config, backend
    )
    return grad, grad_additional
