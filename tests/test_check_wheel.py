"""The script that refuses wheels with wrong tags, on wheels made up here."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from check_wheel import problem


@pytest.mark.parametrize(
    ("tags", "modules", "python", "want"),
    [
        ("cp312-abi3", ["_core.abi3.so"], (3, 12), None),
        ("cp312-abi3", ["_core.abi3.so"], (3, 13), None),
        ("cp312-abi3", ["_core.abi3.so"], (3, 14), "must be by 3.12 or 3.13"),
        ("cp311-cp311", ["_core.cpython-311-x86_64-linux-gnu.so"], (3, 11), None),
        ("cp313-cp313", ["_core.abi3.so"], (3, 13), "tagged cp313-cp313; must be cp312-abi3"),
        ("cp313-abi3", ["_core.abi3.so"], (3, 13), "tagged cp313-abi3; must be cp312-abi3"),
        ("cp312-abi3", ["_core.abi3.so"], (3, 11), "tagged cp312-abi3; must be cp311-cp311"),
        ("cp312-abi3", ["_core.cpython-313-x86_64-linux-gnu.so"], (3, 13), "must be one module"),
        ("cp312-abi3", ["_core.abi3.so", "_more.abi3.so"], (3, 13), "must be one module"),
        ("cp312-abi3", [], (3, 13), "must be one module"),
    ],
)
def test_wheels(tmp_path, tags, modules, python, want):
    wheel = tmp_path / f"natten-1.0.0-{tags}-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("__init__.py", *modules):
            archive.writestr(f"natten/{name}", "")
    found = problem(wheel, python)
    assert found is None if want is None else found is not None and want in found
