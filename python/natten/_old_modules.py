"""Modules in which older versions of NATTEN define what `natten` and `natten.functional` have, and
from which code written for them imports it.

They are made here and not files: files by these names in the package's folder are a sign of NATTEN
(_clash.py), and importing a file `na2d.py` would put it in the place of the function `natten.na2d`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _OldModule(ModuleType):
    """Loads PyTorch when a name of it is first used."""

    def __init__(self, name: str, *names: str) -> None:
        super().__init__(f"natten.{name}", f"Names that older versions of NATTEN have in {name}.")
        self.__spec__ = ModuleSpec(self.__name__, None)  # importlib.util.find_spec asks for it
        self.__all__ = names

    def __getattr__(self, name: str) -> Any:
        if name not in self.__all__:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(import_module("natten.torch"), name)


def register() -> None:
    """Has Python find the modules."""
    modules = [_OldModule("experimental", "na1d", "na2d", "na3d")]
    for rank in (1, 2, 3):
        new, old = f"na{rank}d", f"natten{rank}d"
        both = f"NeighborhoodAttention{rank}D", f"{new}_qk", f"{new}_av"
        modules.append(_OldModule(new, *both, new))
        modules.append(_OldModule(old, *both, f"{new}_qk_with_bias", f"{old}qkrpb", f"{old}av"))
    sys.modules.update((module.__name__, module) for module in modules)


__all__ = ["register"]
