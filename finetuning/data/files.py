"""Reads a table of any format, whole or in chunks: parquet, CSV, TSV, JSON and JSON lines, and gzip of these.

Training and prediction read files through this module, so a file means the same to both.
"""

import contextlib
import csv
import gzip
import io
import itertools
import json
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet

from finetuning.errors import UserError, first_line, listed

FORMATS = ("parquet", "csv", "tsv", "jsonl", "json")
PACKED = ".gz"
FIRST_ROW = "the first one is row 0"  # said with the number of a row
QUOTES = "put texts with quotes in quotes, and double the quotes inside"
# Half a character; also what Python makes of bytes of a command line that are not UTF-8.
HALF = re.compile("[\ud800-\udfff]")
UNREADABLE = (
    OSError, EOFError, TypeError, ValueError, RecursionError, zlib.error, pyarrow.ArrowException, zipfile.BadZipFile,
)  # fmt: skip


def name_and_format(path: Path) -> tuple[str, str | None]:
    """A file's name without its ending, and its format; capitals count as small letters.

    ``train.CSV.gz`` is ``("train", "csv")``. The format is ``None`` if the ending names no format of a table.
    """
    inner = Path(path.stem) if path.suffix.lower() == PACKED else path
    ending = inner.suffix.lower().removeprefix(".")
    return (inner.stem, ending) if ending in FORMATS else (inner.name, None)


def allowed_endings() -> str:
    """The endings of tables, for messages."""
    return f"{', '.join(f'.{name}' for name in FORMATS)}, also with {PACKED}"


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns every error of reading ``path`` into a ``UserError`` of one line."""
    try:
        yield
    except pd.errors.EmptyDataError:
        raise UserError(f"{path} is empty: give other data with --data_dir") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} {not_utf8(path)}, or give other data with --data_dir") from error
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): give other data with --data_dir") from error


def not_utf8(path: Path) -> str:
    """What to say of a file that is not UTF-8, and what to do."""
    with opened(path) as file:
        start = file.read(4)
    if start.startswith(b"\x1f\x8b"):
        return f"is packed: end its name in {PACKED}"
    if start == b"PK\3\4":
        return "is an Excel file or an archive: save it as CSV in UTF-8"
    return "is not UTF-8: convert it (iconv)"


def shown_columns(columns: Iterable[object]) -> str:
    """A table's columns for messages. If it has one that looks like several, the message says what separates them."""
    names = list(map(str, columns))
    odd = other_separator(names)
    shown = listed(name if name == name.strip() else repr(name) for name in names)
    return shown + (f" (one column: separate columns by commas instead of {odd!r})" if odd else "")


def other_separator(names: Sequence[str]) -> str | None:
    """The mark in the name of a table's only column that seems to separate several; ``None`` if there is none."""
    return next((mark for mark in (";", "|", "\t") if mark in names[0]), None) if len(names) == 1 else None


def opened(path: Path) -> BinaryIO:
    """The file's bytes, unpacked if its name ends in ``.gz``.

    Raises:
        OSError: the file cannot be opened. Reading raises ``EOFError`` or ``zlib.error`` if its gzip is damaged.
    """
    if path.suffix.lower() == PACKED:
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")


def read_frame(path: Path, wanted: Callable[[Collection[str]], Collection[str]] | None = None) -> pd.DataFrame:
    """All rows of a table, as ``read_chunks`` reads them.

    Args:
        wanted: from the names of all columns, those that are needed. A parquet file is read without the others, which
            may be large, or of a type that pandas does not know. If one is missing, or has a point in its name, which
            would mean a part of a column, all are read.
    """
    if wanted is None or name_and_format(path)[1] != "parquet" or path.is_dir():
        return next(read_chunks(path, None))
    with pyarrow.parquet.ParquetFile(_seekable(path)) as file:
        known = file.schema_arrow.names
        names = list(dict.fromkeys(wanted(known)))
        plain = all(name in known and "." not in name for name in names)
        return file.read(columns=names if plain else None).to_pandas(ignore_metadata=True)


def read_chunks(path: Path, rows: int | None) -> Iterator[pd.DataFrame]:
    """The rows of a table, one chunk after another, with its columns even if it has no row.

    Memory is bounded by a chunk, except for a JSON list and for parquet in gzip: these can only be read whole. CSV
    and TSV need a header, and all their values are text.

    Args:
        path: a file whose ending names a format, see ``name_and_format``. Parquet may be a folder if ``rows`` is None.
        rows: rows in a chunk, at most; ``None`` gives all rows in one chunk.

    Raises:
        UnicodeDecodeError: the file is not UTF-8.
        OSError, EOFError, TypeError, ValueError, zlib.error, pyarrow.ArrowException: the file is damaged, is no table,
            or cannot be read. These are ``UNREADABLE``.
    """
    kind = name_and_format(path)[1]
    if kind == "parquet":
        return _parquet_chunks(path, rows)
    return (
        _csv_chunks(path, rows, "\t" if kind == "tsv" else ",") if kind in ("csv", "tsv") else _json_chunks(path, rows)
    )


# --- parquet


def parquet_schema(path: Path) -> pyarrow.Schema:
    """The columns of a parquet file with their types and metadata, without reading its rows."""
    return pyarrow.parquet.read_schema(_seekable(path))


def _seekable(path: Path) -> Path | io.BytesIO:
    """Parquet is read from its end, which gzip does not allow."""
    if path.suffix.lower() != PACKED:
        return path
    with opened(path) as file:
        return io.BytesIO(file.read())


def _parquet_chunks(path: Path, rows: int | None) -> Iterator[pd.DataFrame]:
    if rows is None:
        # a column that pandas would take as an index stays a column
        yield pyarrow.parquet.read_table(_seekable(path)).to_pandas(ignore_metadata=True)
        return
    with pyarrow.parquet.ParquetFile(_seekable(path)) as file:
        if file.metadata.num_rows == 0:
            yield file.schema_arrow.empty_table().to_pandas(ignore_metadata=True)
        for batch in file.iter_batches(batch_size=rows):
            # whole numbers stay whole next to missing ones
            yield batch.to_pandas(integer_object_nulls=True, ignore_metadata=True)


# --- CSV and TSV


def _csv_chunks(path: Path, rows: int | None, separator: str) -> Iterator[pd.DataFrame]:
    # keep_default_na: "NA" is a text like any other. utf-8-sig: Excel writes a byte order mark. index_col: if a row
    # has more fields than the header, pandas would take the first field as an index.
    options: dict[str, Any] = {
        "sep": separator, "dtype": str, "encoding": "utf-8-sig", "keep_default_na": False, "index_col": False,
    }  # fmt: skip
    with opened(path) as file, _strict_csv(path, options):
        header = [name for name in pd.read_csv(file, header=None, nrows=1, **options).iloc[0] if name]
        if len(set(header)) < len(header):  # pandas would rename one
            raise ValueError(f"two columns of its header ({listed(header)}) have the same name: rename one")
    checked = False
    with opened(path) as file:
        with _strict_csv(path, options):
            reader = pd.read_csv(file, iterator=True, **options)
        while True:
            try:
                with _strict_csv(path, options):
                    chunk = reader.read(rows)
            except StopIteration:
                return
            if not checked and (_has_line_break(chunk) or _may_be_short(chunk)):
                _check_rows(path, separator)
                checked = True
            if separator == "\t":
                _check_tabs(chunk)
            yield chunk


@contextlib.contextmanager
def _strict_csv(path: Path, options: dict[str, Any]) -> Iterator[None]:
    """Turns what pandas says about a wrong row into a ``ValueError`` that says what to do."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            yield
    except (pd.errors.ParserWarning, pd.errors.ParserError):
        columns: list[str] = []
        with opened(path) as file, contextlib.suppress(csv.Error):
            text = io.TextIOWrapper(file, encoding=options["encoding"], newline="")
            columns = next(csv.reader(text, delimiter=options["sep"]), [])  # pandas would read on, to the same error
        if odd := other_separator(columns):
            separated = f"separate columns by commas instead of {odd!r}"
            raise ValueError(f"its header has one column, {listed(columns)}: {separated}") from None
        kept = "tabs" if options["sep"] == "\t" else "commas"
        raise ValueError(
            f"a row has more fields than the header ({shown_columns(columns)}), or an open quote: put texts with"
            f" {kept} in quotes"
        ) from None


def _has_line_break(table: pd.DataFrame) -> bool:
    """Whether a cell has one: rows that an open quote has swallowed are in such a cell."""
    return any("\n" in cell or "\r" in cell for name in table.columns for cell in table[name] if isinstance(cell, str))


def _may_be_short(table: pd.DataFrame) -> bool:
    """Whether a row may have a single field of several: pandas fills it up with empty cells."""
    rest = [table[name].fillna("") == "" for name in table.columns[1:]]
    return bool(rest) and bool(np.logical_and.reduce(rest).any())


def _check_rows(path: Path, separator: str) -> None:
    """Refuses what pandas would take for other texts, also in later rows.

    With an open quote, it would take the lines up to the next one for one text. A row with one of several fields is
    mostly the beginning of a text with a line break, of which the rest would be another text. Spreadsheets leave out
    empty fields at the end, so other short rows are taken. A quote inside a text that ends in its own line is left to
    pandas, which drops it.
    """
    csv.field_size_limit(2**31 - 1)  # a text may be longer than the 128 KiB that are allowed otherwise
    with opened(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter=separator, strict=True)
        row: list[str] | None = []
        fields = 0  # of the header
        while row is not None:
            if len(row) == 1 < fields and row[0].strip():  # pandas skips blank lines
                raise ValueError(
                    f"line {reader.line_num} has 1 field, but the header {fields}: put texts with line breaks in"
                    " quotes, and fill rows up"
                )
            fields = fields or len(row)
            first = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error:
                if reader.line_num > first:
                    raise ValueError(f"a quote in line {first} that is open or not doubled: {QUOTES}") from None


def _check_tabs(table: pd.DataFrame) -> None:
    """Refuses a text of a TSV file with a tab and a line break: most often a quote that another text closes.

    It would swallow the rows between.
    """
    for name in table.columns:
        cells = table[name].astype(str).str
        swallowed = cells.contains("\t", regex=False) & cells.contains("\n", regex=False)
        if swallowed.any():
            begin = table[name][swallowed].iloc[0]
            why = f"a tab and a line break in one text of column {name}, as after an open quote, at {listed([begin])}"
            raise ValueError(f"{why}: {QUOTES}, or save the file as CSV")


# --- JSON and JSON lines


def _json_chunks(path: Path, rows: int | None) -> Iterator[pd.DataFrame]:
    """Objects in a list, or one in each line: both occur under both endings."""
    with opened(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="\n") as text:
        start = text.read(1)
        while start.isspace():
            start = text.read(1)
        text.seek(0)
        if start == "[":
            objects: Iterator[tuple[int, Any]] = enumerate(json.load(text), 1)
        else:
            lines = ((number, line) for number, line in enumerate(text, 1) if line.strip())
            objects = ((number, _parsed(number, line)) for number, line in lines)
        kept = (_checked_object("element" if start == "[" else "line", *pair) for pair in objects)
        kind = None if rows is None else object  # chunks keep values as they are: a whole number next to a missing one
        columns: dict[str, None] = {}  # of all objects so far: a chunk may lack one of them

        def is_broken(value: Any) -> bool:
            return HALF.search(json.dumps(value, ensure_ascii=False)) is not None

        def table(chunk: list[dict[str, Any]]) -> pd.DataFrame:
            columns.update(dict.fromkeys(itertools.chain.from_iterable(chunk)))
            try:
                frame = pd.DataFrame(chunk, columns=list(columns), dtype=kind)
                # pandas looks into columns of strings alone
                mixed = [frame[name] for name in frame if kind is None and frame[name].dtype == object]
                if not any(is_broken(value) for column in mixed for value in column):
                    return frame
            except UnicodeEncodeError:
                pass
            broken = next(i for i, value in enumerate(chunk, 1) if is_broken(value))
            raise ValueError(f"object {broken} has half a character (a lone surrogate): remove it")

        yield table(list(itertools.islice(kept, rows)))
        while chunk := list(itertools.islice(kept, rows)):
            yield table(chunk)


def _parsed(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number} is not JSON: {error.msg} in column {error.colno}") from None


def _checked_object(where: str, number: int, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f'{where} {number} must be an object like {{"text": "...", "label": "..."}}')
    return value
