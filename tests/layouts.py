"""Small parameter trees with groups of every kind."""

import jax
import jax.numpy as jnp
import numpy as np

import spherical_optax as so

JOINT = {"kernel": so.per_layer(joint="fc"), "bias": so.per_layer(joint="fc")}
BLOCKS = {name: so.per_channel_block(2, joint="conv") for name in ("kernel", "bias")}
CASES = {
    "filters": ({"w": (3, 3, 4, 6)}, {"w": so.per_filter()}),
    "layer": ({"w": (7, 5)}, {"w": so.per_layer()}),
    "heads": ({"w": (6, 3, 4)}, {"w": so.per_head(axis=-2)}),
    "stacked layers": ({"w": (2, 5, 4)}, {"w": so.RadialGroup((0, -1))}),
    "joint": ({"kernel": (4, 5), "bias": (5,)}, JOINT),
    "joint blocks": ({"kernel": (3, 3, 2, 6), "bias": (6,)}, BLOCKS),
    "in one pass, filters": ({"w": (3, 3, 256, 32)}, {"w": so.per_filter()}),
    "in one pass, layer": ({"w": (512, 160)}, {"w": so.per_layer()}),
    "in one pass, heads": ({"w": (1024, 8, 16)}, {"w": so.per_head(axis=-2)}),
    "in one pass, joint": ({"kernel": (1024, 96), "bias": (96,)}, JOINT),
    "alike": ({f"w{i}": (4, 3) for i in range(21)}, so.groups_by_path({"w": so.per_filter()})),
    "alike, joint": (
        {f"l{i}": {"kernel": (4, 3), "bias": (3,)} for i in range(5)},
        so.groups_by_path({r"(l\d)/": so.per_layer(joint=r"\1")}),
    ),
    "no group": ({"w": (4, 3), "gain": (5,)}, {"w": so.per_filter(), "gain": None}),
    "no group, one entry": ({"w": (4, 3), "gain": (5,)}, {"w": None, "gain": so.per_filter()}),
}


def tree_of(shapes, seed, dtype="float64"):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(0.5 + rng.normal(size=shape), dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
