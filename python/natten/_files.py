"""Files that other processes may read and write at the same time."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path


def write_whole(path: str | os.PathLike[str], fill: Callable[[Path], object]) -> None:
    """A file that is there whole or not at all: `fill` writes a draft, which takes its place.

    Raises:
        OSError: it cannot be written; there is no draft then.
    """
    draft = Path(f"{os.fspath(path)}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        fill(draft)
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        error.filename, error.filename2 = os.fspath(path), None  # not those of the draft
        raise
