"""A run directory: its name, the checks before a run, and how a run starts in it."""

import os
import re
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from finetuning.config import RunConfig, resumed_config
from finetuning.errors import UserError, as_user_error, counted, first_line
from finetuning.processes import in_slurm_step, is_helper, shared_directory, slurm_job, was_requeued
from finetuning.runs.checkpoints import discard_damaged, forget_unneeded, has_checkpoint, usable_checkpoint
from finetuning.runs.files import (
    FOLDS,
    RESULT,
    RUN_FILES,
    SETTINGS,
    SUMMED,
    check_unchanged,
    read_origin,
    read_result,
    read_settings,
    read_status,
    write_settings,
)
from finetuning.runs.lock import LOCK, DirectoryLock, holder, in_use
from finetuning.settings import AUTO, DataSettings, RunSettings
from finetuning.storage import TEMPORARY, check_writable, remove

PARTS = {"base_model": "--model_name", "data": "--data_dir", "adapter": "--init_adapter"}  # of a run's origin
DEAD_NODE_SECONDS = 180.0  # NFS holds a dead node's lock for 90 s by default; its requeued job may start earlier
START_OVER = {"resume": False, "overwrite": True}  # the settings of a run to continue that has no checkpoint
KILLED = "ended without a result: it was killed, perhaps because memory ran out, or its machine stopped"


def default_directory(dataset: str, method: str) -> Path:
    """``runs/DATASET-METHOD-TIME``. If srun starts several processes, the job and step numbers replace the time."""
    moment = datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]  # a shell loop can start several runs in a second
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "2"))
    # the processes of a run share these numbers, but may start at different times; an interactive shell has one task
    if in_slurm_step() and tasks > 1:
        moment = f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    name = re.sub(r"[^\w.-]+", "-", dataset)  # a data set of the hub has a slash
    return Path("runs") / f"{name}-{method}-{moment}"


def run_directory(run: RunSettings, data: DataSettings, method: str) -> Path:
    """The directory of a run, in which it can start, and its folds as well. Writes nothing.

    Args:
        run: ``output_dir``, ``resume`` and ``overwrite``.
        data: ``dataset`` names the directory if ``output_dir`` is not given; the run may have folds.
        method: it names the directory as well.

    Raises:
        UserError: as in ``check_directory`` and ``shared_directory``.
    """
    directory = run.output_dir or shared_directory() or default_directory(data.dataset, method)
    if not is_helper():
        for place in (directory, *fold_directories(directory, data)):
            check_directory(place, run.resume, run.overwrite)
    return directory


def fold_directories(directory: Path, data: DataSettings) -> list[Path]:
    """The directories of the runs on the folds of ``--kfold``; none for other runs."""
    return [directory / FOLDS / str(number) for number in data.folds]


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
    check_writable(directory, "--output_dir ")
    if resume:
        return
    held = [name for name in RUN_FILES if (directory / name).exists()]
    has_run = holds_run(directory)
    if held and not has_run:
        damaged = f", or a run whose {SETTINGS} is damaged" if SETTINGS in held else ""
        raise UserError(f"{flag}: contains a {held[0]} from another program{damaged}: give another directory")
    if has_run and not overwrite and (other := holder(directory)) is not None:
        raise in_use(directory, other)
    if has_run and not overwrite:
        ways = "or --overwrite" if read_status(directory) == "finished" else "--resume or --overwrite"
        raise UserError(f"{flag}: already contains a run ({held[0]}): give another directory, {ways}")
    if not has_run and (inside := next(filter(holds_run, sorted(directory.glob("*/"))), None)):
        raise UserError(f"{flag}: contains other runs ({inside.name}): give a new directory inside it")


def holds_run(directory: Path) -> bool:
    """Whether the directory contains settings of a run. Other programs use the same file names."""
    try:
        return "output_dir" in read_settings(directory)
    except (OSError, ValueError):
        return False


def settings_to_run(given: dict[str, Any], defaults: dict[str, Any]) -> RunConfig | None:
    """The configuration for a command line. With ``--resume``, it comes from the run in ``--output_dir``.

    A SLURM job that was requeued has ``--resume auto``, perhaps with ``--overwrite``. It continues the run that it has
    begun, and replaces one that was there before.

    Returns:
        The configuration; ``None`` if ``--resume auto`` finds that the run has finished.

    Raises:
        UserError: the flags are refused, or contradict the run to continue, or a file of a finished one was changed.
    """
    if not (given.get("resume") and "output_dir" in given):
        return RunConfig.from_settings(**{**defaults, **given})
    directory, automatic = given["output_dir"], given["resume"] == AUTO
    if automatic and given.get("overwrite") and slurm_job() is not None:
        if not _begun_by_this_job(directory):
            return RunConfig.from_settings(**{**defaults, **given, "resume": False})
        given = given | {"overwrite": False}
    if automatic and not (directory / SETTINGS).exists():
        return RunConfig.from_settings(**{**defaults, **given}).changed(resume=False)
    if automatic and _status(directory) == "finished":
        resumed_config(_stored_settings(directory), given)  # refuses flags that contradict the run
        for name in SUMMED:
            check_unchanged(directory / name)
        if not is_helper():
            with suppress(UserError), DirectoryLock(directory):  # not if it is read-only, or another process does it
                forget_unneeded(directory)  # the process may have been killed between its last two steps
        return None
    return resumed_config(interrupted_settings(directory), given)


def _begun_by_this_job(directory: Path) -> bool:
    with suppress(OSError, ValueError):
        return bool(read_origin(directory)["job"] == slurm_job())
    return False


def interrupted_settings(directory: Path) -> dict[str, Any]:
    """The settings of the run that ``--resume`` continues.

    Raises:
        UserError: there is no run, the run has finished, or its settings or its result cannot be read.
    """
    flag = f"--resume: --output_dir {directory}"
    if not (directory / SETTINGS).exists():
        raise UserError(f"{flag} contains no run (no {SETTINGS}): leave out --resume to start one")
    if _status(directory) == "finished":
        raise UserError(f"{flag} contains a run that has finished: to replace it, give --overwrite without --resume")
    return _stored_settings(directory)


def _status(directory: Path) -> str | None:
    """Like ``read_status``, but a damaged result is refused, because it may be the one of a finished run."""
    try:
        return read_result(directory).get("status")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"--resume: --output_dir {directory}: {RESULT} cannot be read: {first_line(error)}: restore it, or"
            f" remove it if the run had not finished"
        ) from None


def _stored_settings(directory: Path) -> dict[str, Any]:
    with as_user_error(f"--resume: --output_dir {directory}: {SETTINGS} cannot be read", OSError, ValueError):
        return read_settings(directory)


def checkpoint_to_resume(directory: Path) -> Path | None:
    """The checkpoint with which a run continues; ``None``, and a line that says so, if it has to start over.

    A run that has only begun its folds has no checkpoint yet, but does not start over.
    """
    checkpoint = usable_checkpoint(directory)
    if checkpoint is None and not is_helper() and (has_checkpoint(directory) or not begun_folds(directory)):
        kind = "no intact checkpoint" if has_checkpoint(directory) else "no checkpoint yet"
        print(f"{directory} has {kind}: starting over", flush=True)
    return checkpoint


def begun_folds(directory: Path) -> list[Path]:
    """The directories of the folds that a run with ``--kfold`` has begun."""
    return [fold for fold in sorted((directory / FOLDS).glob("*/")) if holds_run(fold)]


def claimed_directory(
    directory: Path, settings: dict[str, Any], origin: dict[str, Any]
) -> tuple[DirectoryLock, Path | None]:
    """Locks the directory and opens it, see ``open_directory``. If the last process was killed, it says so.

    Another process may have written in the directory since the settings were read. So a run to continue is read again
    under the lock, and its checkpoint is chosen only now.

    Args:
        origin: what the run is made from, see ``write_settings``.

    Returns:
        The lock, and the checkpoint to continue from.

    Raises:
        UserError: a living process holds the directory, or the run in it has finished, is another one or was made
            from something else, or as ``open_directory``.
    """
    lock = DirectoryLock(directory, DEAD_NODE_SECONDS if was_requeued() else 0)
    checkpoint, resume = None, settings["resume"]
    try:
        if resume:
            if _status(directory) == "finished":
                raise UserError(f"--output_dir {directory}: meanwhile the run in it has finished: nothing to do")
            resumed_config(interrupted_settings(directory), settings)
            if lock.killed:
                print(f"{lock.killed} {KILLED}", flush=True)
            origin = origin | {"command": read_origin(directory).get("command")}
            checkpoint = checkpoint_to_resume(directory)
            if checkpoint is not None or begun_folds(directory):
                origin = _same_origin(directory, settings, origin)
            if checkpoint is None:
                settings = settings | START_OVER
        elif settings["overwrite"]:
            remove_folds(directory)
        open_directory(directory, settings, origin)
    except BaseException:
        lock.release()
        raise
    return lock, checkpoint


def _same_origin(directory: Path, settings: dict[str, Any], origin: dict[str, Any]) -> dict[str, Any]:
    """What the run in the directory was made from, if a run from ``origin`` may continue it.

    Raises:
        UserError: base model, adapter, data or number of processes are others. Other threads, or another precision that
            the machine decides, only give a warning.
    """
    stored = read_settings(directory)
    before = stored["devices"] * stored["num_nodes"]
    if settings["devices"] * settings["num_nodes"] != before:
        raise UserError(
            f"--devices {settings['devices']} --num_nodes {settings['num_nodes']}: the run in {directory} has {before}"
            f" processes, and --resume needs as many: their batches are cut for them"
        )
    for part in PARTS:
        check_origin(directory, part, origin[part])
    recorded = read_origin(directory)
    threads, now = recorded["threads"], origin["threads"]
    if None not in (threads, now) and threads != now:
        _warn_of_change(f"with {counted(threads, 'thread')}", f"with {now}", f" (set OMP_NUM_THREADS={threads})")
    precision, continues = recorded.get("precision"), origin.get("precision")  # earlier versions did not record it
    if precision is not None and precision != continues:
        _warn_of_change(f"in {precision}", f"in {continues}, which this machine has")
    return origin | recorded | {"folder": origin["folder"]}  # --data_dir may have been given anew


def _warn_of_change(began: str, continues: str, way: str = "") -> None:
    what = f"the run began {began} and continues {continues}"
    print(f"warning: {what}: results will not be bit-identical{way}", file=sys.stderr)


def check_origin(directory: Path, part: str, found: dict[str, str]) -> None:
    """Checks that a part of what a run was made from is still the same.

    Args:
        part: one of ``PARTS``.
        found: its hashes now, by name.

    Raises:
        UserError: it is not.
    """
    for name, digest in read_origin(directory)[part].items():
        if found.get(name) != digest:
            raise UserError(
                f"--resume: {name} of the {part.replace('_', ' ')} is not the one with which the run in {directory}"
                f" began: restore it or correct {PARTS[part]}, or start another run"
            )


def open_directory(directory: Path, settings: dict[str, Any], origin: dict[str, Any]) -> None:
    """Makes the directory and writes the settings into it. Hold its lock.

    Without ``resume``, it first removes an earlier run's files; else only the result of its earlier part and damaged
    checkpoints. What a killed process left half-written is removed as well.

    Raises:
        UserError: the directory cannot be written, or another run has started in it since the check.
    """
    resume, overwrite = settings["resume"], settings["overwrite"]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not (resume or overwrite) and (directory / SETTINGS).exists():
            raise UserError(f"--output_dir {directory}: another run has just started in it: give another one")
        for path in directory.glob(TEMPORARY):
            path.unlink(missing_ok=True)
        if resume:
            discard_damaged(directory)
            remove(directory / RESULT)  # of the part that was interrupted or failed: this part may be killed
        else:
            for name in sorted(RUN_FILES, key=lambda name: not (directory / name).is_dir()):  # folders may be refused
                if name != SETTINGS:  # the directory must still count as a run if this process is killed here
                    remove(directory / name)
        write_settings(directory, settings, origin)
    except OSError as error:
        raise _cannot_be_written(directory, error) from None


def remove_folds(directory: Path) -> None:
    """Removes the folds of an earlier run, or refuses if they cannot be removed. Hold the directory's lock."""
    try:
        for fold in begun_folds(directory):
            others = [*(name for name in RUN_FILES if name != SETTINGS), LOCK]  # the result first
            for path in (*(fold / name for name in others), *fold.glob(TEMPORARY), fold / SETTINGS):
                remove(path)  # the settings last: until then it counts as a run
            with suppress(OSError):  # other files in it stay
                fold.rmdir()
        with suppress(OSError):
            (directory / FOLDS).rmdir()
    except OSError as error:
        raise _cannot_be_written(directory, error) from None


def _cannot_be_written(directory: Path, error: OSError) -> UserError:
    return UserError(f"--output_dir {directory}: cannot be written: {first_line(error, name_file=True)}")
