"""Measures what 8-bit products save: ``python -m benchmarks.int8``.

In one process for each work, this suite with and without 8-bit products and a tuned PEFT + Trainer take turns on
batches of the same texts. A ratio is from two measurements of the same round.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks import harness
from benchmarks.harness import Record
from benchmarks.peers import fastest_settings, place
from benchmarks.workload import Job, prepared, read_split, sample, some_batches
from finetuning.errors import UserError
from finetuning.pages import Table, dated
from finetuning.processor import VARIABLE, instructions, limit_libraries
from finetuning.runs.measurements import environment_record, processor_seconds, was_alone


@dataclass(frozen=True)
class Work:
    """What is trained, how many steps a round has, and against whom."""

    model: str
    targets: Literal["qv", "all"]
    max_length: int
    steps: int
    peer: bool = False  # whether the tuned PEFT + Trainer takes part
    processor: str = ""  # instructions to hide, see finetuning/processor.py


PLAN = (
    Work("minilm", "all", 256, 6, peer=True),
    Work("minilm", "all", 512, 5, peer=True),
    Work("minilm", "qv", 256, 6),
    Work("base", "all", 256, 3, peer=True),
    Work("minilm", "all", 256, 3, processor="avx512_vnni"),
    Work("minilm", "all", 256, 3, processor="avx2_vnni"),
)
NEEDS = {"avx512_vnni": "avx512_vnni", "avx2_vnni": "avx_vnni"}  # what a work hides -> what the processor must have
WITHOUT_INT8 = {
    "": "bf16",
    "avx512_vnni": "fp32, a processor without bf16",
    "avx2_vnni": "fp32, a processor with AVX2-VNNI",
}
COLUMNS = (
    "model, LoRA on, max_length", "without int8", "tokens/s: int8, without", "training, int8 / without",
    "evaluation, int8 / without", "training / PEFT: int8, without",
)  # fmt: skip


def measure(work: Work, rounds: int, folder: Path) -> list[Record]:
    """Trains and evaluates everybody in turns, after a warm-up of everybody. Rates count real tokens."""
    from benchmarks.contestants import CONTESTANTS, Contestant  # torch, after instructions are hidden
    from benchmarks.measure import rate_of

    job = Job("suite", model=work.model, targets=work.targets, max_length=work.max_length)
    contestants: dict[str, Contestant] = {
        "dense": CONTESTANTS["suite"](job, folder),
        "int8": CONTESTANTS["suite_int8"](job, folder),
    }
    if work.peer:
        contestants["peft_tuned"] = CONTESTANTS["peft_tuned"](
            replace(job, **fastest_settings(work.model, work.max_length)), folder
        )
    train, held_out = (read_split(folder, name, work.max_length) for name in ("train", "validation"))
    epochs = {name: contestant.batches(train) for name, contestant in contestants.items()}
    evaluated = sample(held_out, 40 * work.steps)
    records: list[Record] = []
    for number in range(-1, rounds):  # the first one is the warm-up
        for name, contestant in contestants.items():
            busy, began = processor_seconds(), time.perf_counter()
            batches = some_batches(epochs[name], train.lengths, work.steps if number >= 0 else 2)
            trained = contestant.train(train, batches)
            record = {"contestant": name, "round": number, "work": asdict(work)}
            record["train_tokens_per_second"] = int(train.lengths[np.concatenate(batches)].sum()) / trained.seconds
            if name != "peft_tuned":
                record["evaluation_tokens_per_second"] = rate_of(contestant.evaluate, evaluated)
            record["alone"] = was_alone(busy, time.perf_counter() - began)
            if number >= 0:
                records.append(record)
                print(record_line(record), file=sys.stderr, flush=True)
    return records


def record_line(record: Record) -> str:
    """A measurement in one line of output."""
    return f"{record['round']} {record['contestant']} {record['train_tokens_per_second']:,.0f} tokens/s"


def table(result: Record) -> str:
    """Markdown: one row for each work, with the ratios of the rounds."""
    rows = []
    for work, measured in by_work(result):
        dense, int8, peer = (measured[name] for name in ("dense", "int8", "peft_tuned"))
        rates = [harness.spread([r["train_tokens_per_second"] for r in part]) for part in (int8, dense)]
        shares = (
            harness.ratios(int8, dense, "train_tokens_per_second"),
            harness.ratios(int8, dense, "evaluation_tokens_per_second"),
        )
        over_peer = [harness.ratios(part, peer, "train_tokens_per_second") for part in (int8, dense)]
        rows.append(
            (
                place(work["model"], work["targets"], work["max_length"]),
                WITHOUT_INT8[work["processor"]],
                ", ".join("" if rate is None else f"{rate.median:,.0f}" for rate in rates),
                *(str(share or "") for share in shares),
                ", ".join(str(ratio) for ratio in over_peer if ratio is not None),
            )
        )
    conditions = harness.conditions(result)
    # without instructions of its own, a work is possible wherever the measurement is
    if missing := [WITHOUT_INT8[w.processor] for w in PLAN if w.processor and asdict(w) not in result["works"]]:
        conditions += f"\nNot measured: {'; '.join(missing)}."
    return f"{conditions}\n\n{dated(Table(COLUMNS, rows), [result['environment']])}"


def by_work(result: Record) -> Iterator[tuple[Record, dict[str, list[Record]]]]:
    """Each work, and the measurements of each contestant at it."""
    for work in result["works"]:
        found: dict[str, list[Record]] = {"dense": [], "int8": [], "peft_tuned": []}
        for record in result["measurements"]:
            if record["work"] == work:
                found[record["contestant"]].append(record)
        yield work, found


def possible() -> list[Work]:
    """The works whose instructions this processor has, apart from those of 8-bit products themselves."""
    return [work for work in PLAN if NEEDS.get(work.processor, "") in {"", *instructions()}]


@harness.as_main
def main(argv: Sequence[str] | None) -> int:
    """Prints the table, writes JSON and renews docs/speed.md. Returns the exit status.

    Each work has a process of its own, because instructions are hidden before torch is loaded.
    """
    parser = harness.make_parser(
        "Measure what 8-bit products save on a CPU.", quick="the first work only, one round; changes no page"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="number of rounds (default: 5)")
    parser.add_argument("--number", type=int, metavar="N", help="measure work N in this process and print its JSON")
    parser.add_argument("--folder", type=Path, help="for --number: prepared models and tokens")
    options = parser.parse_args(argv)
    if options.number is not None:
        limit_libraries()
        return harness.answer(partial(measure, PLAN[options.number], options.rounds, options.folder))
    harness.require_positive(options, "rounds")
    works, rounds = (PLAN[:1], 1) if options.quick else (possible(), options.rounds)
    conditions = {"environment": environment_record(), "rounds": rounds, "works": [asdict(work) for work in works]}
    journal = harness.start_journal("int8", options, conditions)
    with prepared({work.model for work in works}, {work.max_length for work in works}) as folder:
        for work in works:
            if journal.find(work=asdict(work)) is None:
                number = str(PLAN.index(work))
                words = ["benchmarks.int8", "--number", number, "--rounds", str(rounds), "--folder", str(folder)]
                records = harness.measured_in_process(words, show=True, **{VARIABLE: work.processor})
                if "error" in records:
                    raise UserError(f"{work}: the measurement failed")
                journal.keep(*records)
    harness.publish("int8_speed", journal, table, partly=harness.reduced(parser, options, "rounds"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
