"""natten as a kernel of the Hugging Face Hub: the file that the package `kernels` imports.

It has all public names of natten: `get_kernel("shi-labs/natten", version=1).na2d`.
"""

# `kernels` imports this file under a name that it makes up. natten itself lies in the folder beside
# it and calls itself `natten`; its operators and its threads are one set for a process. So it is
# imported under its own name, and once. Whether another natten is installed makes no difference.
from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import Distribution
from pathlib import Path
from types import ModuleType

_HERE = Path(__file__).resolve().parent


def _import_natten() -> ModuleType:
    (about,) = _HERE.glob("natten-*.dist-info")
    version = Distribution.at(about).version
    loaded = sys.modules.get("natten")
    if loaded is not None:
        if getattr(loaded, "__version__", None) == version:
            return loaded
        raise ImportError(
            f"this kernel is natten {version}, but natten {getattr(loaded, '__version__', '?')} is "
            f"imported from {getattr(loaded, '__file__', '?')}; a process can have one only"
        )
    folder = _HERE / "natten"
    spec = importlib.util.spec_from_file_location(
        "natten", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["natten"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        for name in [n for n in sys.modules if n == "natten" or n.startswith("natten.")]:
            del sys.modules[name]
        raise
    return module


_natten = _import_natten()
__version__: str = _natten.__version__
__all__ = list(_natten.__all__)


def __getattr__(name: str) -> object:
    return getattr(_natten, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_natten)})
