"""Runs the runs of a study, one after the other, each in a process of its own."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType

from finetuning.comparison.plan import RATE, PlannedRun
from finetuning.comparison.study_runs import StudyRuns, TuningUnfinished
from finetuning.errors import UserError
from finetuning.runs.checkpoints import has_checkpoint

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STOPPED = (130, *(-number for number in STOP_SIGNALS))  # exit status of a run that was asked to stop
POLL_SECONDS = 1.0


class StopSignals:
    """Passes Ctrl-C, SIGTERM and SIGUSR1 on to the current run, which then ends with a checkpoint.

    The run is in a process group of its own, so that a Ctrl-C in a terminal reaches it once, not twice.
    """

    def __init__(self) -> None:
        self.received = False
        self._unsent: list[int] = []
        self._child: subprocess.Popen[bytes] | None = None

    @contextmanager
    def listening(self) -> Iterator["StopSignals"]:
        """Receives the signals until the block ends."""
        earlier = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        self._unsent.append(number)
        self._pass_on()

    def _pass_on(self) -> None:
        while self._unsent and self._child is not None:
            self._child.send_signal(self._unsent.pop(0))

    def wait(self, child: subprocess.Popen[bytes]) -> int:
        """Waits for the child's exit status. A signal that came while the child was being started is passed on."""
        self._child = child
        try:
            self._pass_on()
            return child.wait()
        finally:
            self._child = None


def chosen_runs(runs: StudyRuns, stage: str, index: int | None = None) -> list[PlannedRun]:
    """The runs of a stage, or only the one with this number.

    Raises:
        UserError: there is no run with this number.
    """
    chosen = runs.study.stage(stage)
    if index is None:
        return chosen
    if not 0 <= index < len(chosen):
        raise UserError(f"--index {index}: must be from 0 to {len(chosen) - 1} with --stage {stage}")
    return chosen[index : index + 1]


class StudyExecution:
    """Runs what is missing of a study, and remembers how each run ended.

    Args:
        runs: the study's runs on disk.
        script: the path of ``finetune_lora.py``.
        chosen: the runs to do, in their order.
        retry_failed: whether failed runs are started over.
        stop: says whether the command was asked to stop.
    """

    def __init__(
        self, runs: StudyRuns, script: Path, chosen: list[PlannedRun], retry_failed: bool, stop: StopSignals
    ) -> None:
        self.runs = runs
        self.script = script
        self.chosen = chosen
        self.retry_failed = retry_failed
        self.stop = stop
        self.ended: dict[str, str] = {}  # run's name -> finished, failed
        self.seconds: dict[str, float] = {}  # run's name -> its time, if this process ran it

    def run_all(self) -> int:
        """Runs until every chosen run has ended; waits for runs that another process does.

        Returns:
            The exit status: 0 if all have finished, 1 if one has failed, 130 if the command was interrupted.
        """
        states = [self.runs.state(self.runs.tuned_if_possible(run)) for run in self.chosen]
        counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
        print(f"{self.runs.study.name}: {len(self.chosen)} runs, {counts}", flush=True)
        while waiting := [run for run in self.chosen if run.name not in self.ended]:
            before = len(self.ended)
            for run in waiting:
                if self.stop.received or not self.take_up(run):
                    print("interrupted: run the same command again to continue", file=sys.stderr)
                    return 130
            if len(self.ended) == before:  # other processes are doing the rest
                time.sleep(POLL_SECONDS)
        return int("failed" in self.ended.values())

    def take_up(self, run: PlannedRun) -> bool:
        """Does a run, unless it has ended, another process does it, or its tuning goes on. False if interrupted."""
        with self.runs.held(run) as lock:
            if lock is None or self.waits_for_tuning(run):
                return True
            try:
                planned = self.runs.tuned(run)
            except TuningUnfinished as reason:
                self.note_end(run, "failed", f"not started: {reason}")
                return True
            state = self.runs.state_on_disk(planned)
            if state == "missing" and (source := self.runs.take_over(planned)):
                self.note_end(run, "finished", f"finished: same settings as {source}, result reused")
            elif state == "changed":
                differences = ", ".join(self.runs.differences(planned))
                where = self.runs.directory(run)
                self.note_end(run, "failed", f"{where} has other settings ({differences}): remove it or rename the row")
            elif state == "failed" and not self.retry_failed:
                error = self.runs.result(run).get("error")
                self.note_end(run, "failed", f"failed earlier: {error} (run it again with --retry_failed)")
            elif state == "finished":
                self.ended[run.name] = "finished"
            else:
                return self.execute(planned, state, lock)
        return True

    def waits_for_tuning(self, run: PlannedRun) -> bool:
        """Whether a run that tunes this one's learning rate is still to be done here, or is running elsewhere."""
        tuning = [self.runs.study.find(name) for name in run.tuned_by]
        chosen = {other.name for other in self.chosen}
        return any(
            other.name not in self.ended if other.name in chosen else self.runs.state(other) == "running"
            for other in tuning
        )

    def execute(self, run: PlannedRun, state: str, lock: int) -> bool:
        """Does the run in a process of its own, which inherits the lock. False if it was interrupted."""
        flags = []
        if state != "missing":
            resumable = state == "interrupted" and has_checkpoint(self.runs.directory(run))
            flags = ["--resume" if resumable else "--overwrite"]
        log = self.runs.log(run)
        verb = "continued" if "--resume" in flags else "started"
        rate = f" with the tuned learning rate {run.settings[RATE]:g}" if run.tuned_by else ""
        print(f"{self.position_of(run)}  {verb}{rate}, see {log}", flush=True)
        began = time.monotonic()
        with log.open("ab") as output:
            words = [sys.executable, *self.runs.command_words(run, self.script), *flags]
            child = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0, pass_fds=[lock]
            )
            status = self.stop.wait(child)
        self.seconds[run.name] = time.monotonic() - began
        return self._note_result(run, status)

    def _note_result(self, run: PlannedRun, status: int) -> bool:
        """Notes how a run's process ended. False if it was interrupted."""
        took = timedelta(seconds=round(self.seconds[run.name]))
        state = self.runs.state_on_disk(run)
        if state == "finished":
            split = "test" if "test" in self.runs.result(run) else "validation"
            accuracy = self.runs.result(run)[split]["accuracy"]
            self.note_end(run, "finished", f"finished in {took}, {split} accuracy {accuracy:.2%}")
        elif status in STOPPED:
            print(f"{self.position_of(run)}  interrupted after {took}", flush=True)
            return False
        elif state == "failed" and status == 1:  # with another status the result is from an earlier attempt
            self.note_end(run, "failed", f"failed after {took}: {self.runs.result(run).get('error')}")
        else:
            reason = f"killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
            self.note_end(run, "failed", f"{reason} after {took}: {_last_line(self.runs.log(run))}")
        return True

    def position_of(self, run: PlannedRun) -> str:
        """The run's number among the chosen ones and its name, as each line of output begins."""
        number = [other.name for other in self.chosen].index(run.name) + 1
        return f"{number:>{len(str(len(self.chosen)))}}/{len(self.chosen)}  {run.name}"

    def note_end(self, run: PlannedRun, how: str, text: str) -> None:
        """Notes and prints how a run ended, and the time that the rest may take."""
        self.ended[run.name] = how
        left = self.seconds_left()
        shown = f", about {timedelta(seconds=round(left))} left" if left else ""
        print(f"{self.position_of(run)}  {text}{shown}", flush=True)

    def seconds_left(self) -> float | None:
        """An estimate: each run that has not ended takes the mean time of its stage. ``None`` if no time is known."""
        seconds: dict[str, list[float]] = {}
        for run in self.chosen:
            if self.ended.get(run.name) == "finished":
                took = self.seconds.get(run.name) or self.runs.result(run)["seconds"]
                seconds.setdefault(run.stage, []).append(took)
        known = [value for values in seconds.values() for value in values]
        rest = [run for run in self.chosen if run.name not in self.ended]
        if not known:
            return None
        return sum(sum(values) / len(values) for values in (seconds.get(run.stage, known) for run in rest))


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
