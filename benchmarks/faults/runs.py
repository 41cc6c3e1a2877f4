"""What the campaign disturbs: the suite's commands on a tiny model, and checks of what they leave.

A server process imports the libraries once, and each run is a fork of it.
"""

import contextlib
import gc
import io
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from finetuning.models.int8_products import refused
from finetuning.runs.files import REPORT, read_result

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = (
    "finetune_lora", "predict", "export_model", "lightning.pytorch", "transformers", "peft", "bitsandbytes",
    "pyarrow.parquet", "watermark", "matplotlib.pyplot", "finetuning.steps", "matplotlib.backends.backend_agg",
    "finetuning.comparison.baselines",
)  # fmt: skip
METHODS = {
    "lora": ("--lora_dropout", "0.1", "--dropout", "0.1", "--accumulate", "2"),
    "qlora": ("--q_lora",),
    "full": ("--method", "full", "--dropout", "0.1", "--patience", "1", "--learning_rate", "0.0003"),
    "selective": ("--method", "selective", "--trainable_layers", "1"),
    "head": ("--method", "selective", "--trainable_layers", "0", "--frozen_cache_gb", "1e-9"),  # outputs in a file
}
if refused() is None:
    METHODS["int8"] = ("--lora_dropout", "0.1", "--precision", "int8")
LIMIT_SECONDS = 300.0
BATCH = re.compile(r"^epoch (\d+)/\d+  batch (\d+)/(\d+)  ", re.MULTILINE)  # a line of progress
REPEATED = 8  # batches, at most: a checkpoint every 4 steps, each of two batches at most
FILE_OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir")  # names of Python's audit events


class Broken(AssertionError):
    """What a trial found that must not be, in one line."""


class Undisturbed(Exception):
    """A trial whose fault came too early or too late, or was too small, to disturb anything: it is drawn again."""


class Disturbance(Protocol):
    """Something that a run's process does to itself."""

    def install(self, watched: tuple[str, ...]) -> None:
        """Called in the process before the command; ``watched`` are its directory and its cache."""


@dataclass(frozen=True)
class Signals:
    """Signals that a run gets: after some seconds, or at one of its file operations."""

    numbers: tuple[int, ...] = (signal.SIGKILL,)
    seconds: float | None = None
    operation: int | None = None  # from 1, among those in its directory and its cache

    def install(self, watched: tuple[str, ...]) -> None:
        """Sends the signals at the operation. ``Commands.run`` sends those that wait for the clock."""

        def act(number: int, _event: str, _path: str) -> None:
            if number == self.operation:
                for each in self.numbers:
                    os.kill(os.getpid(), each)

        on_file_operations(watched, act)


def on_file_operations(watched: tuple[str, ...], act: Callable[[int, str, str], None]) -> None:
    """Calls ``act`` with the number, from 1, the kind and the path of each file operation in the watched folders."""
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in FILE_OPERATIONS and str(arguments[0]).startswith(watched):
            count += 1
            act(count, event, str(arguments[0]))

    sys.addaudithook(watch)


@dataclass
class Outcome:
    """How a command ended, and what it printed."""

    status: int  # minus the signal's number if it was killed
    printed: str

    @property
    def lines(self) -> list[str]:
        """The lines that are for a person: errors, warnings, and where a traceback starts."""
        words = ("error:", "failed:", "warning:", "interrupted", "Traceback")
        return [line for line in self.printed.replace("\r", "\n").splitlines() if line.startswith(words)]

    @property
    def batches(self) -> list[int]:
        """The batches that a run printed, numbered from 1 over all epochs: every batch of a tiny epoch."""
        return [(int(epoch) - 1) * int(total) + int(batch) for epoch, batch, total in BATCH.findall(self.printed)]

    @property
    def operations(self) -> int:
        """File operations of a run that came to its end."""
        return int(self.printed.rpartition("file operations: ")[2].split()[0])


@dataclass(eq=False)  # two are never equal, so what one has made can be cached
class Commands:
    """Starts the suite's commands on a tiny model, each in a process of its own."""

    folder: Path  # for everything
    model: Path  # the folder of a tiny model
    data: Path  # a folder of reviews

    def __post_init__(self) -> None:
        self._server = multiprocessing.get_context("forkserver")
        self._server.set_forkserver_preload(list(PRELOADED))
        self._whole: dict[tuple[str, str], tuple[Path, Outcome, float]] = {}

    def flags(self, directory: Path, method: str, precision: str = "fp32") -> list[str]:
        """The flags of a run with a checkpoint every 4 steps."""
        return [
            "--model_name", str(self.model), "--dataset", "text", "--data_dir", str(self.data), "--max_length", "32",
            "--batch_size", "8", "--accelerator", "cpu", "--learning_rate", "0.003", "--epochs", "3", "--patience", "0",
            "--precision", precision, "--checkpoint_steps", "4", *METHODS[method], "--output_dir", str(directory),
        ]  # fmt: skip

    def start(
        self, words: list[str], log: Path, disturbance: Disturbance | None = None, cache: Path | None = None
    ) -> BaseProcess:
        """Starts ``finetune_lora.py``; if the first word is ``predict`` or ``export``, that command."""
        cache = cache or self.folder / "cache"
        process = self._server.Process(target=_child, args=(words, str(log), str(cache), disturbance))
        process.start()
        return process

    def run(self, words: list[str], disturbance: Disturbance | None = None, cache: Path | None = None) -> Outcome:
        log = self.folder / "log"
        log.unlink(missing_ok=True)
        process = self.start(words, log, disturbance, cache)
        if isinstance(disturbance, Signals) and disturbance.seconds is not None:
            process.join(disturbance.seconds)
            for number in disturbance.numbers:
                with contextlib.suppress(ProcessLookupError):
                    if process.exitcode is None:
                        os.kill(process.pid or 0, number)
                time.sleep(0.02)
        return self.ended(process, log)

    def ended(self, process: BaseProcess, log: Path) -> Outcome:
        """How a command that was started ends: ``Broken`` if it does not."""
        process.join(LIMIT_SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise Broken(f"did not end within {LIMIT_SECONDS:.0f} s")
        printed = log.read_text(encoding="utf8", errors="replace") if log.exists() else ""
        return Outcome(process.exitcode, printed)

    def whole(self, method: str, precision: str = "fp32") -> tuple[Path, Outcome, float]:
        """The directory of an undisturbed run, how it ended, and its seconds."""
        if (method, precision) not in self._whole:
            directory = self.folder / f"whole-{method}-{precision}"
            shutil.rmtree(directory, ignore_errors=True)
            began = time.monotonic()
            outcome = self.run(self.flags(directory, method, precision))
            if outcome.status:
                raise Broken(f"the undisturbed run failed: {outcome.printed[-500:]}")
            self._whole[method, precision] = directory, outcome, time.monotonic() - began
        return self._whole[method, precision]

    def popen(
        self, words: list[str], variables: dict[str, str] | None = None, prefix: Sequence[str] = ()
    ) -> subprocess.Popen[str]:
        """Starts a script of the root in a process that imports everything anew; an empty variable is unset."""
        given = {"FINETUNE_LORA_CACHE": str(self.folder / "cache"), "OMP_NUM_THREADS": "1"} | (variables or {})
        environment = {name: value for name, value in (os.environ | given).items() if value}
        return subprocess.Popen(
            [*prefix, sys.executable, *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip

    def fresh(self, words: list[str], variables: dict[str, str] | None = None, prefix: Sequence[str] = ()) -> Outcome:
        """``finetune_lora.py`` in such a process, to its end, with the processes that it starts.

        Raises:
            Broken: it did not end within ``LIMIT_SECONDS``, and was killed. Processes that it started are not killed.
        """
        with self.popen(["finetune_lora.py", *words], variables, prefix) as process:
            try:
                printed, _ = process.communicate(timeout=LIMIT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise Broken(f"did not end within {LIMIT_SECONDS:.0f} s") from None
        return Outcome(process.returncode, printed)


def in_process(command: Callable[[list[str]], int], words: list[str]) -> Outcome:
    """A command's ``main`` in this process; an error that it does not catch is printed as Python does."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(printed):
        try:
            status = command(words)
        except Exception:
            traceback.print_exc()
            status = 1
    return Outcome(status, printed.getvalue())


def _child(words: list[str], log: str, cache: str, disturbance: Disturbance | None) -> None:
    """A command, in a fork of the server."""
    with Path(log).open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["FINETUNE_LORA_CACHE"] = cache
    os.chdir(ROOT)
    import torch

    import export_model
    import finetune_lora
    import predict

    torch.set_num_threads(1)
    gc.freeze()  # what the server has imported stays, so that collections of garbage need not look at it
    sys.argv = ["finetune_lora.py", *words]
    directory = words[words.index("--output_dir") + 1] if "--output_dir" in words else words[1]
    watched, operations = (directory, cache), 0

    def count(number: int, _event: str, _path: str) -> None:
        nonlocal operations
        operations = number

    on_file_operations(watched, count)
    if disturbance is not None:
        disturbance.install(watched)
    others = {"predict": predict.main, "export": export_model.main}
    status = others[words[0]](words[1:]) if words[0] in others else finetune_lora.main(words)
    print(f"\nfile operations: {operations}", flush=True)
    os._exit(status)


# --- what a run leaves


def left_by(directory: Path) -> dict[str, Any]:
    """What must be bit-identical: weights, predictions, and scores and history without times."""
    result = read_result(directory)
    scores = [{k: v for k, v in result[split].items() if k != "seconds"} for split in ("validation", "test")]
    lines = [line.split(",") for line in (directory / "metrics.csv").read_text(encoding="utf8").splitlines()]
    timed = lines[0].index("train_seconds")
    (weights,) = directory.glob("*.safetensors")
    return {
        "status": result["status"],
        "scores": scores,
        "steps": result["train"]["steps"],
        "metrics.csv": [[cell for i, cell in enumerate(line) if i != timed] for line in lines],
        "weights": weights.read_bytes(),
        "predictions": (directory / "predictions.parquet").read_bytes(),
        # The report may be missing: it is written last, after the result, and a finished run does not continue.
        "names of files": {path.name for path in directory.iterdir()} - {REPORT},
    }


def empty_cache(directory: Path) -> Path:
    """An empty cache for one trial: a run must tokenize."""
    cache = directory.with_name("own cache")
    shutil.rmtree(cache, ignore_errors=True)
    return cache


def refused_in_one_line(outcome: Outcome) -> bool:
    """Whether a command said in one line why it does not go on."""
    last = [line for line in outcome.lines if not line.startswith("warning:")]
    return outcome.status in (1, 2) and len(last) == 1 and last[0].startswith(("error:", "failed:"))


def number_of(directory: Path) -> int:
    """The number of a trial, from its directory: for trials that take their choices in turn."""
    return int(directory.name.rpartition("-")[2])


def require_same(directory: Path, whole: Path) -> None:
    """Checks that a run left what an undisturbed one leaves: else ``Broken``."""
    found, expected = left_by(directory), left_by(whole)
    if differing := [name for name in expected if found[name] != expected[name]]:
        raise Broken(f"{', '.join(differing)} of {directory.name} differ from the undisturbed run")


def require(holds: bool, what: str, outcome: Outcome) -> None:
    """Checks a promise: else ``Broken``."""
    if not holds:
        raise Broken(f"{what}: status {outcome.status}, {outcome.lines or outcome.printed[-300:]}")


def continued(
    kept: bool, earlier: Outcome, resume: Callable[[], Outcome], repeated: int = REPEATED
) -> tuple[Outcome, str]:
    """Goes on with a run. Returns how that ended, and whether it continued from a checkpoint or started over.

    Args:
        kept: whether the run has a checkpoint.
        earlier: what it has printed.
        resume: runs the rest.
        repeated: how many batches it may do again.

    Raises:
        Broken: it has lost a checkpoint, or does not use it.
    """
    done = max(earlier.batches, default=0)
    require(kept or done <= repeated, f"no checkpoint after {done} batches", earlier)
    outcome = resume()
    if kept and outcome.batches:  # otherwise nothing was left to train
        first = min(outcome.batches)
        require(first > max(1, done - repeated), f"did batch {first} again after {done} batches", outcome)
    return outcome, "continued" if kept else "started over"


@dataclass(frozen=True)
class Seen:
    """What a trial saw, and what it disturbed, for example ``{"method": ["lora"]}``: the page counts it."""

    text: str
    disturbed: dict[str, list[str]]


@dataclass(frozen=True)
class Fault:
    """A kind of fault."""

    name: str  # for the table and for ``--only``
    times: int  # how often it is tried
    promise: str  # what must hold
    # does one trial in a directory of its own. It returns what was seen, as a text or ``Seen``, or raises ``Broken`` or
    # ``Undisturbed``.
    trial: Callable[[Commands, random.Random, Path], str | Seen]
    missing: Callable[[], str | None] = lambda: None  # why this machine cannot try it; ``None`` if it can
