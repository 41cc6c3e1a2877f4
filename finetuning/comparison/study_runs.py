"""The runs of a study on disk: where each lies, in which state it is, who runs it, what its tuning chose; no torch.

``runs/STUDY/RUN/`` is a run's directory, ``RUN.log`` beside it what it printed, ``RUN.lock`` a file that is never
removed: whoever runs RUN holds a lock on it. The run's own process inherits the lock, so that a run whose study was
killed is still seen to be running; the system drops it when the last of the two has ended, however it ended.
"""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.comparison.plan import RATE, PlannedRun, StudyPlan
from finetuning.config import NOT_PART_OF_THE_RUN, RunConfig
from finetuning.errors import UserError, first_line
from finetuning.flags import from_flags
from finetuning.runs.files import (
    BEST_CHECKPOINT,
    LAST_CHECKPOINT,
    NOT_FINITE,
    PREDICTIONS,
    RESULT,
    read_result,
    read_settings,
    read_status,
    settings_file,
)
from finetuning.storage import write_json


class TuningUnfinished(Exception):
    """A final run that cannot start yet, in one line."""


@dataclass(frozen=True)
class StudyRuns:
    """A study and the folder of its runs, ``runs/STUDY``.

    Args:
        study: the study.
        folder: where its runs lie.
        data_dir: what lies above the data folders that the study names.
        collected: ``results/STUDY``, whose records stand for runs that ``folder`` does not hold: of another machine.
    """

    study: StudyPlan
    folder: Path
    data_dir: Path | None = None
    collected: Path | None = None

    def directory(self, run: PlannedRun) -> Path:
        return self.folder / run.name

    def holds(self, run: PlannedRun) -> bool:
        """Whether the run has begun in its directory, so that it is no collected one."""
        return settings_file(self.directory(run)) is not None

    def log(self, run: PlannedRun) -> Path:
        return self.folder / f"{run.name}.log"

    @contextmanager
    def held(self, run: PlannedRun) -> Iterator[int | None]:
        """Holds the run's lock; gives its file descriptor, or ``None`` where another process has it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / f"{run.name}.lock").open("a")
        except OSError as error:
            raise UserError(f"--runs_dir: {self.folder} cannot be written: {error.strerror}") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
            except OSError as error:
                raise UserError(f"--runs_dir: {file.name} cannot be locked: {error.strerror}") from None
            else:
                yield file.fileno()

    def state(self, run: PlannedRun) -> str:
        """``running``, or what ``state_on_disk`` says."""
        if not (self.folder / f"{run.name}.lock").exists():
            return self.state_on_disk(run)
        with self.held(run) as lock:
            return "running" if lock is None else self.state_on_disk(run)

    def state_on_disk(self, run: PlannedRun) -> str:
        """``missing``, ``finished``, ``failed``, ``interrupted`` (killed, too), or ``changed``: of other settings."""
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
        """The collected ``result.json`` of the run; empty where there is none of the same settings and data."""
        record = self.collected / run.name if self.collected else None
        if record is None or read_status(record) is None or _differences(run, record):
            return {}
        result = read_result(record)
        return result if result["config"]["data_dir"] == run.settings.get("data_dir") else {}

    def differences(self, run: PlannedRun) -> list[str]:
        """Settings in which the run on disk differs from the plan; not where its data lie, nor an open rate."""
        return _differences(run, self.directory(run))

    def place(self, run: PlannedRun) -> dict[str, Any]:
        """The run's place in the study, as a collected ``result.json`` holds it under ``study``."""
        return {
            "study": self.study.name, "question": self.study.question, "row": run.row, "run": run.name,
            "stage": run.stage, "seed": run.seed, "axes": run.axes, "reported": run.reported,
        }  # fmt: skip

    def take_over(self, run: PlannedRun) -> Path | None:
        """Makes a finished run of the same settings and data, of another study beside this one, this run.

        Returns where it was made, or ``None`` where there is none. To be called with the run held; killed, it has
        either not begun or is done.
        """
        planned = from_flags(run.flags(self.data_dir)).data.data_dir
        for made in self._alike(run, self.folder.parent):
            data = read_settings(made)["data_dir"]
            if (planned and planned.resolve()) != (data and Path(data).resolve()):
                continue
            half = self.folder / f".{run.name}.half"
            shutil.rmtree(half, ignore_errors=True)
            try:
                shutil.copytree(made, half, ignore=shutil.ignore_patterns(LAST_CHECKPOINT, BEST_CHECKPOINT, ".*"))
            except OSError:  # its process is still at work there
                continue
            half.replace(self.directory(run))
            return made
        return self._take_over_record(run)

    def _take_over_record(self, run: PlannedRun) -> Path | None:
        """The same with what was collected of another study."""
        if self.collected is None:
            return None
        for made in self._alike(run, self.collected.parent):
            result = read_result(made) | {"study": self.place(run)}
            if result["config"]["data_dir"] != run.settings.get("data_dir"):
                continue
            if run.stage == "final" and result["config"]["test"] and "test" not in result:  # tuned there: forget_test
                continue
            half, record = self.collected / f".{run.name}.half", self.collected / run.name
            shutil.rmtree(half, ignore_errors=True)
            shutil.copytree(made, half)
            if run.stage == "tune":
                forget_test(result, half)
            write_json(half / RESULT, result)
            shutil.rmtree(record, ignore_errors=True)  # one of other settings
            half.replace(record)
            return made
        return None

    def _alike(self, run: PlannedRun, folder: Path) -> Iterator[Path]:
        """Finished runs of the same settings, of all studies in a folder."""
        for made in sorted(path.parent for path in folder.glob(f"*/[!.]*/{RESULT}")):
            if read_status(made) == "finished" and not _differences(run, made):
                yield made

    # -----------------------------------------------------------------------------------------------------------------
    # tuning

    def tuned(self, run: PlannedRun) -> PlannedRun:
        """The run with the best learning rate of its row: by ``--monitor`` on validation; of equals, the smaller.

        Raises:
            TuningUnfinished: one of the runs that tune has neither finished nor diverged, or all have diverged.
        """
        if not run.tuned_by:
            return run
        scores: list[tuple[float, float]] = []
        for tuning in map(self.study.find, run.tuned_by):
            state = self.state_on_disk(tuning)
            result = self.result(tuning) if state in ("finished", "failed") else {}
            rate = float(tuning.settings[RATE])
            if state == "finished":
                monitor = result["config"]["monitor"]
                score = result["validation"][monitor]
                scores.append((-score if monitor == "loss" else score, -rate))
            elif not result.get("error", "").startswith(NOT_FINITE):  # a rate too large answers the tuning, too
                raise TuningUnfinished(f"its learning rate waits for {tuning.name}, which is {self.state(tuning)}")
        if not scores:
            raise TuningUnfinished(f"at every learning rate of {run.row} {NOT_FINITE}")
        return run.with_rate(-max(scores)[1])

    def tuned_if_possible(self, run: PlannedRun) -> PlannedRun:
        try:
            return self.tuned(run)
        except TuningUnfinished:
            return run


def forget_test(result: dict[str, Any], record: Path) -> None:
    """Takes the test out of the record of a run that tunes, and was tested for another study: it chooses nothing."""
    result.pop("test", None)
    (record / PREDICTIONS).unlink(missing_ok=True)


def _differences(run: PlannedRun, directory: Path) -> list[str]:
    """Settings in which a run on disk, or a collected one, differs from the plan.

    Where its data are does not count, nor does a learning rate that the plan leaves open.
    """
    planned = from_flags(run.flags(Path()))
    try:
        stored = {key: value for key, value in read_settings(directory).items() if key not in NOT_PART_OF_THE_RUN}
        made = RunConfig.from_dict(stored | {"data_dir": planned.data.data_dir})
        made = made.changed(test=made.run.test and planned.run.test)  # also tested: it was trained in the same way
        if RATE not in run.settings:
            made = made.changed(learning_rate=planned.training.learning_rate)
    except (OSError, ValueError, TypeError, KeyError, UserError) as error:
        return [f"its settings cannot be used: {first_line(error)}"]
    return planned.differences(made)
