"""Derivatives of every mode and order, against finite differences and dense attention."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from cases import long_unless  # noqa: E402
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch_cases import (  # noqa: E402
    AV,
    QK,
    dense_attention,
    fused_attention,
    fused_inputs,
    key_mask_of,
    options_of,
    randn,
    unfused_attention,
)

import natten  # noqa: E402
import natten.functional as F  # noqa: E402

RANKS = pytest.mark.parametrize("rank", [1, 2, 3])
FEW_RANKS = pytest.mark.parametrize("rank", [long_unless(rank == 2, rank) for rank in (1, 2, 3)])
ALL = tuple(range(6))
# Every derivative of the whole of a grid in each rank, and of a part with a mask in one.
KINDS = pytest.mark.parametrize(
    ("rank", "part"), [(1, False), (2, False), (3, False), (2, True)], ids=str
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# ---- against finite differences ----


FEW_KINDS = pytest.mark.parametrize(
    ("rank", "part"),
    [long_unless((rank, part) == (2, True), rank, part) for part in (0, 1) for rank in (1, 2, 3)],
)


@FEW_KINDS
def test_fused(rank, part):
    inputs = fused_inputs(rank, part=part)
    assert torch.autograd.gradcheck(
        fused_attention(rank, part),
        inputs,
        fast_mode=False,
        check_forward_ad=True,
    )


@FEW_RANKS
def test_fused_twice(rank):
    def attention(q, k, v, rpb, ak, av):
        call = (F.na1d, F.na2d, F.na3d)[rank - 1]
        return call(
            q, k, v, 2, rpb=rpb, additional_keys=ak, additional_values=av, is_causal=True,
            return_lse=True,
        )  # fmt: skip

    q, k, v, ak, av = (randn(1, *(2,) * rank, heads, 2) for heads in (2, 1, 1, 1, 1))
    ak, av = (x.flatten(1, -3)[:, :1].detach().requires_grad_() for x in (ak, av))
    inputs = (q, k, v, randn(2, *(3,) * rank), ak, av)
    assert torch.autograd.gradgradcheck(attention, inputs, check_fwd_over_rev=True)


@pytest.mark.long
def test_fused_part_twice():
    mask = torch.tensor([[False, True, True]])

    def attention(q, k, v, rpb, ak, av):
        return F.na1d(
            q, k, v, 3, rpb=rpb, additional_keys=ak, additional_values=av, return_lse=True,
            boundary="cut", key_mask=mask, query_offset=3, key_offset=2, grid_size=5,
        )  # fmt: skip

    inputs = randn(1, 2, 2, 2), randn(1, 3, 1, 2), randn(1, 3, 1, 2), randn(2, 5)
    inputs = *inputs, randn(1, 1, 1, 2), randn(1, 1, 1, 2)
    assert torch.autograd.gradgradcheck(attention, inputs, check_fwd_over_rev=True)


@FEW_KINDS
def test_unfused(rank, part):
    options = options_of(rank, part)
    if part:  # of one example
        options = {**options, "key_mask": options["key_mask"][:1]}
    q, k, _, rpb, ak, _ = fused_inputs(rank, kv_heads=2, part=part)
    q, k, ak = (x[:1].movedim(-2, 1).detach().requires_grad_() for x in (q, k, ak))

    def qk(q, k, rpb, ak):
        attn = QK[rank](q, k, rpb=rpb, additional_keys=ak, **options)
        return attn.masked_fill(attn == -torch.inf, 0.0)

    inputs = q, k, rpb, ak
    assert torch.autograd.gradcheck(qk, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(qk, inputs, check_fwd_over_rev=True)

    def av(attn, v, extra):
        return AV[rank](attn, v, additional_values=extra, **options)

    inputs = randn(*qk(*inputs).shape), randn(*k.shape), randn(1, 2, 1, 3)
    assert torch.autograd.gradcheck(av, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(av, inputs, check_fwd_over_rev=True)


def test_attention_and_merge():
    def function(q, k, v, k2, v2):
        first = natten.attention(q, k, v, is_causal=True, return_lse=True)
        second = natten.attention(q, k2, v2, scale=0.3, return_lse=True)
        return natten.merge_attentions(*zip(first, second, strict=True))

    inputs = [randn(1, n, h, 2) for n, h in ((3, 2), (4, 1), (4, 1), (2, 2), (2, 2))]
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True)


# ---- torch.func, against dense attention ----


def total(function):
    return lambda *inputs: sum(x.sin().sum() for x in function(*inputs))


def derivatives_of(function, inputs, tangents):
    """Name: what torch.func makes of a function of six tensors."""
    scalar = total(function)
    gradient = grad(scalar, argnums=ALL)

    def size_of_gradient(*x):
        return sum(g.square().sum() for g in gradient(*x))

    yield "jvp", lambda: jvp(function, inputs, tangents)
    yield "vjp", lambda: vjp(function, *inputs)[1](function(*tangents))
    yield "jacrev", lambda: jacrev(function, argnums=(0, 3))(*inputs)
    yield "jacfwd", lambda: jacfwd(function, argnums=(1, 4))(*inputs)
    yield "forward over reverse", lambda: jvp(gradient, inputs, tangents)
    yield (
        "reverse over forward",
        lambda: grad(lambda *x: jvp(scalar, x, tangents)[1], argnums=ALL)(*inputs),
    )
    yield "reverse over reverse", lambda: grad(size_of_gradient, argnums=ALL)(*inputs)
    yield (
        "third order",
        lambda: grad(lambda *x: jvp(size_of_gradient, x, tangents)[1], argnums=ALL)(*inputs),
    )
    yield "hessian", lambda: hessian(scalar, argnums=(0, 3))(*inputs)
    yield "jacrev of jacrev", lambda: jacrev(jacrev(scalar, argnums=2), argnums=(1, 5))(*inputs)


NAMES = [name for name, _ in derivatives_of(lambda *x: x, (), ())]


def assert_same(got, want):
    got, want = torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want)
    assert len(got) == len(want) > 0
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert torch.linalg.norm(g - w) <= 1e-12 * torch.linalg.norm(w)


@KINDS
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [fused_attention, unfused_attention])
def test_torch_func(rank, part, name, make):
    inputs = tuple(x.detach() for x in fused_inputs(rank, part=part))
    tangents = tuple(torch.randn_like(x) for x in inputs)
    got, want = (
        dict(derivatives_of(function(rank, part), inputs, tangents))[name]()
        for function in (make, dense_attention)
    )
    assert_same(got, want)


# Which inputs are mapped, and along which axis.
MAPPINGS = {
    "all": (0, 0, 0, 0, 0, 0),
    "inner axes": (1, 2, -1, 1, 2, -1),
    "query": (0, None, None, None, None, None),
    "keys and bias": (None, 1, None, 0, None, None),
    "all but bias": (0, 0, 0, None, 0, 0),
}


def mapped(inputs, in_dims):
    return tuple(
        x.detach() if dim is None else torch.randn(3, *x.shape, dtype=x.dtype).movedim(0, dim)
        for x, dim in zip(inputs, in_dims, strict=True)
    )


@KINDS
@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("make", [fused_attention, unfused_attention])
def test_vmap(rank, part, mapping, make):
    in_dims = MAPPINGS[mapping]
    inputs = mapped(fused_inputs(rank, part=part), in_dims)
    functions = make(rank, part), dense_attention(rank, part)
    gradients = [grad(total(f), argnums=ALL) for f in functions]
    assert_same(*(vmap(f, in_dims)(*inputs) for f in functions))
    assert_same(*(vmap(g, in_dims)(*inputs) for g in gradients))
    assert_same(
        *(
            grad(lambda *x, f=f: total(vmap(f, in_dims))(*x), argnums=ALL)(*inputs)
            for f in functions
        )
    )


@pytest.mark.parametrize("mapping", ["all", "query", "keys and bias", "all but bias"])
@pytest.mark.parametrize("make", [fused_attention, unfused_attention])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("axis", [0, 2, None])
def test_vmap_of_masks(mapping, make, batch, axis):
    """Masks of examples, and one of all, for the whole batch of an example and for each of it."""
    in_dims = MAPPINGS[mapping]
    inputs = mapped(fused_inputs(2, part=True), in_dims)
    mask = key_mask_of(2)[:batch]
    if axis is not None:
        mask = torch.stack([mask, ~mask, mask.flip(1)]).movedim(0, axis)
    dims = (*in_dims, axis)
    derivatives = []
    for function in (make(2, True), dense_attention(2, True)):

        def attend(*x, function=function):
            return function(*x[:-1], key_mask=x[-1])

        derivatives.append(
            (
                vmap(attend, dims)(*inputs, mask),
                vmap(grad(total(attend), argnums=ALL), dims)(*inputs, mask),
                vmap(jacrev(attend, argnums=3), dims)(*inputs, mask),
                jvp(lambda *x, f=attend: vmap(f, dims)(*x, mask), inputs, inputs),
            )
        )
    assert_same(*derivatives)


@pytest.mark.parametrize("make", [fused_attention, unfused_attention])
def test_vmap_of_tangents_of_one_bias(make):
    """The bias is that of all examples, the mask is not."""
    q, k, v, rpb, *more = (x.detach() for x in fused_inputs(2, part=True))
    masks = torch.stack([key_mask_of(2), ~key_mask_of(2), key_mask_of(2).flip(1)])

    def tangent(mask):
        def attend(rpb):
            return make(2, True)(q, k, v, rpb, *more, key_mask=mask)

        return jvp(attend, (rpb,), (rpb.flip(0),))

    each = [torch.utils._pytree.tree_leaves(tangent(mask)) for mask in masks]
    assert_same(vmap(tangent)(masks), [torch.stack(x) for x in zip(*each, strict=True)])


@pytest.mark.parametrize("make", [fused_attention, unfused_attention])
def test_vmap_over_one_example(make):
    """With a mask and a bias of its own, so that it is a call by itself."""
    inputs = (*(x.detach() for x in fused_inputs(2, part=True)), key_mask_of(2))
    gradient = grad(total(lambda *x: make(2, True)(*x[:-1], key_mask=x[-1])), argnums=ALL)
    got = vmap(gradient)(*(x[None] for x in inputs))
    assert_same(got, [x[None] for x in gradient(*inputs)])


@pytest.mark.parametrize("part", [False, True])
def test_vmap_of_directions(part):
    inputs = tuple(x.detach() for x in fused_inputs(2, part=part))
    tangents = tuple(torch.randn(4, *x.shape, dtype=x.dtype) for x in inputs)

    def directional(function):
        gradient = grad(total(function), argnums=ALL)
        return (
            vmap(lambda *t: jvp(function, inputs, t))(*tangents),
            vmap(lambda *t: jvp(gradient, inputs, t))(*tangents),
        )

    assert_same(directional(fused_attention(2, part)), directional(dense_attention(2, part)))


@pytest.mark.parametrize("part", [False, True])
def test_tangents_of_some_inputs(part):
    inputs = tuple(x.detach() for x in fused_inputs(2, part=part))
    for wanted in ((1,), (3,), (4,), (0, 5)):

        def derivative(function, wanted=wanted):
            def of_wanted(*x):
                given = list(inputs)
                for i, value in zip(wanted, x, strict=True):
                    given[i] = value
                return function(*given)

            primals = tuple(inputs[i] for i in wanted)
            return jvp(of_wanted, primals, tuple(torch.ones_like(x) for x in primals))

        for make in (fused_attention, unfused_attention):
            assert_same(derivative(make(2, part)), derivative(dense_attention(2, part)))


def test_empty_slots_have_no_derivatives():
    """Their tangents and gradients are 0, not NaN, although the scores are -inf."""
    q, k = torch.randn(2, 1, 1, 5, 3).unbind()
    attn, tangent = jvp(lambda q, k: F.na1d_qk(q, k, 3, is_causal=True), (q, k), (q, k))
    empty = attn == -torch.inf
    assert empty.sum() == 3
    assert (tangent[empty] == 0).all() and tangent.isfinite().all()
    weights = torch.full((1, 1, 5, 3), torch.nan).masked_fill(~empty, 1.0).requires_grad_()
    out = F.na1d_av(weights, q, 3, is_causal=True)
    assert out.isfinite().all()
    out.sum().backward()
    assert (weights.grad[empty] == 0).all()


@pytest.mark.parametrize("make", [fused_attention, unfused_attention])
def test_tensors_that_outlive_their_transform(make):
    """They are wrapped still, and look as if they required no gradient."""
    kept = []

    def keep(*inputs):
        kept.extend(inputs)
        return sum(x.sum() for x in inputs)

    inputs = fused_inputs(1)
    grad(keep, argnums=ALL)(*inputs)
    got = torch.autograd.grad(total(make(1))(*kept), inputs)
    want = torch.autograd.grad(total(make(1))(*inputs), inputs)
    assert_same(got, want)


# ---- which operators run ----


class Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "natten":
            self.names.append(function._schema.name.removeprefix("natten::"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("create_graph", [False, True])
def test_first_derivative_is_fused(create_graph):
    inputs = fused_inputs(2)
    with Recorded() as recorded:
        total(fused_attention(2))(*inputs).backward(create_graph=create_graph)
    assert recorded.names == ["attention_forward", "attention_backward"]
    with Recorded() as recorded:
        grad(total(fused_attention(2)))(*(x.detach() for x in inputs))
    assert recorded.names == ["attention_forward", "attention_backward"]


def test_only_wanted_derivatives_are_computed():
    q, k = randn(1, 1, 5, 3), randn(1, 1, 5, 3, grad=False)
    with Recorded() as recorded:
        F.na1d_qk(q, k, 3).sum().backward()
    assert recorded.names == ["qk", "av"]


# ---- refused, as it would be wrong ----


@pytest.mark.parametrize("make", [fused_attention, unfused_attention])
def test_forward_over_forward_raises(make):
    inputs = tuple(x.detach() for x in fused_inputs(1))
    for call in (
        lambda: jvp(lambda *x: jvp(make(1), x, inputs)[1], inputs, inputs),
        lambda: jacfwd(jacfwd(total(make(1))))(*inputs),
    ):
        with pytest.raises(NotImplementedError, match="forward mode inside forward mode"):
            call()


@pytest.mark.parametrize("make", [fused_attention, unfused_attention])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_forward_mode_under_compile_raises(make, backend):
    inputs = tuple(x.detach() for x in fused_inputs(1))
    compiled = torch.compile(lambda *x: jvp(make(1), x, inputs)[1], fullgraph=True, backend=backend)
    with pytest.raises(Exception, match=r"forward mode under torch\.compile"):
        compiled(*inputs)


# ---- higher derivatives of plain reverse mode ----


def test_higher_derivatives_are_those_of_plain_attention():
    q, k, v = (randn(1, 5, 1, 3) for _ in range(3))

    def plain(q, k, v):
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * 3**-0.5).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)

    results = []
    for function in (lambda *x: F.na1d(*x, 5), natten.attention, plain):
        x = function(q, k, v).sin().sum()
        for _ in range(3):
            grads = torch.autograd.grad(x, [q, k, v], create_graph=True)
            x = sum(g.square().sum() for g in grads)
        results.append(torch.autograd.grad(x, [q, k, v]))
    for got in results[:2]:
        torch.testing.assert_close(got, results[2])
