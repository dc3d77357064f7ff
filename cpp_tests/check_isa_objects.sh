#!/usr/bin/env bash
# Fails if an object file that is compiled for one instruction set defines any symbol but its table.
# The linker merges weak symbols, and could put code for a newer processor where an older one runs.
# Usage: check_isa_objects.sh OBJECT...
set -euo pipefail

failures=0
for object in "$@"; do
  symbols=$(nm --defined-only -g -C "$object" | sed -E 's/^[0-9a-fA-F]* *//')
  if ! [[ $symbols =~ ^R\ natten::detail::cpu::simd::isa_[a-z0-9]+$ || \
          $symbols =~ ^D\ natten::detail::cpu::simd::isa_[a-z0-9]+$ ]]; then
    echo "$object defines: $symbols" >&2
    failures=$((failures + 1))
  fi
done
echo "$# objects, $failures with symbols of their own"
[ "$#" -gt 0 ] && [ $failures -eq 0 ]
