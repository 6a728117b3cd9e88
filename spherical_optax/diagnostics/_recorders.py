"""Angles, radii and cosines, recorded in a chain or measured between snapshots."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spherical_optax import _trees, geometry
from spherical_optax._engine.layout import Layout, check_type
from spherical_optax._engine.state import per_leaf, pick, zeros_as
from spherical_optax._numerics import safe_divide, wide
from spherical_optax.groups import Groups, Joint, RadialGroup, joints_of


class SphereMetrics(NamedTuple):
    """How a step from x to x' moved radially invariant groups.

    Attributes:
      radius_before: |x|.
      radius_after: |x'|.
      step_angle: The angle between x and x', in radians; 0 where x or x' is zero.
      step_radial: The radial part of the step, <x' - x, u> with u = x / |x|. It is positive
        outward, and 0 where |x| = 0.
      step_tangential: The length of the tangent part, |x' - x - <x' - x, u> u|.
    """

    radius_before: Any
    radius_after: Any
    step_angle: Any
    step_radial: Any
    step_tangential: Any


class RecordSphereState(NamedTuple):
    """State of `record_sphere`.

    Attributes:
      sphere: The metrics of the last step, zeros before the first. Nested dictionaries with the
        parameters' keys, only for leaves that have a group. The rows of each array are the fields
        of `SphereMetrics`, with one value per group: shape (5, *group.shape(x.shape)).
        `optax.tree_map_params` passes it to `transform_non_params` as a single node.
    """

    sphere: Any


class RecordGradientState(NamedTuple):
    """State of `record_gradient`.

    Attributes:
      gradient_cosine: <g, u> / |g| at the last update, 0 where the gradient or the group is
        zero. Stored like `RecordSphereState.sphere`, without the first axis.
    """

    gradient_cosine: Any


def record_sphere(groups: Groups) -> optax.GradientTransformationExtraArgs:
    """Records how each step moves the groups; put it last in a chain.

    ```
    |x|    |x + v|    angle(x, x + v)    <v, u>    |v - <v, u> u|        (v: the update)
    ```

    Updates are not changed. The state keeps its structure from `init` on. Read it with
    `optax.tree.get(state, "sphere")`. The step is measured before it is rounded to the dtype of
    the parameters. To measure the rounded step, use `sphere_metrics`.

    Args:
      groups: See [`spherical_optax.groups`][]. Each leaf of a joint group holds the values of the
        whole group.

    Returns:
      A transformation with state `RecordSphereState` in float32, or in float64 for float64
      parameters. `update` needs params.

    Raises:
      TypeError, ValueError: At `init`, if `groups` does not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import spherical_optax as so
      >>> groups = so.groups_by_path({"kernel": so.per_filter()})
      >>> tx = optax.chain(optax.sgd(1.0), so.record_sphere(groups))
      >>> params = {"kernel": jnp.array([[1., 2.], [0., 0.]])}
      >>> _, state = tx.update({"kernel": jnp.array([[0., 0.], [1., 2.]])}, tx.init(params), params)
      >>> sphere = so.SphereMetrics(*optax.tree.get(state, "sphere")["kernel"])
      >>> print(sphere.step_angle, sphere.radius_after.max())
      [0.7853982 0.7853982] 2.828427

    References:
      Roburin et al., Neurocomputing 2022.
    """

    def measure(v: Any, x: Any, joint: Joint) -> jax.Array:
        return jnp.stack(_measure({i: wide(v[i]) for i in joint}, x, joint))

    rows = (len(SphereMetrics._fields),)
    return _recorder("record_sphere", groups, measure, rows, RecordSphereState)


def record_gradient(groups: Groups) -> optax.GradientTransformationExtraArgs:
    """Records the cosine between gradient and weights; put it first in a chain.

    ```
    <g, u> / |g|        (0 where g or x is zero)
    ```

    The gradient of a radially invariant group is orthogonal to it. So a cosine larger than rounding
    error means that the groups are wrong, or that something else was added to the gradient.
    Updates are not changed. The state keeps its structure from `init` on. Read it with
    `optax.tree.get(state, "gradient_cosine")`.

    Args:
      groups: See [`spherical_optax.groups`][].

    Returns:
      A transformation with state `RecordGradientState`; `update` needs params.

    Raises:
      TypeError, ValueError: At `init`, if `groups` does not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import spherical_optax as so
      >>> tx = optax.chain(so.record_gradient(so.per_layer()), optax.sgd(1.0))
      >>> params = jnp.array([1., 0.])
      >>> _, state = tx.update(jnp.array([3., 4.]), tx.init(params), params)
      >>> print(optax.tree.get(state, "gradient_cosine"))
      0.6

    References:
      Roburin et al., Neurocomputing 2022.
    """

    def measure(g: Any, x: Any, joint: Joint) -> jax.Array:
        g = {i: wide(g[i]) for i in joint}
        cosine = safe_divide(geometry.inner(g, x, joint), geometry.norm(g, joint))
        return safe_divide(cosine, geometry.norm(x, joint))

    return _recorder("record_gradient", groups, measure, (), RecordGradientState)


def sphere_metrics(
    params_before: Any, params_after: Any, groups: Groups
) -> dict[str, SphereMetrics]:
    """Measures how the groups moved between two snapshots of the parameters.

    ```
    |x|    |x'|    angle(x, x')    <x' - x, u>    |x' - x - <x' - x, u> u|
    ```

    Args:
      params_before: The parameters x: nested dictionaries, an NNX state, or any other pytree.
      params_after: The parameters x', with the same structure and shapes.
      groups: See [`spherical_optax.groups`][].

    Returns:
      A dictionary from the path of each leaf with a group, such as `conv1/kernel`, to its
      `SphereMetrics`: arrays of shape `group.shape(x.shape)` in float32, or in float64 for float64
      parameters. Each leaf of a joint group gets the values of the whole group.

    Raises:
      TypeError, ValueError: If `groups` does not fit the parameters, or the snapshots differ in
        structure or shapes.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spherical_optax as so
      >>> before = {"fc": {"kernel": jnp.array([[1.], [0.]])}}
      >>> after = {"fc": {"kernel": jnp.array([[1.], [1.]])}}
      >>> groups = so.groups_by_path({"kernel": so.per_filter()})
      >>> so.sphere_metrics(before, after, groups)["fc/kernel"].step_angle
      Array([0.7853982], dtype=float32)

    References:
      Roburin et al., Neurocomputing 2022.
    """
    leaves, others = _trees.visible_leaves(params_before), _trees.visible_leaves(params_after)
    if [leaf.keys for leaf in leaves] != [leaf.keys for leaf in others]:
        raise ValueError(
            f"sphere_metrics: expected snapshots of the same parameters, found "
            f"{[leaf.path for leaf in leaves]} before and {[leaf.path for leaf in others]} after."
        )
    x, y = [leaf.value for leaf in leaves], [leaf.value for leaf in others]
    found: dict[int, SphereMetrics] = {}
    for joint in joints_of(groups, params_before):
        for i in joint:
            if np.shape(x[i]) != np.shape(y[i]):
                raise ValueError(
                    f"sphere_metrics: {leaves[i].path}: expected the same shape in both "
                    f"snapshots, found {np.shape(x[i])} before and {np.shape(y[i])} after."
                )
        step = {i: wide(y[i]) - wide(x[i]) for i in joint}
        metrics = _measure(step, pick(joint, x), joint)
        for i, group in joint.items():
            shape = group.shape(x[i].shape)
            found[i] = SphereMetrics(*(value.reshape(shape) for value in metrics))
    return {leaves[i].path: found[i] for i in sorted(found)}


def _measure(step: Any, x: Any, joint: Joint) -> SphereMetrics:
    """The metrics of one joint for a step from x, one value per group."""
    r = geometry.norm(x, joint)
    radial = safe_divide(geometry.inner(step, x, joint), r)
    tangential = geometry.norm(geometry.project(step, x, joint), joint)
    after = jnp.hypot(r + radial, tangential)
    degenerate = (r == 0) | (after == 0)
    angle = jnp.arctan2(tangential, jnp.where(degenerate, 1, r + radial))
    return SphereMetrics(r, after, jnp.where(degenerate, 0, angle), radial, tangential)


def _recorder(
    who: str,
    groups: Groups,
    measure: Callable[[Any, Any, Joint], jax.Array],
    metrics: tuple[int, ...],
    state_type: type[Any],
) -> optax.GradientTransformationExtraArgs:
    """A transformation that stores the results of `measure`: values per group, or rows of these."""

    def init(params: optax.Params) -> Any:
        layout = Layout.at_init(who, groups, params)
        return state_type(blank_records(layout, params, metrics))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del extra_args
        check_type(who, state, state_type)
        layout = Layout.read(who, groups, params, updates)
        x, v = layout.params, layout.updates
        values: dict[int, jax.Array] = {}
        for joint in layout.joints:
            # A missing update is a step of zero.
            there = {i: jnp.zeros_like(x[i]) if v[i] is None else v[i] for i in joint}
            values |= as_records(measure(there, pick(joint, x), joint), joint, x, metrics)
        recorded = state_type(nested(values, params))
        check_records(who, state, recorded)
        return updates, recorded

    return optax.GradientTransformationExtraArgs(init, update)


def blank_record(x: jax.Array, group: RadialGroup, metrics: tuple[int, ...] = ()) -> jax.Array:
    """Zeros for the record of a leaf: values per group, or rows of these."""
    shape = (*metrics, *group.shape(x.shape))
    return zeros_as(lambda x: jnp.broadcast_to(geometry.norm(x, group), shape), x)


def blank_records(layout: Layout, params: Any, metrics: tuple[int, ...] = ()) -> Any:
    """The records before the first update."""
    blank = {
        i: blank_record(layout.params[i], group, metrics)
        for joint in layout.joints
        for i, group in joint.items()
    }
    return nested(blank, params)


def as_records(
    values: jax.Array, joint: Joint, x: list[Any], metrics: tuple[int, ...] = ()
) -> dict[int, jax.Array]:
    """The values of a joint in the form in which each of its leaves stores them."""
    like = {i: blank_record(x[i], group, metrics) for i, group in joint.items()}
    return per_leaf(values, joint, like)


def check_records(who: str, before: Any, after: Any) -> None:
    """Raises a `ValueError` if the state was made for other parameters or groups."""
    old, new = (
        {leaf.path: np.shape(leaf.value) for leaf in _trees.leaves_with_paths(tree)}
        for tree in (before, after)
    )
    if old != new:
        raise ValueError(
            f"{who}: expected state of shapes {new}, found {old}. The state was made for other "
            "parameters or with other groups. Call init again."
        )


def nested(values: dict[int, jax.Array], tree: Any) -> Any:
    """Values by leaf number as nested dictionaries; for a tree that is one array, just its value.

    Leaves without a value have no entry, because each entry costs a few microseconds per step.
    """
    leaves = _trees.visible_leaves(tree)
    nested: Any = {} if leaves else jnp.zeros(())  # optax.tree_map_params expects a leaf here
    for i in sorted(values):
        *outer, last = leaves[i].keys or (None,)
        if last is None:
            return values[i]
        inner = nested
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = values[i]
    return nested
