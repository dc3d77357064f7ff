"""Makes libnatten's handler known to XLA."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jaxlib

from natten import _core

# All that errors of JAX and XLA say of a program that may not be exported, or runs in a process
# that did not import this module. So it is the name of what helps in both.
TARGET = "natten.jax.custom_call_targets"


def _offered_api_version() -> tuple[int, int] | None:
    """(major, minor) of the FFI that the installed jaxlib offers; None where it does not say."""
    try:
        header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    except OSError:
        return None
    numbers = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header))
    return (int(numbers["MAJOR"]), int(numbers["MINOR"])) if len(numbers) == 2 else None


def check_api_version(built: tuple[int, int], offered: tuple[int, int] | None) -> None:
    """Raises ImportError where the library was built for a newer FFI than jaxlib offers.

    Registering it regardless would keep JAX from starting at all. XLA runs handlers that were
    built for an older FFI of the same major version.
    """
    if offered is None or (built[0] == offered[0] and built[1] <= offered[1]):
        return
    raise ImportError(
        f"natten was built for version {built[0]}.{built[1]} of XLA's FFI, but jaxlib "
        f"{jaxlib.__version__} offers {offered[0]}.{offered[1]}. Install a newer jaxlib, or build "
        "natten with the headers of this one: pip install --no-binary natten natten "
        f"-Ccmake.define.XLA_FFI_INCLUDE_DIR={jax.ffi.include_dir()}"
    )


def _register() -> None:
    """Registers the handler of every platform that the library was built for."""
    if not hasattr(_core, "xla_ffi_handlers"):
        raise ImportError(
            "natten was built without support for JAX; build it with "
            "-Ccmake.define.NATTEN_WITH_XLA=ON"
        )
    check_api_version(_core.xla_ffi_api_version, _offered_api_version())
    for platform, handler in _core.xla_ffi_handlers().items():
        # XLA asks for handlers by its own name of the platform, lowering rules have JAX's.
        xla_name = {"cuda": "CUDA"}.get(platform, platform)
        jax.ffi.register_ffi_target(TARGET, handler, platform=xla_name)


_register()

# What the library was built for, by JAX's names.
PLATFORMS = tuple(_core.xla_ffi_handlers())


def custom_call_targets() -> list[str]:
    """Names of the XLA custom calls that the functions of `natten.jax` lower to."""
    return [TARGET]
