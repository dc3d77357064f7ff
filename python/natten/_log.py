"""The library's logger. It has no handler of its own: applications decide what is shown."""

from __future__ import annotations

import logging

logger = logging.getLogger("natten")
