"""Neighborhood attention modules for Flax, and conversion of weights from and to PyTorch.

`NeighborhoodAttention1D`, `2D` and `3D` are `flax.nnx` modules; `natten.flax.linen` holds those for
`flax.linen`. PyTorch is not needed.
"""

from natten.flax._convert import from_torch
from natten.flax._nnx import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    load_torch,
    to_torch,
)

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "from_torch",
    "load_torch",
    "to_torch",
]
