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
# # A ResNet, from Adam to AdamSRT
#
# A small residual network with BatchNorm learns scikit-learn's digits. First `optax.adam` trains
# all of it; then AdamSRT trains it, with the radially invariant filters as groups. You see which
# line changes, how to find the invariant parameters, and what to look at afterwards. It takes a
# minute on two cores, and needs `pip install ".[examples]"` in a clone.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import spherical_optax as so

digits = load_digits()
images = (digits.images[..., None] / 16).astype(np.float32)
x, x_test, y, y_test = train_test_split(
    images, digits.target, test_size=0.25, stratify=digits.target, random_state=0
)
x.shape, x_test.shape

# %% [markdown]
# ## The network
#
# The network has two residual blocks. A BatchNorm follows each 3x3 convolution and cancels the
# length of its filters.

# %%
conv = functools.partial(nnx.Conv, kernel_size=(3, 3), use_bias=False)


class Block(nnx.Module):
    def __init__(self, inside, outside, strides, rngs):
        self.conv1, self.norm1 = (
            conv(inside, outside, strides=strides, rngs=rngs),
            nnx.BatchNorm(outside, rngs=rngs),
        )
        self.conv2, self.norm2 = (
            conv(outside, outside, rngs=rngs),
            nnx.BatchNorm(outside, rngs=rngs),
        )
        self.shortcut = nnx.Conv(inside, outside, (1, 1), strides=strides, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nnx.Module):
    def __init__(self, rngs):
        self.block1, self.block2 = Block(1, 16, 1, rngs), Block(16, 32, 2, rngs)
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(self.block2(self.block1(x)).mean(axis=(1, 2)))


# %% [markdown]
# ## What is invariant?
#
# `find_radial_groups` finds out by experiment. It scales every parameter, filter by filter, and
# tests whether the output changes. `fn` is the forward pass in training mode, as a function of the
# parameters.

# %%
model = ResNet(nnx.Rngs(0))
graph, params, rest = nnx.split(model, nnx.Param, ...)
fn = lambda params, x: nnx.merge(graph, params, rest, copy=True)(x)
found = so.find_radial_groups(fn, params, x[:16])
print(so.describe_groups(params, found))

# %% [markdown]
# The four 3x3 convolutions have one group per output channel. The shortcuts have none, because
# nothing normalizes their outputs. In a program, write the result down as a rule and check it once:

# %%
groups = so.groups_by_path({r"conv\d/kernel": so.per_filter()})
so.check_radial_groups(fn, params, groups, x[:16])

# %% [markdown]
# ## Before and after
#
# Only the line with the optimizer changes. A recorder at the end of the chain stores the radius and
# the angle per step of every filter in the state. It does not change the updates.

# %%
EPOCHS, BATCH = 15, 64
steps = EPOCHS * (len(x) // BATCH)
schedule = optax.cosine_decay_schedule(1e-2, steps)
optimizers = {
    "adam": optax.adam(schedule),
    "adamsrt": so.adamsrt(schedule, groups=groups),
}


@nnx.jit
def train_step(model, optimizer, x, y):
    def loss_fn(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def accuracy(model, x, y):
    return (model(x).argmax(axis=-1) == y).mean()


def train(tx, seed=0):
    model = ResNet(nnx.Rngs(seed))
    tx = so.chain(tx, so.record_sphere(groups))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    rng, history = np.random.default_rng(seed), []
    for _ in range(EPOCHS):
        order = rng.permutation(len(x))[: len(x) // BATCH * BATCH].reshape(-1, BATCH)
        losses = [train_step(model, optimizer, x[batch], y[batch]) for batch in order]
        report = so.sphere_report(optimizer, nnx.state(model, nnx.Param), groups)
        model.eval()
        test = accuracy(model, x_test, y_test)
        model.train()
        history.append(report | {"loss": float(np.mean(losses)), "accuracy": float(test)})
    return optimizer, history


runs = {name: train(tx) for name, tx in optimizers.items()}
for name, (_, history) in runs.items():
    print(f"{name}: test accuracy {100 * history[-1]['accuracy']:.2f} %")

# %% [markdown]
# ## What to look at
#
# Under Adam, filters grow. One cause is momentum: once the weights have moved, momentum that was
# tangent points outwards. AdamSRT transports the momentum, and filters grow less. The network
# itself only notices the angle of each step.

# %%
panels = {
    "loss": "training loss (nats)",
    "accuracy": "test accuracy",
    "sphere/block2/conv2/kernel/radius_mean": "mean radius, block2/conv2",
    "sphere/block2/conv2/kernel/angle_mean": "mean angle per step (rad), block2/conv2",
}
_, axes = plt.subplots(2, 2, figsize=(7.5, 6), layout="constrained")
for ax, (key, label) in zip(axes.flat, panels.items(), strict=True):
    for name, (_, history) in runs.items():
        ax.plot(range(1, EPOCHS + 1), [epoch[key] for epoch in history], label=name)
    ax.set(xlabel="epoch", ylabel=label)
    ax.grid(alpha=0.3)
for ax in (axes[0, 0], axes[1, 1]):
    ax.set_yscale("log")
axes[0, 0].legend()
plt.show()


# %% [markdown]
# ## The state
#
# AdamSRT has one second moment per filter, where Adam has one per entry. Its state is half as large
# as Adam's.


# %%
def size(tx):
    state = jax.eval_shape(tx.init, jax.tree.map(jnp.asarray, params))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


print({name: f"{size(tx):,} bytes" for name, tx in optimizers.items()})

# %% [markdown]
# With one seed and 450 test images, the differences are within noise.
# [What is known](../evidence.md) has larger runs. Next: [a transformer](transformer.py), or
# [what good curves look like](reading.py).
