"""Accelerators for which programs can be compiled on a machine without them."""

import importlib
import os
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
from jax.experimental import topologies

Target: TypeAlias = Literal["h100", "v5e", "256 h100", "512 v5p"]

# From https://docs.nvidia.com/cuda/hopper-tuning-guide and NVIDIA's data sheet, in XLA's format.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84978434048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 9 }
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def gpus(topology: str) -> Any:
    """A topology of H100s, given by hosts and devices per host, such as "32x8x1"."""
    return topologies.get_topology_desc(
        topology, platform="cuda", topology=topology, target_config=H100
    )


def tpus(topology: str) -> Any:
    """A topology of TPUs, given by their kind and number per direction, such as "v5p:8x8x8"."""
    # libtpu reads these when it is loaded. With them it describes a TPU without looking for one.
    os.environ |= {
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    return topologies.get_topology_desc(topology, platform="tpu")


# Each target with the package that contains its compiler.
TARGETS: dict[Target, tuple[str, Callable[[], Any]]] = {
    "h100": ("jax_plugins.xla_cuda12", lambda: gpus("1x1x1")),
    "256 h100": ("jax_plugins.xla_cuda12", lambda: gpus("32x8x1")),
    "v5e": ("libtpu", lambda: tpus("v5e:2x2")),
    "512 v5p": ("libtpu", lambda: tpus("v5p:8x8x8")),
}


def devices(program: str, target: Target) -> list[Any]:
    """The devices of a target, for `jax.sharding` and ahead-of-time compilation."""
    package, topology = TARGETS[target]
    try:
        importlib.import_module(package)
    except ModuleNotFoundError:
        raise SystemExit(
            f"{program}: --target {target}: expected the package {package}, found none; "
            "run `make bench-compiled`, or install spherical_optax[accelerators]"
        ) from None
    jax.config.update("jax_platforms", "cpu")
    return list(topology().devices)
