"""Names that NATTEN's other versions export, called as code written for them calls them."""

from __future__ import annotations

import inspect

import pytest

torch = pytest.importorskip("torch")

import natten  # noqa: E402
import natten.functional as F  # noqa: E402

SHAPE = (7, 9, 8)
KERNEL_SIZE, DILATION, STRIDE = (3, 2, 3), (2, 3, 1), (1, 2, 3)
RANKS = (1, 2, 3)


def function(name: str, rank: int):
    return getattr(F, name.format(rank=rank))


def tensors(rank: int, heads_first: bool, count: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(rank)
    spatial = SHAPE[:rank]
    shape = (2, 4, *spatial, 5) if heads_first else (2, *spatial, 4, 5)
    return list(torch.randn(count, *shape, dtype=torch.float64))


def bias(rank: int) -> torch.Tensor:
    return torch.randn(4, *(2 * k - 1 for k in KERNEL_SIZE[:rank]), dtype=torch.float64)


@pytest.mark.parametrize("rank", RANKS)
def test_scores(rank):
    query, key = tensors(rank, heads_first=True, count=2)
    rpb = bias(rank)
    more = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    k, d = KERNEL_SIZE[:rank], DILATION[:rank]
    qk = function("na{rank}d_qk", rank)
    with_bias = function("na{rank}d_qk_with_bias", rank)
    qkrpb = function("natten{rank}dqkrpb", rank)
    plain, biased = qk(query, key, k, d), qk(query, key, k, d, rpb=rpb)
    assert not torch.equal(plain, biased)

    for expected, got in [
        (biased, qkrpb(query, key, rpb, k, d)),
        (plain, qkrpb(query, key, None, k, d)),
        (biased, qkrpb(query=query, key=key, rpb=rpb, kernel_size=k, dilation=d)),
        (biased, with_bias(query, key, rpb, k, d)),
        (plain, with_bias(query, key, None, k, d)),
        (biased, with_bias(query=query, key=key, bias=rpb, kernel_size=k, dilation=d)),
        (plain, function("natten{rank}dqk", rank)(query, key, k, d)),
        (
            plain,
            function("natten{rank}dqk", rank)(query=query, key=key, kernel_size=k, dilation=d),
        ),
    ]:
        assert torch.equal(got, expected)

    joint = qk(query, key, k, d, more, rpb=rpb)
    assert joint.shape[-1] == biased.shape[-1] + 3
    assert torch.equal(with_bias(query, key, rpb, k, d, more), joint)
    assert torch.equal(with_bias(query, key, rpb, k, d, additional_keys=more), joint)


@pytest.mark.parametrize("rank", RANKS)
def test_weighted_values(rank):
    query, key, value = tensors(rank, heads_first=True)
    k, d = KERNEL_SIZE[:rank], DILATION[:rank]
    attn = function("na{rank}d_qk", rank)(query, key, k, d).softmax(-1)
    expected = function("na{rank}d_av", rank)(attn, value, k, d)
    old = function("natten{rank}dav", rank)
    assert torch.equal(old(attn, value, k, d), expected)
    assert torch.equal(old(attn=attn, value=value, kernel_size=k, dilation=d), expected)


@pytest.mark.parametrize("rank", RANKS)
def test_gradients_reach_every_argument(rank):
    query, key = (t.requires_grad_() for t in tensors(rank, heads_first=True, count=2))
    rpb = bias(rank).requires_grad_()
    k, d = KERNEL_SIZE[:rank], DILATION[:rank]
    expected = torch.autograd.grad(
        function("na{rank}d_qk", rank)(query, key, k, d, rpb=rpb).square().sum(), (query, key, rpb)
    )
    for name in ("natten{rank}dqkrpb", "na{rank}d_qk_with_bias"):
        loss = function(name, rank)(query, key, rpb, k, d).square().sum()
        for got, want in zip(torch.autograd.grad(loss, (query, key, rpb)), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("rank", RANKS)
def test_generic(rank):
    query, key, value = tensors(rank, heads_first=False)
    more_keys, more_values = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    k, s, d = KERNEL_SIZE[:rank], STRIDE[:rank], DILATION[:rank]
    causal = (True, False, True)[:rank]
    fused, generic = function("na{rank}d", rank), F.neighborhood_attention_generic
    window = dict(stride=s, dilation=d, is_causal=causal, scale=0.3)
    expected = fused(query, key, value, k, **window, return_lse=True)
    got = generic(query, key, value, k, **window, return_lse=True)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(generic(query, key, value, k), fused(query, key, value, k))
    window |= dict(additional_keys=more_keys, additional_values=more_values)
    assert torch.equal(
        generic(query, key, value, k, **window), fused(query, key, value, k, **window)
    )


def test_generic_accepts_the_options_of_0_21():
    query, key, value = tensors(2, heads_first=False)
    got = F.neighborhood_attention_generic(
        query=query,
        key=key,
        value=value,
        kernel_size=3,
        stride=1,
        dilation=1,
        is_causal=None,
        scale=None,
        additional_keys=None,
        additional_values=None,
        attention_kwargs={"torch_compile": True},
        backend="naive",
        q_tile_shape=(4, 4),
        kv_tile_shape=(4, 4),
        backward_q_tile_shape=(4, 4),
        backward_kv_tile_shape=(4, 4),
        backward_kv_splits=(1, 1),
        backward_use_pt_reduction=True,
        run_persistent_kernel=False,
        kernel_schedule="pp",
        torch_compile=True,
        return_lse=False,
    )
    assert torch.equal(got, F.na2d(query, key, value, 3, backend="naive"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_schedule": "fast"}, "kernel_schedule: got 'fast'; must be None, \"non\""),
        ({"backend": "triton-fna"}, 'backend: got "triton-fna"; must be one of'),
        ({"q_tile_shape": (4,)}, "q_tile_shape"),
        ({"stride": 4}, "stride"),
    ],
)
def test_generic_refuses_what_cannot_be(options, message):
    query, key, value = tensors(2, heads_first=False)
    with pytest.raises(ValueError) as error:
        F.neighborhood_attention_generic(query, key, value, 3, **options)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("shape", [(2, 4, 5), (1, 3, 3, 3, 3, 2, 4)])
def test_generic_refuses_other_ranks(shape):
    x = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"query: got shape .*one to three spatial axes"):
        F.neighborhood_attention_generic(x, x, x, 3)


@pytest.mark.parametrize("rank", RANKS)
def test_functions_tell_their_names(rank):
    for name in ("natten{rank}dqkrpb", "na{rank}d_qk_with_bias"):
        named = function(name, rank)
        assert named.__name__ == name.format(rank=rank)
        assert named.__module__ == "natten.functional"
        assert f"na{rank}d_qk" in inspect.getdoc(named)


def test_six_sizes_of_0_15_in_3d_are_refused():
    """0.15 took (kernel_size_d, kernel_size, dilation_d, dilation) in 3-D; here a size per axis."""
    query, key = tensors(3, heads_first=True, count=2)
    rpb = bias(3)
    for name in ("natten3dqkrpb", "na3d_qk_with_bias"):
        with pytest.raises(TypeError, match="positional arguments"):
            getattr(F, name)(query, key, rpb, 3, 2, 2, 3)


def test_modules_take_none_for_defaults():
    """As NAT, whose layers are not dilated, calls them."""
    module = natten.NeighborhoodAttention2D(
        8, kernel_size=3, num_heads=2, dilation=None, is_causal=None
    )
    assert (module.dilation, module.is_causal) == ((1, 1), (False, False))
