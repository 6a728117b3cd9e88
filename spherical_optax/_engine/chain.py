"""Chains: neighboring steps with equal groups share their passes over the arrays."""

from typing import Any

import optax

from spherical_optax import _trees
from spherical_optax._checks import check_transformation
from spherical_optax._engine.foreign import foreign
from spherical_optax._engine.layout import aligned, as_dtype_of, no_params
from spherical_optax._engine.lift import Lifted, lift_together


def chain(
    *transformations: optax.GradientTransformation, who: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Like `optax.chain`, but neighbors from this library share their passes over the arrays.

    Neighboring transformations with equal `groups` need two passes in total, however many they are:
    one for all inner products, one for the update and all moments. Such a chain is as fast, and
    takes as little memory, as this library's optimizers, which are built with it. The state is that
    of `optax.chain`.

    Optax's transformations may come before, between and after. Between two neighbors, an Optax
    transformation separates them. To apply the learning rate there without separating them, use
    `scale_by_learning_rates`.

    Updates are returned in the dtypes of the parameters. The states of Optax's transformations keep
    their own dtypes.

    Args:
      *transformations: Transformations, in the order in which they are applied.
      who: The name of the optimizer in error messages; "chain" if `None`.

    Returns:
      A transformation whose state is a tuple with one state per transformation.

    Raises:
      TypeError: If an argument is not a gradient transformation.
      ValueError: In `update`, if the state comes from another chain, or if params are missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import spherical_optax as so
      >>> groups = so.per_layer()
      >>> tx = so.chain(
      ...     optax.scale_by_adam(),
      ...     so.normalize_updates(groups),
      ...     so.scale_by_learning_rates(0.1, groups=groups),
      ...     so.retract(groups),
      ... )
      >>> params = jnp.array([3., 4.])
      >>> updates, _ = tx.update(jnp.array([1., 2.]), tx.init(params), params)
      >>> so.geometry.norm(optax.apply_updates(params, updates), groups)
      Array(5., dtype=float32)
    """
    name = who or "chain"
    for each in transformations:
        check_transformation(name, each, "a member of the chain")
    runs: list[list[Any]] = []
    for part in transformations:
        if runs and _join(runs[-1][-1], part):
            runs[-1].append(part)
        else:
            runs.append([part])
    updates_of_runs = [_update_of(who, run, n > 0) for n, run in enumerate(runs)]
    needs_params = any(
        part.step.needs_params for run in runs for part in run if isinstance(part, Lifted)
    )

    def init(params: optax.Params) -> optax.OptState:
        return tuple(part.init(params) for part in transformations)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        if params is None and needs_params:
            raise no_params(name)
        if len(state) != len(transformations):
            raise ValueError(
                f"{name}: expected the states of {len(transformations)} transformations, found "
                f"{len(state)}. The state was made by another optimizer. Call init of this one."
            )
        states: list[Any] = []
        for run, update_run in zip(runs, updates_of_runs, strict=True):
            own = list(state[len(states) : len(states) + len(run)])
            updates, own = update_run(updates, own, params, **extra_args)
            states += own
        if params is not None:
            leaves, back = aligned(name, params, updates)
            updates = back(list(map(as_dtype_of, leaves, _trees.flatten(params)[0])))
        return updates, tuple(states)

    return optax.GradientTransformationExtraArgs(init, update)


def _join(a: optax.GradientTransformation, b: optax.GradientTransformation) -> bool:
    """Whether two neighbors are steps with equal groups."""
    if not (isinstance(a, Lifted) and isinstance(b, Lifted)):
        return False
    skip = a.step.skips_single_entries, b.step.skips_single_entries
    return skip[0] == skip[1] and _equal(a.step.groups, b.step.groups)


def _equal(a: Any, b: Any) -> bool:
    """Whether two `groups` arguments are equal."""
    if a is b:
        return True
    try:
        return type(a) is type(b) and bool(a == b)
    except (TypeError, ValueError):  # raised by trees that hold arrays, for example
        return False


def _update_of(who: str | None, run: list[Any], made_before: bool) -> Any:
    """The update of neighbors that share passes, from updates and a list of states to the same."""
    if isinstance(run[0], Lifted):
        return lift_together([part.step for part in run], made_before, who)
    single = foreign(who or "chain", run[0])

    def update(updates: Any, states: list[Any], params: Any, **extra_args: Any) -> Any:
        updates, state = single.update(updates, states[0], params, **extra_args)
        return updates, [state]

    return update
