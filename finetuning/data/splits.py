"""Splits of labelled texts: label codes, stratified parts, removal of leaks, limits."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from finetuning.data.doubts import alike_groups
from finetuning.data.folds import group_folds
from finetuning.data.labels import (
    EXACT,
    comparable,
    doubt_about,
    encode_multi_label,
    is_multi_label,
    misspelled,
    rarest_labels,
)
from finetuning.data.texts import LabelledTexts, Source, contents_of
from finetuning.datasets import DATASETS, SPLITS, traits_of
from finetuning.errors import UserError, counted
from finetuning.settings import DataSettings


def encode_labels(source: Source, data: DataSettings) -> tuple[list[str], Source]:
    """The label names, and the source with its labels as numbers 0 ... classes - 1.

    For multi-label data see ``encode_multi_label``.

    Raises:
        UserError: a label is not allowed, or all labels are equal.
    """
    if is_multi_label(source, data):
        return encode_multi_label(source, data)
    labels = pd.concat({split: table.label for split, table in source.tables.items()})
    labels = comparable(labels, source.label_names)
    words = labels.map(lambda label: isinstance(label, str))
    if source.label_names is None and not pd.api.types.is_numeric_dtype(labels) and not words.all():
        kinds = labels.map(lambda label: type(label).__name__)
        odd = labels[kinds == kinds.value_counts().idxmin()].tolist()[0]
        raise UserError(
            f"--label_column {data.label_column}: labels must be all numbers or all strings, but one is {odd!r}: write"
            " them alike in all files"
        )
    known: dict[Any, int]
    if source.label_names is not None:
        names = list(source.label_names)
        known = {key: i for i, name in enumerate(names) for key in (i, name)}
    else:
        if pd.api.types.is_float_dtype(labels) and (labels % 1 == 0).all() and (labels.abs() < EXACT).all():
            labels = labels.astype(int)
        values = sorted(labels.unique().tolist())
        names = [str(value) for value in values]
        known = {value: i for i, value in enumerate(values)}
    unknown = labels[~labels.isin(list(known))]
    if len(unknown):
        allowed = ", ".join(f"{i} or {name}" for i, name in enumerate(names))
        advice = ": use --dataset text for other labels" if traits_of(data.dataset).label_names else ""
        raise UserError(
            f"--label_column {data.label_column}: label {unknown.tolist()[0]!r} is not one of {allowed}{advice}"
        )
    if labels.nunique() < 2:
        raise UserError(
            f"--label_column {data.label_column}: must have at least two labels, but all are {labels.tolist()[0]!r}"
        )
    codes = labels.map(known).astype(np.int64)
    tables = {split: table.assign(label=codes[split].to_numpy()) for split, table in source.tables.items()}
    return names, dataclasses.replace(source, tables=tables)


def stratified_parts(labels: np.ndarray, sizes: Sequence[int], seed: int) -> list[np.ndarray]:
    """Disjoint random parts of exactly ``sizes`` examples. Class counts are proportional, within two examples.

    The examples of each class, in random order, are spread evenly over the interval from 0 to 1. All examples are
    then sorted by their position in it and cut. The class counts follow Webster's method of apportionment.

    Args:
        labels: (n,) class of each example.
        sizes: size of each part; their sum is at most n. A smaller first part is contained in a larger first part.
        seed: the same seed gives the same parts.

    Returns:
        Positions in ``labels``, one array (size,) for each part.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = order[np.argsort(place[order], kind="stable")]
    return np.split(order, np.cumsum(sizes))[: len(sizes)]


def _sizes(total: int, shares: Sequence[int]) -> list[int]:
    """Divides ``total`` in proportion to ``shares``, by largest remainder."""
    exact = total * np.array(shares) / sum(shares)
    sizes = np.floor(exact).astype(int)
    sizes[np.argsort(sizes - exact, kind="stable")[: total - sizes.sum()]] += 1
    return sizes.tolist()


def _parts(table: pd.DataFrame, shares: Sequence[int], names: list[str], data: DataSettings) -> list[pd.DataFrame]:
    """Cuts ``table`` into stratified parts in proportion to ``shares``; with whole groups only roughly."""
    counts = table.label.value_counts()
    if counts.min() < len(shares) and "labels" not in table:
        usual = "add texts of it, leave it out, or give a validation and a test split of your own"
        others = [names[i] for i in counts.index.drop(counts.idxmin())]
        doubt = misspelled(names[counts.idxmin()], others) or doubt_about([names[i] for i in counts.index], len(table))
        raise UserError(
            f"--label_column {data.label_column}: class {names[counts.idxmin()]!r} has {counted(counts.min(), 'text')}:"
            f" must be at least {len(shares)} for a stratified split: {doubt or usual}"
        )
    if "group" in table:
        return _grouped_parts(table, shares, data)
    sizes = _sizes(len(table), shares)
    if 0 in sizes:
        raise UserError(f"--data_dir: {len(table)} texts are too few for a split {':'.join(map(str, shares))}")
    return [table.iloc[part] for part in stratified_parts(table.label.to_numpy(), sizes, data.data_seed)]


def numbered_groups(source: Source) -> Source:
    """The source with a number in place of each group's name, the same one in all splits."""
    if "group" not in source.tables["train"]:
        return source
    numbers, names = pd.factorize(pd.concat([table.group for table in source.tables.values()]))
    parts = np.split(numbers, np.cumsum([len(table) for table in source.tables.values()])[:-1])
    parts_of = zip(source.tables.items(), parts, strict=True)
    tables = {split: table.assign(group=part) for (split, table), part in parts_of}
    return dataclasses.replace(source, tables=tables, notes=[*source.notes, *alike_groups(names.tolist())])


def _grouped_parts(table: pd.DataFrame, shares: Sequence[int], data: DataSettings) -> list[pd.DataFrame]:
    """As ``_parts``, with no group in two parts, refused if train would lack a class, or a part half of its texts."""
    labels, least = table.label.to_numpy(), len(table) * np.array(shares) / sum(shares) / 2
    for places in _grouped_cuts(labels, table.group.to_numpy(), shares, data.data_seed):
        parts = [table[places == part] for part in range(1, len(shares) + 1)]
        complete = "labels" in table or parts[0].label.nunique() == table.label.nunique()  # multi-label: may lack one
        if complete and all(least <= [len(part) for part in parts]):
            return parts
    raise UserError(
        f"--group_column {data.group_column}: {table.group.nunique()} groups are too few or too unequal for parts"
        f" {':'.join(map(str, shares))} that share none: a part would lack a class or half of its texts: give"
        " validation and test files of your own, or leave it out"
    )


def _grouped_cuts(labels: np.ndarray, groups: np.ndarray, shares: Sequence[int], seed: int) -> Iterator[np.ndarray]:
    """The part of each text, (n,) from 1 on: first all groups are dealt to the parts, which a large group needs.

    That may keep all groups of a rare class in train. So the second cut holds out some of ten equal folds.
    """
    yield group_folds(labels, groups, shares, seed)
    count = sum(shares) // shares[-1]
    folds = group_folds(labels, groups, [1] * count, seed)
    nearest = np.argsort(np.abs(np.bincount(folds, minlength=count + 1)[1:] - len(labels) / count), kind="stable")
    part_of_fold = np.ones(count, dtype=np.int64)
    part_of_fold[nearest[: len(shares) - 1]] = np.arange(2, len(shares) + 1)
    yield part_of_fold[folds - 1]


def _carved(tables: dict[str, pd.DataFrame], names: list[str], data: DataSettings) -> list[pd.DataFrame]:
    """Train, and a tenth of it for another split, which has no group of the splits that are there."""
    train, others = tables["train"], [table for name, table in tables.items() if name != "train"]
    if "group" not in train or not others:
        return _parts(train, (90, 10), names, data)
    shared = _shares_group(train, pd.concat(others))
    if shared.all():
        raise UserError(
            f"--group_column {data.group_column}: each group of train is in {' or '.join(set(tables) - {'train'})}, so"
            " none is left to train on: leave out this flag, or those texts"
        )
    try:
        kept, carved = _parts(train[~shared], (90, 10), names, data)
    except UserError as error:
        beside = f" ({shared.sum()} training texts share a group with another file, and do not count)"
        raise UserError(f"{error}{beside if shared.any() else ''}") from None
    return [pd.concat([kept, train[shared]]).sort_index(), carved]  # without_leaks removes and counts those


def split_source(source: Source, names: list[str], data: DataSettings) -> tuple[dict[str, pd.DataFrame], str]:
    """Train, validation and test as ``--split`` says, and a name for them that shows how they were split.

    With ``--kfold`` there is a validation only if the data have one, or a table is cut as without folds.
    """
    tables = source.tables
    kind = data.split or ("official" if "test" in tables else "stratified")
    if kind != "stratified" and "test" not in tables:
        raise UserError(f"--split {kind}: must be stratified, because {source.name} ({source.where}) has no test split")
    if kind == "official" or (data.split is None and "validation" in tables):
        splits = dict(tables)
        wanted = {"test"} if data.kfold is not None else {"validation", "test"}  # folds are validation
        for missing in wanted - set(tables):  # at most one
            splits["train"], splits[missing] = _carved(tables, names, data)
        test = source.test_is if "test" in tables else "held-out test"
        return {split: splits[split] for split in SPLITS if split in splits}, f"{source.name}, {test} ({source.where})"
    resplit = DATASETS[data.dataset].resplit if kind == "resplit" else None
    shares = resplit or (80, 10, 10)
    # A single table keeps its row numbers, which have gaps where repeated sentences were dropped.
    everything = pd.concat([tables[s] for s in SPLITS if s in tables], ignore_index=len(tables) > 1)
    splits = dict(zip(SPLITS, _parts(everything, shares, names, data), strict=True))
    name = source.name if len(tables) == 1 else f"{source.name} {' + '.join(tables)}"
    return splits, f"{name}, {'resplit' if kind == 'resplit' else 'held out'} ({source.where})"


def _shares_group(table: pd.DataFrame, others: pd.DataFrame) -> pd.Series:
    """Which rows belong to a group that ``others`` have, too."""
    return table.group.isin(others.group) if "group" in table else pd.Series(False, index=table.index)


def without_leaks(splits: dict[str, pd.DataFrame], names: list[str]) -> tuple[dict[str, pd.DataFrame], int, list[str]]:
    """The splits with a train that has no text and no group of another split.

    Returns:
        The splits, how many texts train lost because another split has them, and a note if groups cost it more.

    Raises:
        UserError: a label of validation or test does not appear in train.
    """
    held_out = pd.concat([table for name, table in splits.items() if name != "train"])
    leaks, grouped = contents_of(splits["train"]).isin(contents_of(held_out)), _shares_group(splits["train"], held_out)
    train = splits["train"][~leaks & ~grouped]
    kept, dropped, more = splits | {"train": train}, int(leaks.sum()), int((grouped & ~leaks).sum())
    notes = [f"removed {more} more training texts whose group is in another split"] if more else []
    if train.empty and (more or "labels" in held_out):
        either = ", or their group does" if more else ""
        raise UserError(
            f"--data_dir: all {len(leaks)} training texts also appear in validation or test{either}:"
            f" {'leave some groups to train alone' if more else 'remove repeats'}"
        )
    if "labels" in held_out:  # multi-label: unseen_labels warns
        return kept, dropped, notes
    missing, everything = sorted(set(held_out.label) - set(train.label)), {*held_out.label, *train.label}
    if missing:
        doubt = misspelled(names[missing[0]], (names[i] for i in sorted(set(train.label))))
        doubt = doubt or doubt_about([names[i] for i in sorted(everything)], len(train) + len(held_out))
        either = ", or whose group does," if more else ""
        removed = (
            f" (after {dropped + more} texts that also appear in validation or test{either} were removed from train)"
        )
        raise UserError(
            f"--data_dir: label {names[missing[0]]!r} appears in validation or test but not in train"
            + (removed if dropped + more else "")
            + f": {doubt or 'add training texts of it, or leave it out'}"
        )
    return kept, dropped, notes


def with_unseen_test(splits: dict[str, pd.DataFrame], given: bool) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """The splits with a validation that has no text and no group of test, and notes for the user, at most one.

    Validation chooses the checkpoint and the learning rate, so it must not see the test split.

    Args:
        splits: train, validation and test. With ``--kfold`` there is no validation yet.
        given: whether validation was a file of its own. It is then kept whole, and only the note warns.

    Raises:
        UserError: test has all texts of validation, or their groups.
    """
    if "validation" not in splits:
        return splits, []
    validation, test = splits["validation"], splits["test"]
    seen = contents_of(validation).isin(contents_of(test)) | _shares_group(validation, test)
    if not seen.any():
        return splits, []
    appear = "also appear in, or share a group with, test" if "group" in test else "also appear in test"
    if given:
        told = f"validation texts {appear}, so the test score may be too high"
        return splits, [f"warning: {seen.sum()} of {len(seen)} {told}"]
    if seen.all():
        raise UserError(f"--data_dir: all {len(seen)} validation texts, taken from train, {appear}: remove repeats")
    note = f"removed {seen.sum()} validation texts that {appear} (before --limit_validation)"
    return splits | {"validation": splits["validation"][~seen]}, [note]


def limited(splits: dict[str, pd.DataFrame], data: DataSettings) -> dict[str, pd.DataFrame]:
    """Stratified samples of the sizes that ``--limit_train``, ``--limit_validation`` and ``--limit_test`` give.

    Raises:
        UserError: a limit is larger than its split, or smaller than the number of classes in train.
    """
    kept = dict(splits)
    for name, table in splits.items():
        limit = getattr(data, f"limit_{name}")
        if limit is None:
            continue
        classes = table.label.nunique() if name == "train" and "labels" not in table else 1
        if not classes <= limit <= len(table):
            raise UserError(
                f"--limit_{name} {limit}: must be from {classes} to {len(table)}, because the {name} split has"
                f" {len(table)} texts{'' if 'labels' in table else f' in {table.label.nunique()} classes'}"
            )
        kept[name] = table.iloc[stratified_parts(table.label.to_numpy(), [limit], data.data_seed)[0]]
    return kept


def lost_classes(train: pd.DataFrame, kept: pd.DataFrame, names: list[str], why: str) -> list[str]:
    """A warning about classes that are left without a training text, and why; empty without such classes."""
    lost = [names[i] for i in sorted(set(train.label) - set(kept.label))]
    return [f"warning: {why} leaves no training text of class {', '.join(lost)}"] if lost else []


def sampled(split: LabelledTexts, count: int, seed: int) -> LabelledTexts:
    """A stratified sample of a split's texts, in their order; all texts if ``count`` is not below their number."""
    if count >= len(split.texts):
        return split
    strata = split.labels if split.labels.ndim == 1 else rarest_labels(split.labels)
    return split.taken(np.sort(stratified_parts(strata, [count], seed)[0]))
