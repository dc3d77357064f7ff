#!/usr/bin/env bash
# check.sh WHEEL [CHECK...]: installs a wheel with one framework at a time and runs that framework's
# tests but the long ones. Without names of checks: those that suit the Python that most of the tests run on.
set -euo pipefail
wheel=$(realpath "$1")
shift
wanted=" ${*:-plain torch jax oldest-jax} "
cd "$(dirname "$0")/.."
environments=$(mktemp -d)
trap 'rm -rf "$environments"' EXIT

# check NAME FORBIDDEN TESTS REQUIREMENT...: the tests pass where FORBIDDEN cannot be imported
check() {
  local name=$1 forbidden=$2 tests=$3
  shift 3
  [[ $wanted == *" $name "* ]] || return 0
  echo "--- $name: $*"
  python3 -m venv "$environments/$name"
  "$environments/$name/bin/python" -m pip install -q --no-compile pytest hypothesis numpy "$@"
  "$environments/$name/bin/python" -m pip list | grep -E '^(torch|jax|jaxlib|flax|numpy|natten) '
  "$environments/$name/bin/python" -c "import importlib.util, sys
sys.exit(any(importlib.util.find_spec(name) for name in '$forbidden'.split()))"
  # shellcheck disable=SC2086
  "$environments/$name/bin/python" -m pytest -q -m "not long" -p no:cacheprovider $tests
}

# The oldest JAX that there is for this Python, as pinned for the build.
oldest=$(python3 -c "
import re, sys
pins = re.findall(r'jaxlib==(\S+); python_version (<|>=) .3\.(\d+).', open('../requirements/xla-headers.txt').read())
print(*(v for v, sign, minor in pins if (sys.version_info < (3, int(minor))) == (sign == '<')))")

check plain "torch jax" \
  "test_package.py test_bad_arguments.py test_binding.py test_config.py test_context.py test_processes.py test_utils.py test_numpy.py" "$wheel"
check torch "jax" "test_package.py test_private_names.py test_torch.py test_torch_nested.py test_hub.py" "torch==2.13.0" kernels "$wheel[torch]"
# Here with all of XLA's optimisations, which the tests leave out elsewhere.
JAX_DISABLE_MOST_OPTIMIZATIONS=0 check jax "torch flax" "test_package.py test_private_names.py test_jax.py" flatbuffers "$wheel[jax]"
check oldest-jax "torch" "test_private_names.py test_jax.py test_jax_sharding.py test_jax_transformations.py::test_exported_programs_run_in_a_fresh_process test_flax.py" "jax==$oldest" "flax==0.10.7" flatbuffers "$wheel[flax]"
check newest-jax "torch" "test_bad_arguments.py test_private_names.py test_jax.py test_jax_sharding.py test_jax_transformations.py::test_exported_programs_run_in_a_fresh_process test_flax.py" flatbuffers "$wheel[flax]"
