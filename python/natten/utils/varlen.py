"""Lengths of examples that lie one after another, for `natten.attention`."""

from natten.torch._packing import generate_varlen_parameters

__all__ = ["generate_varlen_parameters"]
