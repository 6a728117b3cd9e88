"""Two passes over the arrays of a joint: one for inner products, one for combinations.

The function of one group also *runs* twice. The first run is abstract and only records which inner
products the function asks for. The second run gets the values of these products.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from spherical_optax import geometry
from spherical_optax._engine.layout import per_entry, per_entry_in_groups
from spherical_optax._engine.state import per_leaf
from spherical_optax._engine.step import NOT_PER_LEAF
from spherical_optax._engine.vector import Space, Vector
from spherical_optax._numerics import wide
from spherical_optax._xla import Request, compute_once, inner_products, materialize
from spherical_optax.groups import Joint, group_size

VECTORS = (per_entry, per_entry_in_groups)  # shapes of the state that a step sees as vectors
ROUNDING = 16  # the error that a sum of products may have, in units of eps


def two_passes(
    on_groups: Callable[[Vector, Vector, Any], tuple[Vector, Any]],
    joint: Joint,
    shapes: list[Any],
    shared: list[Any],
    treedef: Any,
    made_before: bool,
    updates: dict[int, jax.Array],
    params: dict[int, jax.Array],
    *fields: dict[int, jax.Array],
) -> list[dict[int, jax.Array]]:
    """The new updates and fields of a joint.

    For each part of the state, `shapes` has a `StateShape` or `NOT_PER_LEAF`. `shared` has the
    values of the parts that are not per leaf. `fields` are the other parts, each a dictionary by
    leaf number, like `updates`.
    """
    places = [place for place, shape in enumerate(shapes) if shape is not NOT_PER_LEAF]
    own = dict(zip(places, fields, strict=True))
    names = {place: str(place) for place in places if shapes[place] in VECTORS}
    arrays = {"update": updates, "point": params}
    arrays |= {name: own[place] for place, name in names.items()}
    given = list(shared)
    for place in own.keys() - names.keys():
        given[place] = next(iter(own[place].values()))

    def run(space: Space) -> tuple[Vector, list[Any]]:
        vectors = {name: Vector({name: 1}, space) for name in arrays}
        state = [
            vectors[names[place]] if place in names else value for place, value in enumerate(given)
        ]
        update, new = on_groups(vectors["update"], vectors["point"], treedef.unflatten(state))
        return update, treedef.flatten_up_to(new)

    space, wanted = _asked(run, arrays, joint)
    order = list(dict.fromkeys(name for pair in wanted for name in pair))
    if made_before and "update" in order:
        arrays["update"] = {i: materialize(w) for i, w in updates.items()}
    pairs = [(order.index(i), order.index(j)) for i, j in wanted]
    request = Request([arrays[name] for name in order], pairs, joint)
    sums = inner_products(request) if pairs else []
    products = dict(zip(wanted, sums, strict=True))

    def product(*pair: str) -> Any:
        if pair not in products:
            raise TypeError(
                f"expected a step to ask for the same inner products in both runs, found {pair} in "
                "the second run only. The products asked for must not depend on values of arrays."
            )
        return products[pair]

    update, new = run(space(product=product))
    if any(new[place] is not given[place] for place in range(len(shapes)) if place not in own):
        raise TypeError(
            "expected a step to keep the parts of its state that are not per leaf as `prepare` "
            "returned them, found changed ones. Change them in `prepare`."
        )

    made: dict[Any, Any] = dict(arrays)
    for vector, parts in _coefficients([update, *(new[place] for place in names)]).items():
        made[vector] = _combination([(made[part], value) for part, value in parts.items()], joint)

    def like(leaves: dict[int, jax.Array], vector: Vector) -> dict[int, jax.Array]:
        return {i: x.astype(leaves[i].dtype) for i, x in made[vector].items()}

    return [
        like(updates, update),
        *(
            like(own[place], new[place])
            if place in names
            else own[place]
            if new[place] is given[place]
            else per_leaf(new[place], joint, own[place])
            for place in places
        ),
    ]


def _asked(
    run: Callable[[Space], Any], arrays: dict[str, Any], joint: Joint
) -> tuple[Callable[..., Space], list[tuple[str, ...]]]:
    """The space of a joint's arrays without its products, and the products that a run asks for."""
    infos = {name: [jnp.finfo(x.dtype) for x in each.values()] for name, each in arrays.items()}
    like = jax.eval_shape(lambda x: geometry.norm(x, joint), arrays["point"])
    kept = max(float(info.eps) for name in infos if name != "point" for info in infos[name])
    space = functools.partial(
        Space,
        size=group_size(joint, arrays["point"]),
        ndim=len(like.shape),
        lost=max(ROUNDING * float(jnp.finfo(like.dtype).eps), kept**2),
        dtype=min(infos["point"], key=lambda info: info.bits).dtype,
    )
    wanted: dict[tuple[str, ...], None] = {}

    def tried(one: jax.Array) -> tuple[()]:
        def product(*pair: str) -> jax.Array:
            wanted[pair] = None
            return one

        run(space(product=product))
        return ()

    jax.eval_shape(tried, like)
    return space, list(wanted)


def _coefficients(vectors: Iterable[Vector]) -> dict[Vector, dict[Any, Any]]:
    """The parts of each vector with their final coefficients.

    A stored vector that is a part of another vector comes before it.
    """
    parts_of: dict[Vector, dict[Any, Any]] = {}

    def visit(vector: Vector) -> None:
        for part in vector.parts:
            if isinstance(part, Vector):
                visit(part)
        parts_of[vector] = dict(vector.parts)

    for vector in vectors:
        visit(vector)
    places = [
        (vector, part)
        for vector, parts in parts_of.items()
        for part, value in parts.items()
        if isinstance(value, jax.Array) and value.ndim == vector.space.ndim
    ]
    if places:
        values = [parts_of[vector][part] for vector, part in places]
        dtype = jnp.result_type(*values)
        finals = compute_once([jnp.asarray(value, dtype) for value in values])
        for (vector, part), value in zip(places, finals, strict=True):
            parts_of[vector][part] = value
    return parts_of


def _combination(terms: list[tuple[Any, Any]], joint: Joint) -> dict[int, jax.Array]:
    """The sum of arrays times coefficients, each one number or one number per group."""
    total: dict[int, Any] = {}
    for arrays, coefficient in terms:
        for i, group in joint.items():
            term = wide(arrays[i])
            if not (isinstance(coefficient, int) and coefficient == 1):
                value = jnp.asarray(coefficient, term.dtype)
                term = term * (geometry.spread(value, term, group) if value.ndim else value)
            total[i] = total[i] + term if i in total else term
    return total
