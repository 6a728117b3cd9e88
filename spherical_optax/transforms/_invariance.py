"""AdamP's projection: where gradients look tangent, updates are made so."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax import _trees, geometry
from spherical_optax._checks import check_number, check_transformation
from spherical_optax._masks import Mask, in_mask
from spherical_optax._sums import Wanted, again, inners, sums_together
from spherical_optax.groups import Groups, RadialGroup, group_size
from spherical_optax.sharding import laid_out, on_one_device
from spherical_optax.transforms._foreign import foreign
from spherical_optax.transforms._pair import aligned, check_type, pair, resolve
from spherical_optax.transforms._remade import stored, with_remade
from spherical_optax.transforms._transport import (
    Names,
    check_moments,
    check_names,
    fields_of,
    find_moments,
)
from spherical_optax.transforms._units import Unit, elsewhere, pick, present


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

    A layer is a leaf, or for a joint label all its leaves; where several axes index the
    groups, all of them but the last index the layers, as a stacking axis does.

    Args:
      inner: The transformation that gives the update.
      groups: See the module `spherical_optax.groups`. Leaves without a group are not
        projected, and decay in full.
      delta: Threshold of the cosine, at least 0.
      weight_decay: Decoupled decay, before the learning rate.
      mask: The leaves that decay, as in `optax.adamw`: a tree of booleans, or a prefix of one,
        or a function of the parameters that returns one; all if `None`.
      wd_ratio: Factor of the decay where projected, in [0, 1].
      first_moments: Fields of the inner state to project where the update is, as the
        published SGDP does to its momentum.

    Returns:
      A transformation with state `ProjectIfTangentState`; `update` needs params.

    Raises:
      TypeError, ValueError: If inner is no transformation or a number is out of range; at
        `init`, if `groups` does
        not fit the parameters, the leaves of a joint label form different numbers of layers,
        or a name is no field of the inner state.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import spherical_optax as so
      >>> tx = so.project_if_tangent(optax.trace(0.9), groups=so.per_layer())
      >>> params = jnp.array([1., 0.])
      >>> updates, state = tx.update(jnp.array([1., 1.]), tx.init(params), params)
      >>> updates  # not tangent: left alone
      Array([1., 1.], dtype=float32)
      >>> tx.update(jnp.array([0., 1.]), state, params)[0]  # the old radial part is removed
      Array([0. , 1.9], dtype=float32)

    References:
      Heo et al., AdamP, ICLR 2021, algorithm 2 and equation 11.
    """
    check_transformation("project_if_tangent", inner)
    check_number("project_if_tangent", "delta", delta)
    check_number("project_if_tangent", "weight_decay", weight_decay)
    check_number("project_if_tangent", "wd_ratio", wd_ratio, most=1)
    names = Names(check_names("project_if_tangent", "first_moments", first_moments), ())
    wrapped = foreign("project_if_tangent", inner)

    def init(params: optax.Params) -> ProjectIfTangentState:
        units, _ = resolve("project_if_tangent", groups, params)
        inner_state = wrapped.init(params)
        _check_layers(units, params)
        in_mask("project_if_tangent", mask, params)
        if names.first:
            check_moments("project_if_tangent", inner_state, params, units, names)
        return ProjectIfTangentState(inner_state)

    def update(
        updates: optax.Updates,
        state: ProjectIfTangentState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ProjectIfTangentState]:
        check_type("project_if_tangent", state, ProjectIfTangentState)
        units, x, (g,), unflatten = pair("project_if_tangent", groups, params, updates)
        inner_update = functools.partial(wrapped.update, **extra_args)
        updates, inner_state, remade = with_remade(inner_update, updates, state.inner_state, params)
        p, _ = aligned("project_if_tangent", params, updates)
        kept, inner_treedef = _trees.flatten(inner_state)
        fields, _ = find_moments(inner_state, params, names)
        decays = in_mask("project_if_tangent", mask, params)
        units = present(units, g, params)
        given = {i: stored(p[i], remade, unit[i]) for unit in units for i in unit}
        p = [again(given[i]) if i in given else leaf for i, leaf in enumerate(p)]
        moments = [list(fields_of(unit, fields, kept)) for unit in units]
        asked = []
        for unit, of_unit in zip(units, moments, strict=True):
            vectors = [pick(unit, leaves) for leaves in (x, g, given)]
            asked.append(Wanted(vectors, [(0, 0), (1, 0), (1, 1), (2, 0)], unit, reduced=True))
            for place, part in of_unit:
                v = {i: kept[place[i]] for i in part}
                asked.append(Wanted([v, pick(part, x)], [(0, 1), (1, 1)], part))
        found = iter(inners(asked))
        sums, sums_of_moments = [], []
        for unit, of_unit in zip(units, moments, strict=True):
            xx, gx, gg, px = map(jnp.atleast_1d, next(found))
            near = _cosine(gx, gg, xx) < delta / math.sqrt(group_size(unit, x))
            sums.append([xx, gx, gg, px, (~near).astype(xx.dtype)])
            like = jax.typeof(xx)
            for _ in of_unit:
                each = next(found)
                sums_of_moments.append([laid_out(v, like.shape, like.sharding) for v in each])
        layers = _over_layers(sums)
        layers_of_moments = zip(sums_of_moments, _over_layers(sums_of_moments), strict=True)
        for unit, of_groups, of_layers, of_unit in zip(units, sums, layers, moments, strict=True):
            xx, *_, px, _ = of_groups
            layer_xx, layer_gx, layer_gg, layer_px, far = of_layers
            layer = {i: _without_last(group, x[i].ndim) for i, group in unit.items()}
            near_group = far == 0
            cosine = _cosine(layer_gx, layer_gg, layer_xx)
            near_layer = cosine < delta / math.sqrt(group_size(layer, x))
            decay = weight_decay * jnp.where(near_group | near_layer, wd_ratio, 1)
            off = _radial((px, xx), (layer_px, layer_xx), near_group, near_layer)
            for i, group in unit.items():
                _subtract(p, {i: i}, off - decay if decays[i] else off, x, {i: group})
            for place, part in of_unit:
                off = _radial(*next(layers_of_moments), near_group, near_layer)
                _subtract(kept, place, off, x, part)
        for i in (i for i in elsewhere(units, p) if decays[i]):
            p[i] = (p[i] + weight_decay * x[i]).astype(p[i].dtype)
        return *unflatten(p), ProjectIfTangentState(inner_treedef.unflatten(kept))

    return optax.GradientTransformationExtraArgs(init, update)


def _without_last(group: RadialGroup, ndim: int) -> RadialGroup:
    return RadialGroup(index_axes=group.axes(ndim)[:-1])


def _check_layers(units: list[Unit], params: Any) -> None:
    """Raises a `ValueError` if the leaves of a joint label form different numbers of layers."""
    leaves = _trees.visible_leaves(params)
    for unit in units:
        counts = {
            leaves[i].path: math.prod(group.shape(leaves[i].value.shape)[:-1])
            for i, group in unit.items()
        }
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"project_if_tangent: joint label {next(iter(unit.values())).joint!r}: expected "
                f"as many layers on all its leaves, found {counts}; all index axes but the last "
                "index the layers."
            )


def _cosine(gx: jax.Array, gg: jax.Array, xx: jax.Array) -> jax.Array:
    """|cos(g, x)|, 0 where either is zero."""
    return jnp.abs(geometry.safe_divide(gx, geometry.safe_sqrt(gg) * geometry.safe_sqrt(xx)))


def _over_layers(sums: list[list[jax.Array]]) -> list[list[jax.Array]]:
    """Sums over the groups of each layer; on a GPU those of units that are alike in one kernel."""
    alike: dict[Any, list[int]] = {}
    for n, of_unit in enumerate(sums):
        # Not over several devices, which may have their groups in different places.
        alike.setdefault(jax.typeof(of_unit[0]) if on_one_device() else n, []).append(n)

    def of_each(sums: list[list[jax.Array]]) -> list[list[jax.Array]]:
        last = [of_unit[0].ndim - 1 for of_unit in sums]
        return [list(sums_together(each, axis)) for each, axis in zip(sums, last, strict=True)]

    def of_alike(sums: list[list[jax.Array]]) -> list[list[jax.Array]]:
        found: list[Any] = [None] * len(sums)
        for numbers in alike.values():
            stacks = [jnp.stack(each) for each in zip(*(sums[n] for n in numbers), strict=True)]
            [totals] = of_each([stacks])
            for n, *each in zip(numbers, *map(jnp.unstack, totals), strict=True):
                found[n] = each
        return found

    layers = jax.lax.platform_dependent(sums, cuda=of_alike, default=of_each) if sums else []
    return [[each[..., None] for each in of_unit] for of_unit in layers]


def _radial(
    groups: Sequence[jax.Array],
    layers: Sequence[jax.Array],
    near_group: jax.Array,
    near_layer: jax.Array,
) -> jax.Array:
    """The coefficient of x in the part that is projected off v, one per group.

    Of groups and of layers it is given <v, x> and |x|^2.
    """
    each = geometry.safe_divide(*groups)
    return jnp.where(near_group, each, jnp.where(near_layer, geometry.safe_divide(*layers), 0))


def _subtract(
    leaves: list[Any], place: dict[int, int], coefficient: jax.Array, x: list[Any], unit: Unit
) -> None:
    """Takes a multiple of x, one per group, off some leaves."""
    for i, group in unit.items():
        v = leaves[place[i]]
        radial = geometry.spread(coefficient, x[i], group) * geometry.wide(x[i])
        leaves[place[i]] = (geometry.wide(v) - radial).astype(v.dtype)
