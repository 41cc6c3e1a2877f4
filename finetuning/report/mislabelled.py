"""Held-out texts whose label may be wrong, by confident learning (Northcutt et al. 2021, arXiv:1911.00068)."""

import numpy as np

from finetuning.runs.answers import Answers


def suspects(answers: Answers) -> list[tuple[int, int]]:
    """Texts that lie off the diagonal of the confident joint, the least plausible label first.

    A text counts as a class if the class's probability reaches the mean probability that the class has in the texts
    labelled with it. If several classes reach it, the most probable one counts. The order is by the margin between
    the label's probability and the largest other one. The texts must not have been trained on.

    Args:
        answers: of a single-label run.

    Returns:
        For each text its position in the answers, and the class that it fits better than its own.
    """
    probabilities, labels = answers.probabilities, answers.truth.argmax(1)
    texts = answers.truth.sum(0)
    with_label = (probabilities * answers.truth).sum(0)
    thresholds = np.where(texts > 0, with_label / np.maximum(texts, 1), np.inf)  # a class without texts is never better
    confident = np.where(probabilities >= thresholds, probabilities, -1.0)
    better = confident.argmax(1)
    position = np.arange(len(labels))
    wrong = np.flatnonzero((confident[position, better] >= 0) & (better != labels))
    margins = probabilities[wrong, labels[wrong]] - probabilities[wrong, better[wrong]]
    return [(int(i), int(better[i])) for i in wrong[np.argsort(margins, kind="stable")]]
