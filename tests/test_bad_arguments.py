"""Arguments that do not fit: the error names the argument, what it got and what it must be.

Every row of the tables is one call: what is called, the arguments that replace good ones, the
exception, and what its message begins with ($ where it ends there).
"""

from __future__ import annotations

import importlib.util
import re

import pytest

import natten
from natten import context, flops, utils

HAS = {name: importlib.util.find_spec(name) is not None for name in ("torch", "numpy", "jax")}
HAS["flax"] = HAS["jax"] and importlib.util.find_spec("flax") is not None
needs = {name: pytest.mark.skipif(not HAS[name], reason=f"needs {name}") for name in HAS}

NAN = float("nan")


class Integer:
    """What `operator.index` takes, as numpy's integers are."""

    def __index__(self):
        return 3


# One adapter each: zeros of a shape, and its functions by name.


class Torch:
    @staticmethod
    def zeros(*shape):
        import torch

        return torch.zeros(shape)

    @staticmethod
    def function(name):
        import natten.functional

        return getattr(natten if name == "explain" else natten.functional, name)


class Numpy:
    @staticmethod
    def zeros(*shape):
        import numpy

        return numpy.zeros(shape, numpy.float32)

    @staticmethod
    def function(name):
        import natten.numpy

        return getattr(natten.numpy, name)


class Jax:
    @staticmethod
    def zeros(*shape):
        import jax.numpy

        return jax.numpy.zeros(shape)

    @staticmethod
    def function(name):
        import natten.jax

        return getattr(natten.jax, name)


def good(adapter, name):
    """Arguments that a function takes."""
    zeros = adapter.zeros
    if name == "attention":
        x = zeros(1, 5, 2, 8)
        return {"query": x, "key": x, "value": x}
    if name == "merge_attentions":
        return {"outputs": [zeros(1, 5, 2, 8)] * 2, "lse_tensors": [zeros(1, 5, 2)] * 2}
    if name == "na2d_qk":
        x = zeros(1, 2, 4, 5, 8)
        return {"query": x, "key": x, "kernel_size": 3}
    if name == "na2d_av":
        return {"attn": zeros(1, 2, 4, 5, 9), "value": zeros(1, 2, 4, 5, 8), "kernel_size": 3}
    x = zeros(1, 4, 5, 2, 8)
    return {"query": x, "key": x, "value": x, "kernel_size": 3}


CAUSAL = "must be True or False, or 2 of them, one per spatial axis"
INTEGERS = "must be an integer or 2 integers, one per spatial axis"
NUMBER = "must be a real number or None"
NAME = "must be a name (a string) or None"
BITS = "must be an integer of 64 bits"
BOUNDARY = "must be one of shift, cut, circular, or 2 of them, one per spatial axis"
CIRCULAR = {"boundary": ("shift", "circular")}

# For all adapters, and those of na2d for `explain`.
EVERYWHERE = [
    ("na2d", {"is_causal": 2}, TypeError, f"is_causal: got 2; {CAUSAL}"),
    ("na2d", {"is_causal": 1}, TypeError, f"is_causal: got 1; {CAUSAL}"),
    ("na2d", {"is_causal": 0}, TypeError, f"is_causal: got 0; {CAUSAL}"),
    ("na2d", {"is_causal": (True, 2)}, TypeError, f"is_causal: got (True, 2); {CAUSAL}"),
    ("na2d", {"is_causal": "yes"}, TypeError, f"is_causal: got 'yes'; {CAUSAL}"),
    ("na2d", {"is_causal": [True]}, ValueError, f"is_causal: got [True], 1 elements; {CAUSAL}"),
    ("na2d_qk", {"is_causal": 2}, TypeError, f"is_causal: got 2; {CAUSAL}"),
    ("na2d_av", {"is_causal": 2}, TypeError, f"is_causal: got 2; {CAUSAL}"),
    ("attention", {"is_causal": 1}, TypeError, "is_causal: got 1; must be True or False"),
    ("na2d", {"kernel_size": True}, TypeError, f"kernel_size: got True; {INTEGERS}"),
    ("na2d", {"kernel_size": (3, True)}, TypeError, f"kernel_size: got (3, True); {INTEGERS}"),
    ("na2d", {"kernel_size": None}, TypeError, f"kernel_size: got None; {INTEGERS}"),
    ("na2d", {"kernel_size": 3.0}, TypeError, f"kernel_size: got 3.0; {INTEGERS}"),
    ("na2d", {"kernel_size": 2**63}, ValueError, f"kernel_size: got {2**63}; {BITS}"),
    ("na2d", {"kernel_size": (3, -(2**64))}, ValueError, f"kernel_size: got {-(2**64)}; {BITS}"),
    ("na2d", {"dilation": 2**63}, ValueError, f"dilation: got {2**63}; {BITS}"),
    ("na2d", {"dilation": True}, TypeError, f"dilation: got True; {INTEGERS}"),
    ("na2d", {"stride": 2**200}, ValueError, f"stride: got {2**200}; {BITS}"),
    ("na2d_qk", {"stride": 2**63}, ValueError, f"stride: got {2**63}; {BITS}"),
    ("na2d_av", {"kernel_size": True}, TypeError, f"kernel_size: got True; {INTEGERS}"),
    ("na2d", {"scale": NAN}, ValueError, "scale: got nan; must be finite in float32"),
    ("na2d", {"scale": 1e39}, ValueError, "scale: got 1e+39; must be finite in float32"),
    ("attention", {"scale": -1e39}, ValueError, "scale: got -1e+39; must be finite in float32"),
    ("na2d", {"scale": 10**400}, ValueError, f"scale: got {10**400}; must be finite"),
    ("na2d", {"scale": True}, TypeError, f"scale: got True; {NUMBER}"),
    ("na2d", {"scale": "2"}, TypeError, f"scale: got '2'; {NUMBER}"),
    ("na2d", {"scale": 1j}, TypeError, f"scale: got 1j; {NUMBER}"),
    ("na2d", {"backend": 3}, TypeError, f"backend: got 3; {NAME}"),
    ("na2d", {"backend": 0}, TypeError, f"backend: got 0; {NAME}"),
    ("na2d_qk", {"backend": b"naive"}, TypeError, f"backend: got b'naive'; {NAME}"),
    ("attention", {"backend": []}, TypeError, f"backend: got []; {NAME}"),
    ("na2d", {"backend": "naiv"}, ValueError, 'backend: got "naiv"; must be one of '),
    ("na2d", {"query": None}, TypeError, "query: got None; must be a"),
    ("na2d", {"value": None}, TypeError, "value: got None; must be a"),
    ("na2d_qk", {"key": None}, TypeError, "key: got None; must be a"),
    ("na2d_av", {"value": None}, TypeError, "value: got None; must be a"),
    ("attention", {"value": None}, TypeError, "value: got None; must be a"),
    ("merge_attentions", {"outputs": None}, TypeError, "outputs: got NoneType; must be a list"),
    ("merge_attentions", {"outputs": "ab"}, TypeError, "outputs: got str; must be a list"),
    ("merge_attentions", {"lse_tensors": 3}, TypeError, "lse_tensors: got int; must be a list"),
    ("merge_attentions", {"lse_tensors": [None] * 2}, TypeError, "lse_tensors: got None; must be"),
    ("na2d", {"boundary": "wrap"}, ValueError, f"boundary: got 'wrap'; {BOUNDARY}"),
    ("na2d", {"boundary": ("cut", "Cut")}, ValueError, f"boundary: got ('cut', 'Cut'); {BOUNDARY}"),
    ("na2d", {"boundary": ["cut"]}, ValueError, f"boundary: got ['cut'], 1 elements; {BOUNDARY}"),
    ("na2d", {"boundary": 1}, TypeError, f"boundary: got 1; {BOUNDARY}"),
    ("na2d_qk", {"boundary": True}, TypeError, f"boundary: got True; {BOUNDARY}"),
    ("na2d_av", {"boundary": ("cut", 2)}, TypeError, f"boundary: got ('cut', 2); {BOUNDARY}"),
    (
        "na2d",
        CIRCULAR | {"is_causal": (True, True)},
        ValueError,
        "is_causal: got true on axis 1, whose boundary is circular; a causal axis must have an end",
    ),
    (
        "na2d_qk",
        CIRCULAR | {"dilation": (1, 2), "kernel_size": 2},
        ValueError,
        "dilation: got 2 on axis 1, which is circular; must divide the axis, 5 tokens here$",
    ),
    (
        "na2d",
        CIRCULAR | {"stride": 2},
        ValueError,
        "stride: got 2 on axis 1, which is circular; must divide the axis in steps of its "
        "dilation, 5 tokens here$",
    ),
    (
        "na2d",
        {"kernel_size": (5, 3)},
        ValueError,
        "kernel_size: got [5, 3] with dilation 1 on axis 0; kernel_size * dilation must not exceed "
        "the axis, 4 tokens here (query, [1, 4, 5, 2, 8], is read as "
        '[batch, *spatial, heads, head_dim]), unless its border cuts windows (boundary "cut")$',
    ),
    (
        "na2d",
        CIRCULAR | {"kernel_size": (3, 6)},
        ValueError,
        "kernel_size: got [3, 6] with dilation 1 on axis 1; kernel_size * dilation must not exceed "
        "the axis, 5 tokens here (query, [1, 4, 5, 2, 8], is read as "
        "[batch, *spatial, heads, head_dim])$",
    ),
    *(
        (name, {option: bad}, error, f"{option}: got {bad!r}; {must}")
        for name, option in (
            ("na2d", "query_offset"),
            ("na2d_qk", "key_offset"),
            ("na2d_av", "grid_size"),
            ("na2d", "grid_size"),
        )
        for bad, error, must in (
            (True, TypeError, INTEGERS),
            (1.0, TypeError, INTEGERS),
            ((0, 0.5), TypeError, INTEGERS),
            ((0, False), TypeError, INTEGERS),
            ("0", TypeError, INTEGERS),
            (2**63, ValueError, BITS),
        )
    ),
    ("na2d", {"query_offset": (0,)}, ValueError, "query_offset: got (0,), 1 elements; must be an"),
    ("na2d", {"query_offset": -1}, ValueError, "query_offset: got [-1, -1]; must be at least 0 on"),
    ("na2d", {"grid_size": 0}, ValueError, "grid_size: got [0, 0]; must be at least 1 on every"),
    ("na2d", {"grid_size": 2**62}, ValueError, f"grid_size: got [{2**62}, {2**62}]; must not be l"),
    (
        "na2d",
        {"key_offset": (1, 0)},
        ValueError,
        "key_offset: got [1, 0] without grid_size; must be 0 where it is not said how large the "
        "whole grid is$",
    ),
    (
        "na2d",
        {"query_offset": (1, 0)},
        ValueError,
        "query_offset: got 1 with 4 queries on axis 0; they must lie on the grid, 4 tokens here",
    ),
    (
        "na2d_qk",
        {"grid_size": (4, 4)},
        ValueError,
        "query_offset: got 0 with 5 queries on axis 1; they must lie on the grid, 4 tokens here "
        "(grid_size)$",
    ),
    (
        "na2d",
        {"key_offset": (0, 1), "grid_size": (4, 9)},
        ValueError,
        "key: got tokens 1 to 5 on axis 1; the windows of queries 0 to 4 need tokens 0 to 5 "
        "(see natten.key_range)$",
    ),
    (
        "na2d_av",
        CIRCULAR | {"query_offset": 0, "grid_size": (4, 9)},
        ValueError,
        "value: got tokens 0 to 4 on axis 1; the windows of queries 0 to 4 need tokens -1 to 5 "
        "(see natten.key_range)$",
    ),
]
# The same, with arguments that are shapes of zeros.
SHAPES = [
    (  # not given as parts, although the first token of both is that of the grid
        "na2d",
        {"query": (1, 3, 5, 2, 8)},
        "key: got shape [1, 4, 5, 2, 8]; the spatial shape must be [3, 5], to match query, unless "
        "query_offset, key_offset or grid_size say that they are parts of a grid$",
    ),
    (
        "attention",
        {"key": (1, 0, 2, 8), "value": (1, 0, 2, 8)},
        "key: got shape [1, 0, 2, 8]; the number of keys must be at least 1",
    ),
    (
        "attention",
        {"value": (1, 6, 2, 8)},
        "value: got shape [1, 6, 2, 8]; the number of keys must be 5, to match key",
    ),
    (  # no word of kernel_size, which attention has not
        "attention",
        {"query": (5, 2, 8)},
        "query: got 3 dimensions, shape [5, 2, 8]; must have 4, "
        "[batch, *spatial, heads, head_dim], for 1 spatial axis$",
    ),
    (  # heads first, where heads are last
        "na2d",
        dict.fromkeys(("query", "key", "value"), (1, 2, 4, 5, 8)),
        "kernel_size: got [3, 3] with dilation 1 on axis 0; kernel_size * dilation must not exceed "
        "the axis, 2 tokens here (query, [1, 2, 4, 5, 8], is read as "
        "[batch, *spatial, heads, head_dim])",
    ),
    (  # and the reverse
        "na2d_qk",
        dict.fromkeys(("query", "key"), (1, 4, 5, 2, 8)),
        "kernel_size: got [3, 3] with dilation 1 on axis 1; kernel_size * dilation must not exceed "
        "the axis, 2 tokens here (query, [1, 4, 5, 2, 8], is read as "
        "[batch, heads, *spatial, head_dim])",
    ),
]


def refuses(error, start, call, *args, **kwargs):
    """`start` is plain text, with $ at its end where the message ends there."""
    end = r"(?:\n|\Z)" if start.endswith("$") else ""  # JAX adds lines of its own
    with pytest.raises(error, match="^" + re.escape(start.removesuffix("$")) + end):
        call(*args, **kwargs)


ADAPTERS = [
    pytest.param(Torch, marks=needs["torch"]),
    pytest.param(Numpy, marks=needs["numpy"]),
    pytest.param(Jax, marks=needs["jax"]),
]


def short(value):
    text = str(value)
    return text if len(text) < 40 else None


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name, bad, error, start", EVERYWHERE, ids=short)
def test_everywhere(adapter, name, bad, error, start):
    refuses(error, start, adapter.function(name), **{**good(adapter, name), **bad})
    if adapter is Torch and name == "na2d":
        refuses(error, start, natten.explain, **{**good(adapter, name), **bad})


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name, shapes, start", SHAPES)
def test_shapes(adapter, name, shapes, start):
    bad = {key: adapter.zeros(*shape) for key, shape in shapes.items()}
    refuses(ValueError, start, adapter.function(name), **{**good(adapter, name), **bad})


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_is_taken(adapter):
    fused, attention = adapter.function("na2d"), adapter.function("attention")
    three = good(adapter, "na2d")
    expected = fused(**three, is_causal=(True, False))
    assert (fused(**three, is_causal=[True, None]) == expected).all()
    assert (fused(**three, is_causal=None) == fused(**three)).all()
    assert (attention(**good(adapter, "attention"), is_causal=None) == 0).all()
    assert (fused(**{**three, "kernel_size": Integer()}, scale=3) == 0).all()
    if HAS["numpy"]:
        import numpy

        assert (fused(**three, is_causal=(numpy.True_, numpy.False_)) == expected).all()
        assert (fused(**three, scale=numpy.float32(3), stride=numpy.int8(1)) == 0).all()


# PyTorch: the bad arguments are made of the module and of x, a query of na2d.

DENSE = "must be dense (torch.strided), unquantized"
DTYPES = "must be float64, float32, bfloat16 or float16"
TENSOR = "must be a torch.Tensor"

TORCH = [
    ("na2d", lambda t, x: {"key": x.to_sparse()}, TypeError,
     f"key: got a torch.sparse_coo tensor; {DENSE}"),
    ("na2d", lambda t, x: {"value": x.to_mkldnn()}, TypeError,
     f"value: got a torch._mkldnn tensor; {DENSE}"),
    ("na2d", lambda t, x: {"query": t.quantize_per_tensor(x, 0.1, 0, t.qint8)}, TypeError,
     f"query: got a torch.qint8 tensor; {DENSE}"),
    ("na2d_qk", lambda t, x: {"rpb": x.to_sparse()}, TypeError,
     f"rpb: got a torch.sparse_coo tensor; {DENSE}"),
    ("na2d", lambda t, x: {"query": x.clone().requires_grad_(), "key": x.to_sparse()}, TypeError,
     f"key: got a torch.sparse_coo tensor; {DENSE}"),
    ("na2d", lambda t, x: {"query": x.to(t.float8_e4m3fn)}, TypeError,
     f"query: got dtype float8_e4m3fn; {DTYPES}"),
    ("na2d", lambda t, x: {"value": x.to(t.float8_e5m2)}, TypeError,
     f"value: got dtype float8_e5m2; {DTYPES}"),
    ("na2d", lambda t, x: {"key": x.bool()}, TypeError, f"key: got dtype bool; {DTYPES}"),
    ("na2d", lambda t, x: {"key": [[1.0]]}, TypeError, f"key: got list; {TENSOR}"),
    ("na2d", lambda t, x: {"rpb": 3}, TypeError, f"rpb: got int; {TENSOR}"),
    ("na2d", lambda t, x: {"value": t.nested.as_nested_tensor([x[0]])}, ValueError,
     "value: got a nested tensor; must be dense, as the others are"),
    ("na2d", lambda t, x: {"scale": t.ones((), requires_grad=True)}, TypeError,
     "scale: got a tensor that requires a gradient, which it would not get; must be a real number"),
    ("na2d", lambda t, x: {"scale": t.ones(2)}, TypeError,
     f"scale: got tensor([1., 1.]); {NUMBER}"),
    ("na2d", lambda t, x: {**dict.fromkeys(("query", "key", "value"), x.double()), "scale": NAN},
     ValueError, "scale: got nan; must be finite in float64"),
    ("na2d", lambda t, x: {"key_mask": x[..., 0, 0]}, TypeError,
     "key_mask: got dtype float32; must be bool, true where a key may be seen$"),
    ("na2d", lambda t, x: {"key_mask": x[..., 0, 0].clone().requires_grad_()}, TypeError,
     "key_mask: got dtype float32; must be bool"),
    ("na2d_qk", lambda t, x: {"key_mask": x[..., 0, 0].int()}, TypeError,
     "key_mask: got dtype int32; must be bool"),
    ("na2d_av", lambda t, x: {"key_mask": x[..., 0, 0].byte()}, TypeError,
     "key_mask: got dtype uint8; must be bool"),
    ("na2d", lambda t, x: {"key_mask": [[True]]}, TypeError, f"key_mask: got list; {TENSOR}"),
    ("na2d", lambda t, x: {"key_mask": True}, TypeError, f"key_mask: got bool; {TENSOR}"),
    ("na2d_qk", lambda t, x: {"key_mask": (x[..., 0, 0] == 0).to_sparse()}, TypeError,
     f"key_mask: got a torch.sparse_coo tensor; {DENSE}"),
    ("na2d", lambda t, x: {"key_mask": t.nested.as_nested_tensor([x[0] == 0])}, ValueError,
     "key_mask: got a nested tensor; must be dense, as the others are"),
    ("na2d", lambda t, x: {"key_mask": x[0, ..., 0, 0] == 0}, ValueError,
     "key_mask: got 2 dimensions, shape [4, 5]; must have 3, [batch or 1, *key_spatial], for 2 "),
    ("na2d", lambda t, x: {"key_mask": x[..., 0] == 0}, ValueError,
     "key_mask: got 4 dimensions, shape [1, 4, 5, 2]; must have 3, [batch or 1, *key_spatial]"),
    ("na2d_av", lambda t, x: {"key_mask": x[:, :3, :, 0, 0] == 0}, ValueError,
     "key_mask: got shape [1, 3, 5]; the spatial shape must be [4, 5], to match attn"),
    ("na2d_qk", lambda t, x: {"key_mask": x[:, :3, :, 0, 0] == 0, "query_offset": 0}, ValueError,
     "key_mask: got shape [1, 3, 5]; the number of keys must be [4, 5], to match key"),
    ("na2d", lambda t, x: {"key_mask": x.new_zeros(2, 4, 5) == 0}, ValueError,
     "key_mask: got shape [2, 4, 5]; batch must be 1, to match query"),
    ("na2d", lambda t, x: {**dict.fromkeys(("query", "key", "value"), x.expand(4, 4, 5, 2, 8)),
                           "key_mask": x.new_zeros(2, 4, 5) == 0}, ValueError,
     "key_mask: got shape [2, 4, 5]; batch must be 1 or 4, to match query"),
    ("na2d", lambda t, x: {"key_mask": t.ones(1, 4, 5, dtype=bool, device="meta")}, ValueError,
     "key_mask: is on meta; must be on the device of query, cpu"),
    ("explain", lambda t, x: {"key_mask": x[..., 0, 0]}, TypeError,
     "key_mask: got dtype float32; must be bool"),
    ("explain", lambda t, x: {"key_mask": 3}, TypeError, f"key_mask: got int; {TENSOR}"),
    ("na2d", lambda t, x: {"q_tile_shape": True}, TypeError, f"q_tile_shape: got True; {INTEGERS}"),
    ("na2d", lambda t, x: {"kv_tile_shape": 2**63}, ValueError,
     f"kv_tile_shape: got {2**63}; {BITS}"),
    ("na2d", lambda t, x: {"backward_kv_splits": "2"}, TypeError,
     f"backward_kv_splits: got '2'; {INTEGERS}"),
    ("explain", lambda t, x: {"q_tile_shape": 2**63}, ValueError,
     f"q_tile_shape: got {2**63}; {BITS}"),
    ("explain", lambda t, x: {"flags": 1}, TypeError,
     "explain() got an unexpected keyword argument 'flags'"),
    ("explain", lambda t, x: {"query": x[0, 0]}, ValueError,
     "query: got shape [5, 2, 8]; must be [batch, *spatial, heads, head_dim] with one to three"),
    ("explain", lambda t, x: {"query": [1.0]}, TypeError, f"query: got list; {TENSOR}"),
    ("explain", lambda t, x: {"key": x.to_sparse()}, TypeError,
     f"key: got a torch.sparse_coo tensor; {DENSE}"),
    ("explain", lambda t, x: {"rpb": x}, ValueError,
     "rpb: got 5 dimensions, shape [1, 4, 5, 2, 8]; must have 3"),
    ("neighborhood_attention_generic", lambda t, x: {"query": 3}, TypeError,
     f"query: got int; {TENSOR}"),
    ("neighborhood_attention_generic", lambda t, x: {"is_causal": 2}, TypeError,
     f"is_causal: got 2; {CAUSAL}"),
    ("merge_attentions", lambda t, x: {"outputs": [x.numpy()] * 2}, TypeError,
     f"outputs: got ndarray; {TENSOR}"),
    ("merge_attentions", lambda t, x: {"lse_tensors": [x.numpy()] * 2}, TypeError,
     f"lse_tensors: got ndarray; {TENSOR}"),
    ("merge_attentions", lambda t, x: {"lse_tensors": [t.zeros(1, 5, 2, device="meta")] * 2},
     ValueError, "outputs, lse_tensors: are on cpu and meta; must be on one device"),
]  # fmt: skip


@needs["torch"]
@pytest.mark.parametrize("name, bad, error, start", TORCH)
def test_torch(name, bad, error, start):
    import torch

    arguments = good(Torch, name) | bad(torch, torch.zeros(1, 4, 5, 2, 8))
    refuses(error, start, Torch.function(name), **arguments)


@needs["torch"]
def test_a_scale_whose_gradient_would_be_lost():
    import torch

    x = torch.ones(1, 5, 2, 8)
    attend = Torch.function("attention")
    with torch.no_grad():  # and one that has none is a number
        assert torch.equal(attend(x, x, x, scale=torch.tensor(0.5)), attend(x, x, x, scale=0.5))
    with pytest.raises(TypeError, match=r"^scale: got a tensor that requires a gradient"):
        torch.func.grad(lambda scale: attend(x, x, x, scale=scale).sum())(torch.tensor(0.5))


# Modules


@needs["torch"]
def test_modules_keep_the_errors_of_others():
    """What goes wrong in the map to query, key and value, and is not the input's fault."""
    import torch
    from torch import nn

    class Fails(nn.Linear):
        def forward(self, x):
            raise RuntimeError("not for you")

    module = natten.NeighborhoodAttention1D(16, 2, 3)
    x = torch.ones(1, 5, 16, dtype=torch.bfloat16)
    module.qkv.forward = lambda x: (_ for _ in ()).throw(torch.OutOfMemoryError("full"))
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        module(x)
    module.qkv = Fails(16, 48)
    with pytest.raises(RuntimeError, match="not for you"):
        module(x)
    with pytest.raises(ValueError, match=r"^x: got shape \[\]; must be"):
        module(torch.tensor(1.0))
    module.qkv = nn.LazyLinear(48)
    assert module(x.float()).shape == x.shape


INTEGER = "must be an integer"
CONSTRUCTORS = [
    ({"dim": 0}, ValueError, "dim: got 0; must be at least 1"),
    ({"dim": 16.0}, TypeError, f"dim: got 16.0; {INTEGER}"),
    ({"dim": "16"}, TypeError, f"dim: got '16'; {INTEGER}"),
    ({"dim": True}, TypeError, f"dim: got True; {INTEGER}"),
    ({"dim": 2**64}, ValueError, f"dim: got {2**64}; {BITS}"),
    ({"num_heads": 2.0}, TypeError, f"num_heads: got 2.0; {INTEGER}"),
    ({"num_heads": True}, TypeError, f"num_heads: got True; {INTEGER}"),
    ({"num_heads": None}, TypeError, f"num_heads: got None; {INTEGER}"),
    ({"num_heads": 0}, ValueError, "num_heads: got 0; must be at least 1"),
    ({"num_heads": 3}, ValueError, "num_heads: got 3; must divide dim, 16"),
    ({"kernel_size": True}, TypeError, f"kernel_size: got True; {INTEGERS}"),
    ({"kernel_size": 2**63}, ValueError, f"kernel_size: got {2**63}; {BITS}"),
    ({"kernel_size": 2**62, "dilation": 4}, ValueError, "kernel_size: got [4611686018427387904, "),
    ({"dilation": True}, TypeError, f"dilation: got True; {INTEGERS}"),
    ({"stride": -(2**64)}, ValueError, f"stride: got {-(2**64)}; {BITS}"),
    ({"is_causal": 2}, TypeError, f"is_causal: got 2; {CAUSAL}"),
    ({"is_causal": (True, 1)}, TypeError, f"is_causal: got (True, 1); {CAUSAL}"),
    ({"boundary": "wrap"}, ValueError, f"boundary: got 'wrap'; {BOUNDARY}"),
    ({"boundary": ("cut", 1)}, TypeError, f"boundary: got ('cut', 1); {BOUNDARY}"),
    ({"boundary": "circular", "is_causal": True}, ValueError, "is_causal: got true on axis 0, who"),
    (
        {"boundary": "cut", "kernel_size": 2**62},
        ValueError,
        "kernel_size: got [4611686018427387904",
    ),
    ({"rel_pos_bias": "yes"}, TypeError, "rel_pos_bias: got 'yes'; must be True or False"),
    ({"rel_pos_bias": 2}, TypeError, "rel_pos_bias: got 2; must be True or False"),
    ({"qkv_bias": "no"}, TypeError, "qkv_bias: got 'no'; must be True or False"),
    ({"qk_scale": NAN}, ValueError, "qk_scale: got nan; must be finite in float32"),
    ({"qk_scale": 1e39}, ValueError, "qk_scale: got 1e+39; must be finite in float32"),
    ({"qk_scale": "2"}, TypeError, f"qk_scale: got '2'; {NUMBER}"),
    ({"attn_drop": 2.0}, ValueError, "attn_drop: got 2.0; must lie in [0, 1]"),
    ({"attn_drop": NAN}, ValueError, "attn_drop: got nan; must lie in [0, 1]"),
    ({"proj_drop": -0.1}, ValueError, "proj_drop: got -0.1; must lie in [0, 1]"),
    ({"proj_drop": None}, TypeError, "proj_drop: got None; must be a real number"),
]


def make_torch(**arguments):
    return natten.NeighborhoodAttention2D(**arguments)


def make_nnx(**arguments):
    from flax import nnx

    import natten.flax

    return natten.flax.NeighborhoodAttention2D(rngs=nnx.Rngs(0), **arguments)


def make_linen(**arguments):
    import natten.flax.linen

    return natten.flax.linen.NeighborhoodAttention2D(**arguments)


MAKERS = [
    pytest.param(make_torch, marks=needs["torch"]),
    pytest.param(make_nnx, marks=needs["flax"]),
    pytest.param(make_linen, marks=needs["flax"]),
]
MODULE = {"dim": 16, "num_heads": 2, "kernel_size": 3}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("bad, error, start", CONSTRUCTORS)
def test_constructors(make, bad, error, start):
    refuses(error, start, make, **(MODULE | bad))


@pytest.mark.parametrize("make", MAKERS)
def test_what_constructors_take(make):
    module = make(**MODULE, is_causal=(True, None), qk_scale=3, attn_drop=0, proj_drop=1)
    assert module.is_causal == (True, False) and module.scale == 3
    assert make(**MODULE, is_causal=None).is_causal == (False, False)
    assert make(**MODULE, qk_scale=False).scale == make(**MODULE).scale == 8**-0.5
    # On a circular axis, which the stride divides, as on others.
    for boundary in ("shift", "cut", "circular"):
        assert make(**MODULE, stride=2, boundary=boundary).stride == (2, 2)


@pytest.mark.parametrize("make", MAKERS)
def test_the_name_in_errors_of_constructors(make):
    name = "NeighborhoodAttention2D"
    missing = {k: v for k, v in MODULE.items() if k != "kernel_size"}
    refuses(TypeError, f"{name}() missing a required argument: 'kernel_size'", make, **missing)
    start = f"{name}() got an unexpected keyword argument 'sride'"
    refuses(TypeError, start, make, **MODULE, sride=2)
    refuses(TypeError, start, make, **missing, sride=2)
    start = f"{name}() got an unexpected keyword argument 'bias'; NATTEN before 0.17 calls rel_pos"
    refuses(TypeError, start, make, **MODULE, bias=True)
    start = (
        f"{name}() got an unexpected keyword argument 'dilation_d'; dilation takes a tuple, (dil"
    )
    refuses(TypeError, start, make, **MODULE, dilation_d=1)


@needs["flax"]
def test_rngs_of_constructors():
    import jax

    import natten.flax

    make = natten.flax.NeighborhoodAttention2D
    start = "NeighborhoodAttention2D() missing a required argument: 'rngs'"
    refuses(TypeError, start, make, **MODULE)
    for bad, got in ((None, "None"), (0, "int"), (jax.random.key(0), "PRNGKeyArray")):
        start = f"rngs: got {got}; must be a flax.nnx.Rngs"
        refuses(TypeError, start, make, **MODULE, rngs=bad)


@pytest.mark.parametrize("make", MAKERS)
def test_the_name_in_errors_of_calls(make):
    module, x = make(**MODULE), Jax.zeros(1, 4, 5, 16) if make is not make_torch else None
    call = module
    if make is make_linen:
        import jax

        def call(x, **more):
            return module.init(jax.random.key(0), x, **more)

    method = "forward" if make is make_torch else "__call__"
    start = f"NeighborhoodAttention.{method}() got an unexpected keyword argument 'mask'"
    refuses(TypeError, start, call, x, mask=None)


LAST = "must be [batch, *spatial, 16], channels last, with 2 spatial axes"

INPUTS = [
    (lambda t, x: None, TypeError, f"x: got None; {TENSOR}"),
    (lambda t, x: x.numpy(), TypeError, f"x: got ndarray; {TENSOR}"),
    (lambda t, x: x.movedim(-1, 1), ValueError, f"x: got shape [1, 16, 4, 5]; {LAST}"),
    (lambda t, x: x[..., :8], ValueError, f"x: got shape [1, 4, 5, 8]; {LAST}"),
    (lambda t, x: x[0], ValueError, f"x: got shape [4, 5, 16]; {LAST}"),
    (lambda t, x: x.int(), TypeError, "x: got dtype int32; must be float32, as the parameters are"),
    (lambda t, x: x.double(), TypeError, "x: got dtype float64; must be float32, as the param"),
    (lambda t, x: x.to_sparse(), TypeError, f"x: got a torch.sparse_coo tensor; {DENSE}"),
    (lambda t, x: x.to_mkldnn(), TypeError, f"x: got a torch._mkldnn tensor; {DENSE}"),
    (lambda t, x: x[:, :2], ValueError, "kernel_size: got [3, 3] with dilation 1 on axis 0;"),
]  # fmt: skip
MASKS = [
    (lambda t, x: [True], TypeError, f"key_mask: got list; {TENSOR}"),
    (lambda t, x: x[..., 0], TypeError, "key_mask: got dtype float32; must be bool"),
    (lambda t, x: x == 0, ValueError, "key_mask: got 4 dimensions, shape [1, 4, 5, 16]; must have"),
    (lambda t, x: x[:, 1:, :, 0] == 0, ValueError, "key_mask: got shape [1, 3, 5]; the spatial sh"),
]


@needs["torch"]
@pytest.mark.parametrize("bad, error, start", INPUTS)
def test_inputs_of_modules(bad, error, start):
    import torch

    refuses(error, start, make_torch(**MODULE), bad(torch, torch.zeros(1, 4, 5, 16)))


@needs["torch"]
@pytest.mark.parametrize("bad, error, start", MASKS)
@pytest.mark.parametrize("fused", [False, True])
def test_masks_of_modules(bad, error, start, fused):
    import torch

    x = torch.zeros(1, 4, 5, 16)
    natten.use_fused_na(fused)
    try:
        refuses(error, start, make_torch(**MODULE), x, bad(torch, x))
    finally:
        natten.use_fused_na(False)


@needs["torch"]
def test_another_map_in_the_place_of_qkv():
    import torch

    module = make_torch(**MODULE)
    module.qkv = torch.nn.Sequential(torch.nn.Linear(7, 48))
    assert module(torch.zeros(1, 4, 5, 7)).shape == (1, 4, 5, 16)
    module.qkv = torch.nn.Linear(16, 24)  # as what a rank has of a map that is split by columns
    start = "qkv: gave 24 channels; must give 48, those of query, key and value of all 2 heads"
    refuses(ValueError, start, module, torch.zeros(1, 4, 5, 16))


@needs["flax"]
@pytest.mark.parametrize(
    "shape, error, start",
    [
        (None, TypeError, "x: got None; must be an array"),
        ((1, 16, 4, 5), ValueError, f"x: got shape (1, 16, 4, 5); {LAST}"),
        ((1, 4, 5, 8), ValueError, f"x: got shape (1, 4, 5, 8); {LAST}"),
    ],
)
def test_inputs_of_flax_modules(shape, error, start):
    refuses(error, start, make_nnx(**MODULE), None if shape is None else Jax.zeros(*shape))


# JAX


@needs["jax"]
@pytest.mark.parametrize("name", ["na2d", "na2d_qk", "attention"])
def test_forward_mode_in_jax(name):
    import jax

    arguments = good(Jax, name)
    x = arguments.pop("query")
    start = 'autodiff: got "reverse", which bars forward-mode differentiation (jvp, linearize, '
    start += 'jacfwd); for that it must be autodiff="any"$'
    refuses(TypeError, start, jax.jvp, lambda x: Jax.function(name)(x, **arguments), (x,), (x,))


@needs["jax"]
def test_traced_arguments():
    import jax

    x = jax.numpy.ones((1, 6, 6, 2, 4))
    static = "where a static one is needed (static_argnames of jax.jit); must be"
    for name, value, must in (
        ("kernel_size", 3, "an integer or 2 integers"),
        ("dilation", (1, 1), "an integer or 2 integers"),
        ("is_causal", True, "True or False"),
        ("scale", 0.5, "a real number or None (multiply query by it instead)"),
    ):

        def call(value, name=name):
            return Jax.function("na2d")(x, x, x, **{"kernel_size": 3, name: value})

        refuses(TypeError, f"{name}: got a traced value, {static} {must}", jax.jit(call), value)


@needs["torch"]
@pytest.mark.parametrize("other", ["numpy", "jax"])
def test_arrays_of_others(other):
    x = pytest.importorskip(f"{other}.numpy" if other == "jax" else other).ones((1, 6, 2, 4))
    advice = f"{TENSOR} (natten.{other} has functions for others)"
    name = type(x).__name__
    refuses(TypeError, f"query: got {name}; {advice}", Torch.function("na1d"), x, x, x, 3)


@needs["jax"]
@pytest.mark.parametrize("bad", [None, [], "forward"])
def test_autodiff(bad):
    start = f'autodiff: got {bad!r}; must be "reverse" or "any"'
    refuses(ValueError, start, Jax.function("na2d"), **good(Jax, "na2d"), autodiff=bad)


@needs["jax"]
def test_the_name_in_errors_about_programs():
    """JAX and XLA name nothing else of ours in programs that were not told of our custom call."""
    import jax
    from jax import export

    call = jax.jit(lambda x: Jax.function("na1d")(x, x, x, kernel_size=3))
    with pytest.raises(ValueError, match=r"natten\.jax\.custom_call_targets"):
        export.export(call)(Jax.zeros(1, 4, 1, 8))


# What imports no framework.

SHAPE = (1, 4, 5, 2, 8)
COUNT = {"q_shape": SHAPE, "k_shape": SHAPE, "v_shape": SHAPE, "kernel_size": 3, "dilation": 1}
COUNT |= {"is_causal": False, "is_heads_last": True}
ALL = {"na_dim": 2, "kernel_size": 3, "dilation": 1, "is_causal": False}

COUNTED = [
    ({"q_shape": None}, TypeError, "q_shape: got NoneType; must be a list or tuple"),
    ({"k_shape": "abcde"}, TypeError, "k_shape: got str; must be a list or tuple"),
    ({"v_shape": (1, 4, 5, 2, 8.0)}, TypeError, f"v_shape: got 8.0; {INTEGER}"),
    ({"q_shape": (1, 4, 5, 2, 2**63)}, ValueError, f"q_shape: got {2**63}; {BITS}"),
    ({"is_causal": 1}, TypeError, f"is_causal: got 1; {CAUSAL}"),
    ({"additional": 2.5}, TypeError, f"additional: got 2.5; {INTEGER}"),
    ({"additional": -1}, ValueError, "additional: got -1; must be at least 0"),
]
RANGE = {"query_offset": 2, "query_length": 3, "grid_size": 9, "kernel_size": 3}
ONE = "must be an integer or 1 integers, one per spatial axis"
RANGES = [
    ({"query_offset": True}, TypeError, f"query_offset: got True; {ONE}"),
    ({"query_offset": None}, TypeError, f"query_offset: got None; {ONE}"),
    ({"query_length": 2.0}, TypeError, f"query_length: got 2.0; {ONE}"),
    ({"query_length": None}, TypeError, f"query_length: got None; {ONE}"),
    ({"grid_size": "9"}, TypeError, f"grid_size: got '9'; {ONE}"),
    ({"kernel_size": None}, TypeError, f"kernel_size: got None; {ONE}"),
    ({"query_length": 0}, ValueError, "query_length: got [0]; must be at least 1 on every axis"),
    ({"query_offset": -1}, ValueError, "query_offset: got [-1]; must be at least 0 on every axis"),
    ({"grid_size": 4}, ValueError, "query_offset: got 2 with 3 queries on axis 0; they must lie on "
     "the grid, 4 tokens here (grid_size)$"),
    ({"kernel_size": 10}, ValueError, "kernel_size: got [10] with dilation 1 on axis 0; kernel_size"
     " * dilation must not exceed the axis, 9 tokens here, unless its border cuts windows"),
    ({"kernel_size": (3, 3), "dilation": (1,)}, ValueError, "dilation: got (1,), 1 elements; must"),
    ({"kernel_size": (3, 3, 3, 3)}, ValueError, "kernel_size: got [3, 3, 3, 3], 4 elements; there"),
    ({"boundary": "x"}, ValueError, "boundary: got 'x'; must be one of shift, cut, circular$"),
]  # fmt: skip
PLAIN = [
    *((natten.key_range, RANGE | bad, *expected) for bad, *expected in RANGES),
    *((flops.fna_flop_count, COUNT | bad, *expected) for bad, *expected in COUNTED),
    (utils.check_all_args, ALL | {"na_dim": "2"}, TypeError, f"na_dim: got '2'; {INTEGER}"),
    (utils.check_all_args, ALL | {"is_causal": 1}, TypeError, f"is_causal: got 1; {CAUSAL}"),
    (utils.check_all_args, ALL | {"dilation": True}, TypeError, f"dilation: got True; {INTEGERS}"),
    (utils.get_num_na_weights, {"kernel_size": "33"}, TypeError, "kernel_size: got '33'; must be"),
    (utils.get_num_na_weights, {"kernel_size": (3, 2.5)}, TypeError, "kernel_size: got (3, 2.5);"),
    (natten.na_kernel, {"backend": 3}, TypeError, f"backend: got 3; {NAME}"),
    (natten.na_kernel, {"backend": "naiv"}, ValueError, 'backend: got "naiv"; must be one of '),
    (
        context.use_autotuner,
        {"steps_forward": "x"},
        TypeError,
        "steps_forward: got 'x'; must be an",
    ),
    (
        context.use_autotuner,
        {"steps_forward": True},
        TypeError,
        "steps_forward: got True; must be an integer",
    ),
    (context.use_autotuner, {"forward_pass": 1}, TypeError, "forward_pass: got 1; must be a bool"),
]


@pytest.mark.parametrize("call, arguments, error, start", PLAIN)
def test_plain(call, arguments, error, start):
    refuses(error, start, call, **arguments)
