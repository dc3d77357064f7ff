"""The script that refuses wheels with wrong tags or modules, on wheels and modules made up here."""

from __future__ import annotations

import re
import struct
import sys
import zipfile
from pathlib import Path

import pytest

from natten import _core

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from check_wheel import Module, elf, macho, problem, problem_of_module


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
        ("cp312-abi3", ["_core.pyd"], None, None),
        ("cp311-cp311", ["_core.cp311-win_amd64.pyd"], None, None),
        ("cp311-cp311", ["_core.pyd"], None, "must be one module"),
        (
            "cp313-cp313",
            ["_core.so"],
            None,
            "must be cp311-cp311 or cp312-abi3",
        ),
    ],
)
def test_wheels(tmp_path, tags, modules, python, want):
    wheel = tmp_path / f"natten-1.0.0-{tags}-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("__init__.py", *modules):
            archive.writestr(f"natten/{name}", "")
    found = problem(wheel, python)
    assert found is None if want is None else found is not None and want in found


LINUX = {"libc.so.6", "libm.so.6"}
MACOS = {"/usr/lib/libSystem.B.dylib"}
WINDOWS = {"python3.dll", "KERNEL32.dll", "api-ms-win-crt-heap-l1-1-0.dll"}
INIT = {"PyInit__core"}
ERROR = "_ZTVN8nanobind4abi112python_errorE"  # nanobind's


@pytest.mark.parametrize(
    ("module", "platform", "want"),
    [
        (Module("x86_64", LINUX, INIT, (2, 28)), "manylinux_2_28_x86_64", None),
        (Module("x86_64", LINUX, INIT, (2, 9)), "manylinux_2_28_x86_64", None),
        (Module("x86_64", LINUX, INIT, (2, 29)), "manylinux_2_28_x86_64", "needs version 2.29"),
        (Module("aarch64", LINUX, INIT), "manylinux_2_28_x86_64", "is for aarch64"),
        (Module("x86_64", LINUX, INIT | {"x"}), "manylinux_2_28_x86_64", "must export PyInit"),
        (Module("x86_64", LINUX, set()), "manylinux_2_28_x86_64", "must export PyInit"),
        (Module("x86_64", {"libgomp.so.1"}, INIT), "manylinux_2_28_x86_64", "needs libgomp"),
        (Module("x86_64", LINUX, INIT, faults=["odd"]), "manylinux_2_28_x86_64", "odd"),
        (Module("x86_64", {"libc.so"}, INIT), "musllinux_1_2_x86_64", None),
        (Module("x86_64", set(), INIT), "musllinux_1_2_x86_64", "a C library of its own"),
        (Module("x86_64", LINUX, INIT), "musllinux_1_2_x86_64", "needs libc.so.6, libm.so.6"),
        (Module("aarch64", MACOS, INIT, (11, 0)), "macosx_11_0_arm64", None),
        (Module("aarch64", MACOS, INIT, (13, 0)), "macosx_11_0_arm64", "13.0"),
        (Module("aarch64", {"/opt/libomp.dylib"}, INIT, (11, 0)), "macosx_11_0_arm64", "libomp"),
        (Module("x86_64", WINDOWS, INIT), "win_amd64", None),
        (Module("x86_64", {*WINDOWS, "python312.dll"}, INIT), "win_amd64", "needs python312.dll"),
        (Module("x86_64", {*WINDOWS, "libc++.dll"}, INIT), "win_amd64", r"needs libc\+\+.dll"),
        (Module("x86_64", {"KERNEL32.dll"}, INIT), "win_amd64", "does not need python3.dll"),
        (Module("x86_64", WINDOWS, INIT | {ERROR}), "win_amd64", None),
        (Module("x86_64", WINDOWS, INIT | {ERROR, "x"}), "win_amd64", "exports.*x"),
        (Module("x86_64", LINUX, INIT | {ERROR}), "manylinux_2_28_x86_64", "must export PyInit"),
    ],
)  # fmt: skip
def test_modules(module, platform, want):
    found = problem_of_module(module, platform, "cp312-abi3")
    if want is None:
        assert found is None
    else:
        assert found is not None and re.search(want, found)


@pytest.mark.skipif(sys.platform != "linux", reason="a Linux file")
def test_a_module_for_linux():
    """The one that is installed here."""
    module = elf(Path(_core.__file__))
    assert module.exports == INIT and any(name.startswith("libc.") for name in module.libraries)
    assert module.needs is None or module.needs >= (2, 17)


def test_a_module_for_macos():
    """Read from a file that is written here after the format's description."""

    def command(kind: int, body: bytes) -> bytes:
        body += b"\0" * (-len(body) % 8)
        return struct.pack("<2I", kind, 8 + len(body)) + body

    def file(*, signed: bool) -> bytes:
        names = b"\0_PyInit__core\0_PyList_New\0_hidden\0"
        symbols = [("_PyInit__core", 0x0F), ("_PyList_New", 0x01), ("_hidden", 0x1F)]
        table = b"".join(
            struct.pack("<IBBHQ", names.index(b"\0" + name.encode() + b"\0") + 1, kind, 1, 0, 0)
            for name, kind in symbols
        )
        commands = [
            command(0xC, struct.pack("<4I", 24, 0, 0, 0) + b"/usr/lib/libSystem.B.dylib\0"),
            command(0x32, struct.pack("<4I", 1, 11 << 16, 14 << 16, 0)),
            *([command(0x1D, struct.pack("<2I", 0, 0))] if signed else []),
        ]
        at = 32 + sum(map(len, commands)) + 24
        commands.append(
            command(2, struct.pack("<4I", at, len(symbols), at + len(table), len(names)))
        )
        head = struct.pack("<8I", 0xFEEDFACF, 0x0100000C, 0, 8, len(commands), at - 32, 0, 0)
        return head + b"".join(commands) + table + names

    module = macho(file(signed=True))
    assert module == Module("aarch64", MACOS, INIT, (11, 0))
    assert "not signed" in macho(file(signed=False)).faults[0]
    with pytest.raises(ValueError, match="not a 64-bit Mach-O"):
        macho(b"\xca\xfe\xba\xbe" + bytes(60))
