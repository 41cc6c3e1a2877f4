"""Scores of a split from its stored logits: per class, with intervals, and calibration."""

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2_000
BINS = 15


@dataclass(frozen=True)
class ClassScores:
    """Scores of one class, as fractions of 1, and the 95 % interval of its F1."""

    texts: int
    precision: float
    recall: float
    f1: float
    f1_interval: tuple[float, float]


@dataclass(frozen=True)
class Scores:
    """Scores of a split, as fractions of 1."""

    macro_f1: float
    macro_f1_interval: tuple[float, float]  # 95 %
    calibration_error: float
    classes: list[ClassScores]


def scores_of(logits: np.ndarray, labels: np.ndarray, seed: int = 0) -> Scores:
    """Scores with bootstrap intervals over texts.

    Texts with the same label and prediction are drawn together: this is the same multinomial with fewer classes.

    Args:
        logits: ``(n, classes)``.
        labels: ``(n,)``.
        seed: of the bootstrap.
    """
    count = logits.shape[1]
    table = np.bincount(labels * count + logits.argmax(1), minlength=count**2)  # (classes * classes,)
    drawn = np.random.default_rng(seed).multinomial(len(labels), table / len(labels), size=RESAMPLES)
    precision, recall, f1 = _rates(table.reshape(count, count))
    draws = _rates(drawn.reshape(-1, count, count))[2]  # (resamples, classes)
    classes = [
        ClassScores(int(texts), float(precision[i]), float(recall[i]), float(f1[i]), _interval(draws[:, i]))
        for i, texts in enumerate(table.reshape(count, count).sum(1))
    ]
    return Scores(float(f1.mean()), _interval(draws.mean(1)), calibration_error(logits, labels), classes)


def _rates(tables: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 ``(..., classes)`` of confusion tables ``(..., label, predicted)``; 0 for 0 / 0."""
    right = np.diagonal(tables, axis1=-2, axis2=-1)
    predicted, true = tables.sum(-2), tables.sum(-1)
    precision, recall, f1 = (right / np.maximum(whole, 1) for whole in (predicted, true, (predicted + true) / 2))
    return precision, recall, f1


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """The expected calibration error with 15 equal bins of the highest probability (Guo et al. 2017)."""
    import torch
    from torchmetrics.functional.classification import multiclass_calibration_error

    probabilities = torch.from_numpy(logits).softmax(-1)
    return float(
        multiclass_calibration_error(probabilities, torch.from_numpy(labels), num_classes=logits.shape[1], n_bins=BINS)
    )
