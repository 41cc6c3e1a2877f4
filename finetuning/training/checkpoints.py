"""Checkpoints of a run: how Lightning writes them, when one is due inside an epoch, and which one is the best."""

import math
import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from finetuning.errors import TrainingFailed
from finetuning.runs.checkpoints import is_intact, write_checkpoint
from finetuning.runs.files import LAST_CHECKPOINT

LARGEST_SHARE = 0.01  # of a run's time that checkpoints inside epochs may take


class CheckpointFiles(TorchCheckpointIO):
    """Writes each checkpoint with a checksum, keeps the one before the last, and knows what writing costs.

    Lightning's own writer does not wait for the disk, and moves the file from the folder of temporary files: on another
    disk that is a copy, which a kill leaves half-written.
    """

    def __init__(self) -> None:
        self._saved = time.monotonic()
        self._cost = 0.0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint; Lightning calls it in the first process only."""
        began = time.monotonic()
        write_checkpoint(Path(path), partial(save, checkpoint))
        self._saved = time.monotonic()
        self._cost = self._saved - began

    def load_checkpoint(self, path: str | Path, *arguments: Any, **named: Any) -> dict[str, Any]:
        """Reads a checkpoint. Lightning passes on that only tensors and plain values may be in it."""
        with only_tensors(Path(path)):
            return super().load_checkpoint(path, *arguments, **named)

    def due(self, minutes: float) -> bool:
        """Whether the last checkpoint is this old, and the next one does not cost too large a share of the time."""
        return minutes > 0 and time.monotonic() - self._saved >= max(60 * minutes, self._cost / LARGEST_SHARE)


def save(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    """``torch.save``, with the file's own error if it cannot be written: torch's writer then ends with another one."""
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


@contextmanager
def only_tensors(path: Path) -> Iterator[None]:
    """Torch's error about other content advises to run it; this one does not.

    Raises:
        TrainingFailed: the file holds more than tensors and plain values.
    """
    try:
        yield
    except pickle.UnpicklingError:
        raise TrainingFailed(
            f"{path} holds more than tensors, and code in it is never run: start over with --overwrite"
        ) from None


class BestCheckpoint(ModelCheckpoint):
    """Keeps the epoch with the best monitored score, of epochs that share it the one with the smallest validation loss.

    With few validation texts, many epochs share a score. A continued run finds its best checkpoint even if its
    directory was moved or mounted elsewhere.
    """

    best_loss = math.inf

    def check_monitor_top_k(self, trainer: pl.Trainer, current: torch.Tensor | None = None) -> bool:
        if current is None:  # benchmarks train without validation
            return super().check_monitor_top_k(trainer, current)
        loss = float(trainer.callback_metrics["validation_loss"])
        shared = current == self.best_model_score and loss < self.best_loss
        better = super().check_monitor_top_k(trainer, current) or bool(shared)
        if better:
            self.best_loss = loss
        return better

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"best_loss": self.best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        moved = {key: self._in_this_directory(value) for key, value in state_dict.items() if key.endswith("_path")}
        best = {self._in_this_directory(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict | moved | {"best_k_models": best, "dirpath": self.dirpath})
        self.best_loss = state_dict["best_loss"]
        if self.best_model_path:
            check_best(Path(self.best_model_path))

    def _in_this_directory(self, path: str) -> str:
        return str(Path(self.dirpath or "") / Path(path).name) if path else path


class LastCheckpoint(Checkpoint):
    """Writes a checkpoint after every epoch. Lightning's ``save_last`` would only do it after the best one so far.

    In the list of callbacks it comes after ``BestCheckpoint``, whose state it keeps.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / LAST_CHECKPOINT

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def check_best(path: Path) -> None:
    """Checks the best checkpoint, before a continued run trains on for nothing and again when it is read.

    Raises:
        TrainingFailed: it is missing or damaged.
    """
    if not is_intact(path):
        raise TrainingFailed(
            f"{path} is missing or damaged, and no other file has the best weights so far: start over with the run's"
            f" flags and --overwrite"
        )
