"""Compares the training speed of families without an efficient path with PEFT: ``python -m benchmarks.families``.

Hugging Face's own forward computes both contestants here, so what differs are LoRA layers, batches and training loop.
The tuned peer's settings are chosen first, as in ``make benchmark``. Prints a table, writes JSON, renews docs/speed.md.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import (
    NAMES,
    PLACES,
    RESULTS,
    Record,
    Work,
    compare,
    measure_all,
    measure_in_process,
    record_line,
)
from benchmarks.workload import MODELS, prepare
from finetuning.errors import UserError, exit_status
from finetuning.flags import OneLineParser
from finetuning.pages import ROOT, SPEED, Table, renew_tables
from finetuning.runs.measurements import environment_record
from finetuning.storage import write_json

OUTPUT = RESULTS / "families.json"
PARTIAL_OUTPUT = ROOT / "runs" / "families.json"
WORKS = (Work("modernbert", "all", 128, ("suite", "peft_tuned")),)
ROUNDS = 3
COLUMNS = (
    "model, LoRA on, max_length", "compared with", "training, suite / peer", "tokens/s: suite, peer",
    "trained parameters: suite, peer",
)  # fmt: skip


def table(result: Record) -> str:
    """Markdown: a row for each family, with the ratio of the rounds, the rates and the trained parameters."""
    machine, records = result["environment"], result["measurements"]
    not_alone = sum(record.get("alone") is False for record in records)
    conditions = f"{machine['cpu']}, {machine['threads']} threads; torch {machine['versions']['torch']};"
    conditions += f" {result['rounds']} rounds."
    if not_alone:
        conditions += f" Measurements that were not alone on the machine: {not_alone}."
    rows = []
    for row in compare(records):
        model, targets, max_length = row["work"]
        trained = {
            record["contestant"]: f"{record['trainable_parameters']:,}"
            for record in records
            if record["model"] == model and "trainable_parameters" in record
        }
        rates = ["" if rate is None else f"{rate:,.0f}" for rate in row["tokens_per_second"]]
        rows.append(
            (
                f"{MODELS[model]}, {PLACES[targets]}, {max_length}",
                NAMES[row["theirs"]] + (" (failed at least once)" if row["errors"] else ""),
                str(row["train"] or ""),
                ", ".join(rates),
                ", ".join(trained.get(row[name], "") for name in ("ours", "theirs")),
            )
        )
    return f"{conditions}\n\n{Table(COLUMNS, rows).markdown()}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    return exit_status(lambda: command(argv), "interrupted")


def command(argv: Sequence[str] | None) -> int:
    """Measures, writes JSON and renews docs/speed.md; another number of rounds changes no page. Returns the status."""
    parser = OneLineParser(description="Compare families without an efficient path with PEFT.", allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"rounds (default: {ROUNDS})")
    parser.add_argument("--seconds", type=float, default=6, metavar="X", help="training time of one (default: 6)")
    options: argparse.Namespace = parser.parse_args(argv)
    if options.rounds < 1 or options.seconds <= 0:
        raise UserError("--rounds and --seconds: must be above 0")
    output = OUTPUT if options.rounds >= ROUNDS else PARTIAL_OUTPUT
    output.parent.mkdir(parents=True, exist_ok=True)
    result: Record = {"environment": environment_record(), "rounds": options.rounds, "measurements": []}

    def keep(record: Record) -> None:
        result["measurements"].append(record)
        write_json(output, result)
        print(record_line(record), file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, {work.model for work in WORKS}, {work.max_length for work in WORKS})

        def measure(work: Work, contestant: str, flags: Sequence[str]) -> Any:
            return measure_in_process(work, contestant, flags, folder, options.seconds)

        measure_all(WORKS, options.rounds, measure, True, keep)
    content = table(result)
    print(content)
    if output == OUTPUT:
        renew_tables(SPEED, {"families": content})
    return 0


if __name__ == "__main__":
    sys.exit(main())
