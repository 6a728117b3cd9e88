"""What optimizers that keep each group's radius check at `init`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import optax

from spherical_optax import _trees, geometry
from spherical_optax._checks.direction import check_direction
from spherical_optax._checks.values import check_values, warn_of_zeros
from spherical_optax.groups import Groups, joints_at_init, joints_of
from spherical_optax.transforms._center import off_center


def require_spheres(
    who: str, groups: Groups, *, center: bool = False, warn: bool = False
) -> optax.GradientTransformation:
    """Raises at `init` unless there are groups and each of them has a direction to turn.

    With `center` groups must be centred too. With `warn` it warns of groups of length 0 where
    their values are traced.
    """

    def check(params: optax.Params) -> None:
        leaves, joints = _trees.visible_leaves(params), joints_at_init(groups, params, who)
        if leaves and not joints:
            raise ValueError(
                f"{who}: expected a group for at least one leaf, found none among "
                f"{[leaf.path for leaf in leaves]}."
            )
        check_values(
            who,
            params,
            joints,
            lambda x, joint: geometry.norm(x, joint) == 0,
            "groups of norm above 0",
            "of norm 0; initialise them otherwise, or give the leaf no group",
        )
        if warn:
            warn_of_zeros(who, params, joints)
        if center:
            check_values(
                who,
                params,
                joints,
                off_center,
                "centred groups, as center=True keeps them",
                "with a mean; pass the parameters through center_params(params, groups) first",
            )

    return _at_init(check)


def require_other(who: str, groups: Groups, other: Any) -> optax.GradientTransformation:
    """Raises at `init` if leaves without a group would be trained at an angle."""

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
                f"{who}: expected other, the optimizer of leaves without a group, {rest}, found "
                "None; the rate of the groups is an angle, and too much for most: pass the one "
                "that they had, as in other=optax.adamw(1e-3)."
            )

    return _at_init(check)


def refuse_single_entries(
    who: str, groups: Groups, tx: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """The same transformation, which raises at `init` if groups have one entry."""

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
