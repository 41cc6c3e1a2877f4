"""Which learning rate random trials over data sets speak for, next to the default.

Trials of a method differ in rate, epochs and batch. Their validation scores are fitted by least squares: a level for
each data set, a parabola of the logarithm of the rate, and lines of the logarithms of epochs and batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from finetuning.comparison.collected import Run
from finetuning.comparison.drawn import RATE
from finetuning.comparison.over_sets import Grid
from finetuning.pages import Table
from finetuning.settings import DEFAULT_LEARNING_RATES

LEAST_TRIALS = 20  # of a method over all sets: fewer say nothing about a rate, or about the best of several
MULTIPLES = (0.125, 0.5, 2.0, 4.0)  # of the default rate
FITTED = (RATE, "epochs", "batch_size")
FITTED_CURVE = 4  # numbers of a fit besides the level of each data set
END = " (end of the range)"  # of the rates that were tried, so a better one may lie beyond
COLUMNS = (
    "method", "trials", "default rate", "best rate", "validation over the default (95 %)",
    *(f"{multiple:g} times" for multiple in MULTIPLES),
)  # fmt: skip


@dataclass(frozen=True)
class Parabola:
    """Validation score in points against the rate, 0 at the default."""

    weights: np.ndarray  # (2,) of x and x squared; x is the logarithm of the rate over the default, to base 10
    covariance: np.ndarray  # (2, 2) of the weights
    degrees: int  # of freedom
    tried: tuple[float, float]  # the smallest and the largest x of the trials

    @property
    def top(self) -> float:
        """The best x among those that were tried."""
        slope, bend = self.weights
        inside = -slope / (2 * bend) if bend < 0 else math.inf
        candidates = [x for x in (*self.tried, inside) if self.tried[0] <= x <= self.tried[1]]
        return max(candidates, key=lambda x: float(self.weights @ (x, x * x)))

    def gain(self, x: float) -> str:
        """``+1.66 (+1.10 to +2.22)``: the score over the default's, with its interval; empty beyond what was tried."""
        if not all(self.tried[0] <= place <= self.tried[1] for place in (x, 0.0)):  # 0 is the default
            return ""
        place = np.array([x, x * x])
        mean = float(self.weights @ place)
        half = float(stdtrit(self.degrees, 0.975)) * math.sqrt(float(place @ self.covariance @ place))
        return f"{mean:+z.2f} ({mean - half:+z.2f} to {mean + half:+z.2f})"


def rates_table(grid: Grid) -> Table:
    """A row for each method with enough trials; no rows if none has."""
    rows = []
    for method in grid.methods:
        # without epochs no rate matters
        tried = (
            [run for run in found.get(method, ()) if run.finished and run.get("config", "epochs")]
            for found in grid.trials.values()
        )
        trials = [runs for runs in tried if runs]  # of each data set
        flat = [run for runs in trials for run in runs]
        if len(flat) < max(LEAST_TRIALS, len(trials) + 1 + FITTED_CURVE) or any(run.monitor == "loss" for run in flat):
            continue  # a loss has other units
        failed = sum(not run.finished for found in grid.trials.values() for run in found.get(method, ()))
        kinds = {(run.get("config", "method"), run.get("config", "optimizer")) for run in flat}
        if len(kinds) > 1:
            continue  # the trials chose among methods, each with a default of its own
        default = DEFAULT_LEARNING_RATES[kinds.pop()]
        fit = fitted(trials, default)
        if fit is None:  # too few different rates
            continue
        gains = (fit.gain(math.log10(multiple)) for multiple in MULTIPLES)
        best = f"{default * 10**fit.top:.2g}" + (END if fit.top in fit.tried else "")
        count = str(len(flat)) + (f", and {failed} that failed" if failed else "")
        rows.append((method, count, f"{default:g}", best, fit.gain(fit.top), *gains))
    return Table(COLUMNS, rows)


def fitted(trials: Sequence[Sequence[Run]], default: float) -> Parabola | None:
    """The parabola of the trials of each data set; ``None`` if they have too few different rates for one."""
    values = np.array([[math.log10(run.get("config", name)) for name in FITTED] for own in trials for run in own])
    scores = np.array([100 * (run.monitored or 0.0) for own in trials for run in own])
    x = values[:, 0] - math.log10(default)
    levels = np.repeat(np.eye(len(trials)), [len(own) for own in trials], axis=0)
    matrix = np.column_stack([x, x * x, values[:, 1:], levels])  # (trials, 4 + sets)
    rank = int(np.linalg.matrix_rank(matrix))
    if rank - np.linalg.matrix_rank(matrix[:, 2:]) < 2:
        return None
    inverse = np.linalg.pinv(matrix.T @ matrix)  # epochs may be the same in all trials
    weights = inverse @ matrix.T @ scores
    degrees = len(scores) - rank
    variance = float(((scores - matrix @ weights) ** 2).sum()) / degrees
    return Parabola(weights[:2], variance * inverse[:2, :2], degrees, (float(x.min()), float(x.max())))
