"""What a collected run predicted for its test texts, and what counts in it."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from finetuning.comparison.packed import Columns
from finetuning.comparison.statistics import SCORES


@dataclass(frozen=True)
class Predictions:
    """What a run predicted for its test texts, in the order of their rows; each array is ``(n,)``.

    Multi-label: ``labels`` is an array of bytes, one for each set of labels, ``correct`` means that all labels of a
    text are right, and ``counts`` is there.
    """

    source: str
    rows: np.ndarray
    labels: np.ndarray
    correct: np.ndarray  # bool
    counts: np.ndarray | None = None  # (n, 2): labels found that are right, and labels wrongly given or missed

    @staticmethod
    def of(source: str, columns: Columns) -> "Predictions":
        """From the columns of a record."""
        rows, counts = np.array(columns["row"]), None
        if any(isinstance(labels, list) for labels in columns["label"]):
            given, predicted = ([frozenset(row) for row in columns[name]] for name in ("label", "predicted"))
            labels = np.array([",".join(map(str, sorted(row))) for row in given], dtype=np.bytes_)
            counts = np.array([(len(a & b), len(a ^ b)) for a, b in zip(given, predicted, strict=True)])
            correct = counts[:, 1] == 0
        else:
            labels = np.array(columns["label"])
            correct = labels == np.array(columns["predicted"])
        return Predictions(source, rows, labels, correct, counts)

    def counted(self, measure: str) -> np.ndarray:
        """``(n, 2)``, what ``measure`` counts: right and wrong texts (``accuracy``), or labels (``micro_f1``)."""
        if measure == "accuracy" or self.counts is None:
            return np.stack([self.correct, ~self.correct], axis=-1)
        return self.counts

    def score(self, measure: str) -> float:
        """A key of ``SCORES``: ``accuracy`` or ``micro_f1``, see ``counted``."""
        return float(SCORES[measure](self.counted(measure).sum(axis=0)))

    @cached_property
    def test_set(self) -> tuple[str, bytes, bytes]:
        """Equal for two runs if they were tested on the same rows of one source, with the same labels."""
        return self.source, self.rows.tobytes(), self.labels.tobytes()
