"""Compares this suite with a tutorial script and with PEFT and the Hugging Face Trainer: ``make benchmark``.

Each measurement is a process of its own (``measure.py``). The contestants take turns: A B C A B C. A ratio is from two
measurements of the same round. The tables show the median of a ratio over the rounds, and its smallest and largest
value.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, cast

from benchmarks.workload import HELD_OUT_TEXTS, LENGTHS, MODELS, TARGETS, TRAINING_TEXTS, prepare
from finetuning.errors import UserError, exit_status
from finetuning.flags import OneLineParser, parse_bool
from finetuning.pages import README, ROOT, SPEED, renew_tables
from finetuning.runs.measurements import environment_record
from finetuning.storage import read_json, write_json

RESULTS = Path(__file__).resolve().parent / "results"
OUTPUT = RESULTS / "peers.json"
PARTIAL_OUTPUT = ROOT / "runs" / "peers.json"  # if only a part of the plan is measured
COMPARED = ("minilm", "base")
EQUAL_BATCHES = {  # for memory: the suite with as many texts in a batch as the tuned peer
    "peft_tuned": "suite_equal_batches",
    "peft_tuned_qlora": "suite_qlora_equal_batches",
}
COMPARISONS = (
    ("suite", "peft_tuned"),
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
RATIO = "(suite / peer)"
SHORT = (  # model, LoRA on, max_length, peer: the rows of README's table
    ("minilm", "all", 256, "peft_tuned"),
    ("minilm", "all", 512, "peft_tuned"),
    ("base", "all", 256, "peft_tuned"),
    ("minilm", "qv", 512, "tutorial_bf16"),
)
Record = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# what is measured


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
            for_memory = [EQUAL_BATCHES[name] for name in contestants if name in EQUAL_BATCHES]
            works.append(Work(model, targets, max_length, (*contestants, *for_memory)))
    return works


def rounds(work: Work, repeats: int) -> Iterator[tuple[int, str]]:
    """Round and contestant in the order of measurement. Memory at equal batches hardly varies and is measured once."""
    for number in range(repeats):
        for contestant in work.contestants:
            if number == 0 or contestant not in EQUAL_BATCHES.values():
                yield number, contestant


Measure = Callable[[Work, str, Sequence[str]], Record]  # work, contestant, further flags -> what was measured


def measure_all(
    works: Sequence[Work], repeats: int, measure: Measure, tune: bool, keep: Callable[[Record], None]
) -> None:
    """Makes every measurement in its order.

    The settings of a tuned peer are chosen first, once for each model and length, with LoRA on all linears.

    Args:
        works: from ``plan``.
        repeats: number of rounds.
        measure: makes one measurement.
        tune: whether to choose the settings of tuned peers.
        keep: gets each measurement at once.
    """
    settings: dict[tuple[str, int, str], list[str]] = {}
    for work in works:
        size = (work.model, work.max_length)
        for peer in EQUAL_BATCHES:
            if tune and peer in work.contestants and (*size, peer) not in settings:
                trial = measure(Work(work.model, "all", work.max_length, ()), peer, ["--choose"])
                keep(trial | {"choice": True, "contestant": peer, "model": work.model, "max_length": work.max_length})
                flags = [f"--{name}={value}" for name, value in trial.get("chosen", {}).items()]
                settings |= dict.fromkeys(((*size, peer), (*size, EQUAL_BATCHES[peer])), flags)
        for number, contestant in rounds(work, repeats):
            record = measure(work, contestant, settings.get((*size, contestant), []))
            described = {"contestant": contestant} | {k: v for k, v in vars(work).items() if k != "contestants"}
            keep(record | described | {"round": number})


def fastest_settings(model: str, max_length: int, output: Path = OUTPUT) -> dict[str, Any]:
    """The tuned peer's batch size, attention and storage of frozen weights, as ``make benchmark`` chose them.

    Raises:
        UserError: no settings were chosen for this model and length.
    """
    for record in read_json(output)["measurements"]:
        key = (record.get("contestant"), record.get("model"), record.get("max_length"))
        if record.get("choice") and key == ("peft_tuned", model, max_length):
            return dict(record["chosen"])
    raise UserError(f"{output.name} has no settings of the tuned peer for {model}, {max_length}: run make benchmark")


def measure_in_process(work: Work, contestant: str, flags: Sequence[str], folder: Path, seconds: float) -> Record:
    """What ``measure.py`` prints. If it fails, the last line of its error output, under ``error``."""
    described = ["--model", work.model, "--targets", work.targets, "--max_length", str(work.max_length)]
    command = [sys.executable, "-m", "benchmarks.measure", contestant, *described, *flags]
    command += ["--folder", str(folder), "--seconds", str(seconds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    return {"error": why_failed(done)} if done.returncode else json.loads(done.stdout.splitlines()[-1])


def why_failed(done: subprocess.CompletedProcess[str]) -> str:
    """The last line of a process's error output."""
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


# ---------------------------------------------------------------------------------------------------------------------
# ratios


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


def compare(records: Sequence[Record]) -> list[Record]:
    """The rows of the table: who is compared, at which work, and the ratios. An unknown ratio is ``None``."""
    rows = []
    works = dict.fromkeys(
        (r["model"], r["targets"], r["max_length"]) for r in records if "contestant" in r and "round" in r
    )
    for work in works:
        by_contestant: dict[str, list[Record]] = {}
        for record in records:
            if "round" in record and (record["model"], record["targets"], record["max_length"]) == work:
                by_contestant.setdefault(record["contestant"], []).append(record)
        for ours, theirs in COMPARISONS:
            if ours in by_contestant and theirs in by_contestant:
                rows.append(_comparison(work, by_contestant, ours, theirs))
    return rows


def _comparison(work: tuple[Any, ...], by_contestant: dict[str, list[Record]], ours: str, theirs: str) -> Record:
    mine, peer = by_contestant[ours], by_contestant[theirs]
    equal = by_contestant.get(EQUAL_BATCHES[theirs], []) if theirs in EQUAL_BATCHES else mine
    peaks = [[r["peak_bytes"] for r in records if "error" not in r] for records in (equal, peer)]
    speeds = [[r["train_tokens_per_second"] for r in records if "error" not in r] for records in (mine, peer)]
    return {
        "work": work,
        "ours": ours,
        "theirs": theirs,
        "train": ratios(mine, peer, "train_tokens_per_second"),
        "evaluation": ratios(mine, peer, "evaluation_tokens_per_second"),
        "merged": ratios(mine, peer, "evaluation_tokens_per_second", "merged_evaluation_tokens_per_second"),
        "memory": ratios(equal, peer, "peak_bytes_above_loaded"),
        "tokens_per_second": [statistics.median(values) if values else None for values in speeds],
        "peak_bytes": [statistics.median(values) if values else None for values in peaks],
        "errors": sorted({r["error"] for r in (*mine, *peer) if "error" in r}),
    }


# ---------------------------------------------------------------------------------------------------------------------
# the tables

COLUMNS = (
    "model, LoRA on, max_length", "compared with", "training", "evaluation", "evaluation, merged peer", "memory",
)  # fmt: skip
ABSOLUTE = (
    "model, LoRA on, max_length", "compared with", "training, tokens/s: suite, peer", "peak memory, MiB: suite, peer",
)  # fmt: skip


def table(result: Record) -> str:
    """All comparisons in Markdown; what was not measured stays empty."""
    environment = result["environment"]
    versions = ", ".join(f"{name} {environment['versions'][name]}" for name in ("torch", "transformers", "peft"))
    commit = ((environment["git"] or {}).get("commit") or "unknown")[:7]
    not_alone = sum(record.get("alone") is False for record in result["measurements"])
    caution = f" Measurements that were not alone on the machine: {not_alone}." if not_alone else ""
    lines = [
        f"{environment['cpu']}, {environment['threads']} threads; {versions}; commit {commit};"
        f" {result['repeats']} rounds.{caution}",
        "",
        f"Speed of training and of evaluation, and memory of training, each {RATIO}, median (minimum to maximum):",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    absolute = ["", "The same, measured values:", "", "| " + " | ".join(ABSOLUTE) + " |", "|" + "---|" * len(ABSOLUTE)]
    for row in compare(result["measurements"]):
        model, targets, max_length = row["work"]
        name = NAMES[row["theirs"]] if row["ours"] == "suite" else f"{NAMES[row['theirs']]} (suite: QLoRA)"
        if row["errors"]:
            name += " (failed at least once)"
        known = ["" if row[key] is None else str(row[key]) for key in ("train", "evaluation", "merged", "memory")]
        speeds = _both(row["tokens_per_second"])
        peaks = _both([peak and peak / 2**20 for peak in row["peak_bytes"]])
        work = f"{MODELS[model]}, {PLACES[targets]}, {max_length}"
        lines.append("| " + " | ".join([work, name, *known]) + " |")
        absolute.append("| " + " | ".join([work, name, speeds, peaks]) + " |")
    return "\n".join([*lines, *absolute])


def short_table(result: Record) -> str:
    """The comparisons of ``SHORT`` in Markdown, medians only; a row that was not measured is left out."""
    found = {(*row["work"], row["theirs"]): row for row in compare(result["measurements"]) if row["ours"] == "suite"}
    columns = ("compared with", "model, LoRA on, max_length", f"training speed {RATIO}", f"memory of training {RATIO}")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for model, targets, max_length, peer in SHORT:
        row = found.get((model, targets, max_length, peer))
        if row is not None:
            speed, memory = (row[key] and f"{row[key].median:.2f}" for key in ("train", "memory"))
            lines.append(
                f"| {NAMES[peer]} | {MODELS[model]}, {PLACES[targets]}, {max_length} | {speed or ''} | {memory or ''} |"
            )
    return "\n".join(lines)


def _both(values: Sequence[float | None]) -> str:
    """The suite's value and the peer's; empty if one of them is missing."""
    return "" if None in values else ", ".join(f"{value:,.0f}" for value in values)


# ---------------------------------------------------------------------------------------------------------------------
# the command


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command."""
    parser = OneLineParser(description="Compare this suite with its peers on a CPU.", allow_abbrev=False)
    flag: dict[str, Any] = {"type": parse_bool, "nargs": "?", "const": True, "default": False, "metavar": "BOOL"}
    parser.add_argument("--quick", help="one work with few texts, a few minutes; changes no page", **flag)
    parser.add_argument("--complete", help="every contestant at every work, takes hours", **flag)
    parser.add_argument("--repeats", type=int, metavar="N", help="number of rounds (default: 3; 2 with --quick)")
    parser.add_argument(
        "--seconds", type=float, metavar="X", help="training time of one measurement (default: 6; 3 with --quick)"
    )
    for name, allowed, kind in (("model", COMPARED, str), ("targets", list(TARGETS), str)):
        parser.add_argument(f"--{name}", choices=allowed, type=kind, help="only this one")
    parser.add_argument("--max_length", choices=LENGTHS, type=int, help="only this one")
    parser.add_argument("--contestants", help="only these, separated by commas")
    return parser


def chosen_works(arguments: argparse.Namespace) -> tuple[list[Work], bool]:
    """The works that the flags ask for, and whether they are only a part of the plan.

    Raises:
        UserError: no work is left, or a contestant does not exist.
    """
    if (arguments.repeats is not None and arguments.repeats < 1) or (arguments.seconds or 1) <= 0:
        raise UserError("--repeats and --seconds must be above 0")
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
            kept.append(Work(work.model, work.targets, work.max_length, contestants))
    if not kept:
        raise UserError("nothing to measure with these flags: --complete adds every contestant at every work")
    return kept, arguments.quick or kept != works


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    return exit_status(lambda: command(argv), "interrupted")


def command(argv: Sequence[str] | None) -> int:
    """Measures, prints each measurement, writes JSON and, after the whole plan, pages. Returns the exit status."""
    arguments = make_parser().parse_args(argv)
    works, partly = chosen_works(arguments)
    repeats, seconds = (
        arguments.repeats or (2 if arguments.quick else 3),
        arguments.seconds or (3 if arguments.quick else 6),
    )
    output = PARTIAL_OUTPUT if partly else OUTPUT
    output.parent.mkdir(parents=True, exist_ok=True)
    result: Record = {
        "environment": environment_record(),
        "repeats": repeats,
        "seconds": seconds,
        "texts": {"train": TRAINING_TEXTS, "held_out": HELD_OUT_TEXTS},
        "measurements": [],
    }

    def keep(record: Record) -> None:
        result["measurements"].append(record)
        write_json(output, result)
        print(record_line(record), flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, {work.model for work in works}, {work.max_length for work in works})

        def measure(work: Work, contestant: str, flags: Sequence[str]) -> Record:
            return measure_in_process(work, contestant, flags, folder, seconds)

        measure_all(works, repeats, cast(Measure, measure), not arguments.quick, keep)
    print("\n" + table(result) + f"\n\nall measurements: {output.relative_to(ROOT)}")
    if not partly:
        renew_tables(SPEED, {"peers": table(result)})
        renew_tables(README, {"speed_short": short_table(result)})
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
