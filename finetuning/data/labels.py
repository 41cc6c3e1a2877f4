"""Multi-label data: lists of labels, or one text with a separator -> a 0 or 1 for each label.

Splits and limits are stratified by each text's rarest label, because few texts share a whole set of labels. So rare
labels reach every part in proportion, as far as their texts allow.
"""

import dataclasses
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd

from finetuning.data.texts import Source
from finetuning.errors import UserError, listed
from finetuning.settings import DataSettings

SEPARATORS = (";", "|", ",")
WRITTEN_LISTS = "save lists as JSON lines or parquet, or write a;b with --label_separator ';'"
SHARED = 0.8  # of the parts of labels: if so many are parts of other labels as well, the labels look like lists
EXACT = 2**53  # a table holds larger whole numbers only nearly
FEWEST_IDS = 20  # different labels: fewer are classes, however few texts there are
MEASUREMENTS = 20  # different numbers with a fraction: so many are hardly names of classes
STRATIFIED = "splits and limits are stratified by each text's rarest label"


def same_spelling(name: str) -> str:
    """What is left of a label without what people do not see or mean: capitals, spaces, character codes.

    An accent may be a code of its own, or part of its letter's; and some codes have no shape at all.
    """
    shaped = (c for c in name if not c.isspace() and unicodedata.category(c) != "Cf")
    return unicodedata.normalize("NFKC", "".join(shaped)).casefold()


def same_label(name: str) -> str | float:
    """As ``same_spelling``, but a number stands for all forms of it, as 1, 1.0 and 01."""
    spelled = same_spelling(name)
    with suppress(ValueError):
        return float(spelled) if any(map(str.isdigit, spelled)) else spelled
    return spelled


def misspelled(name: str, known: Iterable[str]) -> str:
    """A clause that an unknown label is a known one in another spelling, with the codes of both; empty if it is not."""
    alike = next((other for other in known if same_spelling(other) == same_spelling(name)), None)
    return "" if alike is None else f"it is {name!a}, and the other {alike!a}: spell them alike"


def as_number(text: str) -> int | float | None:
    """The number that a text is, if Python writes it so; ``None`` for other texts, also for codes such as ``01``."""
    for kind in (int, float):
        with suppress(ValueError):
            number: int | float = kind(text)
            if str(number) == text and abs(number) < EXACT:  # false for nan as well
                return number
    return None


def doubt_about(names: Sequence[str], texts: int) -> str:
    """A clause with what to do if labels look like lists of labels, measurements, or ids; else empty.

    Args:
        names: the labels that occur.
        texts: how many texts have them.
    """
    if hint := separator_hint(names):
        return hint
    fractions = [name for name in names if isinstance(as_number(name), float) and not float(name).is_integer()]
    if len(fractions) >= MEASUREMENTS:
        return f"numbers such as {fractions[0]} would each be a class: make classes of them, for example low and high"
    if len(names) > max(texts / 2, FEWEST_IDS):
        return f"{texts} texts have {len(names)} different labels: if these are no classes, give another --label_column"
    return ""


def separator_hint(names: Sequence[str]) -> str:
    """What to do if labels look like lists of labels, as ``a;b`` next to ``a`` and ``b``; empty if they do not."""
    if len(written := [name for name in names if is_written_list(name)]) > len(names) / 2:
        return f"labels such as {written[0]!r} look like lists written as text: {WRITTEN_LISTS}"
    for separator in SEPARATORS:
        parts = {name: {part.strip() for part in name.split(separator)} for name in names}
        counts = Counter(part for own in parts.values() for part in own)
        lists = [name for name, own in parts.items() if len(own) > 1]
        shared = [counts[part] > 1 for name in lists for part in parts[name]]
        if len(lists) > 1 and sum(shared) >= SHARED * len(shared):
            return f"labels such as {lists[0]!r} look like lists: if they are, give --label_separator {separator!r}"
    return ""


def is_multi_label(source: Source, data: DataSettings) -> bool:
    """Whether the labels are lists, or text that ``--label_separator`` splits."""
    return data.label_separator is not None or any(table.label.map(_is_list).any() for table in source.tables.values())


def encode_multi_label(source: Source, data: DataSettings) -> tuple[list[str], Source]:
    """The label names, and the source with the columns ``labels`` and ``label``.

    ``labels`` has an array (names,) int8 of 0 and 1 for each text. ``label`` is the stratum of the text: the number of
    its rarest label, or the number of names for a text without a label.

    Raises:
        UserError: labels are of mixed kinds or not allowed, or the separator does not fit them.
    """
    flag = f"--label_column {data.label_column}"
    lists = pd.concat({split: _as_lists(table.label, data) for split, table in source.tables.items()})
    values = [value for row in lists for value in row]
    if data.label_separator is not None and lists.map(len).max() < 2:
        others = [(mark, name) for mark in SEPARATORS for name in values if mark in name]
        way = f"labels such as {others[0][1]!r} need --label_separator {others[0][0]!r}" if others else "leave it out"
        raise UserError(
            f"--label_separator {data.label_separator!r}: never separates two labels in column {data.label_column}:"
            f" {way}"
        )
    kinds = {type(value) for value in values}
    if kinds <= {int, float, bool} and _are_zeros_and_ones(lists):
        raise UserError(
            f"{flag}: {marks_instead_of_labels(len(lists.iloc[0]))}, and give --dataset text --data_dir PATH"
        )
    if len(kinds) > 1 or not kinds <= {str, int}:
        raise UserError(f"{flag}: the labels in the lists must be all whole numbers or all strings")
    names = [str(value) for value in sorted(set(values))] if source.label_names is None else list(source.label_names)
    hint = _of_other_labels(names) if data.label_separator is not None else []
    known: dict[Any, int] = {key: i for i, name in enumerate(names) for key in (name, i)}
    if source.label_names is None:
        known = {value: i for i, value in enumerate(sorted(set(values)))}
    unknown = [value for value in values if value not in known]
    if unknown:
        raise UserError(f"{flag}: label {unknown[0]!r} is not one of {', '.join(names)}")
    if len(names) < 2:
        raise UserError(f"{flag}: must have at least two different labels, but has {', '.join(names) or 'none'}")
    given = np.zeros((len(lists), len(names)), dtype=np.int8)
    rows = np.repeat(np.arange(len(lists)), lists.map(len))
    given[rows, [known[value] for value in values]] = 1
    if (given == given[0]).all():
        same = listed(name for name, has in zip(names, given[0], strict=True) if has)
        raise UserError(f"{flag}: all texts have the same labels ({same}), so there is nothing to learn")
    strata = pd.Series(rarest_labels(given), lists.index)
    labels = pd.Series(list(given), lists.index)
    tables = {
        split: table.assign(label=strata[split].to_numpy(), labels=labels[split].array)
        for split, table in source.tables.items()
    }
    return names, dataclasses.replace(source, tables=tables, notes=[*source.notes, *hint])


def _of_other_labels(names: Sequence[str]) -> list[str]:
    """A warning if a label is several others, joined by another separator than the one that was given; else empty."""
    known = set(names)
    for name in names:
        for mark in SEPARATORS:
            if mark in name and known.issuperset(part.strip() for part in name.split(mark)):
                return [f"warning: label {name!r} consists of other labels: is there another separator?"]
    return []


def comparable(labels: pd.Series, names: Sequence[str] | None) -> pd.Series:
    """Labels as numbers if all are written as such, else with strings stripped, because CSV files give strings.

    Args:
        labels: one label a text.
        names: of the classes, if they are known: a word that is a name is the number of its class, also if it is a
            number.
    """
    if names is not None:
        codes = {name: i for i, name in enumerate(names)}
        labels = labels.map(lambda label: codes.get(label.strip(), label) if isinstance(label, str) else label)
    words = labels.map(lambda label: isinstance(label, str))
    if not words.any():
        return labels
    stripped = labels.where(~words, labels.astype(str).str.strip())
    if any(as_number(word) is None for word in stripped[words].unique()):  # codes such as 01 stay as they are written
        truths = labels.map(lambda label: isinstance(label, bool | np.bool_))  # which a CSV has as words
        return stripped.where(~truths, stripped.astype(str))
    numbers = pd.to_numeric(labels.where(words | labels.map(np.isscalar)), errors="coerce")
    return numbers if numbers.notna().all() else stripped


def unseen_labels(splits: dict[str, pd.DataFrame], names: list[str]) -> list[str]:
    """A warning about labels that no training text has but others have; empty without such labels."""
    counts = {split: np.sum(table.labels.tolist(), axis=0) for split, table in splits.items()}
    missing = (counts["train"] == 0) & (sum(counts.values()) > 0)
    found = [name for name, is_missing in zip(names, missing, strict=True) if is_missing]
    return [f"warning: no training text has the label {', '.join(found)}, but other texts have it"] if found else []


def is_written_list(label: object) -> bool:
    """Whether a text is a list as Python, JSON or NumPy write it."""
    return isinstance(label, str) and label.strip().startswith("[") and label.strip().endswith("]")


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple | np.ndarray)


def _as_lists(labels: pd.Series, data: DataSettings) -> pd.Series:
    """Each text's labels as a list."""
    lists = labels.map(_is_list)
    if data.label_separator is None:
        if not lists.all():
            single = labels[~lists].tolist()[0]
            raise UserError(f"--label_column {data.label_column}: labels must be all lists, but one is {single!r}")
        return labels.map(_names_in)
    if not labels.map(lambda label: isinstance(label, str)).all():
        kind = "lists, so leave it out" if lists.any() else "numbers, and only text has a separator"
        raise UserError(f"--label_separator {data.label_separator!r}: column {data.label_column} has {kind}")
    given = [label for label in labels if label.strip()]
    if len(written := [label for label in given if is_written_list(label)]) > len(given) / 2:
        raise UserError(
            f"--label_separator {data.label_separator!r}: column {data.label_column} has lists written as text, such as"
            f" {written[0]!r}: {WRITTEN_LISTS}"
        )
    parts = labels.str.split(data.label_separator, regex=False)
    return parts.map(lambda words: [word.strip() for word in words if word.strip()])


def _names_in(label: Any) -> list[Any]:
    """The labels in a list, without empty ones."""
    names = (name.strip() if isinstance(name, str) else name for name in np.asarray(label, dtype=object).tolist())
    return [name for name in names if not (isinstance(name, str) and name == "")]  # a list in it is refused later


def _are_zeros_and_ones(lists: pd.Series) -> bool:
    """Whether the lists have a 0 or 1 for each label: all have the same length, of two or more."""
    lengths = set(lists.map(len))
    return len(lengths) == 1 and (count := lengths.pop()) > 1 and all(has_mark_for_each(row, count) for row in lists)


def has_mark_for_each(row: Sequence[Any], count: int) -> bool:
    """Whether a list has a 0 or 1 for each of ``count`` labels."""
    return len(row) == count and all(value in (0, 1) for value in row)


def marks_instead_of_labels(count: int) -> str:
    """What is wrong with lists that all have a 0 or 1 for each of ``count`` labels, and what to do."""
    wanted = "but must have the labels themselves, as [0, 2] instead of [1, 0, 1]: convert them"
    return f"each list has a 0 or 1 for each of {count} labels, {wanted}"


def rarest_labels(given: np.ndarray) -> np.ndarray:
    """The number of each text's rarest label, (n, names) -> (n,); the number of names without a label."""
    none = given.sum(1) == 0
    counts = np.where(given == 1, given.sum(0), len(given) + 1)
    return np.where(none, given.shape[1], counts.argmin(1))
