"""The checks at `init` of optimizers that keep each group's radius."""

from collections.abc import Callable
from typing import Any

import numpy as np
import optax

from spherical_optax import _trees, geometry
from spherical_optax._checks.direction import check_direction, check_other
from spherical_optax._checks.values import check_values, warn_of_zeros
from spherical_optax.groups import Groups, joints_at_init, joints_of
from spherical_optax.transforms._center import off_center


def require_spheres(
    who: str, groups: Groups, *, center: bool = False, warn: bool = False
) -> optax.GradientTransformation:
    """Raises at `init` unless there is a group and every group has a direction, a norm above 0.

    With `center`, every group must also have mean 0. With `warn`, there is a warning about groups
    of norm 0 if their values are traced.
    """

    def check(params: optax.Params) -> None:
        leaves, joints = _trees.visible_leaves(params), joints_at_init(groups, params, who)
        if leaves and not joints:
            raise ValueError(
                f"{who}: expected a group for at least one parameter, found none among "
                f"{[leaf.path for leaf in leaves]}."
            )
        check_values(
            who,
            params,
            joints,
            lambda x, joint: geometry.norm(x, joint) == 0,
            "groups of norm above 0",
            "of norm 0. Initialize them to other values, or give the parameter no group",
        )
        if warn:
            warn_of_zeros(who, params, joints)
        if center:
            check_values(
                who,
                params,
                joints,
                off_center,
                "groups with mean 0, as center=True keeps them",
                "with another mean. Pass params through center_params(params, groups) first",
            )

    return _at_init(check)


def require_other(who: str, groups: Groups, other: Any) -> optax.GradientTransformation:
    """Raises at `init` if leaves without a group have no optimizer, or one that moves them upwards.

    The learning rate of the groups is an angle, which is too large for most other leaves.
    """

    def check(params: optax.Params) -> None:
        grouped = {i for joint in joints_of(groups, params) for i in joint}
        leaves = enumerate(_trees.visible_leaves(params))
        rest = [
            leaf.path
            for i, leaf in leaves
            if i not in grouped and leaf.value is not None and 0 not in np.shape(leaf.value)
        ]
        if rest and other is None:
            raise ValueError(
                f"{who}: expected other, an optimizer for the parameters without a group, {rest}, "
                "found None. Pass the optimizer that you had, as in other=optax.adamw(1e-3). The "
                "learning rate of the groups is an angle, too large for most other parameters."
            )
        if rest:
            check_other(who, other, groups, params)

    return _at_init(check)


def refuse_single_entries(
    who: str, groups: Groups, tx: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """Wraps a transformation so that `init` raises if a group has only one entry."""

    def init(params: optax.Params) -> optax.OptState:
        joints_at_init(groups, params, who)
        return tx.init(params)

    return optax.GradientTransformationExtraArgs(init, tx.update)


def require_direction(
    who: str, inner: optax.GradientTransformation, groups: Groups
) -> optax.GradientTransformation:
    """Raises at `init` if the updates of a transformation point against the gradients."""

    def check(params: optax.Params) -> None:
        if joints_of(groups, params):
            check_direction(who, inner, groups, params)

    return _at_init(check)


def _at_init(check: Callable[[Any], None]) -> optax.GradientTransformation:
    def init(params: optax.Params) -> optax.EmptyState:
        check(params)
        return optax.EmptyState()

    return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))
