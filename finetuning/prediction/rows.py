"""The rows to label, from the command line or a file: in chunks, each row checked, as often as they are needed.

The first reading counts the rows and refuses what cannot be labelled, before the model is loaded. The second one
labels them. Memory is bounded by a chunk, but for a JSON list and parquet in gzip. Nothing here imports torch.
"""

import io
import itertools
import os
import reprlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa

from finetuning.data.columns import no_text, text_columns, texts_in
from finetuning.data.files import (
    FIRST_ROW,
    HALF,
    UNREADABLE,
    name_and_format,
    not_utf8,
    opened,
    parquet_schema,
    read_chunks,
)
from finetuning.errors import UserError, as_user_error, first_line, listed

STANDARD_INPUT = Path("-")
CHUNK_ROWS = 10_000  # enough that batches of like lengths have little padding
TEXT, PAIR = "text", "text_pair"
UNHOLDABLE = (pa.ArrowException, OverflowError, UnicodeEncodeError)  # what parquet says of values that it cannot hold
T = TypeVar("T")


@dataclass(frozen=True)
class Rows:
    """Some rows."""

    table: pd.DataFrame  # the columns of the input
    texts: dict[str, list[Any]]  # ``TEXT`` and, for pairs, ``PAIR``: a value for each row
    bad: np.ndarray  # (rows,) bool: a row without a text


Answered = tuple[Rows, list[list[Any]]]  # rows, and the values of each column of their answers


@dataclass(frozen=True)
class Source:
    """Where rows come from. It can be read several times."""

    flag: str  # the flag that gave it, for messages
    tables: Callable[[], Iterator[pd.DataFrame]]  # starts to read it, in chunks
    columns: dict[str, str]  # for ``TEXT`` and ``PAIR``, the column with the texts, or several, as in ``--text_column``
    schema: pa.Schema | None = None  # the types of a parquet file's columns
    header: bool = False  # whether it is a table

    @property
    def where(self) -> str:
        """The file, for messages about its columns."""
        return self.flag.removeprefix("--file ")

    def rows(self, skip_bad: bool = False) -> Iterator[Rows]:
        """The rows, in chunks.

        Raises:
            UserError: a column is missing, the file cannot be read, or a row has no text and ``skip_bad`` is not set.
        """
        first = 1
        for table in self.tables():
            found = {
                name: texts_in(table, wanted, self.where, f"{name}_column").tolist()
                for name, wanted in self.columns.items()
            }
            bad = np.zeros(len(table), dtype=bool)
            for name, texts in found.items():
                faults = [_fault(text) for text in texts]
                for number, fault in enumerate(faults, first):
                    if fault is not None and not skip_bad:
                        flag = "--text_pair" if (self.flag, name) == ("--text", PAIR) else self.flag
                        place = f"row {number - 1} ({FIRST_ROW})" if self.header else f"text {number}"
                        parts = table[text_columns(self.columns[name], table.columns)].iloc[[number - first]]
                        joined = no_text(parts) if parts.shape[1] > 1 else ""
                        what = f"has no text: {joined}" if joined else f"is {fault}"
                        raise UserError(f"{flag}: {place} {what}, or give --skip_bad_rows")
                bad |= np.array([fault is not None for fault in faults], dtype=bool)
            yield Rows(table, found, bad)
            first += len(table)


def _fault(text: object) -> str | None:
    """Why a text cannot be labelled, and what to do; ``None`` if it can."""
    if not isinstance(text, str):  # JSON and parquet hold other values as well
        return f"{reprlib.repr(text)}, no text: remove or correct it"
    if not text.strip():
        return "empty: remove it"
    return "not UTF-8: convert it" if HALF.search(text) else None


def given_texts(texts: list[str], pairs: list[str] | None) -> Source:
    """The texts of ``--text`` and ``--text_pair``."""
    values = {TEXT: texts} | ({} if pairs is None else {PAIR: pairs})
    return Source("--text", lambda: iter([pd.DataFrame(values, dtype=object)]), {name: name for name in values})


@contextmanager
def file_of(path: Path, text_column: str, pair_column: str | None) -> Iterator[Source]:
    """The rows of ``--file``. Standard input and pipes, which can be read only once, are copied to a temporary file.

    Args:
        path: a table, or a file with one text per line.
        text_column: the column with the text; ignored without a table.
        pair_column: the column with the second text of each pair.

    Raises:
        UserError: the file cannot be read or copied, or pairs are wanted from a file that is no table.
    """
    flag = f"--file {path}"
    if pair_column is not None and not is_table(path):
        raise UserError(f"{flag}: the run was trained on pairs, so it must be a table, for example .csv")
    with _regular(flag, path) as file:
        if not is_table(path):
            yield Source(flag, lambda: _readable(flag, file, lambda: _line_tables(file)), {TEXT: TEXT})
            return
        schema = None
        if name_and_format(path)[1] == "parquet":
            (schema,) = _readable(flag, file, lambda: iter([parquet_schema(file).remove_metadata()]))
        columns = {TEXT: text_column} | ({} if pair_column is None else {PAIR: pair_column})
        yield Source(
            flag, lambda: _readable(flag, file, lambda: _named(flag, read_chunks(file, CHUNK_ROWS))), columns, schema,
            header=True,
        )  # fmt: skip


def is_table(file: Path) -> bool:
    """Whether the file's ending names a table; any other file has one text per line."""
    return name_and_format(file)[1] is not None


@contextmanager
def _regular(flag: str, path: Path) -> Iterator[Path]:
    """A file that can be read twice: the path, or a copy of what comes through it."""
    if not _is_read_once(path):
        yield path
        return
    if path == STANDARD_INPUT and sys.stdin is None:
        raise UserError(f"{flag}: standard input is closed: give a file")
    with ExitStack() as stack:
        with as_user_error(f"{flag}: cannot be copied to a temporary file", OSError):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            copy = Path(folder, "copy" + "".join(path.suffixes))
            with sys.stdin.buffer if path == STANDARD_INPUT else path.open("rb") as stream, copy.open("wb") as file:
                shutil.copyfileobj(stream, file)
        yield copy


def _is_read_once(path: Path) -> bool:
    """Whether the path is standard input, a pipe or a device."""
    there = os.access(path, os.F_OK)  # if it is not, reading it says why
    return path == STANDARD_INPUT or (there and not path.is_file() and not path.is_dir())


def _readable(flag: str, file: Path, begin: Callable[[], Iterator[T]]) -> Iterator[T]:
    """The same chunks. Every error of reading becomes a ``UserError`` of one line."""
    try:
        yield from begin()
    except UnicodeDecodeError:
        raise UserError(f"{flag}: {not_utf8(file)}") from None
    except pd.errors.EmptyDataError:
        raise UserError(f"{flag}: is empty") from None
    except UNREADABLE as error:
        raise UserError(f"{flag}: cannot be read: {first_line(error)}") from None


def _named(flag: str, tables: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    """The same tables, whose columns have different names."""
    for table in tables:
        if not table.columns.is_unique:
            raise UserError(f"{flag}: two of its columns have the same name: rename one")
        yield table


def _line_tables(path: Path) -> Iterator[pd.DataFrame]:
    """One text per line, without blank lines."""
    with opened(path) as source, io.TextIOWrapper(source, encoding="utf-8-sig") as file:  # Excel writes a mark
        lines = (line.rstrip("\n") for line in file if line.strip())
        while chunk := list(itertools.islice(lines, CHUNK_ROWS)):
            yield pd.DataFrame({TEXT: chunk}, dtype=object)


# --- the first reading


@dataclass(frozen=True)
class Survey:
    """What all rows together are."""

    rows: int
    bad: int  # rows without a text
    columns: list[str]  # of all chunks: objects in JSON need not have the same
    schema: pa.Schema | None  # their types, if they were asked for


def survey(source: Source, skip_bad: bool, typed: bool, done: Callable[[int], object]) -> Survey:
    """Reads all rows once and checks them.

    Args:
        skip_bad: whether rows without a text are allowed.
        typed: whether to find the type of each column, for parquet.
        done: is told how many rows were read.

    Raises:
        UserError: a row or the file is refused, there is no row, or a column mixes types.
    """
    count = bad = 0
    columns: dict[str, None] = {}
    schema = source.schema
    for rows in source.rows(skip_bad):
        count, bad = count + len(rows.bad), bad + int(rows.bad.sum())
        columns |= dict.fromkeys(rows.table.columns)
        if typed and source.schema is None:
            schema = _widened(schema, rows.table, source.flag)
        done(len(rows.bad))
    if not count:
        raise UserError(f"{source.flag}: contains no text")
    if source.header and bad == count:  # most often another column is meant
        given = " and ".join(f"--{name}_column {column}" for name, column in source.columns.items())
        read = {part for column in source.columns.values() for part in text_columns(column, columns)}
        others = listed(name for name in columns if name not in read)
        raise UserError(f"{source.flag}: no row has a text in {given}: other columns are {others}")
    return Survey(count, bad, list(columns), schema if typed else None)


def _widened(schema: pa.Schema | None, table: pd.DataFrame, flag: str) -> pa.Schema:
    """The types that hold all chunks so far and this one."""
    try:
        found = pa.Schema.from_pandas(table, preserve_index=False).remove_metadata()
        return found if schema is None else pa.unify_schemas([schema, found], promote_options="permissive")
    except UNHOLDABLE as error:
        raise UserError(
            f"{flag}: parquet cannot hold a column with such values: {first_line(error)}: use .jsonl for --output"
        ) from None
