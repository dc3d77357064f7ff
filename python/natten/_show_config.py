"""`natten.show_config`: what is installed and what of it runs."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable

from natten import _core

_FRAMEWORKS = ("torch", "jax", "jaxlib", "flax", "numpy")
_VARIABLES = (
    "NATTEN_BACKEND",
    "NATTEN_CACHE_DIR",
    "NATTEN_CPU_ISA",
    "NATTEN_LOG_LEVEL",
    "NATTEN_NUM_THREADS",
    "NATTEN_TUNE",
    "NATTEN_TUNE_FILE",
    "OMP_NUM_THREADS",
)


@dataclasses.dataclass(frozen=True)
class Configuration:
    """What `show_config` returns; prints as a table."""

    version: str
    compiler: str
    build_type: str
    system: str  # that the library was built for
    python: str
    instruction_sets: tuple[str, ...]  # that kernels were compiled for, best first
    available_instruction_sets: tuple[str, ...]  # that this processor runs
    instruction_set: str | None  # that calls use; None where NATTEN_CPU_ISA names none of these
    cuda_compiler: str | None  # None in builds without CUDA kernels
    cuda_architectures: tuple[str, ...]
    xla_ffi: tuple[int, int] | None  # version of XLA's interface; None in builds without JAX
    threads: int  # of the library's own pool
    backends: dict[str, tuple[str, ...]]  # by device, best first
    frameworks: dict[str, str]  # versions of those that are installed
    environment: dict[str, str]  # variables that the library reads, where they are set

    def __str__(self) -> str:
        cuda = "no kernels"
        if self.cuda_compiler:
            cuda = f"{self.cuda_compiler}, architectures {_listed(self.cuda_architectures)}"
        rows = {
            "built by": f"{self.compiler}, {self.build_type or 'no build type'}",
            "built for": self.system,
            "CUDA": cuda,
            "JAX": "no handlers" if self.xla_ffi is None else "XLA FFI {}.{}".format(*self.xla_ffi),
            "instruction sets": _listed(self.instruction_sets),
            "  that run here": _listed(self.available_instruction_sets),
            "  chosen": self.instruction_set or "none: NATTEN_CPU_ISA names another",
            "threads": f"{self.threads} in the library's pool; PyTorch and JAX have their own",
            **{f"backends, {device}": _listed(names) for device, names in self.backends.items()},
            "Python": self.python,
            "frameworks": _listed(f"{name} {v}" for name, v in self.frameworks.items()),
            "environment": _listed(f"{name}={v}" for name, v in self.environment.items()),
        }
        width = max(map(len, rows))
        lines = [f"{name:{width}}  {value}" for name, value in rows.items()]
        return "\n".join([f"natten {self.version}", *lines])

    __repr__ = __str__


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _versions() -> dict[str, str]:
    """Versions of the frameworks, from what pip has written down: none is imported."""
    from importlib import metadata  # takes a tenth of the time of `import natten`

    versions = {}
    for name in _FRAMEWORKS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def show_config() -> Configuration:
    """What is installed here and what of it runs: put it into reports of errors.

        print(natten.show_config())

    Imports no framework.

    Returns:
        A table: text when printed, its rows as attributes. It says how the library was built, the
        instruction sets that kernels were compiled for, those that the processor runs and the one
        that calls use, the threads, the backends by device, and the frameworks that are installed.
    """
    build = _core.build_info()
    sets = _core.instruction_sets()
    return Configuration(
        version=_core.version,
        compiler=build["compiler"],
        build_type=build["build_type"],
        system=build["system"],
        python=sys.version.split()[0],
        instruction_sets=tuple(name for name, _, _ in sets),
        available_instruction_sets=tuple(name for name, runs, _ in sets if runs),
        instruction_set=next((name for name, _, chosen in sets if chosen), None),
        cuda_compiler=build["cuda_compiler"] or None,
        cuda_architectures=tuple(filter(None, build["cuda_architectures"].split(", "))),
        xla_ffi=getattr(_core, "xla_ffi_api_version", None),
        threads=_core.num_threads(),
        backends={device: tuple(_core.backends(device)) for device in ("cpu", "cuda")},
        frameworks=_versions(),
        environment={name: os.environ[name] for name in _VARIABLES if name in os.environ},
    )
