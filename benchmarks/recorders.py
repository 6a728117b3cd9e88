"""Times the recorders, such as `record_sphere`, in a training step of the network of digits.py.

python benchmarks/recorders.py
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from measure import RATE, check_out, interleave, print_table, ratio, spread, write

import spherical_optax as so

sys.path.append(str(pathlib.Path(__file__).parent.parent / "examples"))
import digits


@dataclasses.dataclass(frozen=True)
class Config:
    """Times a training step with and without recorders."""

    rounds: int = 400
    """Steps with each recorder."""
    budget: float = 120.0
    """Seconds after which the measurement ends with fewer rounds."""
    out: pathlib.Path = pathlib.Path("benchmarks/results")
    """Directory for recorders.json."""


def make_chains() -> dict[str, optax.GradientTransformation]:
    tx = so.adamsrt(RATE, groups=digits.RULES)
    rate = so.record_effective_learning_rate(tx, digits.RULES, b1=0.9)
    sphere, gradient = so.record_sphere(digits.RULES), so.record_gradient(digits.RULES)
    return {
        "no recorder": tx,
        "record_sphere": optax.chain(tx, sphere),
        "record_gradient": optax.chain(gradient, tx),
        "record_effective_learning_rate": rate,
        "all": optax.chain(gradient, rate, sphere),
    }


def trainer(tx: optax.GradientTransformation) -> Callable[[], Any]:
    """A function without arguments that takes one training step, as digits.py does."""
    (images, labels), _ = digits.load()
    x, y = jnp.asarray(images[: digits.BATCH_SIZE]), jnp.asarray(labels[: digits.BATCH_SIZE])
    model = digits.Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: digits.Network, optimizer: nnx.Optimizer) -> jax.Array:
        def loss_fn(model: digits.Network) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    return nnx.cached_partial(step, model, optimizer)


def main(config: Config) -> None:
    check_out(config.out, "recorders.json")
    runs = {name: trainer(tx) for name, tx in make_chains().items()}
    times = interleave(runs, budget=config.budget, rounds=config.rounds)
    results = [
        {
            "chain": name,
            "milliseconds": 1e3 * float(np.median(times[name])),
            "to none": ratio(times[name], times["no recorder"]),
        }
        for name in runs
    ]
    table = [
        {
            "chain": row["chain"],
            "ms": round(row["milliseconds"], 3),
            "ratio": spread(row["to none"]),
        }
        for row in results
    ]
    print_table(f"the demo's network, {len(times['all'])} rounds", table)
    write(config.out, "recorders", {"rounds": config.rounds}, results)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
