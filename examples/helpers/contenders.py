"""Optimizers of kernels that a norm follows, all with the same number of settings.

A setting is a learning rate and, for some optimizers, a strength: of decay, of the pull towards the
initial weights, or the factor that shrinks the weights. Optimizers without a strength have twelve
rates, each twice the one before. The others have three rates with four strengths each. Shorter runs
with a seed that is not reported chose these ranges.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import optax
from optax import contrib

import spherical_optax as so


class Spheres(NamedTuple):
    """Three kinds of groups of the same kernels."""

    layers: so.Groups  # one per kernel
    neurons: so.Groups  # one per output
    invariant: so.Groups  # the radially invariant ones


Make: TypeAlias = Callable[[optax.Schedule, Any, Spheres], optax.GradientTransformation]


class Contender(NamedTuple):
    make: Make  # from learning rate, strength and groups
    rates: tuple[float, ...]
    strengths: tuple[float, ...] = (0.0,)
    shrinks: bool = False  # shrinks the weights between tasks


def matrices(tree: Any) -> Any:
    """Muon's matrices: `(in, out)`, and `(h w in, out)` of convolutions."""
    last = lambda x: contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1)  # noqa: E731
    return jax.tree.map(last, tree)


def muon(rate: optax.Schedule, decay: Any = 0.0) -> optax.GradientTransformation:
    return optax.chain(
        contrib.scale_by_muon(weight_dimension_numbers=matrices),
        optax.add_decayed_weights(decay),
        optax.scale_by_learning_rate(rate),
    )


def direction_of(name: str) -> optax.GradientTransformation:
    match name:
        case "adam":
            return optax.scale_by_adam()
        case "muon":
            return contrib.scale_by_muon(weight_dimension_numbers=matrices)
        case _:
            return optax.chain(optax.trace(0.9), optax.scale_by_sign())


def radius_alone(name: str) -> Make:
    return lambda rate, _, groups: so.chain(
        direction_of(name), optax.scale_by_learning_rate(rate), so.retract(groups.layers)
    )


def angle_alone(name: str) -> Make:
    return lambda rate, _, groups: so.chain(
        direction_of(name),
        so.normalize_updates(groups.layers),
        so.scale_by_learning_rates(rate, groups=groups.layers),
    )


def doubled(first: float) -> tuple[float, ...]:
    return tuple(first * 2**k for k in range(12))


FEW = (1e-3, 3e-3, 1e-2)
DECAYS = (0.1, 0.3, 1.0, 3.0)
RATES, ANGLES = doubled(1e-4), doubled(5e-4)

CONTENDERS: dict[str, Contender] = {
    # Common optimizers.
    "sgd": Contender(lambda rate, *_: optax.sgd(rate, 0.9), doubled(1e-3)),
    "adam": Contender(lambda rate, *_: optax.adam(rate), RATES),
    "adamw": Contender(lambda rate, decay, _: optax.adamw(rate, weight_decay=decay), FEW, DECAYS),
    "muon": Contender(lambda rate, *_: muon(rate), RATES),
    "muon_decay": Contender(lambda rate, decay, _: muon(rate, decay), FEW, (0.3, 1.0, 3.0, 10.0)),
    # Published remedies.
    "l2_init": Contender(
        lambda rate, strength, _: optax.chain(so.add_decay_to_initial(strength), optax.adam(rate)),
        FEW,
        (1e-3, 3e-3, 1e-2, 3e-2),
    ),
    "shrink_perturb": Contender(
        lambda rate, *_: optax.adam(rate), FEW, (0.3, 0.5, 0.7, 0.9), shrinks=True
    ),
    # Optimizers of this library.
    "adamsrt": Contender(lambda rate, _, groups: so.adamsrt(rate, groups=groups.invariant), RATES),
    "adamp": Contender(
        lambda rate, decay, groups: so.adamp(rate, groups=groups.invariant, weight_decay=decay),
        FEW,
        DECAYS,
    ),
    # The rate is the angle, which learning rate and decay set together.
    "rotational_adamw": Contender(
        lambda rate, _, groups: so.rotational(optax.scale_by_adam(), rate, groups=groups.neurons),
        ANGLES,
    ),
    "adamh": Contender(lambda rate, _, groups: so.adamh(rate, groups=groups.layers), ANGLES),
    "muonh": Contender(lambda rate, _, groups: so.muonh(rate, groups=groups.layers), ANGLES),
    # The parts of adamh and muonh alone, and the same for the sign of momentum.
    "adam_radius": Contender(radius_alone("adam"), RATES),
    "adam_angle": Contender(angle_alone("adam"), ANGLES),
    "muon_radius": Contender(radius_alone("muon"), RATES),
    "muon_angle": Contender(angle_alone("muon"), ANGLES),
    "sign": Contender(
        lambda rate, *_: optax.chain(direction_of("sign"), optax.scale_by_learning_rate(rate)),
        doubled(2e-5),
    ),
    "sign_radius": Contender(radius_alone("sign"), doubled(2e-5)),
    "sign_angle": Contender(angle_alone("sign"), ANGLES),
    "signh": Contender(
        lambda rate, _, groups: so.hyperball(direction_of("sign"), rate, groups=groups.layers),
        ANGLES,
    ),
}
