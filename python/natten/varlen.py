"""Neighborhood attention on grids of different shapes, packed one after another. Names are those of
NATTEN's `natten.varlen`."""

from natten.torch._varlen import configure_varlen, neighborhood_attention_varlen

__all__ = ["configure_varlen", "neighborhood_attention_varlen"]
