"""The optimizers of the table, each from numbers that may be traced.

Built inside the jitted step, so that all learning rates, decays and betas share one compilation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import optax

import spherical_optax as so

from .models import GROUPS
from .published import Optimizer

EPSILON = 1e-8  # Optax's default, as PyTorch's

Number: TypeAlias = Any  # a float, or a traced array


class Setting(NamedTuple):
    """What differs between the runs of one optimizer; `b1` is the momentum of SGD."""

    learning_rate: Number
    weight_decay: Number
    b1: Number
    b2: Number


Schedule: TypeAlias = Callable[[Number], optax.Schedule]  # of the initial learning rate


def make_optimizer(
    name: Optimizer, setting: Setting, schedule: Schedule
) -> optax.GradientTransformation:
    """The optimizer of that name.

    Decay is L2, added to the gradient, on all parameters: of AdamW and rotational AdamW it is
    decoupled, and on the fixed spheres of AdamG and Hyperball there is none.
    """
    rate, decay = schedule(setting.learning_rate), setting.weight_decay
    b1, b2 = setting.b1, setting.b2
    l2 = optax.add_decayed_weights(decay)
    adam = optax.chain(l2, optax.adam(rate, b1, b2))
    match name:
        case "sgd":
            return optax.chain(l2, optax.sgd(rate, momentum=b1))
        case "adam":
            return adam
        case "adamw":
            return optax.adamw(rate, b1, b2, weight_decay=decay)
        case "adamg":
            return so.adamg(rate, b1, b2, groups=GROUPS, other=adam)
        case "adams":
            return so.adams(rate, b1, b2, groups=GROUPS, weight_decay=decay)
        case "adamsrt":
            return so.adamsrt(rate, b1, b2, groups=GROUPS, weight_decay=decay)
        case "sgdmrt":
            return so.sgdmrt(rate, b1, groups=GROUPS, weight_decay=decay)
        case "hyperball":
            return so.hyperball(optax.scale_by_adam(b1, b2), rate, groups=GROUPS, other=adam)
        case "rotational_adamw":
            return so.rotational_adamw(rate, b1, b2, groups=GROUPS, weight_decay=decay)


def record(name: Optimizer, tx: optax.GradientTransformation, setting: Setting) -> Any:
    """The optimizer, with radius, angle and effective learning rate of each step in its state.

    There is no effective learning rate where another running mean sets the angle.
    """
    if name != "rotational_adamw":
        adam = {"b1": setting.b1, "b2": setting.b2, "eps": EPSILON}
        numbers = {} if name in ("sgd", "sgdmrt") else adam
        tx = so.record_effective_learning_rate(tx, GROUPS, **numbers)
    return so.chain(tx, so.record_sphere(GROUPS))
