"""The optimizers of the table. Their hyperparameters may be traced.

They are built inside the jitted step, so that all learning rates, weight decays and betas share one
compilation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import optax

import spherical_optax as so

from .models import GROUPS
from .published import Optimizer

EPSILON = 1e-8  # the default of Optax and PyTorch

Number: TypeAlias = Any  # a float, or a traced array


class Setting(NamedTuple):
    """The hyperparameters of a run; `b1` is also the momentum of SGD."""

    learning_rate: Number
    weight_decay: Number
    b1: Number
    b2: Number


Schedule: TypeAlias = Callable[[Number], optax.Schedule]  # from the initial learning rate


def make_optimizer(
    name: Optimizer, setting: Setting, schedule: Schedule
) -> optax.GradientTransformation:
    """The optimizer of that name.

    Weight decay acts on all parameters, as L2 that is added to the gradient. Exceptions: it is
    decoupled for AdamW and rotational AdamW, and it does not act on the groups of AdamG and
    Hyperball, whose radius is fixed.
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
    """Adds recorders, which keep radius, angle and effective learning rate in the state.

    Rotational AdamW has no effective learning rate, as its angle depends on another running mean.
    """
    if name != "rotational_adamw":
        adam = {"b1": setting.b1, "b2": setting.b2, "eps": EPSILON}
        numbers = {} if name in ("sgd", "sgdmrt") else adam
        tx = so.record_effective_learning_rate(tx, GROUPS, **numbers)
    return so.chain(tx, so.record_sphere(GROUPS))
