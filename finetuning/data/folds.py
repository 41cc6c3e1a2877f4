"""Folds of ``--kfold``: the training texts in parts of equal size, each of which is validation once.

Folds that keep groups of texts whole, ``--group_column``, also cut a table into splits.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd

from finetuning.data.labels import doubt_about, rarest_labels
from finetuning.data.texts import LabelledTexts, Pool, TextData
from finetuning.errors import UserError
from finetuning.settings import DataSettings

LARGE_FOLD, MOST_OF_THEM = 2, 0.75  # times the mean size of the folds; of all texts, where folds are few


def with_folds(texts: TextData, data: DataSettings) -> TextData:
    """The texts with a validation split: one fold, or all training texts, each of which is validation in one fold.

    Args:
        texts: train and test, or the result of an earlier call.
        data: ``kfold``, ``fold``, ``data_seed`` and ``limit_train``.

    Raises:
        UserError: there are too few texts for the folds.
    """
    assert data.kfold is not None
    pool = texts.pool
    warnings: list[str] = []
    if pool is None:
        train, limited = texts.splits["train"], data.limit_train is not None
        numbers, warnings = fold_numbers(train, texts.label_names, data.kfold, data.data_seed, limited)
        pool = Pool(train, numbers)
    train = pool.texts
    if data.fold is None:
        parts, note = (train, train), f"each training text is validation in one of {data.kfold} folds"
    else:
        held_out = pool.folds == data.fold
        known = _known(train.contents, held_out)
        parts = train.taken(np.flatnonzero(~known)), train.taken(np.flatnonzero(held_out))
        note = f"validation is fold {data.fold} of the {data.kfold} folds of the training texts"
    splits = {"train": parts[0], "validation": parts[1], "test": texts.splits["test"]}
    notes = list(dict.fromkeys([*texts.notes, note, *warnings]))
    return dataclasses.replace(texts, splits=splits, notes=notes, pool=pool)


def fold_numbers(
    train: LabelledTexts, label_names: list[str], count: int, seed: int, limited: bool = False
) -> tuple[np.ndarray, list[str]]:
    """The fold of each text, (n,) from 1 to ``count``, and warnings.

    The texts of each class are dealt out in random order. So the folds differ by one text at most, also within each
    class; multi-label: among the texts with the same rarest label. A text that occurs several times counts once, and
    all of its copies are in one fold. With groups see ``group_folds``: copies stay in their own groups.

    Args:
        limited: whether ``--limit_train`` may have left a class too few texts.

    Raises:
        UserError: a fold would be empty, or train without a class.
    """
    codes = train.contents
    _, first = np.unique(codes, return_index=True)
    strata = train.labels if train.labels.ndim == 1 else rarest_labels(train.labels)
    if len(first) < count:
        raise UserError(f"--kfold {count}: must be at most {len(first)}, the number of different training texts")
    if train.labels.ndim == 1:
        _refuse_single(strata[first], label_names, count, limited)
    if train.groups is None:
        order = np.random.default_rng(seed).permutation(len(first))
        order = order[np.argsort(strata[first][order], kind="stable")]
        numbers = np.empty(len(first), dtype=np.int64)
        numbers[order] = np.arange(len(first)) % count + 1
        found, why = numbers[codes], "are copies of texts with other labels: correct the labels"
    else:
        if (groups := len(np.unique(train.groups))) < count:
            raise UserError(f"--kfold {count}: must be at most {groups}, the number of groups of the training texts")
        found = group_folds(strata, train.groups, [1] * count, seed)
        why = "belong to few groups: label texts of other groups, or leave the class out"
    warnings = []
    if (largest := int(np.bincount(found).max())) > min(LARGE_FOLD / count, MOST_OF_THEM) * len(found):
        why_large = "copies" if train.groups is None else "groups"
        warnings.append(
            f"warning: {largest:,} of {len(found):,} training texts are in one fold, because {why_large} stay together:"
            f" the run that validates on it trains on {len(found) - largest:,} at most"
        )
    if copies := int((pd.Series(found).groupby(codes).transform("nunique") > 1).sum()):
        warnings.append(f"{copies} training texts have copies in groups of other folds, which train without them")
    if train.labels.ndim == 1:
        folds = pd.Series(found).groupby(train.labels).nunique()
        for fold in range(1, count + 1):
            lost = set(folds.index) - set(train.labels[~_known(codes, found == fold)])
            if lost:  # its texts were dealt out by their groups, or as copies of texts with other labels
                what = f"the texts of class {label_names[min(lost)]!r} are in one fold, because they {why}"
                if folds[min(lost)] > 1:
                    what = (
                        f"fold {fold} would train without class {label_names[min(lost)]!r}, because it has all of its"
                        " texts or copies of them: remove copies, or leave out --group_column"
                    )
                raise UserError(f"--kfold {count}: {what}")
        fewest, name = folds.min(), label_names[int(folds.idxmin())]
        if fewest < count:
            warnings.append(f"warning: class {name!r} is in {fewest} of the {count} folds only, which validate on it")
    else:
        warnings += _unseen_labels(train.labels, codes, found, label_names)
    return found, warnings


def _unseen_labels(labels: np.ndarray, codes: np.ndarray, found: np.ndarray, names: list[str]) -> list[str]:
    """A warning for each fold that trains without a label of its validation texts.

    Args:
        labels: (n, k) the labels of each text.
        codes: (n,) equal for copies of a text.
        found: (n,) the fold of each text.
        names: of the labels.
    """
    warnings = []
    for fold in np.unique(found):
        trained, held_out = labels[~_known(codes, found == fold)], labels[found == fold]
        unseen = [names[i] for i in np.flatnonzero(~trained.any(0) & held_out.any(0))]
        if unseen:
            warnings.append(f"warning: fold {fold} trains without the label {', '.join(unseen)}, but validates on it")
    return warnings


def _known(codes: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Which texts are held out or copies of such texts, (n,) bool. Copies are in other folds only with groups."""
    return np.isin(codes, codes[held_out])


def group_folds(strata: np.ndarray, groups: np.ndarray, sizes: Sequence[float], seed: int) -> np.ndarray:
    """The fold of each text, (n,) from 1 on. No group is in two folds.

    One group after another, the largest first, goes to the fold where the squared shares of all classes, and of all
    texts, divided by the fold's size, then grow least: it spreads them evenly, as far as whole groups can. The texts
    weigh as much as all classes. With equal sizes no fold is empty.

    Args:
        strata: (n,) int class of each text.
        groups: (n,) group of each text; at least as many different ones as folds.
        sizes: of the folds, in any unit.
        seed: decides among groups of one size.
    """
    _, members = np.unique(groups, return_inverse=True)
    places = np.split(np.argsort(members, kind="stable"), np.cumsum(np.bincount(members))[:-1])
    totals = np.append(np.bincount(strata), len(strata)).clip(1)
    order = np.random.default_rng(seed).permutation(len(places))
    weights = np.append(np.ones(len(totals) - 1), len(totals) - 1)
    wanted, found = np.asarray(sizes), np.empty(len(strata), dtype=np.int64)
    filled = np.zeros((len(wanted), len(totals)))
    for group in sorted(order, key=lambda group: -len(places[group])):
        texts = places[group]
        share = np.append(np.bincount(strata[texts], minlength=len(totals) - 1), len(texts)) / totals
        fold = np.argmin((2 * filled + share) @ (weights * share) / wanted)  # the growth of (x + share)^2 / size
        filled[fold] += share
        found[texts] = fold + 1
    return found


def _refuse_single(labels: np.ndarray, names: list[str], count: int, limited: bool) -> None:
    """Refuses a class with one text: the fold that validates on it would train without the class."""
    classes, texts = np.unique(labels, return_counts=True)
    if texts.min() < 2:
        doubt = "" if limited else doubt_about([names[i] for i in classes], len(labels))
        more = "give a larger --limit_train; if it has no more of this class, " if limited else ""
        advice = doubt or f"{more}add texts of it, or leave it out"
        raise UserError(
            f"--kfold {count}: class {names[classes[texts.argmin()]]!r} has 1 different training text: must be at least"
            f" 2, or the fold that validates on it trains without the class: {advice}"
        )
