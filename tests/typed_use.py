"""A user's program, type-checked by mypy in `make lint` and by pyright in `make types`."""

# pyright: strict, reportMissingTypeStubs=false, reportUnnecessaryTypeIgnoreComment=true

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import optax
from flax import nnx

import spherical_optax as so


class Module(eqx.Module):
    kernel: Any


@dataclasses.dataclass
class Tree:
    kernel: Any


def is_matrix(leaf: jax.Array) -> bool:
    return leaf.ndim > 1


def nothing(leaf: jax.Array) -> None:
    return None


def function(params: Any) -> Any:
    return jax.tree.map(is_matrix, params)


def train(params: Any, batches: list[jax.Array], gradient: Callable[..., Any]) -> Any:
    groups = so.groups_by_path({"kernel": so.per_filter()})
    params = so.place_on_sphere(params, groups, "sqrt(d)")
    rate = optax.cosine_decay_schedule(0.1, 9)
    fixed = so.hyperball(optax.scale_by_adam(), rate, groups=groups, other=optax.adam(1e-3))
    tx = optax.chain(fixed, so.record_sphere(groups))
    state = tx.init(params)
    for batch in batches:
        updates, state = tx.update(gradient(params, batch), state, params)
        params = optax.apply_updates(params, updates)
    print(so.describe_groups(params, groups).splitlines())
    return params, state, sum(so.sphere_report(state, params, groups).values())


def right(fn: Callable[..., Any], params: dict[str, Any], state: nnx.State[Any, Any]) -> None:
    rules = so.groups_by_path({"conv": so.per_filter(axis=0), "norm": None, "kernel": True})
    so.adamsrt(0.1, groups=rules)
    so.adamsrt(0.1, groups=so.per_layer())
    so.adamsrt(0.1, groups=True)
    so.adamsrt(0.1, groups=None)
    so.adamsrt(0.1, groups={"conv": so.per_channel_block(4, joint="conv"), "layers": {0: None}})
    so.adamsrt(0.1, groups=[True, None])
    so.adamsrt(0.1, groups=(so.per_head(axis=-2), False))
    so.adamsrt(0.1, groups=Tree(so.per_filter()))
    so.adamsrt(0.1, groups=Module(None))
    so.adamsrt(0.1, groups=jax.tree.map(nothing, state))
    so.adamsrt(0.1, groups=state)
    so.adamsrt(0.1, groups=function)
    so.adamsrt(0.1, groups=lambda params: {"conv": True})
    so.adamsrt(0.1, groups=so.find_radial_groups(fn, params, explain=True))
    so.transport_moments(optax.trace(0.9), rules)
    so.describe_groups(params, rules)


def wrong() -> None:
    so.adamsrt(0.1, groups=3)  # type: ignore[arg-type]
    so.adamsrt(0.1, groups="conv")  # type: ignore[arg-type]
    so.adamsrt(0.1, groups={"conv"})  # type: ignore[arg-type]
    so.adamsrt(0.1, groups=so.per_filter)  # type: ignore[arg-type]
    so.adamsrt(0.1, groups=lambda: {"conv": True})  # type: ignore[arg-type,misc]
    so.project_radial("conv")  # type: ignore[arg-type]
    so.describe_groups({}, 0.5)  # type: ignore[arg-type]
    so.groups_by_path({"conv": "filter"})  # type: ignore[dict-item]
