"""Makes a kernel repository for the Hugging Face Hub of wheels: `python hub/assemble.py
WHEEL...`.

`kernels` looks for a build of a kernel in `build/VARIANT`, where a variant names PyTorch, CUDA,
processor and system. natten's library holds nothing of PyTorch's, so that one build serves all
versions from the oldest that natten supports on. The wheels for one platform, for different
Pythons, become one variant; hub/kernel.py is its entry. Wheels with CUDA kernels take --backend,
such as cu130 for CUDA 13.0.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import zipfile
from email.parser import Parser
from pathlib import Path

HUB = Path(__file__).resolve().parent
KERNEL_VERSION = 1  # which clients ask for; another one when a release breaks them


def processor_and_system(platform: str) -> str:
    """As `kernels` calls them, of the last part of a wheel's name."""
    if found := re.search(r"manylinux\w*?_(x86_64|aarch64)$", platform):
        return f"{found[1]}-linux"
    if re.fullmatch(r"macosx_\d+_\d+_arm64", platform):
        return "aarch64-darwin"
    if platform == "win_amd64":
        return "x86_64-windows"
    raise ValueError(
        f"platform: got {platform}; must be one of manylinux (x86_64, aarch64), macosx (arm64) and "
        "win_amd64, which are those that kernels tells apart"
    )


def add(wheel: Path, out: Path, backend: str = "cpu", archs: list[str] | None = None) -> Path:
    """Adds a wheel to the repository in `out`, and returns the folder of its variant."""
    archive = zipfile.ZipFile(wheel)
    names = [name for name in archive.namelist() if not name.endswith("/")]
    (about,) = (name for name in names if re.fullmatch(r"natten-[^/]+\.dist-info/METADATA", name))
    metadata = Parser().parsestr(archive.read(about).decode())
    torch = next(
        found[1] + found[2]
        for line in metadata.get_all("Requires-Dist", [])
        if (found := re.match(r"torch>=(\d+)\.(\d+)", line))
    )
    place = processor_and_system(wheel.stem.split("-")[-1])
    variant = out / "build" / f"torch-stable-abi{torch}-{backend}-{place}"
    for name in names:
        if not name.startswith("natten/") and name != about:
            continue
        path, data = variant / name, archive.read(name)
        if path.exists() and path.read_bytes() != data and name != about:
            raise ValueError(f"{wheel.name}: its {name} is not that of the other wheels")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    shutil.copy2(HUB / "kernel.py", variant / "__init__.py")
    kind = "cuda" if backend.startswith("cu") else backend
    description: dict[str, object] = {
        "id": f"_natten_{kind}_{re.sub(r'[^0-9a-z]', '_', metadata['Version'])}",
        "name": "natten",
        "version": KERNEL_VERSION,
        "license": metadata["License-Expression"],
        "python-depends": [],
        "backend": {"type": kind} | ({"archs": archs} if archs else {}),
    }
    (variant / "metadata.json").write_text(json.dumps(description, indent=2) + "\n")
    shutil.copy2(HUB / "README.md", out / "README.md")
    return variant


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheels", type=Path, nargs="+", metavar="WHEEL")
    parser.add_argument("--out", type=Path, default=HUB.parent / "build/hub")
    parser.add_argument("--backend", default="cpu", help="cpu, or cu and CUDA's version")
    parser.add_argument("--archs", nargs="*", help="compute capabilities: 8.0 9.0a 12.0+PTX")
    arguments = parser.parse_args()
    variants = [
        add(wheel, arguments.out, arguments.backend, arguments.archs) for wheel in arguments.wheels
    ]
    print(*sorted({str(variant) for variant in variants}), sep="\n")


if __name__ == "__main__":
    main()
