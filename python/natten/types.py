"""Types of arguments that hold for all spatial axes or are given per axis, and of tile shapes.

The functions take lists too. Names are those of NATTEN's `natten.types`.
"""

from __future__ import annotations

from enum import Enum
from types import NoneType as NoneType
from typing import TypeAlias

Dimension1DType: TypeAlias = tuple[int]
Dimension2DType: TypeAlias = tuple[int, int]
Dimension3DType: TypeAlias = tuple[int, int, int]
DimensionType: TypeAlias = Dimension1DType | Dimension2DType | Dimension3DType

Dimension1DTypeOrDed: TypeAlias = int | Dimension1DType
Dimension2DTypeOrDed: TypeAlias = int | Dimension2DType
Dimension3DTypeOrDed: TypeAlias = int | Dimension3DType
DimensionTypeOrDed: TypeAlias = int | DimensionType

CausalArg1DType: TypeAlias = tuple[bool]
CausalArg2DType: TypeAlias = tuple[bool, bool]
CausalArg3DType: TypeAlias = tuple[bool, bool, bool]
CausalArgType: TypeAlias = CausalArg1DType | CausalArg2DType | CausalArg3DType

CausalArg1DTypeOrDed: TypeAlias = bool | CausalArg1DType
CausalArg2DTypeOrDed: TypeAlias = bool | CausalArg2DType
CausalArg3DTypeOrDed: TypeAlias = bool | CausalArg3DType
CausalArgTypeOrDed: TypeAlias = bool | CausalArgType


class KernelSchedule(Enum):
    """Schedules of NATTEN's kernels for Hopper GPUs. No effect here."""

    NonPersistent = 0
    WarpSpecializedCooperative = 1
    WarpSpecializedPingpong = 2


# Tiles of queries and of keys: shapes for neighborhood attention, lengths for `attention`.
QKTileShapeType: TypeAlias = (
    tuple[Dimension1DType, Dimension1DType]
    | tuple[Dimension2DType, Dimension2DType]
    | tuple[Dimension3DType, Dimension3DType]
)
FmhaForwardConfigType: TypeAlias = tuple[int, int]

CutlassFnaForwardConfigType: TypeAlias = QKTileShapeType
CutlassFnaBackwardConfigType: TypeAlias = QKTileShapeType
CutlassBlackwellFnaForwardConfigType: TypeAlias = QKTileShapeType
CutlassBlackwellFnaBackwardConfigType: TypeAlias = QKTileShapeType
CutlassHopperFnaForwardConfigType: TypeAlias = tuple[QKTileShapeType, KernelSchedule]
CutlassHopperFnaBackwardConfigType: TypeAlias = QKTileShapeType
FlexFnaForwardConfigType: TypeAlias = QKTileShapeType

CutlassFmhaForwardConfigType: TypeAlias = FmhaForwardConfigType
CutlassFmhaBackwardConfigType: TypeAlias = FmhaForwardConfigType
CutlassBlackwellFmhaForwardConfigType: TypeAlias = FmhaForwardConfigType
CutlassBlackwellFmhaBackwardConfigType: TypeAlias = FmhaForwardConfigType
CutlassHopperFmhaForwardConfigType: TypeAlias = tuple[FmhaForwardConfigType, KernelSchedule]
CutlassHopperFmhaBackwardConfigType: TypeAlias = FmhaForwardConfigType
FlexFmhaForwardConfigType: TypeAlias = FmhaForwardConfigType
