"""The values of recorders as flat names and numbers, for a logger."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from spherical_optax import _trees
from spherical_optax.diagnostics._effective import RecordEffectiveLearningRateState
from spherical_optax.diagnostics._recorders import (
    RecordGradientState,
    RecordSphereState,
    SphereMetrics,
)
from spherical_optax.groups import Groups, joints_of

RECORDERS = {
    RecordSphereState: "sphere",
    RecordGradientState: "gradient_cosine",
    RecordEffectiveLearningRateState: "effective_learning_rate",
}


def sphere_report(state_or_metrics: Any, params: Any, groups: Groups) -> dict[str, float]:
    """Flattens recorded values to names and numbers, for any logger.

    ```
    sphere/<path>/radius_mean    radius_min    radius_max    |x| after the step
    sphere/<path>/angle_mean    angle_max                    of the step, in radians
    sphere/<path>/radial_mean                                <x' - x, u> / |x|, outwards
    sphere/<path>/gradient_cosine_max                        the largest |<g, u>| / |g|
    sphere/<path>/effective_learning_rate_mean    effective_learning_rate_max
    ```

    Means, minima and maxima are taken over the groups of a leaf. All values are fetched from their
    devices at once.

    Args:
      state_or_metrics: An optimizer's state with recorders anywhere in it: in chains,
        `optax.inject_hyperparams`, `optax.MultiSteps` or other wrappers. Or an object that holds
        such a state: Linen's `TrainState`, an `nnx.Optimizer` or its `opt_state`. Or the result of
        `sphere_metrics`.
      params: The parameters. Only paths and shapes are read.
      groups: The groups of the recorders; see [`spherical_optax.groups`][].

    Returns:
      A dictionary from name to number, in the order of the parameters. It has the names of the
      recorders in the state, for each leaf with a group. The names are the same from `init` on.

    Raises:
      ValueError: If there is no recorder, if there are several of one kind, or if they were made
        with other groups or for other parameters.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import spherical_optax as so
      >>> groups = so.groups_by_path({"kernel": so.per_layer()})
      >>> tx = optax.chain(so.record_gradient(groups), optax.sgd(1.0))
      >>> params = {"fc": {"kernel": jnp.array([2., 0.])}}
      >>> _, state = tx.update({"fc": {"kernel": jnp.array([0., 3.])}}, tx.init(params), params)
      >>> so.sphere_report(state, params, groups)
      {'sphere/fc/kernel/gradient_cosine_max': 0.0}
    """
    leaves = _trees.visible_leaves(params)
    shapes = {
        leaves[i].path: group.shape(np.shape(leaves[i].value))
        for joint in joints_of(groups, params)
        for i, group in joint.items()
    }
    if isinstance(state_or_metrics, Mapping) and all(
        isinstance(each, SphereMetrics) for each in state_or_metrics.values()
    ):
        kept = {"sphere": {path: list(each) for path, each in state_or_metrics.items()}}
        found = {"sphere": set(state_or_metrics)}
    else:
        kept, found = {}, {}
        for name, tree in _recorded(state_or_metrics).items():
            kept[name] = {leaf.path: leaf.value for leaf in _trees.leaves_with_paths(tree)}
            found[name] = set(kept[name])
    for name, paths in found.items():
        if paths != set(shapes):
            raise ValueError(
                f"sphere_report: expected {name} of {sorted(shapes)}, the parameters with a group, "
                f"found {name} of {sorted(paths)}. Pass the groups of the recorder."
            )
    values = jax.device_get(kept)  # all at once
    report: dict[str, float] = {}
    for path in (leaf.path for leaf in leaves if leaf.path in shapes):
        for name, metrics in _metrics({name: values[name][path] for name in values}).items():
            report[f"sphere/{path}/{name}" if path else f"sphere/{name}"] = metrics
    return report


def _recorded(state: Any) -> dict[str, Any]:
    """The values of the recorders in a state, by name."""
    kinds = tuple(RECORDERS)
    is_recorder: Callable[[Any], bool] = lambda node: isinstance(node, kinds)  # noqa: E731
    found: dict[str, Any] = {}
    remaining = [state]
    while remaining:
        for node in jax.tree.leaves(remaining.pop(), is_leaf=is_recorder):
            if not is_recorder(node):
                continue
            name = RECORDERS[type(node)]
            if name in found:
                raise ValueError(
                    f"sphere_report: expected one {type(node).__name__}, found several. Pass the "
                    "part of the state that holds the one to report."
                )
            found[name] = getattr(node, name)
            remaining.append(getattr(node, "inner_state", None))
    if not found:
        raise ValueError(
            "sphere_report: expected a state with a recorder, found none. Put record_sphere(groups)"
            " last in the chain, or record_gradient(groups) first, and call init again."
        )
    return found


def _metrics(recorded: Mapping[str, Any]) -> dict[str, float]:
    """The numbers for one leaf, by name."""
    numbers: dict[str, Any] = {}
    if "sphere" in recorded:
        sphere = SphereMetrics(*recorded["sphere"])
        radius, before = np.asarray(sphere.radius_after), np.asarray(sphere.radius_before)
        numbers |= {
            "radius_mean": radius.mean(),
            "radius_min": radius.min(),
            "radius_max": radius.max(),
            "angle_mean": np.mean(sphere.step_angle),
            "angle_max": np.max(sphere.step_angle),
            "radial_mean": np.mean(sphere.step_radial / np.where(before == 0, 1, before)),
        }
    if "gradient_cosine" in recorded:
        numbers["gradient_cosine_max"] = np.abs(recorded["gradient_cosine"]).max()
    if "effective_learning_rate" in recorded:
        rate = recorded["effective_learning_rate"]
        numbers |= {
            "effective_learning_rate_mean": np.mean(rate),
            "effective_learning_rate_max": np.max(rate),
        }
    return {name: float(value) for name, value in numbers.items()}
