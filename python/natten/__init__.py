"""Neighborhood attention in 1, 2 and 3 dimensions.

`import natten` loads neither PyTorch nor JAX. PyTorch names (`natten.na2d`,
`natten.NeighborhoodAttention2D`, ...) load PyTorch when they are first used; JAX functions are in
`natten.jax`, Flax modules in `natten.flax`, functions on numpy arrays in `natten.numpy`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from natten import _core, _old_modules
from natten._clash import warn_of_clash
from natten._kernel import na_kernel
from natten._key_range import key_range
from natten._show_config import show_config
from natten._simulate import simulate
from natten.context import (
    allow_flex_compile,
    allow_flex_compile_backprop,
    are_deterministic_algorithms_enabled,
    disable_autotuner,
    disable_flex_compile,
    disable_flex_compile_backprop,
    disable_fused_na,
    disable_gemm_na,
    disable_tf32,
    disable_tiled_na,
    enable_fused_na,
    enable_gemm_na,
    enable_tf32,
    enable_tiled_na,
    get_memory_usage_preference,
    has_bfloat,
    has_cuda,
    has_fna,
    has_fp32_gemm,
    has_fp64_gemm,
    has_fused_na,
    has_gemm,
    has_half,
    has_tf32_gemm,
    is_autotuner_enabled,
    is_autotuner_enabled_for_backward,
    is_autotuner_enabled_for_forward,
    is_autotuner_thorough_for_backward,
    is_autotuner_thorough_for_forward,
    is_flex_compile_allowed,
    is_flex_compile_backprop_allowed,
    is_fna_enabled,
    is_fused_na_enabled,
    is_gemm_na_enabled,
    is_kv_parallelism_in_fused_na_enabled,
    is_memory_usage_default,
    is_memory_usage_strict,
    is_memory_usage_unrestricted,
    is_tf32_in_gemm_na_enabled,
    is_tiled_na_enabled,
    set_memory_usage_preference,
    use_autotuner,
    use_deterministic_algorithms,
    use_fna,
    use_fused_na,
    use_gemm_na,
    use_kv_parallelism_in_fused_na,
    use_tf32_in_gemm_na,
    use_tiled_na,
)

if TYPE_CHECKING:
    from natten.backends import (
        get_bwd_configs_for_cutlass_blackwell_fmha,
        get_bwd_configs_for_cutlass_blackwell_fna,
        get_bwd_configs_for_cutlass_fmha,
        get_bwd_configs_for_cutlass_fna,
        get_bwd_configs_for_cutlass_hopper_fmha,
        get_bwd_configs_for_cutlass_hopper_fna,
        get_configs_for_cutlass_blackwell_fmha,
        get_configs_for_cutlass_blackwell_fna,
        get_configs_for_cutlass_fmha,
        get_configs_for_cutlass_fna,
        get_configs_for_cutlass_hopper_fmha,
        get_configs_for_cutlass_hopper_fna,
        get_configs_for_flex_fmha,
        get_configs_for_flex_fna,
    )
    from natten.torch import (
        NeighborhoodAttention1D,
        NeighborhoodAttention2D,
        NeighborhoodAttention3D,
        attention,
        explain,
        explain_call,
        merge_attentions,
        na1d,
        na2d,
        na3d,
    )

__version__: str = _core.version

# NATTEN can be without its libnatten, which is for CUDA alone. Here that is a part of the package,
# for CPUs too. `has_cuda` tells whether a CUDA device can be used.
HAS_LIBNATTEN = True

warn_of_clash(__path__[0], __version__)
_old_modules.register()

_SUBMODULES = (
    "backends",
    "distributed",
    "flops",
    "functional",
    "modules",
    "profiler",
    "simulator",
    "token_permute",
    "types",
    "utils",
    "varlen",
)

# As attributes too, but not in `dir`, by which tools look at all that a module has.
_FRAMEWORKS = ("flax", "jax", "numpy")


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES or name in _FRAMEWORKS:
        return import_module(f"natten.{name}")
    if name not in _MODULE_OF:
        if module := sys.modules.get(f"natten.{name}"):  # one of the old ones
            return module
        raise AttributeError(f"module 'natten' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES, *_MODULE_OF})


__all__ = [
    "HAS_LIBNATTEN",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "__version__",
    "allow_flex_compile",
    "allow_flex_compile_backprop",
    "are_deterministic_algorithms_enabled",
    "attention",
    "disable_autotuner",
    "disable_flex_compile",
    "disable_flex_compile_backprop",
    "disable_fused_na",
    "disable_gemm_na",
    "disable_tf32",
    "disable_tiled_na",
    "enable_fused_na",
    "enable_gemm_na",
    "enable_tf32",
    "enable_tiled_na",
    "explain",
    "explain_call",
    "get_bwd_configs_for_cutlass_blackwell_fmha",
    "get_bwd_configs_for_cutlass_blackwell_fna",
    "get_bwd_configs_for_cutlass_fmha",
    "get_bwd_configs_for_cutlass_fna",
    "get_bwd_configs_for_cutlass_hopper_fmha",
    "get_bwd_configs_for_cutlass_hopper_fna",
    "get_configs_for_cutlass_blackwell_fmha",
    "get_configs_for_cutlass_blackwell_fna",
    "get_configs_for_cutlass_fmha",
    "get_configs_for_cutlass_fna",
    "get_configs_for_cutlass_hopper_fmha",
    "get_configs_for_cutlass_hopper_fna",
    "get_configs_for_flex_fmha",
    "get_configs_for_flex_fna",
    "get_memory_usage_preference",
    "has_bfloat",
    "has_cuda",
    "has_fna",
    "has_fp32_gemm",
    "has_fp64_gemm",
    "has_fused_na",
    "has_gemm",
    "has_half",
    "has_tf32_gemm",
    "is_autotuner_enabled",
    "is_autotuner_enabled_for_backward",
    "is_autotuner_enabled_for_forward",
    "is_autotuner_thorough_for_backward",
    "is_autotuner_thorough_for_forward",
    "is_flex_compile_allowed",
    "is_flex_compile_backprop_allowed",
    "is_fna_enabled",
    "is_fused_na_enabled",
    "is_gemm_na_enabled",
    "is_kv_parallelism_in_fused_na_enabled",
    "is_memory_usage_default",
    "is_memory_usage_strict",
    "is_memory_usage_unrestricted",
    "is_tf32_in_gemm_na_enabled",
    "is_tiled_na_enabled",
    "key_range",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "na_kernel",
    "set_memory_usage_preference",
    "show_config",
    "simulate",
    "use_autotuner",
    "use_deterministic_algorithms",
    "use_fna",
    "use_fused_na",
    "use_gemm_na",
    "use_kv_parallelism_in_fused_na",
    "use_tf32_in_gemm_na",
    "use_tiled_na",
]

# The names of these that load PyTorch, by the module that has them.
_MODULE_OF = {
    name: "natten.backends" if "_configs_for_" in name else "natten.torch"
    for name in __all__
    if name not in globals()
}
