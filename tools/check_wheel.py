"""Refuses a wheel that does not fit the Pythons it should: `python tools/check_wheel.py WHEEL`.

Built by Python 3.12 or 3.13, a wheel must serve 3.12 and all later ones: it is tagged cp312-abi3,
holds a module for the stable ABI, and abi3audit finds no symbol in it that is not in that ABI.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path


def problem(wheel: Path, python: tuple[int, int]) -> str | None:
    """What is wrong with the tags or the module of a wheel that this Python has built."""
    if python >= (3, 14):
        return "made by {}.{}; must be by 3.12 or 3.13, whose XLA headers all JAX knows".format(
            *python
        )
    is_stable = python >= (3, 12)
    version = "cp{}{}".format(*python)
    tags = ["cp312", "abi3"] if is_stable else [version, version]
    got = wheel.stem.split("-")[2:4]
    if got != tags:
        return f"tagged {'-'.join(got)}; must be {'-'.join(tags)}"
    modules = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    if [name.endswith(".abi3.so") for name in modules] != [is_stable]:
        return f"holds {modules}; must be one module, {'' if is_stable else 'not '}.abi3.so"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    wheel = parser.parse_args().wheel
    python = sys.version_info[:2]
    if found := problem(wheel, python):
        sys.exit(f"{wheel.name}: {found}")
    if python >= (3, 12):
        subprocess.run([sys.executable, "-m", "abi3audit", "--strict", "-v", wheel], check=True)
    print(f"{wheel.name}: fits the Pythons that it should")


if __name__ == "__main__":
    main()
