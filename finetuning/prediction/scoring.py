"""How many answers are right, if the input also has the true labels. Nothing here imports torch."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd

from finetuning.data.columns import texts_in
from finetuning.data.files import UNREADABLE
from finetuning.data.labels import SEPARATORS, as_number, has_mark_for_each, marks_instead_of_labels, misspelled
from finetuning.data.tables import class_names, shortest_numbers, split_files
from finetuning.datasets import traits_of
from finetuning.errors import UserError, listed
from finetuning.prediction.rows import Answered, Source
from finetuning.prediction.trained import Trained
from finetuning.runs.records import accuracy_interval
from finetuning.runs.scores import f1, macro_f1
from finetuning.settings import DataSettings


def label_codes(file: Path, column: str, trained: Trained) -> Sequence[str]:
    """The names of the labels 0, 1, ... of a file, as training reads them; empty if its numbers are names themselves.

    Args:
        file: what ``--file`` gave.
        column: of its labels.
        trained: the classifier. An exported folder does not know its data set, but its classes have numbers.
    """
    data = trained.config.data
    places = [(file, column)]
    with suppress(OSError, UserError):  # the data of the run are elsewhere now, or have other names
        if data.data_dir is not None and data.label_column is not None:
            places.append((split_files(data.data_dir)["train"], data.label_column))
    own = None
    for path, name in places:
        with suppress(*UNREADABLE):  # the reading that follows says it
            own = own or (class_names(path, name) if path.is_file() else None)
    own = own if own and set(own) & set(trained.label_names) else None  # of other classes
    if not trained.exported:
        return traits_of(data.dataset).label_names or own or ()
    return own or (() if any(as_number(name) is not None for name in trained.label_names) else trained.label_names)


def trained_on(file: Path, data: DataSettings) -> bool:
    """Whether a file may have texts that a run was trained on, by its path."""
    if data.data_dir is None:
        return False
    with suppress(OSError):  # the data of the run are elsewhere now
        try:
            files = split_files(data.data_dir)
        except UserError:  # its files have other names, as those of financial_phrasebank
            return data.data_dir.is_dir() and file.parent.samefile(data.data_dir)
        mixed = data.split not in (None, "official")
        pooled = "validation" if data.kfold is not None else "train"
        return any(path.samefile(file) for name, path in files.items() if mixed or name in ("train", pooled))
    return False


class Score:
    """Counts right answers, and answers and true labels by class, while they pass.

    Args:
        column: of the input, with the true labels; a text without one is not counted.
        codes: from ``label_codes``.
        separator: multi-label: what separates the labels of a text; ``None``: they are lists.

    Raises:
        UserError: there is a separator, but each text has one label.
    """

    def __init__(self, trained: Trained, column: str, codes: Sequence[str] = (), separator: str | None = None) -> None:
        if separator is not None and not trained.rule.multi_label:
            raise UserError(
                f"--label_separator {separator!r}: {trained.directory} gives each text one label: leave it out"
            )
        self.column, self._codes, self._separator = column, codes, separator
        self._multi_label, self._positive = trained.rule.multi_label, trained.rule.positive
        self._places = {name: i for i, name in enumerate(trained.label_names)}
        self._right, self._given, self._truth = np.zeros((3, len(self._places)), dtype=np.int64)  # texts by class
        self._texts = self._exact = self._missed = 0
        self._unknown = dict[str, None]()  # labels of multi-label texts that the classifier does not have

    def checking(self, source: Source) -> Source:
        """The same source. When it is read, its labels are checked.

        Reading raises:
            UserError: the column is missing, has no label, or one that the classifier does not know. Of multi-label
                texts some may be unknown: a rare label may be in no training text.
        """

        def tables() -> Iterator[pd.DataFrame]:
            labelled = there = known = False
            strange: str | None = None  # a label that training may have lacked
            lists = self._multi_label and self._separator is None  # an empty one is a text without a label
            marks = lists  # whether all have a 0 or 1 for each label, which training refuses as well
            for table in source.tables():
                true = self._true(table)
                found = [label for labels in true for label in labels or ()]
                unknown = [label for label in found if label not in self._places]
                if wrong := [label for label in unknown if not self._multi_label or self._meant(label)]:
                    raise self._no_label(wrong[0])
                strange = strange or next(iter(unknown), None)
                known |= len(unknown) < len(found)
                labelled |= bool(found) or (lists and any(labels is not None for labels in true))
                there |= self.column in table
                marks = marks and self.column in table and table[self.column].map(self._is_of_marks).all()
                yield table
            if not there:
                texts_in(table, self.column, source.where, "label_column")  # says that it is missing
            if strange is not None and not known:
                raise self._no_label(strange)
            if not labelled:
                raise UserError(f"--label_column {self.column}: has no label: leave it out")
            if marks:
                raise UserError(f"--label_column {self.column}: {marks_instead_of_labels(len(self._places))}")

        return replace(source, tables=tables)

    def _is_of_marks(self, value: object) -> bool:
        """Whether a list has a 0 or 1 for each of the classifier's labels."""
        marks = value.tolist() if isinstance(value, np.ndarray) else value
        return isinstance(marks, list) and has_mark_for_each(marks, len(self._places))

    def _no_label(self, label: str) -> UserError:
        hint = misspelled(label, self._places) or ", ".join(self._places)
        for mark in SEPARATORS if self._multi_label else ():
            if mark in label and all(part.strip() in self._places for part in label.split(mark)):
                hint = f"give --label_separator {mark!r}"
        return UserError(f"--label_column {self.column}: {label!r} is none of the classifier's labels: {hint}")

    def _meant(self, label: str) -> bool:
        """Whether an unknown label is a known one in another spelling, or several with another separator."""
        parts = re.split(f"[{''.join(SEPARATORS)}/]", label)
        return bool(misspelled(label, self._places)) or any(part.strip() in self._places for part in parts)

    def counted(self, answered: Iterable[Answered]) -> Iterator[Answered]:
        """The same rows and values; the first column of the values is the label, or the list of labels."""
        for rows, values in answered:
            for true, answer in zip(self._true(rows.table), values[0], strict=True):
                if true is not None and answer is not None:
                    self._count(true, set(answer) if self._multi_label else {answer})
            yield rows, values

    def _count(self, true: set[str], given: set[str]) -> None:
        self._texts += 1
        self._exact += true == given
        unknown = true.difference(self._places)
        self._unknown |= dict.fromkeys(sorted(unknown))
        self._missed += len(unknown)
        for counts, names in ((self._right, true & given), (self._given, given), (self._truth, true - unknown)):
            counts[[self._places[name] for name in names]] += 1

    def __str__(self) -> str:
        if not self._texts:
            return "no labelled text was answered"
        exact = self._exact / self._texts
        low, high = accuracy_interval(exact, self._texts)
        counts = self._right[None], self._given[None], self._truth[None]
        (macro,) = macro_f1(*counts, multi_label=self._multi_label)
        right, given, truth = (part.sum() for part in counts)
        micro = f"; micro F1 {float(f1(right, given, truth + self._missed)):.2%}" if self._multi_label else ""
        end = f"; unknown to the classifier, so missed: {listed(list(self._unknown), 5)}" if self._unknown else ""
        if self._positive is not None:
            end = f"; {self._of_positive(self._positive)}"
        return (
            f"{'exact match' if self._multi_label else 'accuracy'} {exact:.2%}, 95 % interval {low:.2%} to {high:.2%}"
            f"{micro}; macro F1 {macro:.2%}; {self._texts:,} labelled and answered texts{end}"
        )

    def _of_positive(self, place: int) -> str:
        """Precision and recall of the positive class, which a threshold trades for each other."""
        name = list(self._places)[place]
        right = int(self._right[place])
        shares = (("precision", int(self._given[place])), ("recall", int(self._truth[place])))
        return f"{name!r}: " + ", ".join(f"{of} {right / texts:.2%}" if texts else f"no {of}" for of, texts in shares)

    def _true(self, table: pd.DataFrame) -> list[set[str] | None]:
        """The labels of each text; ``None`` if they are not known."""
        if self.column not in table:  # of a chunk of objects: others may have it
            return [None] * len(table)
        column = table[self.column]
        both = zip(column.tolist(), shortest_numbers(column).tolist(), strict=True)
        return [self._labels(long if str(long) in self._places else short) for long, short in both]  # long: older runs

    def _labels(self, value: object) -> set[str] | None:
        if isinstance(value, np.ndarray):  # a list of a parquet file
            value = value.tolist()
        if value is None or value != value:  # with a separator it is a text without a label, as in training
            return None if self._separator is None else set()
        if not self._multi_label:
            name = self._name(value)
            return {name} if name else None
        if isinstance(value, str) and self._separator is not None:
            value = value.split(self._separator)
        if not isinstance(value, list):
            way = "give --label_separator, or write lists" if isinstance(value, str) else "write lists of labels"
            raise UserError(f"--label_column {self.column}: {value!r} is no list, but the run is multi-label: {way}")
        return {name for part in value if (name := self._name(part))}

    def _name(self, value: object) -> str:
        """A label as the classifier calls it: a column of whole numbers with gaps holds floats."""
        text = str(float(value) if isinstance(value, Decimal) else value).strip()
        number = as_number(text)
        code = self._codes[int(number)] if number is not None and number in range(len(self._codes)) else None
        if code is not None and not (isinstance(value, str) and text in self._places):
            return code
        if text in self._places or number is None:
            return text
        whole = isinstance(number, float) and number.is_integer()
        other = str(int(number) if whole else float(number))
        return other if other in self._places else text
