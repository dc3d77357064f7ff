#!/usr/bin/env bash
# Builds and installs libnatten alone and as a part of another project, static and shared, uses each
# from projects of their own, and runs the examples of docs/cpp.md. Usage: consumer/check.sh BUILD_DIR
set -euo pipefail

if [ $# -ne 1 ]; then
  echo "usage: $0 BUILD_DIR" >&2
  exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
source_dir=$(cd "$here/../.." && pwd)
rm -rf "$1"
mkdir -p "$1"
work=$(cd "$1" && pwd)
page=$work/page
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(getconf _NPROCESSORS_ONLN)}

fail() {
  echo "consumer/check.sh: $*" >&2
  exit 1
}

# quietly COMMAND...: shows its output only if it fails
quietly() {
  "$@" > "$work/log" 2>&1 || {
    cat "$work/log"
    fail "failed: $*"
  }
}

# An example is a block of code after a comment that names its file.
extract_examples() {
  mkdir -p "$page"
  awk -v to="$page" '
    /^<!-- file: .* -->$/ { file = $3; next }
    /^```(cpp|cmake|sh)$/ && !inside {
      if (!file) { print FILENAME ":" FNR ": a block without the name of a file" > "/dev/stderr"; exit 1 }
      inside = 1; next
    }
    /^```/ { inside = 0; file = ""; next }
    inside { print > (to "/" file) }' "$source_dir/docs/cpp.md"
  awk '/^```cpp/ { inside = 1; next } /^```/ { inside = 0 } inside' "$source_dir/README.md" \
    > "$page/readme.cpp"
}

# Programs that find the installed library, with CMake and without.
check_installed() {
  local prefix=$1 kind=$2 build=$work/consumer-$2
  echo "== installed, $kind"
  quietly cmake -S "$here" -B "$build" -DCMAKE_PREFIX_PATH="$prefix" -DPAGE="$page" \
    -DCMAKE_COMPILE_WARNING_AS_ERROR=ON
  quietly cmake --build "$build"
  quietly ctest --test-dir "$build" --output-on-failure
  if command -v pkg-config > /dev/null; then
    mkdir "$work/pkg-config-$kind"
    (
      cd "$work/pkg-config-$kind"
      cp "$page/app.cpp" .
      PKG_CONFIG_PATH=$(dirname "$(find "$prefix" -name natten.pc)")
      export PKG_CONFIG_PATH
      LD_RUN_PATH=$(pkg-config --variable=libdir natten)
      export LD_RUN_PATH
      [ "natten $(pkg-config --modversion natten)" = "$("$build/app" | cut -d: -f1)" ]
      bash -e "$page/pkg_config.sh"
      ./app
      if [ "$kind" = static ]; then
        g++ -std=c++17 -static app.cpp $(pkg-config --cflags --libs --static natten) -o app-static
        ./app-static
      fi
    )
  else
    echo "!!! make consumer: SKIPPED pkg-config, which is not installed" >&2
  fi
}

# Each header alone, and all of them without exceptions and RTTI, without warnings.
check_headers() {
  local include=$1/include compiler standard header
  for compiler in g++ clang++; do
    command -v $compiler > /dev/null || continue
    echo "== headers, $compiler"
    local options=(-fsyntax-only -x c++ -I "$include" -Werror -Wall -Wextra -Wpedantic -Wconversion
      -Wsign-conversion -Wshadow -Wold-style-cast -Wundef -Wextra-semi -Wnon-virtual-dtor
      -Wdouble-promotion)
    if [ $compiler = g++ ]; then options+=(-Wuseless-cast -Wsuggest-override); fi
    for header in "$include"/natten/*.h; do
      for standard in c++17 c++2b; do
        echo "#include <natten/$(basename "$header")>" | $compiler "${options[@]}" -std=$standard - \
          || fail "$(basename "$header") does not compile alone as $standard, or with warnings"
      done
    done
    for standard in c++17 c++20; do
      echo "#include <natten/natten.h>" | $compiler "${options[@]}" -std=$standard \
        -fno-exceptions -fno-rtti - || fail "natten.h does not compile without exceptions"
    done
  done
}

# embed EXAMPLE BUILD_DIR OPTION...: configures a project that contains natten as that example says
embed() {
  local example=$1 build=$2
  shift 2
  cmake -S "$work/host" -B "$build" -DPAGE="$page" -DEMBED="$example" "$@"
}

# What a library of a project that contains natten gives to the project's own users.
check_embedded() {
  local example=$1 kind=$2 build=$work/$1 prefix=$work/$1-prefix
  shift 2
  echo "== $example, $kind"
  quietly embed "$example" "$build" -DNATTEN_INSTALL=ON "$@"
  quietly cmake --build "$build"
  quietly "$build/app"
  quietly "$build/tests"
  quietly cmake --install "$build" --prefix "$prefix"
  rm -rf "$build"
  grep -q "MIT License" "$prefix/share/doc/natten/LICENSE" || fail "no licence of natten"
  grep -q "project(host" "$prefix/share/doc/host/LICENSE" || fail "natten replaced the host's licence"
  quietly cmake -S "$here/client" -B "$work/$example-client" -DCMAKE_PREFIX_PATH="$prefix"
  quietly cmake --build "$work/$example-client"
  "$work/$example-client/client"
}

extract_examples

echo "== a package"
quietly cmake -S "$source_dir" -B "$work/natten" -DCMAKE_BUILD_TYPE=Release
quietly cmake --build "$work/natten"
(cd "$work/natten" && quietly cpack -B "$work/package")
if command -v dpkg-shlibdeps > /dev/null; then
  (cd "$work/natten" && quietly cpack -B "$work/package" -G DEB)
  quietly dpkg --contents "$work"/package/natten-*.deb
fi
# What follows is done with the package alone, and where it was not built for.
rm -rf "$work/natten"
mkdir "$work/static"
tar -xzf "$work"/package/natten-*.tar.gz -C "$work/static" --strip-components=1
[ -e "$work/static/share/doc/natten/LICENSE" ] || fail "the package has no licence"
check_headers "$work/static"
check_installed "$work/static" static
"$work/consumer-static/roles" > "$work/roles"
sed -n '/^| operation | tensor /,/^$/{/^$/!p}' "$source_dir/docs/cpp.md" \
  | diff "$work/roles" - || fail "the table of docs/cpp.md (>) is not that of roles_of (<)"

cp -r "$here/host" "$work/host"
mkdir "$work/host/third_party"
ln -s "$source_dir" "$work/host/third_party/natten"
# The archive that the example names is this tree.
check_embedded fetch_content shared -DFETCHCONTENT_SOURCE_DIR_NATTEN="$source_dir" \
  -DBUILD_SHARED_LIBS=ON -DCMAKE_BUILD_TYPE=Release
check_installed "$work/fetch_content-prefix" shared
bash "$here/../check_exports.sh" "$(find "$work/fetch_content-prefix" -name libnatten.so)"
# Debug is the quickest to compile.
check_embedded add_subdirectory static -DCMAKE_BUILD_TYPE=Debug \
  -DCMAKE_INTERPROCEDURAL_OPTIMIZATION=ON
nm -DC --defined-only "$work"/add_subdirectory-prefix/lib/libhost.so > "$work/names"
if grep -q ' T natten::' "$work/names"; then
  fail "a shared library exports the names of the natten that it contains"
fi

echo "== configured only"
# No build type stays none, and a host that is built for Python does not get natten's module.
quietly embed add_subdirectory "$work/plain" -DSKBUILD=2 -DNATTEN_INSTALL=ON
# What cannot be installed says so.
if embed add_subdirectory "$work/plain" -DNATTEN_INSTALL=OFF > "$work/log" 2>&1; then
  fail "an export of a target that links to a natten that is not installed was accepted"
fi
tr -s ' \n' ' ' < "$work/log" | grep 'target "natten" that is not in any export set' > /dev/null \
  || fail "no word of natten in $(cat "$work/log")"
sed 's/third_party\/natten/& EXCLUDE_FROM_ALL/' "$page/add_subdirectory.cmake" > "$page/excluded.cmake"
quietly embed excluded "$work/plain" -DNATTEN_INSTALL=ON
tr -s ' \n' ' ' < "$work/log" | grep 'natten was added with EXCLUDE_FROM_ALL' > /dev/null \
  || fail "no warning of EXCLUDE_FROM_ALL"
echo "the library works alone and in other projects, static and shared"
