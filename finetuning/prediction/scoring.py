"""How many answers are right, where the input has the true labels too. Nothing here imports torch."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from finetuning.errors import UserError, listed
from finetuning.prediction.rows import Rows, Source
from finetuning.prediction.trained import Trained
from finetuning.runs.records import accuracy_interval


class Score:
    """Counts answers by true and given label, while they pass.

    Args:
        trained: what labels texts.
        column: of the input, with the true labels; a text without one is not counted.

    Raises:
        UserError: the classifier gives several labels to a text.
    """

    def __init__(self, trained: Trained, column: str) -> None:
        if trained.multi_label:
            raise UserError(f"--label_column {column}: needs a classifier that gives each text one label")
        self.column = column
        self._places = {name: i for i, name in enumerate(trained.label_names)}
        self._counts = np.zeros((len(self._places), len(self._places)), dtype=np.int64)  # true label, given label

    def check(self, source: Source) -> None:
        """Reads all labels once.

        Raises:
            UserError: the column is missing, has no label, or one that the classifier does not know.
        """
        labelled = False
        for table in source.tables():
            if self.column not in table:
                raise UserError(
                    f"--label_column {self.column}: must be a column of {source.flag.removeprefix('--file ')}, which"
                    f" has: {listed(table.columns)}"
                )
            found = self._true(table)
            for label in found:
                if label is not None and label not in self._places:
                    raise UserError(
                        f"--label_column {self.column}: {label!r} is none of the classifier's labels:"
                        f" {', '.join(self._places)}"
                    )
            labelled |= any(label is not None for label in found)
        if not labelled:
            raise UserError(f"--label_column {self.column}: has no label: leave it out")

    def counted(self, answered: Iterable[tuple[Rows, list[list[Any]]]]) -> Iterator[tuple[Rows, list[list[Any]]]]:
        """The same rows and values; the first column of the values is the label."""
        for rows, values in answered:
            for true, given in zip(self._true(rows.table), values[0], strict=True):
                if true is not None and given is not None:
                    self._counts[self._places[true], self._places[given]] += 1
            yield rows, values

    def __str__(self) -> str:
        texts = int(self._counts.sum())
        if not texts:
            return "no labelled text was answered"
        right, both = np.diag(self._counts), self._counts.sum(0) + self._counts.sum(1)
        accuracy, macro_f1 = right.sum() / texts, float((2 * right[both > 0] / both[both > 0]).mean())
        low, high = accuracy_interval(accuracy, texts)
        return (
            f"accuracy {accuracy:.2%}, 95 % interval {low:.2%} to {high:.2%}; macro F1 {macro_f1:.2%};"
            f" {texts:,} labelled and answered texts"
        )

    def _true(self, table: pd.DataFrame) -> list[str | None]:
        return [_name(value) for value in table[self.column].tolist()]


def _name(value: object) -> str | None:
    """A label as the classifier calls it: a column of whole numbers with gaps holds floats."""
    if value is None or value != value:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None
