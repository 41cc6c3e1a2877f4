"""Lightning's trainer for a run, and a context that hides Lightning's notes."""

import atexit
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.strategies.launchers import subprocess_script
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import subprocess_script as launchers

from finetuning.errors import Interrupted, UserError
from finetuning.processes import in_slurm_step, is_helper, srun_tasks
from finetuning.runs.files import BEST_CHECKPOINT
from finetuning.settings import HardwareSettings, TrainingSettings
from finetuning.training.callbacks import PatientStop, ProgressBar, ProgressLines
from finetuning.training.checkpoints import BestCheckpoint, CheckpointFiles, LastCheckpoint
from finetuning.training.hardware import Hardware

MEETING = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")  # by which nodes that nothing else has started find each other
STARTERS = (TorchElasticEnvironment, LSFEnvironment, MPIEnvironment)  # which Lightning finds, besides SLURM
GRACE_SECONDS = 30.0  # for a process that hangs: the others end within a minute


class PatientObserver(subprocess_script._ChildProcessObserver):
    """Lightning's watch over the processes that it starts: if one dies, it kills the others and ends the first one.

    Once they are connected, the first process notices the death itself, says so in one line and writes its result. Here
    it has the time for it. While it still waits for the others to connect, it cannot.
    """

    def _terminate_all(self) -> None:
        time.sleep(GRACE_SECONDS)  # the thread ends with its process
        status = next(process.returncode for process in self._child_processes if process.returncode)
        for process in self._child_processes:
            process.send_signal(self._termination_signal)
        print(f"error: a process of the run ended with status {status}: go on with --resume", file=sys.stderr)
        os._exit(1)  # the main thread may wait in a library


_children: list[Any] = []  # the processes that Lightning has started here


def _observe(child_processes: list[Any]) -> None:
    _children.extend(child_processes)
    PatientObserver(main_pid=os.getpid(), child_processes=child_processes).start()


launchers._launch_process_observer = _observe  # Lightning has no setting for it


def check_processes(settings: HardwareSettings) -> None:
    """Checks that SLURM or torchrun has started as many processes as the run needs.

    Raises:
        UserError: Lightning would wait for processes that nobody was asked to start, or each process that was started
            would train the whole run, in one directory.
    """
    processes, tasks = settings.processes, srun_tasks()
    flags = f"--devices {settings.devices} --num_nodes {settings.num_nodes}"
    if _under_slurm() and tasks != processes and (in_slurm_step() or settings.num_nodes > 1):
        raise UserError(
            f"{flags}: SLURM started {tasks} task(s), not {processes}; use srun, and sbatch"
            f" --nodes={settings.num_nodes} --ntasks-per-node={settings.devices}"
        )
    if tasks > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:  # Lightning reads it
        raise UserError(f"{flags}: SLURM needs --ntasks-per-node={settings.devices}, in sbatch or salloc as well")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    lacking = [name for name in MEETING if name not in os.environ]
    if settings.num_nodes > 1 and lacking and not (_under_slurm() or any(other.detect() for other in STARTERS)):
        raise UserError(
            f"{flags}: nothing has started the run on other nodes: use sbatch or torchrun, or set {', '.join(MEETING)}"
            " on each node"
        )
    if "TORCHELASTIC_RUN_ID" in os.environ and started != processes:
        raise UserError(f"{flags}: torchrun started {started} process(es), not {processes}")
    if processes == 1 and is_helper():
        raise UserError(f"{flags}: by RANK, LOCAL_RANK, NODE_RANK or SLURM_PROCID this is not the only process")


def _under_slurm() -> bool:
    """Whether this is a job of SLURM: by Lightning's rules, without interactive shells, or tasks of srun."""
    with quiet_lightning():  # hides Lightning's advice to use srun
        return srun_tasks() > 1 or SLURMEnvironment.detect()


def _environments() -> list[ClusterEnvironment]:
    """What tells Lightning about the other processes: SLURM, but only if srun has started several.

    A session such as JupyterHub's has the variables of a job. Lightning would read them, and refuse some.
    """
    if not _under_slurm():
        return []  # Lightning finds torchrun's
    if srun_tasks() > 1:
        return [SLURMEnvironment(auto_requeue=False)]  # the job script requeues; Lightning must not do it as well
    return [LightningEnvironment()]


def _strategy(settings: HardwareSettings) -> str | DDPStrategy:
    """Lightning's strategy. Ranks need not send each other buffers before each forward, because no buffer changes."""
    if settings.processes == 1:
        return settings.strategy
    unused = settings.strategy == "ddp_find_unused_parameters_true"
    return DDPStrategy(find_unused_parameters=unused, broadcast_buffers=False)


def make_trainer(
    training: TrainingSettings,
    settings: HardwareSettings,
    hardware: Hardware,
    directory: Path,
    callbacks: list[Callback],
    epochs: int | None = None,
) -> pl.Trainer:
    """Lightning's trainer with best and last checkpoint, early stopping and progress output.

    Args:
        training, settings, hardware: the run's settings, and what they mean on this machine.
        callbacks: further ones, which come first.
        epochs: the number of epochs, if folds have chosen it: then nothing is validated, and no checkpoint is the best.
    """
    mode = "min" if training.monitor == "loss" else "max"
    monitor = f"validation_{training.monitor}"
    best = BestCheckpoint(
        dirpath=directory.absolute(),  # Lightning would take a path such as data:b or ~b for something else
        filename=BEST_CHECKPOINT.removesuffix(".ckpt"),
        monitor=monitor,
        mode=mode,
        save_on_train_epoch_end=True,
        save_weights_only=True,  # a run goes on from the last one: the optimizer's state would be most of the file
        enable_version_counter=False,
    )
    at_terminal = sys.stdout.isatty()
    refresh_rate = 20 if hardware.on_gpu else 1  # on a GPU, each refresh waits for the device
    stopping = [PatientStop(monitor, patience=training.patience, mode=mode)] if training.patience else []
    chosen = [*stopping, best] if epochs is None else []
    return pl.Trainer(
        accelerator=hardware.accelerator,
        devices=hardware.devices,
        num_nodes=settings.num_nodes,
        strategy=_strategy(settings),
        precision="16-mixed" if hardware.dtype == torch.float16 else "32-true",  # the classifier handles bf16 itself
        max_epochs=training.epochs if epochs is None else epochs,
        accumulate_grad_batches=training.accumulate,
        gradient_clip_val=training.gradient_clip or None,
        callbacks=[
            *callbacks,
            *chosen,
            LastCheckpoint(directory),
            ProgressBar(refresh_rate) if at_terminal else ProgressLines(),
        ],
        logger=False,  # Meter writes metrics.csv instead
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=at_terminal,
        default_root_dir=directory,
        plugins=[CheckpointFiles(), *_environments()],
    )


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Hides notes that are about Lightning and not about the user's run."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    notes = (
        "does not have many workers", "Checkpoint directory", "srun", "isinstance", "sync_dist=True",
        "have no `val_dataloader`", "`broadcast_buffers` is deprecated",  # its successor needs buffers to start
    )  # fmt: skip
    with warnings.catch_warnings():
        for note in notes:  # sync_dist: logged values are already equal on all ranks
            warnings.filterwarnings("ignore", f".*{note}.*")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def process_group_left() -> Iterator[None]:
    """Leaves the group of processes that training in the context forms, if it forms one.

    A communication thread that still runs when its process ends may abort it. A process that fails is another matter:
    the others may wait for it, and NCCL does not let it leave while they do. So it then ends without leaving.
    """
    try:
        yield
    except BaseException as error:
        if _in_group() and not isinstance(error, Interrupted):  # in which all ranks stop together
            status = 1 if isinstance(error, Exception) else 130
            atexit.register(_end_at_once, status)  # runs before Lightning's own, which would leave the group
        raise
    if _in_group():
        torch.distributed.destroy_process_group()


def _in_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _end_at_once(status: int) -> None:
    """Ends this process, and those that it has started: nobody else would."""
    for child in _children:
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
