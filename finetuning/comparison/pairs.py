"""Every pair of a study's rows, compared on the same test texts."""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from finetuning.comparison.collected import Predictions, Study
from finetuning.comparison.statistics import (
    LEVEL,
    Difference,
    SeedSpread,
    bootstrap_difference,
    holm,
    mcnemar,
    resamples_for,
    seed_spread,
    squares,
)
from finetuning.errors import UserError

SHOWN = 120  # pairs in a table; 16 rows have as many
UNEVEN = 0.9, 0.01  # a row with so much of the squares, and such a deviation, has the spread for itself
READING = (
    "p: a bootstrap over test texts, widened by the spread over seeds that the rows share (a single run has one, too)."
    " Where no row has a second seed, McNemar's exact test, which says whether two runs differ and nothing of other"
    " seeds. Corrected by Holm's method over all pairs of the table, the intervals are not; not distinguishable: a"
    f" corrected p of {LEVEL} or more, which is no proof that two rows are equal."
)


@dataclass(frozen=True)
class Comparison:
    """Two rows of a table, on the same test texts.

    Attributes:
        first: a row's name.
        second: another's.
        difference: the first minus the second, with the p value of ``test``.
        corrected_p: after Holm's correction over the table.
        test: what the p value is of.
    """

    first: str
    second: str
    difference: Difference
    corrected_p: float
    test: str

    @property
    def verdict(self) -> str:
        if self.corrected_p >= LEVEL:
            return "not distinguishable"
        return f"{self.first if self.difference.mean > 0 else self.second} is better"


def compare(
    first: Sequence[Predictions], second: Sequence[Predictions], spread: SeedSpread | None, resamples: int
) -> tuple[Difference, str]:
    """The difference between two methods, and the test that its p value is of.

    That is McNemar's between two single runs where nothing is known of the spread over seeds; the interval is always
    the bootstrap's.

    Args:
        first: of one method, a run a seed.
        second: of the other one.
        spread: over seeds, of all methods with these test texts; ``None`` where none has a second seed.
        resamples: of the bootstrap that gives a p value.

    Raises:
        UserError: the runs were tested on different texts.
    """
    if len({predictions.test_set for predictions in (*first, *second)}) > 1:
        raise UserError("runs that were tested on different texts cannot be compared: give runs of one test split")
    a, b = (np.stack([predictions.correct for predictions in runs]) for runs in (first, second))
    if spread is None and len(a) == len(b) == 1:
        return replace(bootstrap_difference(a, b), p=mcnemar(a[0], b[0])), "McNemar"
    return bootstrap_difference(a, b, spread, resamples), "bootstrap"


def compare_rows(study: Study) -> tuple[list[Comparison], list[str]]:
    """Every pair of rows whose test predictions were kept, Holm's correction over all; and notes on the others."""
    predictions = {row.name: [run.predictions for run in row.tested] for row in study.rows if row.tested}
    kept = {name: [p for p in runs if p is not None] for name, runs in predictions.items()}
    without = [name for name, runs in kept.items() if len(runs) < len(predictions[name])]
    mixed = [name for name, runs in kept.items() if len({p.test_set for p in runs}) > 1]
    usable = {name: runs for name, runs in kept.items() if name not in (*without, *mixed)}
    same = [(a, b) for a, b in itertools.combinations(usable, 2) if usable[a][0].test_set == usable[b][0].test_set]
    groups: dict[Any, list[str]] = {}
    for name, runs in usable.items():
        groups.setdefault(runs[0].test_set, []).append(name)
    accuracies = {name: [float(p.correct.mean()) for p in runs] for name, runs in usable.items()}
    spreads = {test_set: seed_spread([accuracies[name] for name in names]) for test_set, names in groups.items()}
    resamples = resamples_for(len(same))
    found = [compare(usable[a], usable[b], spreads[usable[a][0].test_set], resamples) for a, b in same]
    corrected = holm([difference.p for difference, _ in found])
    comparisons = [
        Comparison(a, b, difference, p, test)
        for (a, b), (difference, test), p in zip(same, found, corrected, strict=True)
    ]
    notes = []
    if without and len(predictions) > 1:
        notes.append(f"Not compared with others, for the test predictions were not kept: {', '.join(without)}.")
    if mixed:
        notes.append(f"Not compared with others, for each seed has a test split of its own: {', '.join(mixed)}.")
    uneven = [_with_most_spread({name: accuracies[name] for name in names}) for names in groups.values()]
    notes += [
        f"Nearly all of the spread over seeds is that of {name}, and makes all other rows harder to tell apart."
        for name in uneven
        if name
    ]
    if len(groups) > 1:
        shown = "; ".join(", ".join(names) for names in groups.values())
        notes.append(f"Compared only within each group, for the test texts differ between them: {shown}.")
    return comparisons, notes


def _with_most_spread(accuracies: dict[str, list[float]]) -> str | None:
    """The row, of three at least, whose seeds lie so far apart that the spread which all share is its own."""
    spread = {name: squares(a) for name, a in accuracies.items() if len(a) > 1}
    if len(spread) < 3:
        return None
    largest = max(spread, key=lambda name: spread[name])
    share, deviation = UNEVEN
    alone = spread[largest] > share * sum(spread.values()) and statistics.stdev(accuracies[largest]) > deviation
    return largest if alone else None


def worth_showing(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """All of them, or where that would be an endless table those with a highest row."""
    highest = _highest(comparisons)
    return [c for c in comparisons if len(comparisons) <= SHOWN or c.first in highest]


def _highest(comparisons: Sequence[Comparison]) -> list[str]:
    """The highest row, or that of each group of rows with test texts of its own; comparisons name the higher first."""
    lower = {c.second for c in comparisons}
    return list(dict.fromkeys(c.first for c in comparisons if c.first not in lower))


def headlines(comparisons: Sequence[Comparison]) -> list[str]:
    """What the comparisons say of the highest row, or of the highest of each group with test texts of its own."""
    sentences = []
    for best in _highest(comparisons):
        own = [c for c in comparisons if c.first == best]
        equal = [c.second for c in own if c.corrected_p >= LEVEL]
        others = own[0].second if len(own) == 1 else f"each of the {len(own)} others"
        said = f"Not distinguishable from it: {', '.join(equal)}." if equal else f"Distinguishable from {others}."
        sentences.append(f"Highest of the {len(own) + 1} compared: {best}. {said}")
    return sentences
