"""AdamP's projection: makes updates tangent where gradients are nearly tangent."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax import _trees
from spherical_optax._checks import check_number, check_transformation
from spherical_optax._engine.foreign import foreign
from spherical_optax._engine.layout import Layout, check_type, no_params, per_entry
from spherical_optax._engine.lift import lift_together
from spherical_optax._engine.moments import Names, check_moments, check_names, find_moments
from spherical_optax._engine.step import Step
from spherical_optax._engine.vector import Vector
from spherical_optax._masks import Mask, in_mask
from spherical_optax._numerics import safe_divide, safe_sqrt
from spherical_optax.groups import Groups, Joint


class ProjectIfTangentState(NamedTuple):
    """State of `project_if_tangent`.

    Attributes:
      inner_state: The wrapped transformation's state.
    """

    inner_state: optax.OptState


def project_if_tangent(
    inner: optax.GradientTransformation,
    groups: Groups,
    *,
    delta: jax.typing.ArrayLike = 0.1,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask = None,
    wd_ratio: jax.typing.ArrayLike = 0.1,
    first_moments: tuple[str, ...] = (),
) -> optax.GradientTransformationExtraArgs:
    """Projects the inner update where gradients are nearly orthogonal to the weights.

    ```
    p = inner(g)
    if |cos(g, x)| < delta / sqrt(d) for all groups of a layer:    p = p - <p, u> u
    else, the same for the layer as one group of all its entries
    p + weight_decay x (times wd_ratio where projected)
    ```

    A layer is a leaf, or all leaves of a joint label. If several axes index the groups, the last
    one indexes the groups of a layer, and the others index layers, as a stacking axis does.

    Args:
      inner: The transformation that gives the update.
      groups: See [`spherical_optax.groups`][]. Leaves without a group are not
        projected, and have the full decay.
      delta: Threshold for sqrt(d) times the cosine between gradient and weights, at least 0, with
        d entries per group.
      weight_decay: Factor of decoupled decay, before the learning rate.
      mask: The leaves that decay, as in `optax.adamw`; all if `None`.
      wd_ratio: Factor on the decay where updates are projected, in [0, 1].
      first_moments: Fields of the inner state to project together with the update, as the
        published SGDP does with its momentum.

    Returns:
      A transformation with state `ProjectIfTangentState`; `update` needs params.

    Raises:
      TypeError, ValueError: If `inner` is not a transformation or a number is out of range; at
        `init`, if `groups` or `mask` does not fit, the leaves of a joint label form different
        numbers of layers, or the inner state has no field of a given name.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import spherical_optax as so
      >>> tx = so.project_if_tangent(optax.trace(0.9), groups=so.per_layer())
      >>> params = jnp.array([1., 0.])
      >>> updates, state = tx.update(jnp.array([1., 1.]), tx.init(params), params)
      >>> updates  # not tangent: unchanged
      Array([1., 1.], dtype=float32)
      >>> tx.update(jnp.array([0., 1.]), state, params)[0]  # the old radial part is removed
      Array([0. , 1.9], dtype=float32)

    References:
      Heo et al., AdamP, ICLR 2021, algorithm 2 and equation 11.
    """
    who = "project_if_tangent"
    return project_if_tangent_as(
        who, inner, groups, delta, weight_decay, mask, wd_ratio, first_moments
    )


def project_if_tangent_as(
    who: str,
    inner: optax.GradientTransformation,
    groups: Groups,
    delta: Any,
    weight_decay: Any,
    mask: Mask,
    wd_ratio: Any,
    first_moments: tuple[str, ...] = (),
) -> optax.GradientTransformationExtraArgs:
    """`project_if_tangent`, with the name of the function that was called for messages."""
    check_transformation(who, inner)
    check_number(who, "delta", delta)
    check_number(who, "weight_decay", weight_decay)
    check_number(who, "wd_ratio", wd_ratio, most=1)
    names = Names(check_names(who, "first_moments", first_moments), ())
    wrapped = foreign(who, inner)

    def init(params: optax.Params) -> ProjectIfTangentState:
        joints = Layout.at_init(who, groups, params).joints
        inner_state = wrapped.init(params)
        _check_layers(who, joints, params)
        in_mask(who, mask, params)
        if names.first:
            check_moments(who, inner_state, params, joints, names)
        return ProjectIfTangentState(inner_state)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        check_type(who, state, ProjectIfTangentState)
        if params is None:
            raise no_params(who)
        steps, inner_state = wrapped.update(updates, state.inner_state, params, **extra_args)
        x, treedef = _trees.flatten(params)
        kept, inner_treedef = _trees.flatten(inner_state)
        fields, _ = find_moments(inner_state, params, names)
        decays = in_mask(who, mask, params)
        decayed: Any = ()
        if not all(decays):
            pairs = zip(x, decays, strict=True)
            decayed = treedef.unflatten([leaf if own else _zeros(leaf) for leaf, own in pairs])
        moments, points = [], []
        for field in fields:
            own = [kept[field[i]] if i in field else None for i in range(len(x))]
            both = list(zip(own, x, strict=True))
            moments.append([_zeros(leaf) if moment is None else moment for moment, leaf in both])
            # The inner state may have moments for only some leaves of a joint group.
            points.append([_zeros(leaf) if moment is None else leaf for moment, leaf in both])
        trees = [tuple(map(treedef.unflatten, lists)) for lists in (moments, points)]
        seen = (updates, decayed, *trees)
        step = _step(who, groups, delta, weight_decay, wd_ratio, decays, len(fields))
        steps, [(_, _, after, _)] = lift_together([step], made_before=True)(steps, [seen], params)
        for field, moment in zip(fields, after, strict=True):
            leaves = _trees.flatten(moment)[0]
            for i, place in field.items():
                kept[place] = None if kept[place] is None else leaves[i]
        return steps, ProjectIfTangentState(inner_treedef.unflatten(kept))

    return optax.GradientTransformationExtraArgs(init, update)


def _zeros(leaf: Any) -> Any:
    return None if leaf is None else jnp.zeros_like(leaf)


def _step(
    who: str,
    groups: Groups,
    delta: Any,
    weight_decay: Any,
    wd_ratio: Any,
    decays: list[bool],
    moments: int,
) -> Step:
    """The projection of updates, with the other vectors that it reads or projects as its state.

    These are the gradient; the parameters that decay, with zeros for the others, or nothing if all
    decay; the first moments; and the parameters of these moments.
    """

    def prepare(layout: Layout, state: Any) -> Any:
        for i in (i for i in layout.rest if decays[i]):
            p = layout.updates[i]
            layout.updates[i] = (p + weight_decay * layout.params[i]).astype(p.dtype)
        return state, on_group

    def on_group(p: Vector, x: Vector, state: Any) -> tuple[Vector, Any]:
        g, decayed, moments, points = state
        size = p.space.size
        xx, gx, gg = x.square(), g.inner(x), g.square()
        near = _cosine(gx, gg, xx) < delta / math.sqrt(size)
        projected = [(p, x), *zip(moments, points, strict=True)]
        parts = [(v.inner(point), point.square()) for v, point in projected]
        sums = [(~near).astype(xx.dtype), gx, gg, xx, *(each for part in parts for each in part)]
        far, gx, gg, total, *of_layer = p.space.over_layer(*sums)
        size *= xx.shape[-1] if p.space.ndim else 1
        layer_near = _cosine(gx, gg, total) < delta / math.sqrt(size)

        def project(v: Vector, point: Vector, group: Any, layer: Any) -> Vector:
            radial = jnp.where(layer_near, safe_divide(*layer), 0)
            return v - point * jnp.where(far == 0, safe_divide(*group), radial)

        layers = zip(of_layer[::2], of_layer[1::2], strict=True)
        p, *moments = [
            project(*vectors, *of) for vectors, *of in zip(projected, parts, layers, strict=True)
        ]
        decay = weight_decay * jnp.where((far == 0) | layer_near, wd_ratio, jnp.ones_like(xx))
        return p + (decayed or x) * decay, (g, decayed, tuple(moments), points)

    each = (per_entry,) * moments
    shapes = (per_entry, () if all(decays) else per_entry, each, each)
    return Step(who, groups, tuple, shapes, prepare)


def _check_layers(who: str, joints: list[Joint], params: Any) -> None:
    """Raises a `ValueError` if the leaves of a joint label form different numbers of layers."""
    leaves = _trees.visible_leaves(params)
    for joint in joints:
        counts = {
            leaves[i].path: math.prod(group.shape(leaves[i].value.shape)[:-1])
            for i, group in joint.items()
        }
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"{who}: joint label {next(iter(joint.values())).joint!r}: expected the same "
                f"number of layers on all its leaves, found {counts}. All index axes except the "
                "last index layers."
            )


def _cosine(gx: jax.Array, gg: jax.Array, xx: jax.Array) -> jax.Array:
    """|cos(g, x)|; 0 if g or x is zero."""
    return jnp.abs(safe_divide(gx, safe_sqrt(gg) * safe_sqrt(xx)))
