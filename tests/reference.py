"""The optimizers in textbook form in float64 NumPy, with one vector per group.

The momentum is transported in parallel along the great circle from the old point to the new one.
The library never does this explicitly, because it knows only the new point.
"""

import numpy as np


def parallel_transport(m: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Transports m, which is tangent at x, to y along the great circle of their directions."""
    u, w = x / np.linalg.norm(x), y / np.linalg.norm(y)
    return m - (m @ w) / (1 + u @ w) * (u + w)


def tangent(m: np.ndarray, x: np.ndarray) -> np.ndarray:
    u = x / np.linalg.norm(x)
    return m - (m @ u) * u


def adam_family(
    x, grads, *, lr, b1, b2, eps, weight_decay, transport, on_unit_sphere=False, decoupled=False
):
    """The trajectory of AdamS; of AdamSRT with `transport`; of AdamG with both flags."""
    m, v, path = np.zeros_like(x), 0.0, [x]
    for t, g in enumerate(grads, start=1):
        g = g if decoupled else g + weight_decay * x
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * (g @ g)
        step = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        new = x - lr * step * (1 if on_unit_sphere else np.sqrt(x.size))
        new = new - lr * weight_decay * x if decoupled else new
        if on_unit_sphere:
            new = new / np.linalg.norm(new)
        if transport:
            ratio = 1 if on_unit_sphere else np.linalg.norm(x) / np.linalg.norm(new)
            m = ratio * parallel_transport(tangent(m, x), x, new)
            v = ratio**2 * v
        x = new
        path.append(x)
    return np.stack(path)


def sgdmrt(x, grads, *, lr, momentum, dampening, weight_decay):
    m, path = np.zeros_like(x), [x]
    for g in grads:
        m = momentum * m + (1 - dampening) * (g + weight_decay * x)
        new = x - lr * m
        ratio = np.linalg.norm(x) / np.linalg.norm(new)
        m = ratio * parallel_transport(tangent(m, x), x, new)
        x = new
        path.append(x)
    return np.stack(path)


def adam(grads, b1, b2, eps):
    """Adam's direction at each step."""
    m, v = 0, 0
    for t, g in enumerate(grads, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        yield m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)


def orthogonal(matrix):
    """Muon's five Newton-Schulz iterations on a matrix, which is transposed if it is tall."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def muon(grads, momentum, corrected=True):
    """Muon's direction at each step, for matrices in the last two axes."""
    m = 0
    for t, g in enumerate(grads, start=1):
        if corrected:  # as in `optax.contrib.muon`, with the momentum of the next step
            m = momentum * m + (1 - momentum) * g
            ahead = momentum * m / (1 - momentum ** (t + 1))
            ahead = ahead + (1 - momentum) * g / (1 - momentum**t)
        else:
            m = momentum * m + g
            ahead = momentum * m + g
        flat = ahead.reshape(-1, *ahead.shape[-2:])
        yield np.stack([orthogonal(each) for each in flat]).reshape(ahead.shape)


def length(x, axes):
    """The length of each group, in a shape that broadcasts against x; `axes` index the groups."""
    summed = tuple(i for i in range(x.ndim) if i not in [axis % x.ndim for axis in axes])
    return np.sqrt((x**2).sum(summed, keepdims=True))


def inner(x, y, axes):
    summed = tuple(i for i in range(x.ndim) if i not in [axis % x.ndim for axis in axes])
    return (x * y).sum(summed, keepdims=True)


def along_sphere(v, x, axes):
    """The part of v that is tangent at x, group by group."""
    return v - inner(v, x, axes) / inner(x, x, axes) * x
