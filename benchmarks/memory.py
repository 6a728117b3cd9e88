"""Bytes of optimizer state, and peak memory of a compiled step, per optimizer and dtype.

The numbers come from shapes and from the compiler. No step is run.

    python benchmarks/memory.py
    python benchmarks/memory.py --tree resnet50 --dtype bfloat16
"""

import dataclasses
import pathlib
from typing import Any, Literal, TypeAlias, get_args

import jax
import trees
import tyro
from measure import OPTIMIZERS, Row, check_out, compile_step, print_table, write

Dtype: TypeAlias = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Config:
    """State and peak memory of one optimizer step."""

    tree: trees.Name = "resnet18"
    """Parameter tree."""
    dtype: tuple[Dtype, ...] = get_args(Dtype)
    """Dtypes of parameters and gradients."""
    out: pathlib.Path = pathlib.Path("benchmarks/results")
    """Directory for memory.json."""


def size(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def measure(tree: trees.Tree, dtype: Dtype) -> list[Row]:
    params = trees.abstract(tree.shapes, dtype)
    rows, adam = [], size(jax.eval_shape(OPTIMIZERS["optax.adam"](tree.groups).init, params))
    for name, make in OPTIMIZERS.items():
        tx = make(tree.groups)
        state = size(jax.eval_shape(tx.init, params))
        memory = compile_step(tx, params, params).run.memory_analysis()
        peak = memory.argument_size_in_bytes + memory.output_size_in_bytes
        peak += memory.temp_size_in_bytes - memory.alias_size_in_bytes
        rows.append(
            {
                "optimizer": name,
                "state bytes": state,
                "to adam": state / adam,
                "peak bytes": peak,
                "temporary bytes": memory.temp_size_in_bytes,
            }
        )
    return rows


def main(config: Config) -> None:
    check_out(config.out, "memory.json")
    tree = trees.TREES[config.tree]()
    results = {dtype: measure(tree, dtype) for dtype in config.dtype}
    for dtype, rows in results.items():
        table = [row | {"to adam": f"{row['to adam']:.3f}"} for row in rows]
        print_table(f"{config.tree} in {dtype}", table)
    print("\nPeak: arguments, results that do not reuse their memory, and temporary memory.")
    write(config.out, "memory", {"tree": config.tree}, results)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
