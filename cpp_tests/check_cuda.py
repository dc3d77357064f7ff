"""Checks the machine code of the CUDA kernels of a build.

    python cpp_tests/check_cuda.py build/cuda

Prints what every kernel takes of each architecture, and the seconds that the compiler took. Kernels
for tensor cores must use them, and must not keep anything in local memory: that is where registers
are spilled, and where arrays go that are indexed at run time. All architectures must have the same
kernels. Other kernels are listed only.

Needs cuobjdump and nvdisasm, of CUDA's toolkit or of requirements/cuda.txt, and c++filt.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TENSOR_CORES = r"(Tile|Gemm)Kernel"  # of kernels for tensor cores, in the names of their types

INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)")  # address, predicate


@dataclass
class Kernel:
    architecture: str
    name: str  # as the compiler mangles it
    registers: int
    stack: int  # bytes of local memory, spilled registers included
    shared: int  # bytes, without what a launch asks for
    products: int = 0  # instructions for tensor cores
    local: int = 0  # instructions that read or write local memory

    def defects(self) -> list[str]:
        """Of a kernel for tensor cores."""
        found = []
        if self.stack or self.local:
            found.append(
                f"{self.stack} bytes in local memory, {self.local} instructions that use it"
            )
        if not self.products:
            found.append("no instructions for tensor cores")
        return found


def kernels_of(usage: str, code: str) -> list[Kernel]:
    """What `cuobjdump -res-usage` and `cuobjdump -sass` say of the same objects."""
    kernels: dict[tuple[str, str], Kernel] = {}
    architecture = name = ""
    for line in usage.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            name = found[1]
        elif "REG:" in line:
            sizes = {
                key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", line)
            }
            kernels[architecture, name] = Kernel(architecture, name, *sizes.values())
    kernel = None
    for line in code.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            architecture, kernel = found[1], None
        elif found := re.match(r"\s*Function : (\S+)", line):
            kernel = kernels.get((architecture, found[1]))
        elif kernel and (
            found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)", line)
        ):
            kernel.products += found[1] in ("HMMA", "HGMMA")
            kernel.local += found[1] in ("LDL", "STL")
    return list(kernels.values())


def problems_of(kernels: Iterable[Kernel], names: dict[str, str], pattern: str) -> list[str]:
    """Why the kernels must not be used as they are; `names` demangles theirs."""
    kernels = list(kernels)
    found = []
    architectures = sorted({kernel.architecture for kernel in kernels})
    for name in sorted({kernel.name for kernel in kernels}, key=names.__getitem__):
        missing = set(architectures) - {k.architecture for k in kernels if k.name == name}
        found += [f"{names[name]}: missing for {architecture}" for architecture in sorted(missing)]
    checked = [kernel for kernel in kernels if re.search(pattern, names[kernel.name])]
    if not checked:
        found.append("no kernel for tensor cores")
    for kernel in checked:
        found += [f"{names[kernel.name]}, {kernel.architecture}: {x}" for x in kernel.defects()]
    return found


def short(name: str) -> str:
    """The type of a kernel, of the name of `entry` for it."""
    found = re.fullmatch(r"void natten::detail::cuda::entry<(.*?) ?>\(\1\)", name)
    return re.sub(r"natten::(detail::(cuda::)?)?", "", found[1] if found else name)


def seconds_of(ninja_log: str) -> dict[str, float]:
    """How long each object took, the newest time of each, by name."""
    times = {}
    for line in ninja_log.splitlines():
        fields = line.split("\t")
        if len(fields) >= 4 and fields[3].endswith(".cu.o"):
            times[Path(fields[3]).name] = (int(fields[1]) - int(fields[0])) / 1000
    return times


def show(kernels: Iterable[Kernel], names: dict[str, str]) -> None:
    print(f"{'registers':>9} {'stack':>6} {'local':>6} {'tensor':>6} {'shared':>6}  arch    kernel")
    for k in sorted(kernels, key=lambda k: (names[k.name], k.architecture)):
        print(
            f"{k.registers:9} {k.stack:6} {k.local:6} {k.products:6} {k.shared:6}  "
            f"{k.architecture:7} {names[k.name]}"
        )


def folders_of_tools() -> list[str]:
    """Where PyPI's packages put them."""
    site = Path(sysconfig.get_path("purelib"))
    return [str(path) for path in sorted(site.glob("nvidia/*/bin"))]


def output(*command: str, text: str | None = None) -> str:
    return subprocess.run(command, input=text, check=True, capture_output=True, text=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("build", type=Path, help="build folder, or one object")
    parser.add_argument(
        "--tensor-cores", default=TENSOR_CORES, metavar="REGEX", help="names of kernels to check"
    )
    args = parser.parse_args()
    os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], *folders_of_tools()])
    for tool in ("cuobjdump", "nvdisasm", "c++filt"):
        if not shutil.which(tool):
            parser.exit(2, f"{tool} is not installed; see requirements/cuda.txt\n")
    objects = [args.build] if args.build.is_file() else sorted(args.build.rglob("*.cu.o"))
    found: dict[tuple[str, str], Kernel] = {}  # some kernels are in several objects
    for path in map(str, objects):
        usage, code = (output("cuobjdump", option, path) for option in ("-res-usage", "-sass"))
        found |= {(k.architecture, k.name): k for k in kernels_of(usage, code)}
    kernels = list(found.values())
    mangled = sorted({kernel.name for kernel in kernels})
    demangled = output("c++filt", text="\n".join(mangled)).splitlines()
    names = {name: short(full) for name, full in zip(mangled, demangled, strict=True)}
    show(kernels, names)
    log = args.build / ".ninja_log"
    if log.is_file():
        for name, time in sorted(seconds_of(log.read_text()).items(), key=lambda x: -x[1]):
            print(f"{time:9.1f} s  {name}")
    problems = problems_of(kernels, names, args.tensor_cores)
    for problem in problems:
        print(f"check_cuda: {problem}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
