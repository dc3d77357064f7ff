"""Grids over many processes, in PyTorch: what travels between them.

Functions and modules of `natten` take `DTensor`s as they are; `halo_exchange` is what they are made
of, for operations of your own, and `halo_bytes` says what travels without any process.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from natten._halos import HaloBytes, halo_bytes

if TYPE_CHECKING:
    from natten.torch._distributed import halo_exchange

__all__ = ["HaloBytes", "halo_bytes", "halo_exchange"]


def __getattr__(name: str) -> Any:
    if name != "halo_exchange":
        raise AttributeError(f"module 'natten.distributed' has no attribute {name!r}")
    return import_module("natten.torch._distributed").halo_exchange  # which loads PyTorch


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
