"""The files of a run directory: their names, and functions that read them. Nothing here imports torch."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from finetuning.storage import read_json

RESULT = "result.json"
SETTINGS = "settings.json"  # not config.json, because Hugging Face uses that name
OLD_SETTINGS = "config.json"  # the name in earlier versions of the suite
PREDICTIONS = "predictions.parquet"
METRICS = "metrics.csv"
CURVE = "learning_curve.png"
REPORT = "report.html"
TRACKED = "trackers.json"  # the ids under which trackers know the run
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
TRAINED_WEIGHTS = "trained_weights.safetensors"
LAST_CHECKPOINT = "last.ckpt"
BEST_CHECKPOINT = "best.ckpt"
PLANNED = "planned.json"  # next to a study's collected runs: the names of all its planned runs
NOT_FINITE = "the loss is not finite"  # the error of a diverged run in result.json starts with it
RUN_FILES = (
    RESULT,
    SETTINGS,
    PREDICTIONS,
    METRICS,
    CURVE,
    REPORT,
    TRACKED,
    ADAPTER,
    ADAPTER_CONFIG,
    TRAINED_WEIGHTS,
    LAST_CHECKPOINT,
    BEST_CHECKPOINT,
)


def read_result(directory: Path) -> dict[str, Any]:
    """Reads ``result.json``.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON.
    """
    return read_json(directory / RESULT)


def read_status(directory: Path) -> str | None:
    """The run's status, ``finished``, ``interrupted`` or ``failed``; ``None`` if there is no result."""
    with suppress(OSError, ValueError):
        return read_result(directory).get("status")
    return None


def settings_file(directory: Path) -> Path | None:
    """The file with a run's settings, under its present or its earlier name; ``None`` if no run has started."""
    if (directory / SETTINGS).exists():
        return directory / SETTINGS
    with suppress(OSError, ValueError, TypeError):
        if "output_dir" in read_json(directory / OLD_SETTINGS):  # otherwise it is a model's config.json
            return directory / OLD_SETTINGS
    return None


def read_settings(directory: Path) -> dict[str, Any]:
    """Reads the settings of a run. A collected run has them in its ``result.json``.

    Raises:
        OSError, ValueError, KeyError: there are no settings.
    """
    file = settings_file(directory)
    settings: dict[str, Any] = read_result(directory)["config"] if file is None else read_json(file)
    return settings
