"""What a call of PyTorch's may take from the tuner."""

from __future__ import annotations

import torch

from natten import context
from natten._args import NO_TIMING, NOTHING_TUNED, attention_flags


def fused_flags(scale: float | None) -> int:
    """As `attention_flags`, with what the tuner may do."""
    flags = attention_flags(scale)
    return flags | _tuning_flags() if context._switches.tuning else flags


def _tuning_flags() -> int:
    if torch.are_deterministic_algorithms_enabled():
        return NOTHING_TUNED
    # A program that is made now runs later, and other ranks would wait for the one that tunes in
    # calls that it makes alone: they read what it has found.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return NO_TIMING
    context.tell_tuning_notes()
    return 0 if _is_first_rank() else NO_TIMING


def _is_first_rank() -> bool:
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return True
    return distributed.get_rank() == 0
