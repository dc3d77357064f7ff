"""natten as a kernel of the Hugging Face Hub (hub/), loaded by `kernels` in fresh processes.

The wheel that it is made of is packed from the natten that is installed here.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "hub"))

from assemble import add, processor_and_system

needs_kernels = pytest.mark.skipif(
    importlib.util.find_spec("kernels") is None or importlib.util.find_spec("torch") is None,
    reason="needs the packages kernels and torch, as in `make test-wheel`",
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A kernel repository with one variant, for this machine."""
    folder = tmp_path_factory.mktemp("hub")
    machine = os.uname().machine
    tags = {
        ("linux", "x86_64"): "manylinux_2_28_x86_64",
        ("linux", "aarch64"): "manylinux_2_28_aarch64",
        ("darwin", "arm64"): "macosx_11_0_arm64",
    }
    tag = tags[sys.platform, machine]
    wheel = folder / f"natten-0-cp311-cp311-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in metadata.files("natten") or []:
            if ".." not in file.parts and file.suffix != ".pyc":
                archive.write(str(file.locate()), str(file))
    variant = add(wheel, folder)
    assert variant.parent == folder / "build" and (variant / "natten/__init__.py").exists()
    return folder


def run(repository: Path, code: str) -> str:
    """What code prints in a fresh process, where `get_kernel` finds our repository."""
    env = os.environ | {"LOCAL_KERNELS": f"shi-labs/natten={repository}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_kernels
def test_as_diffusers_loads_it(repository):
    """The call of LTX-2's decoder."""
    printed = run(
        repository,
        """
import sys, torch
from kernels import get_kernel
na3d = get_kernel("shi-labs/natten", version=1).na3d
q, k, v = torch.randn(3, 1, 4, 8, 9, 2, 16)
out = na3d(q, k, v, kernel_size=(3, 7, 7), scale=1.0, backend=None)
import natten
print(natten.__file__)
windows = natten.functional.na3d_qk(*(x.permute(0, 4, 1, 2, 3, 5) for x in (q, k)), (3, 7, 7))
want = natten.functional.na3d_av(windows.softmax(-1), v.permute(0, 4, 1, 2, 3, 5), (3, 7, 7))
torch.testing.assert_close(out, want.permute(0, 2, 3, 4, 1, 5))
""",
    )
    assert Path(printed).is_relative_to(repository / "build")


@needs_kernels
def test_modules_compiling_and_copies(repository):
    run(
        repository,
        """
import copy, pickle, torch
from pathlib import Path
from kernels import get_local_kernel
import os
kernel = get_local_kernel(Path(os.environ["LOCAL_KERNELS"].partition("=")[2]))
assert set(kernel.__all__) <= set(dir(kernel))
block = kernel.NeighborhoodAttention2D(dim=16, num_heads=2, kernel_size=3)
x = torch.randn(1, 5, 6, 16)
assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(block)))(x), block(x))
@torch.compile(backend="eager", fullgraph=True)
def f(q):
    return kernel.na1d(q, q, q, kernel_size=3)
q = torch.randn(1, 9, 2, 8, requires_grad=True)
f(q).sum().backward()
assert q.grad.isfinite().all()
import natten.flops
""",
    )


@needs_kernels
def test_beside_an_installed_natten(repository):
    """Of the same version: one serves both. Of another: the message names both."""
    run(
        repository,
        """
import natten
from kernels import get_kernel
kernel = get_kernel("shi-labs/natten", version=1)
assert kernel.na2d is natten.na2d and kernel.__version__ == natten.__version__
""",
    )
    printed = run(
        repository,
        """
import sys, types
sys.modules["natten"] = other = types.ModuleType("natten")
other.__version__ = "0.21.7"
from kernels import get_kernel
try:
    get_kernel("shi-labs/natten", version=1)
except ImportError as error:
    print(error)
assert sys.modules["natten"] is other
""",
    )
    assert f"this kernel is natten {metadata.version('natten')}, but natten 0.21.7" in printed


@pytest.mark.parametrize(
    ("tag", "want"),
    [
        ("manylinux_2_28_x86_64", "x86_64-linux"),
        ("manylinux2014_aarch64", "aarch64-linux"),
        ("macosx_11_0_arm64", "aarch64-darwin"),
        ("win_amd64", "x86_64-windows"),
        ("musllinux_1_2_x86_64", None),
        ("linux_riscv64", None),
    ],
)
def test_platforms(tag, want):
    if want is None:
        with pytest.raises(ValueError, match=f"platform: got {tag}"):
            processor_and_system(tag)
    else:
        assert processor_and_system(tag) == want


def test_wheels_of_one_platform_must_agree(tmp_path, repository):
    """A wheel for another Python adds its module; another Python file is refused."""
    (first,) = repository.glob("*.whl")
    second = tmp_path / first.name.replace("cp311-cp311", "cp312-abi3")
    with zipfile.ZipFile(first) as old, zipfile.ZipFile(second, "w") as new:
        for name in old.namelist():
            if "_core.c" not in name and ".abi3." not in name:
                new.writestr(name, old.read(name))
        new.writestr("natten/_core.other.so", b"another module")
    variant = add(first, tmp_path)
    assert add(second, tmp_path) == variant
    assert len(list(variant.glob("natten/_core.*.so"))) == 2
    with zipfile.ZipFile(second, "w") as new, zipfile.ZipFile(first) as old:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, data + b"#" if name == "natten/__init__.py" else data)
    with pytest.raises(ValueError, match=r"its natten/__init__\.py is not that of the other"):
        add(second, tmp_path)
