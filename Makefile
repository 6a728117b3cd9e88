# `make help` lists the commands. Each creates the environment that it needs, in the versions of
# tests/locked.txt where there are locked ones.

PYTHON ?= python3
BIN := .venv/bin
EXTRA := test

.PHONY: help demo test test-slow test-oldest test-newest test-fuzz test-accelerators test-device bench-device lint lock bench bench-train bench-compiled bench-sharded build docs types clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-18s %s\n", $$1, $$2}' Makefile

demo: .venv/installed ## the main job: a small network under several optimizers, in out/digits
	$(BIN)/python examples/digits.py

test: .venv/installed lint ## linter, type checker and tests
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: .venv/installed ## whole programs, eight devices, kills and resumes
	$(BIN)/python -m pytest -n 2 -m slow

test-oldest: .venv-oldest/installed ## all tests with the oldest versions that pyproject.toml admits
	.venv-oldest/bin/python -m pytest -n 2

test-newest: .venv-newest/installed ## all tests with the newest, on a Python of 3.12 or later
	.venv-newest/bin/python -m pytest -n 2

test-fuzz: .venv/installed ## 1000 random examples for each law, a quarter of an hour
	FUZZ_EXAMPLES=1000 $(BIN)/python -m pytest -n 2 tests/test_fuzz.py

test-accelerators: .venv-accelerators/installed ## the programs for accelerators that are not there
	JAX_PLATFORMS=cpu JAX_ENABLE_COMPILATION_CACHE=false .venv-accelerators/bin/python -m pytest -n 2 tests/benchmarks/test_compiled.py

test-device: ## numbers on the accelerator that is there; nothing is installed
	$(PYTHON) -m pytest -q -o addopts= -o filterwarnings= -p no:cacheprovider -m device tests/test_device.py tests/test_golden.py

bench-device: ## times on the accelerator that is there; nothing is installed
	$(PYTHON) benchmarks/device.py

lint: .venv/installed ## linter, format and type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock: .venv-release/installed ## the locked versions, made anew
	UV_CUSTOM_COMPILE_COMMAND="make lock" .venv-release/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --extra test pyproject.toml --output-file tests/locked.txt

# Without options they take longer.
bench: .venv/installed ## short forms of the benchmarks, under 5 minutes
	$(BIN)/python benchmarks/step.py --tree resnet18 --sweeps 1 --out out/benchmarks
	$(BIN)/python benchmarks/train.py --network columns unrolled --width 512 --depth 4 --rounds 5 --out out/benchmarks
	$(BIN)/python benchmarks/scaling.py --parameters 1e5 1e6 1e7 --layers 10 100 --kernels 10 100 --rounds 11 --out out/benchmarks
	$(BIN)/python benchmarks/memory.py --dtype float32 --out out/benchmarks
	$(BIN)/python benchmarks/recorders.py --rounds 100 --out out/benchmarks
	$(BIN)/python benchmarks/precision.py --steps 1000 --out out/benchmarks
	$(BIN)/python benchmarks/detection.py --small --out out/benchmarks

# The first tables of the page on speed.
bench-train: .venv/installed .venv-newest/installed ## training steps on two versions of JAX, half an hour
	$(BIN)/python benchmarks/train.py
	.venv-newest/bin/python benchmarks/train.py

# These two compile for accelerators that are not there, and run nothing.
bench-compiled: .venv-accelerators/installed ## what an H100 and a TPU would move, a quarter of an hour
	.venv-accelerators/bin/python benchmarks/compiled.py --out out/benchmarks

bench-sharded: .venv-accelerators/installed ## programs over many devices, 7 minutes
	.venv-accelerators/bin/python benchmarks/sharded.py --out out/benchmarks

# The wheel and the sdist in dist/: their contents, and the wheel in an environment of its own.
build: .venv-release/installed ## wheel and sdist in dist/, checked
	rm -rf dist
	.venv-release/bin/python -m build
	.venv-release/bin/python -m twine check --strict dist/*
	.venv-release/bin/python .ci/check_dist.py

# What is written is executed: the pages' programs by the tests, the tutorials in the build. Tests
# of Haiku and Keras run here, where these are installed.
docs: .venv-docs/installed ## the documentation in out/site, its programs and links tested
	.venv-docs/bin/python -m pytest -n 2 tests/pages/test_documents.py tests/detection/test_transposed.py tests/detection/test_half_precision.py
	PATH=$(CURDIR)/.venv-docs/bin:$$PATH JAX_PLATFORMS=cpu NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build
	.venv-docs/bin/python -m pytest -n 2 tests/pages/test_site.py

# What a user's editor says of a program of theirs, and how much of the public names has a type.
types: .venv-types/installed ## what a user's editor says: pyright
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

clean: ## removes environments, caches and dist/
	rm -rf $(ENVIRONMENTS) dist .jax_cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
