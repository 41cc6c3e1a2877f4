"""Breaks runs many times and shows what is left: ``make campaign``, or ``python -m tests.fault_campaign --help``.

Each trial has a number that seeds its choices, so it can be repeated alone. A campaign that was stopped goes on with
the trials that it has not done. A server process imports the libraries once, and each run is a fork of it. The faults
are in ``fault_trials.py``.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = (
    "finetune_lora", "predict", "lightning.pytorch", "transformers", "peft", "bitsandbytes", "pyarrow.parquet",
    "watermark", "matplotlib.pyplot", "local_dataset_utilities", "local_model_utilities", "finetuning.data.batches",
    "finetuning.training.trainer", "finetuning.training.module", "finetuning.runs.history", "finetuning.runs.weights",
    "finetuning.runs.measurements", "finetuning.models.pretrained", "finetuning.models.quantization",
    "finetuning.report.page",
)  # fmt: skip
METHODS = {
    "lora": ("--lora_mlp", "--lora_dropout", "0.1", "--dropout", "0.1", "--accumulate", "2"),
    "qlora": ("--q_lora", "--lora_key"),
    "full": ("--method", "full", "--dropout", "0.1", "--patience", "1", "--learning_rate", "0.0003"),
    "selective": ("--method", "selective", "--trainable_layers", "1"),
    "head": ("--method", "selective", "--trainable_layers", "0", "--frozen_cache_gb", "1e-9"),  # outputs in a file
}
LIMIT_SECONDS = 300.0
FILE_OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir")  # names of Python's audit events


class Broken(AssertionError):
    """What a trial found that must not be, in one line."""


@dataclass(frozen=True)
class Signals:
    """Signals that a run gets: after some seconds, or at one of its file operations."""

    numbers: tuple[int, ...] = (signal.SIGKILL,)
    seconds: float | None = None
    operation: int | None = None  # from 1, among those in its directory and its cache


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
    def operations(self) -> int:
        """File operations of a run that came to its end."""
        return int(self.printed.rpartition("file operations: ")[2].split()[0])


class Commands:
    """Starts the suite's commands on a tiny model, each in a process of its own.

    Args:
        folder: a folder for everything.
        model: the folder of a tiny model.
        data: a folder of reviews.
    """

    def __init__(self, folder: Path, model: Path, data: Path) -> None:
        self.folder, self.model, self.data = folder, model, data
        self._server = multiprocessing.get_context("forkserver")
        self._server.set_forkserver_preload(list(PRELOADED))
        self._whole: dict[tuple[str, str], tuple[Path, Outcome, float]] = {}

    def flags(self, directory: Path, method: str, precision: str = "fp32") -> list[str]:
        """The flags of a run with a checkpoint every 4 steps."""
        return [
            "--model_name", str(self.model), "--dataset", "text", "--data_dir", str(self.data), "--max_length", "32",
            "--batch_size", "8", "--accelerator", "cpu", "--learning_rate", "0.003", "--epochs", "3", "--precision",
            precision, "--checkpoint_steps", "4", *METHODS[method], "--output_dir", str(directory),
        ]  # fmt: skip

    def start(
        self,
        words: list[str],
        log: Path,
        signals: Signals | None = None,
        cache: Path | None = None,
        variables: dict[str, str] | None = None,
    ) -> BaseProcess:
        """Starts ``finetune_lora.py``, or ``predict.py`` if the first word is ``predict``."""
        variables = {"FINETUNE_LORA_CACHE": str(cache or self.folder / "cache")} | (variables or {})
        at = (signals.operation, signals.numbers) if signals else (None, ())
        process = self._server.Process(target=_child, args=(words, str(log), variables, *at))
        process.start()
        return process

    def run(
        self,
        words: list[str],
        signals: Signals | None = None,
        cache: Path | None = None,
        variables: dict[str, str] | None = None,
    ) -> Outcome:
        """Does a command."""
        log = self.folder / "log"
        log.unlink(missing_ok=True)
        process = self.start(words, log, signals, cache, variables)
        if signals is not None and signals.seconds is not None:
            process.join(signals.seconds)
            for number in signals.numbers:
                with contextlib.suppress(ProcessLookupError):
                    if process.exitcode is None:
                        os.kill(process.pid or 0, number)
                time.sleep(0.02)
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


def _child(
    words: list[str], log: str, variables: dict[str, str], operation: int | None, numbers: Sequence[int]
) -> None:
    """A command, in a fork of the server. It gets the signals at a file operation, if one is given."""
    with Path(log).open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(variables)
    for name in [name for name, value in variables.items() if not value]:
        del os.environ[name]
    os.chdir(ROOT)
    import torch

    import finetune_lora
    import predict

    torch.set_num_threads(1)
    sys.argv = ["finetune_lora.py", *words]
    directory = words[words.index("--output_dir") + 1] if "--output_dir" in words else words[1]
    watched, count = (directory, variables.get("FINETUNE_LORA_CACHE", directory)), 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in FILE_OPERATIONS and str(arguments[0]).startswith(watched):
            count += 1
            if count == operation:
                for number in numbers:
                    os.kill(os.getpid(), number)

    sys.addaudithook(watch)
    status = predict.main(words[1:]) if words[0] == "predict" else finetune_lora.main(words)
    print(f"\nfile operations: {count}", flush=True)
    os._exit(status)


# ---------------------------------------------------------------------------------------------------------------------
# what a run leaves


def left_by(directory: Path) -> dict[str, Any]:
    """What must be bit-identical: weights, predictions, and scores and history without times."""
    result = json.loads((directory / "result.json").read_text(encoding="utf8"))
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
        "names of files": {path.name for path in directory.iterdir()} - {"report.html"},
    }


def require_same(directory: Path, whole: Path) -> None:
    """Checks that a run left what an undisturbed one leaves.

    Raises:
        Broken: something differs.
    """
    found, expected = left_by(directory), left_by(whole)
    if differing := [name for name in expected if found[name] != expected[name]]:
        raise Broken(f"{', '.join(differing)} of {directory.name} differ from the undisturbed run")


def require(holds: bool, what: str, outcome: Outcome) -> None:
    """Checks a promise.

    Raises:
        Broken: it does not hold.
    """
    if not holds:
        raise Broken(f"{what}: status {outcome.status}, {outcome.lines or outcome.printed[-300:]}")


# ---------------------------------------------------------------------------------------------------------------------
# the campaign


@dataclass(frozen=True)
class Fault:
    """A kind of fault, how often it is tried, and a trial, which returns what was seen or raises ``Broken``."""

    name: str
    times: int
    promise: str
    trial: Callable[[Commands, random.Random, Path], str]


@dataclass
class Campaign:
    """The trials of some faults, and those that have been done."""

    commands: Commands
    faults: Sequence[Fault]
    seed: int = 0
    done: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        """One line for each trial that was done."""
        return self.commands.folder / "trials.jsonl"

    def run(self, show: Callable[[str], object] = print) -> None:
        """Does the trials that have not been done."""
        if self.file.exists():
            for line in self.file.read_text(encoding="utf8").splitlines():
                record = json.loads(line)
                self.done.setdefault(record["fault"], {})[record["number"]] = record
        for fault in self.faults:
            for number in range(fault.times):
                if number not in self.done.setdefault(fault.name, {}):
                    record = self.trial(fault, number)
                    self.done[fault.name][number] = record
                    if not record["kept"]:
                        show(f"{fault.name} {number}: {record['seen']}")

    def trial(self, fault: Fault, number: int) -> dict[str, Any]:
        """Does one trial, notes it, and keeps its directory if a promise was broken."""
        directory = self.commands.folder / f"{fault.name.replace(' ', '_')}-{number}"
        shutil.rmtree(directory, ignore_errors=True)
        began = time.monotonic()
        try:
            kept, seen = (
                True,
                fault.trial(self.commands, random.Random(f"{self.seed} {fault.name} {number}"), directory),
            )
            shutil.rmtree(directory, ignore_errors=True)
        except Broken as reason:
            kept, seen = False, str(reason)
        seconds = round(time.monotonic() - began, 2)
        record = {"fault": fault.name, "number": number, "kept": kept, "seen": seen, "seconds": seconds}
        with self.file.open("a", encoding="utf8") as file:
            file.write(json.dumps(record) + "\n")
        return record

    @property
    def broken(self) -> list[dict[str, Any]]:
        """The trials in which a promise was broken."""
        return [r for fault in self.faults for r in self.done.get(fault.name, {}).values() if not r["kept"]]

    def report(self) -> str:
        """A Markdown table: what was tried, and what was seen."""
        lines = ["| fault | trials | promise kept | must | seen |", "|---|---|---|---|---|"]
        for fault in self.faults:
            records = self.done.get(fault.name, {}).values()
            seen = Counter(record["seen"] if record["kept"] else "broken" for record in records)
            shown = "; ".join(f"{count} {text}" for text, count in seen.most_common())
            kept = sum(record["kept"] for record in records)
            lines.append(f"| {fault.name} | {len(records)} | {kept} | {fault.promise} | {shown} |")
        return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0 if every promise was kept."""
    from tests.conftest import make_tiny_folder, write_reviews
    from tests.fault_trials import FAULTS

    parser = argparse.ArgumentParser(description="Breaks runs many times and shows what is left.")
    parser.add_argument("--folder", type=Path, default=Path("runs/campaign"), help="where trials are noted")
    parser.add_argument("--only", nargs="*", choices=[fault.name for fault in FAULTS], help="only these faults")
    parser.add_argument("--times", type=int, help="at most N trials of each fault")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    folder = options.folder.resolve()
    model, data = folder / "model", folder / "data"
    if not data.exists():
        make_tiny_folder("distilbert", model)
        data.mkdir(parents=True)
        for seed, (name, count) in enumerate({"train": 200, "validation": 40, "test": 40}.items()):
            write_reviews(data / f"{name}.csv", count, seed)
    chosen = [
        Fault(fault.name, min(fault.times, options.times or fault.times), fault.promise, fault.trial)
        for fault in FAULTS
        if not options.only or fault.name in options.only
    ]
    campaign = Campaign(Commands(folder, model, data), chosen, options.seed)
    campaign.run()
    print(campaign.report())
    return int(bool(campaign.broken))


if __name__ == "__main__":
    from tests import fault_campaign  # the trials know this module by its name

    sys.exit(fault_campaign.main())
