#!/usr/bin/env bash
# Installs a wheel with one framework at a time and runs that framework's tests.
set -euo pipefail
wheel=$(realpath "$1")
cd "$(dirname "$0")/.."
environments=$(mktemp -d)
trap 'rm -rf "$environments"' EXIT

# check NAME FORBIDDEN TESTS REQUIREMENT...: the tests pass where FORBIDDEN cannot be imported
check() {
  local name=$1 forbidden=$2 tests=$3
  shift 3
  echo "--- $name: $*"
  python3 -m venv "$environments/$name"
  "$environments/$name/bin/python" -m pip install -q --no-compile pytest hypothesis numpy "$@"
  "$environments/$name/bin/python" -c "import importlib.util, sys
sys.exit(any(importlib.util.find_spec(name) for name in '$forbidden'.split()))"
  # shellcheck disable=SC2086
  "$environments/$name/bin/python" -m pytest -q -p no:cacheprovider $tests
}

check plain "torch jax" \
  "test_package.py test_binding.py test_context.py test_utils.py test_numpy.py" "$wheel"
check torch "jax" "test_package.py test_torch.py test_torch_nested.py" "torch==2.13.0" "$wheel[torch]"
# Here with all of XLA's optimisations, which the tests leave out elsewhere.
JAX_DISABLE_MOST_OPTIMIZATIONS=0 check jax "torch flax" "test_package.py test_jax.py" flatbuffers "$wheel[jax]"
check oldest-jax "torch" "test_jax.py test_jax_sharding.py test_jax_transformations.py::test_exported_programs_run_in_a_fresh_process test_flax.py" "jax==0.6.2" "flax==0.10.7" flatbuffers "$wheel[flax]"
