"""Runs an optimizer, jitted, on given gradients."""

from typing import Any

import jax
import optax


def run(tx: optax.GradientTransformation, params: Any, grads: Any, state: Any = None) -> list[Any]:
    """The parameters before the first and after each step, from a new or a given state."""
    state, path = tx.init(params) if state is None else state, [params]
    update = jax.jit(tx.update)
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return path
