"""Transport: carries moments along as their groups move."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax import _trees, geometry
from spherical_optax._checks import check_transformation
from spherical_optax._engine.foreign import check_state, foreign
from spherical_optax._engine.layout import Layout, aligned, check_type, per_group
from spherical_optax._engine.moments import (
    FIRST_MOMENTS,
    SECOND_MOMENTS,
    Names,
    check_moments,
    check_names,
    fields_of,
    find_moments,
)
from spherical_optax._engine.state import per_leaf, pick, state_like, zero, zeros_per_group
from spherical_optax._numerics import wide
from spherical_optax.groups import Groups
from spherical_optax.transforms._adamg import ScaleByAdamgState
from spherical_optax.transforms._adamsrt import ScaleByAdamsrtState, TransportedTraceState


class TransportMomentsState(NamedTuple):
    """State of `transport_moments`.

    Attributes:
      radius: |x| of each group at the previous update; 0 before the first.
      inner_state: The state of the wrapped transformation. Its first moments have no radial part.
    """

    radius: optax.Params
    inner_state: optax.OptState


def transport_moments(
    inner: optax.GradientTransformation,
    groups: Groups,
    *,
    first_moments: tuple[str, ...] = FIRST_MOMENTS,
    second_moments: tuple[str, ...] = SECOND_MOMENTS,
    rescale: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Carries the moments of any transformation along as its groups move.

    Let r be the radius at the previous update, x the current weights, r' = |x| and u' = x / r'.
    Before the inner update, first moments m and second moments v are replaced:

    ```
    t = m - <m, u'> u'        m <- (r / r') |m| t / |t|        v <- (r / r')^2 v
    ```

    After the inner update, the radial part of the first moments is removed.

    If the step lies in the plane of x and m, as in AdamS and momentum SGD, this is the parallel
    transport along the arc from the old direction to the new one. Otherwise it preserves lengths
    and agrees with parallel transport up to second order in the angle. Moments are rescaled
    because gradients are proportional to 1 / r. The transport depends only on the current
    parameters, so it is correct whatever moved them: schedules, decay, skipped steps, a restored
    checkpoint. Moments of groups with one entry, which have no tangent space, and of groups with
    norm zero are unchanged.

    A second moment must be an average of squared gradients, which is proportional to 1 / r^2. The
    infinity norm that `optax.scale_by_adamax` stores as `nu` is not: use `second_moments=()` there.
    Moments with other field names are carried if you name them, such as
    `second_moments=("nu", "nu_max")` for `optax.scale_by_amsgrad`.

    Args:
      inner: The transformation whose moments are carried, such as `optax.trace(0.9)`. It may be
        inside a chain or `optax.inject_hyperparams`.
      groups: See [`spherical_optax.groups`][].
      first_moments: Fields of the inner state that hold first moments.
      second_moments: Fields that hold second moments, per entry or per group.
      rescale: Whether to multiply by the ratio of radii.

    Returns:
      A transformation with state `TransportMomentsState`; `update` needs params.

    Raises:
      TypeError: If `inner` is not a transformation, or the names are not tuples of strings.
      ValueError: At `init`, if the inner state has none of the default fields, or lacks a field
        that you named; if a moment has another shape than its parameter, or `inner` already carries
        it; or if `groups` does not fit.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import spherical_optax as so
      >>> tx = so.transport_moments(optax.trace(decay=0.9), groups=so.per_layer())
      >>> params = jnp.array([1., 0.])
      >>> _, state = tx.update(jnp.array([0., 1.]), tx.init(params), params)
      >>> params = jnp.array([0., 2.])  # rotated by 90 degrees, and twice as long
      >>> updates, state = tx.update(jnp.array([1., 0.]), state, params)
      >>> updates
      Array([1., 0.], dtype=float32)

    References:
      Roburin et al., Neurocomputing 2022 (the RT transformation of AdamSRT).
    """
    check_transformation("transport_moments", inner)
    names = Names(
        check_names("transport_moments", "first_moments", first_moments),
        check_names("transport_moments", "second_moments", second_moments),
    )
    wrapped = foreign("transport_moments", inner)

    def init(params: optax.Params) -> TransportMomentsState:
        inner_state = wrapped.init(params)
        layout = Layout.at_init("transport_moments", groups, params, skips_single_entries=True)
        check_moments("transport_moments", inner_state, params, layout.joints, names)
        _check_not_carried(inner_state, params, names)
        radius = state_like(params, zeros_per_group(layout), zero)
        return TransportMomentsState(radius=radius, inner_state=inner_state)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        check_type("transport_moments", state, TransportMomentsState)
        radii = (state.radius, per_group)
        layout = Layout.read(
            "transport_moments", groups, params, updates, radii, skips_single_entries=True
        )
        x, [radius] = layout.params, layout.fields
        check_state("transport_moments", inner, state.inner_state, params)
        first, second = find_moments(state.inner_state, params, names)

        kept, inner_treedef = _trees.flatten(state.inner_state)
        for joint in layout.joints:
            old, new = radius[next(iter(joint))], geometry.norm(pick(joint, x), joint)
            moved = (old > 0) & (new > 0)
            ratio = jnp.where(moved, old / jnp.where(moved, new, 1), 1)
            if not rescale:
                ratio = jnp.ones_like(ratio)
            for field, part in fields_of(joint, first, kept):
                m = {i: wide(kept[field[i]]) for i in part}
                carried = geometry.scale(ratio, geometry.transport(m, pick(part, x), part), part)
                for i, group in part.items():
                    here = geometry.spread(moved, x[i], group)
                    moment = jnp.where(here, carried[i], m[i])
                    kept[field[i]] = moment.astype(kept[field[i]].dtype)
            for field, part in fields_of(joint, second, kept) if rescale else ():
                for i, group in part.items():
                    v = kept[field[i]]
                    factor = (ratio**2).reshape(group.shape(x[i].shape))
                    if v.shape == x[i].shape:
                        factor = geometry.spread(factor, x[i], group)
                    kept[field[i]] = (v * factor).astype(v.dtype)
            for i, value in per_leaf(new, joint, radius).items():
                radius[i] = value

        updates, inner_state = wrapped.update(
            updates, inner_treedef.unflatten(kept), params, **extra_args
        )

        kept, inner_treedef = _trees.flatten(inner_state)
        for joint in layout.joints:
            for field, part in fields_of(joint, first, kept):
                m = {i: kept[field[i]] for i in part}
                for i, tangent in geometry.project(m, pick(part, x), part).items():
                    kept[field[i]] = tangent
        updates, radii = layout.trees(aligned("transport_moments", params, updates)[0], radius)
        return updates, TransportMomentsState(radii, inner_treedef.unflatten(kept))

    return optax.GradientTransformationExtraArgs(init, update)


def _check_not_carried(inner_state: Any, params: Any, names: Names) -> None:
    """Raises a `ValueError` if a transformation inside the inner one already carries a moment."""
    of_ours = ScaleByAdamgState, ScaleByAdamsrtState, TransportedTraceState
    carrying = TransportMomentsState, *of_ours
    kept = _trees.visible_leaves(inner_state)
    first, second = find_moments(inner_state, params, names)
    moments = [kept[place] for field in first + second for place in field.values()]
    for path, node in jax.tree_util.tree_leaves_with_path(
        inner_state, is_leaf=lambda node: isinstance(node, carrying)
    ):
        if not isinstance(node, carrying):
            continue
        keys = tuple(_trees.key_name(key) for key in path)
        if carried := [leaf.path for leaf in moments if leaf.keys[: len(keys)] == keys]:
            raise ValueError(
                f"transport_moments: expected moments that nothing carries yet, found {carried} in "
                f"{type(node).__name__}. They would be transported and rescaled twice. Use the "
                "inner transformation without transport_moments."
            )
