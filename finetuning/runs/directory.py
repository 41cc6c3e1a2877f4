"""A run directory: its name, whether it can take a run, and how a run begins in it."""

import os
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
from finetuning.storage import write_json


def default_directory(dataset: str, method: str) -> Path:
    """``runs/DATASET-METHOD-TIME``; with srun the numbers of job and step, which all processes of a run share."""
    moment = datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]  # a loop starts several in a second
    if in_slurm_step():
        moment = f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    return Path("runs") / f"{dataset}-{method}-{moment}"


def check_directory(directory: Path, resume: bool, overwrite: bool) -> None:
    """Refuses a directory that cannot take a run; writes nothing.

    Raises:
        UserError: it is a file, cannot be written, holds a run (unless it is to be continued or replaced), directories
            of runs, or files of the same names that are no run's: even --overwrite does not replace these.
    """
    flag = f"--output_dir {directory}"
    if os.access(directory, os.F_OK) and not directory.is_dir():
        raise UserError(f"{flag} is a file: give a directory")
    existing = next(path for path in (directory, *directory.absolute().parents) if os.access(path, os.F_OK))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{flag} cannot be written: {existing} is not a directory that you may write to")
    if resume:
        return
    held = [name for name in RUN_FILES if (directory / name).exists()]
    holds_run = _holds_run(directory)
    if held and not holds_run:
        raise UserError(f"{flag} holds a {held[0]} that is no run's, and would be replaced: give another directory")
    if holds_run and not overwrite:
        file = held[0] if held else OLD_SETTINGS
        raise UserError(f"{flag} holds a run already ({file}): give another one, --resume or --overwrite")
    if not holds_run and (inside := next(filter(_holds_run, sorted(directory.glob("*/"))), None)):
        raise UserError(f"{flag} holds runs ({inside.name}): give this one a directory of its own")


def _holds_run(directory: Path) -> bool:
    """Whether there are settings of a run: other programs have files of the same names."""
    try:
        return "output_dir" in read_settings(directory)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def interrupted_settings(directory: Path) -> dict[str, Any]:
    """The settings of the run that ``--resume`` is to continue.

    Raises:
        UserError: there is no run, it has finished, or its settings cannot be read.
    """
    flag = f"--resume: --output_dir {directory}"
    file = settings_file(directory)
    if file is None:
        raise UserError(f"{flag} holds no run (no {SETTINGS}): leave --resume out to start one")
    if read_status(directory) == "finished":
        raise UserError(f"{flag} holds a run that has finished: give another directory, or --overwrite")
    try:
        return read_settings(directory)
    except (OSError, ValueError) as error:
        raise UserError(f"{flag}: its {file.name} cannot be used: {first_line(error)}") from None


def has_checkpoint(directory: Path) -> bool:
    """Whether a run there can go on; one that was stopped earlier starts over."""
    return (directory / LAST_CHECKPOINT).is_file()


def open_directory(directory: Path, settings: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Makes the directory and notes the settings in it; an overwritten run's files go first.

    Raises:
        UserError: it cannot be written, or another run has begun there since it was checked.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        earlier = settings_file(directory)
        if not (resume or overwrite):
            _claim(directory)
        if not resume:
            for name in RUN_FILES:
                if name != SETTINGS:  # if it is killed here, it still holds a run
                    (directory / name).unlink(missing_ok=True)
        write_json(directory / SETTINGS, settings)
        if earlier is not None and earlier.name == OLD_SETTINGS:
            earlier.unlink()
    except OSError as error:
        raise UserError(f"--output_dir {directory} cannot be written: {error.strerror}") from None


def _claim(directory: Path) -> None:
    try:
        (directory / SETTINGS).touch(exist_ok=False)  # of two processes, one can
    except FileExistsError:
        raise UserError(f"--output_dir {directory} holds a run that has just begun: give another one") from None
