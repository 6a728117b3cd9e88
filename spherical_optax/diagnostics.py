"""What happens on the sphere during training: recorded in the state, or computed.

`record_sphere` measures each step and `record_gradient` the gradient, as members of a
chain; `sphere_metrics` measures between two snapshots, without touching the optimizer;
`effective_learning_rate` predicts how far a step turns a group.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spherical_optax import _trees, geometry
from spherical_optax.groups import Groups, RadialGroup, group_size, radial_units
from spherical_optax.transforms._pair import check_type, pair, resolve
from spherical_optax.transforms._units import Unit, per_leaf, pick, zeros_as


class SphereMetrics(NamedTuple):
    """How a step moved radially invariant groups.

    Attributes:
      radius_before: |x|.
      radius_after: |x'|.
      step_angle: The angle between x and x', in radians; 0 where one of them is zero.
      step_radial: <x' - x, u>, positive outwards; 0 where |x| = 0.
      step_tangential: The length of the rest, |x' - x - <x' - x, u> u|.
    """

    radius_before: Any
    radius_after: Any
    step_angle: Any
    step_radial: Any
    step_tangential: Any


class RecordSphereState(NamedTuple):
    """State of `record_sphere`.

    Attributes:
      sphere: The last step, zeros before the first: nested dictionaries with the
        parameters' keys, of the leaves that have a group only. Each array has the rows of
        `SphereMetrics`, with one value per group: shape (5, *group.shape(x.shape)).
        `optax.tree_map_params` gives it to `transform_non_params` as one node.
    """

    sphere: Any


class RecordGradientState(NamedTuple):
    """State of `record_gradient`.

    Attributes:
      gradient_cosine: <g, u> / |g| at the last update, 0 where the gradient or the group is
        zero; kept as `RecordSphereState.sphere` is, without the first axis.
    """

    gradient_cosine: Any


def record_sphere(groups: Groups) -> optax.GradientTransformationExtraArgs:
    """Records how each step moves the groups; put it last in a chain.

    ```
    |x|    |x + v|    angle(x, x + v)    <v, u>    |v - <v, u> u|        (v: the update)
    ```

    Updates pass unchanged. The state keeps its structure from `init` on, and is read with
    `optax.tree.get(state, "sphere")`. The step is measured before the parameters' dtype
    rounds it; `sphere_metrics` measures what was kept.

    Args:
      groups: See the module `spherical_optax.groups`. The leaves of a joint group all hold
        the values of the whole group.

    Returns:
      A transformation with state `RecordSphereState`, float32 or, for float64 parameters,
      float64; `update` needs params.

    Raises:
      TypeError, ValueError: At `init`, if `groups` does not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import spherical_optax as so
      >>> groups = so.groups_by_path({"kernel": so.per_filter()})
      >>> tx = optax.chain(optax.sgd(1.0), so.record_sphere(groups))
      >>> params = {"kernel": jnp.array([[1., 2.], [0., 0.]])}
      >>> _, state = tx.update({"kernel": jnp.array([[0., 0.], [1., 2.]])}, tx.init(params), params)
      >>> sphere = so.SphereMetrics(*optax.tree.get(state, "sphere")["kernel"])
      >>> print(sphere.step_angle, sphere.radius_after.max())
      [0.7853982 0.7853982] 2.828427

    References:
      Roburin et al., Spherical perspective on learning with normalization layers,
      Neurocomputing 2022.
    """

    def measure(v: Any, x: Any, unit: Unit) -> jax.Array:
        return jnp.stack(_measure({i: geometry.wide(v[i]) for i in unit}, x, unit))

    return _recorder(
        "record_sphere", groups, measure, (len(SphereMetrics._fields),), RecordSphereState
    )


def record_gradient(groups: Groups) -> optax.GradientTransformationExtraArgs:
    """Records the cosine of gradient and weight; put it first in a chain.

    ```
    <g, u> / |g|        (0 where g or x is zero)
    ```

    The gradient of a radially invariant group is orthogonal to it: a cosine of other than
    rounding's size says that the groups are wrong, or that something else was added to the
    gradient. Updates pass unchanged. The state keeps its structure from `init` on, and is
    read with `optax.tree.get(state, "gradient_cosine")`.

    Args:
      groups: See the module `spherical_optax.groups`.

    Returns:
      A transformation with state `RecordGradientState`; `update` needs params.

    Raises:
      TypeError, ValueError: At `init`, if `groups` does not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import spherical_optax as so
      >>> tx = optax.chain(so.record_gradient(so.per_layer()), optax.sgd(1.0))
      >>> params = jnp.array([1., 0.])
      >>> _, state = tx.update(jnp.array([3., 4.]), tx.init(params), params)
      >>> print(optax.tree.get(state, "gradient_cosine"))
      0.6

    References:
      Roburin et al., Spherical perspective on learning with normalization layers,
      Neurocomputing 2022.
    """

    def measure(g: Any, x: Any, unit: Unit) -> jax.Array:
        g = {i: geometry.wide(g[i]) for i in unit}
        cosine = geometry.safe_divide(geometry.inner(g, x, unit), geometry.norm(g, unit))
        return geometry.safe_divide(cosine, geometry.norm(x, unit))

    return _recorder("record_gradient", groups, measure, (), RecordGradientState)


def sphere_metrics(
    params_before: Any, params_after: Any, groups: Groups
) -> dict[str, SphereMetrics]:
    """How the groups moved between two snapshots of the parameters.

    ```
    |x|    |x'|    angle(x, x')    <x' - x, u>    |x' - x - <x' - x, u> u|
    ```

    Args:
      params_before: The parameters x: nested dictionaries, an NNX state, any pytree.
      params_after: The parameters x', of the same structure and shapes.
      groups: See the module `spherical_optax.groups`.

    Returns:
      From the path of each leaf with a group, as in `conv1/kernel`, to its
      `SphereMetrics`, arrays of shape `group.shape(x.shape)`, float32 or, for float64
      parameters, float64. The leaves of a joint group all get the whole group's values.

    Raises:
      TypeError: If `groups` does not fit the parameters.
      ValueError: If `groups` does not fit, or the snapshots do not fit each other.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spherical_optax as so
      >>> before = {"fc": {"kernel": jnp.array([[1.], [0.]])}}
      >>> after = {"fc": {"kernel": jnp.array([[1.], [1.]])}}
      >>> groups = so.groups_by_path({"kernel": so.per_filter()})
      >>> so.sphere_metrics(before, after, groups)["fc/kernel"].step_angle
      Array([0.7853982], dtype=float32)

    References:
      Roburin et al., Spherical perspective on learning with normalization layers,
      Neurocomputing 2022.
    """
    leaves, others = _trees.visible_leaves(params_before), _trees.visible_leaves(params_after)
    if [leaf.keys for leaf in leaves] != [leaf.keys for leaf in others]:
        raise ValueError(
            f"sphere_metrics: expected snapshots of the same parameters, found "
            f"{[leaf.path for leaf in leaves]} before and {[leaf.path for leaf in others]} after."
        )
    x, y = [leaf.value for leaf in leaves], [leaf.value for leaf in others]
    found: dict[int, SphereMetrics] = {}
    for unit in radial_units(groups, params_before):
        for i in unit:
            if np.shape(x[i]) != np.shape(y[i]):
                raise ValueError(
                    f"sphere_metrics: {leaves[i].path}: expected the same shape in both "
                    f"snapshots, found {np.shape(x[i])} before and {np.shape(y[i])} after."
                )
        step = {i: geometry.wide(y[i]) - geometry.wide(x[i]) for i in unit}
        metrics = _measure(step, pick(unit, x), unit)
        for i, group in unit.items():
            shape = group.shape(x[i].shape)
            found[i] = SphereMetrics(*(value.reshape(shape) for value in metrics))
    return {leaves[i].path: found[i] for i in sorted(found)}


class EffectiveStep(NamedTuple):
    """What a step does on the sphere, as `effective_learning_rate` predicts it.

    Attributes:
      learning_rate: The effective learning rate, one value per group.
      direction: c without its radial part, arrays like x: u moves along its negative.
      angle: By how much, in radians, one value per group.
    """

    learning_rate: jax.Array
    direction: Any
    angle: jax.Array


def effective_learning_rate(
    x: Any, a: Any, b: Any, learning_rate: jax.typing.ArrayLike, group: Any
) -> EffectiveStep:
    """The step on the sphere that x' = x - learning_rate a / b amounts to.

    ```
    s = |b| / sqrt(d)        c = r s a / b        A = learning_rate / (r^2 s)
    lr_eff = A / (1 - A <c, u>)
    u' = cos(t) u - sin(t) c_t / |c_t|,    t = arctan(lr_eff |c_t|),    c_t = c - <c, u> u
    ```

    with d the entries per group. Exact, for any a and b. With g the gradient, L2 included
    (g = grad L(x) + w x), the optimizers are:

    ```
    SGD            a = g                                    b = 1
    momentum SGD   a = m                                    b = 1
    Adam           a = mhat                                 b = sqrt(vhat) + eps, by entry
    AdamS          a = mhat                                 b = (sqrt(vhat) + eps) / sqrt(d)
    ```

    with the moments of after the update. SGD-MRT is as momentum SGD and AdamSRT as AdamS;
    their states hold the moments of r g, and only the tangent part of the first: m is
    trace / r + (1 - dampening) <g, u> u, or mu / r + (1 - b1) <g, u> u, and v is nu / r^2.
    Decoupled decay w is a step without it at learning_rate / (1 - learning_rate w). For SGD
    with L2 factor w

    ```
    lr_eff = learning_rate / (r^2 (1 - learning_rate w))
    ```

    Args:
      x: The parameters, an array, or a pytree of arrays for joint groups.
      a: The numerator of the step, like x.
      b: The denominator, positive: a number, one value per group, or like x.
      learning_rate: A number, or one value per group.
      group: A `RadialGroup`, or a pytree of them.

    Returns:
      An `EffectiveStep`, float32 or, for float64 arrays, float64. Beyond 90 degrees (where
      A <c, u> > 1) the effective learning rate is negative, and the angle still right.
      Where |x| = 0 there is no direction, and all is 0.

    Raises:
      TypeError: If group is no `RadialGroup`.
      ValueError: If the shapes do not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spherical_optax as so
      >>> x, gradient = jnp.array([2., 0.]), jnp.array([0., 1.])
      >>> step = so.effective_learning_rate(x, gradient, 1.0, 0.4, so.per_layer())
      >>> print(step.learning_rate, step.direction, step.angle)
      0.1 [0. 2.] 0.19739556

    References:
      Roburin et al., Spherical perspective on learning with normalization layers,
      Neurocomputing 2022 (the theorem on the image of a step on the unit sphere).
    """
    r = geometry.norm(x, group)
    if _trees.flatten(b)[1] != _trees.flatten(x)[1]:  # one for all leaves
        b = jax.tree.map(lambda _: b, x)
    b = jax.tree.map(_per_entry, group, x, b)
    size = group_size(dict(enumerate(jax.tree.leaves(group))), jax.tree.leaves(x))
    s = geometry.norm(b, group) / math.sqrt(size)
    quotient = jax.tree.map(lambda p, q: geometry.wide(p) / q, a, b)
    c = geometry.scale(r * s, quotient, group)
    A = geometry.safe_divide(jnp.asarray(learning_rate, r.dtype), r * r * s)
    forward = 1 - A * geometry.safe_divide(geometry.inner(c, x, group), r)
    direction = geometry.project(c, x, group)
    return EffectiveStep(
        learning_rate=A / forward,
        direction=direction,
        angle=jnp.arctan2(A * geometry.norm(direction, group), forward),
    )


def _per_entry(group: RadialGroup, x: jax.Array, b: Any) -> jax.Array:
    """The denominator of each entry of x."""
    b = jnp.asarray(b, geometry.accumulator(x.dtype))
    per_group = group.shape(x.shape)
    if b.shape not in (x.shape, per_group, ()):
        raise ValueError(
            f"effective_learning_rate: expected b as a number, of shape {x.shape} as x or of "
            f"shape {per_group} as there are groups, found shape {b.shape}."
        )
    if b.shape == per_group != x.shape:
        b = geometry.spread(b, x, group)
    return jnp.broadcast_to(b, x.shape)


def _measure(step: Any, x: Any, unit: Unit) -> SphereMetrics:
    """The metrics of one unit that makes a step from x, one value per group."""
    r = geometry.norm(x, unit)
    radial = geometry.safe_divide(geometry.inner(step, x, unit), r)
    tangential = geometry.norm(geometry.project(step, x, unit), unit)
    after = jnp.hypot(r + radial, tangential)
    degenerate = (r == 0) | (after == 0)
    angle = jnp.arctan2(tangential, jnp.where(degenerate, 1, r + radial))
    return SphereMetrics(
        radius_before=r,
        radius_after=after,
        step_angle=jnp.where(degenerate, 0, angle),
        step_radial=radial,
        step_tangential=tangential,
    )


def _recorder(
    who: str,
    groups: Groups,
    measure: Callable[[Any, Any, Unit], jax.Array],
    metrics: tuple[int, ...],
    state_type: type[Any],
) -> optax.GradientTransformationExtraArgs:
    """A transformation that keeps what `measure` finds: per group, or rows of such values."""

    def blank(x: jax.Array, group: RadialGroup) -> jax.Array:
        shape = (*metrics, *group.shape(x.shape))
        return zeros_as(lambda x: jnp.broadcast_to(geometry.norm(x, group), shape), x)

    def init(params: optax.Params) -> Any:
        units, x = resolve(who, groups, params)
        return state_type(
            _nested({i: blank(x[i], group) for unit in units for i, group in unit.items()}, params)
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        check_type(who, state, state_type)
        units, x, (v,), _ = pair(who, groups, params, updates)
        values: dict[int, jax.Array] = {}
        for unit in units:
            # A missing update is a step of zero.
            there = {i: jnp.zeros_like(x[i]) if v[i] is None else v[i] for i in unit}
            found = measure(there, pick(unit, x), unit)
            values |= per_leaf(found, unit, {i: blank(x[i], group) for i, group in unit.items()})
        recorded = state_type(_nested(values, params))
        old, new = (
            {leaf.path: np.shape(leaf.value) for leaf in _trees.leaves_with_paths(tree)}
            for tree in (state, recorded)
        )
        if old != new:
            raise ValueError(
                f"{who}: expected state of shapes {new}, found {old}: it was made for other "
                "parameters or with other groups; call init again."
            )
        return updates, recorded

    return optax.GradientTransformationExtraArgs(init, update)


def _nested(values: dict[int, jax.Array], tree: Any) -> Any:
    """Values by leaf number as nested dictionaries; an array that is no dictionary's as itself.

    Other leaves have no entry: each costs a few microseconds per step.
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
