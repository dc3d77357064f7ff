"""The library's logger. Applications decide what is shown, or the environment variable
NATTEN_LOG_LEVEL does, which is read when natten is imported."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger("natten")

_LEVELS = ("debug", "info", "warning", "error", "critical")


def _show(level: str) -> None:
    """Shows messages of a level and above on stderr."""
    # Of the handlers only this one: where the application has set up logging, its handlers show
    # the messages, and this one would show them twice.
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("natten: %(message)s"))
    handler.addFilter(lambda record: not logging.getLogger().handlers)
    logger.addHandler(handler)
    if level in _LEVELS:
        logger.setLevel(level.upper())
    else:
        logger.warning("NATTEN_LOG_LEVEL: got %r; must be one of %s", level, ", ".join(_LEVELS))


_level = os.environ.get("NATTEN_LOG_LEVEL", "").lower()
if _level:
    _show(_level)

# Whether each problem's backend is told (`_choices.py`). A constant, so that calls of a process
# that does not ask for it pay nothing.
TELLS_CHOICES = _level == "debug"
