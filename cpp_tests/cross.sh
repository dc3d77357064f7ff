#!/usr/bin/env bash
# Compiles libnatten for other systems and links it as a shared library. Nothing runs.
# Usage: cross.sh PYTHON TARGET...: a Python that has the package ziglang, and names of systems as
# cmake/zig-toolchain.cmake explains.
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: $0 PYTHON TARGET..." >&2
  exit 2
fi
python=$1
shift
cd "$(dirname "$0")/.."
unset CMAKE_C_COMPILER_LAUNCHER CMAKE_CXX_COMPILER_LAUNCHER # zig has a cache of its own

for target in "$@"; do
  echo "== $target"
  build_dir=build/cross/$target
  rm -rf "$build_dir"
  cmake -G Ninja -S . -B "$build_dir" -DCMAKE_TOOLCHAIN_FILE=cmake/zig-toolchain.cmake \
    -DNATTEN_ZIG_TARGET="$target" -DNATTEN_ZIG_PYTHON="$python" -DBUILD_SHARED_LIBS=ON \
    -DNATTEN_WARNINGS_AS_ERRORS=ON
  cmake --build "$build_dir"
  library=$(find "$build_dir" -name 'libnatten*.dylib' -o -name 'libnatten*.dll' -o \
    -name 'libnatten.so')
  if [ -z "$library" ]; then
    echo "no shared library was linked for $target" >&2
    exit 1
  fi
  echo "$target: $library"
done
