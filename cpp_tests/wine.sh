#!/usr/bin/env bash
# Compiles libnatten as a DLL and its tests for Windows, and runs the tests under Wine on each
# instruction set that this processor has. It needs Debian packages, names those that are missing, and
# installs nothing. Usage: wine.sh PYTHON [ARGUMENT...]: a Python that has the package ziglang, and
# arguments for the test program, such as --gtest_filter=Threading.*
#
# The compiler is clang (zig): gcc for Windows aligns the stack to 16 bytes only, so that what it makes
# of vectors of 32 and 64 bytes may crash.
set -euo pipefail

if [ $# -lt 1 ]; then
  echo "usage: $0 PYTHON [ARGUMENT...]" >&2
  exit 2
fi
python=$1
shift
cd "$(dirname "$0")/.."
unset CMAKE_C_COMPILER_LAUNCHER CMAKE_CXX_COMPILER_LAUNCHER # zig has a cache of its own

build_dir=build/wine
googletest=/usr/src/googletest

missing=0
missing() {
  echo "$1 is missing; install the Debian package $2" >&2
  missing=$((missing + 1))
}
wine=$(command -v wine64 || command -v wine || true)
[ -n "$wine" ] || missing wine64 wine64
[ -e $googletest/CMakeLists.txt ] || missing "the source of GoogleTest in $googletest" googletest
[ $missing -eq 0 ] || exit 1

# GoogleTest is built from source, since an installed one is for this system.
cmake --preset tests -B $build_dir -Wno-deprecated -DCMAKE_TOOLCHAIN_FILE=cmake/zig-toolchain.cmake \
  -DNATTEN_ZIG_TARGET=x86_64-windows-gnu -DNATTEN_ZIG_PYTHON="$python" -DBUILD_SHARED_LIBS=ON \
  -DCMAKE_CROSSCOMPILING_EMULATOR="$wine" -DCMAKE_RUNTIME_OUTPUT_DIRECTORY="$PWD/$build_dir/bin" \
  -DCMAKE_DISABLE_FIND_PACKAGE_GTest=ON -DFETCHCONTENT_SOURCE_DIR_GOOGLETEST=$googletest \
  -DBUILD_GMOCK=OFF
cmake --build $build_dir

export WINEPREFIX=$PWD/$build_dir/prefix WINEDEBUG=-all
skipped=0
for isa in base avx2 avx512 avx512wide avx512bf16; do
  echo "== $isa"
  output=$(NATTEN_CPU_ISA=$isa "$wine" $build_dir/bin/natten_tests.exe --gtest_brief=1 "$@" 2>&1) || {
    if grep -q 'this processor runs' <<< "$output"; then
      echo "skipped: this processor does not have it"
      skipped=$((skipped + 1))
      continue
    fi
    echo "$output"
    exit 1
  }
  tail -n 3 <<< "$output"
done
[ $skipped -lt 5 ]
