#!/usr/bin/env bash
# pythons.sh [CHECK...]: builds the wheel under Python 3.13 and runs its checks there and, of the same
# file, under Python 3.14: in Debian trixie and sid, which debootstrap installs in build/pythons. What
# is there is reused; to have the distributions and frameworks of today, remove it.
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ "$(id -u)" != 0 ] || ! command -v debootstrap >/dev/null; then
  echo "make test-pythons: needs root and the Debian package debootstrap" >&2
  exit 1
fi
# In a mount namespace of its own, so that no mount outlives this script.
if [ -z "${NATTEN_PYTHONS_INSIDE:-}" ]; then
  NATTEN_PYTHONS_INSIDE=1 exec unshare --mount --propagation private "$0" "$@"
fi
systems=build/pythons
[ $# -gt 0 ] || set -- plain newest-jax
checks=("$@")

# Debian from the mirror that this machine uses, or else debootstrap's.
mirror=$(sed -nE 's/^URIs: *(\S+).*/\1/p; s/^deb +(\[[^]]*\] +)?(\S+) .*/\2/p' \
  /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null | grep -m1 -E '/debian/?$' || true)

# system SUITE: a folder with this suite and, in its /natten, the sources
system() {
  local root=$systems/$1 file
  if [ ! -e "$root/.complete" ]; then
    rm -rf "$root"
    mkdir -p "$systems"
    # shellcheck disable=SC2086
    debootstrap --variant=minbase \
      --include=python3,python3-venv,python3-dev,python3-pip,g++,ca-certificates,git \
      "$1" "$root" $mirror >"$systems/$1.log" || { tail -n 20 "$systems/$1.log" >&2; exit 1; }
    touch "$root/.complete"
  fi
  for file in /etc/ssl/certs/ca-certificates.crt /etc/resolv.conf /etc/hosts /etc/pip.conf /etc/xdg/pip; do
    [ ! -e "$file" ] || { mkdir -p "$root/${file%/*}"; cp -rL "$file" "$root/${file%/*}/"; }
  done
  for file in proc dev sys; do mount --rbind "/$file" "$root/$file"; done
  rm -rf "$root/natten"
  mkdir "$root/natten"
  tar -c --exclude=./.git --exclude=./.venv --exclude=./build --exclude=./dist . | tar -x -C "$root/natten"
}

# inside SUITE COMMAND...: runs a command there, in /natten
inside() {
  local root=$systems/$1 bundle=/etc/ssl/certs/ca-certificates.crt
  shift
  # The compiler and its cache are those of the system inside.
  env -u PIP_FIND_LINKS -u SSL_CERT_DIR -u TMPDIR -u PYTHONPATH -u CC -u CXX \
    -u CMAKE_C_COMPILER_LAUNCHER -u CMAKE_CXX_COMPILER_LAUNCHER HOME=/root \
    PATH=/usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_CERT=$bundle SSL_CERT_FILE=$bundle REQUESTS_CA_BUNDLE=$bundle \
    chroot "$root" sh -ec 'cd /natten && exec "$@"' sh "$@"
}

system trixie
system sid
inside trixie python3 -m venv --clear /venv
inside trixie /venv/bin/python -m pip install -q -r requirements/wheel.txt
inside trixie /venv/bin/python -m build
inside trixie sh -c 'PATH=/venv/bin:$PATH auditwheel repair --wheel-dir dist/manylinux dist/*.whl'
inside trixie sh -c '/venv/bin/python tools/check_wheel.py --built-here dist/manylinux/*.whl'
cp -r $systems/trixie/natten/dist $systems/sid/natten/
for suite in trixie sid; do
  echo "--- Debian $suite: $(inside $suite python3 --version)"
  inside $suite sh -c 'tests/wheel/check.sh dist/manylinux/*.whl "$@"' sh "${checks[@]}"
done
