"""The geometry of spheres, group by group: pure functions on arrays.

These functions take differences before norms, which is accurate. The transforms use sums of
products instead. This needs one pass over memory, and a threshold below which a result counts as
rounding.

The length of a group is r = |x|, its direction u = x / r. Every function takes arrays and a
`RadialGroup`. For a joint group it takes a pytree of arrays and a pytree of `RadialGroup` with the
same structure, and adds the dot products of all arrays before any division. Per-group results have
the shape `group.shape(x.shape)`.

Sums accumulate in float32 or wider. In float32, which float32 and bfloat16 arrays use, sums above
3e38 overflow (lengths above 1.8e19). Sums and ratios below 1e-38 are lost, so a group shorter than
about 1e-19 has norm zero. A group of norm zero has no direction. Each function says what it returns
for such a group; gradients stay finite.
"""

import functools
import operator
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import jax
import jax.numpy as jnp

from spherical_optax._numerics import safe_divide, safe_sqrt, sum_groups, wide
from spherical_optax.groups import RadialGroup
from spherical_optax.sharding import index_sharding, laid_out

__all__ = ["angle", "center", "inner", "norm", "project", "retract", "scale", "spread", "transport"]

Arrays = TypeVar("Arrays")
"""An array, or a pytree of arrays for joint groups."""

Retraction: TypeAlias = Literal["normalize", "geodesic"]


def _inner(x: jax.Array, y: jax.Array, group: RadialGroup) -> jax.Array:
    if x.shape != y.shape:
        raise ValueError(f"inner: expected arrays of one shape, found {x.shape} and {y.shape}.")
    return sum_groups(wide(x) * wide(y), group)


def inner(x: Arrays, y: Arrays, group: Any) -> jax.Array:
    """The inner product of each group.

    ```
    <x, y> = sum of x_i y_i over the group's entries
    ```

    Args:
      x: An array, or a pytree of arrays for joint groups.
      y: Arrays of the same shapes.
      group: A `RadialGroup`, or a pytree of `RadialGroup`.

    Returns:
      Shape `group.shape(x.shape)`, float32 or, for float64 arrays, float64.

    Examples:
      >>> import jax.numpy as jnp
      >>> from spherical_optax import geometry, per_filter
      >>> geometry.inner(jnp.ones((3, 2)), jnp.array([[1., 2.]] * 3), per_filter())
      Array([3., 6.], dtype=float32)
    """
    for each in jax.tree.leaves(group):
        if not isinstance(each, RadialGroup):
            raise TypeError(f"inner: expected RadialGroup, found {each!r}.")
    parts = jax.tree.leaves(jax.tree.map(lambda g, a, b: _inner(a, b, g), group, x, y))
    first = jax.typeof(parts[0])
    return functools.reduce(
        operator.add, (laid_out(part, first.shape, first.sharding) for part in parts)
    )


def spread(values: jax.typing.ArrayLike, x: jax.Array, group: RadialGroup) -> jax.Array:
    """Reshapes per-group values so that they broadcast against one array.

    Args:
      values: One value per group, of shape `group.shape(x.shape)`. Values from another leaf of a
        joint group may have another shape, with the same number of values.
      x: The array to broadcast against.
      group: Its `RadialGroup`.

    Returns:
      An array with as many axes as x.

    Examples:
      >>> import jax.numpy as jnp
      >>> from spherical_optax import geometry, per_filter
      >>> geometry.spread(jnp.array([1., 2.]), jnp.ones((3, 2)), per_filter()).shape
      (1, 2)
    """
    axes, values = group.axes(x.ndim), jnp.asarray(values)
    sharding = index_sharding(x, axes)
    if group.num_blocks is not None:
        blocks = index_sharding(x, axes, split_last=True)
        values = laid_out(values, group.shape(x.shape), blocks)
        size = x.shape[axes[-1]] // group.num_blocks
        values = jnp.broadcast_to(values[..., None], (*values.shape, size))
    values = laid_out(values, tuple(x.shape[i] for i in axes), sharding)
    return jnp.expand_dims(values, tuple(i for i in range(x.ndim) if i not in axes))


def scale(values: jax.Array, x: Arrays, group: Any) -> Arrays:
    """Multiplies each group by its factor, in float32 or wider.

    Args:
      values: One factor per group.
      x: An array, or a pytree of arrays for joint groups.
      group: A `RadialGroup`, or a pytree of `RadialGroup`.

    Returns:
      Arrays like x, of x's dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> from spherical_optax import geometry, per_filter
      >>> geometry.scale(jnp.array([1., 2.]), jnp.ones((1, 2)), per_filter())
      Array([[1., 2.]], dtype=float32)
    """
    return jax.tree.map(lambda g, a: (wide(a) * spread(values, a, g)).astype(a.dtype), group, x)


def norm(x: Arrays, group: Any) -> jax.Array:
    """The length of each group, r = |x|.

    Args:
      x: An array, or a pytree of arrays for joint groups.
      group: A `RadialGroup`, or a pytree of `RadialGroup`.

    Returns:
      Shape `group.shape(x.shape)`, float32 or, for float64 arrays, float64. Its
      gradient at x = 0 is 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from spherical_optax import geometry, per_filter, per_layer
      >>> x = jnp.array([[3., 0.], [4., 2.]])
      >>> geometry.norm(x, per_filter())
      Array([5., 2.], dtype=float32)
      >>> geometry.norm({"kernel": x, "bias": jnp.array([2., 4.])},
      ...               {"kernel": per_layer(), "bias": per_layer()})
      Array(7., dtype=float32)
    """
    return safe_sqrt(inner(x, x, group))


def project(v: Arrays, x: Arrays, group: Any) -> Arrays:
    """The part of v that is tangent to the sphere through x.

    ```
    v - <v, u> u        (v where |x| = 0)
    ```

    Args:
      v: An array, or a pytree of arrays for joint groups.
      x: The point, arrays of the same shapes.
      group: A `RadialGroup`, or a pytree of `RadialGroup`.

    Returns:
      Arrays like v, of v's dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> from spherical_optax import geometry, per_layer
      >>> geometry.project(jnp.array([1., 1.]), jnp.array([2., 0.]), per_layer())
      Array([0., 1.], dtype=float32)
    """
    radial = safe_divide(inner(v, x, group), inner(x, x, group))
    return jax.tree.map(
        lambda g, a, b: (wide(a) - spread(radial, b, g) * wide(b)).astype(a.dtype), group, v, x
    )


def center(x: Arrays, group: Any) -> Arrays:
    """Each group without the mean of its entries.

    ```
    x - mean(x)
    ```

    Args:
      x: An array, or a pytree of arrays for joint groups.
      group: A `RadialGroup`, or a pytree of `RadialGroup`.

    Returns:
      Arrays like x, of x's dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> from spherical_optax import geometry, per_filter
      >>> geometry.center(jnp.array([[1., 0.], [3., 0.]]), per_filter())
      Array([[-1.,  0.], [ 1.,  0.]], dtype=float32)
    """
    ones = jax.tree.map(lambda a: jnp.ones_like(a), x)
    mean = inner(x, ones, group) / inner(ones, ones, group)
    return jax.tree.map(lambda g, a: (wide(a) - spread(mean, a, g)).astype(a.dtype), group, x)


def transport(m: Arrays, x: Arrays, group: Any) -> Arrays:
    """Moves a tangent vector from another point to the tangent space at x.

    ```
    t = m - <m, u> u        |m| t / |t|        (0 where t = 0, m where |x| = 0)
    ```

    The result is as long as m. If the arc from the old point to x lies in the plane of m and the
    old point, this is the parallel transport along the arc. Otherwise it agrees with parallel
    transport up to second order in the angle.

    Args:
      m: The tangent vector, an array or a pytree of arrays for joint groups.
      x: The new point, arrays of the same shapes.
      group: A `RadialGroup`, or a pytree of `RadialGroup`.

    Returns:
      Arrays like m, of m's dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> from spherical_optax import geometry, per_layer
      >>> m, x = jnp.array([0., 2.]), jnp.array([1., 1.])
      >>> geometry.transport(m, x, per_layer())
      Array([-1.4142135,  1.4142135], dtype=float32)
    """
    t = project(m, x, group)
    before, after = inner(m, m, group), inner(t, t, group)
    # If m is radial at x, only rounding is left, which has no direction.
    smallest = min(float(jnp.finfo(a.dtype).eps) for a in jax.tree.leaves(m)) ** 2
    lost = after <= smallest * before
    length = safe_divide(safe_sqrt(before), safe_sqrt(jnp.where(lost, 0, after)))
    return scale(jnp.where(before == 0, 1, length), t, group)  # only matters to the gradient


def angle(x: Arrays, y: Arrays, group: Any) -> jax.Array:
    """The angle between the directions of x and y.

    ```
    atan2(|y - <y, u> u|, <y, u>)
    ```

    This is accurate for small angles, unlike the arc cosine of a dot product.

    Args:
      x: An array, or a pytree of arrays for joint groups.
      y: Arrays of the same shapes.
      group: A `RadialGroup`, or a pytree of `RadialGroup`.

    Returns:
      Radians in [0, pi], shape `group.shape(x.shape)`; 0 where x or y is zero.

    Examples:
      >>> import jax.numpy as jnp
      >>> from spherical_optax import geometry, per_layer
      >>> geometry.angle(jnp.array([1., 0.]), jnp.array([2., 2.]), per_layer())
      Array(0.7853982, dtype=float32)
    """
    # y - x is exact for close points, and has the same tangent part as y.
    step = jax.tree.map(lambda a, b: wide(b) - wide(a), x, y)
    tangent = norm(project(step, x, group), group)
    radial = safe_divide(inner(x, y, group), norm(x, group))
    degenerate = (inner(x, x, group) == 0) | (inner(y, y, group) == 0)
    return jnp.arctan2(jnp.where(degenerate, 0, tangent), jnp.where(degenerate, 1, radial))


def retract(
    x: Arrays,
    v: Arrays,
    group: Any,
    radius: jax.typing.ArrayLike = 1.0,
    method: Retraction = "normalize",
) -> Arrays:
    """Takes the step v from x and returns to the sphere of a given radius.

    ```
    normalize:  radius (x + v) / |x + v|                      (x where x + v = 0)
    geodesic:   radius (cos(a) u + sin(a) t / |t|)            (x + v where x = 0)
                with t the tangent part of v, a = |t| / |x|
    ```

    Args:
      x: The point, an array or a pytree of arrays for joint groups.
      v: The step, arrays of the same shapes.
      group: A `RadialGroup`, or a pytree of `RadialGroup`.
      radius: A number, or one value per group.
      method: `"normalize"`, or `"geodesic"` to follow the great circle.

    Returns:
      Arrays like x, of x's dtype.

    Raises:
      ValueError: If the method is unknown.

    Examples:
      >>> import jax.numpy as jnp
      >>> from spherical_optax import geometry, per_layer
      >>> x, v = jnp.array([1., 0.]), jnp.array([0., 1.])
      >>> geometry.retract(x, v, per_layer())
      Array([0.70710677, 0.70710677], dtype=float32)
      >>> geometry.retract(x, v, per_layer(), radius=2.0, method="geodesic")
      Array([1.08060, 1.68294], dtype=float32)
    """
    _check_retraction(method)
    if method == "normalize":
        moved = jax.tree.map(lambda a, b: wide(a) + wide(b), x, v)
        length = norm(moved, group)
        factor = radius / jnp.where(length == 0, 1, length)
        return jax.tree.map(
            lambda g, a, y: jnp.where(
                spread(length == 0, a, g), wide(a), y * spread(factor, a, g)
            ).astype(a.dtype),
            group, x, moved,
        )  # fmt: skip
    tangent = project(jax.tree.map(wide, v), x, group)
    length = norm(x, group)
    inverse = 1 / jnp.where(length == 0, 1, length)
    turn = norm(tangent, group) * inverse
    along, across = radius * inverse * jnp.cos(turn), radius * inverse * jnp.sinc(turn / jnp.pi)
    return jax.tree.map(
        lambda g, a, t, b: jnp.where(
            spread(length == 0, a, g),
            wide(a) + wide(b),
            wide(a) * spread(along, a, g) + wide(t) * spread(across, a, g),
        ).astype(a.dtype),
        group, x, tangent, v,
    )  # fmt: skip


def _check_retraction(method: str) -> None:
    """Raises a `ValueError` that lists the known methods if this is not one of them."""
    if method not in get_args(Retraction):
        raise ValueError(
            f"retract: expected method to be one of {list(get_args(Retraction))}, found {method!r}."
        )
