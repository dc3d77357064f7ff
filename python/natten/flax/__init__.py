"""Neighborhood attention modules for Flax, and conversion of weights from and to PyTorch.

`NeighborhoodAttention1D`, `2D` and `3D` are `flax.nnx` modules; `natten.flax.linen` holds those for
`flax.linen`. PyTorch is not needed.
"""

from importlib import import_module
from types import ModuleType

from natten.flax._convert import from_torch
from natten.flax._nnx import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    load_torch,
    to_torch,
)


def __getattr__(name: str) -> ModuleType:
    if name == "linen":  # a second framework of modules, which takes its time to load
        return import_module("natten.flax.linen")
    raise AttributeError(f"module 'natten.flax' has no attribute {name!r}")


__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "from_torch",
    "load_torch",
    "to_torch",
]
