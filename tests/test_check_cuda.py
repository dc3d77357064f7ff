"""The checker of the CUDA kernels' machine code, on what cuobjdump and ninja write."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

PATH = Path(__file__).parent.parent / "cpp_tests" / "check_cuda.py"
SPEC = importlib.util.spec_from_file_location("check_cuda", PATH)
check_cuda = importlib.util.module_from_spec(SPEC)
sys.modules["check_cuda"] = check_cuda  # dataclasses look themselves up there
SPEC.loader.exec_module(check_cuda)

# Of one kernel for tensor cores and another one.
USAGE = """
Fatbin elf code:
================
arch = sm_80
host = linux

Resource usage:
 Common:
  GLOBAL:0
 Function fna:
  REG:85 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:384 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function simt:
  REG:72 STACK:256 SHARED:1024 LOCAL:0 CONSTANT[0]:376 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin ptx code:
================
arch = sm_80
compressed
"""
CODE = """
Fatbin elf code:
================
arch = sm_80

    code for sm_80
        Function : fna
    .headerflags    @"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0010*/  IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;  /* 0x00000a00ff017624 */
        /* 0x000fe400078e00ff */
        /*0020*/  HMMA.16816.F32.BF16 R4, R20, R2, R4 ;  /* 0x000000021404723c */
        /*0030*/  @!P0 LDG.E R7, [R68.64+0xc] ;  /* 0x00000c0444077981 */
        Function : simt
        /*0010*/  @!P0 STL [R1+0x4], R3 ;  /* 0x0000040301007387 */
        /*1020*/  LDL R3, [R1+0x4] ;  /* 0x0000040001037983 */
        /*1030*/  @UP0 UIADD3 UR4, UR4, 0x1, URZ ;  /* 0x0000000104047890 */
"""
NAMES = {"fna": "TileKernel<128>", "simt": "simt::Forward"}


def problems(usage, code):
    kernels = check_cuda.kernels_of(usage, code)
    return check_cuda.problems_of(kernels, NAMES, check_cuda.TENSOR_CORES)


def test_reads_what_kernels_take():
    fna, simt = check_cuda.kernels_of(USAGE, CODE)
    assert fna == check_cuda.Kernel("sm_80", "fna", 85, 0, 0, products=1, local=0)
    assert simt == check_cuda.Kernel("sm_80", "simt", 72, 256, 1024, products=0, local=2)
    assert not problems(USAGE, CODE)


def test_kernels_for_tensor_cores_keep_everything_in_registers_and_use_them():
    (problem,) = problems(USAGE.replace("STACK:0", "STACK:8"), CODE)
    assert problem == "TileKernel<128>, sm_80: 8 bytes in local memory, 0 instructions that use it"
    (problem,) = problems(USAGE, CODE.replace("LDG.E", "LDL.64"))
    assert problem == "TileKernel<128>, sm_80: 0 bytes in local memory, 1 instructions that use it"
    (problem,) = problems(USAGE, CODE.replace("HMMA", "FFMA"))
    assert problem == "TileKernel<128>, sm_80: no instructions for tensor cores"
    # Those of Hopper have another name.
    assert not problems(USAGE, CODE.replace("HMMA", "HGMMA"))


def test_all_architectures_have_the_same_kernels():
    of_another = USAGE.replace("sm_80", "sm_90a").replace("Function simt", "Function other")
    kernels = check_cuda.kernels_of(USAGE + of_another, CODE + CODE.replace("sm_80", "sm_90a"))
    names = NAMES | {"other": "simt::Other"}
    assert check_cuda.problems_of(kernels, names, check_cuda.TENSOR_CORES) == [
        "simt::Forward: missing for sm_90a",
        "simt::Other: missing for sm_80",
    ]
    assert check_cuda.problems_of([], {}, check_cuda.TENSOR_CORES) == ["no kernel for tensor cores"]


def test_names_and_seconds():
    kernel = "natten::detail::cuda::TileKernel<natten::bfloat16, 128>"
    assert check_cuda.short(f"void natten::detail::cuda::entry<{kernel} >({kernel})") == (
        "TileKernel<bfloat16, 128>"
    )
    entries = [("10", "2510", "a/fna.cu.o"), ("0", "5", "b.cpp.o"), ("5", "6505", "a/fna.cu.o")]
    log = "# ninja log v5\n" + "".join(f"{a}\t{b}\t0\t{name}\tx\n" for a, b, name in entries)
    assert check_cuda.seconds_of(log) == {"fna.cu.o": 6.5}
