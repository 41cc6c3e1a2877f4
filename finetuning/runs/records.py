"""What ``result.json`` holds: the record of a run, its parts, and the functions that make them.

This module alone makes the names; others read by them. ``RunRecord`` lists those of the first level, the classes above
it those inside. Nothing here imports torch.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypedDict

SCORES = {  # as people read them
    "accuracy": "accuracy", "macro_f1": "macro F1", "micro_f1": "micro F1", "mcc": "MCC", "auroc": "AUROC",
    "mean_average_precision": "mean average precision", "loss": "loss, nats",
}  # fmt: skip
PLAIN_SCORES = ("loss", "mcc")  # numbers; the others are shares, which people read in percent
NOT_ASKED_FOR = "not asked for"  # what a run reports if its settings do not use the compiled kernels


def score_names(multi_label: bool) -> dict[str, str]:
    """``SCORES``; the accuracy of a multi-label run is the exact match of all labels."""
    return SCORES | ({"accuracy": "exact match"} if multi_label else {})


def score_text(name: str, value: float) -> str:
    """A score as a run prints it: ``97.20%``, or ``0.9431`` for one of ``PLAIN_SCORES``."""
    return f"{value:.4f}" if name in PLAIN_SCORES else f"{value:.2%}"


class DataRecord(TypedDict, total=False):
    """The texts of a run."""

    source: str  # for people
    columns: dict[str, str]  # text_column and label_column, as given or found
    label_names: list[str]  # in the order of the logits
    sizes: dict[str, int]  # split -> texts
    tokens: dict[str, int]  # split -> tokens, without padding
    leaks_dropped: int  # training texts that also appear in validation or test
    notes: list[str]  # one sentence for each change of the data
    padding_fraction: float  # of the tokens of all training batches


class TrainRecord(TypedDict):
    """The work of training, over all ranks. Padding tokens do not count."""

    seconds: float  # wall clock, without validation
    processor_seconds: float  # of all threads of this process in that time
    steps: int
    batches: int
    epochs: float
    examples_per_second: float | None
    tokens_per_second: float | None


class Means(TypedDict):
    """Scores over the folds of ``--kfold``. The interval of a mean is Nadeau's and Bengio's, see ``mean_interval``."""

    mean: dict[str, float]
    mean_ci95: dict[str, tuple[float, float]]


class FoldsRecord(Means):
    """The runs on the folds of ``--kfold``. The scores of all predictions together are the run's ``validation``."""

    folds: list[dict[str, Any]]  # of each: ``epoch`` that it chose, validation scores, texts, seconds, ``baseline``
    epochs: int  # that the final run trains: the median of those that the folds chose, of two in the middle the higher
    same_epoch: dict[str, Any] | None  # after ``epochs`` in every fold: accuracy of all texts, means of all scores
    seconds: float  # of all runs on folds


@dataclass(frozen=True)
class BuiltRecord:
    """What building the classifier tells."""

    environment: dict[str, Any]  # hardware, versions, commit, ``cpu_kernels``; ``alone`` is added at the end
    model: dict[str, Any]  # ``type``, and whether it takes the ``efficient_path``
    parameters: dict[str, int]  # numbers of weights and bytes, by group
    base_model: dict[str, Any] | None  # ``precision``, and ``sha256`` of its files

    @property
    def kernels(self) -> str:
        return str(self.environment["cpu_kernels"])


@dataclass(frozen=True)
class TrainedRecord:
    """What the best checkpoint tells."""

    task: dict[str, Any]  # kind, class weights, threshold, positive_label
    validation: dict[str, Any]  # scores, texts, seconds of all validations, the chosen ``epoch``
    advice: list[str]  # one sentence each
    files: dict[str, int] | None  # name -> bytes of what was saved
    kfold: FoldsRecord | None = None
    checkpoints_compared: int | None = None  # by validation, with those of the run that it continues


class BaselineRecord(TypedDict, total=False):
    """The baseline, which was trained on the run's training texts. Of many texts it uses a stratified sample."""

    name: str
    texts: int  # that it was trained on
    seconds: float  # wall clock of training and scores, with the import of scikit-learn
    validation: dict[str, float]  # scores, and ``examples``, the texts that were scored
    test: dict[str, float]


@dataclass(frozen=True)
class ComparedRecord:
    """What the comparison with the baseline tells."""

    baseline: BaselineRecord
    advice: list[str]  # one sentence each


@dataclass(frozen=True)
class CostRecord:
    """What the run took. Each is ``None`` if it is not known."""

    memory: dict[str, Any]  # ``peak_bytes`` without the baseline's, and the ``source`` that measured it
    seconds: float  # wall clock of training, evaluation and files, without the time between interruption and resume
    process_seconds: float | None  # wall clock since the process started; not of a run that is continued or has folds
    alone: bool | None  # whether no other process used the processors


@dataclass
class RunRecord:
    """The record of one run. Each step of the run gives its part; what a run did not reach stays ``None``.

    The parts ``train`` and ``cost`` are functions, because they are measured when the run ends, however it ends. The
    best run of a search also has ``checkpoints_compared``: how many checkpoints of all runs validation has compared.
    """

    config: dict[str, Any]  # every setting, by the name of its flag
    command: str  # the command line that began the run
    status: str = "failed"  # finished, failed, interrupted
    built: BuiltRecord | None = None
    data: DataRecord | None = None
    train: Callable[[], TrainRecord] | None = None
    trained: TrainedRecord | None = None
    test: dict[str, Any] | None = None  # scores, texts, seconds
    compared: ComparedRecord | None = None
    cost: Callable[[], CostRecord] | None = None
    error: str | None = None  # of a run that failed: why, in one line
    traceback: str | None = None
    written: dict[str, Any] = field(default_factory=dict)  # what ``result.json`` got, at the end

    def to_dict(self) -> dict[str, Any]:
        """The content of ``result.json``: the parts on one level, without what is ``None``."""
        content: dict[str, Any] = {"status": self.status, "config": self.config, "command": self.command}
        for part in (self.built, self.trained):
            content |= {} if part is None else vars(part)
        train, cost = self._measured
        content |= {"data": self.data, "train": train, "test": self.test}
        if self.compared is not None:
            advice = [*content["advice"], *self.compared.advice]
            content |= {"baseline": self.compared.baseline, "advice": advice}
        content |= {"error": self.error, "traceback": self.traceback}
        content = {name: value for name, value in content.items() if value is not None}
        if cost is not None:
            content["environment"] = content["environment"] | {"alone": cost.alone}
            content |= {name: value for name, value in vars(cost).items() if name != "alone"}
        return content

    @functools.cached_property
    def _measured(self) -> tuple[TrainRecord | None, CostRecord | None]:
        """Measured at the first call, so that a run prints what it writes."""
        return self.train() if self.train else None, self.cost() if self.cost else None


def data_record(texts: Any, splits: Any) -> DataRecord:
    """The source of the texts, and the numbers of texts and tokens.

    Args:
        texts: ``TextData``.
        splits: split -> ``TokenizedSplit``.
    """
    return {
        "source": texts.source,
        "columns": texts.columns,
        "label_names": texts.label_names,
        "sizes": texts.sizes,
        "tokens": {name: int(split.lengths.sum()) for name, split in splits.items() if name in texts.sizes},
        "leaks_dropped": texts.leaks_dropped,
        "notes": texts.notes,
    }


def data_hashes(texts: Any, splits: Any) -> dict[str, str]:
    """What tells a run that continues whether its data are the same.

    Args:
        texts: ``TextData``.
        splits: split -> ``TokenizedSplit``.
    """
    folds = {} if texts.pool is None else {"cut into folds": texts.pool.sha256}
    return (
        {name: split.sha256 for name, split in splits.items()} | {"class names": "\n".join(texts.label_names)} | folds
    )


def train_record(trainer: Any, meter: Any, training: Any, examples: int) -> TrainRecord:
    """Wall-clock seconds of training, and the work done, over all ranks. Padding tokens do not count."""
    batches = trainer.fit_loop.total_batch_idx + 1
    epochs = batches / max(len(training), 1)
    seconds = meter.train_seconds
    return {
        "seconds": seconds,
        "processor_seconds": meter.processor_seconds,
        "steps": trainer.global_step,
        "batches": batches,
        "epochs": epochs,
        "examples_per_second": examples * epochs / seconds if seconds else None,
        "tokens_per_second": training.tokens_per_epoch * epochs / seconds if seconds else None,
    }


def scores_record(scores: dict[str, Any], examples: int, seconds: float) -> dict[str, Any]:
    """The scores of texts that chose no checkpoint, with the 95 % interval of the accuracy."""
    interval = list(accuracy_interval(scores["accuracy"], examples))
    return scores | {"accuracy_ci95": interval, "examples": examples, "seconds": seconds}


def accuracy_interval(accuracy: float, examples: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion (Wilson 1927)."""
    z = 1.959964
    centre = (accuracy + z**2 / (2 * examples)) / (1 + z**2 / examples)
    spread = z / (1 + z**2 / examples) * math.sqrt(accuracy * (1 - accuracy) / examples + (z / (2 * examples)) ** 2)
    return max(0.0, centre - spread), min(1.0, centre + spread)
