"""The collected runs of a study: two files in ``results/STUDY``.

``runs.json`` is a list with one line for each run: its ``result``, with its place in the study, and its ``metrics``,
the text of ``metrics.csv``. The last line names the runs that are ``planned``. ``predictions.parquet`` holds what the
runs predicted for their test texts, with the columns ``run``, ``row``, ``label`` and ``predicted``. Each result has the
checksums of itself, of its metrics and of its predictions.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.errors import UserError, first_line
from finetuning.runs.files import METRICS, PREDICTIONS, SUMS, check_result, with_sums
from finetuning.runs.lock import DirectoryLock
from finetuning.storage import write_atomically, write_text

RUNS = "runs.json"
PATIENCE_SECONDS = 120.0  # to write a study of 60 runs takes one or two
COLUMNS = ("row", "label", "predicted")  # of predictions.parquet, besides run


@dataclass(frozen=True)
class Record:
    """A collected run: what ``result.json`` and ``metrics.csv`` of the run held, and its test predictions."""

    folder: Path  # of its study
    result: dict[str, Any]
    metrics: str | None
    new: Any = field(default=None, compare=False)  # predictions that are not in the file yet, a pyarrow table

    @staticmethod
    def made(folder: Path, result: dict[str, Any], metrics: str | None, predictions: Any = None) -> "Record":
        """A record with its checksums.

        Args:
            folder: of its study.
            result: with the key ``study``; it may have checksums of other files, which are replaced.
            metrics: the text of ``metrics.csv``.
            predictions: a pyarrow table with ``COLUMNS``; ``label`` and ``predicted`` are numbers, or lists of numbers.
        """
        sums = {} if metrics is None else {METRICS: _sum_of_text(metrics)}
        if predictions is not None:
            sums[PREDICTIONS] = _sum_of_table(predictions)
        return Record(folder, with_sums(result, sums), metrics, predictions)

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.result["study"]["run"])

    @property
    def path(self) -> Path:
        """Where messages say that it is: ``results/STUDY/RUN``."""
        return self.folder / self.name

    def predictions(self) -> Any:
        """The test predictions as a pyarrow table with ``COLUMNS``; ``None`` if they were not kept.

        Raises:
            UserError: they are missing or damaged.
        """
        expected = self.result[SUMS].get(PREDICTIONS)
        if expected is None or self.new is not None:
            return self.new
        import pyarrow as pa

        path = self.folder / PREDICTIONS
        try:
            if not path.is_file():
                raise ValueError("the file is missing")
            table = _read_predictions(path, _state_of(path)).get(self.name)
            if table is None:
                raise ValueError("the file lacks them")
            task = self.result.get("task") or {}
            multi_label = task.get("threshold") is not None and task.get("positive_label") is None
            if pa.types.is_list(table["label"].type) and not multi_label:  # another run of the study is multi-label
                table = pa.table({"row": table["row"]} | {name: _numbers(table[name]) for name in COLUMNS[1:]})
            if _sum_of_table(table) != expected:
                raise ValueError("they are not the ones that the run made")
        except (OSError, ValueError, LookupError, TypeError, MemoryError, pa.ArrowException) as error:
            reason = first_line(error, name_file=True)
            raise UserError(f"{path}: the predictions of {self.name} cannot be used ({reason}): restore it") from None
        return table


def read_records(folder: Path) -> tuple[dict[str, Record], list[str]]:
    """The collected runs of a study by name, and the names of its planned runs. Both are empty without the file.

    Raises:
        UserError: the file cannot be read, or was changed by something else than ``write_records``.
    """
    path = folder / RUNS
    try:
        state = _state_of(path)
    except FileNotFoundError:
        return {}, []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    records, planned = _read(path, state)
    return dict(records), list(planned)


def _state_of(path: Path) -> tuple[int, ...]:
    """What changes if a file is written anew."""
    state = path.stat()
    return state.st_mtime_ns, state.st_size, state.st_ino


@lru_cache(maxsize=4)  # a report asks for the runs of one study after another
def _read_predictions(path: Path, _state: tuple[int, ...]) -> dict[str, Any]:
    """The table of each run. Rows of a run are one after another; else its checksum is wrong."""
    import pyarrow.parquet as pq

    table = pq.read_table(path, page_checksum_verification=True)
    runs = table["run"].combine_chunks().dictionary_encode()
    codes = np.asarray(runs.indices)
    starts = np.flatnonzero(np.diff(codes, prepend=-1)).tolist()
    ends = [*starts[1:], len(codes)]
    names = runs.dictionary.to_pylist()
    return {
        names[codes[start]]: table.slice(start, end - start).select(COLUMNS)
        for start, end in zip(starts, ends, strict=True)
    }


@lru_cache(maxsize=32)  # a study asks for each of its runs
def _read(path: Path, _state: tuple[int, ...]) -> tuple[dict[str, Record], list[str]]:
    try:
        lines = json.loads(path.read_text(encoding="utf8"))
        planned = [str(name) for name in lines.pop()["planned"]]
        records: dict[str, Record] = {}
        for line in lines:
            record = Record(path.parent, line["result"], line["metrics"])
            check_result(record.result)
            if record.metrics is not None and _sum_of_text(record.metrics) != record.result[SUMS].get(METRICS):
                raise ValueError(f"the metrics of {record.name} were changed after they were written")
            if record.name in records:
                raise ValueError(f"{record.name} is there twice: delete one of the two lines")
            records[record.name] = record
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = first_line(error) if isinstance(error, OSError | ValueError) else "it does not hold collected runs"
        raise UserError(f"{path} cannot be read: {reason}: restore it") from None
    return records, planned


def change_records(folder: Path, new: Iterable[Record], planned: Sequence[str] | None = None) -> None:
    """Adds runs to the collected ones of a study, or replaces those of the same names. Each file changes in one step.

    Args:
        folder: of the study.
        new: made by ``Record.made``.
        planned: names of the planned runs; ``None`` if they stay as they are.

    Raises:
        OSError: a file cannot be written.
        UserError: what is already there cannot be read, or another process has been changing it for minutes.
    """
    try:
        lock = DirectoryLock(folder, PATIENCE_SECONDS)  # another process may add a run of the same study
    except UserError as error:
        raise UserError(str(error).replace("--output_dir", "--results")) from None
    with lock:
        _refuse_foreign(folder / PREDICTIONS)
        records, before = read_records(folder)
        records |= {record.name: record for record in new}
        _write_records(folder, list(records.values()), before if planned is None else planned)


def _refuse_foreign(path: Path) -> None:
    """Refuses a table with other columns: one that was written here may lack its ``RUNS`` if the writer was killed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.parent.joinpath(RUNS).exists() or not path.exists():
        return
    with suppress(OSError, pa.ArrowException):
        if pq.read_schema(path).names == ["run", *COLUMNS]:
            return
    raise UserError(f"--results: {path} is from another program: give another folder")


def _write_records(folder: Path, records: Sequence[Record], planned: Sequence[str]) -> None:
    ordered = sorted(records, key=lambda record: record.name)
    tables = {record.name: table for record in ordered if (table := record.predictions()) is not None}
    if tables:
        write_atomically(folder / PREDICTIONS, lambda temporary: _write_tables(temporary, tables))
    else:
        (folder / PREDICTIONS).unlink(missing_ok=True)
    lines = [json.dumps({"result": r.result, "metrics": r.metrics}, allow_nan=False) for r in ordered]
    # last: if a run is in this file, its predictions are in the other one
    write_text(folder / RUNS, "[\n" + ",\n".join([*lines, json.dumps({"planned": list(planned)})]) + "\n]\n")


def _write_tables(path: Path, tables: Mapping[str, Any]) -> None:
    """Writes a small Parquet file: a row group for each run, row numbers as differences, all compressed by zstd."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lists = any(pa.types.is_list(table["label"].type) for table in tables.values())
    largest = max(_numbers(table[name]).max(initial=0) for table in tables.values() for name in COLUMNS[1:])
    small = pa.int8() if largest <= np.iinfo(np.int8).max else pa.int16()
    kind = pa.list_(small) if lists else small
    types = {"run": pa.string(), "row": pa.int32(), "label": kind, "predicted": kind}
    encodings = {"row": "DELTA_BINARY_PACKED"} | {
        f"{name}.list.element" if lists else name: "PLAIN" for name in COLUMNS[1:]
    }
    with pq.ParquetWriter(
        path, pa.schema(types), compression="zstd", compression_level=9, use_dictionary=["run"],
        column_encoding=encodings, write_page_checksum=True,
    ) as writer:  # fmt: skip
        for name, table in tables.items():
            columns = {"run": pa.array([name] * len(table))} | {key: table[key] for key in COLUMNS}
            if lists and not pa.types.is_list(table["label"].type):
                ends = np.arange(len(table) + 1, dtype=np.int32)
                columns |= {key: pa.ListArray.from_arrays(ends, _numbers(table[key])) for key in COLUMNS[1:]}
            writer.write_table(pa.table(columns).cast(writer.schema))


def _numbers(column: Any) -> np.ndarray:
    """The numbers of a column of numbers or of lists, one after another."""
    import pyarrow as pa

    values = column.combine_chunks()
    return np.asarray(values.flatten() if pa.types.is_list(values.type) else values)


def _sum_of_text(text: str) -> str:
    """The checksum of the file with this text, so it is the one in the run's own ``result.json``."""
    return hashlib.sha256(text.encode()).hexdigest()


def _sum_of_table(table: Any) -> str:
    """The checksum of predictions, whatever the width of their numbers."""
    import pyarrow as pa

    digest = hashlib.sha256()
    for name in COLUMNS:
        if pa.types.is_list(table[name].type):
            digest.update(np.asarray(table[name].combine_chunks().value_lengths()).astype("<i4").tobytes())
        digest.update(_numbers(table[name]).astype("<i4").tobytes())
    return digest.hexdigest()
