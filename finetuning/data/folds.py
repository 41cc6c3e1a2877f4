"""Folds of ``--kfold``: the training texts in parts of equal size, each of which is validation once."""

import dataclasses

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
        data: ``kfold``, ``fold`` and ``data_seed``.

    Raises:
        UserError: there are too few texts for the folds.
    """
    assert data.kfold is not None
    train, test = texts.splits["train"], texts.splits["test"]
    numbers, warning = fold_numbers(train, texts.label_names, data.kfold, data.data_seed)
    if data.fold is None:
        parts, note = (train, train), f"each training text is validation in one of {data.kfold} folds"
    else:
        held_out = numbers == data.fold
        parts = train.taken(np.flatnonzero(~held_out)), train.taken(np.flatnonzero(held_out))
        note = f"validation is fold {data.fold} of the {data.kfold} folds of the training texts"
    splits = {"train": parts[0], "validation": parts[1], "test": test}
    return dataclasses.replace(texts, splits=splits, notes=list(dict.fromkeys([*texts.notes, note, *warning])))


def fold_numbers(train: LabelledTexts, label_names: list[str], count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """The fold of each text, (n,) from 1 to ``count``, and a warning about classes that are smaller.

    The texts of each class are dealt out in random order. So the folds differ by one text at most, also within each
    class; multi-label: among the texts with the same rarest label. A text that occurs several times counts once, and
    all of its copies are in one fold.

    Raises:
        UserError: a fold would be empty, or train without a class.
    """
    pairs = [""] * len(train.texts) if train.pairs is None else train.pairs
    contents = pd.Series([f"{a.strip()}\0{b.strip()}" for a, b in zip(train.texts, pairs, strict=True)])
    codes, _ = pd.factorize(contents)
    _, first = np.unique(codes, return_index=True)
    strata = (train.labels if train.labels.ndim == 1 else rarest_labels(train.labels))[first]
    if len(first) < count:
        raise UserError(f"--kfold {count}: must be at most {len(first)}, the number of different training texts")
    warning = [] if train.labels.ndim > 1 else _small_class(strata, label_names, count)
    order = np.random.default_rng(seed).permutation(len(first))
    order = order[np.argsort(strata[order], kind="stable")]
    numbers = np.empty(len(first), dtype=np.int64)
    numbers[order] = np.arange(len(first)) % count + 1
    found = numbers[codes]
    if train.labels.ndim == 1:
        folds = pd.Series(found).groupby(train.labels).nunique()
        if folds.min() < 2:  # its texts are copies of texts with other labels, by which they were dealt out
            name = label_names[int(folds.idxmin())]
            raise UserError(
                f"--kfold {count}: the texts of class {name!r} are in one fold, because they are copies of texts with"
                f" other labels: correct the labels"
            )
    return found, warning


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
