"""The runs of a study on disk: where each one is, its state, and which settings its tuning chose.

``runs/STUDY/RUN/`` is the directory of a run. Next to it, ``RUN.log`` holds what the run printed. ``RUN.lock`` is never
removed: the process that does the run holds a lock on it. The run's own process inherits the lock, so the run still
counts as running if the study was killed. The system frees the lock when both processes have ended, however they end.
Nothing here imports torch.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from finetuning.comparison.changes import last_change, places_of, same_texts
from finetuning.comparison.drawn import RATE
from finetuning.comparison.packed import RUNS, Record, change_records, read_records
from finetuning.comparison.plan import PlannedRun, StudyPlan
from finetuning.config import NOT_PART_OF_THE_RUN, RunConfig
from finetuning.errors import UserError, as_user_error, first_line
from finetuning.flags import flag_words, from_flags
from finetuning.gpus import visible_cards
from finetuning.processor import cpu_name
from finetuning.runs.files import (
    BEST_CHECKPOINT,
    LAST_CHECKPOINT,
    NOT_FINITE,
    PREVIOUS_CHECKPOINT,
    RESULT,
    SETTINGS,
    read_result,
    read_settings,
    read_status,
    record_is_unchanged,
)
from finetuning.runs.lock import LOCK, claimed, is_held
from finetuning.settings import FLAGS, OF_ADAPTER
from finetuning.storage import TEMPORARY

QUICK = (RATE, "seed", "data_seed", "epochs", "limit_train")  # nearly all runs differ in one, and this is seen at once
CHECKPOINTS = (LAST_CHECKPOINT, PREVIOUS_CHECKPOINT, BEST_CHECKPOINT)


class TuningUnfinished(Exception):
    """A final run that cannot start yet, in one line."""


@dataclass(frozen=True)
class StudyRuns:
    """A study and the folder of its runs, ``runs/STUDY``.

    Args:
        data_dir: the folder with the data folders that the study names.
        collected: ``results/STUDY``; its records count if ``folder`` does not hold the run, so another machine may
            have done it.
    """

    study: StudyPlan
    folder: Path
    data_dir: Path | None = None
    collected: Path | None = None

    def directory(self, run: PlannedRun) -> Path:
        return self.folder / run.name

    def holds(self, run: PlannedRun) -> bool:
        """Whether the run has begun in its directory, so it is not only collected."""
        return os.access(self.directory(run) / SETTINGS, os.F_OK)

    def log(self, run: PlannedRun) -> Path:
        """The file with what the run printed."""
        return self.folder / f"{run.name}.log"

    def command_words(self, run: PlannedRun, script: Path) -> list[str]:
        """The run's command without ``python``; its paths are relative to the current folder."""
        own = flag_words({"output_dir": self.directory(run)})
        return [os.path.relpath(script), *run.flags(self.data_dir), *own]

    def check_flags(self) -> None:
        """Checks the flags of every run with the real ``--data_dir``, and that its data are there, before one starts.

        Raises:
            UserError: a run cannot start; the message names its row.
        """
        for run in self.study.runs:
            if self.data_dir is None and "data_dir" in run.settings:
                inside = f"row {run.row} reads the folder {run.settings['data_dir']} inside it"
                raise UserError(f"--data_dir: the study needs it: {inside}")
            with as_user_error(f"row {run.row}", UserError):
                config = from_flags(run.flags(self.data_dir))
                folder, nodes = config.data.data_dir, config.hardware.num_nodes
                if nodes > 1:  # nobody would start the processes of the others
                    raise UserError(f"its runs are on {nodes} nodes each: give them to sbatch without a study")
                if folder is not None and not folder.exists():
                    raise UserError(f"--data_dir {folder}: no such file or folder")

    def older_than_their_files(self) -> list[str]:
        """The runs here that read a file which was changed after they began."""
        change = cache(last_change)  # many runs read the same files
        found = []
        for run in filter(self.holds, self.study.runs):
            began = _began(self.directory(run))
            if any(change(*place) > began for place in places_of(run, self.data_dir)):
                found.append(run.name)
        return found

    @contextmanager
    def held(self, run: PlannedRun) -> Iterator[int | None]:
        """Holds the run's lock. Gives its file descriptor, or ``None`` if another process holds it."""
        with ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(claimed(self.folder / f"{run.name}.lock"))
            except OSError as error:
                how = "written" if error.filename else "locked"
                raise UserError(f"--runs_dir: {self.folder} cannot be {how}: {error.strerror}") from None
            yield lock

    def state(self, run: PlannedRun) -> str:
        """``running``, or what ``state_on_disk`` says."""
        with as_user_error(f"--runs_dir: {self.folder} cannot be used", OSError):
            held = is_held(self.folder / f"{run.name}.lock")
        return "running" if held else self.state_on_disk(run)

    def state_on_disk(self, run: PlannedRun) -> str:
        """``missing``, ``finished``, ``failed``, ``interrupted`` (or killed), ``changed`` (other settings or texts)."""
        if not self.holds(run):
            return self._record(run).get("status", "missing")
        if self.differences(run):
            return "changed"
        return read_status(self.directory(run)) or "interrupted"

    def result(self, run: PlannedRun) -> dict[str, Any]:
        """What ``result.json`` of a finished or failed run holds."""
        if not self.holds(run):
            return self._record(run)
        return read_result(self.directory(run))

    def _record(self, run: PlannedRun) -> dict[str, Any]:
        """The collected result of the run; empty if there is none with the same settings and data."""
        record = read_records(self.collected)[0].get(run.name) if self.collected else None
        return record.result if record and stands_for(run, record.result, own=True) else {}

    def differences(self, run: PlannedRun) -> list[str]:
        """Settings in which the run on disk differs from the plan, except paths and what is left to tuning or auto.

        Another ``--data_dir`` is a difference if it still exists and has other texts.
        A damaged result counts as well, because it may be the one of a finished run.
        """
        try:
            read_result(self.directory(run))
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            return [f"{RESULT} cannot be read: {first_line(error)}"]
        found = _stored_differences(run, self.directory(run), own=True)
        return found or self._other_texts(run)

    def _other_texts(self, run: PlannedRun) -> list[str]:
        """The ``--data_dir`` that the run has read, if it is still there and holds other texts than the planned one."""
        read, planned = read_settings(self.directory(run))["data_dir"], run.data_folder(self.data_dir)
        if read is None or planned is None or _same_texts(Path(read).resolve(), planned.resolve(), run.dataset):
            return []
        return [f"--data_dir {read} -> {planned}"]

    def place_in_study(self, run: PlannedRun) -> dict[str, Any]:
        """What a collected ``result.json`` says of the run under ``study``: its row, seed, stage and axes."""
        place = {
            "study": self.study.name, "question": self.study.question, "row": run.row, "run": run.name,
            "stage": run.stage, "seed": run.seed, "axes": run.axes, "reported": run.reported,
        }  # fmt: skip
        return place if "data_dir" in run.settings or run.data is None else place | {"data": run.data}

    def take_over(self, run: PlannedRun) -> Path | None:
        """Copies a finished run with the same settings and data from another study. Call it with the run's lock held.

        Nothing is copied if the plan leaves a setting to auto, because that run may have another value than auto. The
        precision is the same on processors of one kind.
        Data and a model whose files were changed after that run had begun are others. If the process is killed, the
        copy either does not exist or is complete.

        Returns:
            Where the run was found; ``None`` if no other study has it.
        """
        planned, places = run.data_folder(self.data_dir), places_of(run, self.data_dir)
        for source in self._same_runs(run):
            data = read_settings(source)["data_dir"]
            if (planned and planned.resolve()) != (data and Path(data).resolve()):
                continue
            if any(last_change(*place) > _began(source) for place in places):
                continue
            if not _has_precision_of_here(run, read_result(source)):
                continue
            half = self.folder / f".{run.name}.half"
            shutil.rmtree(half, ignore_errors=True)
            try:
                shutil.copytree(source, half, ignore=shutil.ignore_patterns(*CHECKPOINTS, ".*"))
            except OSError:  # its files still change, or the disk is full
                shutil.rmtree(half, ignore_errors=True)
                continue
            # A process that was killed early leaves a lock and half a file. What else is there is none of ours.
            for path in (self.directory(run) / LOCK, *self.directory(run).glob(TEMPORARY)):
                path.unlink(missing_ok=True)
            try:
                half.replace(self.directory(run))
            except OSError:
                shutil.rmtree(half)
                return None
            return source
        if any(kind in ("model", "adapter") for _, kind in places):  # a record does not say what these held
            return None
        return self._take_over_record(run)

    def _take_over_record(self, run: PlannedRun) -> Path | None:
        """Collects such a run of another study for this one as well.

        A record does not say where texts of the user's own were if only ``--data_dir`` says it; they may be others.
        """
        if run.settings.get("dataset") == "text" and "data_dir" not in run.settings:
            return None
        for source in self._records_of_all_studies():
            if source.result["status"] != "finished" or not stands_for(run, source.result):
                continue
            if not _has_precision_of_here(run, source.result):
                continue
            if run.reads_test and "test" not in source.result:  # it tuned there
                continue
            result = source.result | {"study": self.place_in_study(run)}
            if not run.reads_test:
                result.pop("test", None)
            own = source.folder.parent / self.study.name
            record = Record.made(own, result, source.metrics, source.predictions if run.reads_test else None)
            try:
                change_records(own, [record])
            except (OSError, UserError):  # --results cannot be written: the run is done here
                return None
            return source.path
        return None

    def _records_of_all_studies(self) -> Iterator[Record]:
        """What was collected of all studies, without damaged files."""
        for path in sorted(self.collected.parent.glob(f"*/{RUNS}")) if self.collected else ():
            with suppress(UserError):
                yield from read_records(path.parent)[0].values()

    def _same_runs(self, run: PlannedRun) -> Iterator[Path]:
        """Finished and undamaged runs with the same settings, in the folders of all studies."""
        for source in sorted(path.parent for path in self.folder.parent.glob(f"*/[!.]*/{RESULT}")):
            same = not _stored_differences(run, source) and read_status(source) == "finished"
            if same and record_is_unchanged(source):
                yield source

    # --- tuning

    def tuned(self, run: PlannedRun) -> PlannedRun:
        """The run with the best settings of its row, by ``--monitor`` on validation.

        Of equal ones the smaller learning rate, then the one that was tried first.

        Raises:
            TuningUnfinished: a run that tunes has neither finished nor diverged, or all of them have diverged.
        """
        if not run.tuned_by:
            return run
        scores: list[tuple[float, float, int, dict[str, Any]]] = []
        for number, tuning in enumerate(map(self.study.find, run.tuned_by)):
            state = self.state_on_disk(tuning)
            result = self.result(tuning) if state in ("finished", "failed") else {}
            if state == "finished":
                monitor = result["config"]["monitor"]
                score = result["validation"][monitor]
                rate = float(tuning.axes.get(RATE, 0.0))
                scores.append((-score if monitor == "loss" else score, -rate, -number, tuning.axes))
            elif not result.get("error", "").startswith(NOT_FINITE):  # a rate that is too large is an answer as well
                raise TuningUnfinished(f"its settings depend on {tuning.name}, which is {self.state(tuning)}")
        if not scores:
            raise TuningUnfinished(f"{NOT_FINITE} at any setting of {run.row}")
        return run.with_tuned(max(scores, key=lambda score: score[:3])[3])

    def tuned_if_possible(self, run: PlannedRun) -> PlannedRun:
        """The run with its tuned settings, or without them if its tuning has not finished."""
        try:
            return self.tuned(run)
        except TuningUnfinished:
            return run


_same_texts = cache(same_texts)  # the state of a run is asked for again and again


def _has_precision_of_here(run: PlannedRun, result: dict[str, Any]) -> bool:
    """Whether a run that has ended computed in the precision that the planned one has here, so far as this is known.

    ``auto`` depends on the processor, and on whether there is a GPU.
    """
    made_on = result.get("environment") or {}
    same = made_on.get("cpu") == cpu_name() and bool(made_on.get("gpus")) == bool(visible_cards())
    return same or run.settings.get("precision", "auto") != "auto"


def _began(run: Path) -> float:
    return (run / SETTINGS).stat().st_mtime


def stands_for(run: PlannedRun, result: dict[str, Any], own: bool = False) -> bool:
    """Whether a collected result is one with the run's settings and data. ``own`` as in ``_differences``."""
    same_data = result["config"]["data_dir"] == run.settings.get("data_dir")
    return same_data and not _differences(run, result["config"], own)


def _stored_differences(run: PlannedRun, directory: Path, own: bool = False) -> list[str]:
    """Like ``_differences``, for the settings in a run's directory."""
    try:
        return _differences(run, read_settings(directory), own)
    except (OSError, ValueError) as error:
        return [f"its settings cannot be used: {first_line(error)}"]


def _differences(run: PlannedRun, settings: dict[str, Any], own: bool) -> list[str]:
    """Settings of a run that differ from the plan.

    The path of its data does not count, nor does what the plan leaves to a tuning that has not finished. In the
    planned run's own result (``own``), what the plan leaves to auto or to an adapter does not count either. Of another
    run's settings, those of ``QUICK`` that differ are enough, and are all that is given.
    """
    seen = [name for name in QUICK if name in run.settings and settings.get(name) not in (None, run.settings[name])]
    if seen and not own:
        return seen
    tuned = {name: settings[name] for name in run.waits_for if name in settings}
    try:
        planned = from_flags(run.with_tuned(tuned).flags(Path()))
        stored = {key: value for key, value in settings.items() if key not in NOT_PART_OF_THE_RUN}
        made = RunConfig.from_dict(stored | {"data_dir": planned.data.data_dir})
        made = made.changed(test=made.run.test and planned.run.test)  # a test changes nothing in the training
        if own:
            found = OF_ADAPTER if run.settings.get("init_adapter") else ()
            left = [n for n, value in planned.to_dict().items() if value is None and (FLAGS[n].or_auto or n in found)]
            made = made.changed(**dict.fromkeys(left))
    except (ValueError, TypeError, KeyError, UserError) as error:
        return [f"its settings cannot be used: {first_line(error)}"]
    return planned.differences(made.to_dict())
