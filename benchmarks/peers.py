"""Compares this suite with a tutorial script and with PEFT and the Hugging Face Trainer: ``make benchmark``.

Each measurement is a process of its own (``measure.py``). The contestants take turns: A B C A B C. A ratio is from two
measurements of the same round. The tables show the median of a ratio over the rounds, and its smallest and largest
value.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Record
from benchmarks.workload import HELD_OUT_TEXTS, LENGTHS, MODELS, TARGETS, TRAINING_TEXTS, prepared
from finetuning.errors import UserError
from finetuning.pages import Table, dated
from finetuning.runs.measurements import environment_record
from finetuning.storage import read_json

OUTPUT = harness.RESULTS / "peers.json"
COMPARED = ("minilm", "base")
REPEATS, SECONDS = 3, 6.0
EQUAL_BATCHES = {  # for memory: the suite with as many texts in a batch as the tuned peer
    ("suite", "peft_tuned"): "suite_equal_batches",
    ("suite_qlora", "peft_tuned_qlora"): "suite_qlora_equal_batches",
}
TUNED = tuple(peer for _, peer in EQUAL_BATCHES)
COMPARISONS = (
    ("suite", "peft_tuned"),
    ("suite_int8", "peft_tuned"),
    ("suite", "peft_defaults"),
    ("suite", "tutorial_bf16"),
    ("suite", "tutorial_fp32"),
    ("suite_qlora", "peft_tuned_qlora"),
    ("suite_qlora", "suite"),
)
NAMES = {
    "suite": "this suite",
    "suite_qlora": "this suite, QLoRA",
    "peft_tuned": "PEFT + Trainer, tuned",
    "peft_tuned_qlora": "PEFT + Trainer, tuned, QLoRA",
    "peft_defaults": "PEFT + Trainer, defaults",
    "tutorial_bf16": "tutorial script, bf16",
    "tutorial_fp32": "tutorial script, fp32",
}
PLACES = {"qv": "query, value", "all": "all linears"}
RATIO, FAILED = "(suite / peer)", " (failed at least once)"


# --- what is measured


@dataclass(frozen=True)
class Work:
    """A model, the linears with LoRA, the longest text in tokens, and who is measured."""

    model: str
    targets: str
    max_length: int
    contestants: tuple[str, ...]


def plan(quick: bool = False, complete: bool = False) -> list[Work]:
    """The works to measure.

    Args:
        quick: one work and four contestants.
        complete: every contestant at every work, which takes hours.
    """
    if quick:
        return [Work("minilm", "qv", 256, ("suite", "peft_tuned", "peft_defaults", "tutorial_bf16"))]
    works = []
    for model, targets, max_length in product(COMPARED, TARGETS, LENGTHS):
        contestants = ["suite", "peft_tuned"]
        if complete or (model == "minilm" and max_length == 256):
            contestants += ["suite_qlora", "peft_tuned_qlora"]
        if complete or (model == "minilm" and targets == "qv" and max_length == 512):
            contestants += ["peft_defaults", "tutorial_bf16", "tutorial_fp32"]
        if complete or model == "minilm" or max_length == 256:
            works.append(Work(model, targets, max_length, (*contestants, *for_memory(contestants))))
    return works


def for_memory(contestants: Sequence[str]) -> list[str]:
    """The suite in batches like those of each tuned peer among the contestants."""
    return [equal for (_, peer), equal in EQUAL_BATCHES.items() if peer in contestants]


def rounds(work: Work, repeats: int) -> Iterator[tuple[int, str]]:
    """Round and contestant in the order of measurement. Memory at equal batches hardly varies and is measured once."""
    for number in range(repeats):
        for contestant in work.contestants:
            if number == 0 or contestant not in EQUAL_BATCHES.values():
                yield number, contestant


Measure = Callable[[Work, str, Sequence[str]], Record]  # work, contestant, further flags -> what was measured


def measure_all(works: Sequence[Work], repeats: int, measure: Measure, tune: bool, journal: harness.Journal) -> None:
    """Makes every measurement that is missing, in its order.

    The settings of a tuned peer are chosen first, once for each model and length, with LoRA on all linears.

    Args:
        works: from ``plan``.
        repeats: number of rounds.
        measure: makes one measurement.
        tune: whether to choose the settings of tuned peers.
        journal: gets each measurement at once.
    """
    for work in works:
        size = {"model": work.model, "max_length": work.max_length}
        settings: dict[str, list[str]] = {}
        for peer in TUNED:
            if tune and peer in work.contestants:
                choose = partial(measure, replace(work, targets="all", contestants=()), peer, ["--choose"])
                trial = journal.measured(choose, choice=True, contestant=peer, **size)
                flags = [f"--{name}={value}" for name, value in trial.get("chosen", {}).items()]
                settings |= dict.fromkeys((peer, *for_memory([peer])), flags)
        for number, contestant in rounds(work, repeats):
            make = partial(measure, work, contestant, settings.get(contestant, []))
            journal.measured(make, contestant=contestant, targets=work.targets, round=number, **size)


def measure_in_processes(
    works: Sequence[Work], repeats: int, seconds: float, tune: bool, journal: harness.Journal
) -> None:
    """Makes every measurement that is missing, each in a process of its own.

    Args:
        works, repeats, tune, journal: as in ``measure_all``.
        seconds: training time of one measurement.
    """
    with prepared({work.model for work in works}, {work.max_length for work in works}) as folder:
        measure_all(works, repeats, partial(measure_one, folder=folder, seconds=seconds), tune, journal)


def fastest_settings(model: str, max_length: int) -> dict[str, Any]:
    """The tuned peer's batch size, attention and storage of frozen weights, as ``make benchmark`` chose them.

    Raises:
        UserError: no settings were chosen for this model and length.
    """
    for record in read_json(OUTPUT)["measurements"]:
        key = (record.get("contestant"), record.get("model"), record.get("max_length"))
        if "chosen" in record and record.get("choice") and key == ("peft_tuned", model, max_length):
            return dict(record["chosen"])
    raise UserError(f"{OUTPUT.name} has no settings of the tuned peer for {model}, {max_length}: run make benchmark")


def measure_one(work: Work, contestant: str, flags: Sequence[str], folder: Path, seconds: float) -> Record:
    """What ``measure.py`` prints. If it fails, the last line of its error output, under ``error``."""
    described = ["--model", work.model, "--targets", work.targets, "--max_length", str(work.max_length)]
    command = ["benchmarks.measure", contestant, *described, *flags, "--folder", str(folder)]
    record: Record = harness.measured_in_process([*command, "--seconds", str(seconds)])
    return record


# --- ratios


def compare(records: Sequence[Record]) -> list[Record]:
    """The rows of the table: who is compared, at which work, and the ratios. An unknown ratio is ``None``."""
    works: dict[tuple[Any, ...], dict[str, list[Record]]] = {}  # work -> contestant -> its measurements
    for record in records:
        if "round" in record:
            work = (record["model"], record["targets"], record["max_length"])
            works.setdefault(work, {}).setdefault(record["contestant"], []).append(record)
    return [
        _comparison(work, by_contestant, ours, theirs)
        for work, by_contestant in works.items()
        for ours, theirs in COMPARISONS
        if ours in by_contestant and theirs in by_contestant
    ]


def _comparison(work: tuple[Any, ...], by_contestant: dict[str, list[Record]], ours: str, theirs: str) -> Record:
    mine, peer = by_contestant[ours], by_contestant[theirs]
    equal = by_contestant.get(EQUAL_BATCHES.get((ours, theirs), ""), []) if theirs in TUNED else mine
    peaks = [[r["peak_bytes"] for r in records if "error" not in r] for records in (equal, peer)]
    speeds = [[r["train_tokens_per_second"] for r in records if "error" not in r] for records in (mine, peer)]
    return {
        "work": work,
        "ours": ours,
        "theirs": theirs,
        "train": harness.ratios(mine, peer, "train_tokens_per_second"),
        "evaluation": harness.ratios(mine, peer, "evaluation_tokens_per_second"),
        "merged": harness.ratios(mine, peer, "evaluation_tokens_per_second", "merged_evaluation_tokens_per_second"),
        "memory": harness.ratios(equal, peer, "peak_bytes_above_loaded"),
        "tokens_per_second": [statistics.median(values) if values else None for values in speeds],
        "peak_bytes": [statistics.median(values) if values else None for values in peaks],
        "errors": sorted({r["error"] for r in (*mine, *peer) if "error" in r}),
    }


# --- the tables

COLUMNS = ("model, LoRA on, max_length", "compared with")
RATIOS = ("training", "evaluation", "evaluation, merged peer", "memory")
ABSOLUTE = ("training, tokens/s: suite, peer", "peak memory, MiB: suite, peer")


def table(result: Record) -> str:
    """All comparisons in Markdown; what was not measured stays empty."""
    environment, records = result["environment"], result["measurements"]
    commit = ((environment["git"] or {}).get("commit") or "unknown")[:7]
    conditions = f"{harness.machine(environment, 'torch', 'transformers', 'peft')}; commit {commit};"
    relative, absolute = [], []
    for row in compare(records):
        suite = "" if row["ours"] == "suite" else " (suite: QLoRA)"
        first = (place(*row["work"]), NAMES[row["theirs"]] + suite + (FAILED if row["errors"] else ""))
        relative.append((*first, *(str(row[key] or "") for key in ("train", "evaluation", "merged", "memory"))))
        peaks = [peak and peak / 2**20 for peak in row["peak_bytes"]]
        absolute.append((*first, _both(row["tokens_per_second"]), _both(peaks)))
    parts = (
        f"{conditions} {result['repeats']} rounds.{harness.not_alone(records)}",
        f"Speed of training and of evaluation, and memory of training, each {RATIO}, median (minimum to maximum):",
        Table(COLUMNS + RATIOS, relative).markdown(),
        "The same, measured values:",
        dated(Table(COLUMNS + ABSOLUTE, absolute), [environment]),
    )
    return "\n\n".join(parts)


def place(model: str, targets: str, max_length: int) -> str:
    """A work as the tables name it: model, linears with LoRA, longest text."""
    return f"{MODELS[model]}, {PLACES[targets]}, {max_length}"


def _both(values: Sequence[float | None]) -> str:
    """The suite's value and the peer's; empty if one of them is missing."""
    return "" if None in values else ", ".join(f"{value:,.0f}" for value in values)


# --- the command


def make_parser() -> argparse.ArgumentParser:
    parser = harness.make_parser(
        "Compare this suite with its peers on a CPU.",
        quick="one work with few texts, a few minutes; changes no page",
        complete="every contestant at every work, takes hours",
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="number of rounds (default: 3; 2 with --quick)")
    parser.add_argument(
        "--seconds", type=float, metavar="X", help="training time of one measurement (default: 6; 3 with --quick)"
    )
    for name, allowed, kind in (
        ("model", COMPARED, str),
        ("targets", list(TARGETS), str),
        ("max_length", LENGTHS, int),
    ):
        parser.add_argument(f"--{name}", choices=allowed, type=kind, help="only this one")
    parser.add_argument("--contestants", help="only these, separated by commas")
    return parser


def chosen_works(arguments: argparse.Namespace) -> tuple[list[Work], bool]:
    """The works that the flags ask for, and whether they are only a part of the plan.

    Raises:
        UserError: no work is left, or a contestant does not exist.
    """
    harness.require_positive(arguments, "repeats", "seconds")
    works = plan(arguments.quick, arguments.complete)
    wanted = arguments.contestants.split(",") if arguments.contestants else None
    allowed = (*NAMES, *EQUAL_BATCHES.values())
    unknown = set(wanted or []) - set(allowed)
    if unknown:
        raise UserError(f"--contestants {sorted(unknown)[0]}: allowed are {', '.join(allowed)}")
    kept = []
    for work in works:
        contestants = tuple(name for name in work.contestants if wanted is None or name in wanted)
        given = all(getattr(arguments, key) in (None, getattr(work, key)) for key in ("model", "targets", "max_length"))
        if given and contestants:
            kept.append(replace(work, contestants=contestants))
    if not kept:
        raise UserError("nothing to measure with these flags: --complete adds every contestant at every work")
    less = (arguments.repeats or REPEATS) < REPEATS or (arguments.seconds or SECONDS) < SECONDS
    return kept, arguments.quick or less or kept != works


@harness.as_main
def main(argv: Sequence[str] | None) -> int:
    """Measures, prints each measurement, writes JSON and, after the whole plan, pages. Returns the exit status."""
    arguments = make_parser().parse_args(argv)
    works, partly = chosen_works(arguments)
    repeats = arguments.repeats or (2 if arguments.quick else REPEATS)
    seconds = arguments.seconds or (3 if arguments.quick else SECONDS)
    conditions = {
        "environment": environment_record(),
        "repeats": repeats,
        "seconds": seconds,
        "texts": {"train": TRAINING_TEXTS, "held_out": HELD_OUT_TEXTS},
    }
    journal = harness.start_journal("peers", arguments, conditions, show=record_line)
    measure_in_processes(works, repeats, seconds, not arguments.quick, journal)
    harness.publish("peers", journal, table, partly)
    return 0


def record_line(record: Record) -> str:
    """A measurement in one line of output."""
    name, targets = record["contestant"], record.get("targets", "")
    what = f"{name:<26}{record['model']:<7}{targets:<4}{record['max_length']:>4}  "
    if "error" in record:
        return f"{what}failed: {record['error']}"
    if "choice" in record:
        return f"{what}fastest with {record['chosen']}"
    train, evaluation = record["train_tokens_per_second"], record["evaluation_tokens_per_second"]
    memory = record["peak_bytes_above_loaded"] / 2**20
    rates = f"train {train:>8,.0f}  evaluation {evaluation:>8,.0f} tokens/s"
    return f"{what}{rates}  memory {memory:>6,.0f} MiB  padding {record['padding_fraction']:.1%}"


if __name__ == "__main__":
    sys.exit(main())
