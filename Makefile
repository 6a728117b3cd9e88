# `make help` lists the commands. Each command creates the environment that it needs. The main
# environment, .venv, has the locked versions of tests/locked.txt.

PYTHON ?= python3
BIN := .venv/bin
EXTRA := test

.PHONY: help demo test test-slow test-oldest test-newest test-fuzz test-accelerators test-device bench-device lint lock bench bench-train bench-compiled bench-sharded build docs types clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-18s %s\n", $$1, $$2}' Makefile

demo: .venv/installed ## train a small network with several optimizers; results in out/digits
	$(BIN)/python examples/digits.py

test: .venv/installed lint ## linter, type checker and all but the slow tests
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: .venv/installed ## slow tests: whole programs, eight devices, kills and resumes
	$(BIN)/python -m pytest -n 2 -m slow

test-oldest: .venv-oldest/installed ## all tests with the oldest versions that pyproject.toml admits
	.venv-oldest/bin/python -m pytest -n 2

test-newest: .venv-newest/installed ## all tests with the newest versions, on Python 3.12 or later
	.venv-newest/bin/python -m pytest -n 2

test-fuzz: .venv/installed ## property tests with 1000 random examples each, 15 minutes
	FUZZ_EXAMPLES=1000 $(BIN)/python -m pytest -n 2 tests/test_fuzz.py

test-accelerators: .venv-accelerators/installed ## tests of steps compiled for an H100, without one
	JAX_PLATFORMS=cpu JAX_ENABLE_COMPILATION_CACHE=false .venv-accelerators/bin/python -m pytest -n 2 tests/benchmarks/test_compiled.py

test-device: ## numerical tests on this machine's accelerator; installs nothing
	$(PYTHON) -m pytest -q -o addopts= -o filterwarnings= -p no:cacheprovider -m device tests/test_device.py tests/test_golden.py

bench-device: ## benchmarks on this machine's accelerator; installs nothing
	$(PYTHON) benchmarks/device.py

lint: .venv/installed ## linter, formatter and type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock: .venv-release/installed ## update the locked versions
	UV_CUSTOM_COMPILE_COMMAND="make lock" .venv-release/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --extra test pyproject.toml --output-file tests/locked.txt

# Without these options the benchmarks take longer.
bench: .venv/installed ## short versions of the benchmarks, under 5 minutes
	$(BIN)/python benchmarks/step.py --tree resnet18 --sweeps 1 --out out/benchmarks
	$(BIN)/python benchmarks/train.py --network columns unrolled --width 512 --depth 4 --rounds 5 --out out/benchmarks
	$(BIN)/python benchmarks/scaling.py --parameters 1e5 1e6 1e7 --layers 10 100 --kernels 10 100 --rounds 11 --out out/benchmarks
	$(BIN)/python benchmarks/memory.py --dtype float32 --out out/benchmarks
	$(BIN)/python benchmarks/recorders.py --rounds 100 --out out/benchmarks
	$(BIN)/python benchmarks/precision.py --steps 1000 --out out/benchmarks
	$(BIN)/python benchmarks/detection.py --small --out out/benchmarks

# Makes the first tables of docs/benchmarks.md.
bench-train: .venv/installed .venv-newest/installed ## time training steps on two versions of JAX, 30 minutes
	$(BIN)/python benchmarks/train.py
	.venv-newest/bin/python benchmarks/train.py

# These two only compile. They do not need the accelerators that they compile for.
bench-compiled: .venv-accelerators/installed ## memory traffic of steps compiled for an H100 and a TPU, 15 minutes
	.venv-accelerators/bin/python benchmarks/compiled.py --out out/benchmarks

bench-sharded: .venv-accelerators/installed ## communication of steps compiled for many devices, 7 minutes
	.venv-accelerators/bin/python benchmarks/sharded.py --out out/benchmarks

# Checks the contents of wheel and sdist, and the wheel in a new environment.
build: .venv-release/installed ## build and check wheel and sdist in dist/
	rm -rf dist
	.venv-release/bin/python -m build
	.venv-release/bin/python -m twine check --strict dist/*
	.venv-release/bin/python .ci/check_dist.py

# The tests run the programs in the pages, and the build runs the tutorials. Tests that need Haiku
# and Keras run here, because only this environment has them.
docs: .venv-docs/installed ## build the documentation in out/site; test its programs and links
	.venv-docs/bin/python -m pytest -n 2 tests/pages/test_documents.py tests/detection/test_transposed.py tests/detection/test_half_precision.py
	PATH=$(CURDIR)/.venv-docs/bin:$$PATH JAX_PLATFORMS=cpu NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build
	.venv-docs/bin/python -m pytest -n 2 tests/pages/test_site.py

# Checks tests/typed_use.py as a user's editor would, and the types of all public names.
types: .venv-types/installed ## check the types that users see, with pyright
	. .venv-types/bin/activate && pyright && pyright --ignoreexternal --verifytypes spherical_optax

.venv/installed: tests/locked.txt
.venv/installed: VERSIONS := --constraint tests/locked.txt
.venv-oldest/installed: tests/oldest.txt
.venv-oldest/installed: VERSIONS := --constraint tests/oldest.txt
.venv-newest/installed: PYTHON = $(shell .ci/newest_python)
.venv-accelerators/installed: EXTRA := accelerators
.venv-docs/installed: EXTRA := docs
.venv-release/installed: EXTRA := release
.venv-types/installed: EXTRA := types
ENVIRONMENTS := .venv .venv-oldest .venv-newest .venv-accelerators .venv-docs .venv-release .venv-types
$(ENVIRONMENTS:=/installed): pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet --editable ".[$(EXTRA)]" $(VERSIONS)
	touch $@

clean: ## remove environments, caches and dist/
	rm -rf $(ENVIRONMENTS) dist .jax_cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
