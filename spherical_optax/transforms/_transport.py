"""Transport: moments carried along as their groups move."""

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
      radius: |x| of each group at the last update, 0 before the first.
      inner_state: The wrapped transformation's state; the first moments in it have no radial part.
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

    Before the inner update, with r the radius at the last update and x, r', u' = x / r'
    those of now:

    ```
    t = m - <m, u'> u'        m <- (r / r') |m| t / |t|        v <- (r / r')^2 v
    ```

    After it the first moments' radial part is dropped. Where the step lay in the plane of x and m,
    as for AdamS and momentum SGD, this is the parallel transport along the arc from the old
    direction to the new; otherwise it is isometric, and equal to it up to second order in the
    angle. The rescaling follows from gradients being of degree -1 in the radius. Only where the
    parameters are now is looked at, so it is right whatever moved them: schedules, decay, skipped
    steps, a restored checkpoint. Moments of groups of one entry, which have no tangent space, and
    of norm zero are left alone.

    A second moment must be of degree -2, an average of squared gradients. The infinity norm that
    `optax.scale_by_adamax` keeps as `nu` is not: give it `second_moments=()`. Moments under other
    names are carried if named: `second_moments=("nu", "nu_max")` for `optax.scale_by_amsgrad`.

    Args:
      inner: The transformation whose moments are carried, as `optax.trace(0.9)`; chains and
        injected hyperparameters may be around it.
      groups: See [`spherical_optax.groups`][].
      first_moments: Fields of the inner state that hold first moments.
      second_moments: Fields that hold second moments, per entry or per group.
      rescale: Whether to multiply by the ratio of radii.

    Returns:
      A transformation with state `TransportMomentsState`; `update` needs params.

    Raises:
      TypeError: If inner is no transformation, or the names are not tuples of strings.
      ValueError: At `init`, if none of the names is a field of the inner state, or not
        all of those that were given; if a moment has another shape than its parameter, or
        inner carries it already; or if `groups` does not fit.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import spherical_optax as so
      >>> tx = so.transport_moments(optax.trace(decay=0.9), groups=so.per_layer())
      >>> params = jnp.array([1., 0.])
      >>> _, state = tx.update(jnp.array([0., 1.]), tx.init(params), params)
      >>> params = jnp.array([0., 2.])  # turned by 90 degrees, and twice as long
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
    """Raises a `ValueError` if a transformation in the inner one carries a moment itself."""
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
                f"{type(node).__name__}: they would be transported and rescaled twice; use the "
                "inner transformation by itself."
            )
