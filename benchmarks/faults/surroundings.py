"""What a run stands on fails or is unusual: its disk is full, its environment is not the usual one."""

import contextlib
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults import runs
from benchmarks.faults.runs import Commands, Signals, Undisturbed, continued, number_of, require, require_same
from finetuning import storage
from finetuning.runs.checkpoints import has_checkpoint
from finetuning.runs.files import (
    ADAPTER,
    ADAPTER_CONFIG,
    BEST_CHECKPOINT,
    CURVE,
    LAST_CHECKPOINT,
    METRICS,
    PREDICTIONS,
    REPORT,
    RESULT,
    SETTINGS,
    TRAINED_WEIGHTS,
)
from finetuning.runs.lock import LOCK

TOKENS = ".npz"
ONCE = (LOCK, SETTINGS, TOKENS, ADAPTER, ADAPTER_CONFIG, TRAINED_WEIGHTS, CURVE, PREDICTIONS, RESULT, REPORT)
BEFORE_THE_RUN = (LOCK, SETTINGS, TOKENS)  # without them it has not begun: refused, like any input, with status 2
OFTEN = (LAST_CHECKPOINT, BEST_CHECKPOINT, METRICS)  # these are also tried at a later write
EACH_FILE = tuple((name, write) for name in (*ONCE, *OFTEN) for write in ((1, 1) if name in ONCE else (1, 2)))


def needs_root() -> str | None:
    """Why file systems cannot be mounted here."""
    return None if os.geteuid() == 0 else "needs root"


@dataclass(frozen=True)
class FullDisk:
    """The disk becomes full just before the n-th write of a file, when none of its bytes are written."""

    name: str  # a part of the file's name
    write: int
    filler: Path

    def install(self, watched: tuple[str, ...]) -> None:
        """Watches the one function that writes all files but the lock. Some are written by C++ or Rust."""
        original, writes = storage.write_atomically, 0

        def write_atomically(path: Path, write: Callable[[Path], object], keep: Path | None = None) -> None:
            nonlocal writes
            writes += self.name in path.name
            if self.name in path.name and writes == self.write:
                fill(self.filler)
            original(path, write, keep)

        for name, module in list(sys.modules.items()):
            if name.startswith("finetuning.") and hasattr(module, original.__name__):
                setattr(module, original.__name__, write_atomically)

        def fill_before_the_lock(_number: int, event: str, path: str) -> None:
            if event == "open" and Path(path).name == self.name and not self.filler.exists():
                fill(self.filler)

        if self.name == LOCK:
            runs.on_file_operations(watched, fill_before_the_lock)


def fill(filler: Path) -> None:
    """Takes all that is left on a disk."""
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 10, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"0" * size)


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[None]:
    """A file system in memory. Needs root."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def disk_full(commands: Commands, _generator: random.Random, directory: Path) -> str:
    """The disk of the run and its cache becomes full when a file is written; then space is freed."""
    name, write = EACH_FILE[number_of(directory) % len(EACH_FILE)]
    method = "full" if name == TRAINED_WEIGHTS else "lora"
    whole, _, _ = commands.whole(method)
    filler, cache, run = directory / "filler", directory / "cache", directory / "run"
    with small_disk(directory, "size=100m"):
        words = commands.flags(run, method)
        outcome = commands.run(words, FullDisk(name, write, filler), cache)
        require(filler.exists(), f"{name} was not written", outcome)
        status = 2 if name in BEFORE_THE_RUN else 0 if name == REPORT else 1  # the run stands without its report
        require(outcome.status == status, f"no room for {name}", outcome)
        require(len(outcome.lines) == 1 and "space" in outcome.lines[0], f"no room for {name}", outcome)
        require(status != 2 or not any(run.glob("*")), f"no room for {name}, something left", outcome)
        filler.unlink()
        last, how = continued(
            has_checkpoint(run), outcome, lambda: commands.run([*words, "--resume", "auto"], cache=cache)
        )
        require(last.status == 0, f"after there was no room for {name}", last)
        require_same(run, whole)
    return f"status {status}, {how}, identical"


# --- environment


@dataclass(frozen=True)
class Environment:
    """Variables (an empty one is unset), and a command that starts the run."""

    variables: dict[str, str]
    prefix: tuple[str, ...] = ()


ENVIRONMENTS = {
    "umask 077": Environment({}, ("sh", "-c", 'umask 077; exec "$0" "$@"')),
    "HOME unset": Environment({"HOME": ""}),
    "TMPDIR gone": Environment({"TMPDIR": "/nonexistent/tmp"}),
    "locale C": Environment({"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": ""}),
    "ASCII output": Environment({"PYTHONIOENCODING": "ascii"}),
    "spaces and umlauts": Environment({}),
    "read-only home": Environment({"HOME": "HOME"}),
    "read-only home and cache": Environment({"HOME": "HOME", "FINETUNE_LORA_CACHE": ""}),
}


def environment(commands: Commands, _generator: random.Random, directory: Path) -> str:
    """An unusual environment; the trials take them in turn."""
    name = list(ENVIRONMENTS)[number_of(directory) % len(ENVIRONMENTS)]
    chosen = ENVIRONMENTS[name]
    whole, _, _ = commands.whole("selective")
    run = directory / ("läuft gut" if name in ("ASCII output", "spaces and umlauts") else "run")
    words = [*commands.flags(run, "selective"), "--resume", "auto"]
    with contextlib.ExitStack() as stack:
        variables = dict(chosen.variables)
        if "HOME" in name or "home" in name:
            variables["HOME"] = variables["HOME"] and str(directory / "home")
        if "home" in name:
            stack.enter_context(small_disk(directory / "home", "ro"))
        outcome = commands.fresh(words, variables, chosen.prefix)
    if name == "read-only home and cache":
        require(runs.refused_in_one_line(outcome) and "FINETUNE_LORA_CACHE" in outcome.lines[-1], name, outcome)
        return "one line"
    require(outcome.status == 0, name, outcome)
    require(not outcome.lines, name, outcome)
    require_same(run, whole)
    return "identical"


def needs_faketime() -> str | None:
    """Why the clock cannot be set back here."""
    return None if shutil.which("faketime") else "no faketime"


def clock_set_back(commands: Commands, generator: random.Random, directory: Path) -> str:
    """A run is killed, and goes on at a time before it began."""
    whole, ended, _ = commands.whole("selective")
    words = commands.flags(directory, "selective")
    moment = Signals(operation=generator.randint(ended.operations // 3, ended.operations))
    outcome = commands.run(words, moment)
    if outcome.status == 0:
        raise Undisturbed
    clock = {"FAKETIME_DONT_FAKE_MONOTONIC": "1"}, ("faketime", "-f", "-400d")
    last, how = continued(
        has_checkpoint(directory), outcome, lambda: commands.fresh([*words, "--resume", "auto"], *clock)
    )
    require(last.status == 0 and not last.lines, "clock set back", last)
    require_same(directory, whole)
    return f"{how}, identical"
