"""Refuses wheels that do not fit the Pythons and systems they should: `check_wheel.py WHEEL...`.

A wheel is for Python 3.11, or for the stable ABI of 3.12 and all later versions: then abi3audit
must find no symbol in its module that is not in that ABI. The module must be for the system and
the processor that the wheel's tag names, must need no newer system than that, no library that is
not part of it, and must export its init function only. Wheels for macOS and Windows can be checked
anywhere.
"""

from __future__ import annotations

import argparse
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

INIT = "PyInit__core"
TAGS = {"cp311-cp311": False, "cp312-abi3": True}  # and whether they mean the stable ABI
# What a system has, as patterns of names.
LIBRARIES = {
    # libstdc++ and libgcc_s are where gcc is the compiler; auditwheel looks at their versions.
    "manylinux": r"lib(c|m|pthread|dl|rt|gcc_s|stdc\+\+)\.so\.\d+|ld-linux-[\w-]+\.so\.\d",
    "musllinux": r"libc\.so|libc\.musl-\w+\.so\.1",
    "macosx": r"/usr/lib/lib(System\.B|c\+\+(\.1|abi))\.dylib",
    "win": r"(?i)(kernel32|advapi32|ntdll|ucrtbase|api-ms-win-(crt|core)-[\w-]+)\.dll",
}
# What a module may export beside its init function, as patterns of names.
ALLOWED = {
    # nanobind's exceptions. On Windows a name is looked up in the one library it is imported from,
    # so that two modules that export it do not get in each other's way.
    "win": r"_ZTVN8nanobind\w*E",
    # What zig's linker cannot be told to hide: its own names of the file, and `operator new` and
    # `delete`, weak, which do what those of the system do.
    "macosx": r"__dso_handle|_mh_dylib_header|_Zn[wa]m\w*|_Zd[la]Pv\w*",
}
PROCESSORS = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}


@dataclass
class Module:
    """What the file of a module says of itself."""

    processor: str
    libraries: set[str]
    exports: set[str]
    needs: tuple[int, ...] | None = None  # version of the system: glibc's, or macOS's
    faults: list[str] = field(default_factory=list)


# ---- formats of files ----


def elf(path: Path) -> Module:
    """A module for Linux."""
    from elftools.elf.dynamic import DynamicSection
    from elftools.elf.elffile import ELFFile
    from elftools.elf.gnuversions import GNUVerNeedSection
    from elftools.elf.sections import SymbolTableSection

    with path.open("rb") as file:
        image = ELFFile(file)
        module = Module(
            {"EM_X86_64": "x86_64", "EM_AARCH64": "aarch64"}[image["e_machine"]], set(), set()
        )
        versions = []
        for section in image.iter_sections():
            if isinstance(section, DynamicSection):
                for tag in section.iter_tags():
                    if tag.entry.d_tag == "DT_NEEDED":
                        module.libraries.add(tag.needed)
                    elif tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH"):
                        module.faults.append("looks for libraries in folders of its own")
            elif isinstance(section, SymbolTableSection) and section.name == ".dynsym":
                for symbol in section.iter_symbols():
                    if symbol.name and symbol["st_shndx"] != "SHN_UNDEF":
                        module.exports.add(symbol.name)
            elif isinstance(section, GNUVerNeedSection):
                versions += [
                    version.name for _, names in section.iter_versions() for version in names
                ]
    numbers = [re.fullmatch(r"GLIBC_([\d.]+)", version) for version in versions]
    module.needs = max((tuple(map(int, n[1].split("."))) for n in numbers if n), default=None)
    return module


def macho(data: bytes) -> Module:
    """A module for macOS, of one processor."""
    magic, processor, _, kind, commands = struct.unpack_from("<5I", data)
    if magic != 0xFEEDFACF:
        raise ValueError("not a 64-bit Mach-O file for one processor")
    names = {0x0100000C: "aarch64", 0x01000007: "x86_64"}
    module = Module(names[processor], set(), set())
    if kind not in (6, 8):
        module.faults.append(f"of kind {kind}, neither library nor bundle")
    at = 32
    signed = False
    for _ in range(commands):
        command, size = struct.unpack_from("<2I", data, at)
        if command & 0xFFFFFFF in (0xC, 0x18, 0x1F):  # libraries: needed, weak, exported again
            start = at + struct.unpack_from("<I", data, at + 8)[0]
            module.libraries.add(data[start : data.index(b"\0", start)].decode())
        elif command == 0x32:  # the system that it was built for
            version = struct.unpack_from("<I", data, at + 12)[0]
            module.needs = (version >> 16, version >> 8 & 255)
        elif command == 0x1D:
            signed = True
        elif command == 2:  # symbols
            table, count, strings, _ = struct.unpack_from("<4I", data, at + 8)
            for i in range(count):
                name, what = struct.unpack_from("<IB", data, table + 16 * i)
                is_debug, is_private, is_global = what & 0xE0, what & 0x10, what & 1
                if is_global and not is_debug and not is_private and what & 0xE:
                    start = strings + name
                    module.exports.add(data[start : data.index(b"\0", start)].decode()[1:])
        at += size
    if not signed and module.processor == "aarch64":
        module.faults.append("not signed, without which 64-bit Arm Macs run nothing")
    return module


def pe(path: Path) -> Module:
    """A module for Windows."""
    import pefile

    image = pefile.PE(str(path), fast_load=True)
    image.parse_data_directories(
        [pefile.DIRECTORY_ENTRY[f"IMAGE_DIRECTORY_ENTRY_{name}"] for name in ("EXPORT", "IMPORT")]
    )
    exports = getattr(image, "DIRECTORY_ENTRY_EXPORT", None)
    return Module(
        {0x8664: "x86_64", 0xAA64: "aarch64"}[image.FILE_HEADER.Machine],
        {entry.dll.decode() for entry in image.DIRECTORY_ENTRY_IMPORT},
        {symbol.name.decode() for symbol in exports.symbols} if exports else set(),
    )


# ---- checks ----


def problem_of_module(module: Module, platform: str, python: str) -> str | None:
    """What is wrong with a module in a wheel for a platform, such as macosx_11_0_arm64."""
    system = re.match("[a-z]+", platform)[0]  # type: ignore[index]
    processor = next(p for name, p in PROCESSORS.items() if platform.endswith(name))
    if module.processor != processor:
        return f"is for {module.processor}; must be for {processor}"
    libraries = module.libraries
    if system == "win":
        dll = "python3.dll" if TAGS[python] else f"python{python[2:5]}.dll"
        if dll not in libraries:
            return f"does not need {dll}, only {sorted(libraries)}"
        libraries = libraries - {dll}
    foreign = sorted(name for name in libraries if not re.fullmatch(LIBRARIES[system], name))
    if foreign:
        return f"needs {', '.join(foreign)}, which {system} does not have"
    if system.endswith("linux") and not libraries:
        return "holds a C library of its own; must use the system's"
    claimed = re.search(r"_(\d+)_(\d+)_", platform)
    if module.needs and claimed and module.needs > (int(claimed[1]), int(claimed[2])):
        return f"needs version {'.'.join(map(str, module.needs))} of the system"
    allowed = next((names for start, names in ALLOWED.items() if platform.startswith(start)), "")
    exports = {name for name in module.exports if not re.fullmatch(allowed, name)}
    if exports != {INIT}:
        return f"exports {sorted(exports)}; must export {INIT} only"
    return module.faults[0] if module.faults else None


def problem(wheel: Path, python: tuple[int, int] | None = None) -> str | None:
    """What is wrong with a wheel's tags and its module's name; `python` built it, if any."""
    if python and python >= (3, 14):
        return "made by {}.{}; must be by 3.12 or 3.13, whose XLA headers all JAX knows".format(
            *python
        )
    got = "-".join(wheel.stem.split("-")[2:4])
    wanted = list(TAGS)
    if python:
        wanted = ["cp312-abi3" if python >= (3, 12) else "cp{0}{1}-cp{0}{1}".format(*python)]
    if got not in wanted:
        return f"tagged {got}; must be {' or '.join(wanted)}"
    modules = [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith((".so", ".pyd"))]
    names = [Path(name).name for name in modules]
    is_stable = [n.endswith(".abi3.so") or n == "_core.pyd" for n in names]
    if is_stable != [got.endswith("abi3")]:
        return (
            f"holds {modules}; must be one module, {'' if got.endswith('abi3') else 'not '}.abi3.so"
        )
    return None


def check(wheel: Path, python: tuple[int, int] | None = None) -> None:
    """Ends the program where something is wrong with a wheel."""
    if found := problem(wheel, python):
        sys.exit(f"{wheel.name}: {found}")
    python_tag, abi_tag, platforms = wheel.stem.split("-")[2:]
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith((".so", ".pyd")))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(archive.extract(name, folder))
        data = path.read_bytes()
        if platforms.startswith("win"):
            module = pe(path)
        elif platforms.startswith("macosx"):
            module = macho(data)
        else:
            module = elf(path)
    for platform in platforms.split("."):
        if found := problem_of_module(module, platform, f"{python_tag}-{abi_tag}"):
            sys.exit(f"{wheel.name}: the module {found}")
    if abi_tag == "abi3":
        subprocess.run([sys.executable, "-m", "abi3audit", "--strict", wheel], check=True)
    print(f"{wheel.name}: fits the Pythons and systems that it should", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheels", type=Path, nargs="+", metavar="WHEEL")
    parser.add_argument(
        "--built-here", action="store_true", help="by the Python that runs this, so for it"
    )
    arguments = parser.parse_args()
    for wheel in arguments.wheels:
        check(wheel, sys.version_info[:2] if arguments.built_here else None)


if __name__ == "__main__":
    main()
