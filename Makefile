# `make demo` and `make test` do all set-up themselves: a virtual environment in .venv with what they
# need, and the package built from this tree. They need Python 3.11+ with venv, a C++17 compiler and
# make; the C++ tests need GoogleTest (see `gtest`).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The package, the wheel and the C++ tests hold the same library. One name of the compiler, one set of
# flags and equal paths from build folder to sources let ccache, where there is one, compile it once.
export CC CXX
ifneq ($(shell command -v ccache 2>/dev/null),)
export CMAKE_C_COMPILER_LAUNCHER ?= ccache
export CMAKE_CXX_COMPILER_LAUNCHER ?= ccache
export CCACHE_BASEDIR ?= $(CURDIR)
export CCACHE_NOHASHDIR ?= 1
endif
export SKBUILD_CMAKE_DEFINE := NATTEN_WARNINGS_AS_ERRORS=ON
# Most of what is installed is never imported, so that compiling all of it to bytecode is wasted. What is
# imported must be compiled but once: each of the many processes that tests start would take seconds.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/python -m pip install -q --no-compile

SOURCES := pyproject.toml CMakeLists.txt $(shell find libnatten bindings python -type f -not -name '*.pyc')
CXX_FILES := $(shell find libnatten bindings cpp_tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: demo example-weather test test-all test-cpp test-cpp-rest test-cuda test-cuda-mutations test-sanitize test-clang test-cross test-cross-one \
  test-wine test-aarch64 test-python test-python-rest lint types tidy fuzz docs format consumer cuda wheel wheels hub test-wheel test-pythons ci-full clean gtest

demo: $(VENV)/package $(VENV)/demo
	$(BIN)/python examples/demo.py

example-weather: $(VENV)/package $(VENV)/demo
	$(BIN)/python examples/weather.py

# What a newcomer runs: each kind of test, on the best instruction set, with a tenth of the random
# cases. What it leaves out is in the test-…-rest.
test: test-cpp test-python

test-all: test test-cpp-rest test-python-rest test-sanitize test-clang test-cross-one test-wheel consumer \
  cuda tidy fuzz docs

test-cpp: $(VENV)/build gtest
	cmake --preset tests -DNATTEN_TEST_EMULATED_CUDA=OFF -DNATTEN_TEST_PTX=OFF
	cmake --build --preset tests
	ctest --preset quick

# Each backend and each instruction set, and CUDA kernels on an emulator.
test-cpp-rest: $(VENV)/build gtest
	cmake --preset tests -DNATTEN_TEST_EMULATED_CUDA=ON -DNATTEN_TEST_PTX=OFF
	cmake --build --preset tests
	ctest --preset rest

# It needs clang 14 or newer, Debian's package `clang`.
test-sanitize: $(VENV)/build gtest
	cmake --preset sanitize
	cmake --build --preset sanitize
	ctest --preset sanitize

# The instruction set that is chosen here, and the one that runs anywhere. It needs clang 14 or newer,
# Debian's package `clang`.
test-clang: $(VENV)/build gtest
	cmake --preset clang
	cmake --build --preset clang
	ctest --preset clang

# Compiles and links for other systems; nothing runs. One target of them is part of .ci/run.
CROSS_TARGETS := aarch64-macos x86_64-linux-musl aarch64-linux-gnu.2.28 x86_64-windows-gnu
test-cross test-cross-one: $(VENV)/build $(VENV)/cross
test-cross:
	cpp_tests/cross.sh $(CURDIR)/$(BIN)/python $(CROSS_TARGETS)
test-cross-one:
	cpp_tests/cross.sh $(CURDIR)/$(BIN)/python $(firstword $(CROSS_TARGETS))

# The C++ tests of a DLL, under Wine. It names the Debian packages that it needs.
test-wine: $(VENV)/build $(VENV)/cross
	cpp_tests/wine.sh $(CURDIR)/$(BIN)/python

# Not part of `test`: it needs a cross-compiler and QEMU, whose Debian packages it names.
test-aarch64: $(VENV)/build
	cpp_tests/aarch64.sh

# The CUDA kernels' PTX, run on the host (cpp_tests/ptx): it needs nvcc, but no GPU.
# test-cuda-mutations lists what these tests would find: each barrier, wait and mask left out once.
test-cuda: run_ptx := ctest --preset ptx
test-cuda-mutations: run_ptx := build/tests/cpp_tests/natten_ptx_tests --gtest_filter='*MutatedKernels*'
test-cuda test-cuda-mutations: $(VENV)/build gtest
ifeq ($(shell command -v nvcc 2>/dev/null),)
	@echo "!!! make $@: SKIPPED, THE PTX OF NO CUDA KERNEL HAS BEEN RUN: no nvcc on PATH" >&2
else
	cmake --preset tests -DNATTEN_TEST_PTX=ON
	cmake --build --preset tests --target natten_ptx_tests
	$(run_ptx)
endif

# In two halves at once: most of the time goes to compilers that use one core.
JAX_TESTS := tests/test_jax*.py tests/test_flax*.py
test-python: marks := not long
test-python-rest: marks := long
test-python test-python-rest: $(VENV)/package $(VENV)/test $(VENV)/models
	@$(BIN)/python -m pytest -m '$(marks)' --durations=10 $(wildcard $(JAX_TESTS)) & half=$$!; status=0; \
	$(BIN)/python -m pytest -m '$(marks)' --durations=10 $(JAX_TESTS:%=--ignore-glob='%') || status=$$?; \
	wait $$half || status=$$?; exit $$status

# Without GoogleTest, CMake fetches it; a Debian machine with root rights gets the package instead.
gtest:
	@if [ ! -e /usr/include/gtest/gtest.h ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; \
	then apt-get update -qq && apt-get install -y -qq libgtest-dev; fi

# .pre-commit-config.yaml has the same commands.
lint: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

types: $(VENV)/lint $(VENV)/package $(VENV)/test
	$(BIN)/mypy

# Bugs and waste that clang-tidy finds in the library (.clang-tidy). It needs Debian's packages `clang`
# and `clang-tidy`, 14 or newer.
TIDY_FILES := $(shell find libnatten/src -name '*.cpp')
tidy: $(VENV)/build
	cmake --preset clang -B build/tidy -DNATTEN_BUILD_TESTS=OFF
	printf '%s\n' $(TIDY_FILES) | xargs -P 2 -n 1 clang-tidy --quiet -p build/tidy

# Calls `natten::run` for a minute with what libFuzzer makes up. What fails stays in build/fuzz.
fuzz: $(VENV)/build gtest
	cmake --preset sanitize
	cmake --build --preset sanitize --target natten_fuzz
	mkdir -p build/fuzz/corpus
	build/sanitize/natten_fuzz -max_total_time=60 -timeout=30 -max_len=256 -print_funcs=0 -print_final_stats=1 \
	  -artifact_prefix=build/fuzz/ build/fuzz/corpus

format: $(VENV)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# The pages of docs/ and the reference of all public names, as a site in build/site. Fails where a
# link leads nowhere, or a page is not in the navigation (mkdocs.yml).
docs: $(VENV)/docs $(VENV)/package $(VENV)/test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# libnatten without Python, installed and as a part of another project, and programs that use it.
consumer: $(VENV)/build
	cpp_tests/consumer/check.sh build/consumer

# Compiles and links the CUDA kernels for all architectures, and checks their machine code. Nothing
# runs: that takes a GPU (tests/gpu/run.sh). Of the tests only the file that no other build compiles.
# CUDA_KERNELS="fna_bfloat16 simt_float" compiles these kernels only, and links nothing.
CUDA_OBJECTS := libnatten/CMakeFiles/natten.dir
cuda: $(VENV)/build $(VENV)/cuda gtest
ifeq ($(shell command -v nvcc 2>/dev/null),)
	@echo "!!! make cuda: SKIPPED, NO CUDA KERNEL HAS BEEN COMPILED OR CHECKED: no nvcc on PATH" >&2
else
	cmake --preset cuda -B build/cuda-check -DBUILD_SHARED_LIBS=ON \
	  -DCMAKE_SHARED_LINKER_FLAGS=-Wl,--no-undefined
	cmake --build build/cuda-check --target cpp_tests/CMakeFiles/natten_tests.dir/cuda_test.cpp.o \
	  $(if $(CUDA_KERNELS),$(CUDA_OBJECTS)/src/cuda/backends.cu.o $(CUDA_KERNELS:%=$(CUDA_OBJECTS)/cuda/%.cu.o),natten)
	$(BIN)/python cpp_tests/check_cuda.py build/cuda-check
endif

# sdist, then the wheel from the sdist, then the wheel that any recent Linux can install.
wheel: $(VENV)/wheel
	rm -rf dist && mkdir -p build/tmp
	TMPDIR=$(CURDIR)/build/tmp $(BIN)/python -m build --outdir dist
	$(BIN)/auditwheel repair --wheel-dir dist/manylinux dist/*.whl
	$(BIN)/python tools/check_wheel.py --built-here dist/manylinux/*.whl

# Wheels for other systems too, in dist/wheels, by PyPI's ziglang (tools/wheels.py); those of PLATFORMS
# only, or with CUDA=1 those with CUDA kernels for this system, by nvcc.
wheels: $(VENV)/build $(VENV)/xla-headers $(VENV)/cross $(VENV)/wheel
	$(BIN)/python tools/wheels.py $(if $(CUDA),--cuda) $(PLATFORMS)

# A kernel repository for the Hugging Face Hub, in build/hub, of the wheels for CPUs in dist/wheels.
hub:
	rm -rf build/hub
	$(PYTHON) hub/assemble.py $(wildcard dist/wheels/*manylinux_2_28* dist/wheels/*macosx* dist/wheels/*win_amd64*)

# The wheel in environments that hold one framework only, and the oldest that is supported.
test-wheel: wheel
	tests/wheel/check.sh dist/manylinux/*.whl

# One wheel under newer Pythons with the newest numpy, JAX and Flax; needs root and debootstrap.
test-pythons:
	tests/wheel/pythons.sh

# What is slow or depends on a changing distribution, run by hand when something that it covers has
# changed (CONTRIBUTING.md).
ci-full: test-clang test-pythons test-cross test-wine cuda test-cuda

clean:
	rm -rf build dist $(VENV) demo_output

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp for each list of requirements.
$(addprefix $(VENV)/,build xla-headers cross cuda demo docs test models lint wheel): $(VENV)/%: requirements/%.txt | $(BIN)/python
	$(INSTALL) -r $<
	@touch $@

# Published models that the tests run; what allin1 itself requires is heavy and not needed.
$(VENV)/models: $(VENV)/models-nodeps
$(VENV)/models-nodeps: requirements/models-nodeps.txt | $(BIN)/python
	$(INSTALL) --no-deps -r $<
	@touch $@

$(VENV)/package: $(SOURCES) | $(BIN)/python
	$(INSTALL) .
	@touch $@
