"""Process-wide switches, and what the CUDA device can do.

`use_fused_na` makes the PyTorch modules use the fused operation; KV parallelism lets a backend
trade determinism for speed. All other switches are preferences for kernels of NATTEN's history or
for devices: they are remembered and can be read back, and the CPU kernels have no use for them.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from natten import _core
from natten._log import logger


class MemoryUsagePreference(Enum):
    """How much memory KV parallelism may use."""

    Default = 0
    Strict = 1
    Unrestricted = 2


class _State:
    """The switches' values."""

    fused = False
    kv_parallelism = False
    deterministic = False
    memory = MemoryUsagePreference.Default
    autotuner_forward = False
    autotuner_backward = False
    autotuner_thorough_forward = False
    autotuner_thorough_backward = False
    gemm = True
    tiled = True
    tf32 = True


_told: set[str] = set()


def _say_unused(name: str) -> None:
    """Says once that a preference has no effect on this device."""
    if name not in _told:
        _told.add(name)
        logger.debug("%s: remembered; no kernel built here makes use of it", name)


def use_fused_na(mode: bool = True, kv_parallel: bool = False) -> None:
    """Makes NeighborhoodAttention modules use the fused operation (False: the unfused, default).

    `kv_parallel` as in `use_kv_parallelism_in_fused_na`; turning fused off turns it off too.
    """
    _State.fused = bool(mode)
    use_kv_parallelism_in_fused_na(bool(mode and kv_parallel))


def enable_fused_na() -> None:
    """`use_fused_na(True)`."""
    use_fused_na(True)


def disable_fused_na() -> None:
    """`use_fused_na(False)`."""
    use_fused_na(False)


def is_fused_na_enabled() -> bool:
    return _State.fused


use_fna = use_fused_na
is_fna_enabled = is_fused_na_enabled


def use_kv_parallelism_in_fused_na(mode: bool = True) -> None:
    """Allows a backward pass whose results differ from run to run in the last digits, where a
    backend is faster that way. Off by default. No effect on the CPU.

    Raises:
        RuntimeError: deterministic algorithms were asked for.
    """
    if mode and _State.deterministic:
        raise RuntimeError(
            "KV parallelism is not deterministic, and use_deterministic_algorithms is on; "
            "turn that off first"
        )
    if mode:
        _say_unused("KV parallelism")
    _State.kv_parallelism = bool(mode)


def is_kv_parallelism_in_fused_na_enabled() -> bool:
    return _State.kv_parallelism


def set_memory_usage_preference(pref: str = "default") -> None:
    """How much memory KV parallelism may use: "default", "strict" or "unrestricted".

    Raises:
        ValueError: any other word.
    """
    for known in MemoryUsagePreference:
        if pref == known.name.lower():
            _State.memory = known
            _say_unused("memory usage preference")
            return
    raise ValueError(f'pref: got {pref!r}; must be "default", "strict" or "unrestricted"')


def get_memory_usage_preference() -> MemoryUsagePreference:
    return _State.memory


def is_memory_usage_default() -> bool:
    return _State.memory is MemoryUsagePreference.Default


def is_memory_usage_strict() -> bool:
    return _State.memory is MemoryUsagePreference.Strict


def is_memory_usage_unrestricted() -> bool:
    return _State.memory is MemoryUsagePreference.Unrestricted


def use_deterministic_algorithms(mode: bool = True) -> None:
    """Forbids KV parallelism. Everything else is deterministic anyway."""
    _State.deterministic = bool(mode)
    if mode:
        _State.kv_parallelism = False


def are_deterministic_algorithms_enabled() -> bool:
    return _State.deterministic


def use_autotuner(
    forward_pass: bool | None = None,
    backward_pass: bool | None = None,
    thorough_mode_forward: bool | None = None,
    thorough_mode_backward: bool | None = None,
    **steps: Any,
) -> None:
    """Remembers whether tile shapes should be tuned; None leaves a setting. There is no tuning yet.

    `steps` takes warmup_steps_forward, warmup_steps_backward, steps_forward, steps_backward.
    """
    known = {
        "warmup_steps_forward",
        "warmup_steps_backward",
        "steps_forward",
        "steps_backward",
    }
    if unknown := steps.keys() - known:
        raise TypeError(f"use_autotuner: unknown arguments {sorted(unknown)}; known: {known}")
    for name, value in (
        ("autotuner_forward", forward_pass),
        ("autotuner_backward", backward_pass),
        ("autotuner_thorough_forward", thorough_mode_forward),
        ("autotuner_thorough_backward", thorough_mode_backward),
    ):
        if value is not None:
            setattr(_State, name, bool(value))
            _say_unused("autotuner")


def disable_autotuner() -> None:
    use_autotuner(False, False, False, False)


def is_autotuner_enabled() -> bool:
    return _State.autotuner_forward or _State.autotuner_backward


def is_autotuner_enabled_for_forward() -> bool:
    return _State.autotuner_forward


def is_autotuner_enabled_for_backward() -> bool:
    return _State.autotuner_backward


def is_autotuner_thorough_for_forward() -> bool:
    return _State.autotuner_thorough_forward


def is_autotuner_thorough_for_backward() -> bool:
    return _State.autotuner_thorough_backward


def use_gemm_na(mode: bool = True) -> None:
    _State.gemm = bool(mode)
    _say_unused("gemm_na")


def enable_gemm_na() -> None:
    use_gemm_na(True)


def disable_gemm_na() -> None:
    use_gemm_na(False)


def is_gemm_na_enabled() -> bool:
    return _State.gemm


def use_tiled_na(mode: bool = True) -> None:
    _State.tiled = bool(mode)
    _say_unused("tiled_na")


def enable_tiled_na() -> None:
    use_tiled_na(True)


def disable_tiled_na() -> None:
    use_tiled_na(False)


def is_tiled_na_enabled() -> bool:
    return _State.tiled


def use_tf32_in_gemm_na(mode: bool = True) -> None:
    _State.tf32 = bool(mode)
    _say_unused("tf32_in_gemm_na")


def enable_tf32() -> None:
    use_tf32_in_gemm_na(True)


def disable_tf32() -> None:
    use_tf32_in_gemm_na(False)


def is_tf32_in_gemm_na_enabled() -> bool:
    return _State.tf32


def get_device_cc(device_index: Any = None) -> int:
    """Compute capability of a CUDA device (80 for 8.0); 0 without one. Never raises."""
    try:
        import torch

        major, minor = torch.cuda.get_device_capability(device_index)
    except Exception:  # no torch, no CUDA in it, no driver, no such device
        return 0
    return 10 * major + minor


def has_cuda() -> bool:
    """Whether CUDA kernels were built and a CUDA device is there. Never raises."""
    return bool(_core.backends("cuda")) and get_device_cc() > 0


def _has(minimum_cc: int, device_index: Any) -> bool:
    return bool(_core.backends("cuda")) and get_device_cc(device_index) >= minimum_cc


def has_half(device_index: Any = None) -> bool:
    """Whether the CUDA device has float16 kernels."""
    return _has(80, device_index)


def has_bfloat(device_index: Any = None) -> bool:
    """Whether the CUDA device has bfloat16 kernels."""
    return _has(80, device_index)


def has_fna(device_index: Any = None) -> bool:
    """Whether the CUDA device has fused kernels."""
    return _has(80, device_index)


has_fused_na = has_fna


def has_gemm(device_index: Any = None) -> bool:
    """Whether the CUDA device has GEMM-based unfused kernels. There are none."""
    return False


has_tf32_gemm = has_fp32_gemm = has_fp64_gemm = has_gemm
