"""Times `find_radial_groups` on a ResNet50 and on a transformer with 124 million parameters.

python benchmarks/detection.py
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import tyro
from measure import check_out, print_table, write

import spherical_optax as so
from spherical_optax.groups import joints_of


@dataclasses.dataclass(frozen=True)
class Config:
    """Times the search, including compilation."""

    model: tuple[str, ...] = ("resnet50", "transformer")
    """Models: resnet50, transformer."""
    small: bool = False
    """Use narrow models, and a transformer of two blocks, for a quick run."""
    out: pathlib.Path = pathlib.Path("benchmarks/results")
    """Directory for detection.json."""


BatchNorm = functools.partial(nn.BatchNorm, use_running_average=False)
Conv = functools.partial(nn.Conv, use_bias=False)


class Bottleneck(nn.Module):
    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(BatchNorm()(Conv(self.width, (1, 1))(x)))
        y = nn.relu(BatchNorm()(Conv(self.width, (3, 3), self.stride)(y)))
        y = BatchNorm(scale_init=nn.initializers.zeros)(Conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = BatchNorm()(Conv(4 * self.width, (1, 1), self.stride)(x))
        return nn.relu(x + y)


class ResNet50(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(BatchNorm()(Conv(self.width, (7, 7), 2)(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for block in range(blocks):
                x = Bottleneck(self.width * 2**stage, 2 if stage and not block else 1)(x)
        return nn.Dense(1000)(x.mean((1, 2)))


class Transformer(nn.Module):
    width: int
    vocabulary: int
    layers: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocabulary, self.width, name="embed")(tokens)
        for _ in range(self.layers):
            attention = nn.MultiHeadDotProductAttention(12, normalize_qk=True, use_bias=False)
            x = x + attention(nn.RMSNorm()(x))
            hidden = nn.gelu(nn.Dense(4 * self.width)(nn.RMSNorm()(x)))
            x = x + nn.Dense(self.width)(hidden)
        return nn.RMSNorm()(x)


def models(small: bool) -> dict[str, Callable[[], tuple[nn.Module, jax.Array]]]:
    key = jax.random.key(0)
    vocabulary = 100 if small else 50257
    return {
        "resnet50": lambda: (
            ResNet50(4 if small else 64),
            jax.random.normal(key, (4, 64, 64, 3)),
        ),
        "transformer": lambda: (
            Transformer(48 if small else 768, vocabulary, 2 if small else 12),
            jax.random.randint(key, (2, 16), 0, vocabulary),
        ),
    }


def main(config: Config) -> None:
    check_out(config.out, "detection.json")
    known = models(config.small)
    if unknown := set(config.model) - set(known):
        raise SystemExit(f"--model: expected some of {sorted(known)}, found {sorted(unknown)}")
    results = []
    for name in config.model:
        model, x = known[name]()
        variables = jax.jit(model.init)(jax.random.key(1), x)
        statistics = {key: value for key, value in variables.items() if key != "params"}
        params = variables["params"]

        def fn(params: Any, x: jax.Array, model: Any = model, rest: Any = statistics) -> Any:
            return model.apply({"params": params, **rest}, x, mutable=list(rest))[0]

        start = time.perf_counter()
        found = so.find_radial_groups(fn, params, x, explain=True)
        results.append(
            {
                "model": name,
                "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
                "leaves": len(found.findings),
                "with groups": sum(len(unit) for unit in joints_of(found, params)),
                "seconds": time.perf_counter() - start,
                "forward passes": found.forward_passes,
            }
        )
    print_table("find_radial_groups", results)
    write(config.out, "detection", {"small": config.small}, results)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
