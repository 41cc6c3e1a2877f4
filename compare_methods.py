"""Compares methods: runs the runs of a study, tells their state, collects them; see ``--help`` or README.md.

Exit status: 0 all is done, 1 a run has failed, 2 input refused, 130 interrupted.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from finetuning.comparison.plan import RATE, STAGES, PlannedRun, read_plan
from finetuning.comparison.study_runs import StudyRuns, TuningUnfinished, forget_test
from finetuning.errors import UserError, not_installed
from finetuning.flags import OneLineParser, from_flags
from finetuning.runs.files import LAST_CHECKPOINT, METRICS, PLANNED, PREDICTIONS, RESULT
from finetuning.storage import write_atomically, write_json

ROOT = Path(__file__).resolve().parent
DESCRIPTION = "Run a study, a TOML of runs that answer one question, and collect what came out."
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STOPPED = (130, *(-number for number in STOP_SIGNALS))  # how a run ends that was asked to, before or after its set-up
POLL_SECONDS = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == ["report"]:
            return report(words[1:])
        options = make_parser().parse_args(words)
        if options.data_dir is not None and not (os.access(options.data_dir, os.R_OK) and options.data_dir.is_dir()):
            raise UserError(f"--data_dir {options.data_dir}: no such folder")
        study = read_plan(options.study)
        results = getattr(options, "results", None)  # count needs none
        runs = StudyRuns(study, options.runs_dir / study.name, options.data_dir, results and results / study.name)
        return {"run": run_study, "count": count, "list": list_runs, "collect": collect}[options.command](runs, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(not_installed(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def make_parser() -> argparse.ArgumentParser:
    """The parser of the subcommands."""
    study = OneLineParser(add_help=False)
    study.add_argument(
        "study", type=Path, metavar="STUDY.toml", help="the study, see studies/ and finetuning/comparison/plan.py"
    )
    study.add_argument("--runs_dir", type=Path, default=Path("runs"), metavar="PATH", help="where runs lie (runs)")
    study.add_argument(
        "--data_dir", type=Path, metavar="PATH", help="folder above the data folders that the study names"
    )
    study.add_argument("--stage", choices=STAGES, default="all", help="only runs that tune, or only final ones (all)")
    parser = OneLineParser(description=DESCRIPTION, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=OneLineParser)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[study], allow_abbrev=False)

    run = command("run", "Run what is missing; continue what was interrupted.")
    run.add_argument("--index", type=int, metavar="N", help="only run number N of --stage, from 0, for job arrays")
    run.add_argument("--retry_failed", action="store_true", help="start failed runs over")
    command("count", "Print the number of runs.")
    listed = command("list", "Print each run's number, state and command.")
    for reader in (run, listed):
        reader.add_argument(
            "--results", type=Path, metavar="PATH", help="folder of collected runs, which count as done (none)"
        )
    collected = command("collect", "Copy what the report needs of each run that has ended.")
    collected.add_argument(
        "--results", type=Path, default=Path("results"), metavar="PATH", help="where it is copied to (results)"
    )
    commands.add_parser("report", help="Make tables, plots and pages of what was collected.", add_help=False)
    return parser


def count(runs: StudyRuns, options: argparse.Namespace) -> int:
    """Prints how many runs the stage has, as a job array needs it."""
    print(len(runs.study.stage(options.stage)))
    return 0


def list_runs(runs: StudyRuns, options: argparse.Namespace) -> int:
    """Prints a line for each run: its number, state, name and command."""
    check_commands(runs)
    with suppress(BrokenPipeError):  # of `| head`
        for number, run in enumerate(runs.study.stage(options.stage)):
            planned = runs.tuned_if_possible(run)
            waits = planned.tuned_by and RATE not in planned.settings
            words = shlex.join(["python", *command_words(runs, planned)]) + (f" --{RATE} TUNED" if waits else "")
            print(f"{number:>4}  {runs.state(planned):<11}  {run.name}  {words}", flush=True)
    return 0


def report(words: list[str]) -> int:
    """Tables, plots and pages from ``results/``."""
    from finetuning.comparison.report import main as report_main

    return report_main(words, "compare_methods.py report")


def command_words(runs: StudyRuns, run: PlannedRun) -> list[str]:
    """The run's command, without ``python``; it names the files as seen from the current folder."""
    entry = os.path.relpath(ROOT / "finetune_lora.py")
    return [entry, *run.flags(runs.data_dir), "--output_dir", str(runs.directory(run))]


def check_commands(runs: StudyRuns) -> None:
    """Refuses a study that lacks a ``--data_dir``, before anything runs."""
    for run in runs.study.runs:
        try:
            from_flags(run.flags(runs.data_dir))
        except UserError as error:
            raise UserError(f"row {run.row}: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# running


class Stop:
    """Passes Ctrl-C, SIGTERM and SIGUSR1 on to the run of the moment, which ends with a checkpoint.

    The run stands in a process group of its own, so that a Ctrl-C in a terminal reaches it once.
    """

    def __init__(self) -> None:
        self.asked = False
        self._unsent: list[int] = []
        self._child: subprocess.Popen[bytes] | None = None

    @contextmanager
    def listening(self) -> Iterator["Stop"]:
        earlier = {number: signal.signal(number, self._ask) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._unsent.append(number)
        self._send()

    def _send(self) -> None:
        while self._unsent and self._child is not None:
            self._child.send_signal(self._unsent.pop(0))

    def wait(self, child: subprocess.Popen[bytes]) -> int:
        """Waits for the child's exit status; a signal that came while it was being started is passed on first."""
        self._child = child
        try:
            self._send()
            return child.wait()
        finally:
            self._child = None


def run_study(runs: StudyRuns, options: argparse.Namespace) -> int:
    """Runs what is missing, one after the other; waits for runs that another process has. Returns the exit status."""
    check_commands(runs)
    chosen = runs.study.stage(options.stage)
    if options.index is not None:
        if not 0 <= options.index < len(chosen):
            raise UserError(
                f"--index {options.index}: the study has runs 0 to {len(chosen) - 1} (--stage {options.stage})"
            )
        chosen = chosen[options.index : options.index + 1]
    with Stop().listening() as stop:
        return Work(runs, chosen, options.retry_failed, stop).work()


class Work:
    """What one ``run`` command has to do, and what has become of it.

    Args:
        runs: the study's runs on disk.
        chosen: those that are asked for, in their order.
        retry_failed: whether failed runs are started over.
        stop: tells whether the command was asked to stop.
    """

    def __init__(self, runs: StudyRuns, chosen: list[PlannedRun], retry_failed: bool, stop: Stop) -> None:
        self.runs = runs
        self.chosen = chosen
        self.retry_failed = retry_failed
        self.stop = stop
        self.ended: dict[str, str] = {}  # name -> finished, failed
        self.took: dict[str, float] = {}  # name -> seconds, of those that ran here

    def work(self) -> int:
        """Goes through the runs until each has ended. Returns the exit status."""
        states = [self.runs.state(self.runs.tuned_if_possible(run)) for run in self.chosen]
        counted = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
        print(f"{self.runs.study.name}: {len(self.chosen)} runs, {counted}", flush=True)
        while waiting := [run for run in self.chosen if run.name not in self.ended]:
            before = len(self.ended)
            for run in waiting:
                if self.stop.asked or not self.attend(run):
                    print("interrupted; the same command goes on from here", file=sys.stderr)
                    return 130
            if len(self.ended) == before:  # the rest is in other hands
                time.sleep(POLL_SECONDS)
        return int("failed" in self.ended.values())

    def attend(self, run: PlannedRun) -> bool:
        """Runs a run, or finds that it has ended or is in other hands. False where it was interrupted."""
        with self.runs.held(run) as lock:
            if lock is None:
                return True
            if self.tuning_goes_on(run):
                return True
            try:
                planned = self.runs.tuned(run)
            except TuningUnfinished as reason:
                self.end(run, "failed", f"not started: {reason}")
                return True
            state = self.runs.state_on_disk(planned)
            if state == "missing" and (made := self.runs.take_over(planned)):
                self.end(run, "finished", f"taken over from {made}, which has the same settings")
                return True
            if state == "changed":
                what = ", ".join(self.runs.differences(planned))
                place = self.runs.directory(run)
                self.end(run, "failed", f"{place} holds a run of other settings ({what}): remove it, or rename the row")
            elif state == "failed" and not self.retry_failed:
                self.end(run, "failed", f"failed before: {self.runs.result(run).get('error')} (--retry_failed)")
            elif state == "finished":
                self.ended[run.name] = "finished"
            else:
                return self.execute(planned, state, lock)
        return True

    def tuning_goes_on(self, run: PlannedRun) -> bool:
        """Whether a run that tunes this one is still to be done here, or is running elsewhere."""
        tuning = [self.runs.study.find(name) for name in run.tuned_by]
        chosen = {other.name for other in self.chosen}
        return any(
            other.name not in self.ended if other.name in chosen else self.runs.state(other) == "running"
            for other in tuning
        )

    def execute(self, run: PlannedRun, state: str, lock: int) -> bool:
        """Runs the run in a process of its own, which inherits the lock. False where it was interrupted."""
        flags = []
        if state != "missing":
            resumable = state == "interrupted" and (self.runs.directory(run) / LAST_CHECKPOINT).exists()
            flags = ["--resume" if resumable else "--overwrite"]
        log = self.runs.log(run)
        rate = f", learning rate {run.settings[RATE]:g} by tuning" if run.tuned_by else ""
        print(f"{self.place(run)}  {'continued' if '--resume' in flags else 'started'}{rate}, see {log}", flush=True)
        began = time.monotonic()
        with log.open("ab") as output:
            words = [sys.executable, *command_words(self.runs, run), *flags]
            child = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0, pass_fds=[lock]
            )
            status = self.stop.wait(child)
        self.took[run.name] = time.monotonic() - began
        took = timedelta(seconds=round(self.took[run.name]))
        after = self.runs.state_on_disk(run)
        if after == "finished":
            split = "test" if "test" in self.runs.result(run) else "validation"
            accuracy = self.runs.result(run)[split]["accuracy"]
            self.end(run, "finished", f"finished in {took}, {split} accuracy {accuracy:.2%}")
        elif status in STOPPED:
            print(f"{self.place(run)}  interrupted after {took}", flush=True)
            return False
        elif after == "failed" and status == 1:  # else that result is an earlier one
            self.end(run, "failed", f"failed after {took}: {self.runs.result(run).get('error')}")
        else:
            lines = log.read_text(encoding="utf8", errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "")
            what = f"killed by signal {-status}" if status < 0 else f"ended with status {status}"
            self.end(run, "failed", f"{what} after {took}: {last}")
        return True

    def place(self, run: PlannedRun) -> str:
        number = [other.name for other in self.chosen].index(run.name) + 1
        return f"{number:>{len(str(len(self.chosen)))}}/{len(self.chosen)}  {run.name}"

    def end(self, run: PlannedRun, how: str, text: str) -> None:
        """Notes and prints how a run ended, with the time that the rest may take."""
        self.ended[run.name] = how
        left = self.seconds_left()
        shown = f", about {timedelta(seconds=round(left))} left" if left else ""
        print(f"{self.place(run)}  {text}{shown}", flush=True)

    def seconds_left(self) -> float | None:
        """For runs that have not ended, the mean of those of their stage that have; ``None`` while there is none."""
        seconds: dict[str, list[float]] = {}
        for run in self.chosen:
            if self.ended.get(run.name) == "finished":
                took = self.took.get(run.name) or self.runs.result(run)["seconds"]
                seconds.setdefault(run.stage, []).append(took)
        known = [value for values in seconds.values() for value in values]
        rest = [run for run in self.chosen if run.name not in self.ended]
        if not known:
            return None
        return sum(sum(values) / len(values) for values in (seconds.get(run.stage, known) for run in rest))


# ---------------------------------------------------------------------------------------------------------------------
# collecting


def collect(runs: StudyRuns, options: argparse.Namespace) -> int:
    """Copies a compact record of every finished or failed run into ``results/STUDY/RUN``; names those that lack."""
    kept = {"finished": 0, "failed": 0}
    target = options.results / runs.study.name
    chosen = runs.study.stage(options.stage)
    for run in map(runs.tuned_if_possible, chosen):
        state = runs.state(run)
        if state in kept:
            if runs.holds(run):  # else collected on another machine
                copy_record(runs, run, target / run.name)
            kept[state] += 1
        else:
            print(f"not collected: {run.name} is {state}", file=sys.stderr)
    if any(kept.values()):
        write_json(target / PLANNED, {"final": [run.name for run in runs.study.stage("final")]})
    print(f"{target}: {kept['finished']} finished and {kept['failed']} failed of {len(chosen)} runs")
    return 0


def copy_record(runs: StudyRuns, run: PlannedRun, target: Path) -> None:
    """Writes ``result.json`` with the run's place in the study, ``metrics.csv``, and the test's predictions."""
    from finetuning.comparison.tables import shown_command

    source, result = runs.directory(run), runs.result(run)
    result["study"] = runs.place(run)
    # places of one machine stay there
    result["command"] = shown_command(result["command"])
    result["config"] |= {"data_dir": run.settings.get("data_dir"), "output_dir": None}
    result.pop("traceback", None)
    if run.stage == "tune":
        forget_test(result, target)
    target.mkdir(parents=True, exist_ok=True)
    if (source / METRICS).exists():
        metrics = (source / METRICS).read_bytes()
        write_atomically(target / METRICS, lambda temporary: temporary.write_bytes(metrics))
    if result["status"] == "finished" and "test" in result:
        predictions = test_predictions(source / PREDICTIONS)
        write_atomically(target / PREDICTIONS, lambda temporary: write_small(predictions, temporary))
    else:
        (target / PREDICTIONS).unlink(missing_ok=True)
    write_json(target / RESULT, result)  # last: whoever finds it finds the rest


def test_predictions(path: Path) -> Any:
    """Columns ``row`` (int32), ``label`` and ``predicted`` (int8, or int16 for many classes), by row of the test."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path, filters=[("split", "=", "test")]).sort_by("row")
    logits = np.array(table["logits"].to_pylist())  # (n, classes)
    small = np.int8 if logits.shape[1] <= 127 else np.int16
    return pa.table(
        {
            "row": table["row"].to_numpy().astype(np.int32),
            "label": table["label"].to_numpy().astype(small),
            "predicted": logits.argmax(axis=1).astype(small),
        }
    )


def write_small(table: Any, path: Path) -> None:
    """Parquet as small as it gets: rows as differences, classes as they are, zstd."""
    import pyarrow.parquet as pq

    encodings = {"row": "DELTA_BINARY_PACKED", "label": "PLAIN", "predicted": "PLAIN"}
    pq.write_table(
        table, path, compression="zstd", compression_level=19, use_dictionary=False, column_encoding=encodings
    )


if __name__ == "__main__":
    sys.exit(main())
