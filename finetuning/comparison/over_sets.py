"""A study whose rows ran on several data sets: a table of sets, and what is typical of them."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean
from typing import Any

from finetuning.comparison.collected import Run, Study
from finetuning.comparison.statistics import bayesian_signed_rank, interval_over_sets, mean_and_deviation
from finetuning.errors import counted
from finetuning.pages import Table

LEAST_SETS = 3
MOST_BESIDE = 6  # sets in one table
ROPE = 0.5  # points of accuracy; smaller differences are equivalent in practice
OVER_SETS = (
    "Mean and standard deviation over seeds and draws of the training texts. The heading of the first column says how"
    " many runs a cell has, a cell with another number says it. The interval is Student's t over sets. Better,"
    " equivalent, worse: the probability that the typical difference is that, by the Bayesian signed-rank test"
    f" (Benavoli et al. 2017); up to {ROPE} points are equivalent. A single set can differ more. The loss is"
    " cross-entropy on test: it also falls if probabilities are better."
)
PAIRS = (
    "pair", "sets", "mean difference, points (95 %)", "better, %", "equivalent, %", "worse, %", "loss, nats (95 %)",
)  # fmt: skip
COSTS = (
    "method", "trained parameters", "training, processor s", "with its trials, processor s", "peak, MiB", "precision",
    "processor", "process",
)  # fmt: skip
UNTOLD = r", stepping \d+|\(R\)| Processor"  # of a processor's name: several fit in a line without
SECONDS = ("train", "processor_seconds")  # runs of earlier versions lack it
DRAW = re.compile(r"-data_seed\d+(?=-|$)")


Found = dict[str, dict[str, list[Run]]]  # set -> method -> runs


def accuracy_on_test(run: Run) -> float | None:
    """The score by which methods are compared if nothing else is said."""
    return run.accuracy("test")


@dataclass(frozen=True)
class Grid:
    """The runs of a study by set and method."""

    runs: Found  # those with a test: one for each seed and draw
    # those that chose settings. One that failed is a trial as well: without it, a method that often fails would look as
    # good as one that never does.
    trials: Found
    score: Callable[[Run], float | None] = accuracy_on_test  # of a tested run, 0 to 1

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(method for found in self.runs.values() for method in found))

    def shared(self, methods: Sequence[str]) -> list[str]:
        """The sets on which all these methods have run."""
        return [name for name, found in self.runs.items() if all(method in found for method in methods)]

    def scores(self, name: str, method: str) -> list[float]:
        """The scores on a set, in %; empty if the method has not run on it."""
        return [100 * (self.score(run) or 0.0) for run in self.runs[name].get(method, [])]

    def texts(self, name: str, method: str) -> int:
        """The number of training texts of the method's runs on a set; 0 if they do not say it."""
        return self.runs[name][method][0].get("data", "sizes", "train") or 0

    def environments(self) -> list[dict[str, Any]]:
        """Where the tested runs were made."""
        return [run.environment for own in self.runs.values() for runs in own.values() for run in runs]

    def means(self, method: str, sets: Iterable[str]) -> list[float]:
        """The method's mean score on each set, in %."""
        return [fmean(self.scores(name, method)) for name in sets]

    def matched(self, first: str, second: str) -> "Grid":
        """What two methods did with the same texts: sets with as many training texts, and there the draws of both."""
        runs: Found = {}
        for name in self.shared((first, second)):
            pair = [self.runs[name][method] for method in (first, second)]
            both = set.intersection(*({draw_of(run) for run in found} for found in pair))
            if both and self.texts(name, first) == self.texts(name, second):
                kept = ([run for run in found if draw_of(run) in both] for found in pair)
                runs[name] = dict(zip((first, second), kept, strict=True))
        return replace(self, runs=runs)


def draw_of(run: Run) -> str:
    """The end of a row's name that tells which draw of the training texts the run has; empty if the row has one."""
    found = DRAW.search(run.row)
    return found[0] if found else ""


def grid_of(study: Study) -> Grid | None:
    """The grid of a study whose rows are named SET-METHOD; ``None`` if two methods do not share several sets."""
    runs: Found = {}
    trials: Found = {}
    for run in sorted(study.runs, key=lambda run: (str(run.get("config", "data_dir")), run.row)):
        name = run.data_set
        counts, found = run.accuracy("test") is not None, runs
        if run.tunes:
            counts, found = run.status == "failed" or run.monitored is not None, trials
        if counts and run.row.startswith(f"{name}-"):
            method = DRAW.sub("", run.row.removeprefix(f"{name}-"))
            found.setdefault(name, {}).setdefault(method, []).append(run)
    grid = Grid(runs, trials)
    enough = any(len(grid.shared(pair)) >= LEAST_SETS for pair in combinations(grid.methods, 2))
    return grid if enough else None


def over_sets(grid: Grid) -> list[Table]:
    """Test accuracies by set, each pair of methods over the sets, and costs; the report leaves out empty tables."""
    return [*sets_tables(grid), pairs_table(grid), costs_table(grid)]


def sets_tables(grid: Grid) -> list[Table]:
    """A row of scores for each set, and the mean over those that all methods have; of each method if these are more.

    Many sets beside each other are too wide for a page, so they are split over several tables.
    """
    methods = grid.methods
    numbers = Counter(len(runs) for own in grid.runs.values() for runs in own.values())
    usual = numbers.most_common(1)[0][0]
    noted = f"({counted(usual, 'run')} unless noted)"

    def cell(name: str, method: str) -> str:
        return score_cell(grid.scores(name, method), usual)

    sets = list(grid.runs)
    if len(methods) > len(sets):
        return [
            Table(
                (f"method {noted}", *(f"{name}, %" for name in names)),
                [(method, *(cell(name, method) for name in names)) for method in methods],
            )
            for names in (sets[start : start + MOST_BESIDE] for start in range(0, len(sets), MOST_BESIDE))
        ]
    rows = [(name, *(cell(name, method) for method in methods)) for name in sets]
    shared = grid.shared(methods)
    if len(shared) > 1:
        means = (f"{fmean(grid.means(method, shared)):.2f}" for method in methods)
        rows.append((f"mean of {len(shared)} sets", *means))
    return [Table((f"data set {noted}", *(f"{method}, %" for method in methods)), rows)]


@dataclass(frozen=True)
class Pair:
    """Two methods with the same training texts."""

    grid: Grid  # the two, with these texts
    difference: str  # the mean of the first method minus the second, in points, with its interval over sets
    # ``better``, ``equivalent`` and ``worse`` -> how likely the first method is typically that
    chances: dict[str, float]


def compare_pair(grid: Grid, first: str, second: str) -> Pair | None:
    """The Bayesian signed-rank test of two methods; ``None`` if too few sets have both."""
    matched = grid.matched(first, second)
    if len(matched.runs) < LEAST_SETS:
        return None
    ours, theirs = (matched.means(method, matched.runs) for method in (first, second))
    chances = bayesian_signed_rank(ours, theirs, ROPE)
    return Pair(matched, difference_cell([a - b for a, b in zip(ours, theirs, strict=True)], 2), chances)


def headlines(grid: Grid) -> list[str]:
    """How the other methods typically compare with the best one of the sets that all share; else of those it is on."""
    shared = grid.shared(grid.methods)
    places = {method: shared if len(shared) >= LEAST_SETS else grid.shared([method]) for method in grid.methods}
    reference = max(grid.methods, key=lambda method: (len(places[method]), fmean(grid.means(method, places[method]))))
    sentences = []
    for method in grid.methods:
        pair = None if method == reference else compare_pair(grid, method, reference)
        if pair is not None:
            typical, chance = max(pair.chances.items(), key=lambda item: item[1])
            sentences.append(
                f"Over {len(pair.grid.runs)} data sets, {method} minus {reference}: typically {typical}"
                f" ({100 * chance:.0f} %); mean {pair.difference} points, interval over data sets."
            )
    return sentences


def pairs_table(grid: Grid) -> Table:
    """Each pair of methods that can be compared."""
    rows = []
    for first, second in combinations(grid.methods, 2):
        pair = compare_pair(grid, first, second)
        if pair is not None:
            chances = (f"{100 * share:.0f}" for share in pair.chances.values())
            shown = pair.difference, *chances, _loss_cell(pair.grid, first, second)
            rows.append((f"{first} - {second}", str(len(pair.grid.runs)), *shown))
    return Table(PAIRS, rows)


def _loss_cell(grid: Grid, first: str, second: str) -> str:
    """The mean difference of the test losses with its interval; empty if a run lacks its loss."""
    sets = grid.runs.values()
    ours, theirs = ([mean_of_sets([found[method]], "test", "loss") for found in sets] for method in (first, second))
    differences = [a - b for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    return "" if len(differences) < len(sets) else difference_cell(differences, 3)


def difference_cell(differences: Sequence[float], digits: int) -> str:
    """``+1.13 (-1.52 to +3.79)``: the mean over sets with its interval."""
    values = fmean(differences), *interval_over_sets(differences)
    mean, low, high = (f"{value:+z.{digits}f}" for value in values)
    return f"{mean} ({low} to {high})"


def costs_table(grid: Grid) -> Table:
    """What each method costs, as means over the sets that all methods have; no rows without processor times.

    Runs of such a study share their machine. So the table has processor time, because wall time includes waiting. The
    time of trials is left out if they ran under other ``conditions`` than the runs.
    """
    sets, rows = grid.shared(grid.methods), []
    for method in grid.methods:
        found = [grid.runs[name][method] for name in sets]
        training = mean_of_sets(found, *SECONDS)
        if training is None:
            return Table(COSTS, [])
        tried = [run for name in sets for run in grid.trials.get(name, {}).get(method, ())]
        searched = sum(run.get(*SECONDS) or 0.0 for run in tried) / len(sets)
        alike = not tried or conditions([tried]) == conditions(found)
        trained, peak = mean_of_sets(found, "parameters", "trainable"), mean_of_sets(found, "memory", "peak_bytes")
        total = f"{training + searched:,.0f}" if alike else ""
        values = (f"{trained:,.0f}", f"{training:,.0f}", total, f"{(peak or 0) / 2**20:,.0f}")
        precisions, processors, process = ("; ".join(sorted(names)) for names in conditions(found))
        rows.append((method, *values, precisions, re.sub(UNTOLD, "", processors), process))
    table = Table(COSTS, rows)
    return table if len(set(table.column("process"))) > 1 else table.without("process")


def conditions(found: Iterable[Iterable[Run]]) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """Precisions, processors, and whether the runs were forked. Costs can be compared only where all are the same."""
    runs = [run for each in found for run in each]
    precisions = (
        "int8" if run.get("config", "precision") == "int8" else run.get("base_model", "precision") for run in runs
    )
    return (
        frozenset(str(name or "unknown") for name in precisions),
        frozenset(str(run.get("environment", "cpu") or "unknown") for run in runs),
        frozenset("forked" if run.forked else "started" for run in runs),
    )


def mean_of_sets(found: Sequence[Sequence[Run]], *keys: str) -> float | None:
    """The mean over sets of the mean over runs; ``None`` without runs, or if one lacks the value."""
    values = [[run.get(*keys) for run in runs] for runs in found]
    return None if not values or any(None in each for each in values) else fmean(map(fmean, values))


def score_cell(values: Sequence[float], usual: int | None = None) -> str:
    """``88.80 ± 0.35 (3)``: mean, standard deviation and number, if it is not the usual one; empty without values."""
    mean, deviation = mean_and_deviation(values)
    if mean is None:
        return ""
    number = "" if len(values) == usual else f" ({len(values)})"
    return f"{mean:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}") + number
