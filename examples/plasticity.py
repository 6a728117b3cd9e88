"""Does a network keep learning when its data change, and what does a fixed radius do for it?

A norm follows each kernel but the last. The length of such a kernel only sets the effective
learning rate. Without decay the lengths grow from task to task, and the network rotates its weights
less and less. Settings and hypotheses were fixed before the first long run.

Settings, on scikit-learn's digits. Kernels that a norm follows are trained by the optimizers that
are compared, all other parameters by Adam at 1e-3.

    memory       512 digits with random labels, and new labels in each of 40 tasks of 150 full-batch
                 steps. The network has two hidden layers of 64 units with LayerNorm. The outcome is
                 the training loss at the end of a task, mean over the last ten.
    permuted     1000 digits. The pixels have a new order in each of 40 tasks of 250 steps of 64
                 images. The network is the same. The outcome is the accuracy on 797 other digits,
                 mean over the last ten tasks. Permutations, and not rotations, because there are
                 enough of them, and all are equally hard.
    convolution  The same for 20 tasks, with three convolutions and BatchNorm. The outcome is the
                 accuracy in evaluation mode, mean over the last five tasks. The table also has the
                 accuracy with batch statistics.
    warm_start   500 digits for 2000 steps, then 1000 for 2000 more, with the first network. The
                 rates fall to 0 along a cosine in each half. The outcome is the test accuracy at
                 the end. The table also has the accuracy of training afresh, with all 1000 digits
                 for 2000 steps, minus the outcome, for the same seeds and rates.

Each optimizer has twelve settings: rates, or rates and decays. Two seeds choose one of them by the
mean outcome. Ten others are reported, with 95 % intervals of Student's t, also for differences seed
by seed. "As well as" means that the interval of the difference ends before 0.1 nats, or half a
percent of accuracy, in disfavor. "Worse" means that the whole interval is in disfavor.

H1: where data change, a fixed angle at a fixed radius keeps a network learning as well as the best
decay does, and Adam, SGD and Muon without decay do not. H1 holds in a setting where adamh does as
well as adamw, muonh as well as muon_decay, adam and sgd are worse than adamw, and muon is worse
than muon_decay.
H2: one number for all. H2 holds for muonh (and for adamh) in a setting where, at the angle chosen
in `memory`, it does as well as the better of adamw and muon_decay, by the seeds that choose.

Every run leaves a file in `runs/`: if you stop the program and start it again, it continues. At the
end it prints a table, and writes `results.json`, `why.png` and `rates.png`.

    python examples/plasticity.py --preset small              # at most half an hour on two cores
    python examples/plasticity.py                             # an hour
    python examples/plasticity.py --settings memory --optimizers muonh --rate 0.03 --seeds 1
    python examples/plasticity.py --help
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
import tyro
from flax import nnx
from helpers.classify import finite_loss, forward, shuffled, train_step
from helpers.contenders import CONTENDERS, Contender, Spheres
from helpers.intervals import half_interval
from helpers.options import check_options
from helpers.outputs import check_out, print_rows
from helpers.tasks import SETTINGS, Setting, Task
from matplotlib.figure import Figure

import spherical_optax as so

OTHER_LEARNING_RATE = 1e-3
SEARCH_SEED = 1000  # the first of the seeds that choose
MARGINS = {"loss": 0.1, "accuracy": 0.005}
SMALL = ("adam", "adamw", "muon", "muon_decay", "adamsrt", "adamh", "muonh", "adam_radius")
PATTERN = r"kernel\d/kernel"


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains networks on data that change, with many optimizers."""

    preset: Literal["small", "full"] = "full"
    """small: every other setting, one seed that chooses, three reported seeds, eight optimizers."""
    settings: tuple[str, ...] = tuple(SETTINGS)
    """Settings, one or several."""
    optimizers: tuple[str, ...] = ()
    """Optimizers, one or several. None: those of the preset."""
    seeds: int | None = None
    """Number of reported runs, with the seeds 0, 1, ... None: that of the preset."""
    search_seeds: int | None = None
    """Number of runs that choose, with seeds from 1000 on. None: that of the preset."""
    tasks: int | None = None
    """Tasks per run. None: that of the setting."""
    rate: float | None = None
    """One learning rate for all runs, without a search."""
    strength: float = 0.0
    """The strength for that rate: a decay, a pull, or the factor that shrinks the weights."""
    out: pathlib.Path = pathlib.Path("out/plasticity")
    """Directory for runs, results.json and figures."""


class Choice(NamedTuple):
    rate: float
    strength: float


def choices(contender: Contender, preset: str) -> list[Choice]:
    """The settings of an optimizer. The preset small has every other one."""
    every = itertools.product(contender.rates, contender.strengths)
    return [Choice(*each) for each in every][:: 2 if preset == "small" else 1]


def is_compared(tree: Any) -> Any:
    """Says which leaves are kernels that a norm follows."""
    path = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return jax.tree.map_with_path(lambda keys, _: bool(re.search(PATTERN, path(keys))), tree)


def make_optimizer(setting: Setting, contender: Contender, rate: Any, strength: Any) -> Any:
    """The contender for the kernels that are compared, Adam elsewhere, and a recorder."""
    spheres = Spheres(
        *(
            so.groups_by_path({PATTERN: group})
            for group in (so.per_layer(), so.per_filter(), setting.invariant)
        )
    )

    def schedule(peak: Any) -> optax.Schedule:
        def falling(count: jax.Array) -> jax.Array:
            part = (count % setting.steps) / setting.steps if setting.cosine else 0.0
            return peak * (1 + jnp.cos(jnp.pi * part)) / 2

        return falling

    compared = contender.make(schedule(rate), strength, spheres)
    other = optax.adam(schedule(OTHER_LEARNING_RATE))
    return so.chain(
        optax.partition({True: compared, False: other}, is_compared),
        so.record_sphere(spheres.layers),
    )


def make_run(setting: Setting, contender: Contender) -> Callable[..., dict[str, list[float]]]:
    """A function that trains on tasks. The seed sets weights, tasks and batches."""
    optimizer = functools.partial(make_optimizer, setting, contender)
    graph = nnx.graphdef(nnx.eval_shape(lambda: setting.network(nnx.Rngs(0))))

    @jax.jit
    def weights(key: jax.Array) -> tuple[Any, Any]:
        _, params, stats = nnx.split(setting.network(nnx.Rngs(key)), nnx.Param, nnx.BatchStat)
        return params, stats

    @jax.jit
    def start(choice: Choice, params: Any) -> Any:
        return optimizer(*choice).init(params)

    @jax.jit
    def learn(choice: Choice, variables: Any, train: Any, batches: jax.Array) -> Any:
        """All steps of a task; returns mean radius and angle over steps and kernels."""

        def step(variables: Any, batch: jax.Array) -> tuple[Any, jax.Array]:
            images, labels = (each[batch] for each in train)
            variables = train_step(graph, optimizer(*choice), variables, images, labels)
            kernels = jax.tree.leaves(optax.tree.get(variables[2], "sphere"))
            sphere = so.SphereMetrics(*jnp.stack(kernels, axis=1))
            return variables, jnp.stack([sphere.radius_after.mean(), sphere.step_angle.mean()])

        variables, path = jax.lax.scan(step, variables, batches)
        return variables, path.mean(axis=0)

    @jax.jit
    def test(variables: Any, data: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Loss and accuracy in evaluation mode, and accuracy with batch statistics."""
        params, stats, _ = variables
        loss, (_, accuracy) = forward(graph, params, stats, *data, train=False)
        _, (_, of_batch) = forward(graph, params, stats, *data, train=True)
        return loss, accuracy, of_batch

    @jax.jit
    def shrink(params: Any, fresh: Any, strength: Any) -> Any:
        return jax.tree.map(lambda x, new: strength * x + (1 - strength) * new, params, fresh)

    def run(choice: Choice, seed: int, tasks: int) -> dict[str, list[float]]:
        key = jax.random.key(seed)
        variables = (*(first := weights(key)), start(choice, first[0]))
        rng, history = np.random.default_rng([3, seed]), []
        for number, task in enumerate(setting.tasks(seed, tasks)):
            if number and contender.shrinks:
                fresh, _ = weights(jax.random.fold_in(key, number))
                variables = (shrink(variables[0], fresh, choice.strength), *variables[1:])
            batches = in_batches(rng, task, setting)
            variables, path = learn(choice, variables, task.train, batches)
            history.append([*map(float, (*test(variables, task.test), *path))])
        names = ("loss", "accuracy", "batch_accuracy", "radius", "angle")
        return dict(zip(names, map(list, zip(*history, strict=True)), strict=True))

    return run


def in_batches(rng: np.random.Generator, task: Task, setting: Setting) -> np.ndarray:
    """The images of each step (steps, batch), shuffled for each pass over the data."""
    images = len(task.train[0])
    batch = setting.batch or images
    passes = math.ceil(setting.steps / (images // batch))
    return np.concatenate([shuffled(rng, images, batch) for _ in range(passes)])[: setting.steps]


class Runs:
    """The results of finished runs, one file each. Missing runs are computed, one per core."""

    def __init__(self, out: pathlib.Path, progress: tqdm.tqdm) -> None:
        self.folder, self.progress = out / "runs", progress
        self.folder.mkdir(exist_ok=True)
        self.make = functools.cache(
            lambda setting, name: make_run(SETTINGS[setting], CONTENDERS[name])
        )

    def __call__(self, setting: str, name: str, keys: list[tuple[Choice, int, int]]) -> list[Any]:
        """The results of these choices, seeds and numbers of tasks."""
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            try:
                return list(pool.map(lambda key: self._one(setting, name, *key), keys))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _one(self, setting: str, name: str, choice: Choice, seed: int, tasks: int) -> Any:
        rate, strength = choice
        path = self.folder / f"{setting}-{tasks}-{name}-{rate:g}-{strength:g}-{seed}.json"
        self.progress.set_description(f"{setting}, {name}, {rate:g}")
        if not path.exists():
            result = self.make(setting, name)(choice, seed, tasks)
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(result) + "\n")
            unfinished.rename(path)
        self.progress.update()
        return json.loads(path.read_text())


def outcome(setting: Setting, result: Any) -> float:
    """The mean over the last tasks. A loss that is not finite counts as that of guessing."""
    values = result[setting.outcome][-setting.last :]
    return float(np.mean([finite_loss(x) if setting.outcome == "loss" else x for x in values]))


class Cell(NamedTuple):
    """An optimizer in a setting."""

    choice: Choice
    searched: dict[Choice, float]  # mean outcome of each choice, over the seeds that choose
    reported: list[Any]  # results of the seeds 0, 1, ...
    outcomes: np.ndarray  # of these
    beside: np.ndarray | None  # accuracies with batch statistics, or afresh minus outcome

    @property
    def found(self) -> float:
        return self.searched.get(self.choice, math.nan)


def measure(config: Config, runs: Runs, name: str, rival: str, choice: Choice | None) -> Cell:
    """Searches for a choice, unless one is given, and reports it for other seeds."""
    setting = SETTINGS[name]
    tasks = config.tasks or setting.number
    seeds, search_seeds = sizes(config)
    tried = [] if choice else choices(CONTENDERS[rival], config.preset)
    chosen_by = range(SEARCH_SEED, SEARCH_SEED + search_seeds)
    found = runs(name, rival, [(each, seed, tasks) for each in tried for seed in chosen_by])
    means = np.reshape([outcome(setting, each) for each in found], (len(tried), search_seeds)).mean(
        axis=1
    )
    if choice is None:
        choice = tried[np.argmin(means if setting.outcome == "loss" else -means)]
    reported = runs(name, rival, [(choice, seed, tasks) for seed in range(seeds)])
    outcomes, beside = np.array([outcome(setting, each) for each in reported]), None
    if name == "convolution":
        kept = setting._replace(outcome="batch_accuracy")
        beside = np.array([outcome(kept, each) for each in reported])
    elif name == "warm_start":
        afresh = runs(name, rival, [(choice, seed, 1) for seed in range(seeds)])
        beside = np.array([outcome(setting, each) for each in afresh]) - outcomes
    searched = dict(zip(tried, means.tolist(), strict=True))
    return Cell(choice, searched, reported, outcomes, beside)


def sizes(config: Config) -> tuple[int, int]:
    """The numbers of seeds that are reported, and that choose."""
    seeds, search_seeds = (3, 1) if config.preset == "small" else (10, 2)
    return config.seeds or seeds, config.search_seeds or search_seeds


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """The mean and Student's 95 % interval, which is infinite for one value."""
    mean, half = float(np.mean(values)), half_interval(values)
    return mean, mean - half, mean + half


def harm(setting: Setting, cell: Cell, other: Cell) -> tuple[float, float, float]:
    """How much worse it is than the other, seed by seed: mean and interval."""
    sign = 1 if setting.outcome == "loss" else -1
    return interval(sign * (cell.outcomes - other.outcomes))


def as_well(setting: Setting, cell: Cell, other: Cell) -> bool:
    return harm(setting, cell, other)[2] < MARGINS[setting.outcome]


def worse(setting: Setting, cell: Cell, other: Cell) -> bool:
    return harm(setting, cell, other)[1] > 0


def verdicts(name: str, cells: dict[str, Cell]) -> dict[str, dict[str, bool]]:
    """The statements of each hypothesis about this setting, for the optimizers that were run."""
    setting, found = SETTINGS[name], {"H1": {}, "H2": {}}
    for test, pairs in (
        (as_well, [("adamh", "adamw"), ("muonh", "muon_decay")]),
        (worse, [("adam", "adamw"), ("sgd", "adamw"), ("muon", "muon_decay")]),
    ):
        for one, other in pairs:
            if {one, other} <= set(cells):
                sentence = f"{one} {'as well as' if test is as_well else 'worse than'} {other}"
                found["H1"][sentence] = test(setting, cells[one], cells[other])
    rivals = [cells[each] for each in ("adamw", "muon_decay") if each in cells]
    if len(rivals) == 2:
        best = min(rivals, key=lambda cell: cell.found * (1 if setting.outcome == "loss" else -1))
        for one in ("muonh", "adamh"):
            same = cells.get(f"{one}, memory's angle", cells.get(one) if name == "memory" else None)
            if same is not None:
                found["H2"][one] = as_well(setting, same, best)
    return found


def reach(setting: Setting, cell: Cell) -> str:
    """The range of rates whose outcome in the search is near the best, at any strength."""
    if not cell.searched:
        return "-"
    sign = 1 if setting.outcome == "loss" else -1
    best = min(sign * value for value in cell.searched.values())
    near = [
        choice.rate
        for choice, value in cell.searched.items()
        if sign * value < best + MARGINS[setting.outcome]
    ]
    return f"{min(near):.2g} to {max(near):.2g}"


def percent(setting: Setting, value: float) -> str:
    return f"{value:.3f}" if setting.outcome == "loss" else f"{100 * value:.2f}"


def print_table(name: str, cells: dict[str, Cell]) -> None:
    setting = SETTINGS[name]
    show = functools.partial(percent, setting)
    unit = "loss (nats)" if setting.outcome == "loss" else "accuracy (%)"
    extra = {"convolution": "batch statistics", "warm_start": "afresh, less this"}.get(name)
    head = ["optimizer", "rate", "strength", unit, "95 % interval", "seed 0", "near its best"]
    table = [[*head, "length grew", *([extra] if extra else [])]]
    order = sorted(cells, key=lambda each: cells[each].outcomes.mean())
    for each in order if setting.outcome == "loss" else order[::-1]:
        cell = cells[each]
        mean, low, high = interval(cell.outcomes)
        ends = [result["radius"][-1] / result["radius"][0] for result in cell.reported]
        row = [each, f"{cell.choice.rate:.3g}", f"{cell.choice.strength:g}", show(mean)]
        row += [
            f"{show(low)} to {show(high)}" if len(cell.outcomes) > 1 else "-",
            show(cell.outcomes[0]),
            reach(setting, cell),
        ]
        row += [f"{np.mean(ends):.3g}"]
        if cell.beside is not None:
            mean, low, high = interval(cell.beside)
            row += [f"{show(mean)} ({show(low)} to {show(high)})"]
        table.append(row)
    print(f"\n{name}")
    print_rows(*table)
    for hypothesis, found in verdicts(name, cells).items():
        for sentence, holds in found.items():
            print(f"{hypothesis}: {sentence}: {'yes' if holds else 'no'}.")


def bands(ax: Any, x: Any, values: np.ndarray, **style: Any) -> None:
    """The mean over the seeds, and their range."""
    ax.plot(x, values.mean(axis=0), **style)
    ax.fill_between(x, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.15)


COLORS = {"adam": "#0072B2", "adamw": "#56B4E9", "adamh": "#D55E00", "muonh": "#117733"}
COLORS |= {"muon": "#CC79A7", "muon_decay": "#882255"}


def plot_why(name: str, cells: dict[str, Cell], path: pathlib.Path) -> None:
    """Plots outcome, lengths and angles over the tasks."""
    setting = SETTINGS[name]
    loss = setting.outcome == "loss"
    panels = {
        setting.outcome: "loss at the end of a task (nats)" if loss else "test accuracy (%)",
        "radius": "length of the kernels",
        "angle": "angle per step (rad)",
    }
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for ax, (key, label) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for rival in [each for each in ("adam", "adamw", "adamh", "muonh") if each in cells]:
            values = np.array([result[key] for result in cells[rival].reported])
            values = 100 * values if key == "accuracy" else values
            tasks = np.arange(1, values.shape[1] + 1)
            bands(ax, tasks, values, color=COLORS[rival], label=rival)
        ax.set_title(label, fontsize=10)
        ax.set_xlabel("task")
        ax.set_yscale("linear" if key == "accuracy" else "log")
        ax.grid(alpha=0.3)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=100)


def plot_rates(results: dict[str, dict[str, Cell]], path: pathlib.Path) -> None:
    """Plots the outcome of the search over the rate, at the best strength for each rate."""
    rows, columns = math.ceil(len(results) / 2), min(2, len(results))
    figure = Figure(figsize=(5 * columns + 1, 3.4 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax, (name, cells) in zip(axes.flat, results.items(), strict=False):
        sign = 1 if SETTINGS[name].outcome == "loss" else -1
        scale = 1 if sign == 1 else 100
        for rival, color in COLORS.items():
            searched = cells[rival].searched if rival in cells else {}
            rates = sorted({choice.rate for choice in searched})
            best = [
                sign
                * scale
                * min(sign * v for choice, v in searched.items() if choice.rate == rate)
                for rate in rates
            ]
            if rates:
                decays = len(searched) > len(rates)
                label = f"{rival}, best decay of each" if decays else rival
                style = "--" if decays else "-"
                ax.plot(rates, best, style, marker="o", ms=3, color=color, label=label)
        if sign == -1:  # a wrong angle can cost all accuracy, and hide the differences
            best = max(max(line.get_ydata()) for line in ax.lines)
            ax.set_ylim(max(ax.get_ylim()[0], best - 5), best + 0.3)
        ax.set_xscale("log")
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("learning rate, or angle (rad)")
        ax.set_ylabel("loss (nats)" if sign == 1 else "accuracy (%)")
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(results) :]:
        ax.set_axis_off()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=100)


def content(name: str, cells: dict[str, Cell]) -> dict[str, Any]:
    return {
        "optimizers": {
            rival: {
                "rate": cell.choice.rate,
                "strength": cell.choice.strength,
                "mean, low, high": interval(cell.outcomes),
                "outcomes": cell.outcomes.tolist(),
                "beside": None if cell.beside is None else cell.beside.tolist(),
                "searched": [[*choice, value] for choice, value in cell.searched.items()],
            }
            for rival, cell in cells.items()
        },
        "verdicts": verdicts(name, cells),
    }


def measure_all(config: Config, rivals: Iterable[str]) -> dict[str, dict[str, Cell]]:
    seeds, search_seeds = sizes(config)
    own = Choice(config.rate, config.strength) if config.rate is not None else None
    per_rival = seeds + (0 if own else search_seeds * 12 // (2 if config.preset == "small" else 1))
    results: dict[str, dict[str, Cell]] = {}
    # A warm start is compared with training afresh.
    runs_of = {name: per_rival + seeds * (name == "warm_start") for name in config.settings}
    with tqdm.tqdm(total=sum(runs_of.values()) * len(rivals), unit="run") as progress:
        runs = Runs(config.out, progress)
        for name in config.settings:
            cells = results[name] = {}
            for rival in rivals:
                cells[rival] = measure(config, runs, name, rival, own)
            for rival in ("muonh", "adamh"):
                found = results.get("memory", {}).get(rival)
                if found is not None and name != "memory" and own is None:
                    again = measure(config, runs, name, rival, found.choice)
                    cells[f"{rival}, memory's angle"] = again
    return results


def main(config: Config) -> None:
    everything = tuple(CONTENDERS) if config.preset == "full" else SMALL
    rivals = tuple(dict.fromkeys(config.optimizers or everything))
    check_options(
        *(
            ("--settings", each, f"some of {list(SETTINGS)}", each in SETTINGS)
            for each in config.settings
        ),
        *(
            ("--optimizers", each, f"some of {list(CONTENDERS)}", each in CONTENDERS)
            for each in rivals
        ),
        ("--seeds", config.seeds, "at least 1", config.seeds is None or config.seeds >= 1),
        (
            "--search-seeds",
            config.search_seeds,
            "at least 1",
            config.search_seeds is None or config.search_seeds >= 1,
        ),
        ("--tasks", config.tasks, "at least 1", config.tasks is None or config.tasks >= 1),
        (
            "--rate",
            config.rate,
            "a positive number",
            config.rate is None or 0 < config.rate < math.inf,
        ),
        ("--strength", config.strength, "0 or more", 0 <= config.strength < math.inf),
    )
    check_out(config.out, "results.json", "why.png", "rates.png")
    results = measure_all(config, rivals)
    for name, cells in results.items():
        print_table(name, cells)
    report = {name: content(name, cells) for name, cells in results.items()}
    device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    (config.out / "results.json").write_text(json.dumps(device | report, indent=1) + "\n")
    first = next(iter(results))
    plot_why(first, results[first], config.out / "why.png")
    plot_rates(results, config.out / "rates.png")
    print(f"Wrote results.json, why.png and rates.png to {config.out}.")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
