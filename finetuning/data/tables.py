"""Tables of texts and labels: the file of each split, and the checks of its rows."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from finetuning.data.columns import text_columns, texts_in
from finetuning.data.files import (
    FIRST_ROW,
    allowed_endings,
    name_and_format,
    parquet_schema,
    read_frame,
    readable,
    shown_columns,
)  # fmt: skip
from finetuning.data.labels import separator_hint
from finetuning.datasets import SPLITS
from finetuning.errors import UserError
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
        named = ((path, *name_and_format(path)) for path in sorted(folder.iterdir()) if path.is_file())
        tables = [path.name for path, name, kind in named if kind is not None and name.lower() not in SPLITS]
        single = f", or give the file itself, --data_dir {folder / tables[0]}" if len(tables) == 1 else ""
        raise UserError(f"--data_dir {folder}: must contain {wanted}{single}")
    for split, paths in found.items():
        if len(paths) > 1:
            raise UserError(f"--data_dir {folder}: {' and '.join(p.name for p in paths)} are both {split}: keep one")
    return {split: paths[0] for split, paths in found.items() if paths}


def read_table(path: Path, data: DataSettings) -> pd.DataFrame:
    """Reads a file of any format into the columns text and label.

    Raises:
        UserError: like ``checked``, or the file cannot be read.
    """
    with readable(path):
        table = read_frame(path)
    return checked(table, path, data)


def checked(table: pd.DataFrame, path: Path | str, data: DataSettings) -> pd.DataFrame:
    """The columns text, label and, for pairs of texts, pair of ``table``, without any other column.

    Raises:
        UserError: a column is missing, the table is empty, or a row has no text or no label.
    """
    texts = {"text": texts_in(table, data.text_column, path)}
    if data.text_pair_column is not None:
        texts["pair"] = texts_in(table, data.text_pair_column, path, "text_pair_column")
        first, second = (text_columns(name, table.columns) for name in (data.text_column, data.text_pair_column))
        if twice := [name for name in second if name in first]:
            raise UserError(
                f"--text_pair_column {data.text_pair_column}: column {twice[0]} must not be in --text_column"
                f" {data.text_column} as well"
            )
    if data.label_column not in table.columns:
        raise UserError(
            f"--label_column {data.label_column}: must be a column of {path}, which has: {shown_columns(table.columns)}"
        )
    if table.empty:
        raise UserError(f"{path} has no rows: give other data with --data_dir or --dataset")
    label = table[data.label_column]
    if isinstance(label.dtype, pd.CategoricalDtype):  # the values themselves
        label = label.astype(label.cat.categories.dtype if label.notna().all() else object)
    if data.label_separator is not None:  # a text may have no label
        label = label.where(label.notna(), "")
    flags = {"text": f"--text_column {data.text_column}", "pair": f"--text_pair_column {data.text_pair_column}"}
    for name, text in texts.items():
        empty = ~text.map(lambda value: isinstance(value, str) and value.strip() != "").to_numpy(bool)
        nested = empty.any() and isinstance(text.iloc[empty.argmax()], dict | list | np.ndarray)
        _refuse_rows(
            empty, "text", flags[name], path, "it holds lists or objects: write the text itself" if nested else ""
        )
    empty = label.isna() | ((label.astype(str).str.strip() == "") & (data.label_separator is None))
    lists = label.map(lambda value: isinstance(value, list | np.ndarray)).any()
    hint = "write [] for a text without a label, or remove such rows" if lists else ""
    if empty.any() and not lists:
        hint = separator_hint(sorted(set(label[~empty].astype(str))))
    _refuse_rows(empty.to_numpy(bool), "label", f"--label_column {data.label_column}", path, hint)
    return pd.DataFrame({name: text.astype(str).array for name, text in texts.items()} | {"label": label.array})


def _refuse_rows(bad: np.ndarray, what: str, flag: str, path: Path | str, hint: str) -> None:
    """Refuses rows that lack something; ``bad`` is (rows,) bool, ``hint`` what to do instead of removing them."""
    if bad.any():
        rows = f"{bad.sum()} rows, first in row" if bad.sum() > 1 else "row"
        raise UserError(
            f"{flag}: {path} has no {what} in {rows} {bad.argmax()} ({FIRST_ROW}): {hint or 'remove such rows'}"
        )


def class_names(path: Path, label_column: str) -> list[str] | None:
    """The label names that the datasets library stored in a parquet file; ``None`` if there are none."""
    if name_and_format(path)[1] != "parquet" or path.is_dir():  # Spark writes a parquet table as a folder
        return None
    metadata = parquet_schema(path).metadata or {}
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    feature = features.get(label_column, {})
    if isinstance(feature, list):  # how older versions of the library write a list of labels
        feature = feature[0]
    names: list[str] | None = feature.get("feature", feature).get("names")
    return names
