"""Would a recommender choose a better method than the default? ``python -m benchmarks.recommend``

From the collected runs of ``studies/methods_on_sets.toml``. Each data set is left out in turn, and the others choose a
method for it. The regret is what the choice loses to the best method of the set, in points of test accuracy. The best
one is known from the same test texts, so a part of the regret is chance.

Two more rows are not choices of a method: the default command, now and before, from ``studies/placement.toml``. It is
not tuned, and can be better than all methods of the study.

A second table judges the same rules on the sets of ``studies/some_classes.toml``, on which none of them was chosen.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev

from benchmarks import harness
from compare_methods import DATA_SETS, ROOT
from finetuning.comparison.collected import read_study
from finetuning.comparison.over_sets import LEAST_SETS, Grid, difference_cell, grid_of
from finetuning.comparison.statistics import interval_over_sets
from finetuning.errors import UserError
from finetuning.pages import Table, dated, renew_tables

STUDY = "methods_on_sets"
COLUMNS = (
    "chosen by", "mean regret, points (95 %)", "largest regret", "sets within 1 point of the best",
    "gain over the default command, points (95 %)", "on all its sets",
)  # fmt: skip
NEIGHBOURS = (1, 3)
DEFAULT = "the default command"
DEFAULTS = {"all": DEFAULT, "query-value": "the default before: query and value"}  # rows of the study "placement"
UNSEEN = "some_classes"  # a study over sets that no rule has seen
THERE = {"lora-all": "lora", "full": "full", "head-mean": "head-mean"}  # method -> its row in that study
Scores = Mapping[str, Mapping[str, float]]  # data set -> method -> score in %
Chooser = Callable[[str, Scores], str]  # a data set, and the test scores of the others


def size_of(grid: Grid, name: str) -> tuple[int, int, float]:
    """What is known of a data set before training: its training texts, its classes, and tokens a text."""
    run = next(iter(grid.runs[name].values()))[0]
    texts = run.get("data", "sizes", "train")
    return texts, len(run.get("data", "label_names")), run.get("data", "tokens", "train") / texts


def best_of(sets: Sequence[str], scores: Scores) -> str:
    """The method with the best mean score on some sets."""
    return max(scores[sets[0]], key=lambda method: fmean(scores[name][method] for name in sets))


def always(method: str) -> Chooser:
    """Chooses this method for every set."""
    return lambda _name, _others: method


def nearest(points: Mapping[str, Sequence[float]], count: int) -> Chooser:
    """Chooses what was best on the ``count`` sets whose descriptions are nearest, each value in standard deviations."""

    def choose(name: str, others: Scores) -> str:
        columns = zip(*(points[other] for other in others), strict=True)
        scales = [stdev(column) or 1.0 for column in columns]

        def distance(other: str) -> float:
            pairs = zip(points[name], points[other], scales, strict=True)
            return math.hypot(*((a - b) / scale for a, b, scale in pairs))

        return best_of(sorted(others, key=distance)[:count], others)

    return choose


def choosers(methods: Sequence[str], *grids: Grid) -> dict[str, Chooser]:
    """Every way to choose one of these methods before training, by its name in the table.

    Args:
        grids: the studies whose data sets are described.
    """
    points = {name: [math.log(each) for each in size_of(grid, name)] for grid in grids for name in grid.runs}
    found = {f"always {method}": always(method) for method in methods}
    found["best on the other sets"] = lambda _name, others: best_of(list(others), others)
    for count in NEIGHBOURS:
        found["nearest set" if count == 1 else f"{count} nearest sets"] = nearest(points, count)
    return found


def after_trials(grid: Grid) -> Chooser:
    """Chooses the method whose best trial has the highest score on validation."""
    trials = {
        name: {method: max(run.monitored or 0.0 for run in runs) for method, runs in found.items()}
        for name, found in grid.trials.items()
    }
    return lambda name, others: max(next(iter(others.values())), key=lambda method: trials[name][method])


def scores_of(grid: Grid, rows: Mapping[str, str]) -> Scores:
    """The scores on the sets that all these methods have.

    Args:
        rows: method -> its row in the study.
    """
    sets = grid.shared(list(rows.values()))
    return {name: {method: fmean(grid.scores(name, row)) for method, row in rows.items()} for name in sets}


def regrets(scores: Scores, choose: Chooser, known: Scores | None = None) -> list[float]:
    """What the choice for each set loses to its best method; the choice does not see the set's own scores.

    Args:
        known: what it sees; ``None``: the other sets.
    """
    losses = []
    for name, own in scores.items():
        others = {other: found for other, found in scores.items() if other != name} if known is None else known
        losses.append(max(own.values()) - own[choose(name, others)])
    return losses


def default_accuracies(defaults: Grid, method: str = "all") -> dict[str, float]:
    """Data set -> mean test accuracy in % of a row of ``studies/placement.toml``: by default the default command."""
    return {name: fmean(found) for name in defaults.runs if (found := defaults.scores(name, method))}


def default_scores(grid: Grid, defaults: Grid) -> dict[str, dict[str, float]]:
    """Name in the table -> data set -> test accuracy in % of the default command on the texts of the methods."""

    def texts(of: Grid, name: str) -> object:
        return next(iter(of.runs[name].values()))[0].get("data", "tokens")

    same = [name for name in grid.runs if name in defaults.runs and texts(grid, name) == texts(defaults, name)]
    return {
        shown: {name: score for name, score in default_accuracies(defaults, method).items() if name in same}
        for method, shown in DEFAULTS.items()
    }


def table(grid: Grid, defaults: Mapping[str, Mapping[str, float]]) -> Table:
    """A row for each way to choose, and for each default, on the sets that all methods have.

    A method with runs on fewer than half of the sets is left out, because few sets would be left.
    """
    methods = [method for method in grid.methods if 2 * len(grid.shared([method])) >= len(grid.runs)]
    sets = grid.shared(methods)
    if len(sets) <= LEAST_SETS:
        raise UserError(f"{STUDY}: {len(sets)} data sets have runs of all methods: must be over {LEAST_SETS}")
    scores = scores_of(grid, {method: method for method in methods})
    ways = choosers(methods, grid) | {"validation, after all trials of all methods": after_trials(grid)}
    found = {chosen: regrets(scores, choose) for chosen, choose in ways.items()}
    for shown, own in defaults.items():
        if own.keys() >= set(sets):
            found[shown] = [max(scores[name].values()) - own[name] for name in sets]
    everywhere = {f"always {method}": gain_everywhere(grid, method, defaults.get(DEFAULT, {})) for method in methods}
    rows = [(*row, everywhere.get(row[0], "")) for row in rows_of(found, DEFAULT)]
    return Table(COLUMNS, rows).without_empty_columns()


def unseen_table(grid: Grid, unseen: Grid) -> Table:
    """A row for each way to choose by the sets of ``grid``, for the sets of ``unseen``, among the methods of both.

    There LoRA on all linears has the default settings: it is the default command.
    """
    seen, scores = scores_of(grid, {method: method for method in THERE}), scores_of(unseen, THERE)
    found = {chosen: regrets(scores, choose, seen) for chosen, choose in choosers([*THERE], grid, unseen).items()}
    return Table(COLUMNS[:-1], rows_of(found, "always lora-all"))


def rows_of(found: Mapping[str, Sequence[float]], default: str) -> Sequence[tuple[str, ...]]:
    """A row for each way to choose with its regrets, next to one of them, if it is there."""
    rows = []
    for chosen, losses in found.items():
        low, high = interval_over_sets(losses)
        near = sum(loss <= 1 for loss in losses)
        mean = f"{fmean(losses):.2f} ({low:.2f} to {high:.2f})"
        gains = [a - b for a, b in zip(found.get(default, losses), losses, strict=True)]
        gain = "" if chosen == default or default not in found else difference_cell(gains, 2)
        rows.append((chosen, mean, f"{max(losses):.2f}", f"{near} of {len(losses)}", gain))
    return rows


def gain_everywhere(grid: Grid, method: str, default: Mapping[str, float]) -> str:
    """What a method gains over the default command on all sets that have both, and their number; empty if too few."""
    sets = [name for name in grid.shared([method]) if name in default]
    if len(sets) < LEAST_SETS:
        return ""
    gains = [ours - default[name] for ours, name in zip(grid.means(method, sets), sets, strict=True)]
    return f"{difference_cell(gains, 2)}, {len(sets)} sets"


def collected(study: str) -> Grid:
    """The collected runs of a study over data sets, refused if they are too few."""
    grid = grid_of(read_study(study, ROOT / "results"))
    if grid is None:
        raise UserError(f"{study}: no two methods have runs on {LEAST_SETS} data sets")
    return grid


def sections() -> dict[str, str]:
    """The tables of the collected runs, as docs/data_sets.md has them, by name."""
    grid, unseen = collected(STUDY), collected(UNSEEN)
    return {
        "recommend": dated(table(grid, default_scores(grid, collected("placement"))), grid.environments()),
        "recommend_unseen": dated(unseen_table(grid, unseen), unseen.environments()),
    }


@harness.as_main
def main(argv: Sequence[str] | None) -> int:
    """Renews the tables of docs/data_sets.md. Returns the exit status."""
    harness.make_parser("What a recommender would lose on a data set that it has not seen.").parse_args(argv)
    found = sections()
    print("\n\n".join(found.values()))
    renew_tables(DATA_SETS, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
