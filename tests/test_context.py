"""Switches and environment checks: names, values, determinism."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from dataclasses import fields

import pytest
from test_package import run_python

import natten
from natten import _args, _core, context

SWITCHES = str.split("""
    use_fused_na enable_fused_na disable_fused_na is_fused_na_enabled use_fna is_fna_enabled
    use_autotuner disable_autotuner is_autotuner_enabled is_autotuner_enabled_for_forward
    is_autotuner_enabled_for_backward is_autotuner_thorough_for_forward
    is_autotuner_thorough_for_backward
    use_kv_parallelism_in_fused_na is_kv_parallelism_in_fused_na_enabled
    set_memory_usage_preference get_memory_usage_preference is_memory_usage_default
    is_memory_usage_strict is_memory_usage_unrestricted
    use_deterministic_algorithms are_deterministic_algorithms_enabled
    has_cuda has_half has_bfloat has_fna has_fused_na has_gemm has_tf32_gemm has_fp32_gemm
    has_fp64_gemm
    use_gemm_na is_gemm_na_enabled enable_gemm_na disable_gemm_na
    use_tiled_na is_tiled_na_enabled enable_tiled_na disable_tiled_na
    use_tf32_in_gemm_na is_tf32_in_gemm_na_enabled enable_tf32 disable_tf32
""")
OPERATIONS = str.split("""
    NeighborhoodAttention1D NeighborhoodAttention2D NeighborhoodAttention3D na1d na2d na3d attention
    merge_attentions explain explain_call na_kernel
""")
# What published snippets import from natten.functional.
FUNCTIONAL = str.split("""
    na1d na2d na3d na1d_qk na1d_av na2d_qk na2d_av na3d_qk na3d_av
    has_cuda has_half has_bfloat has_fna has_gemm has_tf32_gemm has_fp32_gemm has_fp64_gemm
    disable_gemm_na enable_gemm_na disable_tiled_na enable_tiled_na
""")
HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="needs PyTorch")


@pytest.fixture(autouse=True)
def default_switches(monkeypatch):
    """Every test starts with the default switches, and what it switched is undone."""
    for name in ("_switches", "_autotuner"):
        monkeypatch.setattr(context, name, type(getattr(context, name))())
    monkeypatch.setattr(context, "_told", set())
    yield
    _core.set_tuning("off", "off")


@pytest.fixture
def deterministic_torch():
    """PyTorch's deterministic mode is on."""
    torch = pytest.importorskip("torch")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", SWITCHES)
def test_switch_is_where_it_is_expected(name):
    assert getattr(natten, name) is getattr(context, name)
    assert name in natten.__all__


@needs_torch
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_is_where_it_is_expected(name):
    assert callable(getattr(natten, name))
    assert name in natten.__all__


@needs_torch
@pytest.mark.parametrize("name", FUNCTIONAL)
def test_function_is_where_it_is_expected(name):
    functional = importlib.import_module("natten.functional")
    assert callable(getattr(functional, name))
    assert getattr(natten, name, getattr(functional, name)) is getattr(functional, name)


def test_switches_start_at_their_defaults():
    """In a fresh process, whatever other tests have switched."""
    code = f"""
import natten
for name in {[name for name in SWITCHES if name.startswith(("is_", "are_"))]}:
    if getattr(natten, name)():
        print(name)
"""
    on = run_python(code).split()
    assert on == [
        "is_memory_usage_default",
        "is_gemm_na_enabled",
        "is_tiled_na_enabled",
    ]


@pytest.mark.parametrize(
    "use, enable, disable, read",
    [
        ("use_fused_na", "enable_fused_na", "disable_fused_na", "is_fused_na_enabled"),
        ("use_gemm_na", "enable_gemm_na", "disable_gemm_na", "is_gemm_na_enabled"),
        ("use_tiled_na", "enable_tiled_na", "disable_tiled_na", "is_tiled_na_enabled"),
        ("use_tf32_in_gemm_na", "enable_tf32", "disable_tf32", "is_tf32_in_gemm_na_enabled"),
    ],
)
def test_on_and_off(use, enable, disable, read):
    use, enable, disable, read = (getattr(natten, name) for name in (use, enable, disable, read))
    use(False)
    assert read() is False
    use()
    assert read() is True
    assert disable() is False and read() is False
    assert enable() is True and read() is True
    assert natten.is_fna_enabled() == natten.is_fused_na_enabled()


def test_fused_switches_kv_parallelism():
    natten.use_fused_na()
    assert not natten.is_kv_parallelism_in_fused_na_enabled()
    natten.use_fused_na(kv_parallel=True)
    assert natten.is_kv_parallelism_in_fused_na_enabled()
    natten.use_fused_na(True)
    assert not natten.is_kv_parallelism_in_fused_na_enabled()
    natten.use_kv_parallelism_in_fused_na()
    assert natten.is_kv_parallelism_in_fused_na_enabled()
    natten.use_fused_na(False, kv_parallel=True)
    assert not natten.is_kv_parallelism_in_fused_na_enabled()


def test_memory_usage_preference():
    for pref in ("strict", "unrestricted", "default"):
        natten.set_memory_usage_preference(pref)
        assert natten.get_memory_usage_preference().name.lower() == pref
        for other in ("strict", "unrestricted", "default"):
            assert getattr(natten, f"is_memory_usage_{other}")() is (pref == other)
    with pytest.raises(ValueError, match="pref: got 'lavish'"):
        natten.set_memory_usage_preference("lavish")
    assert natten.is_memory_usage_default()


def autotuner() -> tuple[bool, ...]:
    return (
        natten.is_autotuner_enabled(),
        natten.is_autotuner_enabled_for_forward(),
        natten.is_autotuner_enabled_for_backward(),
        natten.is_autotuner_thorough_for_forward(),
        natten.is_autotuner_thorough_for_backward(),
    )


def test_autotuner():
    natten.use_autotuner(True)
    assert autotuner() == (True, True, False, False, False)
    natten.use_autotuner(backward_pass=True, thorough_mode_backward=True)
    assert autotuner() == (True, True, True, False, True)
    natten.use_autotuner(False, None, True, False)
    assert autotuner() == (True, False, True, True, False)
    natten.use_autotuner(False, False)
    assert autotuner() == (False, False, False, True, False)
    natten.disable_autotuner()
    assert autotuner() == (False, False, False, False, False)
    natten.use_autotuner(None, None, None, None, 1, 2, 3, 4)  # NATTEN's order
    assert [getattr(context._autotuner, field.name) for field in fields(context._autotuner)] == [
        False, False, False, False, 1, 2, 3, 4,
    ]  # fmt: skip
    with pytest.raises(TypeError, match="nonsense"):
        natten.use_autotuner(nonsense=3)


NONDETERMINISTIC = [
    (lambda: natten.use_kv_parallelism_in_fused_na(), "KV parallelism"),
    (lambda: natten.use_fused_na(True, kv_parallel=True), "KV parallelism"),
    (lambda: natten.use_autotuner(True, False), "autotuner"),
    (lambda: natten.use_autotuner(backward_pass=True, thorough_mode_backward=True), "autotuner"),
]


@pytest.mark.parametrize("switch, name", NONDETERMINISTIC)
def test_own_deterministic_mode_refuses(switch, name):
    natten.use_deterministic_algorithms()
    with pytest.raises(RuntimeError, match=f"{name} is not deterministic.*turn that off first"):
        switch()
    assert context._switches == context._Switches(deterministic=True)
    assert context._autotuner == context._Autotuner()
    natten.use_kv_parallelism_in_fused_na(False)
    natten.use_autotuner(False, False)

    natten.use_deterministic_algorithms(False)
    switch()
    assert natten.is_kv_parallelism_in_fused_na_enabled() or natten.is_autotuner_enabled()


def test_own_deterministic_mode_turns_off_what_is_not():
    natten.use_fused_na(kv_parallel=True)
    natten.use_autotuner(True, True, True, True)
    natten.use_deterministic_algorithms()
    assert natten.are_deterministic_algorithms_enabled()
    assert natten.is_fused_na_enabled()
    assert not natten.is_kv_parallelism_in_fused_na_enabled()
    assert autotuner() == (False, False, False, False, False)


@pytest.mark.parametrize("switch, name", NONDETERMINISTIC)
def test_deterministic_torch_has_it_ignored(switch, name, deterministic_torch, caplog):
    with caplog.at_level(logging.WARNING, logger="natten"):
        switch()
    assert not natten.is_kv_parallelism_in_fused_na_enabled()
    assert autotuner() == (False, False, False, False, False)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.name == "natten"
    assert record.getMessage().startswith(f"{name}: ignored")
    assert "torch.use_deterministic_algorithms" in record.getMessage()


@needs_torch
@pytest.mark.parametrize("is_deterministic", [False, True])
def test_deterministic_torch_goes_before_kv_parallelism(is_deterministic, monkeypatch):
    import torch

    run, flags = _core.run, []
    monkeypatch.setattr(
        _core, "run", lambda *args: flags.append(args[1][-1] & _args.NONDETERMINISTIC) or run(*args)
    )
    natten.use_kv_parallelism_in_fused_na()
    torch.use_deterministic_algorithms(is_deterministic)
    try:
        natten.na1d(*[torch.zeros(1, 4, 1, 1)] * 3, kernel_size=3)
    finally:
        torch.use_deterministic_algorithms(False)
    assert flags == [0 if is_deterministic else _args.NONDETERMINISTIC]


def test_deterministic_torch_lets_fused_be_switched(deterministic_torch, caplog):
    natten.use_fused_na(True, kv_parallel=True)
    assert natten.is_fused_na_enabled()
    caplog.clear()
    natten.use_fused_na(False)
    natten.disable_autotuner()
    assert not natten.is_fused_na_enabled()
    assert not caplog.records


without_kernels = pytest.mark.skipif(
    bool(_core.backends("cuda")), reason="for builds without CUDA kernels"
)


@pytest.mark.parametrize(
    "switch",
    [
        lambda: natten.disable_tiled_na(),
        lambda: natten.set_memory_usage_preference("strict"),
        pytest.param(lambda: natten.use_gemm_na(False), marks=without_kernels),
        pytest.param(lambda: natten.enable_tf32(), marks=without_kernels),
        pytest.param(lambda: natten.use_kv_parallelism_in_fused_na(), marks=without_kernels),
    ],
)
def test_preference_without_effect_says_so_once(switch, caplog):
    with caplog.at_level(logging.DEBUG, logger="natten"):
        switch()
        switch()
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG and record.name == "natten"
    assert "remembered" in record.getMessage()


def test_switch_with_effect_says_nothing(caplog):
    with caplog.at_level(logging.DEBUG, logger="natten"):
        natten.use_fused_na()
        natten.use_autotuner(True)
        natten.use_deterministic_algorithms()
    assert not caplog.records


CHECKS = [name for name in SWITCHES if name.startswith("has_") and name != "has_cuda"]


@pytest.mark.parametrize("device", [None, 0, 99, -5, "cuda:0", "cpu", "nonsense", object()])
def test_environment_checks_never_raise(device):
    cc = context.get_device_cc(device)
    assert isinstance(cc, int) and cc >= 0
    for name in CHECKS:
        assert isinstance(getattr(natten, name)(device), bool)
        if cc == 0:
            assert not getattr(natten, name)(device)


def test_environment_checks_agree():
    assert isinstance(natten.has_cuda(), bool)
    if not natten.has_cuda():
        assert not any(getattr(natten, name)() for name in CHECKS)
    assert context.get_device_cc() == context.get_device_cc(None)


@needs_torch
@pytest.mark.skipif(bool(_core.backends("cuda")), reason="natten asks the driver itself")
def test_capability_is_what_torch_knows(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_capability", {None: (8, 6), 1: (10, 3)}.get)
    assert (context.get_device_cc(), context.get_device_cc(1)) == (86, 103)


def test_environment_checks_without_torch():
    code = """
import sys
sys.modules["torch"] = None  # importing it fails
import natten, natten.utils
print(natten.utils.get_device_cc(), natten.utils.get_device_cc(0), natten.has_cuda())
natten.use_autotuner(True)
"""
    assert run_python(code).split() == ["0", "0", "False"]
