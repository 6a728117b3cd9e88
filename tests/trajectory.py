"""Steps of an optimizer, jitted, along given gradients."""

from typing import Any

import jax
import optax


def run(tx: optax.GradientTransformation, params: Any, grads: Any) -> list[Any]:
    """The parameters before the first and after each step."""
    state, path = tx.init(params), [params]
    update = jax.jit(tx.update)
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return path
