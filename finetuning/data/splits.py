"""Splits of labelled texts: label codes, stratified parts, leaks between splits, limits."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from finetuning.data.texts import SPLITS, Source
from finetuning.datasets import DATASETS
from finetuning.errors import UserError
from finetuning.settings import DataSettings


def encode_labels(source: Source, data: DataSettings) -> tuple[list[str], Source]:
    """Label names, and the source with labels 0 ... classes - 1."""
    labels = _comparable(pd.concat({split: table.label for split, table in source.tables.items()}))
    if not pd.api.types.is_numeric_dtype(labels) and not labels.map(lambda label: isinstance(label, str)).all():
        raise UserError(f"--label_column {data.label_column}: labels must be all numbers or all strings")
    known: dict[Any, int]
    if source.label_names is not None:
        names = list(source.label_names)
        known = {key: i for i, name in enumerate(names) for key in (i, name)}
    else:
        if pd.api.types.is_float_dtype(labels) and (labels % 1 == 0).all():
            labels = labels.astype(int)
        values = sorted(labels.unique().tolist())
        names = [str(value) for value in values]
        known = {value: i for i, value in enumerate(values)}
    unknown = labels[~labels.isin(list(known))]
    if len(unknown):
        allowed = ", ".join(f"{i} or {name}" for i, name in enumerate(names))
        advice = "" if data.dataset == "text" else "; --dataset text takes any labels"
        raise UserError(
            f"--label_column {data.label_column}: label {unknown.tolist()[0]!r} is not one of {allowed}{advice}"
        )
    if labels.nunique() < 2:
        raise UserError(f"--label_column {data.label_column}: all labels are {labels.tolist()[0]!r}, two are needed")
    codes = labels.map(known).astype(np.int64)
    tables = {split: table.assign(label=codes[split].to_numpy()) for split, table in source.tables.items()}
    return names, dataclasses.replace(source, tables=tables)


def _comparable(labels: pd.Series) -> pd.Series:
    """Labels, of which CSV files give words: as numbers where all are, else words without spaces around them."""
    words = labels.map(lambda label: isinstance(label, str))
    if not words.any():
        return labels
    numbers = pd.to_numeric(labels.where(words | labels.map(np.isscalar)), errors="coerce")
    return numbers if numbers.notna().all() else labels.where(~words, labels.astype(str).str.strip())


def stratified_parts(labels: np.ndarray, sizes: Sequence[int], seed: int) -> list[np.ndarray]:
    """Disjoint random parts of exactly ``sizes`` examples, each with all classes in proportion, within two examples.

    Each class's examples, in random order, are spread evenly over the interval from 0 to 1; all are sorted by that
    place and cut. (The counts are those of Webster's method of apportionment.)

    Args:
        labels: (n,) class of each example.
        sizes: of the parts; together at most n. The first part of a smaller request lies in that of a larger one.
        seed: repeats the same parts.

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
    """``total`` divided in proportion to ``shares``, by largest remainder."""
    exact = total * np.array(shares) / sum(shares)
    sizes = np.floor(exact).astype(int)
    sizes[np.argsort(sizes - exact, kind="stable")[: total - sizes.sum()]] += 1
    return sizes.tolist()


def _parts(table: pd.DataFrame, shares: Sequence[int], names: list[str], seed: int) -> list[pd.DataFrame]:
    """``table`` cut into stratified parts in proportion to ``shares``."""
    counts = table.label.value_counts()
    if counts.min() < len(shares):
        count = f"class {names[counts.idxmin()]!r} has {counts.min()} texts"
        raise UserError(f"--label_column: {count}, a stratified split needs {len(shares)}")
    sizes = _sizes(len(table), shares)
    if 0 in sizes:
        raise UserError(f"--data_dir: {len(table)} texts are too few to be split {':'.join(map(str, shares))}")
    return [table.iloc[part] for part in stratified_parts(table.label.to_numpy(), sizes, seed)]


def split_source(source: Source, names: list[str], data: DataSettings) -> tuple[dict[str, pd.DataFrame], str]:
    """Train, validation and test as ``--split`` says, and how the result is to be called."""
    tables = source.tables
    kind = data.split or ("official" if "test" in tables else "stratified")
    if kind != "stratified" and "test" not in tables:
        raise UserError(f"--split {kind}: {source.name} ({source.where}) has no test split, allowed is stratified")
    if kind == "official" or (data.split is None and "validation" in tables):
        splits = dict(tables)
        for missing in {"validation", "test"} - set(tables):  # one at most
            splits["train"], splits[missing] = _parts(tables["train"], (90, 10), names, data.data_seed)
        test = "official test" if "test" in tables else "held-out test"
        return {split: splits[split] for split in SPLITS}, f"{source.name}, {test} ({source.where})"
    resplit = DATASETS[data.dataset].resplit if kind == "resplit" else None
    shares = resplit or (80, 10, 10)
    # One table keeps its rows: repeated sentences may be missing from it.
    everything = pd.concat([tables[s] for s in SPLITS if s in tables], ignore_index=len(tables) > 1)
    splits = dict(zip(SPLITS, _parts(everything, shares, names, data.data_seed), strict=True))
    name = source.name if len(tables) == 1 else f"{source.name} {' + '.join(tables)}"
    return splits, f"{name}, {'resplit' if kind == 'resplit' else 'held out'} ({source.where})"


def drop_leaks(splits: dict[str, pd.DataFrame], names: list[str]) -> int:
    """Remove from train, in ``splits``, the texts that also stand in validation or test; their number."""
    held_out = pd.concat([splits["validation"], splits["test"]])
    leaks = splits["train"].text.str.strip().isin(held_out.text.str.strip())
    splits["train"] = splits["train"][~leaks]
    missing = sorted(set(held_out.label) - set(splits["train"].label))
    if missing:
        raise UserError(
            f"--data_dir: label {names[missing[0]]!r} stands in validation or test, but on no text of train"
            + (f" (after {leaks.sum()} texts that stand there as well were dropped from train)" if leaks.any() else "")
        )
    return int(leaks.sum())


def keep_test_unseen(splits: dict[str, pd.DataFrame], given: bool) -> list[str]:
    """Remove from validation, in ``splits``, the texts that also stand in test, for validation chooses the checkpoint
    and the learning rate. One that was ``given`` as a file of its own stays whole. Returns what there is to say."""
    seen = splits["validation"].text.str.strip().isin(splits["test"].text.str.strip())
    if not seen.any():
        return []
    if given:
        return [f"{seen.sum()} of {len(seen)} validation texts stand in test: what they choose has seen the test"]
    if seen.all():
        raise UserError(f"--data_dir: each text of validation, {len(seen)} held out of train, stands in test as well")
    splits["validation"] = splits["validation"][~seen]
    return [f"{seen.sum()} validation texts left out, before any limit: they stand in test"]


def limited(splits: dict[str, pd.DataFrame], data: DataSettings) -> dict[str, pd.DataFrame]:
    """Stratified subsamples of the sizes that ``--limit_train`` and so on ask for."""
    kept = dict(splits)
    for name, table in splits.items():
        limit = data.limit(name)
        if limit is None:
            continue
        classes = table.label.nunique() if name == "train" else 1
        if not classes <= limit <= len(table):
            raise UserError(
                f"--limit_{name} {limit}: the {name} split has {len(table)} texts in {table.label.nunique()} classes, "
                f"allowed is {classes} to {len(table)}"
            )
        kept[name] = table.iloc[stratified_parts(table.label.to_numpy(), [limit], data.data_seed)[0]]
    return kept
