#!/usr/bin/env bash
# Fails if a shared libnatten exports anything but its interface: what the public headers mark
# NATTEN_EXPORT. Usage: check_exports.sh SHARED_LIBRARY
set -euo pipefail

if [ $# -ne 1 ] || [ ! -f "$1" ]; then
  echo "usage: $0 SHARED_LIBRARY" >&2
  exit 2
fi
headers=$(cd "$(dirname "$0")/../libnatten/include/natten" && pwd)

# Names in natten::detail that public headers export, such as run_of_rank.
detail_names=$(awk '
  /^namespace detail \{/ { inside = 1 }
  /^}  \/\/ namespace detail/ { inside = 0 }
  inside && /NATTEN_EXPORT/ && match($0, /[A-Za-z_0-9]+\(/) {
    print substr($0, RSTART, RLENGTH - 1)
  }' "$headers"/*.h)

exported=0
weak=0
failures=0
fail() {
  echo "must not be exported: $1 ($2)" >&2
  failures=$((failures + 1))
}

while read -r line; do
  kind=${line%% *}
  name=${line#* }
  exported=$((exported + 1))
  # What a symbol belongs to, and not the types of its result and arguments.
  case $name in
    'typeinfo for '* | 'typeinfo name for '* | 'vtable for '*)
      case ${name##* for } in
        natten::Error | natten::Executor) ;;
        std::*) weak=$((weak + 1)) ;;
        *) fail "$name" "$kind" ;;
      esac
      ;;
    natten::detail::*)
      function=${name#natten::detail::}
      function=${function%%(*}
      if ! grep -qxF "$function" <<< "$detail_names"; then fail "$name" "$kind"; fi
      ;;
    *'(anonymous namespace)'*) fail "$name" "$kind" ;;
    natten::*) ;;
    *)
      # Templates of the standard library are emitted as weak symbols into whatever uses them.
      # Those with a type of natten in them are natten's own.
      if [[ $kind =~ ^[WVu]$ && $name != *natten::* && $name == *std::* ]]; then
        echo "weak, of the standard library: $name"
        weak=$((weak + 1))
      else
        fail "$name" "$kind"
      fi
      ;;
  esac
done < <(nm -D --defined-only -C "$1" | sed -E 's/^[0-9a-fA-F]* *//')

if [ $exported -eq 0 ]; then
  echo "$1 exports nothing; was it stripped of its interface?" >&2
  exit 1
fi
echo "$exported exported symbols, $weak of them weak ones of the standard library, $failures wrong"
[ $failures -eq 0 ]
