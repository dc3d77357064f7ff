"""Access to the library's loggers."""

from __future__ import annotations

import logging


def get_logger(name: str = "natten") -> logging.Logger:
    """The logger `name`. The library's own is "natten"; it has no handler, so that applications
    decide what is shown, unless NATTEN_LOG_LEVEL is set."""
    return logging.getLogger(name)


__all__ = ["get_logger"]
