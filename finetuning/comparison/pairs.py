"""Compares every pair of a study's rows on the same test texts, and says which row is best and how sure that is."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from finetuning.comparison.collected import Study
from finetuning.comparison.predictions import Predictions
from finetuning.comparison.statistics import (
    LEVEL,
    Difference,
    holm,
    mcnemar,
    pooled_difference,
    resamples_for,
    seed_spread,
    squares,
)

SHOWN = 120  # largest number of pairs in a table: 16 rows have 120
UNEVEN = 0.9, 0.01  # share of the squares, standard deviation: above both, the spread comes from one row
NOT_SIGNIFICANT = "no significant difference"
READING = (
    "p is from a bootstrap over test texts, widened by the spread over seeds; for accuracy it is exact, without draws."
    " All rows share one spread, so it also applies to rows with a single seed. If no row has a second seed, p is from"
    " McNemar's exact test, which compares these two runs only and says nothing about other seeds. The p values are"
    " corrected by Holm's method for the number of pairs; the intervals are not. No significant difference: the"
    f" corrected p is {LEVEL} or more. This does not prove that two rows are equal."
)


@dataclass(frozen=True)
class Comparison:
    """Two rows of a table, compared on the same test texts."""

    first: str  # the name of a row
    second: str  # the name of another row
    difference: Difference  # the first minus the second, with the p value of ``test``
    corrected_p: float  # the p value after Holm's correction over the table
    test: str  # which test the p value is from

    @property
    def verdict(self) -> str:
        """Which row is better, if the difference is significant."""
        if self.corrected_p >= LEVEL:
            return NOT_SIGNIFICANT
        return f"{self.first if self.difference.mean > 0 else self.second} is better"


Compared = Mapping[str, Sequence[Comparison]]  # study -> all pairs of its rows


def compare_rows(study: Study, measure: str = "accuracy") -> tuple[list[Comparison], list[str]]:
    """Compares every pair of rows whose test predictions were kept, and gives notes about the other rows.

    Args:
        measure: ``accuracy``, or ``micro_f1`` to compare only rows of multi-label data.
    """
    usable, notes = comparable(study, measure)
    same = [(a, b) for a, b in itertools.combinations(usable, 2) if usable[a][0].test_set == usable[b][0].test_set]
    groups = _by_test_set(usable)
    accuracies = {name: [p.score(measure) for p in runs] for name, runs in usable.items()}
    spreads = {test_set: seed_spread([accuracies[name] for name in names]) for test_set, names in groups.items()}
    resamples = resamples_for(len(same))
    counted = {name: np.stack([p.counted(measure) for p in runs]) for name, runs in usable.items()}

    def compare(a: str, b: str) -> tuple[Difference, str]:
        """The difference of two rows, and the test of its p value. The interval is always from the bootstrap."""
        spread = spreads[usable[a][0].test_set]
        if measure == "accuracy" and spread is None:  # no row has a second seed
            p = mcnemar(usable[a][0].correct, usable[b][0].correct)
            return replace(pooled_difference([(counted[a], counted[b], None)]), p=p), "McNemar"
        return pooled_difference([(counted[a], counted[b], spread)], resamples, measure), "bootstrap"

    found = [compare(a, b) for a, b in same]
    corrected = holm([difference.p for difference, _ in found])
    comparisons = [
        Comparison(a, b, difference, p, test)
        for (a, b), (difference, test), p in zip(same, found, corrected, strict=True)
    ]
    uneven = [_with_most_spread({name: accuracies[name] for name in names}) for names in groups.values()]
    notes += [
        f"Nearly all of the spread over seeds comes from {name}. It makes all other rows harder to tell apart."
        for name in uneven
        if name
    ]
    if len(groups) > 1:
        shown = "; ".join(", ".join(names) for names in groups.values())
        notes.append(f"Only rows with the same test texts are compared. The groups are: {shown}.")
    return comparisons, notes


def comparable(study: Study, measure: str = "accuracy") -> tuple[dict[str, list[Predictions]], list[str]]:
    """The predictions of each row that can be compared, one entry for each seed, and notes about the other rows."""
    predictions = {row.name: [run.predictions for run in row.tested] for row in study.rows if row.tested}
    if measure == "micro_f1":
        predictions = {n: runs for n, runs in predictions.items() if all(p and p.counts is not None for p in runs)}
    kept = {name: [p for p in runs if p is not None] for name, runs in predictions.items()}
    without = [name for name, runs in kept.items() if len(runs) < len(predictions[name])]
    mixed = [name for name, runs in kept.items() if len({p.test_set for p in runs}) > 1]
    notes = []
    if without and len(predictions) > 1:
        notes.append(f"Not compared, because the test predictions were not kept: {', '.join(without)}.")
    if mixed:
        notes.append(f"Not compared, because each seed has its own test split: {', '.join(mixed)}.")
    return {name: runs for name, runs in kept.items() if name not in (*without, *mixed)}, notes


def _by_test_set(rows: Mapping[str, Sequence[Predictions]]) -> dict[Any, list[str]]:
    groups: dict[Any, list[str]] = {}
    for name, runs in rows.items():
        groups.setdefault(runs[0].test_set, []).append(name)
    return groups


def method_of(study: Study, row: str) -> str:
    """The method in the name of a row SET-METHOD. The name of a collected set may have hyphens."""
    sets = (name for name in study.data_sets if row.startswith(f"{name}-"))
    found = max(sets, key=len, default=row.partition("-")[0])
    return row[len(found) + 1 :]


def pooled_sentences(study: Study) -> list[str]:
    """For rows named ``SET-METHOD``: how far the methods differ in the mean over all data sets, a sentence each pair.

    Returns:
        nothing if there is one data set only, or if a method is missing on one of them.
    """
    rows, _ = comparable(study)
    sets: dict[Any, dict[str, Sequence[Predictions]]] = {
        test_set: {method_of(study, name): rows[name] for name in names}
        for test_set, names in _by_test_set(rows).items()
    }
    methods = sorted(next(iter(sets.values()), ()))
    complete = all(sorted(found) == methods for found in sets.values()) and len(rows) == len(sets) * len(methods)
    if len(sets) < 2 or not complete or "" in methods:
        return []
    sentences = []
    spreads = [seed_spread([[p.score("accuracy") for p in runs] for runs in found.values()]) for found in sets.values()]
    for a, b in itertools.combinations(methods, 2):
        arrays = []
        for found, spread in zip(sets.values(), spreads, strict=True):
            first, second = (np.stack([p.counted("accuracy") for p in found[name]]) for name in (a, b))
            arrays.append((first, second, spread))
        difference = pooled_difference(arrays)
        sentences.append(f"Mean over the {len(sets)} data sets, {a} minus {b}: {difference}.")
    return sentences


def _with_most_spread(accuracies: dict[str, list[float]]) -> str | None:
    """The row from which nearly all of the spread over seeds comes; ``None`` with fewer than three rows."""
    spread = {name: squares(a) for name, a in accuracies.items() if len(a) > 1}
    if len(spread) < 3:
        return None
    largest = max(spread, key=lambda name: spread[name])
    share, deviation = UNEVEN
    alone = spread[largest] > share * sum(spread.values()) and statistics.stdev(accuracies[largest]) > deviation
    return largest if alone else None


def worth_showing(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """All comparisons; if there are too many for a table, only the ones with a best row."""
    highest = _highest(comparisons)
    return [c for c in comparisons if len(comparisons) <= SHOWN or c.first in highest]


def _highest(comparisons: Sequence[Comparison]) -> list[str]:
    """The best row of each group of rows with the same test texts. The first row of a comparison is the better one."""
    lower = {c.second for c in comparisons}
    return list(dict.fromkeys(c.first for c in comparisons if c.first not in lower))


@dataclass(frozen=True)
class Answer:
    """The best row of a study, or of a group of its rows with the same test texts."""

    best: str  # the row's name
    accuracy: float  # its test accuracy as a fraction, mean over seeds
    equal: tuple[str, ...]  # rows that do not differ significantly from it
    worse: tuple[str, ...]  # rows that are significantly worse
    uncompared: bool = False  # whether the study has other tested rows, with which no row could be compared
    tied: tuple[str, ...] = ()  # rows of ``equal`` with the same accuracy

    def certainty(self, most: int | None = None) -> str:
        """How sure it is that this row is the best; ``most`` limits how many names are listed."""
        if self.equal:
            shown = list(self.equal[:most])
            rest = len(self.equal) - len(shown)
            return f"{NOT_SIGNIFICANT}: {', '.join(shown)}" + (f" and {rest} more" if rest else "")
        others = self.worse[0] if len(self.worse) == 1 else f"all {len(self.worse)} others"
        return f"significantly better than {others}"

    @property
    def sentence(self) -> str:
        """The answer as text."""
        certainty = self.certainty()
        best = f"Best of the {1 + len(self.equal) + len(self.worse)} compared rows" if self.uncompared else "Best"
        same = f"; the same: {', '.join(self.tied)}" if self.tied else ""
        return f"{best}: {self.best} ({100 * self.accuracy:.2f} %{same}). {certainty[0].upper()}{certainty[1:]}."


def answers(study: Study, comparisons: Sequence[Comparison]) -> list[Answer]:
    """The best row, or the best one of each group of rows with the same test texts."""
    accuracies = {row.name: row.accuracies() for row in study.rows}
    compared = {name for c in comparisons for name in (c.first, c.second)}
    uncompared = any(row.tested and row.name not in compared for row in study.rows)
    found = []
    for best in _highest(comparisons):
        own = [c for c in comparisons if c.first == best]
        equal = tuple(c.second for c in own if c.corrected_p >= LEVEL)
        worse = tuple(c.second for c in own if c.corrected_p < LEVEL)
        means = {name: round(statistics.fmean(accuracies[name]), 9) for name in (best, *equal)}
        tied = tuple(name for name in equal if means[name] == means[best])
        found.append(Answer(best, statistics.fmean(accuracies[best]), equal, worse, uncompared, tied))
    return found
