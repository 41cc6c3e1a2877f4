"""A study's numbers -> plots: accuracy against each cost, learning rates, learning curves, rank by alpha.

The same runs give the same bytes. The colours are from Okabe and Ito (2008): colour-blind people can tell them apart.
Up to 49 rows each have their own pair of colour and marker, and a name in the legend.
"""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import fmean
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

from finetuning.comparison.collected import Run, Study
from finetuning.comparison.drawn import RATE
from finetuning.comparison.page import Plot
from finetuning.comparison.pairs import comparable
from finetuning.comparison.statistics import mean_and_deviation, pareto_front
from finetuning.comparison.tables import GIB
from finetuning.runs.records import SCORES

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^<PX"
STYLES = len(COLORS) * len(MARKERS)  # rows that can be told apart
FRONT = "#767676"
CURVES = 12  # more curves cannot be told apart, so only the best ones are drawn
PALETTE = 128  # colours of a file: there are few hues, and their blends with white
DEPTH = 10.0  # percentage points below the best; lower points would flatten all others, so they are drawn at the foot
TRIANGLES = f" Triangles: more than {DEPTH:g} points below the best."
STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#e6e6e6", "axes.axisbelow": True, "axes.edgecolor": "#666666", "figure.dpi": 140,
    "figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.08,
    "text.parse_math": False,
}  # fmt: skip
FILES = (
    "accuracy_parameters.png", "accuracy_seconds.png", "accuracy_memory.png", "learning_rates.png",
    "learning_curves.png", "learning_curves_seconds.png", "rank_alpha.png",
)  # fmt: skip


# --- what all plots share


def draw_plots(study: Study) -> list[Plot]:
    """The plots for which the study has data."""
    drawn = (
        cost_plot(study, "accuracy_parameters.png", "trainable", "trainable parameters"),
        cost_plot(study, "accuracy_seconds.png", "train_seconds", "training time", ("minutes", 60)),
        cost_plot(study, "accuracy_memory.png", "peak_memory_bytes", "peak memory", ("GiB", GIB)),
        rate_plot(study),
        curve_plot(study, "learning_curves.png", "step", "steps"),
        curve_plot(study, "learning_curves_seconds.png", "train_seconds", "seconds of training"),
        rank_alpha_plot(study),
    )
    return [plot for plot in drawn if plot is not None]


@contextmanager
def new_figure(
    title: str, width: float = 7, height: float = 4.5, rows: int = 1, columns: int = 1
) -> Iterator[tuple[Figure, Any]]:
    """A figure without pyplot's global state, and its axes."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, sharex=columns == 1, squeeze=False).ravel()
        axes[0].set_title(title)
        yield figure, axes


def png_of(figure: Figure) -> bytes:
    """Draws the figure, without version or date. A palette saves two thirds of the bytes."""
    canvas: Any = figure.canvas
    with mpl.rc_context(STYLE):
        canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    file = io.BytesIO()
    image.quantize(PALETTE, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    return file.getvalue()


def _row_without(run: Run, *axes: str) -> str:
    """A row's name without these axes: ``adam`` for ``adam-learning_rate0.001``, ``all`` if nothing is left."""
    name = run.row
    for axis in axes:
        name = name.replace(f"{axis}{run.axes[axis]:g}", "", 1)
    return re.sub("-+", "-", name).strip("-") or "all"


def _short(value: float) -> str:
    """A large number in short, for example ``500 k`` or ``3.7 M``."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def log_scale(axis: Any, values: Sequence[float], form: Callable[[float], str] = _short) -> None:
    """A logarithmic x axis with round ticks, and space at both ends."""
    low, high = min(values), max(values)
    margin = max((high / low) ** 0.12, 1.5)
    axis.set_xscale("log")
    axis.set_xlim(low / margin, high * margin)
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 100 else (1.0,)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))


def _percent_scale(axis: Any, values: Sequence[float], deviations: Sequence[float] = (0.0,)) -> float:
    """Sets limits for accuracies in percent. Returns the foot, where points far below the best are drawn."""
    high = max(values)
    low = min(value for value in values if value >= high - DEPTH)
    margin = max(0.15 * (high - low), *deviations, 0.1) * 1.3
    foot = low if min(values) == low else low - margin
    axis.set_ylim(foot - margin, high + margin)
    axis.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    return foot


def style_of(k: int) -> dict[str, str]:
    """Colour and marker of the k-th row: ``STYLES`` different pairs."""
    return {"color": COLORS[k % len(COLORS)], "marker": MARKERS[(k + k // len(COLORS)) % len(MARKERS)]}


def _curve(axis: Any, x: np.ndarray, y: np.ndarray, foot: float, k: int, name: str) -> dict[str, str]:
    """Draws the k-th curve. Points below the foot become open triangles at the foot. Returns the line's style."""
    style, low = style_of(k), np.asarray(y) < foot
    line = {"color": style["color"], "linestyle": "-" if k < len(COLORS) else "--"}
    heights, marks = np.maximum(y, foot), np.flatnonzero(~low).tolist()
    axis.plot(x, heights, marker=style["marker"], markersize=5, markevery=marks, linewidth=1.6, label=name, **line)
    axis.plot(x[low], heights[low], "v", color=style["color"], markersize=8, markerfacecolor="white", zorder=3)
    return line


def add_legend(axis: Any) -> None:
    """Names next to the plot, in the order of drawing; small if they are many."""
    size = 9 if len(axis.get_legend_handles_labels()[1]) <= CURVES else 6.5
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=size)


# --- accuracy against a cost


def cost_plot(
    study: Study, file: str, key: str, name: str, unit: tuple[str, float] = ("", 1), title: str | None = None
) -> Plot | None:
    """The test accuracy of each row against its cost, with the Pareto front; ``None`` with fewer than two rows.

    Args:
        file: the name of the plot's file.
        key: the cost, a key of ``Study.records``.
        name: the cost in words.
        unit: the name of the unit on the axis, and its size.
        title: the title, if it is not made from the study's name and the cost.
    """
    kept, _ = comparable(study)
    sets = [kept[row.name][0].test_set if row.name in kept else None for row in study.rows]
    if any(own is None for own, row in zip(sets, study.rows, strict=True) if row.tested):
        sets = [row.common("data", "source") for row in study.rows]  # only the names of the test sets are known
    records = [r | {"source": own} for r, own in zip(study.records, sets, strict=True)]
    records = [r for r in records if r["accuracy_mean"] is not None and r[key]]
    if len(records) < 2:
        return None
    on = _fronts([r["source"] for r in records], [r[key] for r in records], [r["accuracy_mean"] for r in records])
    shown = sorted(sorted(range(len(records)), key=lambda i: (not on[i], i))[:STYLES])  # the front, then the best rows
    found, records, front = len(records), [records[i] for i in shown], [on[i] for i in shown]
    sources = [r["source"] for r in records]
    costs = [r[key] / unit[1] for r in records]
    scores = [100 * r["accuracy_mean"] for r in records]
    deviations = [100 * (r["accuracy_std"] or 0) for r in records]
    height = max(4.5, 0.18 * len(records))  # for the legend
    with new_figure(title or f"{study.name}: test accuracy against {name}", height=height) as (figure, (axis,)):
        foot = _percent_scale(axis, scores, deviations)
        heights = [max(score, foot) for score in scores]
        if key == "trainable" or max(costs) > 8 * min(costs):
            log_scale(axis, costs)
        else:
            margin = max(0.15 * (max(costs) - min(costs)), 0.05 * max(costs))
            axis.set_xlim(min(costs) - margin, max(costs) + margin)
        axis.set(xlabel=", ".join(filter(None, (name, unit[0]))), ylabel="test accuracy, %")
        for own in dict.fromkeys(sources):
            points = zip(sources, costs, heights, front, strict=True)
            line = sorted((x, y) for source, x, y, on in points if on and source == own)
            # a higher cost reaches at least what a lower one does
            axis.step(*zip(*line, strict=True), where="post", color=FRONT, alpha=0.35, linewidth=2)
        for k, r in enumerate(records):
            style, low = style_of(k), scores[k] < foot
            axis.errorbar(
                costs[k], heights[k], deviations[k] or None, markersize=7, capsize=3, markeredgewidth=1.5,
                elinewidth=1.2, linestyle="none", zorder=4 if front[k] else 3,
                **style | {"marker": "v"} if low else style,
                markerfacecolor=style["color"] if front[k] else "white",
                label=f"{r['row']}, {scores[k]:.1f} %" if low else r["row"],
            )  # fmt: skip
        add_legend(axis)
        caption = f"Test accuracy against {name}. Filled: no other row is at least as good in both and better in one"
        caption += " (the Pareto front)." + (" Each test split has its own front." if len(set(sources)) > 1 else "")
        caption += " Bars: standard deviation over seeds." if any(deviations) else ""
        caption += TRIANGLES if min(scores) < foot else ""
        caption += f" Shown: {STYLES} of {found} rows, the front and the best on the test." if found > STYLES else ""
        return Plot(file, caption, partial(png_of, figure))


def _fronts(sources: Sequence[str | None], costs: Sequence[float], scores: Sequence[float]) -> list[bool]:
    """Which rows are on the Pareto front of their test split."""
    front = [False] * len(sources)
    for source in dict.fromkeys(sources):
        own = [i for i, other in enumerate(sources) if other == source]
        for i, on in zip(own, pareto_front([costs[i] for i in own], [scores[i] for i in own]), strict=True):
            front[i] = on
    return front


# --- curves


def _rate_scores(study: Study) -> dict[str, dict[float, list[float]]]:
    """The metric that chose on validation, in %, by curve and rising learning rate."""
    found: dict[str, dict[float, list[float]]] = {}
    for run in _rated(study):
        score = run.accuracy("validation") if run.monitor == "loss" else run.monitored
        if score is not None:
            name = run.row if run.tunes else _row_without(run, RATE)
            found.setdefault(name, {}).setdefault(float(run.axes[RATE]), []).append(100 * score)
    return {name: dict(sorted(rates.items())) for name, rates in found.items() if len(rates) > 1}


def _rated(study: Study) -> list[Run]:
    """The runs that tuned the rate alone; if there are none, the runs for which the learning rate is an axis."""
    return study.rate_trials or [run for run in study.final if RATE in run.axes]


def rate_plot(study: Study) -> Plot | None:
    """The metric that chose on validation by learning rate: a curve for each row, named with its best rate."""
    metrics = {SCORES["accuracy" if run.monitor == "loss" else run.monitor] for run in _rated(study)}
    metric = " or ".join(sorted(metrics))
    scores = _rate_scores(study)
    means = {name: {rate: fmean(values) for rate, values in rates.items()} for name, rates in scores.items()}
    ranked = sorted(means, key=lambda name: -max(means[name].values()))[:CURVES]
    if not ranked:
        return None
    every = [value for name in ranked for value in means[name].values()]
    with new_figure(f"{study.name}: validation {metric} by learning rate") as (figure, (axis,)):
        foot = _percent_scale(axis, every)
        log_scale(axis, [rate for name in ranked for rate in means[name]], lambda rate: f"{rate:g}")
        axis.set(xlabel="peak learning rate", ylabel=f"validation {metric}, %")
        for k, name in enumerate(ranked):
            rates, values = (np.array(column) for column in zip(*means[name].items(), strict=True))
            spreads = np.array([mean_and_deviation(scores[name][rate])[1] or 0 for rate in rates])
            line = _curve(axis, rates, values, foot, k, f"{name}, {rates[np.argmax(values)]:g}")
            axis.errorbar(rates, np.maximum(values, foot), spreads, fmt="none", color=line["color"], capsize=3)
        add_legend(axis)
        caption = f"Validation {metric} by peak learning rate. Each name shows the rate at which it is best."
        caption += TRIANGLES if min(every) < foot else ""
        return Plot("learning_rates.png", caption, partial(png_of, figure))


def curve_plot(study: Study, file: str, key: str, name: str) -> Plot | None:
    """Validation accuracy and training loss over steps or seconds, for the first seed of each row with metrics."""
    curves = []
    for place, row in enumerate(study.rows):  # a row has the same colour over steps and over seconds
        if key == "train_seconds":
            row = study.measured(row)
        run = min(row.finished, key=lambda run: run.seed, default=None)
        history = [point for point in (run.history if run else []) if key in point]
        if any("validation_accuracy" in point for point in history):
            curves.append((place, row.name, history))
    found, curves = len(curves), curves[:CURVES]
    if len(curves) < (2 if key == "train_seconds" else 1):  # the times of one row have nothing to compare with
        return None
    with new_figure(f"{study.name}: learning curves", height=6, rows=2) as (figure, (above, below)):
        accuracies = [_column(history, key, "validation_accuracy", 100) for *_, history in curves]
        foot = _percent_scale(above, [value for _, values in accuracies for value in values])
        for (place, row_name, history), (at, values) in zip(curves, accuracies, strict=True):
            line = _curve(above, at, values, foot, place, f"{row_name} {values[-1]:.1f}")
            at, losses = _column(history, key, "train_loss")
            width = max(1, len(losses) // 20)
            smooth = np.convolve(losses, np.ones(width) / width, mode="valid") if len(losses) else losses
            below.plot(at[width - 1 :], smooth, linewidth=1.2, **line)
        above.set(ylabel="validation accuracy, %")
        below.set(xlabel=name, ylabel="training loss, nats", xlim=(0, None), ylim=(0, None))
        add_legend(above)
        split = "the test" if any(row.tested for row in study.rows) else "validation"
        whose = f"the {CURVES} rows (of {found}) that are best on {split}" if found > CURVES else "each row"
        caption = f"Learning curves over {name}, for the first seed of {whose}. The training loss is smoothed."
        caption += TRIANGLES if min(min(values) for _, values in accuracies) < foot else ""
        return Plot(file, caption, partial(png_of, figure))


def _column(history: Sequence[dict[str, float]], key: str, value: str, scale: float = 1) -> tuple[Any, Any]:
    points = [(point[key], scale * point[value]) for point in history if value in point]
    return np.array([x for x, _ in points]), np.array([y for _, y in points])


# --- rank by alpha


def rank_alpha_plot(study: Study) -> Plot | None:
    """Heat maps of accuracy by ``lora_r`` and ``lora_alpha``: one for all rows that differ only in these two."""
    runs = [run for run in study.final if {"lora_r", "lora_alpha"} <= run.axes.keys()]
    split = "test" if any(run.accuracy("test") is not None for run in runs) else "validation"
    found: dict[str, dict[tuple[float, float], list[float]]] = {}
    for run in runs:
        accuracy = run.accuracy(split)
        if accuracy is not None:
            place = (float(run.axes["lora_r"]), float(run.axes["lora_alpha"]))
            found.setdefault(_row_without(run, "lora_r", "lora_alpha"), {}).setdefault(place, []).append(100 * accuracy)
    maps = {name: {place: fmean(values) for place, values in cells.items()} for name, cells in found.items()}
    places = {place for cells in maps.values() for place in cells}
    if len(places) < 2:
        return None
    ranks, alphas = (sorted({place[i] for place in places}) for i in range(2))
    every = [value for cells in maps.values() for value in cells.values()]
    limits = (max(min(every), max(every) - DEPTH), max(every))
    width, height = max(4.5, 1.6 + 0.9 * len(alphas)), (0.9 + 0.55 * len(ranks)) * len(maps) + 0.5
    title = f"{study.name}: {split} accuracy, %"
    with new_figure(title, width, height, len(maps)) as (figure, axes):
        for axis, (name, cells) in zip(axes, maps.items(), strict=True):
            _heat_map(axis, cells, ranks, alphas, limits)
            if len(maps) > 1:
                axis.set_title(name, fontweight="normal")
        if len(maps) > 1:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        axes[-1].set_xlabel("alpha")
        caption = f"Mean {split} accuracy in % by rank and alpha. The best value is bold."
        caption += " An empty cell has no finished run."
        return Plot("rank_alpha.png", caption, partial(png_of, figure))


def _heat_map(
    axis: Any,
    cells: dict[tuple[float, float], float],
    ranks: Sequence[float],
    alphas: Sequence[float],
    limits: tuple[float, float],
) -> None:
    """Coloured cells with their values, in white on dark cells and in black on light ones."""
    grid = np.full((len(ranks), len(alphas)), np.nan)
    low, high = limits
    for (rank, alpha), value in cells.items():
        i, j = ranks.index(rank), alphas.index(alpha)
        grid[i, j] = value
        color = "white" if high > low and value < low + 0.55 * (high - low) else "black"
        weight = "bold" if value == max(cells.values()) else "normal"
        axis.text(j, i, f"{value:.2f}", ha="center", va="center", color=color, fontweight=weight)
    axis.imshow(grid, cmap="cividis", vmin=low, vmax=high, origin="lower", aspect="auto")
    axis.grid(visible=False)
    axis.set_facecolor("#eeeeee")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
    axis.set_yticks(range(len(ranks)), [f"{rank:g}" for rank in ranks])
    axis.set(ylabel="rank r")
