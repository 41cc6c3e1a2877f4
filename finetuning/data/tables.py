"""Tables of texts and labels: the file of each split, and the checks of its rows."""

import json
from collections.abc import Collection, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from finetuning.data.columns import no_text, text_columns, texts_in
from finetuning.data.files import (
    FIRST_ROW,
    allowed_endings,
    name_and_format,
    parquet_schema,
    read_frame,
    readable,
    shown_columns,
)  # fmt: skip
from finetuning.data.labels import as_number, separator_hint
from finetuning.datasets import SPLITS
from finetuning.errors import UserError, listed
from finetuning.settings import DataSettings


def split_files(folder: Path) -> dict[str, Path]:
    """The file of each split in ``folder``. If ``folder`` is a file, it is the train split.

    Raises:
        UserError: there is no train file, two files for one split, or a file of another type.
    """
    if folder.is_file():
        if name_and_format(folder)[1] is None:
            endings = allowed_endings()
            raise UserError(f"--data_dir {folder}: a single file must end in one of {endings}: save it as CSV in UTF-8")
        return {"train": folder}
    found: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for path in sorted(folder.iterdir()):
        name, kind = name_and_format(path)
        if kind is not None and name.lower() in found:
            found[name.lower()].append(path)
    if not found["train"]:
        wanted = f"train with one of the endings {allowed_endings()} (or, for imdb, an aclImdb folder)"
        tables = [path.name for path in _other_tables(folder) if path.is_file()]
        first = min(tables, key=lambda name: not name.lower().startswith("train"), default="")  # not the test file
        single = f", or give a file itself, as --data_dir {folder / first}" if tables else ""
        raise UserError(f"--data_dir {folder}: must contain {wanted}{single}")
    for split, paths in found.items():
        refuse_several(folder, paths, split)
    return {split: paths[0] for split, paths in found.items() if paths}


def unused_files(folder: Path) -> list[str]:
    """A note about tables in ``folder`` that are no split, such as ``dev.csv``; empty without such tables."""
    unused = [path.name for path in _other_tables(folder)] if folder.is_dir() else []
    return [f"unused files: {listed(unused)}: the names of splits are {', '.join(SPLITS)}"] if unused else []


def refuse_several(folder: Path, paths: Sequence[Path], what: str) -> None:
    """Refuses files of which only one can be meant; ``what`` each of them is."""
    if len(paths) > 1:
        raise UserError(f"--data_dir {folder}: {' and '.join(path.name for path in paths)} are both {what}: keep one")


def _other_tables(folder: Path) -> list[Path]:
    """The tables in a folder whose names are not those of splits."""
    named = ((path, *name_and_format(path)) for path in sorted(folder.iterdir()))
    return [path for path, name, kind in named if kind is not None and name.lower() not in SPLITS]


def read_table(path: Path, data: DataSettings) -> pd.DataFrame:
    """Reads a file of any format into the columns text and label, refused as by ``checked`` or if it is unreadable."""
    given = [data.text_column, *([] if data.text_pair_column is None else [data.text_pair_column])]

    def wanted(names: Collection[str]) -> list[str]:
        others = filter(None, (data.label_column, data.group_column))
        return [*(name for one in given for name in text_columns(one, names)), *others]

    with readable(path):
        table = read_frame(path, wanted)
    return checked(table, path, data)


def checked(table: pd.DataFrame, path: Path | str, data: DataSettings) -> pd.DataFrame:
    """The columns text, label and, where the flags name them, pair and group of ``table``, without any other column.

    Raises:
        UserError: a column is missing, the table is empty, or a row has no text, no label or no group.
    """
    wanted = {"text": ("text_column", data.text_column)}
    if data.text_pair_column is not None:
        wanted["pair"] = "text_pair_column", data.text_pair_column
    columns = {name: text_columns(given, table.columns) for name, (_, given) in wanted.items()}
    needed = {data.label_column, data.group_column, *(name for names in columns.values() for name in names)}
    if twice := [name for name in table.columns[table.columns.duplicated()] if name in needed]:
        raise UserError(f"{path}: two of its columns are named {twice[0]}: rename one")
    texts = {name: texts_in(table, given, path, flag) for name, (flag, given) in wanted.items()}
    flags = {name: f"--{flag} {given}" for name, (flag, given) in wanted.items()}
    if twice := [name for name in columns.get("pair", ()) if name in columns["text"]]:
        raise UserError(f"{flags['pair']}: column {twice[0]} must not be in {flags['text']} as well")
    if data.label_column not in table.columns:
        raise UserError(
            f"--label_column {data.label_column}: must be a column of {path}, which has: {shown_columns(table.columns)}"
        )
    if table.empty:
        raise UserError(f"{path} has no rows: give other data with --data_dir or --dataset")
    label = table[data.label_column]
    if isinstance(label.dtype, pd.CategoricalDtype):  # the values themselves
        label = label.astype(label.cat.categories.dtype if label.notna().all() else object)
    if label.map(lambda value: isinstance(value, Decimal)).any():  # whole numbers of Snowflake and others
        label = pd.to_numeric(label.map(_without_zeros))  # a float has no room for the large ones
    label = shortest_numbers(label)
    if data.label_separator is not None:  # a text may have no label
        label = label.where(label.notna(), "")
    for name, text in texts.items():
        if data.label_column in columns[name]:
            raise UserError(
                f"{flags[name]}: column {data.label_column} holds the labels, which are no part of the text"
            )
        empty = ~text.map(lambda value: isinstance(value, str) and value.strip() != "").to_numpy(bool)
        hint = no_text(table[columns[name]]) if empty.any() else ""
        _refuse_rows(table.index[empty], "text", flags[name], path, hint)
    empty = label.isna() | ((label.astype(str).str.strip() == "") & (data.label_separator is None))
    lists = label.map(lambda value: isinstance(value, list | np.ndarray)).any()
    hint = "write [] for a text without a label, or remove such rows" if lists else ""
    if empty.any() and not lists:
        hint = separator_hint(sorted(set(label[~empty].astype(str))))
    _refuse_rows(table.index[empty.to_numpy(bool)], "label", f"--label_column {data.label_column}", path, hint)
    parts = {name: text.astype(str).array for name, text in texts.items()} | {"label": label.array}
    return pd.DataFrame(
        parts if data.group_column is None else parts | {"group": _groups(table, path, data.group_column)}
    )


def _groups(table: pd.DataFrame, path: Path | str, column: str) -> Any:
    """(rows,) the name of each row's group. 1 and 1.0 are one group: a file may hold numbers in either form."""
    flag = f"--group_column {column}"
    if column not in table.columns:
        raise UserError(f"{flag}: must be a column of {path}, which has: {shown_columns(table.columns)}")
    values = table[column]
    if values.dtype == object and values.map(lambda value: isinstance(value, list | dict | np.ndarray)).any():
        raise UserError(f"{flag}: column {column} of {path} holds lists or objects: must be one name or number a row")
    names = values.map(_without_zeros).astype(str) if values.dtype == object else values.astype(str)
    names = names.str.strip().str.normalize("NFC")  # one letter may be written in two ways
    missing = values.isna() | (names == "")
    _refuse_rows(table.index[missing.to_numpy(bool)], "group", flag, path, "give each such text a group of its own")
    numbers = {name: as_number(name) for name in names.unique()}
    whole = {name: str(int(n)) for name, n in numbers.items() if isinstance(n, float) and n.is_integer()}
    return names.map({name: whole.get(name, name) for name in numbers}).array


def _without_zeros(value: Any) -> Any:
    """A decimal number that is whole as other whole numbers are; another value as it is."""
    if isinstance(value, Decimal) and value.is_finite() and value == value.to_integral_value():
        return int(value)
    return value


def shortest_numbers(label: pd.Series) -> pd.Series:
    """Labels of 16 or 32 bits, such as 0.1, as people write them: as 64 bits they would be 0.10000000149011612."""
    return label.astype(str).astype(float) if label.dtype in (np.float16, np.float32) else label


def _refuse_rows(bad: pd.Index, what: str, flag: str, path: Path | str, hint: str) -> None:
    """Refuses rows that lack something, by their numbers; ``hint`` is what to do instead of removing them."""
    if len(bad):
        rows = f"{len(bad)} rows, first in row" if len(bad) > 1 else "row"
        # a str says which split of a hub set it is, and its files cannot be changed
        way = "remove such rows" if isinstance(path, Path) else "download it, change it, and give --dataset text"
        raise UserError(f"{flag}: {path} has no {what} in {rows} {bad[0]} ({FIRST_ROW}): {hint or way}")


def class_names(path: Path, label_column: str) -> list[str] | None:
    """The label names that the datasets library stored in a parquet file; ``None`` if there are none."""
    if name_and_format(path)[1] != "parquet" or path.is_dir():  # Spark writes a parquet table as a folder
        return None
    metadata = parquet_schema(path).metadata or {}
    try:
        feature = json.loads(metadata[b"huggingface"])["info"]["features"][label_column]
        if isinstance(feature, list):  # how older versions of the library write a list of labels
            feature = feature[0]
        names: list[str] | None = feature.get("feature", feature).get("names")
    except (ValueError, LookupError, TypeError, AttributeError):  # another program's, or none
        return None
    return names
