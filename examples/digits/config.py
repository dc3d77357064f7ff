"""The shape of the classifier, which its two implementations share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Sizes of the classifier; `dilations` has one entry per block."""

    size: int = 8
    classes: int = 10
    dim: int = 32
    num_heads: int = 4
    mlp_dim: int = 64
    kernel_size: int = 3
    dilations: tuple[int, ...] = (1, 2, 1)
    head_drop: float = 0.2
