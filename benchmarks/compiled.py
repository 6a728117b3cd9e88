"""Compiles one optimizer step for an H100 and a TPU v5e, on a machine without them.

Prints the bytes per parameter that the kernels of the compiled program read and write, compared
with Optax's Adam. Parameters and state are donated. The program is only compiled, so there are no
times.

    make bench-compiled
    .venv-accelerators/bin/python benchmarks/compiled.py --target h100 --tree resnet18
"""

import dataclasses
import pathlib
from typing import Any, Literal, TypeAlias, get_args

import jax
import numpy as np
import optax
import targets
import tqdm
import trees
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from measure import OPTIMIZERS, Row, check_optimizers, check_out, compile_step, print_table, write
from traffic import traffic

import spherical_optax as so

Target: TypeAlias = Literal["h100", "v5e"]

# In addition to the three networks: shapes and groups that XLA compiles in different ways.
FILTERS = so.groups_by_path({".*": so.per_filter()})
CASES = {
    "kernels (3, 3, 64, 64)": ({"a": (3, 3, 64, 64), "b": (3, 3, 64, 64)}, FILTERS),
    "kernels (1, 1, 256, 1024)": ({"a": (1, 1, 256, 1024), "b": (1, 1, 256, 1024)}, FILTERS),
    "blocks": ({"a": (3, 3, 256, 512)}, so.groups_by_path({".*": so.per_channel_block(32)})),
    "whole arrays": ({"a": (1024, 4096)}, so.groups_by_path({".*": so.per_layer()})),
    "rows of an embedding": ({"a": (50304, 768)}, so.groups_by_path({".*": so.per_filter(axis=0)})),
    "joint kernel and bias": (
        {"a": {"kernel": (1024, 4096), "bias": (4096,)}},
        so.groups_by_path({".*": so.RadialGroup((-1,), joint="a")}),
    ),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Bytes, kernels and temporary memory of one compiled optimizer step."""

    target: tuple[Target, ...] = get_args(Target)
    """Accelerators to compile for."""
    tree: tuple[trees.Name, ...] = get_args(trees.Name)
    """Parameter trees."""
    optimizer: tuple[str, ...] = tuple(OPTIMIZERS)
    """Optimizers, by their names in the table. Adam is always included."""
    cases: bool = True
    """Whether to also compile single shapes and groups."""
    out: pathlib.Path = pathlib.Path("benchmarks/results")
    """Directory for compiled.json."""


def describe(tx: optax.GradientTransformation, shapes: Any, dtype: str, device: Any) -> Row:
    """The memory traffic, kernels and temporary memory of one donated step."""
    where = NamedSharding(Mesh(np.array([device]), ("all",)), PartitionSpec())

    def place(tree: Any) -> Any:
        like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
        return jax.tree.map(like, tree)

    params = place(trees.abstract(shapes, dtype))
    compiled = compile_step(tx, params, params, place).run
    moved, kernels, copies = traffic(compiled.as_text() or "")
    count = trees.count(shapes)
    return {
        "bytes per parameter": moved / count,
        "kernels": kernels,
        "copies": copies,
        "temporary bytes per parameter": compiled.memory_analysis().temp_size_in_bytes / count,
    }


def measure(config: Config, target: Target) -> dict[str, list[Row]]:
    device = targets.devices("compiled.py", target)[0]
    work = {name: (*trees.TREES[name](), "float32") for name in config.tree}
    if config.cases:
        work |= {name: (*case, "float32") for name, case in CASES.items()}
        work["kernels (3, 3, 512, 512), bfloat16"] = ({"a": (3, 3, 512, 512)}, FILTERS, "bfloat16")
    found: dict[str, list[Row]] = {}
    for name, (shapes, groups, dtype) in work.items():
        found[name] = []
        for optimizer in tqdm.tqdm(dict.fromkeys(("optax.adam", *config.optimizer)), name):
            row = describe(OPTIMIZERS[optimizer](groups), shapes, dtype, device)
            found[name].append({"optimizer": optimizer, **row})
    return found


def table(rows: list[Row]) -> list[Row]:
    adam = rows[0]["bytes per parameter"]
    return [
        {
            "optimizer": row["optimizer"],
            "bytes": f"{row['bytes per parameter']:.1f}",
            "to adam": f"{row['bytes per parameter'] / adam:.2f}",
            "kernels": row["kernels"],
            "copies": row["copies"],
            "temporary": f"{row['temporary bytes per parameter']:.2f}",
        }
        for row in rows
    ]


def main(config: Config) -> None:
    check_optimizers("compiled.py", config.optimizer)
    check_out(config.out, "compiled.json")
    results = {target: measure(config, target) for target in config.target}
    for target, found in results.items():
        for name, rows in found.items():
            print_table(f"{target}, {name}", table(rows))
    print(
        "\nBytes: read and written by the kernels of the compiled step, per parameter (on a TPU,"
        "\nin its main memory). Temporary: bytes of temporary memory per parameter. Copies: of more"
        "\nthan 64 KiB."
    )
    settings = {"target": config.target, "tree": config.tree}
    write(config.out, "compiled", settings, results)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
