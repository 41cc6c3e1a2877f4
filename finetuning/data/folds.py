"""Folds of ``--kfold``: the training texts in parts of equal size, each of which is validation once.

Folds that keep groups of texts whole, ``--group_column``, also cut a table into splits.
"""

import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from finetuning.data.labels import doubt_about, rarest_labels
from finetuning.data.texts import LabelledTexts, TextData
from finetuning.errors import UserError
from finetuning.settings import DataSettings


def with_folds(texts: TextData, data: DataSettings) -> TextData:
    """The texts with a validation split: one fold, or all training texts, each of which is validation in one fold.

    Args:
        texts: train and test, or the result of an earlier call without ``fold``.
        data: ``kfold``, ``fold``, ``data_seed`` and ``group_column``.

    Raises:
        UserError: there are too few texts for the folds.
    """
    assert data.kfold is not None
    train, test = texts.splits["train"], texts.splits["test"]
    numbers, warning = fold_numbers(train, texts.label_names, data.kfold, data)
    if data.fold is None:
        parts, note = (train, train), f"each training text is validation in one of {data.kfold} folds"
    else:
        held_out = numbers == data.fold
        parts = train.taken(np.flatnonzero(~held_out)), train.taken(np.flatnonzero(held_out))
        note = f"validation is fold {data.fold} of the {data.kfold} folds of the training texts"
    splits = {"train": parts[0], "validation": parts[1], "test": test}
    return dataclasses.replace(texts, splits=splits, notes=list(dict.fromkeys([*texts.notes, note, *warning])))


def fold_numbers(
    train: LabelledTexts, label_names: list[str], count: int, data: DataSettings
) -> tuple[np.ndarray, list[str]]:
    """The fold of each text, (n,) from 1 to ``count``, and warnings, for example about classes that are smaller.

    The texts of each class are dealt out in random order. So the folds differ by one text at most, also within each
    class; multi-label: among the texts with the same rarest label. A text that occurs several times counts once, and
    all of its copies are in one fold. With groups see ``group_folds``.

    Args:
        data: ``data_seed`` and ``group_column``.

    Raises:
        UserError: a fold would be empty, or train without a class.
    """
    pairs = [""] * len(train.texts) if train.pairs is None else train.pairs
    contents = pd.Series([f"{a.strip()}\0{b.strip()}" for a, b in zip(train.texts, pairs, strict=True)])
    codes, _ = pd.factorize(contents)
    _, first = np.unique(codes, return_index=True)
    strata = train.labels if train.labels.ndim == 1 else rarest_labels(train.labels)
    if len(first) < count:
        raise UserError(f"--kfold {count}: must be at most {len(first)}, the number of different training texts")
    warning = [] if train.labels.ndim > 1 else _small_class(strata[first], label_names, count)
    if train.groups is None:
        order = np.random.default_rng(data.data_seed).permutation(len(first))
        order = order[np.argsort(strata[first][order], kind="stable")]
        numbers = np.empty(len(first), dtype=np.int64)
        numbers[order] = np.arange(len(first)) % count + 1
        found, why = numbers[codes], "are copies of texts with other labels: correct the labels"
    else:
        found, why = group_folds(strata, train.groups, count, data), "belong to few groups: leave the class out"
        copies = (pd.Series(found).groupby(codes).transform("nunique") > 1).sum()
        known = (
            f"warning: {copies} training texts also appear in another group, so a fold may have trained on its texts"
        )
        warning += [known] if copies else []
    if train.labels.ndim == 1:
        folds = pd.Series(found).groupby(train.labels).nunique()
        if folds.min() < 2:  # by the groups, or by the other labels, its texts were dealt out
            name = label_names[int(folds.idxmin())]
            raise UserError(f"--kfold {count}: the texts of class {name!r} are in one fold, because they {why}")
    return found, warning


def group_folds(strata: np.ndarray, groups: Iterable[Any], count: int, data: DataSettings) -> np.ndarray:
    """The fold of each text, (n,) from 1 to ``count``: no group is in two of them, each class in all, if that allows.

    Args:
        strata: (n,) class of each text.
        groups: (n,) name of each text's group.
        data: ``data_seed`` and ``group_column``.

    Raises:
        UserError: there are fewer groups than folds, or too few texts.
    """
    flag = f"--group_column {data.group_column}"
    way = "lower --kfold" if count == data.kfold else "give validation and test files of your own, or leave it out"
    if (number := len(set(groups))) < count:
        raise UserError(f"{flag}: {count} parts that share no group need as many groups, and there are {number}: {way}")
    if np.bincount(strata).max() < count:
        raise UserError(f"{flag}: {count} parts need a class with as many texts, and there is none: {way}")
    from sklearn.model_selection import StratifiedGroupKFold  # loads scipy

    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=data.data_seed)
    found = np.zeros(len(strata), dtype=np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a class has fewer texts than there are folds
        for fold, (_, held_out) in enumerate(splitter.split(strata, strata, groups), 1):
            found[held_out] = fold
    if len(set(found)) < count:
        raise UserError(f"{flag}: a part would be empty, as the groups are of very unequal size: {way}")
    return found


def _small_class(labels: np.ndarray, names: list[str], count: int) -> list[str]:
    """A warning if a class has fewer texts than there are folds.

    Raises:
        UserError: a class has one text, so the fold that validates on it would train without the class.
    """
    classes, texts = np.unique(labels, return_counts=True)
    name, smallest = names[classes[texts.argmin()]], texts.min()
    if smallest < 2:
        advice = doubt_about([names[i] for i in classes], len(labels)) or "add texts of it, or leave it out"
        raise UserError(
            f"--kfold {count}: class {name!r} has 1 different training text: must be at least 2, or the fold that"
            f" validates on it trains without the class: {advice}"
        )
    if smallest >= count:
        return []
    return [f"warning: class {name!r} has {smallest} different texts, so not all of the {count} folds validate on it"]
