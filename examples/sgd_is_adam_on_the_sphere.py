"""Shows on a network with BatchNorm that SGD with L2 is an Adam on the sphere.

SGD with L2 and AdamG* (an Adam on the sphere) start from the same weights and see the same batch.
They run at several learning rates for the same time, which is steps times learning rate. The
program prints the angle by which the filters rotated, the angle between the filters of the two
runs, and the power of the learning rate with which the latter vanishes. It writes `results.json`
and `curves.png`.

Three controls show how meaningful the agreement is:
- SGD from weights multiplied by 1 + 1e-6, which shows how much training amplifies differences;
- SGD whose filters are returned to their initial radius after each step;
- Adam.

The two runs agree for small steps only. They separate when single steps rotate filters far and
training amplifies differences. `--time 20` is long enough to see this.

    python examples/sgd_is_adam_on_the_sphere.py
    python examples/sgd_is_adam_on_the_sphere.py --epsilon 1e-5    # Flax's default
    python examples/sgd_is_adam_on_the_sphere.py --help
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
import tyro
from digits import RULES, Network, load
from effective_learning_rate import LAYERS, save
from flax import nnx
from helpers.classify import functional_loss
from helpers.options import check_options
from helpers.outputs import check_out, print_rows
from matplotlib.figure import Figure

import spherical_optax as so

Path: TypeAlias = list[np.ndarray]
"""The kernels of each layer, of shape (steps + 1, height, width, in, out)."""

COLORS = {
    "adamg_star": "#D55E00",
    "nudged sgd": "#CC79A7",
    "fixed radius": "#0072B2",
    "adam": "#009E73",
}
NUDGE = 1e-6
# Ratio of Adam's learning rate to SGD's. With it, filters rotate about as far as with SGD.
ADAM_RATIO = 1 / 200


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures angles between the filters of SGD with L2 and of AdamG*, on digits."""

    learning_rate: tuple[float, ...] = (0.2, 0.1, 0.05, 0.025)
    """Learning rates of SGD, at least two."""
    weight_decay: float = 0.05
    """Weight decay of SGD, as coupled L2."""
    time: float = 5.0
    """Steps times learning rate, the same for every learning rate."""
    images: int = 128
    """Size of the batch, which is the same at every step."""
    epsilon: float = 1e-12
    """Epsilon that BatchNorm adds to the variance. The loss is invariant only if it is tiny."""
    out: pathlib.Path = pathlib.Path("out/sgd_is_adam")
    """Directory for results.json and curves.png."""


def make_optimizers(rate: float, decay: float) -> dict[str, optax.GradientTransformation]:
    """SGD with L2, AdamG* and the controls.

    SGD with L2 also trains the parameters without a group, except under "adam".
    """
    sgd = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate))
    return {
        "sgd": sgd,
        "adamg_star": so.adamg_star(rate, decay, groups=RULES),
        "nudged sgd": sgd,
        "fixed radius": optax.chain(sgd, so.retract(RULES)),
        "adam": optax.chain(optax.add_decayed_weights(decay), optax.adam(ADAM_RATIO * rate)),
    }


def make_problem(config: Config) -> tuple[Any, Callable[[Any], Any]]:
    """The initial parameters, and a function for the gradient of the loss on the batch."""
    (images, labels), _ = load()
    x, y = jnp.asarray(images[: config.images], float), jnp.asarray(labels[: config.images])
    model = Network(nnx.Rngs(0))
    for norm in (model.norm1, model.norm2, model.norm3):
        norm.epsilon = config.epsilon
    loss_fn, params = functional_loss(model)
    return params, jax.jit(lambda params: jax.grad(loss_fn)(params, x, y))


def trajectory(
    tx: optax.GradientTransformation,
    steps: int,
    params: Any,
    gradient: Callable[[Any], Any],
    progress: tqdm.tqdm,
) -> Path:
    """The kernels before the first step and after each step."""

    @jax.jit
    def step(grads: Any, params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, path = tx.init(params), [params]
    for _ in range(steps):
        params, state = step(gradient(params), params, state)
        path.append(params)
        progress.update()
    return [np.stack([each[layer]["kernel"][...] for each in path]) for layer in LAYERS]


def angles(a: Path, b: Path) -> np.ndarray:
    """The angles between the filters of two paths, of shape (steps + 1, filters)."""
    filters = so.RadialGroup((0, -1))  # the axis of steps is a second index axis
    each = [
        so.geometry.angle(jnp.asarray(x), jnp.broadcast_to(y, x.shape), filters)
        for x, y in zip(a, b, strict=True)
    ]
    return np.concatenate(each, axis=1)


def compare(
    rate: float, config: Config, params: Any, gradient: Callable[[Any], Any], progress: tqdm.tqdm
) -> dict[str, Any]:
    """Runs all optimizers at one learning rate; angles from the start and to SGD by step."""
    steps = round(config.time / rate)
    paths = {}
    for name, tx in make_optimizers(rate, config.weight_decay).items():
        factor = 1 + NUDGE if name == "nudged sgd" else 1
        start = jax.tree.map(lambda leaf, factor=factor: factor * leaf, params)
        paths[name] = trajectory(tx, steps, start, gradient, progress)
    sgd = paths["sgd"]
    return {
        "learning_rate": rate,
        "steps": steps,
        "travelled": {
            name: angles(path, [kernel[:1] for kernel in path]).mean(1)
            for name, path in paths.items()
        },
        "largest_step": float(
            angles([kernel[1:] for kernel in sgd], [kernel[:-1] for kernel in sgd]).max()
        ),
        "apart": {name: angles(paths[name], sgd).max(1) for name in COLORS},
    }


def fitted_powers(runs: list[dict[str, Any]]) -> dict[str, float]:
    """The power of the learning rate with which the final angle to SGD grows."""
    rates = np.log([run["learning_rate"] for run in runs])
    return {
        name: float(np.polyfit(rates, np.log([run["apart"][name][-1] for run in runs]), 1)[0])
        for name in COLORS
        if name != "nudged sgd"  # its difference does not come from the learning rate
    }


def print_table(runs: list[dict[str, Any]], powers: dict[str, float]) -> None:
    table = [["learning rate", "steps", "turned", "largest step", *COLORS]]
    for run in runs:
        angles = [f"{run['travelled']['sgd'][-1]:.3f}", f"{run['largest_step']:.3f}"]
        apart = [f"{run['apart'][name][-1]:.2e}" for name in COLORS]
        table.append([f"{run['learning_rate']:g}", str(run["steps"]), *angles, *apart])
    fitted = [f"{powers[name]:.2f}" if name in powers else "-" for name in COLORS]
    print()
    print_rows(*table, ["fitted power", "", "", "", *fitted])
    print("In radians: how far SGD turned its filters in all, their mean, and in its largest step;")
    print("of the others, the largest angle of a filter from SGD's at the end.")


def plot(runs: list[dict[str, Any]], powers: dict[str, float], path: pathlib.Path) -> None:
    """Plots the angle to SGD during training (left) and at the end (right)."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for run, alpha in zip(runs, np.linspace(1, 0.35, len(runs)), strict=True):
        for name, color in COLORS.items():
            label = f"{name}, {run['learning_rate']:g}" if name == "adamg_star" else None
            turned, apart = run["travelled"]["sgd"][1:], run["apart"][name][1:]
            left.plot(turned, apart, color=color, alpha=alpha, label=label)
    left.set_xlabel("SGD's mean angle from the start (rad)")
    left.set_ylabel("largest angle from SGD's filter (rad)")
    rates = [run["learning_rate"] for run in runs]
    for name, color in COLORS.items():
        ends = [run["apart"][name][-1] for run in runs]
        label = f"{name}, fitted power {powers[name]:.2f}" if name == "adamg_star" else name
        right.plot(rates, ends, "o-", color=color, label=label)
    right.set_xscale("log")
    right.set_xticks(rates, [f"{rate:g}" for rate in rates])
    right.set_xticks([], minor=True)
    right.set_xlabel("learning rate of SGD, for the same time")
    right.set_title("at the end", fontsize=10)
    left.set_title("on the way", fontsize=10)
    left.set_yscale("log")
    left.set_ylim(bottom=1e-12)  # the first steps differ by rounding only
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.legend(fontsize=9, loc="lower right")
    save(figure, path)


def main(config: Config) -> None:
    rates, fastest = config.learning_rate, max(config.learning_rate, default=math.nan)
    positive = all(0 < rate < math.inf for rate in rates)
    below = 1 / fastest if positive else math.nan
    decay_valid = 0 <= config.weight_decay < below
    check_options(
        ("--learning-rate", rates, "positive numbers", positive),
        ("--learning-rate", rates, "at least two different ones", len(set(rates)) > 1),
        ("--time", config.time, "at least one step", fastest <= config.time < math.inf),
        ("--weight-decay", config.weight_decay, f"a number in [0, {below:g})", decay_valid),
        ("--images", config.images, "between 2 and 1347", 2 <= config.images <= 1347),
        ("--epsilon", config.epsilon, "a number in [0, 1]", 0 <= config.epsilon <= 1),
    )
    check_out(config.out, "results.json", "curves.png")
    jax.config.update("jax_enable_x64", True)
    params, gradient = make_problem(config)
    rates = sorted(set(config.learning_rate), reverse=True)
    total = (1 + len(COLORS)) * sum(round(config.time / rate) for rate in rates)
    with tqdm.tqdm(total=total, unit="step") as progress:
        runs = [compare(rate, config, params, gradient, progress) for rate in rates]
    powers = fitted_powers(runs)
    print_table(runs, powers)
    settings = {key: getattr(config, key) for key in ("weight_decay", "time", "images", "epsilon")}
    ends = [
        run
        | {key: {k: float(v[-1]) for k, v in run[key].items()} for key in ("travelled", "apart")}
        for run in runs
    ]
    report = settings | {"fitted_powers": powers, "learning_rates": ends}
    (config.out / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(runs, powers, config.out / "curves.png")
    print(f"Wrote results.json and curves.png to {config.out}.")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
