"""The shape of the classifier and how it is trained, which its two implementations share."""

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


@dataclass(frozen=True)
class Training:
    """AdamW; the rate rises linearly to its peak, then falls to 0 as half a cosine."""

    epochs: int = 10
    batch: int = 64
    peak_rate: float = 3e-3
    warmup: float = 0.05  # of all steps
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    max_norm: float = 1.0  # of the gradient


TRAINING = Training()
