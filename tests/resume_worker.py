"""The program that test_resume.py kills: trains, saves every step, and resumes from the last save.

python tests/resume_worker.py DIRECTORY STEPS
"""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import spherical_optax as so

GROUPS = so.groups_by_path({"hidden/kernel": so.per_filter()})


def make_optimizer(steps):
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        so.adamsrt(optax.warmup_cosine_decay_schedule(0.0, 0.05, 3, steps), groups=GROUPS),
        so.record_sphere(GROUPS),
    )


def make_params():
    keys = jax.random.split(jax.random.key(0))
    return {
        "hidden": {"kernel": jax.random.normal(keys[0], (256, 256))},
        "head": {"kernel": jax.random.normal(keys[1], (256, 1))},
    }


def loss_fn(params, x):
    kernel = params["hidden"]["kernel"]
    hidden = jnp.tanh(x @ (kernel / jnp.linalg.norm(kernel, axis=0)))
    return jnp.mean((hidden @ params["head"]["kernel"] - jnp.sin(x[:, :1])) ** 2)


def main(directory, steps):
    tx = make_optimizer(steps)

    # Arguments are donated: a step must not overwrite arrays that are still being saved.
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, count):
        x = jax.random.normal(jax.random.fold_in(jax.random.key(1), count), (32, 256))
        updates, state = tx.update(jax.grad(loss_fn)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
    with ocp.CheckpointManager(directory / "checkpoints", options=options) as manager:
        params = make_params()
        state = tx.init(params)
        latest = manager.latest_step()
        if latest is not None:
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, (params, state))
            print(f"restoring {latest}", flush=True)
            params, state = manager.restore(latest, args=ocp.args.StandardRestore(target))
        for count in range(0 if latest is None else latest + 1, steps):
            print(f"step {count}", flush=True)
            params, state = step(params, state, count)
            manager.save(count, args=ocp.args.StandardSave((params, state)))
            print(f"saving {count}", flush=True)
    leaves = {
        jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path((params, state))
    }
    np.savez(directory / "final.npz", **leaves)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
