"""A run directory: whether it can take a run, and the predictions, metrics and learning curve in it."""

import csv
import json
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.runs.files import (
    CONFIG,
    CURVE,
    LAST_CHECKPOINT,
    METRICS,
    PREDICTIONS,
    RUN_FILES,
    read_config,
    read_status,
    write_atomically,
    write_json,
)
from finetuning.settings import RunConfig, UserError

# ---------------------------------------------------------------------------------------------------------------------
# the directory


def default_directory(config: RunConfig) -> Path:
    """``runs/DATASET-METHOD-TIME``; with srun the numbers of job and step, which all processes of a run share."""
    method = "qlora" if config.q_lora else config.method
    moment = datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]  # a loop starts several in a second
    if in_slurm_step():
        moment = f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    return Path("runs") / f"{config.dataset}-{method}-{moment}"


def in_slurm_step() -> bool:
    """Whether srun has started this process."""
    return "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" in os.environ


def check_directory(directory: Path, config: RunConfig) -> None:
    """Refuses a directory that cannot take this run; writes nothing.

    Raises:
        UserError: it is a file, cannot be written, holds a run (or, with --resume, none that can be continued),
            directories of runs, or files of the same names that are no run's, which not even --overwrite replaces.
    """
    flag = f"--output_dir {directory}"
    if os.access(directory, os.F_OK) and not directory.is_dir():
        raise UserError(f"{flag} is a file: give a directory")
    existing = next(path for path in (directory, *directory.absolute().parents) if os.access(path, os.F_OK))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{flag} cannot be written: {existing} is not a directory that you may write to")
    held = [name for name in RUN_FILES if (directory / name).exists()]
    if config.resume:
        _check_resumable(directory, config)
    elif held and not _holds_run(directory):
        raise UserError(f"{flag} holds a {held[0]} that is no run's, and would be replaced: give another directory")
    elif held and not config.overwrite:
        raise UserError(f"{flag} holds a run already ({held[0]}): give another one, --resume or --overwrite")
    elif not held and (inside := next(filter(_holds_run, _folders_with_settings(directory)), None)):
        raise UserError(f"{flag} holds runs ({inside.name}): give this one a directory of its own")


def _folders_with_settings(directory: Path) -> list[Path]:
    return sorted(path.parent for path in directory.glob(f"*/{CONFIG}"))


def _holds_run(directory: Path) -> bool:
    """Whether the settings there are a run's: models have a ``config.json``, too, and PEFT has an adapter."""
    try:
        return "output_dir" in read_config(directory)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_resumable(directory: Path, config: RunConfig) -> None:
    flag = f"--resume: --output_dir {directory}"
    if not (directory / CONFIG).is_file() or not (directory / LAST_CHECKPOINT).is_file():
        raise UserError(f"{flag} holds no run with a checkpoint ({LAST_CHECKPOINT})")
    if read_status(directory) == "finished":
        raise UserError(f"{flag} holds a run that has finished: give another directory, or --overwrite")
    try:
        earlier = RunConfig.from_dict(json.loads((directory / CONFIG).read_text(encoding="utf8")))
    except (OSError, ValueError, UserError) as error:
        raise UserError(f"{flag}: its {CONFIG} cannot be used: {error}") from None
    differences = config.differences(earlier)
    if differences:
        raise UserError(f"{flag} holds a run of another configuration: {', '.join(differences)}")


def open_directory(directory: Path, config: RunConfig) -> None:
    """Makes the directory and notes the configuration in it; an overwritten run's files go first.

    Raises:
        UserError: it cannot be written, or another run has begun there since it was checked.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not (config.resume or config.overwrite):
            _claim(directory)
        if not config.resume:
            for name in RUN_FILES:
                if name != CONFIG:  # killed here, it still holds a run
                    (directory / name).unlink(missing_ok=True)
        write_json(directory / CONFIG, config.to_dict())
    except OSError as error:
        raise UserError(f"--output_dir {directory} cannot be written: {error.strerror}") from None


def _claim(directory: Path) -> None:
    try:
        (directory / CONFIG).touch(exist_ok=False)  # of two processes, one can
    except FileExistsError:
        raise UserError(f"--output_dir {directory} holds a run that has just begun: give another one") from None


# ---------------------------------------------------------------------------------------------------------------------
# predictions, curve


def write_predictions(directory: Path, splits: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
    """``predictions.parquet``: split, row in its source, label, one list of logits a text.

    Args:
        directory: the run directory.
        splits: by name (rows ``(n,)``, labels ``(n,)``, logits ``(n, classes)``).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "split": np.concatenate([np.full(len(rows), name) for name, (rows, _, _) in splits.items()]).tolist(),
        "row": np.concatenate([rows for rows, _, _ in splits.values()]),
        "label": np.concatenate([labels for _, labels, _ in splits.values()]).astype(np.int16),
        "logits": [row for _, _, logits in splits.values() for row in logits.astype(np.float32)],
    }
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    write_atomically(directory / PREDICTIONS, lambda temporary: pq.write_table(table, temporary, compression="zstd"))


def write_metrics(directory: Path, rows: Sequence[dict[str, Any]]) -> None:
    """``metrics.csv``: one row a measurement; what was not measured at a step stays empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(directory / METRICS, write)


def plot_learning_curve(directory: Path, rows: Sequence[dict[str, Any]], monitor: str, title: str) -> None:
    """Training and validation loss over the steps, and beneath them the monitored metric with its best point."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    training = [(row["step"], row["train_loss"]) for row in rows if row.get("train_loss") is not None]
    validated = [row for row in rows if row.get("validation_loss") is not None]
    metric = "accuracy" if monitor == "loss" else monitor
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7, 6), sharex=True, height_ratios=(3, 2), layout="constrained", dpi=150
    )
    steps, losses = [s for s, _ in training], [loss for _, loss in training]
    above.plot(steps, losses, color="#9ecae1", linewidth=1, label="training loss")
    if len(losses) >= 20:
        width = max(len(losses) // 20, 3)
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        above.plot(steps[width - 1 :], smooth, color="#2171b5", linewidth=2, label=f"mean of {width} points")
    at = [row["step"] for row in validated]
    above.plot(at, [row["validation_loss"] for row in validated], "o-", color="#d94801", label="validation loss")
    above.set(ylabel="cross-entropy, nats", ylim=(0, None))
    above.set_title(title, parse_math=False)  # a folder's name may hold $
    above.legend(frameon=False)
    values = [100 * row[f"validation_{metric}"] for row in validated]
    below.plot(at, values, "o-", color="#d94801")
    if values:
        best = int(np.argmax(values))
        below.annotate(
            f"{values[best]:.2f} %", (at[best], values[best]), xytext=(-6, 6), textcoords="offset points", ha="right"
        )
    below.set(xlabel="step", ylabel=f"validation {metric.replace('_', '-')}, %")
    below.margins(y=0.25)
    below.set_ylim(top=min(below.get_ylim()[1], 101))
    below.xaxis.get_major_locator().set_params(integer=True)
    for axis in (above, below):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    write_atomically(directory / CURVE, lambda temporary: figure.savefig(temporary))
    plt.close(figure)
