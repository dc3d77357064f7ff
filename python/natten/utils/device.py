"""`get_device_cc`, where NATTEN 0.20 and newer has it."""

from natten.context import get_device_cc

__all__ = ["get_device_cc"]
