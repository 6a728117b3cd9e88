"""Checks of hyperparameters when an optimizer is built."""

import math
import warnings
from typing import Any

import jax
import numpy as np


def check_number(
    who: str,
    name: str,
    value: Any,
    *,
    above: float | None = None,
    below: float = math.inf,
    most: float | None = None,
) -> None:
    """Raises unless 0 <= value < below. `above` and `most` replace these: above < value <= most.

    Traced values pass, because they cannot be read.
    """
    if isinstance(value, jax.core.Tracer):
        return
    if isinstance(value, str | bool) or value is None or np.ndim(value) > 0 or callable(value):
        remedy = ". To schedule it, wrap the factory in optax.inject_hyperparams"
        raise TypeError(
            f"{who}: expected {name} to be a number, found {value!r}"
            f"{remedy if callable(value) else ''}."
        )
    number = float(value)
    inside = number >= 0 if above is None else number > above
    inside = inside and (number < below if most is None else number <= most)
    if not inside:
        start = "[0" if above is None else f"({above}"
        interval = f"{start}, {below})" if most is None else f"{start}, {most}]"
        found = f"{number}"
        if isinstance(value, jax.Array) and value.dtype.itemsize < 4:
            found += f" in {value.dtype}. Pass hyperparam_dtype=float32 to optax.inject_hyperparams"
        raise ValueError(f"{who}: expected {name} in {interval}, found {found}.")


def check_transformation(who: str, inner: Any, name: str = "inner") -> None:
    """Raises a `TypeError` unless `inner` is a gradient transformation."""
    if isinstance(inner, type) or not (hasattr(inner, "init") and hasattr(inner, "update")):
        such = "optax.adamw(1e-3)" if name == "other" else "optax.trace(0.9)"
        remedy = "Call it" if callable(inner) else f"Pass one, such as {such}"
        raise TypeError(
            f"{who}: expected a gradient transformation as {name}, found {inner!r}. {remedy}."
        )


def check_learning_rate(who: str, learning_rate: Any, name: str = "learning_rate") -> None:
    """Raises unless the learning rate is a schedule or a number of at least 0."""
    if not callable(learning_rate):
        check_number(who, name, learning_rate)
        return
    try:
        found = jax.eval_shape(learning_rate, jax.ShapeDtypeStruct((), "int32"))
    except Exception:  # it cannot be traced; the first update raises a better error
        return
    if not isinstance(found, jax.ShapeDtypeStruct) or found.shape:
        raise TypeError(
            f"{who}: expected {name} to return a number for each step, found {found!r}. A schedule "
            "is a function of the step count, such as optax.cosine_decay_schedule(0.1, 1000)."
        )


def warn_of_angle(who: str, angle: Any) -> None:
    """Warns if an angle, given as a Python number, is more than 1 radian per step."""
    if isinstance(angle, int | float) and angle > 1:
        warnings.warn(
            f"{who}: expected an angle of at most 1 radian per step, found {angle:g}. Usual values "
            "are 0.01 to 0.1.",
            UserWarning,
            stacklevel=5,
        )


def check_adam(who: str, b1: Any, b2: Any, eps: Any = 0.0) -> None:
    """Raises unless `b1` and `b2` are decay rates in [0, 1) and `eps` is at least 0."""
    check_number(who, "b1", b1, below=1)
    check_number(who, "b2", b2, below=1)
    check_number(who, "eps", eps)
