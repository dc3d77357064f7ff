"""CUDA without a device: what builds with and without its kernels answer. tests/test_cuda.py runs
the kernels."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

import natten
from natten import _args, _core, context

HAS_KERNELS = bool(_core.backends("cuda"))
MISSING = 999  # a device that no machine has
with_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="this build has no CUDA kernels")
without_kernels = pytest.mark.skipif(HAS_KERNELS, reason="this build has CUDA kernels")
without_device = pytest.mark.skipif(
    context.get_device_cc() > 0, reason="this machine has a CUDA device"
)
needs_torch = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="needs PyTorch")
needs_jax = pytest.mark.skipif(not importlib.util.find_spec("jax"), reason="needs JAX")

CONFIG = _args.make_config(2, 3)
TOKENS = ((1, 6, 7, 2, 4), "float16")
INPUTS = [TOKENS, TOKENS, TOKENS, *[None] * 4]


def plan(device, backend=""):
    return _core.plan("attention_forward", CONFIG, None, backend, INPUTS, [True, None], device)


def explain(device):
    return _core.explain("attention_forward", CONFIG, None, "", INPUTS, device)


class _Tensor(ctypes.Structure):  # DLPack's DLManagedTensor
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class Foreign:
    """An array of float32 that claims to be in memory which no program can read."""

    def __init__(self, shape, device_type, device_id):
        self.shape = (ctypes.c_int64 * len(shape))(*shape)
        self.tensor = _Tensor(64, device_type, device_id, len(shape), 2, 32, 1, self.shape)

    def __dlpack__(self, **_):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = (
            ctypes.py_object,
            (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p),
        )
        return new(ctypes.addressof(self.tensor), b"dltensor", None)

    def __dlpack_device__(self):
        return self.tensor.device_type, self.tensor.device_id


def run_on(device_type, device_id, **options):
    x = Foreign((1, 6, 7, 2, 4), device_type, device_id)
    inputs = [x, x, x, *[None] * 4]
    return _core.run("attention_forward", CONFIG, None, "", inputs, [x, None], **options)


def test_environment():
    assert _core.compute_capability(MISSING) == _core.compute_capability(-2) == 0
    assert natten.has_cuda() == (HAS_KERNELS and context.get_device_cc() >= 1)
    assert not natten.has_half(MISSING)


@without_device
def test_environment_without_a_device():
    assert _core.compute_capability() == _core.compute_capability(0) == 0
    assert not natten.has_cuda()
    for device in (None, 0, "cuda", "cuda:0"):
        assert context.get_device_cc(device) == 0
        assert not (natten.has_half(device) or natten.has_bfloat(device) or natten.has_fna(device))


@with_kernels
def test_device_arguments(monkeypatch):
    monkeypatch.setattr(_core, "compute_capability", lambda index: 80 + index)
    for device, index in ((None, -1), ("cuda", -1), (0, 0), (3, 3), ("cuda:2", 2)):
        assert context.get_device_cc(device) == 80 + index
    for device in ("cpu", "cpu:0", "nonsense", "cuda:-1", "cuda:1x", -5, 1.0, object()):
        assert context.get_device_cc(device) == 0


@needs_torch
@with_kernels
def test_torch_device_arguments(monkeypatch):
    import torch

    monkeypatch.setattr(_core, "compute_capability", lambda index: 80 + index)
    for device, index in (("cuda", -1), ("cuda:0", 0), ("cuda:2", 2)):
        assert context.get_device_cc(torch.device(device)) == 80 + index
    assert context.get_device_cc(torch.device("cpu")) == 0


def test_names_of_devices():
    for device in ("tpu", "cuda:", "cuda:x", "cuda:-1", "cuda:1x", "cpu:0", ""):
        with pytest.raises(ValueError, match=f'device: got "{device}"; must be cpu, cuda or cuda:'):
            plan(device)
    assert plan("cpu")[0] == plan(None)[0] == [(list(TOKENS[0]), "float16"), None]
    assert plan(None, "nonsense")[1] == 0, "no backend is chosen"


@without_kernels
def test_no_kernels():
    assert [name for name in _core.xla_ffi_handlers()] == ["cpu"]
    for call in (
        lambda: plan("cuda"),
        lambda: plan("cuda:0"),
        lambda: run_on(2, 0),
        lambda: run_on(2, 0, allocate=np.empty, stream=8),
    ):
        with pytest.raises(ValueError, match=r"are on cuda.*no kernels.*-DNATTEN_WITH_CUDA=ON"):
            call()
    assert explain("cuda") == []


@with_kernels
def test_kernels():
    assert _core.backends("cuda") == ["fna", "gemm", "simt"]
    assert set(_core.xla_ffi_handlers()) == {"cpu", "cuda"}
    assert plan("cuda")[0] == plan("cpu")[0]
    assert [row[0] for row in explain("cuda")] == ["fna", "gemm", "simt"]
    assert sum(chosen for _, _, chosen in explain("cuda")) == 1
    for name, refusal, chosen in explain(f"cuda:{MISSING}"):
        assert name in ("fna", "gemm", "simt") and not chosen
        assert refusal.startswith(f"there is no device cuda:{MISSING}")
    with pytest.raises(ValueError, match='"vectorized"; must be one of fna, gemm, simt, or fused'):
        plan("cuda", "vectorized")
    natten.na_kernel("simt")


@with_kernels
def test_a_missing_device_is_refused():
    for options in ({}, {"allocate": np.empty, "stream": 8}):
        with pytest.raises(ValueError, match=f"there is no device cuda:{MISSING}"):
            run_on(2, MISSING, **options)


def test_other_devices():
    with pytest.raises(
        ValueError, match="is on a device of DLPack type 10; must be on CPU or CUDA"
    ):
        run_on(10, 0)
    cpu, cuda = (Foreign((1, 6, 7, 2, 4), kind, 0) for kind in (1, 2))
    with pytest.raises(
        ValueError, match="key: is on cuda:0; must be on the device of query, cpu:0"
    ):
        _core.explain("attention_forward", CONFIG, None, "", [cpu, cuda, cpu, *[None] * 4])


# ---- PyTorch ----


def fake_output(backend=None):
    """The output's (device, shape) for tensors that say they are on a CUDA device."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.device("cuda:0"):
        q = torch.empty(TOKENS[0], dtype=torch.float16)
        output = natten.na2d(q, q, q, 3, backend=backend)
    return output.device, tuple(output.shape)


@needs_torch
@without_kernels
def test_fake_tensors_without_kernels():
    with pytest.raises(ValueError, match="NATTEN_WITH_CUDA=ON"):
        fake_output("fna")  # without a name the backend composed would serve it


@needs_torch
@with_kernels
def test_fake_tensors():
    device, shape = fake_output()
    assert device.type == "cuda" and shape == TOKENS[0]


@pytest.fixture(autouse=True)
def switches(monkeypatch):
    monkeypatch.setattr(context, "_switches", context._Switches())


@pytest.fixture(params=[False, True], ids=["eager", "compiled"])
def step(request):
    """A forward pass in PyTorch."""
    import torch

    q = torch.randn(1, 6, 2, 4, requires_grad=True)

    def step():
        return natten.na1d(q, q, q, 3, scale=0.5).sum()

    if not request.param:
        return step
    torch._dynamo.reset()
    return torch.compile(step, fullgraph=True, backend="aot_eager")


@pytest.fixture
def flags(monkeypatch):
    """The flags that reach libnatten, by operation."""
    flags = {}
    run = _core.run

    def recorded(op, config, *args):
        flags[op] = config[-1]
        return run(op, config, *args)

    monkeypatch.setattr(_core, "run", recorded)
    return flags


@needs_torch
def test_tf32_reaches_both_passes(step, flags):
    for mode in (False, True, False):
        natten.use_tf32_in_gemm_na(mode)
        step().backward()
        expected = _args.HAS_SCALE | (_args.ALLOW_TF32 if mode else 0)
        assert flags == {"attention_forward": expected, "attention_backward": expected}


@needs_torch
def test_kv_parallelism_reaches_the_backward_pass(step, flags):
    import torch

    natten.use_kv_parallelism_in_fused_na()
    step().backward()
    assert flags["attention_backward"] == _args.HAS_SCALE | _args.NONDETERMINISTIC

    torch.use_deterministic_algorithms(True)
    try:
        step().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert flags["attention_backward"] == _args.HAS_SCALE

    natten.use_kv_parallelism_in_fused_na(False)
    step().backward()
    assert flags["attention_backward"] == _args.HAS_SCALE


@needs_torch
def test_switches_of_products_reach_unfused_operations(flags):
    import torch

    x = torch.randn(1, 2, 6, 4, requires_grad=True)
    for tf32, gemm in ((False, True), (True, True), (False, False), (True, False)):
        flags.clear()
        natten.use_tf32_in_gemm_na(tf32)
        natten.use_gemm_na(gemm)
        attn = natten.functional.na1d_qk(x, x, 3)
        natten.functional.na1d_av(attn, x, 3).sum().backward()
        expected = (_args.ALLOW_TF32 if tf32 else 0) | (0 if gemm else _args.NO_GEMM)
        assert set(flags) == {"qk", "av", "av_transpose"}
        assert {f & ~_args.EMPTY_SLOTS_ZERO for f in flags.values()} == {expected}


# ---- JAX ----


def gradient(backend=None):
    import jax

    import natten.jax as nj

    return jax.jit(jax.grad(lambda x: nj.na2d(x, x, x, 3, backend=backend).astype("float32").sum()))


def array():
    import jax

    return jax.ShapeDtypeStruct(*TOKENS)


def lowered(platforms, backend=None):
    return gradient(backend).trace(array()).lower(lowering_platforms=platforms).as_text()


@needs_jax
def test_switches_of_products_reach_unfused_operations_of_jax():
    import jax

    import natten.jax as nj

    for tf32, gemm in ((False, True), (True, False)):
        natten.use_tf32_in_gemm_na(tf32)
        natten.use_gemm_na(gemm)
        qk = jax.make_jaxpr(lambda x: nj.na1d_qk(x, x, 3))(np.ones((1, 2, 6, 4), "float32"))
        (config,) = re.findall(r"config=\(([^)]*)\)", str(qk))
        expected = (_args.ALLOW_TF32 if tf32 else 0) | (0 if gemm else _args.NO_GEMM)
        assert int(config.split(",")[-1]) == expected


@needs_jax
@without_kernels
def test_jax_without_kernels():
    from jax import export

    assert "custom_call" not in lowered(("cuda",))
    assert lowered(("cpu", "cuda")).count("@natten.jax.custom_call_targets") == 2
    assert export.export(gradient(), platforms=("cuda",))(array()).platforms == ("cuda",)
    with pytest.raises(ValueError, match=r"are on cuda.*-DNATTEN_WITH_CUDA=ON"):
        lowered(("cuda",), "naive")


@needs_jax
@without_kernels
def test_jax_registers_what_a_build_with_kernels_offers():
    code = """
from natten import _core
offered = _core.xla_ffi_handlers
_core.xla_ffi_handlers = lambda: {**offered(), "cuda": offered()["cpu"]}
import jax, natten.jax
from jax import numpy as jnp
x = jnp.ones((1, 5, 2, 4))
assert jax.jit(lambda x: natten.jax.na1d(x, x, x, kernel_size=3))(x).shape == x.shape
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_jax
@with_kernels
def test_jax_lowers_for_cuda():
    import jax
    from jax import export

    import natten.jax as nj

    assert lowered(("cuda",)).count("@natten.jax.custom_call_targets") == 2
    assert lowered(("cpu", "cuda")).count("@natten.jax.custom_call_targets") == 4
    assert 'backend = "simt"' in lowered(("cuda",), "simt")
    with pytest.raises(ValueError, match='"simt"; must be one of vectorized, naive'):
        lowered(("cpu",), "simt")
    with pytest.raises(ValueError, match='"naive"; must be one of fna, gemm, simt'):
        lowered(("cuda",), "naive")
    x = array()
    tangent = jax.jit(
        lambda x, t: jax.jvp(partial(nj.na2d, kernel_size=3, autodiff="any"), 3 * (x,), 3 * (t,))
    )
    text = tangent.trace(x, x).lower(lowering_platforms=("cuda",)).as_text()
    assert 'op = "av"' in text, "composed operations"
    checks = [export.DisabledSafetyCheck.custom_call(t) for t in nj.custom_call_targets()]
    program = export.export(gradient(), platforms=("cuda",), disabled_checks=checks)(array())
    assert program.platforms == ("cuda",)
    assert program.mlir_module().count("@natten.jax.custom_call_targets") == 2


@needs_jax
def test_switches_are_read_when_jax_traces():
    import jax

    def flags():
        return {
            eqn.params["setup"].config[-1]
            for eqn in jax.make_jaxpr(gradient().__wrapped__)(array()).eqns
            if "setup" in eqn.params
        }

    natten.use_kv_parallelism_in_fused_na()
    assert flags() == {_args.NONDETERMINISTIC}
    natten.use_kv_parallelism_in_fused_na(False)
    natten.use_tf32_in_gemm_na()
    assert flags() == {_args.ALLOW_TF32}
    natten.use_tf32_in_gemm_na(False)
    assert flags() == {0}
