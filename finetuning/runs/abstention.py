"""When a classifier should not answer: the least confidence at which at most a given share of its answers is wrong."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import bdtr

from finetuning.runs.answers import Answers

LEVEL = 0.95  # probability that the statement about the share of wrong answers holds
START_ERRORS = (0, 4)  # wrong answers that the first test of each sequence allows


@dataclass(frozen=True)
class Abstention:
    """Which texts get an answer, and how many of the texts that chose it do."""

    least: float  # confidence
    last: float  # the confidence of the least confident text that is answered
    texts: int
    answered: int
    wrong: int

    @property
    def shown(self) -> str:
        """``least`` for people and for ``--abstain``, which takes numbers between 0 and 1 without these.

        Rounded up to six digits, or more if these texts would not all be answered.
        """
        for digits in range(6, 16):
            rounded = max(0.1**digits, float(np.ceil(self.least * 10**digits) / 10**digits))
            if rounded <= min(self.last, 1 - 0.1**digits):
                return f"{rounded:.{digits}f}"
        return repr(min(self.least, float(np.nextafter(1, 0))))


def least_confidence(answers: Answers, risk: float, candidates: int = 1) -> Abstention | None:
    """The least confidence that answers most texts while, with probability ``LEVEL``, at most ``risk`` are wrong.

    Each threshold is tested with the exact binomial test, so the upper bound of Clopper and Pearson (1934) is at most
    ``risk``. Many thresholds are tried, and this must not weaken the statement. So they are tested in a fixed order,
    from the most confident texts downwards, until the first test fails: fixed-sequence testing, as in Learn then Test
    (Angelopoulos et al. 2021, arXiv:2110.01052). It needs no division of the level by the number of thresholds, so it
    answers more texts than the union bound of Geifman and El-Yaniv (2017, arXiv:1705.08500).

    With very few texts no test can succeed. So a sequence starts at the first rank whose test allows 0 wrong answers,
    and a second one at the first rank whose test allows 4, because one wrong label would end the first sequence. Both
    ranks depend on numbers of texts only, never on labels. Each sequence gets half of the level.

    New texts must come from the same distribution as these, and no text may have been trained on.

    Args:
        answers: of validation. Their order by confidence decides, so they may be cooled by a temperature. That it was
            fitted on the same texts is not taken into account: it does not change the order of two classes.
        risk: the share of answered texts that may be wrong, between 0 and 1.
        candidates: how many classifiers were compared on these texts, of which the best one gave the answers. The
            statement shall hold for each of them, so each gets its part of the level (Bonferroni).

    Returns:
        ``None`` if the texts are too few, or the most confident ones are wrong too often.
    """
    order = np.argsort(-answers.confidence, kind="stable")
    confidence, wrong = answers.confidence[order], np.cumsum(~answers.right[order])
    ranks = np.flatnonzero(np.append(confidence[1:] < confidence[:-1], True)) + 1  # equals are answered together
    wrong = wrong[ranks - 1]
    part = (1 - LEVEL) / (candidates * len(START_ERRORS))
    failed, best = bdtr(wrong, ranks, risk) > part, 0
    for errors in START_ERRORS:
        start = int((bdtr(errors, np.maximum(ranks, errors), risk) > part).sum())
        end = start + int(np.append(failed[start:], True).argmax())
        best = max(best, end if end > start else 0)
    if not best:
        return None
    answered = int(ranks[best - 1])
    least = 0.0
    if best < len(ranks):  # the middle: computed again, a text's confidence differs in the last digits
        left_out, last = confidence[answered], confidence[answered - 1]
        least = float(max((left_out + last) / 2, np.nextafter(left_out, 1)))
    return Abstention(least, float(confidence[answered - 1]), len(order), answered, int(wrong[best - 1]))


def checkpoints_compared(result: Mapping[str, Any]) -> int:
    """How many checkpoints validation could choose from, by ``result.json``: one an epoch, in a search of all runs."""
    return int(result.get("checkpoints_compared") or result["config"]["epochs"] or 1)


def smallest_risk(answers: Answers, candidates: int = 1) -> float:
    """Nearly the smallest ``risk`` for which ``least_confidence`` finds one, rounded up to a hundredth of a percent.

    Found by bisection. The sequences of another risk start elsewhere, so now and then one below this succeeds as well.
    """
    low, high = 0.0, 1.0
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if least_confidence(answers, middle, candidates) is None else (low, middle)
    rounded = float(np.ceil(high * 1e4) / 1e4)
    return rounded if least_confidence(answers, rounded, candidates) is not None else high
