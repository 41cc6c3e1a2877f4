"""The part of a run's report about texts without an answer: accuracy against coverage, and thresholds for a risk."""

from dataclasses import dataclass

import numpy as np

from finetuning.pages import Table
from finetuning.runs.abstention import least_confidence, smallest_risk
from finetuning.runs.answers import Answers
from finetuning.runs.records import accuracy_interval
from finetuning.runs.score_tables import percent

POINTS = 50  # of the curve
RISKS = (0.01, 0.02, 0.05, 0.1)  # shares of wrong answers


@dataclass(frozen=True)
class Point:
    """The accuracy of the texts with the highest confidence."""

    coverage: float  # share of the texts that are answered
    accuracy: float
    low: float  # 95 % interval
    high: float


def coverage_curve(answers: Answers) -> list[Point]:
    """The accuracy if only the most confident texts are answered, from few of them to all."""
    right = np.cumsum(answers.right[np.argsort(-answers.confidence, kind="stable")])
    n = len(right)
    counts = np.unique(np.ceil(n * np.arange(1, POINTS + 1) / POINTS).astype(int)).tolist()
    accuracies = [float(right[count - 1] / count) for count in counts]
    return [
        Point(count / n, accuracy, *accuracy_interval(accuracy, count))
        for count, accuracy in zip(counts, accuracies, strict=True)
    ]


def risk_table(validation: Answers, main: Answers, split: str, candidates: int) -> Table:
    """For each risk, the threshold that validation gives, and what it does to a split.

    Args:
        validation: its answers, calibrated.
        main: the answers of the split, calibrated.
        candidates: as in ``least_confidence``.
    """
    found = {risk: least_confidence(validation, risk, candidates) for risk in RISKS}
    least = percent(smallest_risk(validation, candidates)) if None in found.values() else ""
    rows = []
    for risk, chosen in found.items():
        if chosen is None:
            rows.append((percent(risk), f"validation is too small or too often wrong: it can show {least}", "", ""))
            continue
        answered = main.confidence >= chosen.least
        count, wrong = int(answered.sum()), int((answered & ~main.right).sum())
        share = percent(wrong / count, accuracy_interval(wrong / count, count)) if count else ""
        rows.append((percent(risk), chosen.shown, percent(count / len(answered)), share))
    return Table(("wrong, at most", "--abstain", f"answered ({split})", f"of these wrong ({split})"), rows)
