"""What a type checker says of `groups`, held by `make lint`; nothing here is run."""

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


def function(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def right(fn: Callable[..., Any], params: dict[str, Any], state: nnx.State) -> None:
    rules = so.groups_by_path({"conv": so.per_filter(axis=0), "norm": None, "kernel": True})
    so.adamsrt(0.1, groups=rules)
    so.adamsrt(0.1, groups=so.per_layer())
    so.adamsrt(0.1, groups=True)
    so.adamsrt(0.1, groups=None)
    so.adamsrt(0.1, groups={"conv": so.per_channel_block(4, "conv"), "layers": {0: None}})
    so.adamsrt(0.1, groups=[True, None])
    so.adamsrt(0.1, groups=(so.per_head(-2), False))
    so.adamsrt(0.1, groups=Tree(so.per_filter()))
    so.adamsrt(0.1, groups=Module(None))
    so.adamsrt(0.1, groups=jax.tree.map(lambda leaf: None, state))
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
