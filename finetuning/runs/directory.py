"""A run directory: its name, the checks before a run, and how a run starts in it."""

import os
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from finetuning.errors import UserError, first_line
from finetuning.processes import in_slurm_step
from finetuning.runs.files import (
    LAST_CHECKPOINT,
    OLD_SETTINGS,
    RUN_FILES,
    SETTINGS,
    read_settings,
    read_status,
    settings_file,
)
from finetuning.storage import cannot_be_written_in, write_json


def default_directory(dataset: str, method: str) -> Path:
    """``runs/DATASET-METHOD-TIME``. With srun, the job and step numbers replace the time."""
    moment = datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]  # a shell loop can start several runs in a second
    if in_slurm_step():  # the processes of a run share these numbers, but may start at different times
        moment = f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    name = re.sub(r"[^\w.-]+", "-", dataset)  # a data set of the hub has a slash
    return Path("runs") / f"{name}-{method}-{moment}"


def check_directory(directory: Path, resume: bool, overwrite: bool) -> None:
    """Checks that a run can start in the directory. Writes nothing.

    Raises:
        UserError: the directory is a file or not writable. Or it contains a run and neither ``resume`` nor
            ``overwrite`` is set. Or it contains directories of runs, or files of the same names from another program,
            which even ``overwrite`` does not replace.
    """
    flag = f"--output_dir {directory}"
    if os.access(directory, os.F_OK) and not directory.is_dir():
        raise UserError(f"{flag}: is a file: give a directory")
    if (obstacle := cannot_be_written_in(directory)) is not None:
        raise UserError(f"{flag}: cannot be written: {obstacle} is not a directory that you may write to")
    if resume:
        return
    held = [name for name in RUN_FILES if (directory / name).exists()]
    holds_run = _holds_run(directory)
    if held and not holds_run:
        raise UserError(f"{flag}: contains a {held[0]} from another program: give another directory")
    if holds_run and not overwrite:
        file = held[0] if held else OLD_SETTINGS
        ways = "or --overwrite" if read_status(directory) == "finished" else "--resume or --overwrite"
        raise UserError(f"{flag}: already contains a run ({file}): give another directory, {ways}")
    if not holds_run and (inside := next(filter(_holds_run, sorted(directory.glob("*/"))), None)):
        raise UserError(f"{flag}: contains other runs ({inside.name}): give a new directory inside it")


def _holds_run(directory: Path) -> bool:
    """Whether the directory contains settings of a run. Other programs use the same file names."""
    try:
        return "output_dir" in read_settings(directory)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def interrupted_settings(directory: Path) -> dict[str, Any]:
    """The settings of the run that ``--resume`` continues.

    Raises:
        UserError: there is no run, the run has finished, or its settings cannot be read.
    """
    flag = f"--resume: --output_dir {directory}"
    file = settings_file(directory)
    if file is None:
        raise UserError(f"{flag} contains no run (no {SETTINGS}): leave out --resume to start one")
    if read_status(directory) == "finished":
        raise UserError(f"{flag} contains a run that has finished: to replace it, give --overwrite without --resume")
    try:
        return read_settings(directory)
    except (OSError, ValueError) as error:
        raise UserError(f"{flag}: {file.name} cannot be read: {first_line(error)}") from None


def has_checkpoint(directory: Path) -> bool:
    """Whether the run can continue. Without a checkpoint it must start over."""
    return (directory / LAST_CHECKPOINT).is_file()


def open_directory(directory: Path, settings: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Makes the directory and writes the settings into it. Without ``resume``, it first removes an earlier run's files.

    Raises:
        UserError: the directory cannot be written, or another run has started in it since the check.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        earlier = settings_file(directory)
        if not (resume or overwrite):
            _claim(directory)
        if not resume:
            for name in RUN_FILES:
                if name != SETTINGS:  # the directory must still count as a run if this process is killed here
                    (directory / name).unlink(missing_ok=True)
        write_json(directory / SETTINGS, settings)
        if earlier is not None and earlier.name == OLD_SETTINGS:
            earlier.unlink()
    except OSError as error:
        raise UserError(f"--output_dir {directory}: cannot be written: {error.strerror}") from None


def _claim(directory: Path) -> None:
    try:
        (directory / SETTINGS).touch(exist_ok=False)  # only one of two processes succeeds
    except FileExistsError:
        raise UserError(f"--output_dir {directory}: another run has just started in it: give another one") from None
