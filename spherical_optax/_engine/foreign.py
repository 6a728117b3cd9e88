"""Transformations of other libraries inside ours: their state is checked and keeps its dtypes."""

from typing import Any

import jax
import numpy as np
import optax

from spherical_optax import _trees
from spherical_optax._engine.layout import OTHER_STATE, aligned, as_dtype_of, widened


def foreign(who: str, tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Wraps a transformation so that it checks the shapes of its state, and keeps its dtypes.

    Gradients narrower than their parameters are widened, because Optax computes in their dtype.
    """
    tx = optax.with_extra_args_support(tx)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        if params is not None:
            check_state(who, tx, state, params)
            leaves, back = aligned(who, params, updates)
            updates = back(list(map(widened, leaves, _trees.flatten(params)[0])))
        updates, new = tx.update(updates, state, params, **extra_args)
        treedefs: Any = [jax.tree.structure(each) for each in (new, state)]
        if treedefs[0] == treedefs[1]:
            new = jax.tree.map(as_dtype_of, new, state)
        return updates, new

    return optax.GradientTransformationExtraArgs(tx.init, update)


def check_state(
    who: str, tx: optax.GradientTransformation, state: optax.OptState, params: optax.Params
) -> None:
    """Raises a `ValueError` if a leaf of the state does not fit its parameter."""
    shapes = {leaf.keys: np.shape(leaf.value) for leaf in _trees.visible_leaves(params)}
    kept = _of_others(state)
    owner = {
        place: next(
            keys for keys in (place[n:] for n in range(1, len(place) + 1)) if keys in shapes
        )
        for place in kept
        if any(place[n:] in shapes for n in range(1, len(place) + 1))
    }
    if all(kept[place] == shapes[keys] for place, keys in owner.items()):
        return  # the usual case, which needs no trace of init
    wanted = _of_others(jax.eval_shape(tx.init, params))
    if wanted.keys() != kept.keys():
        return  # the structures differ; the transformation itself raises a better error
    for place, keys in owner.items():
        if kept[place] != wanted[place]:
            raise ValueError(
                f"{who}: {'/'.join(keys)} of shape {shapes[keys]}: expected state of shape "
                f"{wanted[place]}, found {kept[place]}{OTHER_STATE}."
            )


def _of_others(state: optax.OptState) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The shapes in a state by path, without this library's states, which are checked elsewhere."""
    library = __name__.partition(".")[0]

    def ours(node: Any) -> bool:
        return type(node).__module__.partition(".")[0] == library

    rest = jax.tree.map(lambda node: None if ours(node) else node, state, is_leaf=ours)
    return {
        leaf.keys: np.shape(leaf.value)
        for leaf in _trees.visible_leaves(rest)
        if leaf.value is not None
    }
