"""What is learned from the labels: the losses, the metrics by torchmetrics, and what turns logits into labels.

A task is a module, so that its weights move to the device with the classifier. Nothing of it is saved in checkpoints.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torchmetrics.functional import classification as metrics

from finetuning.errors import UserError
from finetuning.runs.answers import MOST_PROBABLE, Rule, unlabelled
from finetuning.runs.scores import FAIR_MONITORS, f1, matthews
from finetuning.settings import DEFAULT_THRESHOLD, TrainingSettings
from finetuning.training.class_weights import class_weights, label_weights

MOST_SHOWN = 500  # classes in the confusion matrix of ``result.json``
THRESHOLDS = [percent / 100 for percent in range(1, 100)]  # the ones that --threshold tuned tries


class _Task(nn.Module):
    """What all tasks have.

    Args:
        names: the names of the classes, in the order of the logits.
        weights: (classes,) as the task uses them.
        rule: which labels a text gets.
        tuned: whether validation chooses the threshold of the rule.
    """

    kind: str
    weights: Tensor | None

    def __init__(self, names: Sequence[str], weights: Tensor | None, rule: Rule, tuned: bool = False) -> None:
        super().__init__()
        self.names, self.rule, self.tuned = list(names), rule, tuned
        self.register_buffer("weights", weights, persistent=False)

    def given(self, logits: np.ndarray) -> np.ndarray:
        """The labels that each text gets, (n, classes) bool, as whoever reads ``predictions.parquet`` finds them."""
        return unlabelled(logits.astype(np.float64), self.rule).given

    def only_answer(self, logits: np.ndarray) -> str | None:
        """The labels that all texts get; ``None`` if they get different ones."""
        given = self.given(logits)
        if not len(given) or (given != given[0]).any():
            return None
        return ", ".join(compress(self.names, given[0])) or "no label"

    def tune(self, labels: np.ndarray, logits: np.ndarray) -> None:
        """Sets the threshold with the highest F1 of the positive class, or micro F1 of all labels, if it is tuned."""
        if not self.tuned:
            return
        truth, found = labels == 1, unlabelled(logits.astype(np.float64), self.rule).probabilities
        if (positive := self.rule.positive) is not None:
            truth, found = labels == positive, found[:, positive]
        self.rule = replace(self.rule, threshold=best_threshold(truth, found))

    def record(self) -> dict[str, Any]:
        """What ``result.json`` says about the task."""
        weights = None if self.weights is None else dict(zip(self.names, self.weights.tolist(), strict=True))
        found: dict[str, Any] = {"kind": self.kind, "class_weights": weights}
        if self.rule.threshold is not None:
            found |= {"threshold": self.rule.threshold, "threshold_tuned": self.tuned}
        if self.rule.positive is not None:
            found["positive_label"] = self.names[self.rule.positive]
        return found


class SingleLabel(_Task):
    """Each text has one of several classes: softmax and cross-entropy.

    Args:
        names, rule, tuned: as in ``_Task``.
        weights: (classes,) the weight of a training text by its class; ``None`` weighs all texts alike.
        smoothing: the share of a label that is spread over all classes in training (Szegedy et al. 2016).
    """

    kind = "single-label"
    monitors = ("accuracy", "macro_f1", "mcc", "auroc", "loss")
    fair_monitors = FAIR_MONITORS

    def __init__(
        self, names: Sequence[str], weights: Tensor | None = None, smoothing: float = 0.0, rule: Rule = MOST_PROBABLE,
        tuned: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(names, weights, rule, tuned)
        self.smoothing = smoothing

    def training_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The sum over texts of the weighted and smoothed loss: ``(B, classes), (B,) -> ()``.

        The weight of a text is that of its own class. PyTorch's ``weight`` would weigh each smoothed share by the class
        that it is spread to, and so teach a small class to the texts of a large one.
        """
        if self.weights is None:
            return cross_entropy(logits, labels, reduction="sum", label_smoothing=self.smoothing)
        losses = cross_entropy(logits, labels, reduction="none", label_smoothing=self.smoothing)
        return (self.weights[labels] * losses).sum()

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The plain loss of each text, so that runs with other weights can be compared: ``-> (B,)``."""
        return cross_entropy(logits, labels, reduction="none")

    def scores(self, labels: np.ndarray, logits: np.ndarray) -> dict[str, float]:
        """The metrics of a split. ``auroc`` is missing if all labels are equal.

        Args:
            labels: (n,) classes.
            logits: (n, classes).
        """
        answered = self.given(logits).argmax(1)
        given, predicted = torch.from_numpy(labels), torch.from_numpy(answered)
        count: dict[str, Any] = {"num_classes": len(self.names), "validate_args": False}
        found = {
            "accuracy": metrics.multiclass_accuracy(predicted, given, average="micro", **count),
            "macro_f1": metrics.multiclass_f1_score(predicted, given, average="macro", **count),
        }
        # torchmetrics' MCC has a matrix of all pairs of classes
        right, answers, truth = (self.counts(part)[None] for part in (labels[answered == labels], answered, labels))
        found["mcc"] = matthews(right, answers, truth, len(labels))[0]
        one_hot = given[:, None] == torch.arange(len(self.names))
        auroc = mean_over_classes(metrics.binary_auroc, torch.from_numpy(logits).double().softmax(-1), one_hot)
        return {name: float(value) for name, value in found.items()} | ({} if auroc is None else {"auroc": auroc})

    def details(self, labels: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
        """Precision, recall, F1 and support by class, and the confusion matrix of few: a row for each true class."""
        given, predicted = torch.from_numpy(labels), torch.from_numpy(self.given(logits).argmax(1))
        count: dict[str, Any] = {"num_classes": len(self.names), "validate_args": False}
        columns = {
            "precision": metrics.multiclass_precision(predicted, given, average=None, **count).tolist(),
            "recall": metrics.multiclass_recall(predicted, given, average=None, **count).tolist(),
            "f1": metrics.multiclass_f1_score(predicted, given, average=None, **count).tolist(),
            "support": self.counts(labels).tolist(),
        }
        record = {"per_class": by_name(self.names, columns)}
        if len(self.names) > MOST_SHOWN:  # the matrix would make a file of hundreds of megabytes
            return record
        return record | {"confusion_matrix": metrics.multiclass_confusion_matrix(predicted, given, **count).tolist()}

    def counts(self, labels: np.ndarray) -> np.ndarray:
        """Texts of each class, (classes,)."""
        return np.bincount(labels, minlength=len(self.names))


class MultiLabel(_Task):
    """Each text has any number of labels: a sigmoid and binary cross-entropy for each label.

    Args:
        names, rule, tuned: as in ``_Task``.
        weights: (labels,) the weight of each label in the training texts that have it; ``None`` is 1.
    """

    kind = "multi-label"
    monitors = ("accuracy", "macro_f1", "micro_f1", "auroc", "loss")  # accuracy is the exact match of all labels
    fair_monitors = ("macro_f1", "auroc")

    def training_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The sum over texts of the mean weighted loss over labels: ``(B, labels), (B, labels) -> ()``."""
        total = binary_cross_entropy_with_logits(logits, labels.float(), pos_weight=self.weights, reduction="sum")
        return total / len(self.names)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The plain loss of each text, the mean over labels: ``-> (B,)``."""
        return binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").mean(1)

    def scores(self, labels: np.ndarray, logits: np.ndarray) -> dict[str, float]:
        """The metrics of a split; ``accuracy`` is the share of texts with exactly the right labels.

        ``auroc`` and ``mean_average_precision`` are means over the labels that some texts have and others do not. They
        are missing if there is no such label.

        Args:
            labels: (n, labels) of 0 and 1.
            logits: (n, labels).
        """
        truth, answers = torch.from_numpy(labels).long(), torch.from_numpy(self.given(logits)).long()
        count: dict[str, Any] = {"num_labels": len(self.names), "validate_args": False}
        found = {
            "accuracy": metrics.multilabel_exact_match(answers, truth, **count),
            "macro_f1": metrics.multilabel_f1_score(answers, truth, average="macro", **count),
            "micro_f1": metrics.multilabel_f1_score(answers, truth, average="micro", **count),
        }
        probabilities = torch.from_numpy(probabilities_of(logits))
        means = {
            "auroc": mean_over_classes(metrics.binary_auroc, probabilities, truth == 1),
            "mean_average_precision": mean_over_classes(metrics.binary_average_precision, probabilities, truth == 1),
        }
        return {name: float(value) for name, value in (found | means).items() if value is not None}

    def details(self, labels: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
        """The exact match under its own name, and precision, recall, F1 and support by label."""
        truth, answers = torch.from_numpy(labels).long(), torch.from_numpy(self.given(logits)).long()
        count: dict[str, Any] = {"num_labels": len(self.names), "validate_args": False, "average": None}
        columns = {
            "precision": metrics.multilabel_precision(answers, truth, **count).tolist(),
            "recall": metrics.multilabel_recall(answers, truth, **count).tolist(),
            "f1": metrics.multilabel_f1_score(answers, truth, **count).tolist(),
            "support": truth.sum(0).tolist(),
        }
        exact = float((truth == answers).all(1).float().mean())
        return {"exact_match": exact, "per_class": by_name(self.names, columns)}

    def counts(self, labels: np.ndarray) -> np.ndarray:
        """Texts with each label, (labels,)."""
        return labels.sum(0, dtype=np.int64)


Task = SingleLabel | MultiLabel


def probabilities_of(logits: np.ndarray) -> np.ndarray:
    """The probability of each label by itself, in fp64."""
    return torch.from_numpy(logits).double().sigmoid().numpy()


def best_threshold(truth: np.ndarray, probabilities: np.ndarray) -> float:
    """The threshold with the highest micro F1; of equal ones, the nearest to the default."""

    def micro_f1(given: np.ndarray) -> float:
        return float(f1((truth & given).sum(), given.sum(), truth.sum()))

    scores = {threshold: micro_f1(probabilities > threshold) for threshold in THRESHOLDS}
    best = max(scores.values())
    equal = [threshold for threshold, score in scores.items() if score == best]
    return min(equal, key=lambda threshold: abs(threshold - DEFAULT_THRESHOLD))


def mean_over_classes(metric: Callable[[Tensor, Tensor], Tensor], probabilities: Tensor, truth: Tensor) -> float | None:
    """The mean of a metric of two classes: each class against all others.

    Classes that no text has, or that all texts have, do not count, because the metric is not defined for them.

    Args:
        metric: takes probabilities (n,) and truth (n,).
        probabilities: (n, classes).
        truth: (n, classes) bool.
    """
    defined = (truth.any(0) & ~truth.all(0)).nonzero().flatten().tolist()
    values = [float(metric(probabilities[:, i], truth[:, i].long())) for i in defined]
    return float(np.mean(values)) if values else None


def by_name(names: Sequence[str], columns: dict[str, list[Any]]) -> dict[str, dict[str, Any]]:
    """Columns of values as one record for each class."""
    return {name: {key: column[i] for key, column in columns.items()} for i, name in enumerate(names)}


# --- the task of a run


def make_task(labels: dict[str, np.ndarray], names: Sequence[str], training: TrainingSettings) -> Task:
    """The task that the labels and the settings ask for.

    Args:
        labels: split -> the labels of the training and the validation texts: (n,) classes; multi-label:
            (n, names) of 0 and 1.
        training: ``class_weights``, ``label_smoothing``, ``threshold``, ``positive_label`` and ``monitor``.

    Raises:
        UserError: a setting does not fit the labels, a class with a weight does not exist, all weights are 0, or no
            training text of a multi-label task has a label.
    """
    task: Task
    tuned = training.threshold == "tuned"
    threshold = DEFAULT_THRESHOLD if tuned else float(training.threshold or DEFAULT_THRESHOLD)
    if labels["train"].ndim == 2:
        if not labels["train"].any():
            raise UserError("--label_column: no training text has a label: give other data, or a larger --limit_train")
        if training.label_smoothing:
            raise UserError(
                f"--label_smoothing {training.label_smoothing:g}: needs a single-label task, not a multi-label one"
            )
        if training.positive_label is not None:
            raise UserError(f"--positive_label {training.positive_label}: needs two classes, not a multi-label task")
        task = MultiLabel(names, label_weights(training.class_weights, names, labels["train"]), Rule(threshold), tuned)
    else:
        counts = np.bincount(labels["train"], minlength=len(names))
        weights, positive = class_weights(training.class_weights, names, counts), positive_class(names, training)
        rule = MOST_PROBABLE if positive is None else Rule(threshold, positive)
        task = SingleLabel(names, weights, training.label_smoothing, rule, tuned)
    check_monitor(task, training.monitor, labels["validation"])
    return task


def positive_class(names: Sequence[str], training: TrainingSettings) -> int | None:
    """The position of the class that ``--threshold`` is for, by default the second one; ``None`` without a threshold.

    Raises:
        UserError: there are more than two classes, or ``--positive_label`` is none of them.
    """
    label = training.positive_label
    if training.threshold is None:
        return None
    if len(names) != 2:
        raise UserError(f"--threshold {training.threshold}: needs multi-label data or two classes, not {len(names)}")
    if label is not None and label not in names:
        raise UserError(f"--positive_label {label}: must be {names[0]} or {names[1]}")
    return 1 if label is None else list(names).index(label)


def check_monitor(task: Task, monitor: str, labels: np.ndarray) -> None:
    """Checks that the task has the metric that chooses the checkpoint, and that it is defined for these labels.

    Raises:
        UserError: it has no such metric, or the metric is not defined.
    """
    if monitor not in task.monitors:
        raise UserError(f"--monitor {monitor}: for a {task.kind} task it must be one of {', '.join(task.monitors)}")
    no_answers = np.zeros((len(labels), len(task.names)), dtype=np.float32)
    if monitor == "auroc" and monitor not in task.scores(labels, no_answers):
        raise UserError("--monitor auroc: all validation texts have the same label, but it needs at least two")
