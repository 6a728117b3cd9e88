"""Checks of hyperparameters, made where an optimizer is built."""

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
    """Raises unless 0 <= value < below; `above` and `most` replace the two bounds.

    Traced values pass: they cannot be looked at.
    """
    if isinstance(value, jax.core.Tracer):
        return
    if isinstance(value, str | bool) or value is None or np.ndim(value) > 0 or callable(value):
        remedy = "; to schedule it, wrap the factory in optax.inject_hyperparams"
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
            found += f" in {value.dtype}; give optax.inject_hyperparams hyperparam_dtype=float32"
        raise ValueError(f"{who}: expected {name} in {interval}, found {found}.")


def check_transformation(who: str, inner: Any, name: str = "inner") -> None:
    """Raises unless this is a gradient transformation."""
    if isinstance(inner, type) or not (hasattr(inner, "init") and hasattr(inner, "update")):
        remedy = "call it" if callable(inner) else "pass one, such as optax.trace(0.9)"
        raise TypeError(
            f"{who}: expected a gradient transformation as {name}, found {inner!r}; {remedy}."
        )


def check_learning_rate(who: str, learning_rate: Any, name: str = "learning_rate") -> None:
    """Raises unless the learning rate is a schedule or a number of at least 0."""
    if not callable(learning_rate):
        check_number(who, name, learning_rate)
        return
    try:
        found = jax.eval_shape(learning_rate, jax.ShapeDtypeStruct((), "int32"))
    except Exception:  # it cannot be traced: the first step says more
        return
    if not isinstance(found, jax.ShapeDtypeStruct) or found.shape:
        raise TypeError(
            f"{who}: expected {name} to return a number for each step, found {found!r}; a "
            "schedule is a function of the step's number, such as optax.cosine_decay_schedule."
        )


def warn_of_angle(who: str, angle: Any) -> None:
    """Warns of an angle, known as a number, of more than a radian a step."""
    if isinstance(angle, int | float) and angle > 1:
        warnings.warn(
            f"{who}: expected an angle of at most 1 radian a step, found {angle:g}; 0.01 to 0.1 "
            "are usual.",
            UserWarning,
            stacklevel=5,
        )


def check_adam(who: str, b1: Any, b2: Any, eps: Any = 0.0) -> None:
    """Raises unless these are decay rates, and a number to add."""
    check_number(who, "b1", b1, below=1)
    check_number(who, "b2", b2, below=1)
    check_number(who, "eps", eps)
