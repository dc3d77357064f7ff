"""Neighborhood attention for JAX. PyTorch is not needed.

Functions for 1, 2 and 3 spatial axes: `na1d`, ... (fused), `na1d_qk`, `na1d_av`, ... (unfused), and
`attention` and `merge_attentions`. docs/jax.md shows how to use them.
"""

from natten.jax._ffi import custom_call_targets
from natten.jax._functions import (
    attention,
    merge_attentions,
    na1d,
    na1d_av,
    na1d_qk,
    na2d,
    na2d_av,
    na2d_qk,
    na3d,
    na3d_av,
    na3d_qk,
)

__all__ = [
    "attention",
    "custom_call_targets",
    "merge_attentions",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na3d",
    "na3d_av",
    "na3d_qk",
]
