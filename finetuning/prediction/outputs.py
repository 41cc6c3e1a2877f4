"""Writes answers: CSV on standard output, or a file in any format that the suite reads, complete or not at all."""

import csv
import gzip
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from finetuning.data.files import PACKED, allowed_endings, name_and_format
from finetuning.errors import OutputFailed, UserError, first_line, forget_output
from finetuning.prediction.answers import AnswerColumns, names_beside
from finetuning.prediction.rows import UNHOLDABLE, Answered, Survey
from finetuning.storage import write_new

DIGITS, SHOWN_DIGITS = 6, 4  # of probabilities: in files of text, and on standard output
Chunks = Iterator[tuple[pd.DataFrame, Mapping[str, list[Any]]]]  # the columns of the input, and ours


def check_output(path: Path) -> None:
    """Refuses a file that exists, whose ending names no format, or whose folder cannot be written. Writes nothing."""
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


def write_answers(path: Path, answered: Iterable[Answered], surveyed: Survey, answers: AnswerColumns) -> int:
    """Writes the input's columns and ours. The file appears when it is complete. Returns the number of rows.

    Raises:
        UserError: the input already has our columns, its values do not fit the format, or as in ``answered``.
        OutputFailed: the file cannot be written.
    """
    ours = dict(zip(names_beside(answers.columns, surveyed.columns), answers.columns.values(), strict=True))
    schema = None if surveyed.schema is None else _schema(surveyed.schema, ours)
    written = 0

    def chunks() -> Chunks:
        nonlocal written
        for rows, values in answered:
            absent = [name for name in surveyed.columns if name not in rows.table]  # a chunk of JSON may lack a key
            table = rows.table.copy(deep=False)
            for name in absent:
                table[name] = None
            yield table[surveyed.columns], dict(zip(ours, values, strict=True))
            written += len(rows.bad)

    try:
        write_new(path, lambda temporary: _write_file(temporary, path, schema, chunks(), answers.spelled))
    except OSError as error:
        raise OutputFailed(f"--output {path}: cannot be written: {first_line(error)}") from None
    return written


def print_answers(answered: Iterable[Answered], answers: AnswerColumns, before: Callable[[], object]) -> None:
    """Prints CSV: each text and its answer. A reader that has seen enough may close its end.

    Args:
        before: is called before rows are printed.

    Raises:
        UserError: as in ``answered``.
        OutputFailed: standard output cannot be written.
    """

    def chunks() -> Chunks:
        for rows, values in answered:
            before()
            yield pd.DataFrame(rows.texts, dtype=object), dict(zip(answers.columns, values, strict=True))
            sys.stdout.flush()

    try:
        write_csv(chunks(), sys.stdout, ",", SHOWN_DIGITS, answers.spelled)
    except OSError as error:
        forget_output()
        if not isinstance(error, BrokenPipeError):
            raise OutputFailed(f"standard output cannot be written: {first_line(error)}") from None


# --- the formats


def write_csv(
    chunks: Chunks, stream: TextIO, separator: str, digits: int, spelled: Callable[[Sequence[str]], str]
) -> None:
    """CSV or TSV. Lists and objects of the input are JSON, what is missing is empty.

    Args:
        separator: a comma or a tab.
        digits: of our numbers.
        spelled: from ``AnswerColumns``.
    """

    def answer(value: Any) -> Any:
        if isinstance(value, float):
            return f"{value:.{digits}f}"
        return spelled(value) if isinstance(value, list) else value

    writer = csv.writer(_UnixLines(stream), delimiter=separator)
    for number, (kept, ours) in enumerate(chunks):
        if number == 0:
            writer.writerow([*kept.columns, *ours])
        formatted = ([answer(value) for value in column] for column in ours.values())
        writer.writerows(zip(*_plain(kept, _cell), *formatted, strict=True))


class _UnixLines:
    """Ends rows with a line feed, for grep and cut. ``csv`` quotes a carriage return only if rows end with one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, row: str) -> int:
        return self._stream.write(row.removesuffix("\r\n") + "\n")


def write_json(chunks: Chunks, stream: TextIO, lines: bool) -> None:
    """JSON lines, or a list of objects.

    Args:
        chunks: the rows, at least one.
        lines: whether each line is an object.
    """
    before, between, after = ("", "\n", "\n") if lines else ("\n", ",\n", "\n]\n")
    stream.write("" if lines else "[")
    for kept, ours in chunks:
        rounded = ([round(v, DIGITS) if isinstance(v, float) else v for v in column] for column in ours.values())
        names = [*map(str, kept.columns), *ours]
        for row in zip(*_plain(kept, _finite), *rounded, strict=True):
            text = json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False, default=_json_value)
            stream.write(before + text)
            before = between
    stream.write(after)


def write_parquet(chunks: Chunks, stream: BinaryIO, schema: pa.Schema) -> None:
    """Parquet; the types of the input's columns stay."""
    with pq.ParquetWriter(stream, schema, compression="zstd") as writer:
        for kept, ours in chunks:
            known = pa.schema([schema.field(i) for i in range(len(kept.columns))])
            table = pa.Table.from_pandas(kept, known, preserve_index=False)
            for i, values in enumerate(ours.values(), len(kept.columns)):
                table = table.append_column(schema.field(i), pa.array(values, schema.field(i).type))
            writer.write_table(table)


def _schema(kept: pa.Schema, ours: Mapping[str, type]) -> pa.Schema:
    """The types of all columns: those of the input, then ours."""
    types = {str: pa.string(), list: pa.list_(pa.string()), float: pa.float32()}
    return pa.schema([*kept, *(pa.field(name, types[kind]) for name, kind in ours.items())])


def _write_file(
    temporary: Path, path: Path, schema: pa.Schema | None, chunks: Chunks, spelled: Callable[[Sequence[str]], str]
) -> None:
    """Writes ``temporary`` in the format of ``path``; ``spelled`` as in ``write_csv``."""
    kind = name_and_format(path)[1]
    with temporary.open("wb") as raw, _packed(raw, path) as stream:
        if kind == "parquet":
            try:
                write_parquet(chunks, stream, schema)
            except UNHOLDABLE as error:
                raise UserError(
                    f"--output {path}: parquet cannot hold the input's values ({first_line(error)}): use .jsonl"
                ) from None
            return
        # a kept value may have half of a surrogate pair, from an emoji that was cut: it is spelled, as JSON does it
        with io.TextIOWrapper(stream, encoding="utf-8", errors="backslashreplace", newline="") as text:
            if kind in ("csv", "tsv"):
                write_csv(chunks, text, "\t" if kind == "tsv" else ",", DIGITS, spelled)
            else:
                write_json(chunks, text, lines=kind == "jsonl")


def _packed(raw: BinaryIO, path: Path) -> AbstractContextManager[Any]:
    """The same stream, or one that packs what is written to it. The time is left out: equal content, equal file."""
    if path.suffix.lower() != PACKED:
        return nullcontext(raw)
    return gzip.GzipFile("", "wb", fileobj=raw, mtime=0)


# --- values


def _plain(table: pd.DataFrame, convert: Callable[[Any], Any]) -> list[list[Any]]:
    """The values of each column as Python's own objects, converted; what is missing is ``None``."""
    columns = [table.iloc[:, i] for i in range(table.shape[1])]
    values = (column.astype(object).where(column.notna(), None).tolist() for column in columns)
    return [[convert(value) for value in column] for column in values]


def _cell(value: Any) -> Any:
    """A value for CSV."""
    if isinstance(value, list | tuple | dict | np.ndarray):
        return json.dumps(_finite(value), ensure_ascii=False, default=_json_value)
    return _json_value(value) if isinstance(value, bytes) else value


def _finite(value: Any) -> Any:
    """The same value; ``None`` for numbers and times that JSON does not have, also inside."""
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return None if value is pd.NaT or (isinstance(value, float) and not math.isfinite(value)) else value


def _json_value(value: Any) -> Any:
    """What JSON does not know, as the nearest that it does."""
    if isinstance(value, np.ndarray):  # pandas makes times of nanoseconds, of which numpy makes numbers
        return [_finite(each) for each in pd.Series(value).astype(object).tolist()]
    if isinstance(value, np.generic):
        return value.tolist()
    if isinstance(value, bytes):
        return value.decode("utf8", "backslashreplace")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
