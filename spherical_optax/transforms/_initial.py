"""Decay toward the initial values, for scales and offsets of normalization layers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax import _trees
from spherical_optax._checks import check_number
from spherical_optax._engine.layout import aligned, no_params
from spherical_optax._masks import Mask, checked
from spherical_optax._numerics import wide


class AddDecayToInitialState(NamedTuple):
    """State of `add_decay_to_initial`.

    Attributes:
      count: Number of updates so far, int32.
      initial: The values at the first update, and zeros before it: a tree like the parameters.
    """

    count: jax.Array  # type: ignore[assignment]
    initial: Any


def add_decay_to_initial(
    weight_decay: jax.typing.ArrayLike, mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
    """Adds decay toward the values at the first update, instead of toward zero.

    ```
    g + weight_decay (x - x_0)
    ```

    Before the moments, this is the gradient of an L2 penalty. After them, it is decoupled decay, as
    with `optax.add_decayed_weights`. x_0 is the value at the first update, so weights may be loaded
    after `init`. The state has a copy of all leaves in the mask. The transformation is meant for
    the scales and offsets of normalization layers.

    Args:
      weight_decay: The decay factor, 0 or more.
      mask: The leaves that decay, as in `optax.add_decayed_weights`; all if `None`.

    Returns:
      A transformation; `update` needs params.

    Raises:
      TypeError, ValueError: If `weight_decay` is out of range; at `init`, if `mask` does not fit.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import spherical_optax as so
      >>> tx = optax.chain(so.add_decay_to_initial(0.5), optax.sgd(1.0))
      >>> params, state = jnp.array([1.]), tx.init(jnp.array([1.]))
      >>> for gradient in (jnp.array([-4.]), jnp.array([0.])):
      ...     updates, state = tx.update(gradient, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params)
      [5.]
      [3.]

    References:
      Lyle et al., Normalization and effective learning rates in reinforcement learning, 2024,
      section 4 (scales and offsets of norms); Kumar et al., Maintaining plasticity in continual
      learning via regenerative regularization, 2023 (L2 Init).
    """
    who = "add_decay_to_initial"
    check_number(who, "weight_decay", weight_decay)

    def init(params: Any) -> AddDecayToInitialState:
        return AddDecayToInitialState(
            jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params)
        )

    def update(updates: Any, state: AddDecayToInitialState, params: Any) -> tuple[Any, Any]:
        x, treedef = _trees.flatten(params)
        shapes = [None if leaf is None else leaf.shape for leaf in x]
        kept, _ = aligned(who, params, state.initial, shapes)
        g, back = aligned(who, params, updates)
        for i, leaf in enumerate(x):
            if leaf is None:
                continue
            kept[i] = jnp.where(state.count == 0, leaf, kept[i])
            if g[i] is not None:
                pull = weight_decay * (wide(leaf) - wide(kept[i]))
                g[i] = (wide(g[i]) + pull).astype(leaf.dtype)
        count = optax.safe_increment(state.count)
        return back(g), AddDecayToInitialState(count, treedef.unflatten(kept))

    tx = optax.masked(
        optax.GradientTransformation(init, update), True if mask is None else checked(who, mask)
    )

    def with_params(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Any]:
        if params is None:
            raise no_params(who)
        return tx.update(updates, state, params)

    return optax.GradientTransformationExtraArgs(tx.init, with_params)
