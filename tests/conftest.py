"""One compilation cache for all sessions, warnings as errors, dtypes as fixtures."""

import contextlib
import gc
import importlib
import importlib.metadata
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest

# The tests spend most of their time compiling small programs that run once, so XLA optimizes
# less. The flags are set only while the backend starts, which reads them. Programs that the tests
# start are compiled as for users, unless they get these flags. Not every version of XLA has all
# flags, and an unknown flag ends the process.
QUICK = ""
if jax.__version_info__ >= (0, 10):
    QUICK = "--xla_backend_optimization_level=0"
    if jax.__version_info__ < (0, 11):
        QUICK += " --xla_cpu_use_fusion_emitters=false"
    flags = os.environ.get("XLA_FLAGS")
    os.environ["XLA_FLAGS"] = f"{flags or ''} {QUICK}"
    jax.devices()
    if flags is None:
        del os.environ["XLA_FLAGS"]
    else:
        os.environ["XLA_FLAGS"] = flags

# Tracing makes many small objects that stay alive, so frequent garbage collection is a waste.
gc.set_threshold(100_000, 20, 100)

# Each worker has its own cache folder, because JAX does not write cache files atomically.
CACHE = pathlib.Path(__file__).parent.parent / ".jax_cache"
CACHED = {  # also for programs that the tests start
    "JAX_COMPILATION_CACHE_DIR": str(CACHE / os.environ.get("PYTEST_XDIST_WORKER", "main")),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
jax.config.update("jax_compilation_cache_dir", CACHED["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


LONGEST = ("test_contract", "test_sharding", "test_detection", "test_paper", "test_fuzz")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first; a worker takes whole files."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_report_header() -> str:
    names = ("jax", "jaxlib", "optax", "flax")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Enables 64-bit types for float64, and disables them for other dtypes."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", dtype == "float64")
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


@pytest.fixture
def x64() -> Iterator[None]:
    with precision("float64"):
        yield


@pytest.fixture(params=["bfloat16", "float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> Iterator[str]:
    with precision(request.param):
        yield request.param


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a program of the examples, or one of their helpers, as a module."""

    def load(name: str) -> Any:
        monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / "examples")
        monkeypatch.setattr(sys, "argv", [f"{name}.py"])
        return importlib.import_module(name)

    return load
