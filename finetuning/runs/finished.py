"""A finished run, as predict and export read it. Nothing here imports torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.config import RunConfig
from finetuning.errors import UserError, first_line
from finetuning.runs.files import PREDICTIONS, RESULT, read_result


@dataclass(frozen=True)
class FinishedRun:
    """A run directory, the settings of its run, its label names, and the rest of ``result.json``."""

    directory: Path
    config: RunConfig
    label_names: list[str]
    result: dict[str, Any]


def read_finished(directory: Path) -> FinishedRun:
    """The finished run in a directory.

    Raises:
        UserError: the directory does not contain a finished run, or another version of the suite wrote it.
    """
    wanted = f"{directory}: must be a finished run"
    try:
        result = read_result(directory)
    except FileNotFoundError:
        raise UserError(f"{wanted}, but has no {RESULT}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{wanted}, but {RESULT} cannot be read: {first_line(error)}") from None
    status = result.get("status") if isinstance(result, dict) else None
    if status != "finished":
        raise UserError(f"{wanted}, but its status is {status!r}")
    try:
        settings, data = result["config"], result["data"]
        found = {name: column for name, column in data.get("columns", {}).items() if not settings[name]}  # in a hub set
        return FinishedRun(directory, RunConfig.from_dict(settings | found), data["label_names"], result)
    except UserError as error:
        raise UserError(f"{directory}: its settings cannot be used: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{wanted}, but {RESULT} is damaged: {type(error).__name__} {first_line(error)}") from None


def read_predictions(directory: Path) -> dict[tuple[str, int], tuple[int, list[float]]]:
    """The label and the logits of each held-out text, by its split and its row.

    Raises:
        UserError: ``predictions.parquet`` is missing or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = directory / PREDICTIONS
    try:
        columns = pq.read_table(path, columns=["split", "row", "label", "logits"]).to_pydict()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}: restore it, or train again") from None
    keys = zip(columns["split"], columns["row"], strict=True)
    return dict(zip(keys, zip(columns["label"], columns["logits"], strict=True), strict=True))
