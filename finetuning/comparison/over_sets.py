"""A study whose rows ran on several data sets: a table of sets, and what is likely on a new set."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean

from finetuning.comparison.collected import Study
from finetuning.comparison.statistics import bayesian_signed_rank, interval_over_sets, mean_and_deviation
from finetuning.pages import Table

LEAST_SETS = 3
MOST_METHODS = 12  # a study with more has no use for a table of pairs
ROPE = 0.5  # points of accuracy; smaller differences are equivalent in practice
OVER_SETS = (
    "Mean and standard deviation over seeds and draws of the training texts, with their number. The interval is"
    " Student's t over sets. Better, equivalent, worse: probabilities on a new set, by the Bayesian signed-rank test"
    f" (Benavoli et al. 2017); differences of up to {ROPE} points are equivalent."
)
DRAW = re.compile(r"-data_seed\d+$")


@dataclass(frozen=True)
class Grid:
    """The test accuracies of a study, in %: set -> method -> one for each seed and draw."""

    accuracies: dict[str, dict[str, list[float]]]

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(method for found in self.accuracies.values() for method in found))

    def shared(self, methods: Sequence[str]) -> list[str]:
        """The sets on which all these methods have run."""
        return [name for name, found in self.accuracies.items() if all(method in found for method in methods)]

    def means(self, method: str, sets: Sequence[str]) -> list[float]:
        """The method's mean on each set."""
        return [fmean(self.accuracies[name][method]) for name in sets]


def grid_of(study: Study) -> Grid | None:
    """The grid of a study whose rows are named SET-METHOD; ``None`` if two methods do not share several sets."""
    accuracies: dict[str, dict[str, list[float]]] = {}
    for run in sorted(study.final, key=lambda run: (str(run.get("config", "data_dir")), run.row)):
        accuracy, name = run.accuracy("test"), Path(str(run.get("config", "data_dir"))).name
        if accuracy is not None and run.row.startswith(f"{name}-"):
            method = DRAW.sub("", run.row.removeprefix(f"{name}-"))
            accuracies.setdefault(name, {}).setdefault(method, []).append(100 * accuracy)
    grid = Grid(accuracies)
    enough = any(len(grid.shared(pair)) >= LEAST_SETS for pair in combinations(grid.methods, 2))
    return grid if enough and len(grid.methods) <= MOST_METHODS else None


def over_sets(study: Study) -> list[Table]:
    """Test accuracies by set, and each pair of methods over the sets; empty without a grid."""
    grid = grid_of(study)
    return [] if grid is None else [sets_table(grid), pairs_table(grid)]


def sets_table(grid: Grid) -> Table:
    """A row for each set, and the mean over the sets that all methods have."""
    methods = grid.methods
    rows = [(name, *(_cell(found.get(method, [])) for method in methods)) for name, found in grid.accuracies.items()]
    shared = grid.shared(methods)
    if len(shared) > 1:
        means = (f"{fmean(grid.means(method, shared)):.2f}" for method in methods)
        rows.append((f"mean of {len(shared)} sets", *means))
    return Table(("data set", *(f"{method}, %" for method in methods)), rows)


def pairs_table(grid: Grid) -> Table:
    """Each pair of methods with enough common sets: the difference, and the Bayesian signed-rank test."""
    rows = []
    for first, second in combinations(grid.methods, 2):
        sets = grid.shared((first, second))
        if len(sets) < LEAST_SETS:
            continue
        ours, theirs = grid.means(first, sets), grid.means(second, sets)
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        mean, (low, high) = fmean(differences), interval_over_sets(differences)
        test = bayesian_signed_rank(ours, theirs, ROPE)
        chances = (f"{100 * share:.0f}" for share in (test.better, test.equivalent, test.worse))
        interval = f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
        rows.append((f"{first} - {second}", str(len(sets)), interval, *chances))
    return Table(("pair", "sets", "mean difference, points (95 %)", "better, %", "equivalent, %", "worse, %"), rows)


def _cell(values: Sequence[float]) -> str:
    """``88.80 ± 0.35 (3)``; empty without values."""
    mean, deviation = mean_and_deviation(values)
    if mean is None:
        return ""
    return f"{mean:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}") + f" ({len(values)})"
