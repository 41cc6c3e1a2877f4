"""A study's numbers -> plots: accuracy against each cost, learning rates, learning curves, rank by alpha.

Every file of the same runs has the same bytes. Colours are those of Okabe and Ito (2008), which colour-blind people can
tell apart; a curve has a marker of its own besides.
"""

import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from plot_labels import Label, label_ends, place_labels
from study_page import Plot
from study_runs import Row, Run, Study
from study_statistics import mean_and_deviation, pareto_front
from study_tables import GIB, record

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
FRONT, BEATEN = "#0072B2", "#767676"
CURVES = 12  # more cannot be told apart; the best ones are drawn
DEPTH = 10.0  # percentage points below the best that a plot shows; what is lower is drawn at its foot
STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#e6e6e6", "axes.axisbelow": True, "axes.edgecolor": "#666666", "figure.dpi": 160,
    "text.parse_math": False,
}  # fmt: skip
FILES = (
    "accuracy_parameters.png", "accuracy_seconds.png", "accuracy_memory.png", "learning_rates.png",
    "learning_curves.png", "learning_curves_seconds.png", "rank_alpha.png",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# what all plots share


def plots(study: Study) -> list[Plot]:
    """The plots that the study has data for."""
    drawn = (
        cost_plot(study, "accuracy_parameters.png", "trainable", "trainable parameters"),
        cost_plot(study, "accuracy_seconds.png", "train_seconds", "training, minutes", unit=60),
        cost_plot(study, "accuracy_memory.png", "peak_memory_bytes", "peak memory, GiB", unit=GIB),
        rate_plot(study),
        curve_plot(study, "learning_curves.png", "step", "step"),
        curve_plot(study, "learning_curves_seconds.png", "train_seconds", "training, s"),
        rank_alpha_plot(study),
    )
    return [plot for plot in drawn if plot is not None]


@contextmanager
def _figure(title: str, width: float = 6, height: float = 4.5, rows: int = 1) -> Iterator[tuple[Figure, Any]]:
    """A figure without pyplot's global state, and its axes."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        axes[0].set_title(title)
        yield figure, axes


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})  # no version, no date
    return file.getvalue()


def _short(value: float) -> str:
    """``500 k``, ``3.7 M``."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _log_scale(axis: Any, values: Sequence[float], form: Callable[[float], str] = _short) -> None:
    """A logarithmic x axis with round ticks in full, and room for labels at both ends."""
    low, high = min(values), max(values)
    room = max((high / low) ** 0.12, 1.5)
    axis.set_xscale("log")
    axis.set_xlim(low / room, high * room)
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 100 else (1.0,)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))


def _percent_scale(axis: Any, values: Sequence[float], deviations: Sequence[float] = (0.0,)) -> float:
    """Limits for accuracies in percent. Returns the foot, at which everything lower is drawn."""
    high = max(values)
    foot = max(min(values), high - DEPTH)
    room = max(0.15 * (high - foot), *deviations, 0.1) * 1.3
    axis.set_ylim(foot - room, high + room)
    axis.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    return foot


def _labelled(name: str, value: float, foot: float) -> str:
    return name if value >= foot else f"{name}, {value:.1f} %"


# ---------------------------------------------------------------------------------------------------------------------
# accuracy against a cost


def cost_plot(study: Study, file: str, key: str, label: str, unit: float = 1) -> Plot | None:
    """Each row's test accuracy against what it costs, the Pareto front marked; with two rows at least."""
    records = [record(study, row) for row in study.rows]
    records = [r for r in records if r["accuracy_mean"] is not None and r[key]]
    if len(records) < 2:
        return None
    costs = [r[key] / unit for r in records]
    scores = [100 * r["accuracy_mean"] for r in records]
    deviations = [100 * (r["accuracy_std"] or 0) for r in records]
    front = pareto_front(costs, scores)
    with _figure(f"{study.name}: test accuracy against {label}") as (figure, (axis,)):
        foot = _percent_scale(axis, scores, deviations)
        shown = [max(score, foot) for score in scores]
        if key == "trainable" or max(costs) > 8 * min(costs):
            _log_scale(axis, costs)
        else:
            room = max(0.15 * (max(costs) - min(costs)), 0.05 * max(costs))
            axis.set_xlim(min(costs) - room, max(costs) + room)
        steps = sorted((cost, score) for cost, score, on in zip(costs, shown, front, strict=True) if on)
        axis.plot(*zip(*steps, strict=True), drawstyle="steps-post", color=FRONT, alpha=0.35, linewidth=2)
        for cost, score, height, deviation, on in zip(costs, scores, shown, deviations, front, strict=True):
            color = FRONT if on else BEATEN
            axis.errorbar(
                cost, height, deviation or None, marker="o" if score >= foot else "v", markersize=7, color=color,
                markerfacecolor=color if on else "white", markeredgewidth=1.5, capsize=3, elinewidth=1.2,
            )  # fmt: skip
        axis.set(xlabel=label, ylabel="test accuracy, %")
        labels = [
            Label(x, y, _labelled(r["row"], score, foot), FRONT if on else "#444444", needed=on)
            for x, y, score, r, on in zip(costs, shown, scores, records, front, strict=True)
        ]
        bars = [(x, y + part * d) for x, y, d in zip(costs, shown, deviations, strict=True) for part in (-1, 0, 1)]
        place_labels(axis, sorted(labels, key=lambda item: not item.needed), np.array(bars))
        caption = f"Test accuracy against {label}. Filled: the Pareto front, the rows that no other one beats on both."
        caption += " Bars: standard deviation over seeds." if any(deviations) else ""
        return Plot(file, caption, _png(figure))


# ---------------------------------------------------------------------------------------------------------------------
# curves


def _rate_scores(study: Study) -> dict[str, dict[float, list[float]]]:
    """Validation accuracies, %, by curve and learning rate: of runs that tuned, else where the rate is an axis."""
    found: dict[str, dict[float, list[float]]] = {}
    for run in study.tuning or [run for run in study.final if "learning_rate" in run.axes]:
        rate = run.get("config", "learning_rate") or run.axes.get("learning_rate")
        accuracy = run.accuracy("validation")
        if rate is not None and accuracy is not None:
            others = [str(value) for key, value in run.axes.items() if key not in ("learning_rate", "seed")]
            name = run.row if run.tunes else ", ".join(others) or study.name
            found.setdefault(name, {}).setdefault(float(rate), []).append(100 * accuracy)
    return {name: dict(sorted(rates.items())) for name, rates in found.items() if len(rates) > 1}


def rate_plot(study: Study) -> Plot | None:
    """Validation accuracy against the learning rate, a curve a row; the best of each is named."""
    scores = _rate_scores(study)
    means = {name: {rate: fmean(values) for rate, values in rates.items()} for name, rates in scores.items()}
    ranked = sorted(means, key=lambda name: -max(means[name].values()))[:CURVES]
    if not ranked:
        return None
    every = [value for name in ranked for value in means[name].values()]
    with _figure(f"{study.name}: validation accuracy by learning rate") as (figure, (axis,)):
        foot = _percent_scale(axis, every)
        _log_scale(axis, [rate for name in ranked for rate in means[name]], lambda rate: f"{rate:g}")
        labels, points = [], []
        for k, name in enumerate(ranked):
            rates, values = zip(*means[name].items(), strict=True)
            style = _curve_style(k)
            heights = [max(value, foot) for value in values]
            spreads = [mean_and_deviation(scores[name][rate])[1] or 0 for rate in rates]
            axis.errorbar(rates, heights, spreads if any(spreads) else None, capsize=3, elinewidth=1, **style)
            low = [(r, h) for r, h, value in zip(rates, heights, values, strict=True) if value < foot]
            if low:
                axis.plot(*zip(*low, strict=True), "v", color=style["color"], markersize=10, fillstyle="none")
            best = int(np.argmax(values))
            labels.append(Label(rates[best], heights[best], f"{name}, {rates[best]:g}", style["color"], needed=True))
            points += _along(np.log(rates), heights)
        axis.set(xlabel="peak learning rate", ylabel="validation accuracy, %")
        obstacles = np.array(points)
        obstacles[:, 0] = np.exp(obstacles[:, 0])
        place_labels(axis, labels, obstacles)
        caption = "Validation accuracy by peak learning rate; each curve is named at its best."
        caption += f" Triangles at the foot: more than {DEPTH:g} points below the best." if min(every) < foot else ""
        return Plot("learning_rates.png", caption, _png(figure))


def _curve_style(k: int) -> dict[str, Any]:
    dashed = k >= len(COLORS)
    return {
        "color": COLORS[k % len(COLORS)], "marker": MARKERS[k % len(MARKERS)], "markersize": 5,
        "linestyle": "--" if dashed else "-", "linewidth": 1.6,
    }  # fmt: skip


def _along(x: Sequence[float] | np.ndarray, y: Sequence[float], parts: int = 12) -> list[tuple[float, float]]:
    """Points on a polyline, close enough that no label fits between them."""
    where = np.linspace(0, len(x) - 1, parts * (len(x) - 1) + 1)
    at = np.arange(len(x))
    return list(zip(np.interp(where, at, x), np.interp(where, at, y), strict=True))


def curve_plot(study: Study, file: str, key: str, label: str) -> Plot | None:
    """Validation accuracy and training loss over steps or seconds: the first seed of each row that kept its metrics."""
    if key == "train_seconds" and study.cost_obstacles:
        return None
    curves = []
    for row in study.rows:
        run = _first(row)
        history = [point for point in (run.history() if run else []) if key in point]
        if any("validation_accuracy" in point for point in history):
            curves.append((row.name, history))
    curves = curves[:CURVES]
    if not curves:
        return None
    height = max(5.5, 2.5 + 0.3 * len(curves))
    with _figure(f"{study.name}: learning curves", height=height, rows=2) as (figure, (above, below)):
        labels, every = [], []
        for k, (name, history) in enumerate(curves):
            style = _curve_style(k)
            at, values = _column(history, key, "validation_accuracy")
            above.plot(at, 100 * values, **style)
            every += (100 * values).tolist()
            labels.append(Label(at[-1], 100 * values[-1], f"{name} {100 * values[-1]:.1f}", style["color"]))
            at, losses = _column(history, key, "train_loss")
            width = max(1, len(losses) // 20)
            smooth = np.convolve(losses, np.ones(width) / width, mode="valid") if len(losses) else losses
            below.plot(at[width - 1 :], smooth, color=style["color"], linestyle=style["linestyle"], linewidth=1.2)
        foot = _percent_scale(above, every)
        above.set(ylabel="validation accuracy, %")
        below.set(xlabel=label, ylabel="training loss, nats", xlim=(0, None), ylim=(0, None))
        labels = [Label(item.x, max(item.y, foot), item.text, item.color) for item in labels]
        label_ends(above, labels)
        caption = f"Learning curves over {label.split(',')[0]}s of each row's first seed; the loss is smoothed."
        return Plot(file, caption.replace("trainings", "training seconds"), _png(figure))


def _first(row: Row) -> Run | None:
    return min(row.finished, key=lambda run: run.seed, default=None)


def _column(history: Sequence[dict[str, float]], key: str, value: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(point[key], point[value]) for point in history if value in point]
    return np.array([x for x, _ in points]), np.array([y for _, y in points])


# ---------------------------------------------------------------------------------------------------------------------
# rank by alpha


def rank_alpha_plot(study: Study) -> Plot | None:
    """A heat map of accuracy over ``lora_r`` and ``lora_alpha``, one a combination of the other axes."""
    runs = [run for run in study.final if {"lora_r", "lora_alpha"} <= run.axes.keys()]
    split = "test" if any(run.accuracy("test") is not None for run in runs) else "validation"
    cells: dict[str, dict[tuple[float, float], list[float]]] = {}
    for run in runs:
        others = {k: v for k, v in sorted(run.axes.items()) if k not in ("lora_r", "lora_alpha", "seed")}
        accuracy = run.accuracy(split)
        if accuracy is not None:
            place = (float(run.axes["lora_r"]), float(run.axes["lora_alpha"]))
            cells.setdefault(json.dumps(others), {}).setdefault(place, []).append(100 * accuracy)
    ranks = sorted({rank for places in cells.values() for rank, _ in places})
    alphas = sorted({alpha for places in cells.values() for _, alpha in places})
    if len(ranks) * len(alphas) < 2:
        return None
    means = [fmean(values) for places in cells.values() for values in places.values()]
    high = max(means)
    low = max(min(means), high - DEPTH)
    height = 0.9 + 0.55 * len(ranks)
    size = {"width": max(4.5, 1.6 + 0.9 * len(alphas)), "height": height * len(cells) + 0.5}
    with _figure(f"{study.name}: {split} accuracy, %", rows=len(cells), **size) as (figure, axes):
        for axis, (combination, places) in zip(axes, cells.items(), strict=True):
            grid = np.full((len(ranks), len(alphas)), np.nan)
            for (rank, alpha), values in places.items():
                grid[ranks.index(rank), alphas.index(alpha)] = fmean(values)
            axis.imshow(grid, cmap="cividis", vmin=low, vmax=high, origin="lower", aspect="auto")
            axis.grid(visible=False)
            axis.spines[:].set_visible(False)
            axis.tick_params(length=0)
            best = float(np.nanmax(grid))
            for i, j in itertools.product(range(len(ranks)), range(len(alphas))):
                _cell(axis, i, j, grid[i, j], low, high, best)
            axis.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
            axis.set_yticks(range(len(ranks)), [f"{rank:g}" for rank in ranks])
            axis.set(ylabel="rank r")
            if len(cells) > 1:
                axis.set_title(", ".join(f"{k} {v}" for k, v in json.loads(combination).items()), fontweight="normal")
        axes[-1].set_xlabel("alpha")
        caption = f"Mean {split} accuracy, %, by rank and alpha; the best is bold, an empty cell has no finished run."
        return Plot("rank_alpha.png", caption, _png(figure))


def _cell(axis: Any, i: int, j: int, value: float, low: float, high: float, best: float) -> None:
    if np.isnan(value):
        return
    dark = high > low and (value - low) / (high - low) < 0.55
    weight = "bold" if value == best else "normal"
    axis.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if dark else "black", fontweight=weight)
