"""Pictures of a study over data sets: what a method loses to the best one, what it costs, and what trials bring."""

import math
import re
from collections import Counter
from functools import partial
from statistics import fmean

import numpy as np

from finetuning.comparison.collected import Run
from finetuning.comparison.over_sets import SECONDS, Grid, conditions, mean_of_sets
from finetuning.comparison.page import Plot
from finetuning.comparison.plots import COLORS, FRONT, add_legend, log_scale, new_figure, png_of, style_of
from finetuning.comparison.rates import LEAST_TRIALS
from finetuning.comparison.statistics import interval_over_sets, pareto_front, tuning_curve

SET_FILES = ("sets_loss.png", "sets_cost.png", "sets_tuning.png", "sets_texts.png")
SIZED = re.compile(r"(?:\d+|all)-(.+)")  # the number of training texts, and a method


def draw_set_plots(grid: Grid) -> list[Plot]:
    """The pictures for which the study has data."""
    drawn = (loss_plot(grid), cost_plot(grid), tuning_plot(grid), texts_plot(grid))
    return [plot for plot in drawn if plot is not None]


def losses(grid: Grid) -> dict[str, np.ndarray]:
    """Method -> points below the best method on each set that all methods have."""
    sets = grid.shared(grid.methods)
    means = {method: np.array(grid.means(method, sets)) for method in grid.methods}
    best = np.max(list(means.values()), axis=0)
    return {method: best - own for method, own in means.items()}


def loss_plot(grid: Grid) -> Plot | None:
    """What each method loses to the best one of each set: a dot for each set, the mean with its interval."""
    count = len(grid.shared(grid.methods))
    if count < 2:
        return None
    found = losses(grid)
    order = sorted(found, key=lambda method: -float(found[method].mean()))
    with new_figure("Loss to the best method of each data set", height=1.2 + 0.4 * len(order)) as (figure, (axis,)):
        for place, method in enumerate(order):
            own = found[method]
            low, high = interval_over_sets(own.tolist())
            axis.plot(own, np.full(count, place), "o", color=FRONT, alpha=0.35, markersize=5)
            axis.plot([low, high], [place, place], color=COLORS[0], linewidth=2)
            axis.plot(own.mean(), place, "D", color=COLORS[0], markersize=7)
        axis.set_yticks(range(len(order)), order)
        axis.set_ylim(-0.6, len(order) - 0.4)
        axis.set(xlabel="test accuracy below the best method, points")
        axis.set_xlim(left=min(0.0, axis.get_xlim()[0]))
        caption = f"What each method loses to the best one of each of {count} data sets (dots). Diamonds: means, with"
        return Plot(SET_FILES[0], f"{caption} Student's t interval over sets.", partial(png_of, figure))


def cost_plot(grid: Grid) -> Plot | None:
    """The mean loss of each method against its processor time next to the quickest method of each set.

    Methods that ran under other ``conditions`` than most are left out. If no conditions have the most methods, there is
    no picture.
    """
    sets, found = grid.shared(grid.methods), losses(grid)
    under = {method: tuple(conditions([grid.runs[name][method]]) for name in sets) for method in grid.methods}
    usual, *second = Counter(under.values()).most_common(2)
    if second and second[0][1] == usual[1]:
        return None
    others = [method for method in found if under[method] != usual[0]]  # their times cannot be compared
    found = {method: own for method, own in found.items() if method not in others}
    seconds = {method: [mean_of_sets([grid.runs[name][method]], *SECONDS) for name in sets] for method in found}
    if len(sets) < 2 or len(found) < 2 or not all(value for own in seconds.values() for value in own):
        return None  # without epochs no time passes
    times = np.array([[value or 0.0 for value in own] for own in seconds.values()])  # (methods, sets)
    ratios = np.exp(np.log(times / times.min(0)).mean(1)).tolist()
    means = [float(own.mean()) for own in found.values()]
    front = pareto_front(ratios, [-loss for loss in means])
    with new_figure("Loss to the best method against time") as (figure, (axis,)):
        log_scale(axis, ratios)
        for k, method in enumerate(found):
            own = style_of(k)
            fill = own["color"] if front[k] else "white"
            axis.plot(ratios[k], means[k], linestyle="none", markersize=8, markerfacecolor=fill, label=method, **own)
        axis.set(xlabel="processor time of training / that of the quickest method", ylabel="mean loss, points")
        axis.invert_yaxis()
        add_legend(axis)
        caption = f"Means over {len(sets)} data sets, of times geometric ones. Filled: no other method is at least as"
        caption += " good in both and better in one (the Pareto front)."
        caption += f" Left out, because they ran under other conditions: {', '.join(others)}." if others else ""
        return Plot(SET_FILES[1], caption, partial(png_of, figure))


def tuning_plot(grid: Grid) -> Plot | None:
    """How good the best of k random trials is, by method."""
    sets = [name for name in grid.shared(grid.methods) if all(m in grid.trials.get(name, {}) for m in grid.methods)]
    tried = {method: [grid.trials[name][method] for name in sets] for method in grid.methods}
    most = min((len(runs) for of_sets in tried.values() for runs in of_sets), default=0)
    flat = [run for of_sets in tried.values() for runs in of_sets for run in runs]
    if most < 2 or most * len(sets) < LEAST_TRIALS or any(run.monitor == "loss" for run in flat):
        return None
    ticks = range(1, most + 1)
    best = [max(_score(run) for of_sets in tried.values() for run in of_sets[i]) for i in range(len(sets))]
    with new_figure("The best of several random trials") as (figure, (axis,)):
        for k, (method, of_sets) in enumerate(tried.items()):
            scores = [_score(run) - best[i] for i, runs in enumerate(of_sets) for run in runs]
            curve, own = tuning_curve(scores, most), style_of(k)
            axis.plot(ticks, curve.median, label=method, linewidth=1.6, markersize=5, **own)
            axis.fill_between(ticks, curve.low, curve.high, color=own["color"], alpha=0.08, linewidth=0)
        axis.set(xlabel="random trials", ylabel="validation score below the best trial, points", xticks=ticks)
        add_legend(axis)
        caption = "The median of the best of so many trials, next to the best trial of any method on each of"
        caption += f" {len(sets)} data sets, and its 95 % band (Lourie et al. 2023), as if all trials were of one set."
        return Plot(SET_FILES[2], caption, partial(png_of, figure))


def texts_plot(grid: Grid) -> Plot | None:
    """The accuracy of each method against the number of training texts, of a study whose methods are ``50-head``."""
    curves: dict[str, list[str]] = {}
    for method in grid.methods:
        if found := SIZED.fullmatch(method):
            curves.setdefault(found[1], []).append(method)
    if max(map(len, curves.values()), default=0) < 2:
        return None
    rows = math.ceil(len(grid.runs) / 2)
    with new_figure("", 7, 0.6 + 2.6 * rows, rows, 2) as (figure, axes):
        for axis, name in zip(axes, grid.runs, strict=False):
            for k, (curve, methods) in enumerate(curves.items()):
                shown = sorted(
                    (grid.texts(name, m), fmean(grid.scores(name, m))) for m in methods if m in grid.runs[name]
                )
                points = [*zip(*shown, strict=True)] or [(), ()]
                axis.plot(*points, label=curve, linewidth=1.6, markersize=5, **style_of(k))
            axis.set(title=name, xlabel="training texts", ylabel="test accuracy, %")
            log_scale(axis, [grid.texts(name, method) for method in grid.runs[name]])
        for axis in axes[len(grid.runs) :]:
            axis.set_axis_off()
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        return Plot(
            SET_FILES[3], "Means over the draws of the training texts, on each data set.", partial(png_of, figure)
        )


def _score(run: Run) -> float:
    """The monitored score of a trial, in points; the lowest possible one if it failed."""
    failed = -1.0 if run.monitor == "mcc" else 0.0
    return 100 * (failed if run.monitored is None else run.monitored)
