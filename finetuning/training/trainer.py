"""Lightning's trainer for a run, and what keeps Lightning quiet."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import SLURMEnvironment

from finetuning.runs.files import BEST_CHECKPOINT
from finetuning.settings import HardwareSettings, TrainingSettings
from finetuning.training.callbacks import BestCheckpoint, PatientStop, ProgressBar, ProgressLines
from finetuning.training.hardware import Hardware


def make_trainer(
    training: TrainingSettings,
    settings: HardwareSettings,
    hardware: Hardware,
    directory: Path,
    callbacks: list[Callback],
) -> pl.Trainer:
    """Lightning's trainer: best and last checkpoint, early stopping, progress bar."""
    mode = "min" if training.monitor == "loss" else "max"
    monitor = f"validation_{training.monitor}"
    best = BestCheckpoint(
        dirpath=directory,
        filename=BEST_CHECKPOINT.removesuffix(".ckpt"),
        monitor=monitor,
        mode=mode,
        save_last=True,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    at_terminal = sys.stdout.isatty()
    refresh_rate = 20 if hardware.on_gpu else 1  # the loss that it shows waits for the device
    stopping = [PatientStop(monitor, patience=training.patience, mode=mode)] if training.patience else []
    return pl.Trainer(
        accelerator=hardware.accelerator,
        devices=hardware.devices,
        num_nodes=settings.num_nodes,
        strategy=settings.strategy,
        precision="16-mixed" if hardware.dtype == torch.float16 else "32-true",  # bf16 is the classifier's own affair
        max_epochs=training.epochs,
        accumulate_grad_batches=training.accumulate,
        gradient_clip_val=training.gradient_clip or None,
        callbacks=[
            *callbacks,
            *stopping,
            best,
            ProgressBar(refresh_rate) if at_terminal else ProgressLines(),
        ],
        logger=False,  # metrics.csv is the run's own history
        log_every_n_steps=10,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=at_terminal,
        default_root_dir=directory,
        # requeueing is the job script's: only one of the two may do it
        plugins=[SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else None,
    )


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keeps notes from users that are about Lightning and not about their run."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    notes = ("does not have many workers", "Checkpoint directory", "srun", "isinstance", "sync_dist=True")
    with warnings.catch_warnings():
        for note in notes:  # sync_dist: what is logged is equal on all ranks already
            warnings.filterwarnings("ignore", f".*{note}.*")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def leave_process_group() -> None:
    """Ends the threads by which processes speak; one that runs on while its process ends may abort it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
