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
# # Reading the sphere
#
# This tutorial shows how to read radius, angle and the gradient's cosine, under any optimizer. It
# compares small runs: a healthy one, one without decay, one with a learning rate that is too large,
# one with a learning rate that is too small, and one with a wrong mask. It takes half a minute on
# two cores, and needs `pip install ".[examples]"` in a clone.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import spherical_optax as so

digits = load_digits()
x, y = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)
WIDTH, STEPS, BATCH = 32, 600, 128


def normalize(x):  # BatchNorm, in training mode
    return (x - x.mean(0)) * jax.lax.rsqrt(x.var(0) + 1e-5)


def forward(params, x):
    x = jax.nn.relu(normalize(x @ params["hidden1"]) + params["bias1"])
    x = jax.nn.relu(normalize(x @ params["hidden2"]) + params["bias2"])
    return x @ params["head"]


def start(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    draw = lambda key, a, b: jax.random.normal(key, (a, b)) / a**0.5
    return {
        "hidden1": draw(keys[0], 64, WIDTH),
        "bias1": jnp.zeros(WIDTH),
        "hidden2": draw(keys[1], WIDTH, WIDTH),
        "bias2": jnp.zeros(WIDTH),
        "head": draw(keys[2], WIDTH, 10),
    }


groups = so.groups_by_path({r"hidden\d": so.per_filter()})
so.check_radial_groups(forward, start(), groups, x[:32])

# %% [markdown]
# ## Recorders
#
# `record_gradient` comes first in a chain and sees the gradient. `record_sphere` comes last and
# sees the whole step. Neither changes an update. Both work with any optimizer, here plain AdamW.


# %%
def train(tx, groups=groups, seed=0):
    tx = so.chain(so.record_gradient(groups), tx, so.record_sphere(groups))

    @jax.jit
    def step(params, state, batch):
        def loss_fn(params):
            logits = forward(params, x[batch])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y[batch]).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params, rng, rows = start(seed), np.random.default_rng(seed), []
    state = tx.init(params)
    for _ in range(STEPS):
        batch = rng.choice(len(x), BATCH, replace=False)
        params, state, loss = step(params, state, batch)
        rows.append(so.sphere_report(state, params, groups) | {"loss": float(loss)})
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


healthy = train(optax.adamw(3e-3, weight_decay=1.0))
print(*healthy, sep="\n")

# %% [markdown]
# ## A healthy run, and the balance of decay and steps
#
# With weight decay, the angle per step approaches sqrt(2 lr wd (1 - b1) / (1 + b1)), whatever it
# was at first. This takes about 1 / (2 lr wd) steps. Here lr is the learning rate, wd the weight
# decay, and b1 the decay rate of Adam's first moment.

# %%
lr, wd, b1 = 3e-3, 1.0, 0.9
balance = (2 * lr * wd * (1 - b1) / (1 + b1)) ** 0.5
name = "sphere/hidden2"


def show(runs, keys, titles):
    _, axes = plt.subplots(len(keys), 1, figsize=(7, 2.6 * len(keys)), layout="constrained")
    for ax, key, title in zip(axes, keys, titles, strict=True):
        for label, run in runs.items():
            ax.plot(run[key], label=label, lw=1)
        ax.set(xlabel="step", ylabel=title)
        ax.grid(alpha=0.3)
    axes[0].legend()
    return axes


KEYS = ("loss", f"{name}/radius_mean", f"{name}/angle_mean")
TITLES = ("loss (nats)", "mean radius", "mean angle per step (rad)")
runs = {
    "lr 3e-3, decay 1": healthy,
    "lr 3e-3, no decay": train(optax.adamw(3e-3, weight_decay=0.0)),
}
axes = show(runs, KEYS, TITLES)
axes[2].axhline(balance, color="gray", ls=":", label="balance")
axes[2].set_yscale("log")
axes[2].legend()
plt.show()

# %% [markdown]
# Without decay the radius only grows, and the angle falls. The effective learning rate decays,
# although nobody scheduled it.
#
# ## Too large, too small
#
# At an angle near 1 radian, a few steps erase the direction of a group. At an angle below 1e-4 for
# the whole run, a layer stays where it started. Under AdamH the angle *is* the learning rate, so
# you know it before the run.

# %%
runs = {
    f"angle {angle:g}": train(so.adamh(angle, groups=groups, other=optax.adam(3e-3)))
    for angle in (1e-4, 1e-2, 1.0)
}
axes = show(runs, KEYS, TITLES)
axes[0].set_yscale("log")
axes[2].set_yscale("log")
plt.show()

# %% [markdown]
# ## A wrong mask
#
# The gradient of an invariant group is orthogonal to the group's weights: their cosine is zero up
# to rounding. The head is not invariant, because nothing normalizes its outputs. If the mask gives
# it groups, the cosine shows the error from the first step on.

# %%
wrong = so.groups_by_path({r"hidden\d|head": so.per_filter()})
run = train(optax.adamw(3e-3), wrong)
_, ax = plt.subplots(figsize=(7, 4), layout="constrained")
for leaf in ("hidden1", "hidden2", "head"):
    ax.plot(run[f"sphere/{leaf}/gradient_cosine_max"], label=leaf)
ax.set(xlabel="step", ylabel="largest |cosine| of gradient and weights", yscale="log")
ax.grid(alpha=0.3)
ax.legend()
plt.show()

# %% [markdown]
# `check_radial_groups` finds the same error before the first step, and names the parameter:

# %%
try:
    so.check_radial_groups(forward, start(), wrong, x[:32])
except ValueError as error:
    print(error)

# %% [markdown]
# [Watch it](../watch.md) writes the same numbers into TensorBoard, and explains each of them.
