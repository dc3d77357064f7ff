#!/usr/bin/env bash
# Cross-compiles libnatten and its tests for 64-bit Arm Linux, and runs the tests under QEMU. It needs
# Debian packages, names those that are missing, and installs nothing.
# Usage: aarch64.sh [ARGUMENT...], each for the test program, such as --gtest_filter=Threading.*
set -euo pipefail
cd "$(dirname "$0")/.."

build_dir=build/aarch64
triple=aarch64-linux-gnu
googletest=/usr/src/googletest

missing=0
missing() {
  echo "$1 is missing; install the Debian package $2" >&2
  missing=$((missing + 1))
}
command -v cmake > /dev/null || missing cmake cmake
command -v ninja > /dev/null || missing ninja ninja-build
command -v $triple-g++ > /dev/null || missing $triple-g++ g++-$triple
[ -e $googletest/CMakeLists.txt ] || missing "the source of GoogleTest in $googletest" googletest
qemu=$(command -v qemu-aarch64 || command -v qemu-aarch64-static || true)
[ -n "$qemu" ] || missing "qemu-aarch64 or qemu-aarch64-static" "qemu-user or qemu-user-static"
[ $missing -eq 0 ] || exit 1
emulator=("$qemu" -L /usr/$triple)

# GoogleTest is built from source, since an installed one is for this machine.
cmake --preset tests -B $build_dir -Wno-deprecated \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$triple-g++ \
  -DCMAKE_CROSSCOMPILING_EMULATOR="$(IFS=';' && echo "${emulator[*]}")" \
  -DCMAKE_DISABLE_FIND_PACKAGE_GTest=ON -DFETCHCONTENT_SOURCE_DIR_GOOGLETEST=$googletest \
  -DBUILD_GMOCK=OFF
cmake --build $build_dir

# A change that keeps the compiler from using vectors here would pass the tests, slowly.
kernels=$build_dir/libnatten/CMakeFiles/natten_isa_base.dir/src/cpu/simd/kernels.cpp.o
count=$($triple-objdump -d --no-show-raw-insn "$kernels" | grep -cE 'fmla\s+v[0-9]' || true)
echo "$kernels: $count multiply-adds of vectors"
if [ "$count" -eq 0 ]; then
  echo "the kernels do not use vectors" >&2
  exit 1
fi

# QEMU 7.2 aborts when the forked child of a process with threads starts a thread itself. A filter
# among the arguments takes the place of this one.
"${emulator[@]}" $build_dir/cpp_tests/natten_tests --gtest_brief=1 \
  --gtest_filter=-Threading.ForkedChildrenCompute "$@"
