"""Files with a table: parquet, CSV, JSON and JSON lines, read and checked."""

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
    """The one file of each split in ``folder``; a single file instead of a folder is train."""
    if folder.is_file():
        if folder.suffix not in SUFFIXES:
            raise UserError(f"--data_dir {folder}: a single file must end in one of {', '.join(SUFFIXES)}")
        return {"train": folder}
    found = {split: [p for suffix in SUFFIXES if (p := folder / f"{split}{suffix}").exists()] for split in SPLITS}
    if not found["train"]:
        wanted = ", ".join(f"train{suffix}" for suffix in SUFFIXES)
        raise UserError(f"--data_dir {folder}: expected one of {wanted} (or, for imdb, an aclImdb tree), found none")
    for split, paths in found.items():
        if len(paths) > 1:
            raise UserError(f"--data_dir {folder}: {' and '.join(p.name for p in paths)} are both {split}, keep one")
    return {split: paths[0] for split, paths in found.items() if paths}


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Whatever goes wrong in reading ``path`` becomes one line."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.start}): convert it, or name other data by --data_dir"
        ) from error
    except (OSError, TypeError, ValueError, pyarrow.ArrowException, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): name other data by --data_dir") from error


def read_csv(path: Path, *columns: str) -> pd.DataFrame:
    """A CSV file with a header; blank lines are skipped, and ``columns``, those that are there, are read as text.

    Raises:
        ValueError: it is not UTF-8, or no table, or a text with a comma does not stand in quotes.
        OSError: it cannot be read.
    """
    # "NA" is a text like any other; utf-8-sig drops the mark that Excel writes; by default, the first of more fields
    # than names would be an index, and the text the second
    options: dict[str, Any] = {"encoding": "utf-8-sig", "keep_default_na": False, "index_col": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            return pd.read_csv(path, dtype=dict.fromkeys(columns, str), **options)
        except (pd.errors.ParserWarning, pd.errors.ParserError):
            header = listed(pd.read_csv(path, nrows=0, **options).columns)
            raise ValueError(
                f"a row has more fields than the header ({header}), or an open quote; texts with commas go in quotes"
            ) from None


def read_table(path: Path, data: DataSettings) -> pd.DataFrame:
    """A parquet, CSV or JSON file, checked, as columns text and label."""
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
    """Columns text and label of ``table``; every text and label is there."""
    for flag, column in (("text_column", data.text_column), ("label_column", data.label_column)):
        if column not in table.columns:
            raise UserError(f"--{flag} {column}: {path} has no such column; its columns are: {listed(table.columns)}")
    if table.empty:
        raise UserError(f"--data_dir: {path} holds no rows")
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
            others = f", nor in {int(bad.sum()) - 1} later one(s)" if bad.sum() > 1 else ""
            raise UserError(
                f"{flag}: {path} has no {what} in row {int(bad.argmax())}, the header not"
                f" counted and the first being 0{others}: remove such rows"
            )
    return pd.DataFrame({"text": text.astype(str).array, "label": label.array})


def class_names(path: Path, label_column: str) -> list[str] | None:
    """The label names that the datasets library wrote into a parquet file, if it did."""
    if path.suffix != ".parquet" or path.is_dir():  # Spark writes folders
        return None
    metadata = pyarrow.parquet.read_schema(path).metadata or {}
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return features.get(label_column, {}).get("names")
