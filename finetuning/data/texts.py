"""Texts with labels: as a source gives them, and as three splits ready for the tokenizer."""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Source:
    """The data as it was read: a table per split, with the columns text and label, and pair and group if asked for."""

    name: str
    where: str
    tables: dict[str, pd.DataFrame]
    label_names: Sequence[str] | None  # None if the names come from the labels
    notes: list[str] = field(default_factory=list)
    test_is: str = "official test"  # for people: what the test split is
    found: dict[str, Any] = field(default_factory=dict)  # settings that the reader found: text_column, label_column


def _stripped(texts: pd.Series) -> pd.Series:
    return texts.str.strip()


def contents_of(table: pd.DataFrame, seen: Callable[[pd.Series], pd.Series] = _stripped) -> pd.Series:
    """What is the same in copies: the text, or both texts of a pair, as ``seen``: by default without spaces around."""
    text = seen(table.text)
    return text if "pair" not in table else text + "\0" + seen(table.pair)


@dataclass(frozen=True)
class LabelledTexts:
    """One split. ``rows`` gives the position of each text in its source, counted from 0.

    With ``--split official``, the source is the split's own file, or the train file for a split carved out of train.
    With other splits, the source is train, validation and test one after another. With ``--kfold``, a validation file
    follows the train file.
    """

    texts: list[str]
    labels: np.ndarray  # (n,) int64; multi-label (n, names) int8, 0 or 1
    rows: np.ndarray  # (n,) int64
    pairs: list[str] | None = None  # the second text of each pair
    groups: np.ndarray | None = None  # (n,) int64: texts with the same number belong together, in all splits

    @functools.cached_property
    def contents(self) -> np.ndarray:
        """A number for each text or pair, (n,), the same for copies. All folds ask for it."""
        texts = {"text": self.texts} if self.pairs is None else {"text": self.texts, "pair": self.pairs}
        return pd.factorize(contents_of(pd.DataFrame(texts, dtype=object)))[0]

    def taken(self, positions: np.ndarray) -> "LabelledTexts":
        pairs = None if self.pairs is None else [self.pairs[i] for i in positions]
        groups = None if self.groups is None else self.groups[positions]
        texts = [self.texts[i] for i in positions]
        return LabelledTexts(texts, self.labels[positions], self.rows[positions], pairs, groups)

    def by_row(self) -> dict[int, tuple[str, ...]]:
        """Row -> its text, or the two texts of its pair."""
        columns = (self.texts,) if self.pairs is None else (self.texts, self.pairs)
        return dict(zip(self.rows.tolist(), zip(*columns, strict=True), strict=True))


@dataclass(frozen=True)
class Pool:
    """The training texts of all folds of ``--kfold``, and the fold of each, (n,) from 1 on."""

    texts: LabelledTexts
    folds: np.ndarray

    @property
    def sha256(self) -> str:
        """Of the folds, and of which texts are copies: groups and spelling, which tokens may not show, decide both."""
        return hashlib.sha256(self.folds.tobytes() + self.texts.contents.tobytes()).hexdigest()


@dataclass(frozen=True)
class TextData:
    """Three splits, and notes about them for the user."""

    source: str  # for people, e.g. "IMDb (Stanford), official test"
    label_names: list[str]
    splits: dict[str, LabelledTexts]  # train, validation, test
    leaks_dropped: int  # texts removed from train because they also appear in validation or test
    notes: list[str] = field(default_factory=list)  # one sentence for each change of the data
    columns: dict[str, str] = field(default_factory=dict)  # text_column and label_column, as given or found
    pool: Pool | None = None  # of ``--kfold``

    @property
    def sizes(self) -> dict[str, int]:
        """Split -> texts. If validation is all of train, as with ``--kfold``, it does not count."""
        train = self.splits["train"]
        return {name: len(s.texts) for name, s in self.splits.items() if name == "train" or s is not train}

    @property
    def sha256(self) -> str:
        """Of the texts and labels of all splits, in their order."""
        digest = hashlib.sha256(json.dumps(self.label_names).encode())
        for split in self.splits.values():
            digest.update(json.dumps([split.texts, split.pairs, split.labels.tolist()]).encode())
        return digest.hexdigest()
