"""Runs the runs of a study, one or several at once, each in a process of its own."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Generic, TypeVar

from finetuning.comparison.drawn import shown_settings
from finetuning.comparison.plan import PlannedRun
from finetuning.comparison.study_runs import StudyRuns, TuningUnfinished
from finetuning.errors import UserError, as_user_error, counted
from finetuning.forking import ForkedProcess, ForkServer, can_fork
from finetuning.gpus import VISIBLE, visible_cards
from finetuning.processes import STOP_SIGNALS, handled, spin_variables, stop_signals, usable_cores
from finetuning.runs.checkpoints import has_checkpoint

STOPPED = (130, *(-number for number in STOP_SIGNALS))  # exit status of a run that was asked to stop
LOOK_AGAIN_SECONDS = 1.0  # at runs that another process does
POLL_SECONDS = 0.02
# What every run imports before it trains. More would count as memory of the runs: scikit-learn would add 46 MiB.
PRELOADED = (
    "finetune_lora", "finetuning.materials", "finetuning.steps", "matplotlib.backends.backend_agg", "pyarrow.dataset",
    "transformers.models.bert.modeling_bert", "transformers.models.distilbert.modeling_distilbert", "watermark",
)  # fmt: skip

Process = subprocess.Popen[bytes] | ForkedProcess
CHOOSES_CARDS = frozenset({"--device", "--devices", "cpu"})  # cpu: of --accelerator


@dataclass(kw_only=True)
class CurrentRun:
    """A run whose process has been started."""

    child: Process
    claim: ExitStack  # closed when the run has ended
    began: float = field(default_factory=time.monotonic)


Run = TypeVar("Run", bound=CurrentRun)


class CurrentRuns(Generic[Run]):
    """The current runs. Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP are passed on to them; then they end with a checkpoint.

    Each run is in a process group of its own, so that a Ctrl-C in a terminal reaches it once, not twice.
    """

    def __init__(self) -> None:
        self._received: list[int] = []
        self._runs: list[Run] = []

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs)

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def stopping(self) -> bool:
        """Whether the command was asked to stop."""
        return bool(self._received)

    @contextmanager
    def listening(self) -> Iterator["CurrentRuns[Run]"]:
        """Receives the signals until the block ends. If an error ends it, the runs stop, which nobody would watch."""
        with handled(stop_signals(), self.receive):
            try:
                yield self
            except BaseException:
                self.receive(signal.SIGTERM)
                raise

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Stops all runs. A terminal that is closed is none of theirs, so its SIGHUP reaches them as SIGTERM."""
        number = signal.SIGTERM if number == signal.SIGHUP else number
        self._received.append(number)
        for run in self._runs:
            run.child.send_signal(number)

    def add(self, run: Run) -> None:
        """A run that was started. It gets the signals that came while it was being started."""
        self._runs.append(run)
        for number in self._received:
            run.child.send_signal(number)

    def ended(self, watch: Callable[[Run], None] = lambda _: None) -> Iterator[Run]:
        """Waits until a run has ended, a second at most. Each run that has is yielded, then its claim is closed."""
        until, ended = time.monotonic() + LOOK_AGAIN_SECONDS, list[Run]()
        while not ended and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
            for run in self._runs:
                watch(run)
            ended = [run for run in self._runs if run.child.poll() is not None]
        for run in ended:
            self._runs.remove(run)
            with run.claim:
                yield run


@dataclass
class StudyRun(CurrentRun):
    """A run of the study."""

    run: PlannedRun


def chosen_runs(runs: StudyRuns, stage: str, index: int | None = None) -> list[PlannedRun]:
    """The runs of a stage, or only the one with this number, refused if there is none."""
    chosen = runs.study.stage(stage)
    if index is None:
        return chosen
    if not chosen:
        raise UserError(f"--index {index}: the study has no runs of --stage {stage}")
    if not 0 <= index < len(chosen):
        raise UserError(f"--index {index}: must be from 0 to {len(chosen) - 1} with --stage {stage}")
    return chosen[index : index + 1]


class Starter:
    """Starts the processes of runs, as children of a server where that is possible.

    Args:
        script: the path of ``finetune_lora.py``.
        jobs: how many runs share the cores.
        fork: whether a server is worth its start.
    """

    def __init__(self, script: Path, jobs: int, fork: bool) -> None:
        self.script = script
        self.environment = dict(os.environ)
        if jobs > 1:
            self.environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // jobs)))
        self._cards = visible_cards() if jobs > 1 else []
        random.shuffle(self._cards)  # several commands on one machine begin with others
        self._on_cards: list[tuple[Process, str]] = []
        self._fork = fork and can_fork()
        self._spins: dict[str, str] = {}
        self._servers: dict[str, ForkServer] = {}  # OpenMP reads how long it spins when torch is imported

    def start(self, words: list[str], log: Path, lock: int, may_fork: bool, idle: bool) -> Process:
        """Starts a run.

        Args:
            words: the script and its flags.
            log: the file that its output is appended to.
            lock: a descriptor that it keeps open.
            may_fork: whether the run is one process.
            idle: whether no other run goes on, so that busy cores are those of others.

        Raises:
            UserError: the log cannot be written.
        """
        with as_user_error(f"{log} cannot be written", OSError):
            output = log.open("ab")
        with output, Path(os.devnull).open("rb") as nothing:
            if self._fork and may_fork:
                try:
                    return self._server(idle).start(words, (nothing.fileno(), output.fileno(), output.fileno()), [lock])
                except OSError:  # it cannot import what it needs; the run's own process says why
                    self._fork = False
            card = self._free_card(words)
            child = subprocess.Popen(
                [sys.executable, *words], stdin=nothing, stdout=output, stderr=output, env=self.environment | card,
                process_group=0, pass_fds=[lock],
            )  # fmt: skip
            self._on_cards += [(child, name) for name in card.values()]
            return child

    def _free_card(self, words: Sequence[str]) -> dict[str, str]:
        """The variable that gives a run the GPU with the fewest runs; none if there is one GPU, or flags choose."""
        if len(self._cards) < 2 or not CHOOSES_CARDS.isdisjoint(words):
            return {}
        self._on_cards = [(child, name) for child, name in self._on_cards if child.poll() is None]
        runs = Counter(name for _, name in self._on_cards)
        return {VISIBLE: min(self._cards, key=lambda name: runs[name])}

    def _server(self, idle: bool) -> ForkServer:
        if idle:
            self._spins = spin_variables()
        spins = "".join(self._spins.values())
        if spins not in self._servers:
            self._servers[spins] = ForkServer(self.script.parent, PRELOADED, self.environment | self._spins)
        return self._servers[spins]

    def __enter__(self) -> "Starter":
        return self

    def __exit__(self, *error: object) -> None:
        for server in self._servers.values():
            server.close()


@dataclass
class StudyExecution:
    """Runs what is missing of a study, and remembers how each run ended."""

    runs: StudyRuns
    script: Path  # ``finetune_lora.py``
    chosen: list[PlannedRun]  # the runs to do, in their order
    retry_failed: bool  # whether failed runs are started over
    current: CurrentRuns[StudyRun]
    jobs: int  # how many runs are done at once

    def __post_init__(self) -> None:
        self.starter = Starter(self.script, self.jobs, fork=len(self.chosen) > 1)
        self.ended: dict[str, str] = {}  # run's name -> finished, failed
        self.failed_before: dict[str, dict[str, Any]] = {}  # results of runs to retry: a newer one is another's retry
        self.seconds: dict[str, float] = {}  # run's name -> its time, as far as it was needed

    def run_all(self) -> int:
        """Runs until every chosen run has ended; waits for runs that another process does.

        Returns:
            The exit status: 0 if all have finished, 1 if one has failed, 130 if the command was interrupted.
        """
        planned = [self.runs.tuned_if_possible(run) for run in self.chosen]
        states = [self.runs.state(run) for run in planned]
        failed = (run for run, state in zip(planned, states, strict=True) if state == "failed" and self.retry_failed)
        self.failed_before = {run.name: self.runs.result(run) for run in failed}
        counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
        print(f"{self.runs.study.name}: {counted(len(self.chosen), 'run')}, {counts}", flush=True)
        with self.starter:
            while len(self.ended) < len(self.chosen):
                before = len(self.ended)
                for run in self.chosen:
                    if run.name not in self.ended and not self.current.stopping and len(self.current) < self.jobs:
                        self.take_up(run)
                if self.current.stopping and not self.current:
                    print("interrupted: run the same command again to continue", file=sys.stderr)
                    return 130
                if len(self.ended) == before:
                    self.wait()
        return int("failed" in self.ended.values())

    def take_up(self, run: PlannedRun) -> None:
        """Starts a run, unless it has ended, a process does it already, or its tuning goes on."""
        with ExitStack() as stack:
            lock = stack.enter_context(self.runs.held(run))
            if lock is None or self.waits_for_tuning(run):
                return
            try:
                planned = self.runs.tuned(run)
            except TuningUnfinished as reason:
                if self.finished_before_its_tuning_went(run):
                    self.ended[run.name] = "finished"
                else:
                    self.note_end(run, "failed", f"not started: {reason}")
                return
            state = self.runs.state_on_disk(planned)
            if state == "missing" and (source := self.runs.take_over(planned)):
                self.note_end(run, "finished", f"finished: same settings as {source}, result reused")
            elif state == "changed":
                differences = ", ".join(self.runs.differences(planned))
                where = self.runs.directory(run)
                instead = "remove it, rename the row or give another --runs_dir"
                self.note_end(run, "failed", f"{where} has other settings ({differences}): {instead}")
            elif state == "failed" and (result := self.runs.result(planned)) != self.failed_before.get(run.name):
                error = result.get("error")
                self.note_end(run, "failed", f"failed earlier: {error} (run it again with --retry_failed)")
            elif state == "finished":
                self.ended[run.name] = "finished"
            else:
                child = self.start(planned, state, lock)
                self.current.add(StudyRun(planned, child=child, claim=stack.pop_all()))

    def finished_before_its_tuning_went(self, run: PlannedRun) -> bool:
        """Whether a final run has finished with settings that its tuning tried, and some of that was removed since."""
        tuning = [self.runs.study.find(name) for name in run.tuned_by]
        if not {self.runs.state(other) for other in tuning} <= {"missing", "finished"}:
            return False
        return any(self.runs.state_on_disk(run.with_tuned(other.axes)) == "finished" for other in tuning)

    def waits_for_tuning(self, run: PlannedRun) -> bool:
        """Whether a run that tunes this one is still to be done here, or is running elsewhere."""
        tuning = [self.runs.study.find(name) for name in run.tuned_by]
        chosen = {other.name for other in self.chosen}
        return any(
            other.name not in self.ended if other.name in chosen else self.runs.state(other) == "running"
            for other in tuning
        )

    def start(self, run: PlannedRun, state: str, lock: int) -> Process:
        """Starts the run's process, which inherits the lock."""
        flags = []
        if state != "missing":
            resumable = state == "interrupted" and has_checkpoint(self.runs.directory(run))
            flags = ["--resume" if resumable else "--overwrite"]
        log = self.runs.log(run)
        verb = "continued" if "--resume" in flags else "started"
        tuned = {flag: run.settings[flag] for flag in run.tuned}
        chosen = f" with what tuning chose, {shown_settings(tuned)}" if tuned else ""
        words = [*self.runs.command_words(run, self.starter.script), *flags]
        alone = run.settings.get("devices", 1) == run.settings.get("num_nodes", 1) == 1
        with as_user_error("--runs_dir", UserError):
            process = self.starter.start(words, log, lock, may_fork=alone, idle=not self.current)
        print(f"{self.position_of(run)}  {verb}{chosen}, see {log}", flush=True)
        return process

    def wait(self) -> None:
        """Waits until a current run has ended, a second at most."""
        for current in self.current.ended():
            self.seconds[current.run.name] = time.monotonic() - current.began
            self._note_result(current.run, current.child.wait())

    def _note_result(self, run: PlannedRun, status: int) -> None:
        """Notes how a run's process ended. One that was asked to stop stops the others as well."""
        took = timedelta(seconds=round(self.seconds[run.name]))
        state = self.runs.state_on_disk(run)
        if state == "finished":
            result = self.runs.result(run)
            split = "test" if "test" in result else "validation"
            self.note_end(run, "finished", f"finished in {took}, {split} accuracy {result[split]['accuracy']:.2%}")
        elif status in STOPPED:
            print(f"{self.position_of(run)}  interrupted after {took}", flush=True)
            if not self.current.stopping:
                self.current.receive(signal.SIGTERM)
        elif state == "failed" and status == 1:  # with another status the result is from an earlier attempt
            self.note_end(run, "failed", f"failed after {took}: {self.runs.result(run).get('error')}")
        else:
            reason = f"killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
            self.note_end(run, "failed", f"{reason} after {took}: {last_line(self.runs.log(run))}")

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
                if run.name not in self.seconds:  # an earlier process ran it
                    self.seconds[run.name] = self.runs.result(run)["seconds"]
                seconds.setdefault(run.stage, []).append(self.seconds[run.name])
        known = [value for values in seconds.values() for value in values]
        rest = [run for run in self.chosen if run.name not in self.ended]
        if not known:
            return None
        means = (sum(values) / len(values) for values in (seconds.get(run.stage, known) for run in rest))
        return sum(means) / self.jobs


def last_line(log: Path) -> str:
    """The last line of a log that is not empty: why a run that wrote no result has ended."""
    return log.read_text(encoding="utf8", errors="replace").strip().rpartition("\n")[2].strip()
