"""The files of a run directory: their names, and how they are written and read; no torch.

A file is written beside its place and renamed, so that a reader finds the old one or the new one, never a half.
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

RESULT = "result.json"
CONFIG = "config.json"
PREDICTIONS = "predictions.parquet"
METRICS = "metrics.csv"
CURVE = "learning_curve.png"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
TRAINED_WEIGHTS = "trained_weights.safetensors"
LAST_CHECKPOINT = "last.ckpt"
BEST_CHECKPOINT = "best.ckpt"
PLANNED = "planned.json"  # beside a study's collected runs: the names of all that it plans
NOT_FINITE = "the loss is not finite"  # how the error of a run that diverged begins in result.json
RUN_FILES = (
    RESULT,
    CONFIG,
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
    return json.loads((directory / RESULT).read_text(encoding="utf8"))


def read_status(directory: Path) -> str | None:
    """``finished``, ``interrupted`` or ``failed``; ``None`` where no result stands."""
    with suppress(OSError, ValueError):
        return read_result(directory).get("status")
    return None


def read_config(directory: Path) -> dict[str, Any]:
    """The settings of a run: what ``config.json`` holds, of a collected one ``result.json``.

    Raises:
        OSError, ValueError, KeyError: there are none.
    """
    if (directory / CONFIG).exists():
        return json.loads((directory / CONFIG).read_text(encoding="utf8"))
    return read_result(directory)["config"]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write`` with a temporary path beside ``path`` and renames it; nothing stays behind on failure."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())  # some libraries keep what they write from the user's group
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)  # there is no way to read it but to set it
    os.umask(mask)
    return mask


def write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf8"))
