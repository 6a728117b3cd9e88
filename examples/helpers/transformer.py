"""A small decoder-only transformer, and the groups of its weights for each optimizer.

Each block has RMSNorm before each branch, rotary positions, RMSNorm on queries and keys (QK-norm),
a gated MLP and no biases. `normalized=True` gives the nGPT variant, whose hidden states have
length 1. Kernels are matrices `(in, out)`. Heads are blocks of output channels.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import spherical_optax as so


@dataclasses.dataclass(frozen=True)
class Size:
    """The dimensions of a transformer."""

    layers: int
    width: int
    heads: int
    hidden: int
    context: int
    vocabulary: int
    normalized: bool = False
    dtype: str = "float32"  # of the computation; parameters are always float32


def unit(x: jax.Array) -> jax.Array:
    """Scales vectors along the last axis to length 1."""
    return x / jnp.linalg.norm(x.astype(jnp.float32), axis=-1, keepdims=True).astype(x.dtype)


def rotated(x: jax.Array) -> jax.Array:
    """Applies rotary position embeddings to an array (batch, time, heads, head size)."""
    time, half = x.shape[1], x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half) / half)
    angles = (jnp.arange(time)[:, None] * frequencies)[:, None]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Attention(nnx.Module):
    def __init__(self, size: Size, rngs: nnx.Rngs) -> None:
        linear = functools.partial(nnx.Linear, use_bias=False, dtype=size.dtype, rngs=rngs)
        self.q, self.k, self.v = (linear(size.width, size.width) for _ in range(3))
        self.o = linear(size.width, size.width)
        norm = functools.partial(nnx.RMSNorm, size.width // size.heads, dtype=size.dtype, rngs=rngs)
        self.q_norm, self.k_norm = norm(), norm()
        self.heads = size.heads

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = (
            kernel(x).reshape(*x.shape[:2], self.heads, -1) for kernel in (self.q, self.k, self.v)
        )
        q, k = rotated(self.q_norm(q)), rotated(self.k_norm(k))
        return self.o(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))


class MLP(nnx.Module):
    def __init__(self, size: Size, rngs: nnx.Rngs) -> None:
        linear = functools.partial(nnx.Linear, use_bias=False, dtype=size.dtype, rngs=rngs)
        self.gate, self.up = linear(size.width, size.hidden), linear(size.width, size.hidden)
        self.down = linear(size.hidden, size.width)
        # Hidden states of length 1 have entries of about 1 / sqrt(width). A learned scale, which
        # starts at sqrt(width), undoes this.
        scale = size.width**0.5 if size.normalized else None
        self.scale = scale and nnx.Param(jnp.full(size.hidden, scale))

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = self.gate(x)
        if self.scale is not None:
            gate = gate * self.scale[...].astype(gate.dtype)
        return self.down(nnx.silu(gate) * self.up(x))


class Block(nnx.Module):
    def __init__(self, size: Size, rngs: nnx.Rngs) -> None:
        self.attention, self.mlp = Attention(size, rngs), MLP(size, rngs)
        norm = functools.partial(nnx.RMSNorm, size.width, dtype=size.dtype, rngs=rngs)
        self.attention_norm, self.mlp_norm = norm(), norm()

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class NormalizedBlock(nnx.Module):
    """A block of nGPT: moves x on the sphere by a learned amount towards each branch's output."""

    def __init__(self, size: Size, rngs: nnx.Rngs) -> None:
        self.attention, self.mlp = Attention(size, rngs), MLP(size, rngs)
        # Two arrays: if both parameters shared one, a step would donate its buffer twice.
        rates = [nnx.Param(jnp.full(size.width, 1 / size.layers)) for _ in range(2)]
        self.attention_rate, self.mlp_rate = rates

    def __call__(self, x: jax.Array) -> jax.Array:
        for branch, rate in ((self.attention, self.attention_rate), (self.mlp, self.mlp_rate)):
            x = unit(x + jnp.abs(rate[...]).astype(x.dtype) * (unit(branch(x)) - x))
        return x


class Transformer(nnx.Module):
    """Maps tokens (batch, time) to float32 logits (batch, time, vocabulary)."""

    def __init__(self, size: Size, rngs: nnx.Rngs) -> None:
        block = NormalizedBlock if size.normalized else Block
        self.embed = nnx.Embed(size.vocabulary, size.width, dtype=size.dtype, rngs=rngs)
        self.blocks = nnx.List([block(size, rngs) for _ in range(size.layers)])
        if not size.normalized:
            self.norm = nnx.RMSNorm(size.width, dtype=size.dtype, rngs=rngs)
        self.head = nnx.Linear(
            size.width, size.vocabulary, use_bias=False, dtype=size.dtype, rngs=rngs
        )
        self.logit_scale = (
            nnx.Param(jnp.full(size.vocabulary, size.width**0.5)) if size.normalized else None
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        x = x if self.logit_scale is not None else self.norm(x)
        logits = self.head(x).astype(jnp.float32)
        return logits if self.logit_scale is None else logits * self.logit_scale[...]


# One group per matrix, for AdamH and MuonH. Embedding, head and norm scales have no group.
MATRICES = so.groups_by_path({r"(q|k|v|o|gate|up|down)/kernel": so.per_layer()})
# One group per output neuron, for the rotational optimizers.
NEURONS = so.groups_by_path({r"(q|k|v|o|gate|up|down)/kernel": so.per_filter()})
# One group per vector along the width, for nGPT.
WIDTH = so.groups_by_path(
    {
        r"embedding|o/kernel|down/kernel": so.RadialGroup((0,)),
        r"kernel": so.per_filter(),
    }
)


def invariant(size: Size) -> so.Groups:
    """The radially invariant groups: each head of queries and keys, because of QK-norm."""
    return so.groups_by_path({r"(q|k)/kernel": so.per_channel_block(size.heads)})


def initialise(size: Size, seed: int) -> tuple[Any, Any]:
    """The graph definition, and the initial parameters as nested dictionaries of arrays."""
    graph, params = nnx.split(Transformer(size, nnx.Rngs(seed)), nnx.Param)
    params = nnx.to_pure_dict(params)
    return graph, so.place_on_sphere(params, WIDTH, 1.0) if size.normalized else params


def count(size: Size) -> int:
    """The number of parameters."""
    shapes = jax.eval_shape(lambda: initialise(size, 0)[1])
    return sum(x.size for x in jax.tree.leaves(shapes))
