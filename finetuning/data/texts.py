"""Texts with labels: as a source gives them, and as three splits ready to be tokenized."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Source:
    """What was read: a table for each split that the source has, with columns text and label."""

    name: str
    where: str
    tables: dict[str, pd.DataFrame]
    label_names: Sequence[str] | None  # None: taken from the labels
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LabelledTexts:
    """One split. ``rows`` say where each text stands in its source.

    With ``--split official`` that is the position in the split's own file (a validation split that was carved out
    of train: in train's), from 0; otherwise the position in train, validation and test put one after another.
    """

    texts: list[str]
    labels: np.ndarray  # (n,) int64
    rows: np.ndarray  # (n,) int64


@dataclass(frozen=True)
class TextData:
    """Three splits and what is to be told of them."""

    source: str  # for people, e.g. "IMDb (Stanford), official test"
    label_names: list[str]
    splits: dict[str, LabelledTexts]  # train, validation, test
    leaks_dropped: int  # texts removed from train because they also stand in validation or test
    notes: list[str] = field(default_factory=list)  # what was done to the data, one sentence each
