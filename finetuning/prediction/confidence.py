"""How sure an answer is: which texts get none, and which ones are worth a label. Nothing here imports torch."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from finetuning.errors import UserError
from finetuning.prediction.rows import Answered, Rows
from finetuning.prediction.trained import Trained
from finetuning.runs.abstention import LEVEL, checkpoints_compared, least_confidence, smallest_risk
from finetuning.runs.answers import Answers, Rule, unlabelled
from finetuning.runs.calibration import fit_temperature
from finetuning.runs.finished import read_finished, read_validation
from finetuning.runs.records import accuracy_interval

CONFIDENCE = "confidence"  # our column
SURER = 3.09  # standard errors: what chance exceeds once in a thousand


@dataclass(frozen=True)
class Confidence:
    """How sure an answer is, and how sure it must be."""

    temperature: float = 1.0  # by which logits are divided; 1 leaves the probabilities as trained
    least: float = 0.0  # a text with less gets no label
    notes: tuple[str, ...] = ()  # where both come from, a sentence each
    reached: tuple[int, int] | None = None  # how many validation texts are as sure as ``least``, and of how many

    def of(self, probabilities: np.ndarray, rule: Rule) -> np.ndarray:
        """``Answers.confidence`` of cooled answers, (n, labels) -> (n,); NaN for a row without a text."""
        with np.errstate(divide="ignore"):  # a probability of 0 or 1 is an infinite logit
            logits = np.log(probabilities)
            if rule.multi_label:
                logits -= np.log1p(-probabilities)
        return unlabelled(logits, rule).cooled(self.temperature).confidence


@dataclass
class Coverage:
    """Counts the texts that ``--abstain`` or ``--abstain_risk`` answers, while they pass."""

    least: float  # a text with less confidence gets no label
    reached: tuple[int, int] | None = None  # as in ``Confidence``
    texts: int = 0  # how many have passed, without rows that have no text
    answered: int = 0  # how many of them got a label
    # lowest, highest: their confidence
    lowest: float = 1.0
    highest: float = 0.0

    def counted(self, answered: Iterable[Answered]) -> Iterator[Answered]:
        """The same rows and values, whose second column is the confidence."""
        for rows, values in answered:
            found = [value for value in values[1] if value is not None]
            self.texts += len(found)
            self.answered += sum(value >= self.least for value in found)
            self.lowest, self.highest = min([self.lowest, *found]), max([self.highest, *found])
            yield rows, values

    def __str__(self) -> str:
        confidence = f"; confidence {self.lowest:.2f} to {self.highest:.2f}" if self.texts else ""
        shown = f"{self.answered:,} of {self.texts:,} texts answered{confidence}"
        if self.reached is None or not surer((self.answered, self.texts), self.reached):
            return shown
        count, of = self.reached
        return (
            f"{shown}\nwarning: {self.answered / self.texts:.0%} of these texts are answered, but {count / of:.0%} of"
            " validation: the classifier is surer here, so more answers may be wrong than validation says"
        )


def surer(found: tuple[int, int], expected: tuple[int, int]) -> bool:
    """Whether the first share is larger than chance explains: a z test of two shares, one-sided, at 0.1 %.

    Args:
        found: how many, and of how many.
        expected: the same for the other share.
    """
    texts = found[1], expected[1]
    if not all(texts):
        return False
    share = (found[0] + expected[0]) / sum(texts)
    error = math.sqrt(share * (1 - share) * sum(1 / count for count in texts))
    return found[0] / texts[0] - expected[0] / texts[1] > SURER * error


def read_confidence(trained: Trained, rule: Rule, least: float | None, risk: float | None) -> Confidence:
    """The confidence that ``--abstain``, ``--abstain_risk`` or ``--most_uncertain`` needs, from the run's validation.

    Args:
        trained: what labels texts.
        rule: which labels a text gets.
        least: ``--abstain``.
        risk: ``--abstain_risk``.

    Raises:
        UserError: the directory is an exported folder, which has no validation, its predictions cannot be read, or
            validation cannot show the risk.
    """
    if trained.exported:
        for name, value in (("abstain", least), ("abstain_risk", risk)):
            if value is not None:
                raise UserError(f"--{name} {value:g}: needs a run directory: {trained.directory} has no validation")
        return Confidence(notes=("confidence is as trained: an exported folder has no validation to calibrate it",))
    run = read_finished(trained.directory)
    answers = replace(read_validation(run), rule=rule)
    temperature = fit_temperature(answers)
    reason = "validation gives no temperature, because its answers are all right or no better than chance"
    notes = () if temperature else (f"confidence is as trained: {reason}",)
    found = Confidence(temperature or 1.0, least or 0.0, notes)
    cooled, folds = answers.cooled(found.temperature), "kfold" in run.result
    if least is not None:
        count, shown = reached(cooled, least, folds)
        return replace(found, notes=(*notes, shown), reached=(count, len(cooled.rows)))
    if risk is None:
        return found
    candidates = checkpoints_compared(run.result)
    chosen = least_confidence(cooled, risk, candidates)
    if chosen is None:
        raise UserError(
            f"--abstain_risk {risk:g}: the {len(cooled.rows):,} validation texts cannot show it, but"
            f" {smallest_risk(cooled, candidates):g}: give that or --abstain X, or label more texts"
        )
    shown = (
        f"--abstain {chosen.shown} answers {chosen.answered:,} of {chosen.texts:,} validation texts,"
        f" {chosen.wrong:,} of them wrong. With {100 * LEVEL:g} % confidence, at most {100 * risk:g} % of all"
        f" answers are wrong, if new texts are like validation"
    )
    if folds:
        shown += " (about: the classifiers of the folds gave these answers)"
    if run.config.data.group_column is not None:
        shown += ", and if each text is a group of its own: texts of one group are alike, so more may be wrong"
    return replace(found, least=float(chosen.shown), notes=(*notes, shown), reached=(chosen.answered, chosen.texts))


def reached(validation: Answers, least: float, folds: bool) -> tuple[int, str]:
    """How many validation texts reach a confidence, and the same with how many of these answers are right, in words.

    Args:
        validation: cooled.
        least: the confidence.
        folds: whether these answers are out of fold.
    """
    sure = validation.confidence >= least
    count, right = int(sure.sum()), int((sure & validation.right).sum())
    texts = "texts out of fold" if folds else "validation texts"
    shown = f"confidence {least:g}: {count:,} of {len(sure):,} {texts} reach it"
    if not count:
        return 0, shown
    low, high = accuracy_interval(right / count, count)
    interval = f"{right / count:.0%}; 95 % interval {low:.0%} to {high:.0%}"
    return count, f"{shown}, and {right:,} of these answers are right ({interval})"


def most_uncertain(answered: Iterable[Answered], count: int, columns: Sequence[str]) -> Iterator[Answered]:
    """The rows with the lowest confidence, the lowest first, as one chunk; of equal texts the first one.

    Rows without a text are left out.

    Memory is bounded by ``count`` and a chunk of the input.

    Args:
        answered: rows, and the values of each column of their answers.
        columns: the names of the answers' columns.
    """
    kept: Answered | None = None
    place = list(columns).index(CONFIDENCE)
    for rows, values in answered:
        both = (rows, values) if kept is None else _joined(kept, (rows, values))
        confidence = np.array([np.inf if value is None else value for value in both[1][place]])
        good = np.flatnonzero(~both[0].bad)
        texts = pd.Series([tuple(str(column[i]) for column in both[0].texts.values()) for i in good])
        confidence[good[texts.duplicated()]] = np.inf
        order = np.argsort(confidence, kind="stable")[:count]
        kept = _taken(both, order[np.isfinite(confidence[order])])
    if kept is not None:
        yield kept


def _joined(first: Answered, second: Answered) -> Answered:
    (rows, values), (others, more) = first, second
    tables = [part.table.astype(object) for part in (rows, others)]  # one chunk may have numbers where the next has not
    texts = {name: column + others.texts[name] for name, column in rows.texts.items()}
    joined = Rows(pd.concat(tables, ignore_index=True), texts, np.concatenate([rows.bad, others.bad]))
    return joined, [a + b for a, b in zip(values, more, strict=True)]


def _taken(answered: Answered, places: np.ndarray) -> Answered:
    rows, values = answered
    texts = {name: [column[i] for i in places] for name, column in rows.texts.items()}
    return Rows(rows.table.iloc[places], texts, rows.bad[places]), [[column[i] for i in places] for column in values]
