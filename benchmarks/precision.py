"""Measures low precision on the sphere: whether moments stay tangent, and whether radii drift.

A student learns the filters of a teacher from noisy outputs. Its loss depends only on the
directions of the filters. Each optimizer runs in each precision, on the same data and from the same
initial weights, which bfloat16 represents exactly.

    python benchmarks/precision.py
    python benchmarks/precision.py --steps 1000
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from measure import Row, check_out, print_table, write

import spherical_optax as so

GROUP = so.per_filter()
ENTRIES, FILTERS, BATCH, NOISE = 64, 32, 32, 1.0


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures tangency and radii over a training run, per optimizer and precision."""

    steps: int = 10_000
    """Training steps; the learning rate decays to 0 along a cosine."""
    seed: int = 0
    """Seed of the teacher, the initial weights and the data."""
    out: pathlib.Path = pathlib.Path("benchmarks/results")
    """Directory for precision.json."""


class Precision(NamedTuple):
    """The dtypes of a run."""

    params: Any = jnp.float32
    """The dtype of the parameters that the optimizer updates."""
    compute: Any = jnp.float32
    """The dtype of loss and gradients; parameters are cast to it."""
    moment: Any = jnp.float32
    """The dtype of the first moment."""
    scaled: bool = False
    """Whether the loss is scaled. Steps whose gradients are not finite are then skipped."""
    grow: int = 200
    """Steps after which the scale doubles. It halves when gradients are not finite."""


PRECISIONS = {
    "float32": Precision(),
    "bfloat16 parameters, float32 moment": Precision(jnp.bfloat16, jnp.bfloat16),
    "bfloat16 with float32 master": Precision(compute=jnp.bfloat16),
    "float32 with bfloat16 moment": Precision(moment=jnp.bfloat16),
    "float16 gradients of a scaled loss": Precision(compute=jnp.float16, scaled=True),
}


def make_hyperball(rate: optax.Schedule, moment: Any) -> optax.GradientTransformation:
    return so.hyperball(optax.scale_by_adam(mu_dtype=moment), rate, groups=GROUP)


def make_adamsrt(rate: optax.Schedule, moment: Any) -> optax.GradientTransformation:
    return so.adamsrt(rate, groups=GROUP, mu_dtype=moment)


def make_sgdmrt(rate: optax.Schedule, moment: Any) -> optax.GradientTransformation:
    return so.sgdmrt(rate, groups=GROUP, accumulator_dtype=moment)


class Case(NamedTuple):
    """An optimizer, and how it is measured."""

    make: Callable[[optax.Schedule, Any], optax.GradientTransformation]
    rate: float
    moment: str
    """The field of the state that holds the first moment."""
    fixed: bool = False
    """Whether it keeps the radius fixed. It then does not keep the moment tangent."""


CASES = {
    "adamsrt": Case(make_adamsrt, 0.01, "mu"),
    "sgdmrt": Case(make_sgdmrt, 30.0, "trace"),
    "hyperball": Case(make_hyperball, 0.01, "mu", fixed=True),
}


class Run(NamedTuple):
    """A training run."""

    finite: bool
    tangency: np.ndarray
    """The largest |<m, u>| / |m| of all groups after each step, with u from before the step.

    0 for a skipped step: m is then still tangent from the step before."""
    radius: np.ndarray
    """|x| before the first and after each step, for each group."""
    angle: float
    """The final angle between student and teacher in radians, as a mean over groups."""
    skipped: int
    """Number of steps skipped because their gradients were not finite."""


def train(case: Case, precision: Precision, config: Config) -> Run:
    schedule = optax.cosine_decay_schedule(case.rate, config.steps)
    tx = case.make(schedule, precision.moment)
    if precision.scaled:  # a skipped step halves the scale, so few steps in a row are skipped
        tx = optax.apply_if_finite(tx, max_consecutive_errors=100)
    keys = jax.random.split(jax.random.key(config.seed), 3)
    teacher = jax.random.normal(keys[0], (ENTRIES, FILTERS))
    teacher /= so.geometry.norm(teacher, GROUP)
    start = jax.random.normal(keys[1], teacher.shape).astype(jnp.bfloat16).astype(precision.params)

    def loss_fn(w: jax.Array, x: jax.Array, noise: jax.Array, scale: jax.Array) -> jax.Array:
        y = (x.astype(w.dtype) @ w).astype(jnp.float32) / so.geometry.norm(w, GROUP)
        return scale * jnp.mean((y - x @ teacher - NOISE * noise) ** 2)

    def step(carry: Any, count: jax.Array) -> tuple[Any, Any]:
        params, state, scale = carry
        data, noise = jax.random.split(jax.random.fold_in(keys[2], count))
        x = jax.random.normal(data, (BATCH, ENTRIES))
        noise = jax.random.normal(noise, (BATCH, FILTERS))
        grads = jax.grad(loss_fn)(params.astype(precision.compute), x, noise, scale)
        grads = (grads.astype(jnp.float32) / scale).astype(params.dtype)
        updates, state = tx.update(grads, state, params)
        after = optax.apply_updates(params, updates)
        taken = jnp.array(True)
        if precision.scaled:
            taken = state.last_finite
            grown = jnp.where((count + 1) % precision.grow == 0, 2 * scale, scale)
            scale = jnp.where(taken, grown, scale / 2)
        m = optax.tree.get(state, case.moment)
        length = so.geometry.norm(m, GROUP) * so.geometry.norm(params, GROUP)
        cosine = jnp.abs(so.geometry.inner(m, params, GROUP)) / jnp.where(length == 0, 1, length)
        tangency = jnp.where(taken, cosine.max(), 0)
        return (after, state, scale), (tangency, so.geometry.norm(after, GROUP))

    def run() -> Any:
        carry = (start, tx.init(start), jnp.float32(2.0**15 if precision.scaled else 1.0))
        return jax.lax.scan(step, carry, jnp.arange(config.steps))

    (params, state, _), (tangency, radius) = jax.jit(run)()
    radius = np.concatenate([so.geometry.norm(start, GROUP)[None], radius])
    return Run(
        finite=bool(np.isfinite(radius).all() and np.isfinite(tangency).all()),
        tangency=np.asarray(tangency),
        radius=radius,
        angle=float(so.geometry.angle(teacher, params.astype(jnp.float32), GROUP).mean()),
        skipped=int(state.total_notfinite) if precision.scaled else 0,
    )


def measure(config: Config) -> list[Row]:
    rows = []
    for name, case in CASES.items():
        runs = {each: train(case, precision, config) for each, precision in PRECISIONS.items()}
        for each, run in runs.items():
            expected = run.radius[:1] if case.fixed else runs["float32"].radius
            drift = np.abs(run.radius / expected - 1).max(axis=-1)
            tangency = float(run.tangency.max())
            rows.append(
                {
                    "optimizer": name,
                    "precision": each,
                    "finite": run.finite,
                    "tangency": None if case.fixed else tangency,
                    "tangency in eps": None
                    if case.fixed
                    else tangency / float(jnp.finfo(PRECISIONS[each].moment).eps),
                    "drift at the end": float(drift[-1]),
                    "drift at most": float(drift.max()),
                    "angle to the teacher": run.angle,
                    "skipped": run.skipped,
                }
            )
    return rows


def main(config: Config) -> None:
    check_out(config.out, "precision.json")
    results = measure(config)
    for name, case in CASES.items():
        table = [
            {
                "precision": row["precision"],
                "finite": "yes" if row["finite"] else "no",
                "tangency": "-" if case.fixed else f"{row['tangency']:.1e}",
                "in eps": "-" if case.fixed else f"{row['tangency in eps']:.2f}",
                "drift, end": f"{row['drift at the end']:.1e}",
                "at most": f"{row['drift at most']:.1e}",
                "angle": f"{row['angle to the teacher']:.4f}",
                "skipped": row["skipped"],
            }
            for row in results
            if row["optimizer"] == name
        ]
        drift = "the first radius" if case.fixed else "the radius in float32"
        print_table(f"{name}, {config.steps:,} steps; drift relative to {drift}", table)
    print("\nTangency: |<m, u>| / |m|, the largest of all steps taken and all groups, and in")
    print("units of the moment's eps. Hyperball keeps no tangent moment. Angle: to the teacher")
    print("at the end, in radians. Skipped: steps left out as gradients were not finite.")
    write(config.out, "precision", {"steps": config.steps, "seed": config.seed}, results)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
