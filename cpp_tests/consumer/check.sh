#!/usr/bin/env bash
# Builds and installs libnatten alone, static and shared, and uses each from a project of its own.
# Usage: consumer/check.sh BUILD_DIR
set -euo pipefail

if [ $# -ne 1 ]; then
  echo "usage: $0 BUILD_DIR" >&2
  exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
source_dir=$(cd "$here/../.." && pwd)
mkdir -p "$1"
build_dir=$(cd "$1" && pwd)

for shared in OFF ON; do
  work=$build_dir/shared-$shared
  prefix=$work/prefix
  rm -rf "$work"
  echo "== BUILD_SHARED_LIBS=$shared"
  cmake -S "$source_dir" -B "$work/natten" -DCMAKE_BUILD_TYPE=Release \
    -DBUILD_SHARED_LIBS=$shared -DNATTEN_BUILD_PYTHON=OFF -DNATTEN_BUILD_TESTS=OFF \
    -DCMAKE_INSTALL_PREFIX="$prefix" > "$work.log"
  cmake --build "$work/natten" --parallel >> "$work.log"
  cmake --install "$work/natten" >> "$work.log"
  # Must work from where it is installed, without the tree it was built in.
  rm -rf "$work/natten"
  awk '/^```cpp/ { inside = 1; next } /^```/ { inside = 0 } inside' "$source_dir/README.md" \
    > "$work/readme.cpp"
  cmake -S "$here" -B "$work/consumer" -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_PREFIX_PATH="$prefix" -DREADME_EXAMPLE="$work/readme.cpp" >> "$work.log"
  cmake --build "$work/consumer" >> "$work.log"
  "$work/consumer/consumer"
  "$work/consumer/readme"
  if [ $shared = ON ]; then
    library=$(find "$prefix" -name 'libnatten.so' -print -quit)
    if [ -z "$library" ]; then
      echo "no shared library was installed" >&2
      exit 1
    fi
    bash "$here/../check_exports.sh" "$library"
  fi
done
echo "the installed library works, static and shared"
