# `make demo` and `make test` do all set-up themselves: a virtual environment in .venv with what they
# need, and the package built from this tree. They need Python 3.11+ with venv, a C++17 compiler and
# make; the C++ tests need GoogleTest (see `gtest`).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

SOURCES := pyproject.toml CMakeLists.txt $(shell find libnatten bindings python -type f -not -name '*.pyc')
CXX_FILES := $(shell find libnatten bindings cpp_tests -name '*.h' -o -name '*.cpp')

.PHONY: demo test test-cpp test-sanitize test-aarch64 test-python lint format consumer wheel \
  test-wheel clean gtest

demo: $(VENV)/package $(VENV)/demo
	$(BIN)/python examples/demo.py

test: test-cpp test-sanitize test-python

test-cpp: $(VENV)/build gtest
	cmake --preset tests
	cmake --build --preset tests
	ctest --preset tests

test-sanitize: $(VENV)/build gtest
	cmake --preset sanitize
	cmake --build --preset sanitize
	ctest --preset sanitize

# Not part of `test`: it needs a cross-compiler and QEMU, whose Debian packages it names.
test-aarch64: $(VENV)/build
	cpp_tests/aarch64.sh

# In two halves at once: most of the time goes to compilers that use one core.
test-python: $(VENV)/package $(VENV)/test $(VENV)/models
	@$(BIN)/python -m pytest tests/test_jax*.py & half=$$!; status=0; \
	$(BIN)/python -m pytest --ignore-glob='*/test_jax*.py' || status=$$?; \
	wait $$half || status=$$?; exit $$status

# Without GoogleTest, CMake fetches it; a Debian machine with root rights gets the package instead.
gtest:
	@if [ ! -e /usr/include/gtest/gtest.h ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; \
	then apt-get update -qq && apt-get install -y -qq libgtest-dev; fi

lint: $(VENV)/lint $(VENV)/package $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# Installs libnatten without Python and builds a separate project against it.
consumer: $(VENV)/build
	cpp_tests/consumer/check.sh build/consumer

# sdist, then the wheel from the sdist, then the wheel that any recent Linux can install.
wheel: $(VENV)/wheel
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/auditwheel repair --wheel-dir dist/manylinux dist/*.whl

# The wheel in environments that hold one framework only, and the oldest that is supported.
test-wheel: wheel
	tests/wheel/check.sh dist/manylinux/*.whl

clean:
	rm -rf build dist $(VENV) demo_output

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp for each list of requirements.
$(addprefix $(VENV)/,build demo test models lint wheel): $(VENV)/%: requirements/%.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -r $<
	@touch $@

# Published models that the tests run; what allin1 itself requires is heavy and not needed.
$(VENV)/models: $(VENV)/models-nodeps
$(VENV)/models-nodeps: requirements/models-nodeps.txt | $(BIN)/python
	$(BIN)/python -m pip install -q --no-deps -r $<
	@touch $@

$(VENV)/package: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install -q .
	@touch $@
