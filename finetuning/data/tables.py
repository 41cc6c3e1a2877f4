"""Reads and checks tables: parquet, CSV, JSON and JSON lines."""

import contextlib
import json
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow
import pyarrow.parquet

from finetuning.data.texts import SPLITS
from finetuning.errors import UserError, first_line, listed
from finetuning.settings import DataSettings

SUFFIXES = (".parquet", ".csv", ".jsonl", ".json")


def split_files(folder: Path) -> dict[str, Path]:
    """The file of each split in ``folder``. If ``folder`` is a file, it is the train split.

    Raises:
        UserError: there is no train file, two files for one split, or a file of another type.
    """
    if folder.is_file():
        if folder.suffix not in SUFFIXES:
            raise UserError(f"--data_dir {folder}: a single file must end in one of {', '.join(SUFFIXES)}")
        return {"train": folder}
    found = {split: [p for suffix in SUFFIXES if (p := folder / f"{split}{suffix}").exists()] for split in SPLITS}
    if not found["train"]:
        wanted = ", ".join(f"train{suffix}" for suffix in SUFFIXES)
        raise UserError(f"--data_dir {folder}: must contain one of {wanted} (or, for imdb, an aclImdb folder)")
    for split, paths in found.items():
        if len(paths) > 1:
            raise UserError(f"--data_dir {folder}: {' and '.join(p.name for p in paths)} are both {split}: keep one")
    return {split: paths[0] for split, paths in found.items() if paths}


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns every error of reading ``path`` into a ``UserError`` of one line."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.start}): convert it, or give other data with --data_dir"
        ) from error
    except (OSError, TypeError, ValueError, pyarrow.ArrowException, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): give other data with --data_dir") from error


def read_csv(path: Path, *columns: str) -> pd.DataFrame:
    """Reads a CSV file with a header, without its blank lines.

    Args:
        path: the file.
        columns: columns to read as text; they may be missing.

    Raises:
        ValueError: the file is not UTF-8, is no table, or has a text with a comma but without quotes.
        OSError: the file cannot be read.
    """
    # keep_default_na: "NA" is a text like any other. utf-8-sig: Excel writes a byte order mark. index_col: if a row
    # has more fields than the header, pandas would take the first field as an index.
    options: dict[str, Any] = {"encoding": "utf-8-sig", "keep_default_na": False, "index_col": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            return pd.read_csv(path, dtype=dict.fromkeys(columns, str), **options)
        except (pd.errors.ParserWarning, pd.errors.ParserError):
            header = listed(pd.read_csv(path, nrows=0, **options).columns)
            raise ValueError(
                f"a row has more fields than the header ({header}), or an open quote: put texts with commas in quotes"
            ) from None


def read_table(path: Path, data: DataSettings) -> pd.DataFrame:
    """Reads a parquet, CSV or JSON file into the columns text and label.

    Raises:
        UserError: like ``checked``, or the file cannot be read.
    """
    with readable(path):
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        elif path.suffix == ".csv":
            table = read_csv(path, data.text_column, data.label_column)
        else:
            content = path.read_text("utf-8-sig")
            lines = [line for line in content.split("\n") if line.strip()]
            table = pd.DataFrame(json.loads(content) if content.lstrip()[:1] == "[" else [*map(json.loads, lines)])
    return checked(table, path, data)


def checked(table: pd.DataFrame, path: Path, data: DataSettings) -> pd.DataFrame:
    """The columns text and label of ``table``, without any other column.

    Raises:
        UserError: a column is missing, the table is empty, or a row has no text or no label.
    """
    for flag, column in (("text_column", data.text_column), ("label_column", data.label_column)):
        if column not in table.columns:
            raise UserError(f"--{flag} {column}: must be a column of {path}, which has: {listed(table.columns)}")
    if table.empty:
        raise UserError(f"--data_dir: {path} has no rows")
    text, label = table[data.text_column], table[data.label_column]
    for what, flag, bad in (
        (
            "text",
            f"--text_column {data.text_column}",
            ~text.map(lambda value: isinstance(value, str) and value.strip() != "").to_numpy(bool),
        ),
        (
            "label",
            f"--label_column {data.label_column}",
            (label.isna() | (label.astype(str).str.strip() == "")).to_numpy(bool),
        ),
    ):
        if bad.any():
            rows = f"{bad.sum()} rows, first in row" if bad.sum() > 1 else "row"
            raise UserError(
                f"{flag}: {path} has no {what} in {rows} {bad.argmax()} (counted from 0 after the header): remove"
                f" such rows"
            )
    return pd.DataFrame({"text": text.astype(str).array, "label": label.array})


def class_names(path: Path, label_column: str) -> list[str] | None:
    """The label names that the datasets library stored in a parquet file; ``None`` if there are none."""
    if path.suffix != ".parquet" or path.is_dir():  # Spark writes a parquet table as a folder
        return None
    metadata = pyarrow.parquet.read_schema(path).metadata or {}
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return features.get(label_column, {}).get("names")
