"""How many answers are right, if the input also has the true labels. Nothing here imports torch."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from finetuning.data.columns import texts_in
from finetuning.data.files import UNREADABLE
from finetuning.data.labels import as_number
from finetuning.data.tables import class_names, split_files
from finetuning.datasets import traits_of
from finetuning.errors import UserError
from finetuning.prediction.rows import Answered, Source
from finetuning.prediction.trained import Trained
from finetuning.runs.records import accuracy_interval
from finetuning.runs.scores import macro_f1


def label_codes(file: Path, column: str, trained: Trained) -> Sequence[str]:
    """The names of the labels 0, 1, ... of a file, as training reads them; empty if its numbers are names themselves.

    Args:
        file: what ``--file`` gave.
        column: of its labels.
        trained: the classifier.
    """
    own = None
    with suppress(*UNREADABLE):  # the reading that follows says it
        own = class_names(file, column) if file.is_file() else None
    own = own if own and set(own) & set(trained.label_names) else None  # of other classes
    return traits_of(trained.config.data.dataset).label_names or own or ()


def trained_on(file: Path, folder: Path | None) -> bool:
    """Whether a file has texts that a run was trained on, by its path.

    Args:
        file: what ``--file`` gave.
        folder: the run's ``--data_dir``.
    """
    with suppress(UserError, OSError):  # the data of the run are elsewhere now
        return folder is not None and split_files(folder)["train"].samefile(file)
    return False


class Score:
    """Counts answers by true and given label, while they pass.

    Args:
        trained: what labels texts.
        column: of the input, with the true labels; a text without one is not counted.

    Raises:
        UserError: the classifier gives several labels to a text.
    """

    def __init__(self, trained: Trained, column: str, codes: Sequence[str] = ()) -> None:
        if trained.multi_label:
            raise UserError(f"--label_column {column}: needs a classifier that gives each text one label")
        self.column, self._codes = column, codes
        self._places = {name: i for i, name in enumerate(trained.label_names)}
        self._counts = np.zeros((len(self._places), len(self._places)), dtype=np.int64)  # true label, given label

    def checking(self, source: Source) -> Source:
        """The same source. When it is read, its labels are checked.

        Reading raises:
            UserError: the column is missing, has no label, or one that the classifier does not know.
        """

        def tables() -> Iterator[pd.DataFrame]:
            labelled = there = False
            for table in source.tables():
                found = [label for label in self._true(table) if label is not None]
                if unknown := [label for label in found if label not in self._places]:
                    raise UserError(
                        f"--label_column {self.column}: {unknown[0]!r} is none of the classifier's labels:"
                        f" {', '.join(self._places)}"
                    )
                labelled, there = labelled or bool(found), there or self.column in table
                yield table
            if not there:
                texts_in(table, self.column, source.where, "label_column")  # says that it is missing
            if not labelled:
                raise UserError(f"--label_column {self.column}: has no label: leave it out")

        return replace(source, tables=tables)

    def counted(self, answered: Iterable[Answered]) -> Iterator[Answered]:
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
        right = np.diag(self._counts)
        accuracy = right.sum() / texts
        (score,) = macro_f1(right[None], self._counts.sum(0)[None], self._counts.sum(1)[None], multi_label=False)
        low, high = accuracy_interval(accuracy, texts)
        return (
            f"accuracy {accuracy:.2%}, 95 % interval {low:.2%} to {high:.2%}; macro F1 {score:.2%};"
            f" {texts:,} labelled and answered texts"
        )

    def _true(self, table: pd.DataFrame) -> list[str | None]:
        if self.column not in table:  # of a chunk of objects: others may have it
            return [None] * len(table)
        return [self._name(value) for value in table[self.column].tolist()]

    def _name(self, value: object) -> str | None:
        """A label as the classifier calls it: a column of whole numbers with gaps holds floats."""
        if isinstance(value, np.ndarray):  # a list of a parquet file
            value = value.tolist()
        if value is None or value != value:
            return None
        text = str(value).strip()
        number = as_number(text)
        code = self._codes[int(number)] if number is not None and number in range(len(self._codes)) else None
        if code is not None and not (isinstance(value, str) and text in self._places):
            return code
        if text in self._places or number is None:
            return text or None
        whole = isinstance(number, float) and number.is_integer()
        other = str(int(number) if whole else float(number))
        return other if other in self._places else text
