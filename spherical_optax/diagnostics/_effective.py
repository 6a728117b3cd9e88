"""The effective learning rate, predicted and recorded: how far a step rotates a group."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax import _trees, geometry
from spherical_optax._checks import check_number, check_transformation
from spherical_optax._checks.trial import Trial, trials
from spherical_optax._engine.foreign import foreign
from spherical_optax._engine.layout import Layout, check_type, per_entry
from spherical_optax._engine.state import pick
from spherical_optax._numerics import accumulator, safe_divide, safe_sqrt, wide
from spherical_optax.diagnostics._recorders import as_records, blank_records, check_records, nested
from spherical_optax.groups import Groups, Joint, RadialGroup, group_size
from spherical_optax.transforms import (
    ScaleByAdamgState,
    ScaleByAdamsrtState,
    ScaleByAdamsState,
    TransportedTraceState,
)

WHO = "record_effective_learning_rate"


class EffectiveStep(NamedTuple):
    """The effect of a step on the sphere, as predicted by `effective_learning_rate`.

    Attributes:
      learning_rate: The effective learning rate, one value per group.
      direction: c_t, the tangent part of c, in arrays like x. The direction u moves along -c_t.
      angle: The angle per step in radians, one value per group.
    """

    learning_rate: jax.Array
    direction: Any
    angle: jax.Array


def effective_learning_rate(
    x: Any, a: Any, b: Any, learning_rate: jax.typing.ArrayLike, group: Any
) -> EffectiveStep:
    """Predicts the step on the unit sphere that corresponds to x' = x - learning_rate a / b.

    ```
    s = |b| / sqrt(d)        c = r s a / b        A = learning_rate / (r^2 s)
    lr_eff = A / (1 - A <c, u>)
    u' = cos(t) u - sin(t) c_t / |c_t|,    t = arctan(lr_eff |c_t|),    c_t = c - <c, u> u
    ```

    Here r = |x| is the radius, u = x / r the direction, and d the number of entries per group. The
    result is exact for any a and b. Let g be the gradient, including L2 regularization
    (g = grad L(x) + w x). Then the optimizers have:

    ```
    SGD            a = g                                    b = 1
    momentum SGD   a = m                                    b = 1
    Adam           a = mhat                                 b = sqrt(vhat) + eps, by entry
    AdamS          a = mhat                                 b = (sqrt(vhat) + eps) / sqrt(d)
    ```

    The moments are those after the update. SGD-MRT is like momentum SGD, and AdamSRT is like AdamS.
    Their states hold the moments of r g, and only the tangent part of the first moment. So
    m = trace / r + (1 - dampening) <g, u> u for SGD-MRT. For AdamSRT,
    m = mu / r + (1 - b1) <g, u> u and v = nu / r^2.

    A step with decoupled weight decay w is a step without it at
    learning_rate / (1 - learning_rate w). SGD with L2 factor w has
    lr_eff = learning_rate / (r^2 (1 - learning_rate w)).

    Args:
      x: The parameters: an array, or a pytree of arrays for joint groups.
      a: The numerator of the step, like x.
      b: The denominator, positive: a number, one value per group, or like x.
      learning_rate: A number, or one value per group.
      group: A `RadialGroup`, or a pytree of them.

    Returns:
      An `EffectiveStep` in float32, or in float64 for float64 arrays. For a step beyond 90 degrees
      (A <c, u> > 1), the effective learning rate is negative, and the angle is still correct. Where
      |x| = 0, there is no direction, and all values are 0.

    Raises:
      TypeError: If `group` is not a `RadialGroup`.
      ValueError: If the shapes do not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spherical_optax as so
      >>> x, gradient = jnp.array([2., 0.]), jnp.array([0., 1.])
      >>> step = so.effective_learning_rate(x, gradient, 1.0, 0.4, so.per_layer())
      >>> print(step.learning_rate, step.direction, step.angle)
      0.1 [0. 2.] 0.19739556

    References:
      Roburin et al., Neurocomputing 2022 (the theorem on the image of a step on the unit sphere).
    """
    r = geometry.norm(x, group)
    if _trees.flatten(b)[1] != _trees.flatten(x)[1]:  # one b for all leaves
        b = jax.tree.map(lambda _: b, x)
    b = jax.tree.map(_per_entry, group, x, b)
    size = group_size(dict(enumerate(jax.tree.leaves(group))), jax.tree.leaves(x))
    s = geometry.norm(b, group) / math.sqrt(size)
    quotient = jax.tree.map(lambda p, q: wide(p) / q, a, b)
    c = geometry.scale(r * s, quotient, group)
    A = safe_divide(jnp.asarray(learning_rate, r.dtype), r * r * s)
    forward = 1 - A * safe_divide(geometry.inner(c, x, group), r)
    direction = geometry.project(c, x, group)
    return EffectiveStep(
        learning_rate=A / forward,
        direction=direction,
        angle=jnp.arctan2(A * geometry.norm(direction, group), forward),
    )


def _per_entry(group: RadialGroup, x: jax.Array, b: Any) -> jax.Array:
    """The denominator of each entry of x."""
    b = jnp.asarray(b, accumulator(x.dtype))
    per_group = group.shape(x.shape)
    if b.shape not in (x.shape, per_group, ()):
        raise ValueError(
            f"effective_learning_rate: expected b as a number, of the shape {x.shape} of x, or of "
            f"shape {per_group} with one value per group, found shape {b.shape}."
        )
    if b.shape == per_group != x.shape:
        b = geometry.spread(b, x, group)
    return jnp.broadcast_to(b, x.shape)


class RecordEffectiveLearningRateState(NamedTuple):
    """State of `record_effective_learning_rate`.

    Attributes:
      effective_learning_rate: The values of the last step, 0 before the first. Nested dictionaries
        with the parameters' keys, only for leaves that have a group, with one value per group.
      inner_state: The state of the optimizer.
    """

    effective_learning_rate: Any
    inner_state: optax.OptState


def record_effective_learning_rate(
    tx: optax.GradientTransformation,
    groups: Groups,
    *,
    b1: jax.typing.ArrayLike | None = None,
    b2: jax.typing.ArrayLike | None = None,
    eps: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Records the effective learning rate of each step; wrap it around the optimizer.

    ```
    lr_eff = tan(t) / |c_t|        t: the angle from x to x + v, v the update
    ```

    Here c_t is that of `effective_learning_rate`, computed from the moments in the optimizer's
    state. The angle includes the effects of schedules, weight decay, normalized steps and
    retractions, that is, all changes of the learning rate, the length of the step and the radius.
    The recorder wraps the optimizer, instead of following the direction in a chain, because it
    needs both the moments and the whole update.

    Args:
      tx: The optimizer: SGD with or without momentum, Adam, AdamW, AdamS, AdamSRT, SGD-MRT, AdamG,
        `hyperball` and `retract` around their directions, and chains with these. Muon and `muonh`
        are not supported, because their direction is not a quotient of two moments. For them,
        `record_sphere` records the angle of each step.
      groups: See [`spherical_optax.groups`][].
      b1: The decay rate of the optimizer's first moment `mu`, if it has one.
      b2: The decay rate of its second moment `nu`, if `nu` has one value per entry.
      eps: The number that it adds to the square root of `nu`.

    Returns:
      A transformation with state `RecordEffectiveLearningRateState`, which contains the state of
      the optimizer. The updates are those of the optimizer. `update` needs params.

    Raises:
      TypeError: If `tx` is not a gradient transformation.
      ValueError: If a number is out of range. At `init`, if `groups` does not fit the parameters,
        the moments are not those of the optimizers above, a number is missing, or groups do not
        step along the quotient of their moments, as with Nesterov momentum.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import spherical_optax as so
      >>> tx = so.record_effective_learning_rate(optax.sgd(0.4), so.per_layer())
      >>> params = jnp.array([2., 0.])
      >>> _, state = tx.update(jnp.array([0., 1.]), tx.init(params), params)
      >>> print(state.effective_learning_rate)  # 0.4 / 2^2
      0.1

    References:
      Roburin et al., Neurocomputing 2022 (the theorem on the image of a step on the unit sphere).
    """
    check_transformation(WHO, tx, "tx")
    for name, value in (("b1", b1), ("b2", b2)):
        if value is not None:
            check_number(WHO, name, value, below=1)
    if eps is not None:
        check_number(WHO, "eps", eps)
    wrapped = foreign(WHO, tx)

    def rates(g: Any, v: Any, x: Any, state: Any, params: Any, joint: Joint) -> tuple[Any, Any]:
        """The effective learning rate, and the cosine between the step and the one expected."""
        x, step = pick(joint, x), {i: wide(v[i]) for i in joint}
        r, tangent = geometry.norm(x, joint), geometry.project(step, x, joint)
        c = _numerator(g, x, state, params, joint, b1, b2, eps)
        c = geometry.project(c, x, joint)
        forward = r + safe_divide(geometry.inner(step, x, joint), r)
        length, norm = geometry.norm(tangent, joint), geometry.norm(c, joint)
        rate = safe_divide(safe_divide(length, norm), forward)
        cosine = -safe_divide(geometry.inner(tangent, c, joint), length * norm)
        return rate, cosine

    def check(run: list[Trial]) -> None:
        params, gradients, updates, state = run[-1]
        layout = Layout.read(WHO, groups, params, gradients, (updates, per_entry))
        g, x, [v] = layout.updates, layout.params, layout.fields
        for joint in (joint for joint in layout.joints if all(x[i] is not None for i in joint)):
            cosine = rates(g, v, x, state, params, joint)[1]
            off = (cosine != 0) & (jnp.abs(cosine) < 1 - 1e-2)
            if not isinstance(off, jax.core.Tracer) and off.any():  # only known values
                path = _trees.visible_leaves(params)[next(iter(joint))].path
                raise ValueError(
                    f"{WHO}: {path}: expected steps along the quotient of the moments that tx "
                    f"keeps, found a cosine of {float(cosine[off][0]):.2f} with it. Usual "
                    "causes: Nesterov momentum, or a wrong eps."
                )

    def init(params: optax.Params) -> RecordEffectiveLearningRateState:
        layout = Layout.at_init(WHO, groups, params)
        inner_state = wrapped.init(params)
        for joint in layout.joints:
            _moments(inner_state, params, joint, b1, b2, eps)
        try:
            run = next(trials(tx, params, layout.joints, 3, same=False))
        except Exception:  # tx needs arguments that only a program has, so it is not checked
            run = None
        if run is not None:
            with jax.ensure_compile_time_eval():  # values are known even if init is traced
                check(run)
        return RecordEffectiveLearningRateState(blank_records(layout, params), inner_state)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        check_type(WHO, state, RecordEffectiveLearningRateState)
        steps, inner_state = wrapped.update(updates, state.inner_state, params, **extra_args)
        layout = Layout.read(WHO, groups, params, updates, (steps, per_entry))
        g, x, [v] = layout.updates, layout.params, layout.fields
        values: dict[int, jax.Array] = {}
        for joint in layout.joints:
            if all(v[i] is not None for i in joint):
                rate, _ = rates(g, v, x, inner_state, params, joint)
            else:  # a missing update is a step of zero
                rate = jnp.zeros_like(geometry.norm(pick(joint, x), joint))
            values |= as_records(rate, joint, x)
        recorded = nested(values, params)
        check_records(WHO, state.effective_learning_rate, recorded)
        return steps, RecordEffectiveLearningRateState(recorded, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


FIRST = ("mu", "trace", "m1")  # fields that hold first moments

# States of transformations whose groups step along a known direction.
KNOWN = (
    optax.TraceState,
    optax.ScaleByAdamState,
    ScaleByAdamgState,
    ScaleByAdamsState,
    ScaleByAdamsrtState,
    TransportedTraceState,
)


def _moments(
    inner_state: Any, params: Any, joint: Joint, b1: Any, b2: Any, eps: Any
) -> tuple[Any, dict[int, Any], dict[int, Any]] | None:
    """The state that holds a joint's moments, and the moments by leaf number; `None` without one.

    Raises:
      ValueError: If there are several such states, if the state is of an unknown type, or if a
        number is missing.
    """
    leaves = _trees.visible_leaves(params)
    first = leaves[next(iter(joint))]
    holders = [
        node
        for node in jax.tree.leaves(inner_state, is_leaf=_holds_moments)
        if _holds_moments(node) and _field(node, first.keys) is not None
    ]
    if not holders:
        return None
    found = [type(node).__name__ for node in holders]
    if len(holders) > 1 or not isinstance(holders[0], KNOWN):
        raise ValueError(
            f"{WHO}: {first.path}: expected moments in one of "
            f"{[each.__name__ for each in KNOWN]}, found {found}. Record the angle of other "
            "optimizers with record_sphere."
        )
    first_moments = {i: _field(holders[0], leaves[i].keys) for i in joint}
    second_moments = {i: _field(holders[0], leaves[i].keys, ("nu",)) for i in joint}
    needed = [("b1", b1)] if hasattr(holders[0], "mu") else []
    if isinstance(holders[0], optax.ScaleByAdamState):
        needed += [("b2", b2), ("eps", eps)]
    missing = [name for name, value in needed if value is None]
    if missing:
        raise ValueError(
            f"{WHO}: {first.path}: expected {' and '.join(missing)} of the optimizer, found none: "
            f"{found[0]} does not store them. Pass {', '.join(f'{m}=...' for m in missing)}."
        )
    return holders[0], first_moments, second_moments


def _holds_moments(node: Any) -> bool:
    return hasattr(node, "_fields") and any(hasattr(node, name) for name in FIRST)


def _field(holder: Any, keys: tuple[str, ...], names: tuple[str, ...] = FIRST) -> Any:
    """The leaf at a parameter's path in one of these fields of a state, or `None`."""
    for name in names:
        for leaf in _trees.leaves_with_paths(getattr(holder, name, None)):
            if leaf.keys == keys and not leaf.hidden and leaf.value is not None:
                return leaf.value
    return None


def _numerator(
    g: Any, x: Any, state: Any, params: Any, joint: Joint, b1: Any, b2: Any, eps: Any
) -> dict[int, Any]:
    """The vector c of `effective_learning_rate`, correct up to its radial part."""
    r = geometry.norm(x, joint)
    moments = _moments(state, params, joint, b1, b2, eps)
    if moments is None:
        return geometry.scale(r, {i: wide(g[i]) for i in joint}, joint)
    holder, first, second = moments
    a = {i: wide(each) for i, each in first.items()}
    corrected = 1 - b1 ** holder.count.astype(r.dtype) if hasattr(holder, "mu") else 1.0
    if isinstance(holder, ScaleByAdamsrtState | TransportedTraceState):
        r = jnp.ones_like(r)  # their moments are those of r g
    if isinstance(holder, optax.ScaleByAdamState):
        correction = 1 - b2 ** holder.count.astype(r.dtype)
        b = {i: safe_sqrt(wide(v) / correction) + eps for i, v in second.items()}
        r = r * (geometry.norm(b, joint) / math.sqrt(group_size(joint, x)))
        a = {i: safe_divide(a[i], b[i]) for i in joint}
    return geometry.scale(r / corrected, a, joint)
