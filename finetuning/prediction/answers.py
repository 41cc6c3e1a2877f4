"""Probabilities -> the columns of the answer: the label, and the probabilities of all labels or of the best K."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from finetuning.errors import UserError
from finetuning.prediction.confidence import CONFIDENCE, Confidence
from finetuning.prediction.trained import Trained
from finetuning.runs.answers import MOST_PROBABLE, Rule

LABEL, PROBABILITY = "label", "probability_"
IF_TAKEN = "predicted_"  # before our columns if the input has columns of these names


@dataclass(frozen=True)
class AnswerColumns:
    """What is said about each text."""

    names: Sequence[str]  # the labels
    rule: Rule = MOST_PROBABLE  # which labels a text gets
    top_k: int | None = None  # number of labels with probabilities; ``None`` is all of them
    # how sure an answer is, which is then a column; ``None`` if nobody asks for it
    confidence: Confidence | None = None
    to_check: bool = False  # whether somebody will label these texts: the column ``label`` stays free for that
    separator: str | None = None  # what separated the labels of a text in training; ``None`` if nothing did

    @property
    def columns(self) -> dict[str, type]:
        """The columns: their names, and the type of their values."""
        name = f"{IF_TAKEN}{LABEL}" if self.to_check else LABEL
        first: dict[str, type] = {name: list if self.rule.multi_label else str}
        first |= {} if self.confidence is None else {CONFIDENCE: float}
        if self.top_k is None:
            return first | {f"{PROBABILITY}{name}": float for name in self.names}
        best = [{f"{LABEL}_{k}": str, f"{PROBABILITY}{k}": float} for k in range(1, self.top_k + 1)]
        return first | {name: kind for pair in best for name, kind in pair.items()}

    def spelled(self, labels: Sequence[str]) -> str:
        """A list of labels in a cell of text: as in training, else joined by commas; as JSON if a name has a comma."""
        if self.separator is None and labels and self._commas:
            return json.dumps(labels, ensure_ascii=False)
        return (self.separator or ",").join(labels)

    @cached_property
    def _commas(self) -> bool:
        return any("," in name for name in self.names)

    def of(self, probabilities: np.ndarray) -> list[list[Any]]:
        """The values of each column.

        Args:
            probabilities: (n, labels). A row of NaN is one without a text.

        Returns:
            For each column n values: labels are strings, in a multi-label run lists of strings, and probabilities are
            numbers. A row without a text has ``None`` everywhere. A row with too little confidence has no label.
        """
        answered = [not missing for missing in np.isnan(probabilities[:, 0])]
        first, sure = [], answered
        if self.confidence is not None:
            confidence = self.confidence.of(probabilities, self.rule)
            first, sure = [_known(confidence.tolist(), answered)], (confidence >= self.confidence.least).tolist()
        given = self.rule.given(probabilities)
        labels = [self._label(row) if known else None for known, row in zip(sure, given, strict=True)]
        columns: list[list[Any]] = [labels, *first]
        if self.top_k is None:
            return [*columns, *(_known(column.tolist(), answered) for column in probabilities.T)]
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, : self.top_k]
        best = np.take_along_axis(probabilities, order, axis=1)
        for numbers, values in zip(order.T, best.T, strict=True):
            columns += [_known([self.names[i] for i in numbers.tolist()], answered), _known(values.tolist(), answered)]
        return columns

    def _label(self, given: np.ndarray) -> str | list[str]:
        labels = [self.names[i] for i in np.flatnonzero(given).tolist()]
        return labels if self.rule.multi_label else labels[0]


def _known(values: list[Any], answered: Sequence[bool]) -> list[Any]:
    return [value if known else None for value, known in zip(values, answered, strict=True)]


def make_answers(trained: Trained, threshold: float | None, top_k: int | None) -> AnswerColumns:
    """The answers that the flags ask for.

    Raises:
        UserError: ``--threshold`` with a run without one, or more labels than there are.
    """
    if threshold is not None and trained.rule.threshold is None:
        raise UserError(
            f"--threshold {threshold:g}: needs a multi-label run, or two classes trained with --threshold, but"
            f" {trained.directory} has no threshold"
        )
    count = len(trained.label_names)
    if top_k is not None and top_k > count:
        raise UserError(f"--top_k {top_k}: {trained.directory} has {count} labels, so at most {count}")
    rule = trained.rule if threshold is None else replace(trained.rule, threshold=threshold)
    return AnswerColumns(trained.label_names, rule, top_k, separator=trained.config.data.label_separator)


def names_beside(columns: Collection[str], taken: Collection[str]) -> list[str]:
    """The names of our columns next to those of the input.

    Raises:
        UserError: the input has columns of these names even with ``IF_TAKEN`` before them.
    """
    if not set(columns) & set(taken):
        return list(columns)
    kept = {name for name in columns if name.startswith(IF_TAKEN)} - set(taken)
    others = [name if name in kept else f"{IF_TAKEN}{name}" for name in columns]
    if clash := sorted(set(others) & set(taken)):
        raise UserError(f"--output: the input already has a column {clash[0]}: rename or remove it")
    return others
