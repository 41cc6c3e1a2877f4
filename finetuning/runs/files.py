"""The files of a run directory: their names, and what is read back from them; no torch."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from finetuning.storage import read_json

RESULT = "result.json"
SETTINGS = "settings.json"  # not config.json, which is Hugging Face's name
OLD_SETTINGS = "config.json"  # the name in earlier versions
PREDICTIONS = "predictions.parquet"
METRICS = "metrics.csv"
CURVE = "learning_curve.png"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
TRAINED_WEIGHTS = "trained_weights.safetensors"
LAST_CHECKPOINT = "last.ckpt"
BEST_CHECKPOINT = "best.ckpt"
PLANNED = "planned.json"  # next to a study's collected runs: the names of all runs that it plans
NOT_FINITE = "the loss is not finite"  # how the error of a run that diverged begins in result.json
RUN_FILES = (
    RESULT,
    SETTINGS,
    PREDICTIONS,
    METRICS,
    CURVE,
    ADAPTER,
    ADAPTER_CONFIG,
    TRAINED_WEIGHTS,
    LAST_CHECKPOINT,
    BEST_CHECKPOINT,
)


def read_result(directory: Path) -> dict[str, Any]:
    """What ``result.json`` holds.

    Raises:
        OSError, ValueError: there is none, or no JSON.
    """
    return read_json(directory / RESULT)


def read_status(directory: Path) -> str | None:
    """``finished``, ``interrupted`` or ``failed``; ``None`` if there is no result."""
    with suppress(OSError, ValueError):
        return read_result(directory).get("status")
    return None


def settings_file(directory: Path) -> Path | None:
    """The file with a run's settings, under its present name or the earlier one; ``None`` if no run has begun."""
    if (directory / SETTINGS).exists():
        return directory / SETTINGS
    with suppress(OSError, ValueError, TypeError):
        if "output_dir" in read_json(directory / OLD_SETTINGS):  # else it is a model's
            return directory / OLD_SETTINGS
    return None


def read_settings(directory: Path) -> dict[str, Any]:
    """The settings of a run; those of a collected run are in its ``result.json``.

    Raises:
        OSError, ValueError, KeyError: there are none.
    """
    file = settings_file(directory)
    settings: dict[str, Any] = read_result(directory)["config"] if file is None else read_json(file)
    return settings
