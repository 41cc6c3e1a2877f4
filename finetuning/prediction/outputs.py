"""Writes answers: CSV on standard output, or a file in any format that the suite reads, complete or not at all."""

import csv
import gzip
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TextIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from finetuning.data.files import PACKED, allowed_endings, name_and_format
from finetuning.errors import OutputFailed, UserError, first_line, forget_output
from finetuning.prediction.answers import AnswerColumns, names_beside
from finetuning.prediction.rows import Rows, Survey
from finetuning.storage import write_new

DIGITS, SHOWN_DIGITS = 6, 4  # of probabilities: in files of text, and on standard output
Answered = Iterable[tuple[Rows, list[list[Any]]]]  # rows, and the values of each column of their answers
Columns = Mapping[str, list[Any]]


def check_output(path: Path) -> None:
    """Checks that a file can be written. Writes nothing.

    Raises:
        UserError: it exists, its ending names no format, or its folder does not exist or cannot be written.
    """
    flag = f"--output {path}"
    if name_and_format(path)[1] is None:
        raise UserError(f"{flag}: must end in one of {allowed_endings()}")
    if os.path.lexists(path):
        raise UserError(f"{flag}: already exists: give a new file, or remove it")
    if not path.parent.is_dir():
        raise UserError(f"{flag}: the folder {path.parent} does not exist: make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{flag}: you may not write to the folder {path.parent}")


def is_parquet(path: Path) -> bool:
    """Whether a file of this name is parquet, whose columns have types."""
    return name_and_format(path)[1] == "parquet"


def write_answers(path: Path, answered: Answered, surveyed: Survey, answers: AnswerColumns) -> None:
    """Writes the input's columns and ours. The file appears when it is complete.

    Raises:
        UserError: the input already has our columns, its values do not fit the format, or as in ``answered``.
        OutputFailed: the file cannot be written.
    """
    ours = dict(zip(names_beside(answers.columns, surveyed.columns), answers.columns.values(), strict=True))
    schema = None if surveyed.schema is None else _schema(surveyed.schema, ours)

    def write(temporary: Path) -> None:
        with _writer_to(temporary, path, schema) as writer:
            for rows, values in answered:
                kept = rows.table.reindex(columns=surveyed.columns)
                writer.write(kept, dict(zip(ours, values, strict=True)))

    try:
        write_new(path, write)
    except OSError as error:
        raise OutputFailed(f"--output {path}: cannot be written: {first_line(error)}") from None


def print_answers(answered: Answered, answers: AnswerColumns, before: Callable[[], object]) -> None:
    """Prints CSV: each text and its answer. A reader that has seen enough may close its end.

    Args:
        answered: the rows and their answers.
        answers: what they say.
        before: is called before rows are printed.

    Raises:
        UserError: as in ``answered``.
        OutputFailed: standard output cannot be written.
    """
    writer = CsvWriter(sys.stdout, ",", SHOWN_DIGITS)
    try:
        for rows, values in answered:
            before()
            writer.write(pd.DataFrame(rows.texts, dtype=object), dict(zip(answers.columns, values, strict=True)))
            sys.stdout.flush()
    except OSError as error:
        forget_output()
        if not isinstance(error, BrokenPipeError):
            raise OutputFailed(f"standard output cannot be written: {first_line(error)}") from None


# ---------------------------------------------------------------------------------------------------------------------
# the formats


class Writer(Protocol):
    """Writes rows in one format."""

    def write(self, kept: pd.DataFrame, ours: Columns) -> None:
        """Writes rows: the columns of the input, and ours."""


class CsvWriter:
    """CSV or TSV. A list of labels is joined with commas, other lists and objects are JSON, what is missing is empty.

    Args:
        stream: where to write.
        separator: a comma or a tab.
        digits: of our numbers.
    """

    def __init__(self, stream: TextIO, separator: str, digits: int) -> None:
        self.writer, self.digits, self.begun = csv.writer(stream, delimiter=separator), digits, False

    def write(self, kept: pd.DataFrame, ours: Columns) -> None:
        if not self.begun:
            self.writer.writerow([*kept.columns, *ours])
            self.begun = True
        formatted = ([self._answer(value) for value in column] for column in ours.values())
        for row in zip(*_plain(kept, _cell), *formatted, strict=True):
            self.writer.writerow(row)

    def _answer(self, value: Any) -> Any:
        if isinstance(value, float):
            return f"{value:.{self.digits}f}"
        return ",".join(value) if isinstance(value, list) else value


class JsonWriter:
    """JSON lines, or a list of objects.

    Args:
        stream: where to write.
        lines: whether each line is an object.
    """

    def __init__(self, stream: TextIO, lines: bool) -> None:
        self.stream, self.begun = stream, False
        self.before, self.between, self.after = ("", "\n", "\n") if lines else ("[\n", ",\n", "\n]\n")

    def write(self, kept: pd.DataFrame, ours: Columns) -> None:
        rounded = ([round(v, DIGITS) if isinstance(v, float) else v for v in column] for column in ours.values())
        names = [*map(str, kept.columns), *ours]
        for row in zip(*_plain(kept), *rounded, strict=True):
            text = json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False, default=_json_value)
            self.stream.write((self.between if self.begun else self.before) + text)
            self.begun = True

    def end(self) -> None:
        """Writes what comes after the last row."""
        self.stream.write(self.after)


class ParquetWriter:
    """Parquet; the types of the input's columns stay."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self.writer = writer

    def write(self, kept: pd.DataFrame, ours: Columns) -> None:
        schema = self.writer.schema
        known = pa.schema([schema.field(i) for i in range(len(kept.columns))])
        table = pa.Table.from_pandas(kept, known, preserve_index=False)
        for i, values in enumerate(ours.values(), len(kept.columns)):
            table = table.append_column(schema.field(i), pa.array(values, schema.field(i).type))
        self.writer.write_table(table)


def _schema(kept: pa.Schema, ours: Mapping[str, type]) -> pa.Schema:
    """The types of all columns: those of the input, then ours."""
    types = {str: pa.string(), list: pa.list_(pa.string()), float: pa.float32()}
    return pa.schema([*kept, *(pa.field(name, types[kind]) for name, kind in ours.items())])


@contextmanager
def _writer_to(temporary: Path, path: Path, schema: pa.Schema | None) -> Iterator[Writer]:
    """A writer to ``temporary`` in the format of ``path``."""
    kind = name_and_format(path)[1]
    with temporary.open("wb") as raw, _packed(raw, path) as stream:
        if kind == "parquet":
            try:
                with pq.ParquetWriter(stream, schema, compression="zstd") as parquet:
                    yield ParquetWriter(parquet)
            except (pa.ArrowException, OverflowError) as error:
                raise UserError(
                    f"--output {path}: parquet cannot hold the input's values ({first_line(error)}): use .jsonl"
                ) from None
            return
        with io.TextIOWrapper(stream, encoding="utf-8", newline="") as text:
            if kind in ("csv", "tsv"):
                yield CsvWriter(text, "\t" if kind == "tsv" else ",", DIGITS)
            else:
                writer = JsonWriter(text, lines=kind == "jsonl")
                yield writer
                writer.end()


@contextmanager
def _packed(raw: BinaryIO, path: Path) -> Iterator[BinaryIO]:
    """The same stream, or one that packs what is written to it. The time is left out: equal content, equal file."""
    if path.suffix.lower() != PACKED:
        yield raw
        return
    with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as stream:
        yield stream  # type: ignore[misc]


# ---------------------------------------------------------------------------------------------------------------------
# values


def _plain(table: pd.DataFrame, convert: Any = None) -> list[list[Any]]:
    """The values of each column as Python's own objects; what is missing is ``None``."""
    columns = [table.iloc[:, i] for i in range(table.shape[1])]
    values = [column.astype(object).where(column.notna(), None).tolist() for column in columns]
    return values if convert is None else [[convert(value) for value in column] for column in values]


def _cell(value: Any) -> Any:
    """A value for CSV."""
    if isinstance(value, list | tuple | dict | np.ndarray):
        return json.dumps(value, ensure_ascii=False, default=_json_value)
    return value


def _json_value(value: Any) -> Any:
    """What JSON does not know, as the nearest that it does."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
