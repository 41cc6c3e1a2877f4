"""Whether a run's probabilities can be believed: reliability, expected calibration error, temperature.

In a single-label run, the probability of the given class is compared with whether it is right. In a multi-label run,
the probability of every label is compared with whether the text has it.
"""

from dataclasses import dataclass

import numpy as np

from finetuning.runs.answers import Answers
from finetuning.runs.scores import Interval, resampled_sums

BINS = 15
COLDEST, HOTTEST = 0.01, 100.0  # temperatures beyond these mean that validation cannot say


@dataclass(frozen=True)
class Bin:
    """Answers whose probability is in one fifteenth of the range from 0 to 1."""

    share: float  # of all answers
    probability: float  # mean
    observed: float  # share of answers that are right


@dataclass(frozen=True)
class Reliability:
    """The bins that have answers, and how far they are from the diagonal."""

    bins: list[Bin]
    error: float  # expected calibration error
    interval: Interval  # of the error, 95 %
    loss: float  # cross-entropy, nats


def fit_temperature(answers: Answers) -> float | None:
    """The temperature with the lowest cross-entropy (Guo et al. 2017); ``None`` if there is none.

    The loss is convex in 1 / temperature, so the zero of its slope is searched by bisection. There is none if all
    answers are right, because then ever more confident answers are ever better, or if they are worse than chance.

    Args:
        answers: of the validation split.
    """
    low, high = np.log(1 / HOTTEST), np.log(1 / COLDEST)  # of 1 / temperature
    if _slope(answers, low) >= 0 or _slope(answers, high) <= 0:
        return None
    for _ in range(25):  # to 3e-7 of it
        middle = (low + high) / 2
        low, high = (low, middle) if _slope(answers, middle) > 0 else (middle, high)
    return float(np.exp(-(low + high) / 2))


def _slope(answers: Answers, log_inverse: float) -> float:
    """The slope of the loss over 1 / temperature."""
    scaled, logits = answers.cooled(float(np.exp(-log_inverse))), answers.logits
    if not answers.rule.multi_label:
        # from the true class on: then no term of a right answer is above 0, also if its probabilities are rounded
        logits = logits - (logits * answers.truth).sum(1, keepdims=True)
    return float(((scaled.probabilities - answers.truth) * logits).sum(1).mean())


def reliability(answers: Answers) -> Reliability:
    """Probabilities against what was observed, in 15 bins of equal width (Guo et al. 2017)."""
    if answers.rule.multi_label:
        probabilities, outcomes = answers.probabilities, answers.truth  # (n, k)
    else:
        probabilities, outcomes = answers.confidence[:, None], answers.right[:, None]
    bins = np.clip(np.ceil(probabilities * BINS).astype(int) - 1, 0, BINS - 1)
    counts = np.bincount(bins.ravel(), minlength=BINS)
    means, observed = (
        np.bincount(bins.ravel(), values.ravel(), minlength=BINS) / np.maximum(counts, 1)
        for values in (probabilities, outcomes)
    )
    n = len(probabilities)
    cells = (bins + BINS * np.arange(n)[:, None]).ravel()  # one for each text and bin
    gaps = np.bincount(cells, (outcomes - probabilities).ravel(), minlength=n * BINS).reshape(n, BINS)
    error = float(np.abs(gaps.sum(0)).sum() / probabilities.size)
    drawn = np.abs(resampled_sums(gaps)).sum(1) / probabilities.size
    low, high = np.quantile(drawn, [0.025, 0.975])
    # the basic bootstrap interval, because a sum of absolute values is too large, and in resamples larger still
    interval = max(0.0, float(2 * error - high)), max(0.0, float(2 * error - low))
    shown = [Bin(counts[i] / probabilities.size, means[i], observed[i]) for i in range(BINS) if counts[i]]
    return Reliability(shown, error, interval, float(answers.losses.mean()))
