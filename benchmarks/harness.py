"""What the benchmarks share: flags, measurements in turns and in processes, ratios of rounds, and where results go."""

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compare_methods import ROOT, SPEED
from finetuning.errors import UserError, exit_status
from finetuning.flags import OneLineParser, parse_bool
from finetuning.pages import renew_tables
from finetuning.storage import read_json, write_json

RESULTS = Path(__file__).resolve().parent / "results"
Record = dict[str, Any]
# How the suite trains where a benchmark does not say otherwise; stated, because what auto chooses may change.
TRAINING = {"batch_size": 64, "batch_tokens": 6144, "patience": 0}
TRAINING_FLAGS = " ".join(f"--{name} {value}" for name, value in TRAINING.items())


# --- the command


def make_parser(description: str, **switches: str) -> argparse.ArgumentParser:
    """A parser with a boolean flag for each switch, which is a name and its help."""
    parser = OneLineParser(description=description, allow_abbrev=False)
    for name, text in switches.items():
        parser.add_argument(
            f"--{name}", type=parse_bool, nargs="?", const=True, default=False, metavar="BOOL", help=text
        )
    return parser


def require_positive(options: argparse.Namespace, *names: str) -> None:
    """Refuses flags that are given, but not above 0."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name} {value}: must be above 0")


def chosen_sets(options: argparse.Namespace, known: Collection[str]) -> list[str]:
    """The data sets of ``--sets``, by default all that are known; refused if one is not, or not in ``--data_dir``."""
    names = list(known) if options.sets is None else options.sets.split(",")
    for name in names:
        if name not in known:
            raise UserError(f"--sets {name}: must be one of {', '.join(known)}")
        if not (options.data_dir / name).is_dir():
            raise UserError(f"--data_dir {options.data_dir}: has no folder {name}")
    return names


Main = Callable[[Sequence[str] | None], int]


def as_main(command: Main, interrupted: str = "interrupted") -> Callable[..., int]:
    """Decorates the ``main`` of a command: it returns the exit status, and an early end becomes one line."""

    def main(argv: Sequence[str] | None = None) -> int:
        return exit_status(lambda: command(argv), interrupted)

    return main


# --- measurements


def in_process(words: Sequence[str], show: bool = False, **variables: str) -> tuple[str, str | None]:
    """Runs ``python WORDS`` from the root, without the hub.

    Args:
        words: a script or module, and its flags.
        show: whether its error output is seen meanwhile.
        variables: of its environment.

    Returns:
        What it printed, and why it failed: the last line of its error output; ``None`` if it did not.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | variables
    errors = None if show else subprocess.PIPE
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
    )
    if done.returncode == 130:
        raise KeyboardInterrupt
    reason = ((done.stderr or "").strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return done.stdout, reason if done.returncode else None


def measured_in_process(words: Sequence[str], show: bool = False, **variables: str) -> Any:
    """The JSON that ``python -m WORDS`` prints last, see ``answer``; if it fails, the reason under ``error``."""
    printed, reason = in_process(["-m", *words], show, **variables)
    return {"error": reason} if reason else json.loads(printed.splitlines()[-1])


def answer(measure: Callable[[], Any]) -> int:
    """Prints what was measured as one line of JSON, and everything else on standard error. Returns exit status 0."""
    with contextlib.redirect_stdout(sys.stderr):
        record = measure()
    print(json.dumps(record), flush=True)
    return 0


@dataclass
class Journal:
    """The measurements of a benchmark, in a JSON file that is written after each one.

    A command that was interrupted goes on with what is missing, if conditions and flags are the same.
    """

    path: Path  # where unfinished measurements are kept
    result: Record  # the conditions, which get the measurements
    show: Callable[[Record], str] | None = None  # a measurement in one line; ``None`` if it has been shown
    flags: str = ""  # what was asked for
    records: list[Record] = field(init=False)

    def __post_init__(self) -> None:
        self.result = json.loads(json.dumps(self.result)) | {"measurements": []}
        earlier = read_json(self.path) if self.path.exists() else {}
        if earlier.get("flags") == self.flags and self._conditions(earlier["result"]) == self._conditions(self.result):
            self.result = earlier["result"]
        self.records = self.result["measurements"]

    def _conditions(self, result: Record) -> Record:
        """What must be the same, so that measurements can be continued. The day need not."""
        kept = {name: value for name, value in result.items() if name != "measurements"}
        if "environment" in kept:
            kept["environment"] = {name: value for name, value in kept["environment"].items() if name != "date"}
        return kept

    def find(self, **described: Any) -> Record | None:
        """The measurement with these values, if there is one."""
        return next((record for record in self.records if described.items() <= record.items()), None)

    def keep(self, *records: Record) -> None:
        """Adds measurements, writes the file and shows them."""
        self.records += records
        self.write()
        if self.show is not None:
            print(*map(self.show, records), sep="\n", file=sys.stderr, flush=True)

    def forget(self, unwanted: Callable[[Record], bool]) -> None:
        """Drops measurements, so that they are made again."""
        self.records[:] = [record for record in self.records if not unwanted(record)]
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"flags": self.flags, "result": self.result})

    def measured(self, measure: Callable[[], Record], **described: Any) -> Record:
        """The measurement with these values, which is made if it is missing."""
        record = self.find(**described)
        if record is None:
            record = measure() | described
            self.keep(record)
        return record


def start_journal(name: str, options: argparse.Namespace, result: Record, **more: Any) -> Journal:
    """The journal of a command, in ``runs/``."""
    flags = str(vars(options))  # a call with others keeps what this one has measured
    own = hashlib.sha256(flags.encode()).hexdigest()[:8]
    return Journal(ROOT / "runs" / f"{name}-{own}.unfinished.json", result, flags=flags, **more)


def reduced(parser: argparse.ArgumentParser, options: argparse.Namespace, *sizes: str) -> bool:
    """Whether less is measured than by default: with ``--quick``, or if one of these flags is below its default."""
    given = vars(options)
    return bool(given.get("quick")) or any(given[name] < parser.get_default(name) for name in sizes)


def publish(name: str, journal: Journal, table: Callable[[Record], str], partly: bool, page: Path = SPEED) -> None:
    """Prints a benchmark's table, writes its JSON and renews the page.

    Args:
        name: of the committed JSON, and of the table on the page.
        journal: what was measured.
        table: makes Markdown of what was measured.
        partly: whether only a part was measured: then the JSON goes to ``runs/``, and the page stays as it is.
        page: a page with such a marker.
    """
    content, path = table(journal.result), (ROOT / "runs" if partly else RESULTS) / f"{name}.json"
    print(f"{content}\n\nall measurements: {path.relative_to(ROOT)}")
    write_json(path, journal.result)
    journal.path.unlink(missing_ok=True)
    if not partly:
        renew_tables(page, {name: content})


# --- ratios


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of some numbers."""

    median: float
    least: float
    greatest: float

    def __str__(self) -> str:
        if self.least == self.greatest:
            return f"{self.median:.2f}"
        return f"{self.median:.2f} ({self.least:.2f} to {self.greatest:.2f})"


def spread(values: Sequence[float]) -> Spread | None:
    """The spread of these values; ``None`` without values."""
    return Spread(statistics.median(values), min(values), max(values)) if values else None


def ratios(ours: Sequence[Record], theirs: Sequence[Record], key: str, their_key: str | None = None) -> Spread | None:
    """Our ``key`` divided by theirs in the same round. A round in which one of them is missing is left out."""
    by_round = {record["round"]: record.get(their_key or key) for record in theirs}
    pairs = [(record.get(key), by_round.get(record["round"])) for record in ours]
    return spread([ours / theirs for ours, theirs in pairs if ours is not None and theirs is not None])


# --- what stands next to a table


def machine(environment: Record, *packages: str) -> str:
    """``A CPU, 2 threads; torch 2.13, peft 0.21``."""
    versions = ", ".join(f"{name} {environment['versions'][name]}" for name in packages)
    return f"{environment['cpu']}, {environment['threads']} threads" + (f"; {versions}" if packages else "")


def conditions(result: Record) -> str:
    """``A CPU, 2 threads; torch 2.13; 3 rounds.``, and how many measurements were not alone."""
    return f"{machine(result['environment'], 'torch')}; {result['rounds']} rounds.{not_alone(result['measurements'])}"


def not_alone(records: Iterable[Record]) -> str:
    """A sentence that counts the measurements next to which other programs ran; empty if there are none."""
    count = sum(record.get("alone") is False for record in records)
    return f" Measurements that were not alone on the machine: {count}." if count else ""
