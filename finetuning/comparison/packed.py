"""The collected runs of a study: ``results/STUDY/runs.json``.

The file is a list with one line for each run: its ``result``, with its place in the study, its ``metrics``, the text of
``metrics.csv``, and its ``predictions`` for the test texts, see ``Columns``. The last line names the runs that are
``planned``. Each result has the checksums of itself and of the two texts.
"""

import base64
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.errors import UserError, first_line
from finetuning.runs.files import METRICS, PREDICTIONS, SUMS, check_result, with_sums
from finetuning.runs.lock import DirectoryLock
from finetuning.storage import write_text

RUNS = "runs.json"
PATIENCE_SECONDS = 120.0  # to write a study of 60 runs takes one or two

# ``row``, ``label`` and ``predicted`` of each test text, in the order of the rows; multi-label: the last two are lists.
# In the file, rows are differences to the row before, and the JSON object is packed by zlib and written in base64.
Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Record:
    """A collected run: what ``result.json`` and ``metrics.csv`` of the run held, and its test predictions."""

    folder: Path  # of its study
    result: dict[str, Any]
    metrics: str | None
    packed: str | None  # its predictions, as they are in the file

    @staticmethod
    def made(folder: Path, result: dict[str, Any], metrics: str | None, predictions: Columns | None = None) -> "Record":
        """A record with its checksums.

        Args:
            folder: of its study.
            result: with the key ``study``; it may have checksums of other files, which are replaced.
            metrics: the text of ``metrics.csv``.
            predictions: for the test texts.
        """
        packed = None if predictions is None else _pack(predictions)
        found = {METRICS: _sum_of(metrics), PREDICTIONS: _sum_of(packed)}
        sums = {name: value for name, value in found.items() if value is not None}
        return Record(folder, with_sums(result, sums), metrics, packed)

    @property
    def name(self) -> str:
        return str(self.result["study"]["run"])

    @property
    def path(self) -> Path:
        """Where messages say that it is: ``results/STUDY/RUN``."""
        return self.folder / self.name

    @property
    def predictions(self) -> Columns | None:
        """The test predictions; ``None`` if they were not kept."""
        if self.packed is None:
            return None
        columns = json.loads(zlib.decompress(base64.b64decode(self.packed)))
        return columns | {"row": np.cumsum(columns["row"]).tolist()}

    @property
    def line(self) -> str:
        """Its line in the file."""
        content = {"result": self.result, "metrics": self.metrics, "predictions": self.packed}
        return json.dumps(content, allow_nan=False)


def _pack(predictions: Columns) -> str:
    columns = {**predictions, "row": np.diff(predictions["row"], prepend=0).tolist()}
    return base64.b64encode(zlib.compress(json.dumps(columns, separators=(",", ":")).encode(), 9)).decode()


def read_records(folder: Path) -> tuple[dict[str, Record], list[str]]:
    """The collected runs of a study by name, and the names of its planned runs. Both are empty without the file.

    Raises:
        UserError: the file cannot be read, or was changed by something else than ``change_records``.
    """
    path = folder / RUNS
    try:
        state = path.stat()
    except FileNotFoundError:
        return {}, []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    records, planned = _read(path, (state.st_mtime_ns, state.st_size, state.st_ino))
    return dict(records), list(planned)


@lru_cache(maxsize=32)  # a study asks for each of its runs
def _read(path: Path, _state: tuple[int, ...]) -> tuple[dict[str, Record], list[str]]:
    try:
        lines = json.loads(path.read_text(encoding="utf8"))
        planned = [str(name) for name in lines.pop()["planned"]]
        records: dict[str, Record] = {}
        for line in lines:
            record = Record(path.parent, line["result"], line["metrics"], line["predictions"])
            check_result(record.result)
            for what, file, text in (("metrics", METRICS, record.metrics), ("predictions", PREDICTIONS, record.packed)):
                if _sum_of(text) != record.result[SUMS].get(file):
                    raise ValueError(f"the {what} of {record.name} were changed after they were written")
            if record.name in records:
                raise ValueError(f"{record.name} is there twice: delete one of the two lines")
            records[record.name] = record
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = first_line(error) if isinstance(error, OSError | ValueError) else "it does not hold collected runs"
        raise UserError(f"{path} cannot be read: {reason}: restore it") from None
    return records, planned


def change_records(folder: Path, new: Iterable[Record], planned: Sequence[str] | None = None) -> None:
    """Adds runs to the collected ones of a study, or replaces those of the same names. The file changes in one step.

    Args:
        folder: of the study.
        new: made by ``Record.made``.
        planned: names of the planned runs; ``None`` if they stay as they are.

    Raises:
        OSError: the file cannot be written.
        UserError: what is already there cannot be read, or another process has been changing it for minutes.
    """
    try:
        lock = DirectoryLock(folder, PATIENCE_SECONDS)  # another process may add a run of the same study
    except UserError as error:
        raise UserError(str(error).replace("--output_dir", "--results")) from None
    with lock:
        records, before = read_records(folder)
        records |= {record.name: record for record in new}
        lines = [records[name].line for name in sorted(records)]
        lines.append(json.dumps({"planned": list(before if planned is None else planned)}))
        write_text(folder / RUNS, "[\n" + ",\n".join(lines) + "\n]\n")


def _sum_of(text: str | None) -> str | None:
    """The checksum of a text. That of metrics is also the one in the run's own ``result.json``."""
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()
