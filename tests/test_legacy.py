"""Names that NATTEN's other versions export, called as code written for them calls them."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
from test_package import run_python

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


def test_sizes_of_older_versions_in_3d():
    """kernel_size_d, kernel_size, dilation_d, dilation, by position or by name. Four whole numbers
    have no other meaning there."""
    query, key, value = tensors(3, heads_first=True)
    rpb = torch.randn(4, 5, 3, 3, dtype=torch.float64)
    more = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    new = dict(kernel_size=(3, 2, 2), dilation=(1, 3, 3))
    named = dict(kernel_size=2, kernel_size_d=3, dilation=3, dilation_d=1)
    old = 3, 2, 1, 3
    plain, biased = F.na3d_qk(query, key, **new), F.na3d_qk(query, key, **new, rpb=rpb)
    for expected, got in [
        (biased, F.natten3dqkrpb(query, key, rpb, *old)),
        (biased, F.natten3dqkrpb(query, key, rpb, **named)),
        (biased, F.natten3dqkrpb(query, key, rpb, kernel_size=(3, 2, 2), dilation=3, dilation_d=1)),
        (biased, F.NATTEN3DQKRPBFunction.apply(query, key, rpb, *old)),
        (biased, F.na3d_qk_with_bias(query, key, rpb, *old)),
        (plain, F.natten3dqk(query, key, *old)),
        (plain, F.natten3dqk(query, key, **named)),
        (plain, F.natten3dqk(query, key, (3, 2, 2), (1, 3, 3))),
        (F.na3d_qk(query, key, **new, additional_keys=more, rpb=rpb),
         F.na3d_qk_with_bias(query, key, rpb, *old, more)),
        (F.na3d_qk(query, key, **new, is_causal=True),
         F.natten3dqk(query, key, (3, 2, 2), (1, 3, 3), None, True)),
    ]:  # fmt: skip
        assert torch.equal(got, expected)
    weights = plain.softmax(-1)
    expected = F.na3d_av(weights, value, **new)
    assert torch.equal(F.natten3dav(weights, value, *old), expected)
    assert torch.equal(F.natten3dav(weights, value, **named), expected)
    with pytest.raises(TypeError, match="dilation_d: got 1 and no dilation by name; must be given"):
        F.natten3dqk(query, key, 3, dilation_d=1)
    with pytest.raises(TypeError, match="positional argument"):
        F.natten3dqkrpb(query, key, rpb, *old, 1)


@pytest.mark.parametrize("rank", RANKS)
def test_autograd_functions_of_0_14(rank):
    query, key, value = tensors(rank, heads_first=True)
    rpb, k, d = bias(rank), KERNEL_SIZE[:rank], DILATION[:rank]
    qkrpb = function("NATTEN{rank}DQKRPBFunction", rank)
    av = function("NATTEN{rank}DAVFunction", rank)

    def model(query, key, rpb, value):
        return av.apply(qkrpb.apply(query, key, rpb, k, d).softmax(-1), value, k, d)

    attn = function("na{rank}d_qk", rank)(query, key, k, d, rpb=rpb).softmax(-1)
    expected = function("na{rank}d_av", rank)(attn, value, k, d)
    assert torch.equal(model(query, key, rpb, value), expected)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(query, key, rpb, value), expected)
    assert qkrpb.__name__ == f"NATTEN{rank}DQKRPBFunction" and "apply" in inspect.getdoc(qkrpb)


@pytest.mark.parametrize("rank", RANKS)
def test_modules_where_older_versions_have_names(rank):
    """A file `na2d.py` is no way to have them: `natten.na2d` is a function."""
    code = f"""
import importlib, importlib.util, sys
import natten.na{rank}d, natten.natten{rank}d as old
import natten
assert "torch" not in sys.modules and not hasattr(old, "__file__")
assert importlib.util.find_spec("natten.na{rank}d") and natten.natten{rank}d is old
from natten.na{rank}d import NeighborhoodAttention{rank}D, na{rank}d, na{rank}d_av, na{rank}d_qk
from natten.natten{rank}d import na{rank}d_qk_with_bias, natten{rank}dav, natten{rank}dqkrpb
from natten.experimental import na{rank}d as experimental
assert NeighborhoodAttention{rank}D is natten.NeighborhoodAttention{rank}D
assert na{rank}d is experimental is natten.na{rank}d is natten.functional.na{rank}d
assert natten{rank}dqkrpb is natten.functional.natten{rank}dqkrpb
from natten.natten{rank}d import *
try:
    from natten.natten{rank}d import natten4dav
except ImportError as error:
    print(error)
"""
    assert f"cannot import name 'natten4dav' from 'natten.natten{rank}d'" in run_python(code)


class NeighborhoodAttention2D(natten.NeighborhoodAttention2D):
    """Of a sequence, by the name of what it is made of."""

    def forward(self, x):
        return super().forward(x.unflatten(1, (5, 6))).flatten(1, 2)


def test_subclasses_of_modules_are_their_own():
    cls = NeighborhoodAttention2D
    assert cls.__module__ == __name__ and cls.__doc__.startswith("Of a sequence")
    module, x = cls(8, 2, 3), torch.randn(1, 30, 8)
    copied = pickle.loads(pickle.dumps(module))
    assert type(copied) is cls and torch.equal(copied(x), module(x))
    assert cls.__mro__[1].__module__ == "natten"
    with pytest.raises(NotImplementedError, match=r"^NeighborhoodAttention2D: torch.jit.script"):
        torch.jit.script(module)


def test_modules_take_none_for_defaults():
    """As NAT, whose layers are not dilated, calls them."""
    module = natten.NeighborhoodAttention2D(
        8, kernel_size=3, num_heads=2, dilation=None, is_causal=None
    )
    assert (module.dilation, module.is_causal) == ((1, 1), (False, False))


# What a pickled module has besides hooks, maps and parameters.
PICKLED = {
    "0.14": dict(kernel_size=3, dilation=2, window_size=6),
    "0.15, 3-D": dict(kernel_size=3, dilation=1, kernel_size_d=2, dilation_d=2, window_size=3),
    "0.17": dict(kernel_size=(3, 2, 3), dilation=(1, 2, 1), is_causal=(True, False, False),
                 attn_drop_rate=0.0, use_experimental_ops=False),
    "0.21": dict(kernel_size=(3, 2, 3), stride=(1, 2, 1), dilation=(1, 2, 1), embed_dim=8, na_dim=3,
                 is_causal=(True, False, False), expected_input_tensor_rank=5),
}  # fmt: skip


@pytest.mark.parametrize("version", PICKLED)
def test_modules_that_natten_pickled(version):
    """torch.save of a whole model holds the module's dictionary and where its class was."""
    has = PICKLED[version]
    window = {k: has[k] for k in ("kernel_size", "dilation", "is_causal", "stride") if k in has}
    if "kernel_size_d" in has:
        window = dict(kernel_size=(2, 3, 3), dilation=(2, 1, 1))
    options = dict(rel_pos_bias=version != "0.21", attn_drop=0.0 if version == "0.21" else 0.25)
    module = natten.NeighborhoodAttention3D(8, 2, **window, qk_scale=0.3, **options)
    lacking = ("dim", "embed_dim", "kernel_size", "stride", "dilation", "is_causal", "boundary")
    state = {k: v for k, v in vars(copy.deepcopy(module)).items() if k not in lacking} | has
    if version == "0.21":
        state["_parameters"].pop("rpb")
        state["_modules"].pop("attn_drop")
    loaded = natten.NeighborhoodAttention3D.__new__(natten.NeighborhoodAttention3D)
    loaded.__setstate__(state)
    assert loaded.extra_repr() == module.extra_repr() and loaded.dim == loaded.embed_dim == 8
    assert sorted(str(loaded)) == sorted(str(module)) and loaded.scale == 0.3
    x = torch.randn(1, 6, 7, 8, 8)
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    assert torch.equal(pickle.loads(pickle.dumps(loaded))(x), module(x))
