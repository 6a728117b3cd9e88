"""Results as a table in the form of the published one, and as curves."""

import json
import math
import pathlib
import re
import statistics
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import scipy.stats
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from . import published
from .errors import stop
from .options import Plot, Table
from .training import LAYER_METRICS, RESULT

Result: TypeAlias = dict[str, Any]

# The fields of a cell that may differ within a column. All other fields are equal.
VARIED = ("optimizer", "learning_rate", "weight_decay", "b1", "b2", "seed")
TITLES = {
    "sgd": "SGD-M",
    "adam": "Adam",
    "adamw": "AdamW",
    "adamg": "AdamG",
    "adams": "AdamS",
    "adamsrt": "AdamSRT",
    "sgdmrt": "SGD-MRT",
    "hyperball": "Hyperball",
    "rotational_adamw": "rotational AdamW",
}
COLORS = dict(
    zip(
        published.OPTIMIZERS,
        ("#009E73", "#0072B2", "#56B4E9", "#000000", "#E69F00", "#D55E00", "#CC79A7", "#117733"),
        strict=False,
    )
) | {"rotational_adamw": "#332288"}


class Entry(NamedTuple):
    """One optimizer in one column: the runs of its best setting."""

    runs: list[Result]
    settings: int  # number of settings tried
    searched: bool  # whether there are runs of the search only

    @property
    def accuracies(self) -> list[float]:
        """Test accuracies in %, or validation accuracies if there are runs of the search only."""
        name = "validation_accuracy" if self.searched else "test_accuracy"
        return [100 * run[name] for run in self.runs]


class Column(NamedTuple):
    """All runs on the same data with the same network and protocol."""

    common: dict[str, Any]
    entries: dict[str, Entry]

    @property
    def title(self) -> str:
        return f"{self.common['data']} {self.common['model']}"

    @property
    def description(self) -> str:
        """The options that describe how the column was run."""
        return ", ".join(f"{name.replace('_', ' ')} {self.common[name]}" for name in SHOWN)


SHOWN = (
    "width",
    "protocol",
    "epochs",
    "schedule",
    "batch_size",
    "train_images",
    "augmentation",
    "batch_norm",
    "dtype",
)


def read_results(out: pathlib.Path) -> list[Result]:
    """The results of all finished runs."""
    paths = sorted(out.glob(f"*/{RESULT}"))
    if not paths:
        raise stop(f"--out: {out}", f"folders with {RESULT}", "none")
    results = []
    for path in paths:
        try:
            result = json.loads(path.read_text())
            cell = result["cell"]
            missing = {"test_accuracy", "validation_accuracy", "history", "role"} - result.keys()
            if missing | (set(VARIED) - cell.keys()):
                raise KeyError(*sorted(missing))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise stop(f"{path}", "the result of a run", repr(error)) from error
        results.append(result)
    return results


def mean_validation(runs: list[Result]) -> float:
    return statistics.mean(run["validation_accuracy"] for run in runs)


def columns(results: list[Result]) -> list[Column]:
    """The columns, with the setting of best mean validation accuracy for each optimizer.

    If an optimizer has runs of the search only, these are used.
    """
    found: dict[str, dict[str, dict[str, list[Result]]]] = {}
    for result in results:
        cell = result["cell"]
        common = json.dumps({k: v for k, v in cell.items() if k not in VARIED}, sort_keys=True)
        setting = json.dumps([cell[name] for name in VARIED[1:-1]])
        settings = found.setdefault(common, {}).setdefault(cell["optimizer"], {})
        settings.setdefault(setting, []).append(result)
    made = []
    for common, optimizers in sorted(found.items()):
        entries = {}
        for name in published.OPTIMIZERS:
            settings = optimizers.get(name, {})
            reported = [[r for r in runs if r["role"] == "report"] for runs in settings.values()]
            reported = [runs for runs in reported if runs]
            if settings:
                candidates = reported or list(settings.values())
                best = max(candidates, key=mean_validation)
                runs = sorted(best, key=lambda run: run["cell"]["seed"])
                entries[name] = Entry(runs, len(settings), not reported)
        made.append(Column(json.loads(common), entries))
    return made


def interval(values: list[float], confidence: float) -> tuple[float, float] | None:
    """The confidence interval of the mean (Student's t), `None` for a single value."""
    if len(values) < 2:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values))
    half = float(scipy.stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * error
    mean = statistics.mean(values)
    return mean - half, mean + half


def row(entry: Entry, column: Column, optimizer: Any, confidence: float) -> dict[str, Any]:
    values, cell = entry.accuracies, entry.runs[0]["cell"]
    key: Any = (column.common["data"], column.common["model"])
    there = published.RESULTS.get(optimizer, {}).get(key)
    bounds = interval(values, confidence)
    return {
        "optimizer": optimizer,
        "learning_rate": cell["learning_rate"],
        "weight_decay": cell["weight_decay"],
        "b2": cell["b2"],
        "settings_tried": entry.settings,
        "search_only": entry.searched,
        "seeds": [run["cell"]["seed"] for run in entry.runs],
        "per_seed": values,
        "mean": statistics.mean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "confidence_interval": bounds,
        "validation_mean": 100 * mean_validation(entry.runs),
        "published": there and there._asdict(),
    }


def number(mean: float, std: float | None) -> str:
    """Formats a mean and a standard deviation as the published table does: 95.10 (.04)."""
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ({std:.2f})".replace("(0.", "(.")


def measured(row: dict[str, Any]) -> str:
    text = f"{number(row['mean'], row['std'])}{'*' if row['search_only'] else ''}"
    if row["confidence_interval"]:
        low, high = row["confidence_interval"]
        text += f" [{low:.2f}, {high:.2f}]"
    return f"{text}, n={len(row['per_seed'])}"


def markdown(report: list[dict[str, Any]], confidence: float) -> str:
    """The table as Markdown, with a row per optimizer, and measured and published accuracies."""
    head = ["", *(text for each in report for text in (f"{each['title']}, here", "published"))]
    lines = [head, ["---"] * len(head)]
    for optimizer in published.OPTIMIZERS:
        cells = []
        for each in report:
            rows = {row["optimizer"]: row for row in each["rows"]}
            accuracy = published.RESULTS.get(optimizer, {}).get((each["data"], each["model"]))
            cells.append(measured(rows[optimizer]) if optimizer in rows else "-")
            cells.append(number(*accuracy) if accuracy else "-")
        if any(cell != "-" for cell in cells):
            lines.append([TITLES[optimizer], *cells])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = [
        f"Test accuracy in %: mean (sample standard deviation) [{100 * confidence:g} % confidence "
        "interval of the mean, Student's t], n seeds. Published: mean (std), runs not stated.",
        "If several settings were tried: the one of best mean validation accuracy.",
    ]
    if any(row["search_only"] for each in report for row in each["rows"]):
        notes.append("* Validation accuracy of the search: no run has been tested yet.")
    for each in report:
        settings = ["optimizer | learning rate | decay | b2 | settings tried", "--- | " * 4 + "---"]
        settings += [
            f"{TITLES[r['optimizer']]} | {r['learning_rate']:g} | {r['weight_decay']:g} | "
            f"{'-' if r['optimizer'] in ('sgd', 'sgdmrt') else format(r['b2'], 'g')} | "
            f"{r['settings_tried']}"
            for r in each["rows"]
        ]
        lines_of = "\n".join(f"| {line} |" for line in settings)
        notes.append(f"**{each['title']}**: {each['description']}.\n\n{lines_of}")
    return "\n\n".join([table, *notes]) + "\n"


def make_table(options: Table) -> None:
    if not 0 < options.confidence < 1:
        raise stop("--confidence", "a number in (0, 1)", options.confidence)
    report = [
        {
            "title": column.title,
            "description": column.description,
            **column.common,
            "rows": [
                row(entry, column, name, options.confidence)
                for name, entry in column.entries.items()
            ],
        }
        for column in columns(read_results(options.out))
    ]
    text = markdown(report, options.confidence)
    (options.out / "table.md").write_text(text)
    content = {"confidence": options.confidence, "columns": report}
    (options.out / "table.json").write_text(json.dumps(content, indent=1) + "\n")
    print(text)


def curves(entry: Entry, value: Any) -> np.ndarray:
    """A value after each epoch (columns) for each seed (rows)."""
    return np.array([[value(line) for line in run["history"]] for run in entry.runs], float)


def plot_column(column: Column, path: pathlib.Path) -> None:
    """Plots loss and accuracy in the first row, and the metrics of three layers below.

    The layers are the first, the middle and the last one.
    """
    layers = list(next(iter(column.entries.values())).runs[0]["history"][0]["layers"])
    layers = sorted(layers, key=in_order)
    chosen = [layers[0], layers[len(layers) // 2], layers[-1]]
    figure = Figure(figsize=(11, 12), layout="constrained")
    rows = 1 + len(LAYER_METRICS)
    axes = figure.subplots(rows, 3, sharex=True)
    labels = {"radius": "mean radius", "angle": "mean angle per step (rad)"}
    labels["effective learning rate"] = "effective learning rate"
    for name, entry in column.entries.items():
        run = entry.runs[0]["cell"]
        setting = f"{TITLES[name]}, {run['learning_rate']:g}, {run['weight_decay']:g}"
        style = "-" if name in ("adamsrt", "sgdmrt", "adams", "adamg") else "--"

        def draw(ax: Any, values: np.ndarray, label: str = "", *, of: str = name) -> None:
            epochs = np.arange(1, values.shape[1] + 1)
            line = "." if len(epochs) == 1 else style  # noqa: B023
            ax.plot(epochs, values.mean(0), line, color=COLORS[of], label=label)
            ax.fill_between(
                epochs, values.min(0), values.max(0), color=COLORS[of], alpha=0.15, lw=0
            )

        for ax, key in zip(axes[0], ("loss", "accuracy", "validation_accuracy"), strict=True):
            scale = 1 if key == "loss" else 100
            draw(ax, scale * curves(entry, lambda line, key=key: line[key]), setting)
        for row_axes, metric in zip(axes[1:], range(len(LAYER_METRICS)), strict=True):
            for ax, layer in zip(row_axes, chosen, strict=True):
                draw(
                    ax,
                    curves(entry, lambda line, at=layer, i=metric: line["layers"][at][i]),
                )
    titles = ("training loss (nats)", "training accuracy (%)", "validation accuracy (%)")
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_ylabel(title)
    axes[0, 0].set_yscale("log")
    for ax, layer in zip(axes[1], chosen, strict=True):
        ax.set_title(layer.removesuffix("/kernel"), fontsize=10)
    for row_axes, metric in zip(axes[1:], LAYER_METRICS, strict=True):
        row_axes[0].set_ylabel(labels[metric])
        for ax in row_axes:
            ax.set_yscale("log")
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    for ax in axes[-1]:
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    handles, names = axes[0, 0].get_legend_handles_labels()
    legend = {"loc": "outside lower center", "ncols": 3, "title": "optimizer, learning rate, decay"}
    figure.legend(handles, names, **legend)
    figure.suptitle(f"{column.title}: {column.description}", fontsize=9)
    figure.savefig(path, dpi=90)


def in_order(path: str) -> tuple[Any, ...]:
    """Sort key for the order in the network: the stem first, then by name and number."""
    parts = re.split(r"(\d+)", path)
    return (not path.startswith("stem"), *(int(p) if p.isdigit() else p for p in parts))


def make_plots(options: Plot) -> None:
    made = columns(read_results(options.out))
    for number, column in enumerate(made):
        name = f"{column.title.replace(' ', '-')}{f'-{number}' if len(made) > 1 else ''}.png"
        plot_column(column, options.out / name)
        print(f"Wrote {options.out / name}.")
