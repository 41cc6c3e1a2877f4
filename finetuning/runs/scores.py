"""Scores of a run's answers, with bootstrap intervals over texts. Every score is a function of sums over texts."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from finetuning.runs.answers import Answers
from finetuning.runs.records import accuracy_interval

RESAMPLES = 1_000
BLOCK = 50  # resamples at a time, to save memory
COPIED = 2**25  # numbers that are held as float64 at once
Interval = tuple[float, float]  # 95 %
FAIR_MONITORS = ("macro_f1", "mcc", "auroc")  # of a single-label run: small classes count as much as large ones


@dataclass(frozen=True)
class ClassScore:
    """One class: its texts, and scores as fractions of 1."""

    texts: int
    precision: float
    recall: float
    f1: float
    f1_interval: Interval | None


def resampled_sums(values: np.ndarray) -> np.ndarray:
    """Sums, (RESAMPLES, k), over texts drawn with replacement. Calls with the same n draw the same texts.

    Args:
        values: (n, k), what each text adds to each sum.
    """
    generator, n = np.random.default_rng(0), len(values)
    width = max(1, COPIED // n)  # with many texts and classes, all numbers would be gigabytes
    columns = [values[:, i : i + width] for i in range(0, values.shape[1], width)]
    if len(columns) == 1:
        columns = [values.astype(np.float64)]
    sums = []
    for _ in range(RESAMPLES // BLOCK):
        drawn = [np.bincount(generator.integers(n, size=n), minlength=n) for _ in range(BLOCK)]
        counts = np.array(drawn, dtype=np.float64)
        sums.append(np.concatenate([counts @ part.astype(np.float64, copy=False) for part in columns], axis=1))
    return np.concatenate(sums)


def interval(values: np.ndarray) -> Interval | None:
    """The 95 % percentile interval of resampled values (draws,); ``None`` if all are the same, so they say nothing."""
    if not values.size or np.ptp(values) == 0:
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def mean_interval(values: Sequence[float], lowest: float = -math.inf, highest: float = math.inf) -> Interval:
    """The 95 % interval of the mean score of K folds: Student's t with K - 1 degrees of freedom.

    The folds share training texts, so the variance of their mean is taken as (1 / K + 1 / (K - 1)) times the variance
    of the scores, not as 1 / K times (Nadeau and Bengio 2003).

    Args:
        values: the scores, at least two.
        lowest, highest: what a score can be.
    """
    degrees = len(values) - 1
    spread = float(stdtrit(degrees, 0.975)) * math.sqrt(1 / len(values) + 1 / degrees) * statistics.stdev(values)
    mean = statistics.fmean(values)
    return max(lowest, mean - spread), min(highest, mean + spread)


def score_intervals(answers: Answers) -> dict[str, Interval]:
    """The intervals of the scores that have one, under the names that ``result.json`` uses.

    Accuracy has Wilson's interval, the others a bootstrap over texts. It gives none if all resamples agree.
    """
    right, given, truth = _resampled_counts(answers)
    n = len(answers.rows)
    drawn = {
        "macro_f1": macro_f1(right, given, truth, answers.rule.multi_label),
        "loss": resampled_sums(answers.losses[:, None])[:, 0] / n,
    }
    if answers.rule.multi_label:
        drawn["micro_f1"] = f1(right.sum(1), given.sum(1), truth.sum(1))
    else:
        drawn["mcc"] = matthews(right, given, truth, n)
    found = {name: limits for name, values in drawn.items() if (limits := interval(values)) is not None}
    return {"accuracy": accuracy_interval(float(answers.right.mean()), n)} | found


def class_scores(answers: Answers) -> list[ClassScore]:
    """The scores of each class, in the order of the logits. A share of nothing is 0.

    Resamples in which a class is neither true nor given do not count for its interval, as in ``macro_f1``.
    """
    right, given, truth = (part.sum(0) for part in _counts(answers))
    resampled = _resampled_counts(answers)
    draws, seen = f1(*resampled), resampled[1] + resampled[2] > 0
    return [
        ClassScore(
            int(truth[i]), right[i] / max(given[i], 1), right[i] / max(truth[i], 1),
            float(f1(right[i], given[i], truth[i])), interval(draws[seen[:, i], i]),
        )
        for i in range(len(truth))
    ]  # fmt: skip


def shows_learning(answers: Answers, kfold: Mapping[str, Any] | None) -> bool:
    """Whether validation tells a classifier from one that always answers the largest class, or that guesses.

    The 95 % interval of MCC must lie above 0, or that of accuracy above the share of the largest class. After folds
    both are those after the same epoch in each, because each fold chose its epoch by the texts that it predicts.

    Args:
        answers: of validation; single-label only.
        kfold: the ``FoldsRecord`` of a run with folds.
    """
    same = kfold["same_epoch"] if kfold else None
    accuracy = same["accuracy"] if same else float(answers.right.mean())
    texts, largest = len(answers.rows), answers.truth.sum(0).max()
    if accuracy_interval(accuracy, texts)[0] > largest / texts:
        return True
    low, _ = (same["mean_ci95"] if same else score_intervals(answers)).get("mcc", (0.0, 0.0))
    if same and "mcc" not in same["mean_ci95"]:  # all folds have the same
        low = same["mean"].get("mcc", 0.0)
    return bool(low > 0)


def confusion_matrix(answers: Answers) -> np.ndarray:
    """(classes, classes): texts by true class (row) and given class (column). Single-label only."""
    classes = answers.truth.shape[1]
    pairs = answers.truth.argmax(1) * classes + answers.given.argmax(1)
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def _counts(answers: Answers) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each text and class, (n, classes) bool: given rightly, given, true."""
    return answers.truth & answers.given, answers.given, answers.truth


def _resampled_counts(answers: Answers) -> list[np.ndarray]:
    """For each resample and class, (RESAMPLES, classes): texts given rightly, given, true."""
    return np.split(resampled_sums(np.concatenate(_counts(answers), axis=1)), 3, axis=1)


def f1(right: np.ndarray, given: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """F1 from three counts: labels given that are right, labels given, labels to find; 0 if there are none."""
    return np.asarray(2 * right / np.maximum(given + truth, 1))


def macro_f1(right: np.ndarray, given: np.ndarray, truth: np.ndarray, multi_label: bool) -> np.ndarray:
    """Macro F1 from the number of texts by class, each (draws, classes): given rightly, given, true. Returns (draws,).

    Like torchmetrics: in a single-label run, classes that are neither true nor given anywhere do not count.
    """
    counted = np.full(given.shape, True) if multi_label else given + truth > 0
    return np.asarray((f1(right, given, truth) * counted).sum(1) / counted.sum(1))


def matthews(right: np.ndarray, given: np.ndarray, truth: np.ndarray, n: int) -> np.ndarray:
    """Matthews' correlation of several classes (Gorodkin 2004); 0 if only one class is true or given."""
    # products of whole numbers would overflow
    right, given, truth = (part.astype(np.float64) for part in (right, given, truth))
    covariance = right.sum(1) * n - (given * truth).sum(1)
    spread = (float(n) ** 2 - (given**2).sum(1)) * (float(n) ** 2 - (truth**2).sum(1))
    return np.where(spread > 0, covariance / np.sqrt(np.maximum(spread, 1)), 0.0)
