"""Parameter shapes of known networks, and the groups of their weights."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

import spherical_optax as so

Shapes: TypeAlias = dict[str, Any]  # nested dictionaries of shapes
Name: TypeAlias = Literal["resnet18", "resnet50", "transformer"]


class Tree(NamedTuple):
    """The shapes of parameters, and their radially invariant groups."""

    shapes: Shapes
    groups: so.Groups


def _norm(features: int) -> Shapes:
    return {"scale": (features,), "bias": (features,)}


def _block(stem: Shapes, kernels: list[tuple[int, ...]]) -> Shapes:
    """Convolutions without bias, each followed by BatchNorm."""
    for i, shape in enumerate(kernels):
        stem |= {f"conv{i}": {"kernel": shape}, f"norm{i}": _norm(shape[-1])}
    return stem


def resnet18(classes: int = 10) -> Tree:
    """The ResNet18 for 32x32 images, with 11 million parameters."""
    shapes = _block({}, [(3, 3, 3, 64)])
    width = 64
    for stage, features in enumerate((64, 128, 256, 512)):
        for block in range(2):
            kernels = [(3, 3, width, features), (3, 3, features, features)]
            if width != features:
                kernels.append((1, 1, width, features))
            shapes[f"stage{stage}_block{block}"] = _block({}, kernels)
            width = features
    shapes["head"] = {"kernel": (width, classes), "bias": (classes,)}
    return Tree(shapes, so.groups_by_path({r"conv\d/kernel": so.per_filter()}))


def resnet50(classes: int = 1000) -> Tree:
    """The ResNet50 for ImageNet, with 25 million parameters."""
    shapes = _block({}, [(7, 7, 3, 64)])
    width = 64
    for stage, (features, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            kernels = [
                (1, 1, width, features),
                (3, 3, features, features),
                (1, 1, features, 4 * features),
            ]
            if block == 0:
                kernels.append((1, 1, width, 4 * features))
            shapes[f"stage{stage}_block{block}"] = _block({}, kernels)
            width = 4 * features
    shapes["head"] = {"kernel": (width, classes), "bias": (classes,)}
    return Tree(shapes, so.groups_by_path({r"conv\d/kernel": so.per_filter()}))


def transformer(
    layers: int = 12, width: int = 768, heads: int = 12, vocabulary: int = 50304
) -> Tree:
    """A decoder with 124 million parameters and QK-norm; heads of queries and keys are groups."""
    size = width // heads
    layer = {
        "query": {"kernel": (width, heads, size)},
        "key": {"kernel": (width, heads, size)},
        "value": {"kernel": (width, heads, size)},
        "out": {"kernel": (heads, size, width)},
        "norm_query": {"scale": (size,)},
        "norm_key": {"scale": (size,)},
        "norm_attention": {"scale": (width,)},
        "norm_mlp": {"scale": (width,)},
        "up": {"kernel": (width, 4 * width)},
        "down": {"kernel": (4 * width, width)},
    }
    shapes = {f"layer{i}": layer for i in range(layers)}
    shapes |= {"embedding": {"table": (vocabulary, width)}, "norm": {"scale": (width,)}}
    return Tree(shapes, so.groups_by_path({r"(query|key)/kernel": so.per_head(axis=-2)}))


TREES: dict[Name, Callable[[], Tree]] = {
    "resnet18": resnet18,
    "resnet50": resnet50,
    "transformer": transformer,
}


def arrays(shapes: Shapes, seed: int, dtype: Any = jnp.float32) -> Any:
    """Normal random arrays of these shapes, with a standard deviation of 0.05."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(0.05 * rng.standard_normal(shape, np.float32), dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def abstract(shapes: Shapes, dtype: Any = jnp.float32) -> Any:
    """Abstract arrays of these shapes, without values."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def count(shapes: Shapes) -> int:
    """The number of parameters."""
    leaves = jax.tree.leaves(shapes, is_leaf=lambda node: isinstance(node, tuple))
    return sum(int(np.prod(shape)) for shape in leaves)
