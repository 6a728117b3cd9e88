"""Polar coordinates: the direction and the length of groups, optimized separately."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from spherical_optax import geometry
from spherical_optax._checks import check_transformation
from spherical_optax._engine.chain import chain
from spherical_optax._engine.foreign import foreign
from spherical_optax._engine.layout import Layout, check_type, per_group
from spherical_optax._engine.state import per_leaf, pick
from spherical_optax._numerics import safe_divide
from spherical_optax.groups import Groups
from spherical_optax.transforms._project import project_radial
from spherical_optax.transforms._radius import remembered
from spherical_optax.transforms._retract import RetractState, retract_to, shortest


class SplitRadialState(NamedTuple):
    """State of `split_radial`.

    Attributes:
      lengths: The length of each group; 0 for leaves without a group.
      tangent_state: The state of the optimizer of directions.
      radial_state: The state of the optimizer of lengths.
    """

    lengths: optax.Params
    tangent_state: optax.OptState
    radial_state: optax.OptState


def split_radial(
    tangent: optax.GradientTransformation, radial: optax.GradientTransformation, groups: Groups
) -> optax.GradientTransformationExtraArgs:
    """Optimizes the direction and the length of each group separately; put it last in a chain.

    ```
    r' = r + radial(<g, u>)        x' = r' normalize(x + t)
    ```

    Here r is the length, u = x / |x| is the direction, and t is the tangent part of
    tangent(g - <g, u> u). This is weight normalization without extra parameters. Use it for groups
    whose length matters, because no normalization layer follows, or whose length a decay or a
    target should set.

    Args:
      tangent: The optimizer of directions, such as `optax.adam(1e-2)`. It also trains leaves
        without a group.
      radial: The optimizer of lengths, such as `optax.sgd(1e-3)`. Its updates are <g, u> = dL/dr,
        and its params are the lengths. Both are trees like the parameters with one value per
        group, on every leaf of a joint group, and 0 for leaves without a group.
      groups: See [`spherical_optax.groups`][].

    Returns:
      A transformation with state `SplitRadialState`; `update` needs params. The state has the
      lengths in float32 or wider. They are remembered as in `retract`. One step makes a group at
      most 128 times shorter, or 2 times in half precision. A group of length 0 has no direction,
      and takes the step of `tangent`.

    Raises:
      TypeError, ValueError: If `tangent` or `radial` is not a transformation; at `init`, if
        `groups` does not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import spherical_optax as so
      >>> tx = so.split_radial(optax.sgd(0.5), optax.sgd(0.1), so.per_layer())
      >>> params, grads = jnp.array([2., 0.]), jnp.array([10., -4.])
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> params + updates  # of length 2 - 0.1 * 10, rotated by 45 degrees
      Array([0.7071068 , 0.70710677], dtype=float32)

    References:
      Salimans and Kingma, Weight normalization, NeurIPS 2016, section 2.
    """
    check_transformation("split_radial", tangent, "tangent")
    check_transformation("split_radial", radial, "radial")
    parts = [foreign("split_radial", tx) for tx in (tangent, radial)]
    at_length, project = retract_to(groups), project_radial(groups)
    end = chain(project, at_length)

    def init(params: optax.Params) -> SplitRadialState:
        lengths = at_length.init(params).target_radius
        return SplitRadialState(lengths, parts[0].init(params), parts[1].init(lengths))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        check_type("split_radial", state, SplitRadialState)
        field = (state.lengths, per_group)
        layout = Layout.read("split_radial", groups, params, updates, field)
        x, g, [lengths] = layout.params, layout.updates, layout.fields
        for joint in layout.joints:
            r = per_leaf(geometry.norm(pick(joint, x), joint), joint, lengths)
            for i in joint:
                lengths[i] = remembered(lengths[i], r[i])
        slopes = [None if length is None else jnp.zeros_like(length) for length in lengths]
        joints = layout.present()
        for joint in joints:
            along = geometry.inner(pick(joint, g), pick(joint, x), joint)
            slope = safe_divide(along, geometry.norm(pick(joint, x), joint))
            for i, each in per_leaf(slope, joint, lengths).items():
                slopes[i] = each
        changes, radial_state = parts[1].update(
            layout.trees(g, slopes)[1],
            state.radial_state,
            layout.trees(g, lengths)[1],
            **extra_args,
        )
        field = (changes, per_group)
        [change] = Layout.read("split_radial", groups, params, updates, field).fields
        for i in (i for joint in joints for i in joint):
            longer = jnp.maximum(lengths[i] + change[i], shortest(x[i].dtype) * lengths[i])
            lengths[i] = jnp.where(lengths[i] > 0, longer, 0).astype(lengths[i].dtype)
        new_lengths = layout.trees(g, lengths)[1]

        tangents, _ = project.update(updates, optax.EmptyState(), params)
        steps, tangent_state = parts[0].update(tangents, state.tangent_state, params, **extra_args)
        spheres = (optax.EmptyState(), RetractState(new_lengths))
        steps, _ = end.update(steps, spheres, params)
        return steps, SplitRadialState(new_lengths, tangent_state, radial_state)

    return optax.GradientTransformationExtraArgs(init, update)
