"""The lift: transformations of trees made of steps of one group.

It knows of trees, joint groups, blocks, dtypes and devices, so that steps need not, and goes over
the arrays twice: for the inner products that the steps ask for, and for the combinations that
they return. Neighbours in a `chain` are lifted together, and share the two passes.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax import _trees, geometry
from spherical_optax._sums import Remade, Wanted, again, each_once
from spherical_optax.groups import group_size
from spherical_optax.transforms._alike import map_units
from spherical_optax.transforms._foreign import foreign
from spherical_optax.transforms._pair import (
    aligned,
    as_dtype_of,
    check_type,
    no_params,
    pair,
    per_entry,
)
from spherical_optax.transforms._remade import stored, with_remade
from spherical_optax.transforms._span import OnGroup, Space, Step, Vector, shared
from spherical_optax.transforms._units import Unit, per_leaf, present

ROUNDING = 16  # units of rounding that a sum of products may be off by


class Lifted(optax.GradientTransformationExtraArgs):
    """A transformation that is a step in each group, and can be lifted with its neighbours."""

    step: Step


def lift(step: Step, alone: optax.GradientTransformation | None = None) -> Lifted:
    """The transformation that a step is.

    Args:
      step: The step.
      alone: The same transformation, with an update that is to be preferred where it is not
        lifted with neighbours.
    """
    kinds: list[Any]
    treedef: Any
    kinds, treedef = jax.tree.flatten(step.kinds)
    places = [place for place, kind in enumerate(kinds) if kind is not shared]

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        remade: dict[int, Remade] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        if step.kinds is not shared:
            check_type(step.who, state, type(step.kinds))
        before = pair(step.who, step.groups, params, updates, movable=step.movable).leaves[0]
        updates, state, on_group = step.begin(updates, state, params)
        fields = treedef.flatten_up_to(state)
        trees = [(fields[place], kinds[place]) for place in places]
        units, x, (after, *lists), unflatten = pair(
            step.who, step.groups, params, updates, *trees, movable=step.movable
        )

        def plan(unit: Unit, w: Any, x: Any, *parts: Any) -> Any:
            if remade is not None:  # made by a part of the same chain, and worth storing
                w = {i: stored(leaf, remade, unit[i]) for i, leaf in w.items()}
            given, arrays = list(fields), {"update": w, "point": x}
            for place, part in zip(places, parts, strict=True):
                given[place] = part[next(iter(unit))]
                if kinds[place] is per_entry:
                    arrays[str(place)] = part

            def run(space: Space) -> tuple[Vector, list[Any]]:
                vectors = {name: Vector({name: 1}, space) for name in arrays}
                state = [vectors.get(str(place), each) for place, each in enumerate(given)]
                result, new = on_group(
                    vectors["update"], vectors["point"], treedef.unflatten(state)
                )
                return result, treedef.flatten_up_to(new)

            def finish(sums: list[Any]) -> dict[int, Any]:
                products = dict(zip(wanted, sums, strict=True))
                result, found = run(space(product=lambda *pair: products[pair]))
                vectors = [result, *(each for each in found if isinstance(each, Vector))]
                made = _Made(dict(arrays), _coefficients(vectors), unit)
                new = [made.like(x, result)]
                for place, part in zip(places, parts, strict=True):
                    if kinds[place] is per_entry:
                        new.append(made.like(part, found[place]))
                    elif found[place] is given[place]:
                        new.append(part)
                    else:
                        new.append(per_leaf(found[place], unit, part))
                return {i: [each[i] for each in new] for i in unit}

            space, wanted = _asked(run, arrays, unit)
            names = list(arrays)
            pairs = [(names.index(i), names.index(j)) for i, j in wanted]
            return Wanted(list(arrays.values()), pairs, unit), finish

        units = present(units, before, params)
        for unit, found in map_units(plan, units, before, x, *lists):
            for i in unit:
                for leaves, leaf in zip((after, *lists), found[i], strict=True):
                    leaves[i] = leaf
        updates, *trees = unflatten(after, *lists)
        for place, tree in zip(places, trees, strict=True):
            fields[place] = tree
        return updates, treedef.unflatten(fields)

    lifted = Lifted(step.init, optax.with_extra_args_support(alone).update if alone else update)
    lifted.step = step
    return lifted


def _asked(
    run: Callable[[Space], Any], arrays: dict[str, Any], unit: Unit
) -> tuple[Callable[..., Space], list[tuple[str, ...]]]:
    """The space of a unit's arrays, but for its products, and those that a run asks for."""
    infos = {name: [jnp.finfo(x.dtype) for x in each.values()] for name, each in arrays.items()}
    like = jax.eval_shape(lambda x: geometry.norm(x, unit), arrays["point"])
    kept = max(float(info.eps) for name in infos if name != "point" for info in infos[name])
    space = functools.partial(
        Space,
        size=group_size(unit, arrays["point"]),
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


def _coefficients(vectors: Iterable[Vector]) -> dict[int, jax.Array]:
    """From the `id` of each coefficient per group, in vectors and those they store, to it."""
    found: dict[int, jax.Array] = {}

    def find(vectors: Iterable[Any]) -> None:
        for vector in vectors:
            if isinstance(vector, Vector):
                found.update((id(x), x) for x in vector.parts.values() if jnp.ndim(x))
                find(vector.parts)

    find(vectors)
    if not found:
        return {}
    dtype = jnp.result_type(*found.values())
    values = each_once([jnp.asarray(each, dtype) for each in found.values()])
    return dict(zip(found, values, strict=True))


class _Made(NamedTuple):
    """The arrays that vectors are.

    Attributes:
      arrays: From the name of an array, or a vector that was made, to it, by leaf number.
      coefficients: See `_coefficients`.
      unit: From leaf number to `RadialGroup`.
    """

    arrays: dict[Any, Any]
    coefficients: dict[int, jax.Array]
    unit: Unit

    def like(self, others: Any, vector: Vector) -> dict[int, Any]:
        """The arrays of a vector, of the dtypes of others."""
        return {i: each.astype(others[i].dtype) for i, each in self.of(vector).items()}

    def of(self, vector: str | Vector) -> dict[int, Any]:
        """The arrays of a vector; those of vectors that are stored are made once."""
        if vector not in self.arrays:
            total: dict[int, Any] = {}
            for part, coefficient in vector.parts.items():  # type: ignore[union-attr]
                arrays = self.of(part)
                for i, group in self.unit.items():
                    term = geometry.wide(again(arrays[i]))
                    if not (isinstance(coefficient, int) and coefficient == 1):
                        each = self.coefficients.get(id(coefficient), coefficient)
                        each = jnp.asarray(each, term.dtype)
                        term = term * (geometry.spread(each, term, group) if each.ndim else each)
                    total[i] = total[i] + term if i in total else term
            self.arrays[vector] = total
        return self.arrays[vector]


def chain(
    *parts: optax.GradientTransformation, who: str | None = None, needs_params: bool = True
) -> optax.GradientTransformationExtraArgs:
    """As `optax.chain`, with neighbours that can be lifted together in one lift.

    Args:
      *parts: Transformations, of ours and of others.
      who: The optimizer that this is, for messages.
      needs_params: Whether `update` needs them.
    """
    runs: list[list[Any]] = []
    for part in parts:
        last = runs[-1][-1] if runs else None
        if (
            isinstance(part, Lifted)
            and isinstance(last, Lifted)
            and part.step.groups is last.step.groups
            and part.step.movable == last.step.movable
        ):
            runs[-1].append(part)
        else:
            runs.append([part])
    joined = [
        lift(_in_turn([part.step for part in run])) if len(run) > 1 else run[0] for run in runs
    ]
    if len(joined) == 1 and who is None:
        return joined[0]
    who = who or "chain"
    last = max((n for n, run in enumerate(runs) if len(run) > 1), default=0)
    wrapped = [each if isinstance(each, Lifted) else foreign(who, each) for each in joined]

    def init(params: optax.Params) -> optax.OptState:
        return tuple(part.init(params) for part in parts)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None and needs_params:
            raise no_params(who)
        if len(state) != len(parts):
            raise ValueError(
                f"{who}: expected the states of {len(parts)} transformations, found "
                f"{len(state)}: it was made by another chain; call init of this one."
            )
        states: list[Any] = []
        remade: dict[int, Remade] | None = None
        for n, (run, tx) in enumerate(zip(runs, wrapped, strict=True)):
            update = functools.partial(tx.update, **extra_args)
            mine: Any = tuple(state[len(states) : len(states) + len(run)])
            if len(run) > 1:
                updates, mine = update(updates, mine, params, remade=remade)
            elif n < last:
                updates, mine, new = with_remade(update, updates, mine[0], params)
                remade = (remade or {}) | new
            else:
                updates, mine = update(updates, mine[0], params)
            states += mine if len(run) > 1 else [mine]
        if params is not None:
            leaves, back = aligned(who, params, updates)
            updates = back(list(map(as_dtype_of, leaves, _trees.flatten(params)[0])))
        return updates, tuple(states)

    return optax.GradientTransformationExtraArgs(init, update)


def _in_turn(steps: list[Step]) -> Step:
    """Several steps as one."""

    def init(params: Any) -> tuple[Any, ...]:
        return tuple(step.init(params) for step in steps)

    def begin(updates: Any, state: Any, params: Any) -> tuple[Any, Any, OnGroup]:
        states, functions = [], []
        for step, each in zip(steps, state, strict=True):
            if step.kinds is not shared:
                check_type(step.who, each, type(step.kinds))
            updates, new, on_group = step.begin(updates, each, params)
            states.append(new)
            functions.append(on_group)

        def on_groups(update: Vector, point: Vector, state: Any) -> tuple[Vector, Any]:
            states = []
            for on_group, each in zip(functions, state, strict=True):
                update, new = on_group(update, point, each)
                states.append(new)
            return update, tuple(states)

        return updates, tuple(states), on_groups

    kinds = tuple(step.kinds for step in steps)
    return Step(steps[0].who, steps[0].groups, init, kinds, begin, steps[0].movable)
