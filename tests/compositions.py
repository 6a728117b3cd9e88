"""Fused transforms, each with the equivalent composition."""

import optax

import spherical_optax as so

PAIRS = {
    "scale_by_adamsrt": (
        lambda groups: so.scale_by_adamsrt(0.8, 0.9, 1e-3, groups=groups),
        lambda groups: so.transport_moments(
            so.scale_by_adams(0.8, 0.9, 1e-3, groups=groups), groups
        ),
    ),
    "transported_trace": (
        lambda groups: so.transported_trace(0.8, groups=groups),
        lambda groups: so.transport_moments(optax.trace(0.8), groups),
    ),
}
