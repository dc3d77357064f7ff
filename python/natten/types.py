"""Types of arguments that hold for all spatial axes or are given per axis.

The functions take lists too.
"""

from __future__ import annotations

from typing import TypeAlias

Dimension1DTypeOrDed: TypeAlias = int | tuple[int]
Dimension2DTypeOrDed: TypeAlias = int | tuple[int, int]
Dimension3DTypeOrDed: TypeAlias = int | tuple[int, int, int]

CausalArg1DTypeOrDed: TypeAlias = bool | tuple[bool]
CausalArg2DTypeOrDed: TypeAlias = bool | tuple[bool, bool]
CausalArg3DTypeOrDed: TypeAlias = bool | tuple[bool, bool, bool]
