"""Held-out texts that a reader of the report should see: confident mistakes, and labels that may be wrong."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from finetuning.report.mislabelled import suspects
from finetuning.runs.answers import Answers, joined

MISTAKES = 20
SUSPECTS = 500  # listed at most
SHOWN_START, SHOWN_END = 320, 120  # characters of a long text

Texts = Mapping[str, Mapping[int, tuple[str, ...]]]  # split -> row -> the text, or the two texts of a pair


@dataclass(frozen=True)
class Shown:
    """A text with its label, another one, and their probabilities."""

    where: str
    label: str
    other: str
    label_probability: str
    other_probability: str
    texts: tuple[str, ...]  # the text, or both of a pair; empty if texts are to stay private


def shortened(text: str) -> str:
    """A text in one line, with the middle of a long one left out. What is not Unicode becomes question marks."""
    line = " ".join(text.encode("utf8", "replace").decode("utf8").split())
    if len(line) <= SHOWN_START + SHOWN_END + 5:
        return line
    start = re.sub(r"(?<= )\S{0,30}$", "", line[:SHOWN_START])  # not in the middle of a word
    end = re.sub(r"^\S{0,30}(?= )", "", line[-SHOWN_END:])
    return f"{start.rstrip()} ... {end.lstrip()}"


def confident_mistakes(split: str, answers: Answers, names: Sequence[str], texts: Texts | None) -> list[Shown]:
    """The wrong answers with the highest probability.

    Multi-label: the probability is the one of the most confident wrong decision on a label.
    """
    chosen = np.where(answers.given, answers.probabilities, 1 - answers.probabilities)  # of the decision on each label
    decisive = answers.given != answers.truth if answers.rule.multi_label else answers.given
    confidence = np.where(decisive, chosen, 0).max(1)
    wrong = np.flatnonzero(~answers.right)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES]
    return [
        Shown(
            f"{split} {answers.rows[i]}",
            _labels(answers.truth[i], names),
            _labels(answers.given[i], names),
            "" if answers.rule.multi_label else _probability(answers.probabilities[i, answers.truth[i]].sum()),
            _probability(confidence[i]),
            _shown_texts(texts, split, answers.rows[i]),
        )
        for i in worst.tolist()
    ]


def maybe_wrong(answers: dict[str, Answers], names: Sequence[str], texts: Texts | None) -> list[Shown]:
    """Texts of all held-out splits whose label may be wrong, the largest gap first. Single-label only."""
    places = [(split, int(row)) for split, part in answers.items() for row in part.rows]
    everything = joined(list(answers.values()))
    labels, probabilities = everything.truth.argmax(1), everything.probabilities
    return [
        Shown(
            f"{places[i][0]} {places[i][1]}",
            names[labels[i]],
            names[better],
            _probability(probabilities[i, labels[i]]),
            _probability(probabilities[i, better]),
            _shown_texts(texts, *places[i]),
        )
        for i, better in suspects(everything)
    ]


def _labels(given: np.ndarray, names: Sequence[str]) -> str:
    return ", ".join(names[i] for i in np.flatnonzero(given).tolist()) or "no label"


def _probability(value: float) -> str:
    return f"{100 * value:.1f} %"


def _shown_texts(texts: Texts | None, split: str, row: int) -> tuple[str, ...]:
    return () if texts is None else tuple(map(shortened, texts[split][int(row)]))
