"""The trials of a search as plots, in the frame that the plots of studies have."""

import itertools
import math
import warnings
from collections.abc import Sequence
from functools import partial

import optuna
from matplotlib.ticker import MaxNLocator

from finetuning.comparison.page import Plot
from finetuning.comparison.plots import COLORS, FRONT, log_scale, new_figure, png_of
from finetuning.comparison.statistics import pareto_front
from finetuning.runs.records import SCORES
from finetuning.tuning.plan import Plan
from finetuning.tuning.sampler import study_of
from finetuning.tuning.trials import COMPLETE, Trial

FEW_TRIALS = 30  # complete ones; with fewer, importances change much from trial to trial
COLUMNS = 3
GREY = "#bbbbbb"  # trials that did not end


def draw_plots(plan: Plan, trials: Sequence[Trial]) -> list[Plot]:
    """The plots for which the search has trials."""
    complete = [trial for trial in trials if trial.state == COMPLETE]
    drawn = [best_plot(plan, complete), cost_plot(plan, complete)]
    if len(complete) > 2:
        drawn += [importance_plot(plan, complete), slice_plot(plan, trials)]
    return [plot for plot in drawn if plot is not None]


def shown_score(plan: Plan, value: float) -> float:
    """A score as plots and tables have it: in %, but the loss in nats."""
    return value if plan.minimize else 100 * value


def score_label(plan: Plan, split: str = "validation") -> str:
    """The name of the monitored score on a split, with its unit."""
    return f"{split} {SCORES[plan.monitor]}" + ("" if plan.minimize else ", %")


def best_plot(plan: Plan, complete: Sequence[Trial]) -> Plot:
    """The best score until each minute."""
    ordered = sorted(complete, key=lambda trial: trial.minutes)
    best = itertools.accumulate((trial.value or 0.0 for trial in ordered), min if plan.minimize else max)
    minutes = [trial.minutes for trial in ordered]
    with new_figure("Best so far") as (figure, (axis,)):
        axis.step(minutes, [shown_score(plan, v) for v in best], where="post", color=COLORS[0], label="best so far")
        scores = [shown_score(plan, trial.value or 0.0) for trial in ordered]
        axis.plot(minutes, scores, "o", color=COLORS[1], markersize=4, label="complete trial")
        axis.set(xlabel="minutes", ylabel=score_label(plan), xlim=(0, None))
        axis.legend(frameon=False)
        return Plot("best.png", "The best validation score until each minute.", partial(png_of, figure))


def cost_plot(plan: Plan, complete: Sequence[Trial]) -> Plot | None:
    """Score against training time, with the Pareto front; the default has a ring."""
    timed = [trial for trial in complete if trial.train_seconds]
    if not timed:
        return None
    seconds = [trial.train_seconds or 0.0 for trial in timed]
    scores = [shown_score(plan, trial.value or 0.0) for trial in timed]
    front = pareto_front(seconds, [-score if plan.minimize else score for score in scores])
    usual = plan.config.method.method
    methods = [str((trial.point or {}).get("method", usual)) for trial in timed]
    with new_figure("Score against training time") as (figure, (axis,)):
        for i, method in enumerate(sorted(set(methods))):
            own = [k for k, name in enumerate(methods) if name == method]
            axis.plot(
                [seconds[k] for k in own], [scores[k] for k in own], "o", color=COLORS[i % len(COLORS)], label=method
            )
        for trial, x, y in zip(timed, seconds, scores, strict=True):
            if trial.number == 0:
                axis.plot(x, y, "o", markersize=12, fillstyle="none", color="black", label="the default")
        line = sorted((x, y) for x, y, kept in zip(seconds, scores, front, strict=True) if kept)
        axis.plot([x for x, _ in line], [y for _, y in line], color=FRONT, linewidth=1, zorder=0, label="Pareto front")
        log_scale(axis, seconds)
        axis.set(xlabel="seconds of training", ylabel=score_label(plan))
        axis.legend(frameon=False)
        caption = "All complete trials. No other trial is both faster and better than one on the Pareto front."
        return Plot("cost.png", caption, partial(png_of, figure))


def importances(plan: Plan, complete: Sequence[Trial]) -> dict[str, float]:
    """How much of the scores' variance each parameter explains, by functional ANOVA (Hutter et al. 2014).

    A parameter that only some trials have is looked at among these, together with the parameters of all trials.
    """
    points = [trial.point or {} for trial in complete]
    varied = [row.name for row in plan.space.parameters if len({point.get(row.name) for point in points}) > 1]
    common = [name for name in varied if all(name in point for point in points)]
    found: dict[str, float] = {}
    for wanted in [common, *([name] for name in varied if name not in common)]:
        own = [trial for trial in complete if all(name in (trial.point or {}) for name in wanted)]
        differ = [name for name in wanted if len({(trial.point or {})[name] for trial in own}) > 1]
        if not differ or len({trial.value for trial in own}) < 2:
            continue
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shares = optuna.importance.get_param_importances(
                study_of(plan.space, own, plan.minimize), evaluator=evaluator, params=sorted({*common, *differ})
            )
        found |= {name: float(shares.get(name, 0.0)) for name in differ}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def importance_plot(plan: Plan, complete: Sequence[Trial]) -> Plot | None:
    """A bar for each parameter."""
    shares = importances(plan, complete)
    if not shares:
        return None
    with new_figure("Importance of each parameter", height=1.5 + 0.3 * len(shares)) as (figure, (axis,)):
        axis.barh(list(shares), list(shares.values()), color=COLORS[0])
        axis.set(xlabel="share of the variance of the scores (fANOVA)", xlim=(0, None))
        caption = "What moved the score of complete trials."
        if len(complete) < FEW_TRIALS:
            caption += f" Unsure: {len(complete)} complete trials are fewer than {FEW_TRIALS}."
        return Plot("importance.png", caption, partial(png_of, figure))


def slice_plot(plan: Plan, trials: Sequence[Trial]) -> Plot | None:
    """The score against each parameter; trials that ended early are grey, at their last score."""
    rows = [row for row in plan.space.parameters if len(row.ends) > 1]
    scored = [(t.point, t.latest, t.state != COMPLETE) for t in trials if t.point and t.latest is not None]
    lines = math.ceil(len(rows) / COLUMNS)
    with new_figure("", width=9, height=2.6 * lines, rows=lines, columns=COLUMNS) as (figure, axes):
        for axis, row in zip(axes, rows, strict=False):
            for early in (True, False):
                own = [(point[row.name], s) for point, s, ended in scored if ended == early and row.name in point]
                places = [float(row.values.index(v)) if row.values else float(str(v)) for v, _ in own]
                values = [shown_score(plan, score) for _, score in own]
                axis.plot(places, values, "o", markersize=4, color=GREY if early else COLORS[0])
            if row.values:
                axis.set_xticks(range(len(row.values)), [str(value) for value in row.values], fontsize=7)
                axis.set_xlim(-0.5, len(row.values) - 0.5)
            elif row.log:
                log_scale(axis, [row.low or 0.0, row.high or 0.0])
            else:
                axis.xaxis.set_major_locator(MaxNLocator(4, integer=row.whole))
            axis.set_title(row.name + (", times the default" if row.times_default else ""), fontsize=9)
        for axis in axes[len(rows) :]:
            axis.set_axis_off()
        caption = f"The {score_label(plan)}, against each parameter."
        caption += " Grey: trials that ended early, at their last score."
        return Plot("slices.png", caption, partial(png_of, figure))
