"""AdamH and MuonH: Hyperball with the directions of Adam and of Muon."""

from typing import Any

import jax
import optax
from optax import contrib

from spherical_optax import _trees
from spherical_optax._checks import check_number
from spherical_optax.groups import Groups, RadialGroup, radial_units
from spherical_optax.optimizers._fixed_radius import hyperball_as
from spherical_optax.optimizers._parts import Rates


def adamh(
    learning_rate: Rates,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    groups: Groups,
    other_learning_rate: optax.ScalarOrSchedule | None = None,
    nesterov: bool = False,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamH: Hyperball along Adam's direction.

    ```
    w = mhat / (sqrt(vhat) + eps)        x' = r normalize(x - learning_rate r w / |w|)
    ```

    with r the length that training begins with. There is no weight decay in groups, whose radius
    is fixed; other leaves follow Adam, without decay.

    Args:
      learning_rate: The length of a step relative to the radius: a number or a schedule, or a
        dictionary from regular expressions on paths to these, as in `hyperball`.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator.
      groups: See the module `spherical_optax.groups`. As published a group is a matrix,
        `per_layer()`, of stacked layers `RadialGroup((0,))`; finer groups keep a radius each.
      other_learning_rate: That of leaves without a group, a number or a schedule. Where there
        are such leaves it has to be given, as an angle is too much for most.
      nesterov: Whether to use Nesterov momentum, as in `optax.adam`.
      mu_dtype: dtype of the first moment; the parameter's if `None`.

    Returns:
      The optimizer; `update` needs params.

    Raises:
      TypeError, ValueError: If a number is out of range; at `init`, where `hyperball` raises.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import spherical_optax as so
      >>> groups = {"kernel": so.per_layer(), "bias": None}
      >>> tx = so.adamh(0.1, groups=groups, other_learning_rate=1e-3)
      >>> params = {"kernel": jnp.array([[3., 4.]]), "bias": jnp.zeros(2)}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> jnp.linalg.norm(optax.apply_updates(params, updates)["kernel"])
      Array(5., dtype=float32)

    References:
      Wen et al., Hyperball, 2026 (AdamH).
    """
    _check_adam("adamh", b1, b2, eps)
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype, nesterov=nesterov)
    return hyperball_as("adamh", adam, learning_rate, groups, other_learning_rate)


def muonh(
    learning_rate: Rates,
    momentum: jax.typing.ArrayLike = 0.95,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    groups: Groups,
    other_learning_rate: optax.ScalarOrSchedule | None = None,
    bias_correction: bool = True,
    ns_steps: int = 5,
) -> optax.GradientTransformationExtraArgs:
    """MuonH: Hyperball along Muon's direction, and Adam for leaves without a group.

    ```
    w = the orthogonal factor of the Nesterov momentum, by Newton-Schulz iterations
    x' = r normalize(x - learning_rate r w / |w|)
    ```

    with r the length that training begins with. The matrix of a group is its two axes; those that
    index groups, as of stacked layers and experts, are batch axes. Of a leaf of two axes whose
    groups are rows or columns, Muon's matrix is the leaf.

    Args:
      learning_rate: The length of a step relative to the radius: a number or a schedule, or a
        dictionary from regular expressions on paths to these, as in `hyperball`.
      momentum: Decay rate of Muon's momentum, in [0, 1).
      b1: Decay rate of Adam's first moment, in [0, 1).
      b2: Decay rate of Adam's second moment, in [0, 1).
      eps: Added to Adam's denominator.
      groups: See the module `spherical_optax.groups`.
      other_learning_rate: That of leaves without a group, a number or a schedule. Where there
        are such leaves it has to be given, as an angle is too much for most.
      bias_correction: Whether the Nesterov momentum is corrected for its bias, as in
        `optax.contrib.muon`; without it, it is that of `optax.trace`, as in marin.
      ns_steps: Newton-Schulz iterations.

    Returns:
      The optimizer; `update` needs params.

    Raises:
      TypeError, ValueError: If a number is out of range; at `init`, if a group is no matrix, and
        where `hyperball` raises.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import spherical_optax as so
      >>> groups = {"kernel": so.per_layer(), "bias": None}
      >>> tx = so.muonh(0.1, groups=groups, other_learning_rate=1e-3)
      >>> params = {"kernel": 5 * jnp.eye(2), "bias": jnp.zeros(2)}
      >>> grads = {"kernel": jnp.array([[0., 1.], [1., 0.]]), "bias": jnp.ones(2)}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(f"{jnp.linalg.norm(optax.apply_updates(params, updates)['kernel']):.4f}")
      7.0711

    References:
      Wen et al., Hyperball, 2026 (MuonH); Jordan et al., Muon, 2024.
    """
    check_number("muonh", "momentum", momentum, below=1)
    _check_adam("muonh", b1, b2, eps)

    def dimensions(tree: Any) -> Any:
        return _matrices(groups, tree)[0]

    def labels(tree: Any) -> Any:
        return _matrices(groups, tree)[1]

    if bias_correction:
        muon = contrib.scale_by_muon(
            ns_steps=ns_steps, beta=momentum, weight_dimension_numbers=dimensions
        )
    else:
        muon = optax.chain(
            optax.trace(momentum, nesterov=True),
            contrib.scale_by_muon(
                ns_steps=ns_steps, beta=0.0, nesterov=False, weight_dimension_numbers=dimensions
            ),
        )
    direction = optax.partition({"muon": muon, "adam": optax.scale_by_adam(b1, b2, eps)}, labels)
    return hyperball_as("muonh", direction, learning_rate, groups, other_learning_rate)


def _check_adam(who: str, b1: Any, b2: Any, eps: Any) -> None:
    check_number(who, "b1", b1, below=1)
    check_number(who, "b2", b2, below=1)
    check_number(who, "eps", eps)


def _matrices(groups: Groups, tree: Any) -> tuple[Any, Any]:
    """Muon's axes for each leaf with a group, and which direction each leaf takes.

    Raises:
      ValueError: If a leaf with a group has no matrix.
    """
    leaves = _trees.visible_leaves(tree)
    axes: list[Any] = [None if leaf.value is None else False for leaf in leaves]
    labels: list[Any] = [None if leaf.value is None else "adam" for leaf in leaves]
    for i, group in (each for unit in radial_units(groups, tree) for each in unit.items()):
        axes[i], labels[i] = _matrix(leaves[i], group), "muon"
    treedef = _trees.flatten(tree)[1]
    return treedef.unflatten(axes), treedef.unflatten(labels)


def _matrix(leaf: _trees.Leaf, group: RadialGroup) -> contrib.MuonDimensionNumbers:
    ndim = leaf.value.ndim
    summed = [axis for axis in range(ndim) if axis not in group.axes(ndim)]
    if ndim == 2 and len(summed) == 1:
        summed = [0, 1]
    if len(summed) != 2:
        raise ValueError(
            f"muonh: {leaf.path} of shape {leaf.value.shape}: expected a group of two axes for "
            f"Muon, found {len(summed)} beside the axes {group.axes(ndim)} that index groups; name "
            "axes of stacked matrices in index_axes, reshape the leaf, or give it no group."
        )
    return contrib.MuonDimensionNumbers(*summed)
