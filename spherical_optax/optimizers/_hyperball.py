"""Hyperball: steps of a given angle at a fixed radius, along Adam's, Muon's or any direction."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax
from optax import contrib

from spherical_optax import _trees
from spherical_optax._checks import check_adam, check_number
from spherical_optax._checks.arguments import groups_by_name
from spherical_optax._checks.direction import direction
from spherical_optax.groups import Groups, RadialGroup, joints_of
from spherical_optax.optimizers._common import at_fixed_radius, no_weight_decay
from spherical_optax.transforms import normalize_updates
from spherical_optax.transforms._learning_rates import Rates
from spherical_optax.transforms._radius import Radius


@groups_by_name
def hyperball(
    inner: optax.GradientTransformation,
    learning_rate: Rates,
    *,
    groups: Groups,
    other: optax.GradientTransformation | None = None,
    radius: Radius | Literal["initial"] = "initial",
) -> optax.GradientTransformationExtraArgs:
    """Hyperball: steps of a given relative length along any direction, at a fixed radius.

    ```
    x' = r normalize(x - learning_rate |x| w / |w|)
    ```

    Here w is the direction of `inner`, and r is the length of the group when training begins.
    `adamh` and `muonh` are `hyperball` with the directions of Adam and Muon.

    A group of length 0 never moves, so do not initialize output projections with zeros. `init`
    raises an error for such a group. Inside `jax.jit`, `init` cannot see the values, and a warning
    appears when the program runs.

    Args:
      inner: The transformation that gives the direction: a `scale_by_*` or `optax.trace`. It must
        not be a complete optimizer, whose updates already have the opposite sign.
      learning_rate: The length of a step relative to the radius: a number, a schedule, or a
        dictionary from regular expressions on paths to numbers or schedules. In a dictionary the
        first pattern found in a path (`re.search`) decides. Learning rates and scales inside
        `inner` cancel in groups.
      groups: See [`spherical_optax.groups`][].
      other: The complete optimizer of leaves without a group, such as `optax.adamw(1e-3)`. It is
        required if there are such leaves. `inner` sees only leaves with a group.
      radius: The radius to keep, as in `retract`: `"initial"` for the length when training
        begins, or one of the forms of `place_on_sphere`. Weights that are much longer than the
        radius need a few steps to get there; `place_on_sphere` puts them there at once.

    Returns:
      The optimizer; `update` needs params.

    Raises:
      TypeError, ValueError: If `inner` is not a transformation or a number is out of range. At
        `init`, if `groups` does not fit the parameters, no leaf has a group, a group has one entry
        or is known to have norm zero, the updates of `inner` point against the gradients, or
        `other` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import spherical_optax as so
      >>> tx = so.hyperball(optax.scale_by_adam(), 0.1, groups=so.per_layer())
      >>> params = jnp.array([3., 4.])
      >>> updates, _ = tx.update(jnp.array([1., 2.]), tx.init(params), params)
      >>> so.geometry.norm(optax.apply_updates(params, updates), so.per_layer())
      Array(5., dtype=float32)

    References:
      Wen et al., Hyperball, 2026.
    """
    return _hyperball("hyperball", inner, learning_rate, groups, other, radius)


def _hyperball(
    who: str, inner: Any, learning_rate: Rates, groups: Groups, other: Any, radius: Any
) -> optax.GradientTransformationExtraArgs:
    """`hyperball`, with the name of the function that was called for messages."""
    step = (normalize_updates(groups),)
    return at_fixed_radius(who, inner, step, learning_rate, groups, other, radius)


@groups_by_name
def adamh(
    learning_rate: Rates,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    groups: Groups,
    other: optax.GradientTransformation | None = None,
    nesterov: bool = False,
    mu_dtype: jax.typing.DTypeLike | None = None,
    radius: Radius | Literal["initial"] = "initial",
    weight_decay: None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamH: Hyperball along Adam's direction.

    ```
    w = mhat / (sqrt(vhat) + eps)        x' = r normalize(x - learning_rate r w / |w|)
    ```

    Here r is the length of the group when training begins. Groups have no weight decay, because
    their radius is fixed.

    Args:
      learning_rate: The length of a step relative to the radius, as in `hyperball`.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator.
      groups: See [`spherical_optax.groups`][]. As published, each matrix is one group:
        `per_layer()`, or `RadialGroup((0,))` for stacked layers. With finer groups, each group
        keeps its own radius.
      other: The optimizer of leaves without a group, as in `hyperball`.
      nesterov: Whether to use Nesterov momentum, as in `optax.adam`.
      mu_dtype: dtype of the first moment; that of the parameter if `None`.
      radius: The radius to keep, as in `hyperball`.
      weight_decay: Must be `None`. Give the decay of leaves without a group to `other`.

    Returns:
      The optimizer; `update` needs params.

    Raises:
      TypeError, ValueError: If a number is out of range; at `init`, as in `hyperball`.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import spherical_optax as so
      >>> groups = {"kernel": so.per_layer(), "bias": None}
      >>> tx = so.adamh(0.1, groups=groups, other=optax.adam(1e-3))
      >>> params = {"kernel": jnp.array([[3., 4.]]), "bias": jnp.zeros(2)}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> jnp.linalg.norm(optax.apply_updates(params, updates)["kernel"])
      Array(5., dtype=float32)

    References:
      Wen et al., Hyperball, 2026 (AdamH).
    """
    check_adam("adamh", b1, b2, eps)
    no_weight_decay("adamh", weight_decay)
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype, nesterov=nesterov)
    return _hyperball("adamh", direction(adam), learning_rate, groups, other, radius)


@groups_by_name
def muonh(
    learning_rate: Rates,
    momentum: jax.typing.ArrayLike = 0.95,
    *,
    groups: Groups,
    other: optax.GradientTransformation | None = None,
    bias_correction: bool = True,
    ns_steps: int = 5,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_dimension_numbers: Any = None,
    radius: Radius | Literal["initial"] = "initial",
    weight_decay: None = None,
) -> optax.GradientTransformationExtraArgs:
    """MuonH: Hyperball along Muon's direction.

    ```
    w = the orthogonal factor of the Nesterov momentum, by Newton-Schulz iterations
    x' = r normalize(x - learning_rate r w / |w|)
    ```

    Here r is the length of the group when training begins. Muon needs a matrix:

    - In a group of two axes, these are the rows and the columns. The axes that index groups, such
      as those of stacked layers or experts, are batch axes.
    - If the groups are the rows or the columns of a kernel, the whole kernel is the matrix.
    - The kernel `(h, w, in, out)` of a convolution, with h = w at most 7, is a matrix
      `(h w in, out)`.
    - In all other arrays, `weight_dimension_numbers` names the axes of rows and columns.

    Args:
      learning_rate: The length of a step relative to the radius, as in `hyperball`.
      momentum: Decay rate of Muon's momentum, in [0, 1).
      groups: See [`spherical_optax.groups`][].
      other: The optimizer of leaves without a group, as in `hyperball`.
      bias_correction: Whether to correct the bias of the Nesterov momentum, as in
        `optax.contrib.muon`. Without it, the momentum is that of `optax.trace`, as in the code of
        Marin.
      ns_steps: Number of Newton-Schulz iterations.
      mu_dtype: dtype of the momentum; that of the parameter if `None`.
      weight_dimension_numbers: An `optax.contrib.MuonDimensionNumbers` for all leaves with a
        group, a tree of them like params, or a function from params to such a tree, as in
        `optax.contrib.muon`. `None` stands for the rules above. Examples are
        `MuonDimensionNumbers(0, (1, 2))` for queries `(d, heads, k)` and
        `MuonDimensionNumbers((0, 1), 2)` for an output projection `(heads, k, d)`. Axes that it
        does not name are batch axes.
      radius: The radius to keep, as in `hyperball`.
      weight_decay: Must be `None`. Give the decay of leaves without a group to `other`.

    Returns:
      The optimizer; `update` needs params.

    Raises:
      TypeError, ValueError: If a number is out of range; at `init`, if the axes of a matrix are
        unknown or do not fit, and as in `hyperball`.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import spherical_optax as so
      >>> groups = {"kernel": so.per_layer(), "bias": None}
      >>> tx = so.muonh(0.1, groups=groups, other=optax.adam(1e-3))
      >>> params = {"kernel": 5 * jnp.eye(2), "bias": jnp.zeros(2)}
      >>> grads = {"kernel": jnp.array([[0., 1.], [1., 0.]]), "bias": jnp.ones(2)}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(f"{jnp.linalg.norm(optax.apply_updates(params, updates)['kernel']):.4f}")
      7.0711

    References:
      Wen et al., Hyperball, 2026 (MuonH); Jordan et al., Muon, 2024.
    """
    check_number("muonh", "momentum", momentum, below=1)
    no_weight_decay("muonh", weight_decay)

    def dimensions(tree: Any) -> Any:
        return _matrices(groups, weight_dimension_numbers, tree)

    if bias_correction:
        muon = contrib.scale_by_muon(
            ns_steps=ns_steps, beta=momentum, mu_dtype=mu_dtype, weight_dimension_numbers=dimensions
        )
    else:
        muon = optax.chain(
            optax.trace(momentum, nesterov=True, accumulator_dtype=mu_dtype),
            contrib.scale_by_muon(
                ns_steps=ns_steps, beta=0.0, nesterov=False, weight_dimension_numbers=dimensions
            ),
        )

    def init(params: optax.Params) -> optax.OptState:
        dimensions(params)  # raises here, not at the first update
        return muon.init(params)

    inner = direction(optax.GradientTransformation(init, muon.update))
    return _hyperball("muonh", inner, learning_rate, groups, other, radius)


def _matrices(groups: Groups, given: Any, tree: Any) -> Any:
    """Muon's axes for each leaf with a group; raises a `ValueError` if they are not known."""
    leaves, treedef = _trees.visible_leaves(tree), _trees.flatten(tree)[1]
    given_for = _given(given, tree)
    axes: list[Any] = [None if leaf.value is None else False for leaf in leaves]
    for joint in joints_of(groups, tree):
        for i, group in joint.items():
            numbers = given_for(leaves[i])
            axes[i] = _matrix(leaves[i], group) if numbers is None else _fitting(leaves[i], numbers)
    return treedef.unflatten(axes)


def _given(given: Any, tree: Any) -> Callable[[_trees.Leaf], Any]:
    """Looks up the user's entry for a leaf: for the leaf itself, a node above it, or its box."""
    entries = jax.tree.leaves_with_path(
        given(tree) if callable(given) else given,
        is_leaf=lambda node: isinstance(node, contrib.MuonDimensionNumbers),
    )
    by_keys = {tuple(map(_trees.key_name, path)): entry for path, entry in entries}

    def meet(keys: tuple[str, ...], leaf: _trees.Leaf) -> bool:
        return all(a == b for a, b in zip(keys, leaf.keys, strict=False))

    leaves = _trees.leaves_with_paths(tree)
    unknown = ["/".join(keys) for keys in by_keys if not any(meet(keys, leaf) for leaf in leaves)]
    if leaves and unknown:
        raise ValueError(
            "muonh: expected weight_dimension_numbers to have paths of the parameters, found "
            f"{unknown}, which no parameter has. The paths are {[leaf.path for leaf in leaves]}."
        )
    return lambda leaf: next((each for keys, each in by_keys.items() if meet(keys, leaf)), None)


def _fitting(leaf: _trees.Leaf, given: Any) -> contrib.MuonDimensionNumbers:
    ndim = leaf.value.ndim
    if isinstance(given, contrib.MuonDimensionNumbers):
        sides = [(side,) if isinstance(side, int) else tuple(side) for side in given]
        axes = [axis for side in sides for axis in side]
        inside = all(-ndim <= axis < ndim for axis in axes)
        if all(sides) and inside and len({axis % ndim for axis in axes}) == len(axes):
            return given
    raise ValueError(
        f"muonh: {leaf.path} of shape {leaf.value.shape}: expected weight_dimension_numbers "
        f"MuonDimensionNumbers(rows, columns), with distinct axes from {-ndim} to {ndim - 1}, "
        f"found {given!r}."
    )


def _matrix(leaf: _trees.Leaf, group: RadialGroup) -> contrib.MuonDimensionNumbers:
    shape, ndim = leaf.value.shape, leaf.value.ndim
    index = group.axes(ndim)
    summed = [axis for axis in range(ndim) if axis not in index]
    if len(summed) == 2:
        return contrib.MuonDimensionNumbers(*summed)
    if 2 in (ndim, group.ndim) and summed:  # groups are rows or columns of the kernel
        return contrib.MuonDimensionNumbers(ndim - 2, ndim - 1)
    # A convolution's kernel whose groups are output channels is one matrix.
    own = [*summed, ndim - 1] if index[-1:] == (ndim - 1,) else summed
    window = {shape[axis] for axis in own[:-2]}
    if len(own) >= 4 and len(window) == 1 and window <= set(range(1, 8)):
        return contrib.MuonDimensionNumbers(tuple(own[:-1]), own[-1])
    if ndim < 2:
        raise ValueError(
            f"muonh: {leaf.path} of shape {shape}: expected a matrix, found a vector. Muon has no "
            "direction for it. Leave out this parameter, such as the bias of a joint group "
            "(use_bias=False in Flax), or use adamh."
        )
    raise ValueError(
        f"muonh: {leaf.path} of shape {shape}: expected a group of two axes for Muon, or a kernel "
        f"(h, w, in, out), found {len(summed)} axes besides {index}, which index groups. Name the "
        "rows and columns in weight_dimension_numbers, such as "
        "optax.contrib.MuonDimensionNumbers(0, (1, 2)). Or, if matrices are stacked, give the axes "
        "of one: so.per_layer(ndim=2). Or give the parameter no group."
    )
