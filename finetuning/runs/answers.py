"""What a finished run answered for its held-out texts: ``predictions.parquet`` as arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.runs.files import PREDICTIONS


@dataclass(frozen=True)
class Rule:
    """Which labels a text gets from its scores."""

    threshold: float | None = None  # the probability above which a label is given; None gives the most probable one
    positive: int | None = None  # of two classes, the one that the threshold is for; None with one: multi-label

    @classmethod
    def of_task(cls, task: Mapping[str, Any], names: Sequence[str]) -> "Rule":
        """The rule of a task as ``result.json`` has it: ``ValueError`` if its positive label is none of the names."""
        positive = task.get("positive_label")
        return cls(task.get("threshold"), None if positive is None else list(names).index(positive))

    @property
    def multi_label(self) -> bool:
        """Whether a text may have several labels, or none."""
        return self.threshold is not None and self.positive is None

    def given(self, scores: np.ndarray) -> np.ndarray:
        """The labels that texts get, (n, classes) bool. Who does not get the positive class gets the other one.

        Args:
            scores: (n, classes) probabilities; without a threshold, logits will do.
        """
        if self.threshold is None:
            return np.arange(scores.shape[1]) == scores.argmax(1)[:, None]
        if self.positive is None:
            return scores > self.threshold
        return (np.arange(2) == self.positive) == (scores[:, [self.positive]] > self.threshold)


MOST_PROBABLE = Rule()  # one label for each text


@dataclass(frozen=True)
class Answers:
    """The answers for the texts of one split."""

    rows: np.ndarray  # (n,) position of each text in its source
    truth: np.ndarray  # (n, classes) bool, the labels that each text has; all False if they are not known
    logits: np.ndarray  # (n, classes) float64
    tokens: np.ndarray | None = None  # (n,) length of each text as the model read it; None if the run did not keep it
    rule: Rule = MOST_PROBABLE  # which labels a text gets

    @cached_property
    def probabilities(self) -> np.ndarray:
        """(n, classes) of the classes; multi-label: of each label by itself."""
        if self.rule.multi_label:
            return 0.5 * (1 + np.tanh(self.logits / 2))  # the sigmoid, without overflow
        powers = np.exp(self.logits - self.logits.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    @cached_property
    def given(self) -> np.ndarray:
        """(n, classes) bool, the labels that the run gave."""
        return self.rule.given(self.logits if self.rule.threshold is None else self.probabilities)

    @cached_property
    def right(self) -> np.ndarray:
        """(n,) bool, whether the run gave exactly the labels that the text has."""
        return (self.given == self.truth).all(1)

    @cached_property
    def confidence(self) -> np.ndarray:
        """(n,) the probability that the given labels are exactly right.

        Multi-label: the product over all labels, given or not, as if they were independent.
        """
        others = 1 - self.probabilities if self.rule.multi_label else np.ones(1)
        return np.where(self.given, self.probabilities, others).prod(1)

    @cached_property
    def losses(self) -> np.ndarray:
        """(n,) cross-entropy in nats; multi-label: the mean over labels."""
        if self.rule.multi_label:
            signed = np.where(self.truth, self.logits, -self.logits)
            return np.logaddexp(0, -signed).mean(1)
        largest = self.logits.max(1)
        total = largest + np.log(np.exp(self.logits - largest[:, None]).sum(1))
        return total - (self.logits * self.truth).sum(1)

    def cooled(self, temperature: float) -> "Answers":
        """The same answers with logits divided by a temperature. The threshold moves, so that the labels stay."""
        rule, threshold = self.rule, self.rule.threshold
        if threshold is not None:
            logit = np.log(threshold / (1 - threshold)) / temperature
            rule = replace(rule, threshold=float(np.exp(-np.logaddexp(0, -logit))))  # a sigmoid that does not overflow
        return replace(self, logits=self.logits / temperature, rule=rule)

    def taken(self, positions: np.ndarray) -> "Answers":
        """The answers for the texts at some positions."""
        tokens = None if self.tokens is None else self.tokens[positions]
        return replace(
            self, rows=self.rows[positions], truth=self.truth[positions], logits=self.logits[positions], tokens=tokens
        )


def unlabelled(logits: np.ndarray, rule: Rule) -> Answers:
    """Answers for texts whose labels are not known."""
    return Answers(np.arange(len(logits)), np.zeros(logits.shape, dtype=bool), logits, rule=rule)


def joined(parts: Sequence[Answers]) -> Answers:
    """The answers for the texts of several splits, one after another. Lengths are left out."""
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("rows", "truth", "logits")}
    return Answers(**columns, rule=parts[0].rule)


def read_answers(directory: Path, rule: Rule = MOST_PROBABLE) -> dict[str, Answers]:
    """Split -> answers by the rule of the run, in the order of the file: ``OSError``, ``ValueError`` if unreadable."""
    import pyarrow.parquet as pq

    table = pq.read_table(directory / PREDICTIONS)
    splits, found = np.array(table["split"].to_pylist()), {}
    for split in dict.fromkeys(splits.tolist()):
        part = table.filter(splits == split)
        logits = part["logits"].combine_chunks().flatten().to_numpy().astype(np.float64).reshape(len(part), -1)
        truth = np.zeros(logits.shape, dtype=bool)
        for i, labels in enumerate(part["label"].to_pylist()):
            truth[i, labels] = True  # a number, or a list of numbers
        tokens = part["tokens"].to_numpy() if "tokens" in part.column_names else None
        found[split] = Answers(part["row"].to_numpy(), truth, logits, tokens, rule)
    return found
