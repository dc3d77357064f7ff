#!/usr/bin/env bash
# Builds for the GPU of this machine, tests and times, in less than ten minutes.
#
#   tests/gpu/run.sh [REPORT [WHEELS]]
#
# REPORT (default: gpu_report) is a folder for at most a dozen files, report.md the first to
# read. It is written as stages end, so that what a stopped run has found is there. A stage that
# fails does not keep the others from running; it makes the exit status 1.
#
# Needs bash, a CUDA toolkit, Python 3.11 or newer with PyTorch for CUDA and pytest, and, for the
# C++ tests, GoogleTest: installed, or its sources in the folder that GTEST_SOURCE names. There may
# be no network: build tools (scikit-build-core, nanobind, cmake, ninja) are those that Python has,
# or wheels in the folder WHEELS. PYTHON names the interpreter, BUDGET the seconds for everything.
set -euo pipefail
cd "$(dirname "$0")/../.."

report=$(realpath -m "${1:-gpu_report}")
wheels=${2:+$(realpath "$2")}
PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-570}
mkdir -p "$report"
work=build/gpu
rm -f "$work"/*.md # of a run before
site=$PWD/$work/site
mkdir -p "$site"
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 NATTEN_TEST_NEEDS_GPU=1 # without, the C++ tests are skipped
PATH="$site/bin:$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH"
export PATH
failed=0

note() { printf '%s\n' "$*" | tee -a "$report/report.md"; }

# stage LOG SECONDS TITLE COMMAND...: runs a command for so long at most, its output in LOG
stage() {
  local log=$report/$1 limit=$2 title=$3 start=$SECONDS status=0
  shift 3
  if ((limit > BUDGET - SECONDS)); then
    limit=$((BUDGET - SECONDS))
    if ((limit < 5)); then
      skip "$title" "no time left"
      failed=1
      return 1
    fi
  fi
  { echo; echo "### $title: $*"; } >>"$log"
  timeout --kill-after=10 "$limit" "$@" >>"$log" 2>&1 || status=$?
  local took=$((SECONDS - start))
  case $status in
    0) note "| $title | passed | $took s | $(basename "$log") |" ;;
    124 | 137) note "| $title | **stopped after $limit s** | $took s | $(basename "$log") |" ;;
    *) note "| $title | **failed, status $status** | $took s | $(basename "$log") |" ;;
  esac
  if [ "$status" != 0 ]; then
    failed=1
    tail -n 25 "$log"
  fi
  return "$status"
}
skip() { note "| $1 | skipped: $2 | | |"; }
has() { command -v "$1" >/dev/null; }
imports() { "$PYTHON" -c "import $1" 2>/dev/null; }

environment() {
  nvidia-smi || true
  nvcc --version || true
  cmake --version || true
  "$PYTHON" --version
  for package in torch triton jax jaxlib nanobind scikit_build_core pytest hypothesis; do
    "$PYTHON" -c "import importlib.metadata as m; print('$package', m.version('$package'))" \
      2>/dev/null || echo "$package: missing"
  done
  git log -1 --format='commit %H' 2>/dev/null || true
}

compute_capability() {
  nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. '
}

: >"$report/report.md"
note "# Tests on a GPU, $(date -u +%F)"
note ""
environment >"$report/environment.txt" 2>&1
note '```'
grep -hE '^(torch|jax|nvidia-smi|Python|commit|cmake)|release|NVIDIA [A-Z]|Driver' \
  "$report/environment.txt" | sed 's/  */ /g' | tee -a "$report/report.md" || true
note '```'
note ""
note "| stage | result | time | log |"
note "| --- | --- | --- | --- |"

capability=$(compute_capability || true)
if [ -z "$capability" ] || ! has nvcc; then
  skip "everything" "no NVIDIA GPU, or no nvcc on PATH"
  exit 1
fi
architecture=$capability-real
[ "$capability" != 90 ] || architecture=90a-real

if [ -n "$wheels" ]; then
  # No dependencies: what is missing must be in the folder, and nothing else is to be replaced.
  stage build.log 60 "install wheels" "$PYTHON" -m pip install -q --no-index --no-deps --no-compile \
    --upgrade --target "$site" "$wheels"/*.whl || true
fi

# ---- build ----

# The package, its Python module and the C++ tests share one build, as kernels take minutes. Where
# it fails it is tried without the tests, and without XLA.
xla=OFF
! imports jaxlib || xla=ON
package=$work/package
install=("$PYTHON" -m pip install -q --no-build-isolation --no-deps --no-index --no-compile
  --upgrade --target "$site" "-Cbuild-dir=$package" -Ccmake.define.NATTEN_WITH_CUDA=ON
  "-Ccmake.define.CMAKE_CUDA_ARCHITECTURES=$architecture")
[ -z "${GTEST_SOURCE:-}" ] ||
  install+=("-Ccmake.define.FETCHCONTENT_SOURCE_DIR_GOOGLETEST=$(realpath "$GTEST_SOURCE")")
package_built=0 cpp_built=OFF
for variant in "$xla ON" "$xla OFF" "OFF ON"; do
  read -r xla cpp_built <<<"$variant"
  if stage build.log 300 "build (sm_${architecture%-real}, XLA $xla, C++ tests $cpp_built)" \
    "${install[@]}" "-Ccmake.define.NATTEN_WITH_XLA=$xla" \
    "-Ccmake.define.NATTEN_BUILD_TESTS=$cpp_built" .; then
    package_built=1
    break
  fi
  cpp_built=OFF
done

# In the order of what half an hour on a GPU is for: first what says whether kernels are right, then
# what says how fast they are and why, then the rest.

# ---- C++ tests, and a few of them under sanitizers, which are slow ----

gtest=$package/cpp_tests/natten_tests
# Tests of the backends for CPUs run elsewhere.
filter='*on_gpu*:OnGpu*'
few='*ForwardIsTheDefinition/*on_gpu_bfloat16_rank2:*BackwardIsTheDerivative/*on_gpu_bfloat16_rank2'
if [ "$cpp_built" = ON ]; then
  stage cpp_tests.log 120 "C++ tests" "$gtest" --gtest_brief=1 "--gtest_filter=$filter" || true
fi
if [ "$cpp_built" = OFF ]; then
  skip "compute-sanitizer" "the C++ tests are not built"
elif ! has compute-sanitizer; then
  skip "compute-sanitizer" "not installed"
else
  for tool in memcheck racecheck; do
    stage sanitizer.log "${SANITIZER_SECONDS:-60}" "compute-sanitizer $tool" compute-sanitizer \
      --tool "$tool" --print-limit 20 --error-exitcode 1 "$gtest" --gtest_brief=1 "--gtest_filter=$few" || true
  done
fi

# ---- times ----

# benchmarks NAME SECONDS TITLE OPTION...: benchmarks/gpu.py with its figures in NAME.json
benchmarks() {
  local name=$1 limit=$2 title=$3
  shift 3
  stage benchmarks.log "$limit" "$title" "$PYTHON" benchmarks/gpu.py --limit 30 \
    --json "$report/$name.json" --markdown "$work/$name.md" "$@" || true
}
large=(1d_32k_w2048 flux_na80 hunyuan_na)
if [ "$package_built" = 1 ]; then
  benchmarks gpu 150 "three cases beside SDPA and FlexAttention" --cases "${large[@]}" --budget 120
  counters=gpu__time_duration.sum,sm__throughput.avg.pct_of_peak_sustained_elapsed
  counters+=,sm__inst_executed_pipe_tensor.sum,smsp__inst_executed.sum,sm__warps_active.avg.pct_of_peak_sustained_active
  counters+=,smsp__issue_active.avg.pct_of_peak_sustained_active,lts__throughput.avg.pct_of_peak_sustained_elapsed
  counters+=,l1tex__data_bank_conflicts_pipe_lsu.sum
  if ! has ncu; then
    skip "profiler counters" "ncu is not installed"
  elif ! ncu --launch-count 1 "$PYTHON" -c 'import torch; torch.ones(1, device="cuda")' \
    >"$report/counters.log" 2>&1 || grep -q ERR_NVGPUCTRPERM "$report/counters.log"; then
    skip "profiler counters" "ncu may not read them, see counters.log"
  else
    stage counters.log 60 "profiler counters" ncu --kernel-name-base demangled \
      --kernel-name regex:TileKernel --launch-count 12 --metrics "$counters" "$PYTHON" \
      benchmarks/gpu.py --cases "${large[@]}" 2d_128_k13_tf32 --ways ours --passes forward --rounds 1 || true
  fi
  benchmarks variants 90 "64 rows against 128, key-parallel against deterministic" \
    --cases "${large[@]}" --ways ours ours_64_rows ours_keys --rounds 7 --budget 60
fi

# ---- the rest ----

if [ "$package_built" = 1 ]; then
  stage pytest.log 120 "PyTorch tests" "$PYTHON" -m pytest -q -p no:cacheprovider \
    tests/test_cuda.py || true
  if [ "$xla" = ON ]; then
    stage pytest.log 60 "JAX tests" "$PYTHON" -m pytest -q -p no:cacheprovider \
      tests/test_cuda_jax.py || true
  else
    skip "JAX tests" "built without XLA"
  fi
  benchmarks gpu_rest "${BENCHMARK_SECONDS:-240}" "the other cases" --cases flux_na80s16 2d_128_k13 \
    2d_128_k13_tf32 1d_32k_w2048s256 1d_32k_w2048s2048 hunyuan_na_s16_8_8 --budget 180
fi

for name in gpu variants gpu_rest; do
  [ -e "$work/$name.md" ] || continue
  note ""
  note "## Benchmarks: $name"
  note ""
  cat "$work/$name.md" >>"$report/report.md"
done
note ""
note "$([ "$failed" = 0 ] && echo "All stages passed" || echo "**Some stages failed**") in $SECONDS s."
exit "$failed"
