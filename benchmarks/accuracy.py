"""Compares whole runs of this suite with PEFT and the Hugging Face Trainer: ``python -m benchmarks.accuracy``.

Both train with the same settings, seeds, splits and tokens, each run in a process of its own. What has been measured
is kept in a folder, so that the same command goes on after an interruption. A measurement that failed stays as failed.
"""

import argparse
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.accuracy_table import CONTESTANTS, table
from benchmarks.harness import TRAINING_FLAGS, Journal, Record
from benchmarks.peers import fastest_settings
from compare_methods import ACCURACY, ROOT
from finetuning.comparison.collection import read_test_predictions
from finetuning.comparison.plan import shown_command
from finetuning.comparison.predictions import Predictions
from finetuning.errors import UserError
from finetuning.pages import renew_tables
from finetuning.processes import stoppable
from finetuning.runs.answers import Rule
from finetuning.runs.files import read_result
from finetuning.storage import read_json, write_atomically, write_json

OUTPUT, COUNTS = "accuracy.json", "accuracy.npz"  # the second has what each test text counts in each run
FOLDER, JOURNAL = ROOT / "runs" / "accuracy", "measured.json"
MAX_LENGTH = 128
SAME = (
    "--dataset text --model_name packaged-distilbert --lora_key True --lora_projection True --lora_mlp True"
    f" --max_length {MAX_LENGTH} --accelerator cpu"
)
KEPT_SCORES = ("accuracy", "macro_f1", "micro_f1", "mean_average_precision", "mcc")
KEPT_ENVIRONMENT = ("cpu", "threads", "git", "date", "alone", "versions")


@dataclass(frozen=True)
class Work:
    """A data set, which is a folder below ``--data_dir``."""

    name: str  # of the folder
    flags: str  # those of ``finetune_lora.py`` that are its own
    seeds: int = 3  # how many; they count from 0. More where scores differ much from seed to seed.


PLAN = (
    Work("trec6", f"--epochs 3 {TRAINING_FLAGS}"),
    Work("emotion", f"--epochs 2 {TRAINING_FLAGS} --limit_train 8000"),
    Work("ag_news", f"--epochs 1 {TRAINING_FLAGS} --limit_train 6000 --limit_test 2000"),
    Work("rte", f"--text_column premise --text_pair_column hypothesis --epochs 3 {TRAINING_FLAGS}", seeds=12),
    Work(
        "goemotions",
        "--label_column labels --monitor micro_f1 --epochs 2 --batch_size 16 --batch_tokens 2048 --patience 0"
        " --limit_train 12000 --limit_validation 2000 --limit_test 3000",
        seeds=6,
    ),
)
QUICK = (
    Work("trec6", f"--epochs 1 {TRAINING_FLAGS} --limit_train 200 --limit_validation 100 --limit_test 100", seeds=1),
)


@dataclass(frozen=True)
class Measurement:
    """One run to do."""

    work: Work
    contestant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.work.name}-{self.contestant}-seed{self.seed}"

    def command(self, data_dir: Path, directory: Path, peer_flags: Sequence[str]) -> list[str]:
        """The command without ``python``: the suite's, or the peer's with the same flags."""
        flags = [*SAME.split(), *self.work.flags.split(), "--seed", str(self.seed)]
        places = ["--data_dir", str(data_dir / self.work.name), "--output_dir", str(directory), "--overwrite"]
        if self.contestant == "suite":
            return [str(ROOT / "finetune_lora.py"), *flags, *places, "--baseline", "False"]  # the peer has none
        return ["-m", "benchmarks.peft_run", *peer_flags, *flags, *places]

    @property
    def described(self) -> Record:
        """What tells its record from others."""
        return {"set": self.work.name, "contestant": self.contestant, "seed": self.seed}


def planned(works: Sequence[Work], seeds: Sequence[int] | None = None) -> list[Measurement]:
    """All measurements in their order: seed by seed, and both contestants one after the other.

    Args:
        seeds: the same for all of them; ``None``: as many as each has.
    """
    asked = range(max(work.seeds for work in works)) if seeds is None else seeds
    return [
        Measurement(work, name, seed)
        for seed, work, name in product(asked, works, CONTESTANTS)
        if seeds is not None or seed < work.seeds
    ]


# --- measuring

Start = Callable[[list[str]], str | None]  # a command without "python" -> why it failed


def open_journal(folder: Path) -> Journal:
    """What has been measured in a folder."""
    return Journal(folder / JOURNAL, {}, show=record_line)


def measure_all(
    measurements: Sequence[Measurement], data_dir: Path, folder: Path, peer_flags: Sequence[str], start: Start
) -> None:
    """Does every run that has no record yet, and prints each result, then the time left.

    Args:
        data_dir: the folder with a folder for each data set.
        folder: where run directories and records are kept.
        peer_flags: flags of ``peft_run.py`` that the suite does not have.

    Raises:
        UserError: a record is from another command.
    """
    journal = open_journal(folder)
    commands = {m: m.command(data_dir, folder / m.name, peer_flags) for m in measurements}
    for measurement, command in commands.items():
        record = journal.find(**measurement.described)
        if record is not None and record["command"] != shown(command):
            raise UserError(f"{folder / JOURNAL}: {measurement.name} is from another command: give another --folder")
    for number, (measurement, command) in enumerate(commands.items(), 1):
        if journal.find(**measurement.described) is None:
            journal.keep(measurement.described | measure(measurement, command, folder, start))
            left = seconds_left(journal, measurements)
            print(f"[{number}/{len(measurements)}] about {left / 60:.0f} min left", file=sys.stderr, flush=True)


def shown(command: Sequence[str]) -> str:
    """The command as a reader types it, without paths of this machine."""
    return shown_command(shlex.join(["python", *(word.removeprefix(f"{ROOT}{os.sep}") for word in command)]))


def measure(measurement: Measurement, command: list[str], folder: Path, start: Start) -> Record:
    """Does a run. Returns what is kept of it."""
    began = time.perf_counter()
    error = start(command)
    record: Record = {"command": shown(command), "seconds": time.perf_counter() - began}
    if error is not None:
        return record | {"status": "failed", "error": error}
    result = read_result(folder / measurement.name)
    scores = {
        split: {name: result[split][name] for name in KEPT_SCORES if name in result[split]}
        for split in ("validation", "test")
    }
    return (
        record
        | scores
        | {
            "status": "finished",
            "source": result["data"]["source"],
            "data": {name: result["data"][name] for name in ("sizes", "tokens", "leaks_dropped")},
            "trainable": result["parameters"]["trainable"],
            "threshold": result["task"].get("threshold"),
            "train_seconds": result["train"]["seconds"],
            "process_seconds": result["process_seconds"],
            "steps": result["train"]["steps"],
            "peak_bytes": result["memory"]["peak_bytes"],
            "trainer": result.get("trainer"),
            "environment": {name: result["environment"][name] for name in KEPT_ENVIRONMENT},
        }
    )


def record_line(record: Record) -> str:
    """A measurement in one line of output."""
    name = f"{record['set']:<12}{record['contestant']:<7}seed {record['seed']}  "
    if record["status"] == "failed":
        return f"{name}failed: {record['error']}"
    scores = "  ".join(f"{key} {100 * value:.2f}" for key, value in record["test"].items())
    return f"{name}{scores}  training {record['train_seconds']:.0f} s"


def seconds_left(journal: Journal, measurements: Sequence[Measurement]) -> float:
    """The expected time of the measurements that are left: as long as the same one took with other seeds."""
    total = 0.0
    for measurement in measurements:
        if journal.find(**measurement.described) is None:
            kind = (measurement.work.name, measurement.contestant)
            same = [record["seconds"] for record in journal.records if (record["set"], record["contestant"]) == kind]
            total += statistics.fmean(same or [record["seconds"] for record in journal.records])
    return total


# --- collecting


def collect(measurements: Sequence[Measurement], folder: Path) -> tuple[Record, dict[str, np.ndarray]]:
    """What has been measured so far.

    Returns:
        The records with the plan, and for each finished run (n, 2) numbers of each test text: right and wrong, or for
        multi-label data the labels found and the ones wrongly given or missed.

    Raises:
        UserError: two runs of a data set were trained or tested on different texts.
    """
    journal, records, counts = open_journal(folder), [], {}
    data: dict[str, Any] = {}
    for measurement in measurements:
        record = journal.find(**measurement.described)
        if record is None:
            continue
        records.append(record)
        if record["status"] == "finished":
            columns = read_test_predictions(folder / measurement.name, Rule(record["threshold"]))
            predictions = Predictions.of(record["source"], columns)
            used = (predictions.test_set, record["data"], record["trainable"])
            if data.setdefault(record["set"], used) != used:
                raise UserError(f"{measurement.name}: has other texts or parameters than {record['set']}'s other runs")
            counts[measurement.name] = predictions.counted("micro_f1").astype(np.uint8)
    works = list(dict.fromkeys(measurement.work for measurement in measurements))
    result = {
        "same": SAME,
        "sets": {work.name: work.flags for work in works},
        "seeds": {work.name: sorted({m.seed for m in measurements if m.work == work}) for work in works},
        "measurements": records,
    }
    return result, counts


def save(result: Record, counts: dict[str, np.ndarray], folder: Path) -> None:
    """Writes both files of the results."""

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **counts)

    write_json(folder / OUTPUT, result)
    write_atomically(folder / COUNTS, write)


def load(folder: Path) -> tuple[Record, dict[str, np.ndarray]]:
    """The results that ``save`` wrote."""
    with np.load(folder / COUNTS) as stored:
        return read_json(folder / OUTPUT), dict(stored)


# --- the command


def chosen(options: argparse.Namespace) -> list[Measurement]:
    """The measurements that the flags ask for.

    Raises:
        UserError: a data set is not in the plan or not in ``--data_dir``, or a seed is not a whole number.
    """
    works = {work.name: work for work in (QUICK if options.quick else PLAN)}
    names = harness.chosen_sets(options, works)
    try:
        seeds = [int(word) for word in options.seeds.split(",")] if options.seeds else None
    except ValueError:
        raise UserError(f"--seeds {options.seeds}: must be whole numbers, separated by commas") from None
    return planned([works[name] for name in names], seeds)


@partial(harness.as_main, interrupted="interrupted: run the same command again to go on")
def main(argv: Sequence[str] | None) -> int:
    """Measures what is missing and prints the table; with the whole plan it renews results and page.

    Returns:
        The exit status: 0, 1 if a measurement failed, 2 if the input is refused, 130 if interrupted.
    """
    parser = harness.make_parser(
        "Compare this suite's accuracy with PEFT + Trainer.",
        quick="one small data set and one seed; changes no page",
        retry_failed="measure again what failed",
    )
    names = ", ".join(work.name for work in PLAN)
    parser.add_argument("--data_dir", type=Path, required=True, metavar="PATH", help=f"has the folders {names}")
    parser.add_argument("--sets", metavar="NAME,...", help="only these data sets, in this order (default: all)")
    parser.add_argument("--seeds", metavar="N,...", help="only these seeds (default: all)")
    parser.add_argument("--folder", type=Path, metavar="PATH", help=f"keeps the runs (default: {FOLDER.name} in runs)")
    options = parser.parse_args(argv)
    asked = chosen(options)
    whole = planned(QUICK if options.quick else PLAN)
    folder = options.folder or (FOLDER.with_name("accuracy_quick") if options.quick else FOLDER)
    tuned = fastest_settings("minilm", MAX_LENGTH)
    peer_flags = ["--attention", tuned["attention"], "--frozen", tuned["frozen"]]
    if options.retry_failed:
        forget_failed(asked, folder)
    with stoppable():
        places = (options.data_dir.absolute(), folder.absolute())
        measure_all(asked, *places, peer_flags, lambda command: harness.in_process(command)[1])
    result, counts = collect(list(dict.fromkeys((*whole, *asked))), folder)
    save(result, counts, folder)
    content = table(result, counts)
    print("\n" + content)
    journal = open_journal(folder)
    if not options.quick and set(asked) <= set(whole) and all(journal.find(**one.described) for one in whole):
        save(result, counts, harness.RESULTS)
        renew_tables(ACCURACY, {"accuracy": content})
    return int(any(record["status"] == "failed" for record in result["measurements"]))


def forget_failed(measurements: Sequence[Measurement], folder: Path) -> None:
    """Removes the records of measurements that failed."""
    journal = open_journal(folder)
    asked = [measurement.described for measurement in measurements]
    journal.forget(lambda record: record["status"] == "failed" and any(one.items() <= record.items() for one in asked))


if __name__ == "__main__":
    sys.exit(main())
