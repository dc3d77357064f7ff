"""Wheels for all systems, made on one Linux machine: `python tools/wheels.py [PLATFORM...]`.

PyPI's ziglang compiles for other systems. The library is compiled once for each of them, and a
module of it linked for each of two Pythons: 3.11, and the stable ABI of 3.12 and all later ones.
The wheels are in dist/wheels, and tools/check_wheel.py has passed them.

Of a Python only the headers are needed, which are the same on all systems but for pyconfig.h; the
project has one of its own (cmake/python). They are those of python3.11, and of python3.12 or
python3.13, on PATH, or of the folders that --headers names. A Debian machine without the newer one
takes Debian's package.

--cuda makes the two wheels for this machine's own system with CUDA kernels, by its compilers and
nvcc. They are tagged with the glibc that they need, which may be newer than that of the other
wheels; where both suit a system, pip takes those of the newer glibc.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import check_wheel

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build/wheels"
CUDA_ARCHITECTURES = "80-real;90a-real;100-real;120"


@dataclass(frozen=True)
class Python:
    """What a module is for."""

    version: str  # of the oldest that it serves
    headers_of: tuple[str, ...]  # versions, any of whose headers will do
    tags: str
    is_stable: bool


@dataclass(frozen=True)
class System:
    target: str  # as zig calls it
    suffix: str  # of modules for one version of Python, which {} stands for
    stable_suffix: str = ".abi3.so"


PYTHONS = (
    Python("3.11", ("3.11",), "cp311-cp311", False),
    Python("3.12", ("3.12", "3.13"), "cp312-abi3", True),
)
SYSTEMS = {
    "manylinux_2_28_x86_64": System("x86_64-linux-gnu.2.28", ".cpython-{}-x86_64-linux-gnu.so"),
    "manylinux_2_28_aarch64": System("aarch64-linux-gnu.2.28", ".cpython-{}-aarch64-linux-gnu.so"),
    "musllinux_1_2_x86_64": System("x86_64-linux-musl", ".cpython-{}-x86_64-linux-musl.so"),
    "musllinux_1_2_aarch64": System("aarch64-linux-musl", ".cpython-{}-aarch64-linux-musl.so"),
    "macosx_11_0_arm64": System("aarch64-macos.11.0", ".cpython-{}-darwin.so"),
    "win_amd64": System("x86_64-windows-gnu", ".cp{}-win_amd64.pyd", ".pyd"),
}
HERE = f"manylinux_2_28_{platform.machine()}"  # whose modules run on this machine


def run(command: Sequence[str | Path]) -> None:
    """Runs a command, and ends this program where it fails."""
    if subprocess.run([str(word) for word in command], cwd=ROOT).returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}")


# ---- Python's headers ----


def debian_headers(version: str) -> Path:
    """Headers of a Python that this Debian does not have, from the package of one that has."""
    folder = BUILD / "debian"
    found = folder / "root/usr/include" / f"python{version}"
    if found.exists():
        return found
    sources = [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]
    text = "\n".join(path.read_text() for path in sources if path.is_file())
    pattern = r"^(?:URIs:|deb(?: +\[[^]]*\])?) +(\S+/debian/?)(?: |$)"
    mirrors = re.findall(pattern, text, re.MULTILINE)
    if not mirrors or not shutil.which("apt-get"):
        sys.exit(
            f"no headers of Python {version}: install it, or name their folder with "
            f"--headers {version}=FOLDER"
        )
    for name in ("state/lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "status").touch()
    keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (folder / "sources.list").write_text(f"deb [signed-by={keys}] {mirrors[0]} trixie main\n")
    settings = {
        "Dir::Etc::SourceList": folder / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State": folder / "state",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder / "cache",
        "Dir::Cache::archives": folder / "cache/archives",
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in settings.items())]
    run([*apt, "update"])
    run(["sh", "-c", 'cd "$1"; shift; exec "$@"', "sh", folder, *apt, "download",
         f"libpython{version}-dev"])  # fmt: skip
    (package,) = folder.glob(f"libpython{version}-dev_*.deb")
    run(["dpkg-deb", "-x", package, folder / "root"])
    return found


def headers(python: Python, given: dict[str, Path]) -> Path:
    """A folder with Python's headers and the project's own pyconfig.h."""
    source = next((given[version] for version in python.headers_of if version in given), None)
    for version in python.headers_of:
        command = shutil.which(f"python{version}")
        if source is None and command:
            ask = "import sysconfig; print(sysconfig.get_path('include'))"
            printed = subprocess.run([command, "-c", ask], capture_output=True, text=True)
            path = Path(printed.stdout.strip())
            source = path if (path / "Python.h").exists() else None
    source = source or debian_headers(python.headers_of[-1])
    if not (source / "Python.h").exists():
        sys.exit(f"headers of Python {python.version}: there is no Python.h in {source}")
    # A copy, since Python.h takes the pyconfig.h beside it.
    copy = BUILD / f"python{python.version}"
    if not (copy / "Python.h").exists():
        shutil.copytree(source, copy)
    config = (ROOT / "cmake/python/pyconfig.h").read_text()
    if (copy / "pyconfig.h").read_text() != config:  # or all that includes it is compiled again
        (copy / "pyconfig.h").write_text(config)
    return copy


def import_library(python: Python, folder: Path) -> Path:
    """What a module for Windows is linked with instead of Python's DLL: names in its headers."""
    dll = "python3" if python.is_stable else f"python{python.version.replace('.', '')}"
    library = folder / f"lib{dll}.a"
    text = "\n".join(path.read_text() for path in sorted(folder.rglob("*.h")))
    names = {kind: sorted(set(re.findall(rf"PyAPI_{kind}\([^)]*\)\s*(\w+)", text)))
             for kind in ("FUNC", "DATA")}  # fmt: skip
    lines = [f"LIBRARY {dll}.dll", "EXPORTS", *names["FUNC"], *(f"{n} DATA" for n in names["DATA"])]
    definition = library.with_suffix(".def")
    definition.write_text("\n".join(lines) + "\n")
    run([sys.executable, "-m", "ziglang", "dlltool", "-m", "i386:x86-64",
         "-d", definition, "-l", library])  # fmt: skip
    return library


# ---- wheels ----


def build(name: str, python: Python, folder: Path, options: Sequence[str]) -> Path:
    """The Python module, in a folder of its own."""
    system = SYSTEMS[HERE if name == "cuda" else name]
    suffix = system.stable_suffix if python.is_stable else system.suffix
    library = import_library(python, folder) if name.startswith("win") else ""
    tree = BUILD / (name if name == "cuda" else system.target)
    facts = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MODULE_PATH": ROOT / "cmake/python",
        "NATTEN_BUILD_PYTHON": "ON",
        "NATTEN_PYTHON_INTERPRETER": sys.executable,
        "NATTEN_PYTHON_VERSION": python.version,
        "NATTEN_PYTHON_HEADERS": folder,
        "NATTEN_PYTHON_SUFFIX": suffix.format(python.version.replace(".", "")),
        "NATTEN_PYTHON_STABLE_ABI": "ON" if python.is_stable else "OFF",
        "NATTEN_PYTHON_LIBRARY": library,
    }
    run(["cmake", "-G", "Ninja", "-S", ".", "-B", tree, *options,
         *(f"-D{key}={value}" for key, value in facts.items())])  # fmt: skip
    run(["cmake", "--build", tree])
    module = tree / python.tags
    shutil.rmtree(module, ignore_errors=True)
    run(["cmake", "--install", tree, "--component", "python", "--prefix", module])
    return module


def stub(module: Path) -> None:
    """Writes _core.pyi, the same for all, beside a module that this Python can import."""
    run([sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "_core", "-i", module, "-o",
         BUILD / "_core.pyi"])  # fmt: skip


def pack(name: str, python: Python, module: Path, out: Path) -> Path:
    """A wheel of the module, the Python files, and what pyproject.toml says of the package."""
    from scikit_build_core.build import prepare_metadata_for_build_wheel

    content = module.with_name(f"{python.tags}-wheel")
    shutil.rmtree(content, ignore_errors=True)
    shutil.copytree(ROOT / "python/natten", content / "natten",
                    ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
    shutil.copytree(module, content / "natten", dirs_exist_ok=True)
    shutil.copy2(BUILD / "_core.pyi", content / "natten")
    about = content / prepare_metadata_for_build_wheel(str(content)) / "WHEEL"
    tag = f"{python.tags}-{name}"
    about.write_text(re.sub("(?m)^Tag: .*$", f"Tag: {tag}", about.read_text()))
    out.mkdir(parents=True, exist_ok=True)
    run([sys.executable, "-m", "wheel", "pack", content, "-d", out])
    (wheel,) = out.glob(f"*-{tag}.whl")
    return wheel


def with_cuda(folders: dict[Python, Path], out: Path) -> list[Path]:
    """Wheels for this system, whose tags auditwheel chooses by what they need."""
    options = [
        "-DNATTEN_WITH_CUDA=ON",
        f"-DCMAKE_CUDA_ARCHITECTURES={CUDA_ARCHITECTURES}",
        # A newer C++ library than the compiler's is rarer on old systems than a newer glibc.
        "-DCMAKE_MODULE_LINKER_FLAGS=-static-libstdc++",
    ]
    plain = f"linux_{platform.machine()}"
    wheels: list[Path] = []
    for python, folder in folders.items():
        module = build("cuda", python, folder, options)
        if runs_here(python):
            stub(module)
        wheel = pack(plain, python, module, BUILD / "cuda")
        tagged = wheel.parent / "tagged"  # a folder of its own: `out` may hold those for CPUs
        shutil.rmtree(tagged, ignore_errors=True)
        run([sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", tagged, wheel])
        out.mkdir(parents=True, exist_ok=True)
        wheels += [Path(shutil.move(path, out / path.name)) for path in tagged.glob("*.whl")]
    return wheels


def runs_here(python: Python) -> bool:
    """Whether the Python that runs this program can import such a module."""
    return f"{sys.version_info[0]}.{sys.version_info[1]}" == python.version or (
        python.is_stable and sys.version_info >= (3, 12)
    )


def crossed(name: str, folders: dict[Python, Path], out: Path) -> list[Path]:
    """Wheels for another system."""
    options = [
        "-DCMAKE_TOOLCHAIN_FILE=cmake/zig-toolchain.cmake",
        f"-DNATTEN_ZIG_TARGET={SYSTEMS[name].target}",
        f"-DNATTEN_ZIG_PYTHON={sys.executable}",
        "-DNATTEN_WARNINGS_AS_ERRORS=ON",
    ]
    if name.startswith("macosx"):
        # Or what a module instantiates of the C++ library's templates is exported; on Linux a list
        # of exports says otherwise, and Windows exports what it is told to only.
        options.append("-DCMAKE_CXX_FLAGS=-D_LIBCPP_DISABLE_VISIBILITY_ANNOTATIONS")
    modules = {python: build(name, python, folder, options) for python, folder in folders.items()}
    for python, module in modules.items():
        if name == HERE and runs_here(python):
            stub(module)
    return [pack(name, python, module, out) for python, module in modules.items()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("platforms", nargs="*", metavar="PLATFORM", help=" ".join(SYSTEMS))
    parser.add_argument("--cuda", action="store_true", help="with CUDA kernels, for this system")
    parser.add_argument("--headers", action="append", default=[], metavar="VERSION=FOLDER")
    parser.add_argument("--out", type=Path, default=ROOT / "dist/wheels")
    arguments = parser.parse_args()
    if unknown := set(arguments.platforms) - set(SYSTEMS):
        parser.error(f"platform: got {', '.join(unknown)}; must be of {', '.join(SYSTEMS)}")
    if arguments.cuda and arguments.platforms:
        parser.error("--cuda is for this system; leave out the platforms")
    if importlib.util.find_spec("ziglang") is None:
        parser.error("needs requirements/{build,xla-headers,cross,wheel}.txt")
    given = {}
    for text in arguments.headers:
        version, _, path = text.partition("=")
        given[version] = Path(path)
    names = arguments.platforms or list(SYSTEMS)
    if HERE not in names and not (BUILD / "_core.pyi").exists():
        names = [HERE, *names]  # it makes the stub of all
    names.sort(key=lambda name: name != HERE)

    if not arguments.cuda:  # zig has a cache of its own
        for variable in [v for v in os.environ if re.fullmatch("CMAKE_.*_LAUNCHER", v)]:
            del os.environ[variable]
    BUILD.mkdir(parents=True, exist_ok=True)
    folders = {python: headers(python, given) for python in PYTHONS}
    if arguments.cuda:
        names = ["cuda"]
    for name in names:
        start = time.monotonic()
        if name == "cuda":
            wheels = with_cuda(folders, arguments.out)
        else:
            wheels = crossed(name, folders, arguments.out)
        for wheel in wheels:
            check_wheel.check(wheel)
        sizes = ", ".join(f"{w.name} {w.stat().st_size / 1e6:.2f} MB" for w in wheels)
        print(f"== {name}: {(time.monotonic() - start) / 60:.1f} minutes; {sizes}", flush=True)


if __name__ == "__main__":
    main()
