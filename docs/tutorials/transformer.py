# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A transformer, from AdamW to AdamH
#
# A small decoder with RMSNorm and QK-norm learns a text byte by byte. First AdamW trains it. Then
# AdamH trains it with its matrices on spheres: their learning rate is an angle, and weight decay
# has no effect on them. The tutorial takes a minute on two cores, and needs
# `pip install ".[examples]"` in a clone.
#
# The [first choices](../which.md) for a transformer are `muonh` and `rotational_adamw`, because
# AdamH was worse than AdamW on our [language model](../language.md). `muonh` takes the place of
# `adamh` below, without `b2`. `rotational_adamw` has no `other`, and takes the rate and the decay
# of AdamW.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn import datasets

import spherical_optax as so

loaders = ("iris", "digits", "wine", "breast_cancer", "diabetes", "linnerud")
text = "\n".join(getattr(datasets, f"load_{name}")().DESCR for name in loaders)
tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
print(f"{len(tokens):,} bytes, such as {text[:60]!r}")

# %% [markdown]
# ## The network

# %%
WIDTH, HEADS, LAYERS, CONTEXT = 64, 4, 2, 64


class Block(nnx.Module):
    def __init__(self, rngs):
        linear = lambda a, b: nnx.Linear(a, b, use_bias=False, rngs=rngs)
        self.q, self.k, self.v, self.o = (linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)
        self.norm1, self.norm2 = (nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.q_norm, self.k_norm = (nnx.RMSNorm(WIDTH // HEADS, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        h = self.norm1(x)
        split = lambda y: y.reshape(*y.shape[:-1], HEADS, -1)
        q, k = self.q_norm(split(self.q(h))), self.k_norm(split(self.k(h)))
        y = jax.nn.dot_product_attention(q, k, split(self.v(h)), is_causal=True)
        x = x + self.o(y.reshape(x.shape))
        return x + self.down(nnx.relu(self.up(self.norm2(x))))


class Decoder(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(256, WIDTH, rngs=rngs)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (CONTEXT, WIDTH)))
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 256, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x) + self.position[: x.shape[-1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


# %% [markdown]
# ## Which matrices?
#
# Only the kernels of queries and keys are radially invariant, one group per head, because of the
# QK-norm. `find_radial_groups` confirms this:

# %%
model = Decoder(nnx.Rngs(0))
graph, params = nnx.split(model, nnx.Param)
fn = lambda params, x: nnx.merge(graph, params, copy=True)(x)
batch = jnp.asarray(tokens[: 2 * CONTEXT].reshape(2, CONTEXT))
print(so.describe_groups(params, so.find_radial_groups(fn, params, batch)))

# %% [markdown]
# Optimizers with a fixed radius are used on *all* matrices of the blocks, invariant or not. For a
# matrix that is not invariant, the sphere is a choice: the matrix rotates at the rate that you set.
# The gains of the norms compensate for the fixed lengths. AdamH has one sphere per matrix:

# %%
groups = so.groups_by_path({r"blocks/\d+/(q|k|v|o|up|down)/kernel": so.per_layer()})

# %% [markdown]
# ## Before and after
#
# AdamW has a learning rate lr and a weight decay wd. For the matrices, AdamH has one number: the
# angle per step in radians. Embedding, head and gains keep their AdamW. A starting angle is
# sqrt(lr wd), here sqrt(3e-3 x 0.1) = 0.017.

# %%
STEPS = 250
down_from = lambda peak: optax.warmup_cosine_decay_schedule(0.0, peak, 20, STEPS)
adamw = optax.adamw(down_from(3e-3), b2=0.99, weight_decay=0.1)
adamh = so.adamh(down_from(0.017), b2=0.99, groups=groups, other=adamw)
optimizers = {"adamw": adamw, "adamh": adamh}


@nnx.jit
def train_step(model, optimizer, tokens):
    def loss_fn(model):
        logits = model(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


def train(tx, seed=0):
    model = Decoder(nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, so.chain(tx, so.record_sphere(groups)), wrt=nnx.Param)
    rng, losses, reports = np.random.default_rng(seed), [], []
    for step in range(STEPS):
        starts = rng.integers(0, len(tokens) - CONTEXT, 16)
        windows = np.stack([tokens[start : start + CONTEXT] for start in starts])
        losses.append(train_step(model, optimizer, windows))
        if step % 10 == 9:
            reports.append(so.sphere_report(optimizer, nnx.state(model, nnx.Param), groups))
    return np.array(losses), reports


runs = {name: train(tx) for name, tx in optimizers.items()}
for name, (losses, _) in runs.items():
    print(f"{name}: loss of the last 20 steps {losses[-20:].mean():.3f} nats per byte")

# %% [markdown]
# ## What the spheres do
#
# Under AdamH every matrix rotates by the scheduled angle and keeps its radius. Under AdamW the
# angle depends on the matrix and on its current length.

# %%
matrices = [f"sphere/blocks/1/{name}/kernel" for name in ("q", "v", "up", "down")]
_, axes = plt.subplots(3, 1, figsize=(7, 9), layout="constrained")
for (name, (losses, reports)), style in zip(runs.items(), ("--", "-"), strict=True):
    axes[0].plot(np.convolve(losses, np.ones(10) / 10, "valid"), style, label=name)
    at = np.arange(10, STEPS + 1, 10)
    for color, path in enumerate(matrices):
        label = f"{name}, {path.split('/')[3]}"
        angles = [report[f"{path}/angle_mean"] for report in reports]
        axes[1].plot(at, angles, style, color=f"C{color}", label=label)
        radii = np.array([report[f"{path}/radius_mean"] for report in reports])
        axes[2].plot(at, radii / radii[0], style, color=f"C{color}")
axes[1].set_yscale("log")
for ax, label in zip(
    axes,
    ("loss (nats per byte)", "angle per step (rad)", "radius over that at step 10"),
    strict=True,
):
    ax.set(xlabel="step", ylabel=label)
    ax.grid(alpha=0.3)
axes[0].legend()
axes[1].legend(fontsize=9, ncols=2)
plt.show()

# %% [markdown]
# This is one seed and one text, without a search of the learning rates, so it does not rank the
# optimizers. To use Muon's directions on the same spheres, take `so.muonh`. The
# [recipes](../recipes.md) have nGPT and other optimizers, and a table of groups for the parameters
# of larger transformers. Next: [reading the sphere](reading.py).
