"""Process-wide switches, and what the CUDA device can do.

`use_fused_na` makes the PyTorch modules use the fused operation; KV parallelism lets a CUDA backend
trade determinism for speed, TF32 precision; `use_gemm_na` says whether unfused operations may run
on tensor cores; `use_autotuner` has problems timed. All other switches are preferences for kernels
of NATTEN's history: they are remembered and can be read back, no kernel has a use for them, and the
logger `natten` says so once, at debug level.

A switch holds for the whole process: every thread sees it at once, and there is no lock. Set
switches before starting threads that run models.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import sys
from dataclasses import dataclass
from enum import Enum
from typing import Any

from natten import _core
from natten._log import logger


class MemoryUsagePreference(Enum):
    """How much memory KV parallelism may use."""

    Default = 0
    Strict = 1
    Unrestricted = 2


@dataclass
class _Autotuner:
    """Arguments of `use_autotuner`."""

    forward_pass: bool = False
    backward_pass: bool = False
    thorough_mode_forward: bool = False
    thorough_mode_backward: bool = False
    warmup_steps_forward: int = 5
    warmup_steps_backward: int = 5
    steps_forward: int = 5
    steps_backward: int = 5


@dataclass
class _Switches:
    """The switches' values."""

    fused: bool = False
    kv_parallelism: bool = False
    deterministic: bool = False
    memory: MemoryUsagePreference = MemoryUsagePreference.Default
    gemm: bool = True
    tiled: bool = True
    tf32: bool = False
    flex_compile: bool = False
    flex_compile_backprop: bool = False
    tuning: bool = False  # whether the tuner is on in any way, for either pass


_switches = _Switches()
_autotuner = _Autotuner()
# libnatten reads it too, and refuses other words. use_autotuner beats it.
_mode = os.environ.get("NATTEN_TUNE", "")
_switches.tuning = _mode in ("read", "record", "tune")
_autotuner.forward_pass = _autotuner.backward_pass = _mode == "tune"
_told: set[str] = set()


def _say_unused(name: str) -> None:
    """Says once that a preference has no effect."""
    if name not in _told:
        _told.add(name)
        logger.debug("%s: remembered; no kernel built here makes use of it", name)


def _may_enable(name: str) -> bool:
    """Whether a feature that is not deterministic may be switched on.

    PyTorch's deterministic mode, which belongs to the whole program, has it ignored with a warning;
    natten's own, which the caller chose, makes it an error.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.are_deterministic_algorithms_enabled():
        logger.warning(
            "%s: ignored; it is not deterministic, and torch.use_deterministic_algorithms is on",
            name,
        )
        return False
    if _switches.deterministic:
        raise RuntimeError(
            f"{name} is not deterministic, and natten.use_deterministic_algorithms is on; turn "
            "that off first"
        )
    return True


def use_fused_na(mode: bool = True, kv_parallel: bool = False) -> None:
    """Makes NeighborhoodAttention modules use the fused operation (False: the unfused, default).

    `kv_parallel` as in `use_kv_parallelism_in_fused_na`; turning fused off turns it off too.

    Raises:
        RuntimeError: as `use_kv_parallelism_in_fused_na`; nothing is switched then.
    """
    use_kv_parallelism_in_fused_na(bool(mode and kv_parallel))
    _switches.fused = bool(mode)


def enable_fused_na() -> bool:
    """`use_fused_na(True)`. Returns the resulting state, as all `enable_` and `disable_` do."""
    use_fused_na(True)
    return is_fused_na_enabled()


def disable_fused_na() -> bool:
    """`use_fused_na(False)`."""
    use_fused_na(False)
    return is_fused_na_enabled()


def is_fused_na_enabled() -> bool:
    """Whether modules use the fused operation."""
    return _switches.fused


use_fna = use_fused_na
is_fna_enabled = is_fused_na_enabled


def use_kv_parallelism_in_fused_na(mode: bool = True) -> None:
    """Allows a backward pass whose results differ from run to run in the last digits, where a
    backend for CUDA is faster that way. Off by default. No effect on the CPU. A backward pass does
    as its forward pass was told; JAX reads the switch when it traces a function.

    Ignored with a warning while `torch.use_deterministic_algorithms` is on.

    Raises:
        RuntimeError: `natten.use_deterministic_algorithms` is on.
    """
    if mode and not _may_enable("KV parallelism"):
        return
    if mode and not _core.backends("cuda"):
        _say_unused("KV parallelism")
    _switches.kv_parallelism = bool(mode)


def is_kv_parallelism_in_fused_na_enabled() -> bool:
    """Whether backward passes on CUDA may be ones that are not deterministic."""
    return _switches.kv_parallelism


def set_memory_usage_preference(pref: str = "default") -> None:
    """How much memory KV parallelism may use: "default", "strict" or "unrestricted".

    Raises:
        ValueError: any other word.
    """
    for known in MemoryUsagePreference:
        if pref == known.name.lower():
            _switches.memory = known
            _say_unused("memory usage preference")
            return
    raise ValueError(f'pref: got {pref!r}; must be "default", "strict" or "unrestricted"')


def get_memory_usage_preference() -> MemoryUsagePreference:
    """What `set_memory_usage_preference` was given last."""
    return _switches.memory


def is_memory_usage_default() -> bool:
    """Whether `set_memory_usage_preference` was given "default", as is the case at first."""
    return _switches.memory is MemoryUsagePreference.Default


def is_memory_usage_strict() -> bool:
    """Whether `set_memory_usage_preference` was given "strict"."""
    return _switches.memory is MemoryUsagePreference.Strict


def is_memory_usage_unrestricted() -> bool:
    """Whether `set_memory_usage_preference` was given "unrestricted"."""
    return _switches.memory is MemoryUsagePreference.Unrestricted


def use_deterministic_algorithms(mode: bool = True) -> None:
    """Forbids KV parallelism and autotuning, and turns them off. All else is deterministic."""
    _switches.deterministic = bool(mode)
    if mode:
        use_kv_parallelism_in_fused_na(False)
        disable_autotuner()


def are_deterministic_algorithms_enabled() -> bool:
    """Whether `natten.use_deterministic_algorithms` is on; it does not ask PyTorch."""
    return _switches.deterministic


def use_autotuner(
    forward_pass: bool | None = None,
    backward_pass: bool | None = None,
    thorough_mode_forward: bool | None = None,
    thorough_mode_backward: bool | None = None,
    warmup_steps_forward: int | None = None,
    warmup_steps_backward: int | None = None,
    steps_forward: int | None = None,
    steps_backward: int | None = None,
) -> None:
    """Has the first call of each problem time the configurations that its backend offers, and all
    calls after it run with the fastest. None leaves a setting; forward and backward passes have
    their own. Beats NATTEN_TUNE. What is found is kept in the process and, where NATTEN_CACHE_DIR
    names a folder, there too.

    While a graph is traced or captured, in what torch.compile and JAX have compiled, and on all
    ranks of a torch.distributed group but the first nothing is timed: what is known is used.

    Ignored with a warning while `torch.use_deterministic_algorithms` is on, when nothing tuned is
    used either.

    Args:
        forward_pass, backward_pass: whether that pass is tuned.
        thorough_mode_forward, thorough_mode_backward: more configurations, and 10 seconds a problem
            in place of 2.
        warmup_steps_forward, warmup_steps_backward: runs of a configuration that are not timed.
        steps_forward, steps_backward: turns in which each configuration is timed.

    Raises:
        RuntimeError: tuning enabled while `natten.use_deterministic_algorithms` is on.
        TypeError: a switch that is no bool, or a number of steps that is no integer.
    """
    settings = {name: value for name, value in locals().items() if value is not None}
    for name, value in settings.items():
        if type(getattr(_autotuner, name)) is bool:
            if not isinstance(value, bool):
                raise TypeError(f"{name}: got {value!r}; must be a bool or None")
        elif isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{name}: got {value!r}; must be an integer or None")
    if (forward_pass or backward_pass) and not _may_enable("autotuner"):
        return
    for name, value in settings.items():
        setattr(_autotuner, name, type(getattr(_autotuner, name))(value))
    a = _autotuner
    _core.set_tuning(
        _mode_of(forward_pass),
        _mode_of(backward_pass),
        _limits(a.warmup_steps_forward, a.steps_forward, a.thorough_mode_forward),
        _limits(a.warmup_steps_backward, a.steps_backward, a.thorough_mode_backward),
    )
    _switches.tuning = _core.tuning()[:2] != ("off", "off")


def _mode_of(enabled: bool | None) -> str | None:
    return None if enabled is None else "tune" if enabled else "off"


def _limits(warmup_steps: int, steps: int, thorough: bool) -> tuple[int, int, float, bool]:
    most = 10_000  # more take longer than there is time
    return min(warmup_steps, most), min(steps, most), 10.0 if thorough else 2.0, thorough


def tell_tuning_notes() -> None:
    """Logs what the tuner has to say: what it cannot write as a warning, files that it ignores at
    debug level."""
    for is_warning, text in _core.tuning_notes():
        logger.log(logging.WARNING if is_warning else logging.DEBUG, "%s", text)


atexit.register(tell_tuning_notes)  # of the last call


def disable_autotuner() -> None:
    """`use_autotuner(False, False)`, the default, without thorough modes."""
    use_autotuner(False, False, False, False)


def is_autotuner_enabled() -> bool:
    """Whether either pass is tuned, by `use_autotuner` or NATTEN_TUNE=tune."""
    return _autotuner.forward_pass or _autotuner.backward_pass


def is_autotuner_enabled_for_forward() -> bool:
    """Whether forward passes are tuned."""
    return _autotuner.forward_pass


def is_autotuner_enabled_for_backward() -> bool:
    """Whether backward passes are tuned."""
    return _autotuner.backward_pass


def is_autotuner_thorough_for_forward() -> bool:
    """Whether the tuner takes more time for forward passes."""
    return _autotuner.thorough_mode_forward


def is_autotuner_thorough_for_backward() -> bool:
    """Whether the tuner takes more time for backward passes."""
    return _autotuner.thorough_mode_backward


def use_gemm_na(mode: bool = True) -> None:
    """Allows unfused operations on a CUDA device's tensor cores, by the backend "gemm". On by
    default; when off, they run on "simt", which computes the same without them. No effect on the
    CPU. A backward pass does as its forward pass was told; JAX reads the switch when it traces a
    function.
    """
    if not _core.backends("cuda"):
        _say_unused("gemm_na")
    _switches.gemm = bool(mode)


def enable_gemm_na() -> bool:
    """`use_gemm_na(True)`. Returns the resulting state."""
    use_gemm_na(True)
    return is_gemm_na_enabled()


def disable_gemm_na() -> bool:
    """`use_gemm_na(False)`. Returns the resulting state."""
    use_gemm_na(False)
    return is_gemm_na_enabled()


def is_gemm_na_enabled() -> bool:
    """Whether unfused operations may run on tensor cores."""
    return _switches.gemm


def use_tiled_na(mode: bool = True) -> None:
    """Remembers whether tiled kernels may be used. No effect here."""
    _switches.tiled = bool(mode)
    _say_unused("tiled_na")


def enable_tiled_na() -> bool:
    """`use_tiled_na(True)`. Returns the resulting state."""
    use_tiled_na(True)
    return is_tiled_na_enabled()


def disable_tiled_na() -> bool:
    """`use_tiled_na(False)`. Returns the resulting state."""
    use_tiled_na(False)
    return is_tiled_na_enabled()


def is_tiled_na_enabled() -> bool:
    """What `use_tiled_na` was given last; it has no effect."""
    return _switches.tiled


def use_tf32_in_gemm_na(mode: bool = True) -> None:
    """Allows operations on float32 to multiply in TF32, on tensor cores of a CUDA device. Off by
    default. No effect on the CPU. A backward pass does as its forward pass was told; JAX reads
    the switch when it traces a function.

    What is multiplied is rounded to 11 significant bits, as many as float16 has; range, sums and
    results stay those of float32. Head dims over 128 remain in float32, and so do unfused
    operations while `use_gemm_na` is off.
    """
    if mode and not _core.backends("cuda"):
        _say_unused("TF32")
    _switches.tf32 = bool(mode)


def enable_tf32() -> bool:
    """`use_tf32_in_gemm_na(True)`. Returns the resulting state."""
    use_tf32_in_gemm_na(True)
    return is_tf32_in_gemm_na_enabled()


def disable_tf32() -> bool:
    """`use_tf32_in_gemm_na(False)`. Returns the resulting state."""
    use_tf32_in_gemm_na(False)
    return is_tf32_in_gemm_na_enabled()


def is_tf32_in_gemm_na_enabled() -> bool:
    """Whether operations on float32 may multiply in TF32."""
    return _switches.tf32


def allow_flex_compile(mode: bool = True, backprop: bool = False) -> None:
    """Remembers whether FlexAttention may be compiled, and with `backprop` for derivatives too. No
    effect here: nothing is computed by FlexAttention."""
    _switches.flex_compile = bool(mode)
    _switches.flex_compile_backprop = bool(mode and backprop)
    _say_unused("flex_compile")


def allow_flex_compile_backprop(mode: bool = True) -> None:
    """The second switch of `allow_flex_compile` alone, which stays off while the first is off."""
    allow_flex_compile(_switches.flex_compile, mode)


def disable_flex_compile() -> None:
    """`allow_flex_compile(False)`."""
    allow_flex_compile(False)


def disable_flex_compile_backprop() -> None:
    """`allow_flex_compile_backprop(False)`."""
    allow_flex_compile_backprop(False)


def is_flex_compile_allowed() -> bool:
    """What `allow_flex_compile` was given last; it has no effect."""
    return _switches.flex_compile


def is_flex_compile_backprop_allowed() -> bool:
    """What `allow_flex_compile` was given last for derivatives; it has no effect."""
    return _switches.flex_compile_backprop


def get_device_cc(device_index: Any = None) -> int:
    """Compute capability of a CUDA device (80 for 8.0); 0 without one. Never raises.

    Args:
        device_index: a number, "cuda", "cuda:0" or such a torch.device; None is the current device.
    """
    if _core.backends("cuda"):
        name = "" if device_index is None else str(device_index)
        found = re.fullmatch(r"(?:cuda)?:?(\d{0,4})", name)
        return _core.compute_capability(int(found[1] or -1)) if found else 0
    try:  # kernels or not, PyTorch may know
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
    """Whether the CUDA device has unfused kernels for tensor cores."""
    return _has(80, device_index)


def has_tf32_gemm(device_index: Any = None) -> bool:
    """Whether the CUDA device has kernels that multiply float32 in TF32, fused and unfused."""
    return _has(80, device_index)


def has_fp32_gemm(device_index: Any = None) -> bool:
    """Whether tensor cores multiply float32 without rounding it. There are none that can."""
    return False


def has_fp64_gemm(device_index: Any = None) -> bool:
    """Whether there are kernels for tensor cores on float64. There are none."""
    return False
