"""A full training step of two networks: what the optimizer's share of it is.

ResNet20 on 32x32 images and a small transformer with QK-norm: forward, backward, update. All
optimizers run interleaved, each also alone; the share is the optimizer's step alone over the
training step, in the same round.

    python benchmarks/train.py
    python benchmarks/train.py --network resnet20 --rounds 5
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from measure import (
    OPTIMIZERS,
    Row,
    check_out,
    compile_step,
    interleave,
    print_table,
    ratio,
    spread,
    stepper,
    write,
)

import spherical_optax as so

Name: TypeAlias = Literal["resnet20", "transformer"]
NAMES = ("optax.adam", "optax.adamw", "optax.sgd", "adams", "adamsrt", "sgdmrt")


@dataclasses.dataclass(frozen=True)
class Config:
    """Time of a training step under each optimizer."""

    network: tuple[Name, ...] = get_args(Name)
    """Networks."""
    rounds: int = 21
    """Steps of each."""
    budget: float = 240.0
    """Seconds for each network, after which it ends with fewer rounds, 3 at least."""
    out: pathlib.Path = pathlib.Path("benchmarks/results")
    """Directory for train.json."""


class Problem(NamedTuple):
    """A network's initial parameters, their groups and its loss on one batch."""

    params: Any
    groups: so.Groups
    loss: Callable[[Any], jax.Array]


class ResNet20(nn.Module):
    """Three stages of three residual blocks for 32x32 images, 0.27 million parameters."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=False)
        x = nn.relu(norm()(conv(16, (3, 3))(x)))
        for width in (16, 32, 64):
            for block in range(3):
                stride = 2 if width > 16 and block == 0 else 1
                y = nn.relu(norm()(conv(width, (3, 3), stride)(x)))
                y = norm()(conv(width, (3, 3))(y))
                if stride == 2:
                    x = norm()(conv(width, (1, 1), stride)(x))
                x = nn.relu(x + y)
        return nn.Dense(10)(x.mean(axis=(1, 2)))


class Transformer(nn.Module):
    """Four layers of width 128 with QK-norm, 1.1 million parameters."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x, mask = nn.Embed(1024, 128)(tokens), nn.make_causal_mask(tokens)
        for _ in range(4):
            attention = nn.MultiHeadDotProductAttention(
                num_heads=4, normalize_qk=True, use_bias=False
            )
            x = x + attention(nn.RMSNorm()(x), mask=mask)
            x = x + nn.Dense(128)(nn.gelu(nn.Dense(512)(nn.RMSNorm()(x))))
        return nn.Dense(1024)(nn.RMSNorm()(x))


def resnet20() -> Problem:
    model = ResNet20()
    images, labels = jax.random.normal(jax.random.key(0), (64, 32, 32, 3)), jnp.arange(64) % 10
    variables = model.init(jax.random.key(1), images[:2])
    rest = {"batch_stats": variables["batch_stats"]}

    def loss(params: Any) -> jax.Array:
        logits, _ = model.apply({"params": params, **rest}, images, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    groups = so.groups_by_path({r"Conv_\d+/kernel": so.per_filter()})
    return Problem(variables["params"], groups, loss)


def transformer() -> Problem:
    model = Transformer()
    tokens = jax.random.randint(jax.random.key(0), (8, 128), 0, 1024)
    params = model.init(jax.random.key(1), tokens)["params"]

    def loss(params: Any) -> jax.Array:
        logits = model.apply({"params": params}, tokens)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    groups = so.groups_by_path({r"(query|key)/kernel": so.per_head(-2)})
    return Problem(params, groups, loss)


def trainer(tx: optax.GradientTransformation, problem: Problem) -> Callable[[], Any]:
    """A function of no arguments that makes one training step."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(problem.loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = jax.tree.map(jnp.array, problem.params)
    carry = [(params, tx.init(params))]

    def run() -> jax.Array:
        *carry[0], loss = step(*carry[0])
        return loss

    return run


def measure(name: Name, config: Config) -> list[Row]:
    problem = {"resnet20": resnet20, "transformer": transformer}[name]()
    grads, runs = jax.jit(jax.grad(problem.loss))(problem.params), {}
    for each in NAMES:
        tx, params = OPTIMIZERS[each](problem.groups), jax.tree.map(jnp.array, problem.params)
        runs[each] = trainer(tx, problem)
        runs[f"{each} alone"] = stepper(compile_step(tx, params, grads), tx, params, grads)
    times = interleave(runs, budget=config.budget, rounds=config.rounds)
    adam = times["optax.adam"]
    return [
        {
            "optimizer": each,
            "milliseconds": 1e3 * float(np.median(times[each])),
            "to adam": ratio(times[each], adam),
            "share": ratio(100 * times[f"{each} alone"], times[each]),
            "rounds": len(adam),
        }
        for each in NAMES
    ]


def main(config: Config) -> None:
    check_out(config.out, "train.json")
    results = {name: measure(name, config) for name in config.network}
    for name, rows in results.items():
        table = [
            {
                "optimizer": row["optimizer"],
                "ms": round(row["milliseconds"], 2),
                "to adam": spread(row["to adam"]),
                "share of the step (%)": spread(row["share"]),
            }
            for row in rows
        ]
        print_table(f"{name}, {rows[0]['rounds']} rounds", table)
    print("\nMedian (quartiles) of the rounds.")
    write(config.out, "train", {"rounds": config.rounds, "budget": config.budget}, results)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
