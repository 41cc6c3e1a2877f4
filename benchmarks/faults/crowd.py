"""Several processes want the same: one cache, one run directory, one study."""

import importlib
import random
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.faults import runs
from benchmarks.faults.runs import Broken, Commands, Undisturbed, left_by, require, require_same
from benchmarks.tiny import write_study
from finetuning.runs.files import LAST_CHECKPOINT, SETTINGS

ROWS = """
[[rows]]
name = "lora"

[[rows]]
name = "selective"
method = "selective"
trainable_layers = 1
"""


def one_cache(commands: Commands, _generator: random.Random, directory: Path) -> str:
    """Eight runs at once on one empty cache."""
    whole = commands.whole("selective")[0]
    directory.mkdir()
    places = [directory / str(number) for number in range(8)]
    processes = [
        commands.start(commands.flags(run, "selective"), run.with_suffix(".log"), cache=directory / "cache")
        for run in places
    ]
    for process, run in zip(processes, places, strict=True):
        outcome = commands.ended(process, run.with_suffix(".log"))
        require(outcome.status == 0 and not outcome.lines, run.name, outcome)
        require_same(run, whole)
    return "all identical"


def one_directory(commands: Commands, _generator: random.Random, directory: Path) -> str:
    """Eight runs at once in one directory: one does it, the others are refused."""
    whole = commands.whole("selective")[0]
    logs = [directory.with_name(f"{directory.name}-{number}.log") for number in range(8)]
    words = [*commands.flags(directory, "selective"), "--resume", "auto"]
    processes = [commands.start(words, log) for log in logs]
    outcomes = [commands.ended(process, log) for process, log in zip(processes, logs, strict=True)]
    statuses = sorted(outcome.status for outcome in outcomes)
    for log in logs:
        log.unlink()
    said = ("another run has just started", "is being written by", "has finished: nothing to do")
    if not set(statuses) <= {0, 2} or sum(any(word in o.printed for word in said) for o in outcomes) != 7:
        raise Broken(f"statuses {statuses}")
    require_same(directory, whole)
    return "one did it, the others were refused"


@dataclass(frozen=True)
class Late:
    """The process waits just before it takes the run directory, until it is told to go on."""

    waiting: Path  # it makes this file
    go_on: Path  # it waits for this one

    def install(self, watched: tuple[str, ...]) -> None:
        """Wraps the function that takes the directory."""
        module: Any = importlib.import_module("finetuning.steps.claim")
        original = module.claimed_directory

        def late(*arguments: Any) -> Any:
            self.waiting.touch()
            while not self.go_on.exists():
                time.sleep(0.05)
            return original(*arguments)

        module.claimed_directory = late


def resumed_while_it_ends(commands: Commands, generator: random.Random, directory: Path) -> str:
    """A second ``--resume auto`` starts while a run trains, and takes its directory after the run has ended."""
    run, logs = directory / "run", [directory / "first.log", directory / "second.log"]
    directory.mkdir()
    words = [*commands.flags(run, "selective"), "--resume", "auto"]
    late = Late(directory / "waiting", directory / "go on")
    first = commands.start(words, logs[0])
    began = run / generator.choice([SETTINGS, LAST_CHECKPOINT])
    while first.exitcode is None and not began.exists():
        time.sleep(0.02)
    second = commands.start(words, logs[1], late)
    outcome = commands.ended(first, logs[0])
    require(outcome.status == 0, "the first", outcome)
    while second.exitcode is None and not late.waiting.exists():
        time.sleep(0.02)
    if not late.waiting.exists():  # it started after the end, or was refused before it
        raise Undisturbed
    left = {path.name: path.read_bytes() for path in run.iterdir()}
    late.go_on.touch()
    outcome = commands.ended(second, logs[1])
    said = "has finished: nothing to do" in outcome.printed
    require(runs.refused_in_one_line(outcome) if outcome.status else said, "the second", outcome)
    changed = sorted(path.name for path in run.iterdir() if left.pop(path.name, None) != path.read_bytes())
    require(not changed and not left, f"{', '.join([*changed, *left])} of the finished run changed", outcome)
    require_same(run, commands.whole("selective")[0])
    return f"status {outcome.status}, the finished run is as it was"


def study_words(commands: Commands, directory: Path) -> list[str]:
    """The study of two runs in a directory, and where its runs and data are; the flags of ``compare_methods.py``."""
    directory.mkdir(parents=True, exist_ok=True)
    study = directory / "crowd.toml"
    write_study(study, commands.model, ROWS)
    return [str(study), "--data_dir", str(commands.data), "--runs_dir", str(directory / "runs")]


def processes_of_study(commands: Commands, words: list[str], count: int) -> list[subprocess.Popen[str]]:
    """Starts ``compare_methods.py run`` several times."""
    return [commands.popen(["compare_methods.py", "run", *words]) for _ in range(count)]


def finished_study(commands: Commands) -> Path:
    """A directory with the study and its two finished runs, made once."""
    directory = commands.folder / "study"
    if not (directory / "done").exists():
        (process,) = processes_of_study(commands, study_words(commands, directory), 1)
        printed = process.communicate()[0]
        if process.returncode:
            raise Broken(f"the undisturbed study failed: {printed[-500:]}")
        (directory / "done").touch()
    return directory


def one_study(commands: Commands, _generator: random.Random, directory: Path) -> str:
    """Eight ``compare_methods.py run`` on one study: all end, and each run is done once."""
    expected = finished_study(commands) / "runs" / "crowd"
    processes = processes_of_study(commands, study_words(commands, directory), 8)
    printed = "".join(process.communicate()[0] for process in processes)
    statuses = [process.returncode for process in processes]
    if any(statuses):
        raise Broken(f"statuses {statuses}: {printed[-300:]}")
    for name in sorted(path.name for path in expected.iterdir() if path.is_dir()):
        starts = printed.count(f"{name}  started") + printed.count(f"{name}  continued")
        if starts != 1:
            raise Broken(f"{name} was started {starts} times")
        if left_by(directory / "runs" / "crowd" / name) != left_by(expected / name):
            raise Broken(f"{name} differs")
    return "all ended, each run done once"
