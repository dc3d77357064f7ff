"""Finds files of another project in the folder that natten is installed in.

The name `natten` on PyPI belongs to SHI-Labs' NATTEN, whose package has the same name. An installer
that knows of both replaces one by the other; where two installers, or `pip install --target`, have
put both into one folder, some modules are of the one and some of the other.
"""

from __future__ import annotations

import os
import warnings

# Names in the package's folder that NATTEN has and this package has not, without what follows the
# first dot: compiled modules are called after the system and the version of Python.
_NAMES_OF_NATTEN = frozenset(
    {
        *("_C", "libnatten", "_libnatten", "_environment", "attn_merge", "version"),
        *("autotuner", "experimental", "flex", "nested", "ops", "profiling_utils"),
        *(f"{name}{rank}d" for name in ("na", "natten") for rank in (1, 2, 3)),
    }
)


def _entries(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # in an archive, or not readable
        return []


def _is_of_another(dist_info: str) -> bool:
    """Whether the list of a distribution's files lacks this package's native module."""
    try:
        with open(os.path.join(dist_info, "RECORD"), encoding="utf-8") as file:
            files = file.read()
    except OSError:  # it does not say
        return False
    # An editable install lists no files of the package.
    return "natten/__init__.py" in files and "natten/_core." not in files


def foreign_files(package: str, version: str) -> list[str]:
    """Paths in or beside the folder of the package that are not of this project."""
    parent = os.path.dirname(package)
    found = [
        os.path.join(package, name)
        for name in _entries(package)
        if name.partition(".")[0] in _NAMES_OF_NATTEN
    ]
    for name in _entries(parent):
        if name.startswith("natten-") and name.endswith(".dist-info"):
            path = os.path.join(parent, name)
            if name != f"natten-{version}.dist-info" and _is_of_another(path):
                found.append(path)
    return sorted(found)


def warn_of_clash(package: str, version: str) -> None:
    """Warns where there are such files."""
    found = foreign_files(package, version)
    if found:
        warnings.warn(
            f"natten {version} is installed over another project's package of the same name, "
            f"SHI-Labs' NATTEN, which PyPI has as natten: {', '.join(found)}. Modules of the two "
            "may be mixed up. Run `pip uninstall natten` until it finds nothing more, remove the "
            f"folder {package}, and install the one that you want, alone",
            RuntimeWarning,
            stacklevel=3,
        )
