"""The files of a run directory: their names, and functions that read them. Nothing here imports torch."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from finetuning.errors import UserError, as_user_error
from finetuning.storage import read_json, sha256_of, write_json

RESULT = "result.json"
SETTINGS = "settings.json"  # not config.json, because Hugging Face uses that name
PREDICTIONS = "predictions.parquet"
METRICS = "metrics.csv"
CURVE = "learning_curve.png"
REPORT = "report.html"
TRACKED = "trackers.json"  # the ids under which trackers know the run
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
TRAINED_WEIGHTS = "trained_weights.safetensors"
LAST_CHECKPOINT = "last.ckpt"
PREVIOUS_CHECKPOINT = "previous.ckpt"  # the one before the last, in case the last is damaged
BEST_CHECKPOINT = "best.ckpt"
BEST_RUN = "best"  # a folder next to other runs, with the best of them
FOLDS = "folds"  # the folder with the run directories of the folds of --kfold: 1, 2, ...
NOT_FINITE = "the loss is not finite"  # the error of a diverged run in result.json starts with it
SUMMED = (ADAPTER, ADAPTER_CONFIG, TRAINED_WEIGHTS, PREDICTIONS, METRICS)  # result.json has their checksums
ORIGIN = "origin"  # the key in settings.json of what a run was made from, see ``write_settings``
SUMS = "sha256"  # the key of the checksums; the one of result.json or settings.json is of its other content
RUN_FILES = (
    RESULT, SETTINGS, *SUMMED, CURVE, REPORT, TRACKED, LAST_CHECKPOINT, PREVIOUS_CHECKPOINT, BEST_CHECKPOINT,
)  # fmt: skip


def read_result(directory: Path) -> dict[str, Any]:
    """Reads ``result.json``.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no JSON object, or is not as a run wrote it.
    """
    result = read_json(directory / RESULT)
    check_result(result)
    return result


def check_result(result: dict[str, Any]) -> None:
    """Checks that a result is a JSON object with its own checksum, as a run wrote it: else ``ValueError``."""
    if not isinstance(result, dict):
        raise ValueError("it must hold a JSON object")
    if not isinstance(result.get(SUMS), dict) or result[SUMS].get(RESULT) != _own_sum(result):
        raise ValueError("it was changed after it was written")


def write_result(directory: Path, result: dict[str, Any]) -> None:
    """Writes ``result.json`` with the checksums of the files ``SUMMED`` next to it, and of itself."""
    sums = {name: sha256_of(directory / name) for name in SUMMED if (directory / name).exists()}
    write_json(directory / RESULT, with_sums(result, sums))


def with_sums(result: dict[str, Any], sums: dict[str, str]) -> dict[str, Any]:
    """A result with the checksums of files, by name, and its own."""
    summed = {**result, SUMS: sums}
    return {**summed, SUMS: sums | {RESULT: _own_sum(summed)}}


def _own_sum(result: dict[str, Any]) -> str:
    return _sum({**result, SUMS: {name: value for name, value in result[SUMS].items() if name != RESULT}})


def _sum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def check_unchanged(path: Path) -> None:
    """Refuses a file of a run that was changed, or whose ``result.json`` was changed or cannot be read."""
    try:
        expected = read_result(path.parent)[SUMS].get(path.name)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise UserError(f"{path.parent / RESULT} cannot be used: {error}: restore the file") from None
    with suppress(OSError):  # the code that reads the file next reports it
        if sha256_of(path) != expected:
            raise UserError(f"{path} was changed after its run wrote it: restore the file, or train again")


def record_is_unchanged(directory: Path) -> bool:
    """Whether a run's result, predictions and metrics are still there as the run wrote them. Weights may be gone."""
    try:
        sums = read_result(directory)[SUMS]
        return all(sha256_of(directory / name) == sums[name] for name in (PREDICTIONS, METRICS) if name in sums)
    except (OSError, ValueError):
        return False


def read_status(directory: Path) -> str | None:
    """The run's status, ``finished``, ``interrupted`` or ``failed``; ``None`` if there is no result."""
    with suppress(OSError, ValueError):
        return read_result(directory).get("status")
    return None


def write_settings(directory: Path, settings: dict[str, Any], origin: dict[str, Any]) -> None:
    """Writes ``settings.json`` with its checksum, because a run that continues must be the same run.

    Args:
        origin: what a run that continues must find again: hashes of the files of its ``base_model`` and ``adapter``,
            hashes of its ``data``, its ``precision``, and its number of ``threads``, ``None`` on a GPU. Also the number
            of the SLURM ``job`` that began it, or ``None``, its ``command``, and the ``folder`` in which it was given.
    """
    content = settings | {ORIGIN: origin}
    write_json(directory / SETTINGS, content | {SUMS: _sum(content)})


def read_settings(directory: Path) -> dict[str, Any]:
    """Reads the settings of a run.

    Raises:
        OSError, ValueError: there are no settings, or they were changed after they were written.
    """
    return {name: value for name, value in _stored(directory).items() if name != ORIGIN}


def read_origin(directory: Path) -> dict[str, Any]:
    """What the run was made from, see ``write_settings``; fails like ``read_settings``."""
    return dict(_stored(directory)[ORIGIN])


def read_text_hashes(directory: Path) -> dict[str, str]:
    """The hashes of a run's texts, by split; refused if the settings, which hold them, are lost or damaged."""
    with as_user_error(f"{directory / SETTINGS} cannot be read", OSError, ValueError):
        return dict(read_origin(directory)["data"])


def _stored(directory: Path) -> dict[str, Any]:
    settings = read_json(directory / SETTINGS)
    expected = settings.pop(SUMS, None)
    if expected != _sum(settings) or ORIGIN not in settings:
        raise ValueError("it was changed after it was written")
    return settings
