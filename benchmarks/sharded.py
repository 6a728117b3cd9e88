"""Compiles a training step of a sharded transformer for 256 H100s and 512 TPU v5p.

The accelerators themselves are not needed. The model is a decoder with RMSNorm and QK-norm, with
its layers in one scan, in bfloat16 with float32 parameters. It is sharded by FSDP, or by FSDP and
tensor parallelism. The program prints the bytes that the optimizer's part of the compiled step
communicates, and the memory of the step per device.

    make bench-sharded
    .venv-accelerators/bin/python benchmarks/sharded.py --target "256 h100" --optimizer adamsrt
"""

import collections
import dataclasses
import functools
import math
import pathlib
import tempfile
import time
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import targets
import tqdm
import tyro
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from measure import Row, check_out, print_table, write
from traffic import ARRAY, INSTRUCTION, WIDTHS

import spherical_optax as so
from spherical_optax.groups import joints_of

Target: TypeAlias = Literal["256 h100", "512 v5p"]
Layout: TypeAlias = Literal["fsdp", "fsdp x tensor"]

# For AdamSRT, each head of queries and keys is a group, which QK-norm makes radially invariant. For
# Hyperball, each matrix of each layer is a group, as in its authors' code.
HEADS = so.groups_by_path({r"(query|key)": so.RadialGroup((0, 2))})
MATRICES = so.groups_by_path(
    {r"(query|key|value|out|gate|up|down)": so.RadialGroup((0,)), "head": so.per_layer()}
)


class Case(NamedTuple):
    """An optimizer, its groups, and the number of sums that it computes per group."""

    tx: optax.GradientTransformation
    groups: so.Groups
    sums: int


CASES = {
    "optax.adam": Case(optax.adam(1e-3), None, 0),
    "adamsrt": Case(so.adamsrt(1e-3, groups=HEADS), HEADS, 5),
    "hyperball": Case(so.adamh(1e-3, groups=MATRICES, other=optax.adam(1e-3)), MATRICES, 3),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures collectives and memory of a compiled, sharded training step."""

    target: tuple[Target, ...] = get_args(Target)
    """Accelerators to compile for: 256 H100s, or 512 TPU v5p."""
    layout: tuple[Layout, ...] = get_args(Layout)
    """How parameters are sharded."""
    optimizer: tuple[Literal["optax.adam", "adamsrt", "hyperball"], ...] = tuple(CASES)
    """Optimizers."""
    layers: int = 32
    """Layers of the model."""
    width: int = 4096
    """Width of the model, which has width / 128 heads and 4 * width hidden units."""
    tokens: int = 4096
    """Tokens per sequence. There is one sequence per device or tensor-parallel group."""
    out: pathlib.Path = pathlib.Path("benchmarks/results")
    """Directory for sharded.json."""


# --- the model ----------------------------------------------------------------------------

VOCABULARY, HEAD, TENSOR = 32768, 128, 8


def shapes(layers: int, width: int) -> dict[str, tuple[int, ...]]:
    heads, hidden = width // HEAD, 4 * width
    return {
        "embedding": (VOCABULARY, width),
        "query": (layers, width, heads, HEAD),
        "key": (layers, width, heads, HEAD),
        "value": (layers, width, heads, HEAD),
        "out": (layers, heads, HEAD, width),
        "gate": (layers, width, hidden),
        "up": (layers, width, hidden),
        "down": (layers, hidden, width),
        "norm_attention": (layers, width),
        "norm_mlp": (layers, width),
        "norm": (width,),
        "head": (width, VOCABULARY),
    }


# For each matrix, the axis that FSDP shards and the axis that tensor parallelism shards.
AXES = {
    "embedding": (1, 0),
    "query": (1, 2),
    "key": (1, 2),
    "value": (1, 2),
    "out": (3, 1),
    "gate": (1, 2),
    "up": (1, 2),
    "down": (2, 1),
    "head": (0, 1),
}


def specs(shapes: dict[str, tuple[int, ...]]) -> dict[str, PartitionSpec]:
    found = {}
    for name, shape in shapes.items():
        spec: list[Any] = [None] * len(shape)
        if name in AXES:
            data, tensor = AXES[name]
            spec[data], spec[tensor] = "data", "tensor"
        found[name] = PartitionSpec(*spec)
    return found


def rms_norm(x: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6)
    return (wide if scale is None else wide * scale).astype(x.dtype)


def loss_of(params: dict[str, jax.Array], tokens: jax.Array, mesh: Mesh) -> jax.Array:
    def placed(x: jax.Array, *spec: Any) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))

    params = {name: leaf.astype(jnp.bfloat16) for name, leaf in params.items()}
    outside = {name: params.pop(name) for name in ("embedding", "norm", "head")}

    @jax.checkpoint
    def layer(x: jax.Array, p: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        y = rms_norm(x, p["norm_attention"])
        q, k, v = (
            placed(jnp.einsum("btd,dhk->bthk", y, p[name]), "data", None, "tensor")
            for name in ("query", "key", "value")
        )
        attended = jax.nn.dot_product_attention(rms_norm(q), rms_norm(k), v, is_causal=True)
        x = placed(x + jnp.einsum("bthk,hkd->btd", attended, p["out"]), "data")
        y = rms_norm(x, p["norm_mlp"])
        hidden = placed(jax.nn.silu(y @ p["gate"]) * (y @ p["up"]), "data", None, "tensor")
        return placed(x + hidden @ p["down"], "data"), None

    x, _ = jax.lax.scan(layer, placed(outside["embedding"][tokens], "data"), params)
    logits = placed(rms_norm(x, outside["norm"]) @ outside["head"], "data", None, "tensor")
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1].astype(jnp.float32), tokens[:, 1:]
    )
    return losses.mean()


# --- what a program communicates ----------------------------------------------------------

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def collectives(text: str) -> collections.Counter[tuple[str, str]]:
    """Counts the results of a program's collectives, by operation and array type."""
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    for line in text.splitlines():
        matched = INSTRUCTION.match(line)
        operation = matched[3].removesuffix("-done") if matched else ""
        if matched and operation in COLLECTIVES:
            for kind, shape, _ in ARRAY.findall(matched[2]):
                found[operation, f"{kind}[{shape}]"] += 1
    return found


def size_of(array: str) -> int:
    kind, shape = array.removesuffix("]").split("[")
    return WIDTHS.get(kind, 1) * math.prod(int(n) for n in shape.split(",") if n)


class Program(NamedTuple):
    """A compiled training step."""

    collectives: collections.Counter[tuple[str, str]]
    row: Row


def program(name: str, devices: list[Any], layout: Layout, config: Config) -> Program:
    tensor = TENSOR if layout == "fsdp x tensor" else 1
    mesh = Mesh(
        np.array(devices).reshape(-1, tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2
    )
    place = functools.partial(NamedSharding, mesh)
    forms = shapes(config.layers, config.width)
    where = {path: place(spec) for path, spec in specs(forms).items()}
    like = lambda shape, dtype, at: jax.ShapeDtypeStruct(shape, dtype, sharding=at)  # noqa: E731
    params = {path: like(shape, jnp.float32, where[path]) for path, shape in forms.items()}
    tx, groups, sums = CASES[name]
    state_where = so.state_sharding(tx, params, where)
    state = jax.tree.map(
        lambda x, at: like(x.shape, x.dtype, at), jax.eval_shape(tx.init, params), state_where
    )
    batch = (len(devices) // tensor, config.tokens)
    tokens = like(batch, jnp.int32, place(PartitionSpec("data")))

    def step(params: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_of)(params, tokens, mesh)
        grads = jax.lax.with_sharding_constraint(grads, where)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    lowered = jax.jit(step, donate_argnums=(0, 1), out_shardings=(where, state_where, None)).lower(
        params, state, tokens
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        # `as_text` cannot read the asynchronous collectives of newer TPU compilers.
        compiled = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        [text] = (
            path.read_text() for path in pathlib.Path(folder).glob("*after_optimizations.txt")
        )
    seconds = time.perf_counter() - start
    held = sum(
        math.prod(at.shard_shape(x.shape)) * x.dtype.itemsize
        for x, at in zip(jax.tree.leaves(state), jax.tree.leaves(state_where), strict=True)
    )
    parts = 0  # number of groups of which a device holds a part
    for unit in joints_of(groups, params) if groups else []:
        for i, group in unit.items():
            x = jax.tree.leaves(params)[i]
            axes = group.axes(len(x.shape))
            on_axes = PartitionSpec(*(x.sharding.spec[axis] for axis in axes))
            parts += math.prod(place(on_axes).shard_shape(group.shape(x.shape)))
    row = {
        "optimizer": name,
        "bytes by the formula": 4 * sums * parts,
        "state bytes": held,
        "temporary bytes": compiled.memory_analysis().temp_size_in_bytes,
        "seconds to compile": seconds,
    }
    return Program(collectives(text), row)


def measure(config: Config, target: Target) -> dict[str, list[Row]]:
    devices = targets.devices("sharded.py", target)
    found: dict[str, list[Row]] = {}
    for layout in config.layout:
        name = f"{target}, {layout}"
        programs = [
            program(each, devices, layout, config)
            for each in tqdm.tqdm(dict.fromkeys(("optax.adam", *config.optimizer)), name)
        ]
        found[name] = []
        for each in programs:
            # Collectives that Adam's step has as well belong to the forward and backward pass. The
            # small ones may be merged with the optimizer's sums.
            own = each.collectives - programs[0].collectives
            known = programs[0].collectives - each.collectives
            moved = [sum(size_of(key[1]) * n for key, n in some.items()) for some in (own, known)]
            found[name].append(
                {
                    **each.row,
                    "collectives": {" ".join(key): count for key, count in own.items()},
                    "bytes": moved[0] - moved[1],
                    "largest, bytes": max((size_of(key[1]) for key in own), default=0),
                }
            )
    return found


def table(rows: list[Row]) -> list[Row]:
    return [
        {
            "optimizer": row["optimizer"],
            "sums (KB)": f"{row['bytes'] / 1e3:.1f}",
            "formula (KB)": f"{row['bytes by the formula'] / 1e3:.1f}",
            "largest (KB)": f"{row['largest, bytes'] / 1e3:.1f}",
            "state (MB)": f"{row['state bytes'] / 1e6:.1f}",
            "temporary (MB)": f"{row['temporary bytes'] / 1e6:.0f}",
        }
        for row in rows
    ]


def main(config: Config) -> None:
    check_out(config.out, "sharded.json")
    # Makes the program see several devices, as on a cluster. Nothing is compiled for these.
    jax.config.update("jax_num_cpu_devices", 2)
    results: dict[str, list[Row]] = {}
    for target in dict.fromkeys(config.target):
        results |= measure(config, target)
    for name, rows in results.items():
        print_table(name, table(rows))
    print(
        "Sums: what the optimizer's part of a step communicates. Largest: its largest array. State "
        "and temporary: memory per device."
    )
    settings = {"layers": config.layers, "width": config.width, "tokens": config.tokens}
    write(config.out, "sharded", settings, results)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
