"""Experiment trackers by Lightning's loggers: TensorBoard, Weights & Biases and MLflow.

A run writes its own files first. A tracker gets the same numbers, and never ends a run: if it fails, a warning says
so, and the run goes on without it. Without ``--tracker`` nothing of this is imported.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from finetuning.errors import first_line
from finetuning.processes import is_helper
from finetuning.runs.files import REPORT, RESULT, TRACKED
from finetuning.storage import read_json, write_json

PROJECT = "finetune_lora"  # of W&B and MLflow, unless their own variables name another
TENSORBOARD = "tensorboard"  # the folder of event files in the run directory
ENDED = {"finished": "success", "failed": "failed", "interrupted": "KILLED"}  # what Lightning and MLflow call it


class Trackers:
    """The trackers of one run, in its first process. Each method goes to all that have not failed."""

    def __init__(self, names: Sequence[str], directory: Path) -> None:
        """Opens nothing yet.

        Args:
            names: of ``settings.TRACKERS``.
        """
        self._directory, self._names = directory, list(names)
        self._loggers: dict[str, Any] = {}  # those that are open
        self._continues = False  # until the first row of a continued run

    def __bool__(self) -> bool:
        """Whether any tracker is open."""
        return bool(self._loggers)

    def open(self, settings: dict[str, Any], resumed: bool, replaced: bool = False) -> None:
        """Opens the trackers and logs the settings. A tracker that cannot be reached fails here, before training.

        With folds, only the final run has trackers, so they are opened after the runs on the folds.

        Args:
            settings: every flag with its value.
            resumed: whether to continue what the run logged before it was interrupted.
            replaced: whether the run replaces one, whose log is removed.
        """
        self._continues = resumed
        earlier = _earlier_ids(self._directory) if resumed else {}
        if replaced and not resumed and not is_helper():
            folder = self._directory / TENSORBOARD
            for file in (*folder.glob("events.out.tfevents.*"), folder / "hparams.yaml"):
                with suppress(OSError):
                    file.unlink()
        for name in self._names:
            with self._guarded(name):
                logger = self._loggers[name] = OPEN[name](self._directory, earlier.get(name))
                _ = logger.experiment  # connects
                if earlier.get(name) is None:  # MLflow allows no second value, and --resume may change some settings
                    logger.log_hyperparams(_given(settings))
        ids = {name: logger.version for name, logger in self._loggers.items() if name != TENSORBOARD}
        if ids:
            with suppress(OSError):
                write_json(self._directory / TRACKED, earlier | ids)  # one may be away at the moment

    def log(self, row: dict[str, Any]) -> None:
        """One row of the run's history: step, losses, learning rate, seconds, or the scores of a validation."""
        values = {key: float(value) for key, value in row.items() if key != "step" and isinstance(value, int | float)}
        for name, logger in list(self._loggers.items()):
            with self._guarded(name):
                if self._continues and name == TENSORBOARD:  # a run that was killed logged points after its checkpoint
                    logger.experiment.close()
                    logger.experiment.purge_step = row["step"]  # is written when the next point opens the file again
                logger.log_metrics(values, step=row["step"])
        self._continues = False

    def close(self, result: dict[str, Any]) -> None:
        """The scores and costs of the result, ``result.json`` and ``report.html`` as artifacts, and the end."""
        values, step = final_values(result), result.get("train", {}).get("steps", 0)
        files = [path for path in (self._directory / RESULT, self._directory / REPORT) if path.exists()]
        with suppress(KeyboardInterrupt):  # a tracker may wait for its server
            for name, logger in list(self._loggers.items()):
                with self._guarded(name):
                    logger.log_metrics(values, step=step)
            for name, logger in list(self._loggers.items()):
                with self._guarded(name):
                    CLOSE[name](logger, result, files)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Something is done with a tracker. If that fails, the run goes on without it."""
        try:
            yield
        except Exception as error:
            self._loggers.pop(name, None)
            print(f"warning: --tracker {name} failed and is not used any more: {first_line(error)}", file=sys.stderr)


def final_values(result: dict[str, Any]) -> dict[str, float]:
    """Scores of the checkpoint that was chosen, seconds, memory and parameters, under flat names."""
    values = {
        f"{prefix}_{name}": float(value)
        for prefix, split in (("best_validation", "validation"), ("test", "test"))
        for name, value in result.get(split, {}).items()
        if isinstance(value, int | float)
    }
    costs = {
        "run_seconds": result.get("seconds"),
        "training_seconds": result.get("train", {}).get("seconds"),
        "peak_memory_bytes": result.get("memory", {}).get("peak_bytes"),
        "trained_parameters": result.get("parameters", {}).get("trainable"),
    }
    return values | {name: float(value) for name, value in costs.items() if value is not None}


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


def _earlier_ids(directory: Path) -> dict[str, str]:
    """The ids under which the trackers know an interrupted run."""
    with suppress(OSError, ValueError):
        return read_json(directory / TRACKED)
    return {}


# --- what differs between trackers


def _open_tensorboard(directory: Path, _: str | None) -> Any:
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(directory, name="", version=TENSORBOARD, default_hp_metric=False)


def _open_wandb(directory: Path, earlier: str | None) -> Any:
    from lightning.pytorch.loggers import WandbLogger

    project = os.environ.get("WANDB_PROJECT", PROJECT)
    return WandbLogger(name=directory.resolve().name, project=project, save_dir=directory, id=earlier)


def _open_mlflow(directory: Path, earlier: str | None) -> Any:
    """MLflow's own default place: Lightning's is a store of files, which MLflow 3 refuses."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # is read at the import: else it calls its makers
    import mlflow
    from lightning.pytorch.loggers import MLFlowLogger

    return MLFlowLogger(
        experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT),
        run_name=directory.resolve().name,
        tracking_uri=mlflow.get_tracking_uri(),
        run_id=earlier,
    )


def _close_tensorboard(logger: Any, result: dict[str, Any], files: Sequence[Path]) -> None:
    """TensorBoard has no artifacts: the command and the places of the files become a text."""
    logger.log_hyperparams(_given(result["config"]), final_values(result))
    lines = [f"    {result['command']}", *(f"* {path}" for path in files)]
    logger.experiment.add_text(result["status"], "\n".join(lines))
    logger.finalize(ENDED[result["status"]])


def _close_wandb(logger: Any, result: dict[str, Any], files: Sequence[Path]) -> None:
    run = logger.experiment
    run.summary.update({"status": result["status"], "command": result["command"]})
    for path in files:
        run.log_artifact(str(path), name=f"{path.stem}-{run.id}", type=path.stem)
    logger.finalize(ENDED[result["status"]])
    run.finish(exit_code=0 if result["status"] == "finished" else 1)


def _close_mlflow(logger: Any, result: dict[str, Any], files: Sequence[Path]) -> None:
    for key in ("status", "command"):
        logger.experiment.set_tag(logger.run_id, key, result[key])
    for path in files:
        logger.experiment.log_artifact(logger.run_id, str(path))
    logger.finalize(ENDED[result["status"]])


OPEN = {"tensorboard": _open_tensorboard, "wandb": _open_wandb, "mlflow": _open_mlflow}
CLOSE = {"tensorboard": _close_tensorboard, "wandb": _close_wandb, "mlflow": _close_mlflow}
