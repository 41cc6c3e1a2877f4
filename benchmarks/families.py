"""Compares other families than BERT's with PEFT: ``python -m benchmarks.families``.

MPNet has real weights; ModernBERT and Qwen3 are random models of MiniLM's size. The tuned peer's settings are chosen
first, as in ``make benchmark``. Prints a table, writes JSON, renews docs/speed.md.
"""

import sys
from collections.abc import Sequence

from benchmarks import harness
from benchmarks.harness import Record
from benchmarks.peers import (
    COLUMNS,
    EQUAL_BATCHES,
    FAILED,
    NAMES,
    Work,
    compare,
    measure_in_processes,
    place,
    record_line,
)
from finetuning.pages import Table, measured
from finetuning.runs.measurements import environment_record

OUTPUT = harness.RESULTS / "families.json"
CONTESTANTS = ("suite", "peft_tuned", EQUAL_BATCHES["peft_tuned"])
WORKS = tuple(Work(model, "all", 128, CONTESTANTS) for model in ("mpnet", "modernbert", "qwen3"))
ROUNDS = 3
RATIOS = {"train": "training", "merged": "evaluation (merged peer)", "memory": "memory"}
MEASURED = (*RATIOS.values(), "training, tokens/s: suite, peer", "trained: suite, peer")


def table(result: Record) -> str:
    """Markdown: a row for each model and length, with ratios (suite / peer), rates and trained parameters."""
    records = result["measurements"]
    rows = []
    for row in compare(records):
        trained = {
            record["contestant"]: f"{record['trainable_parameters']:,}"
            for record in records
            if record["model"] == row["work"][0] and "trainable_parameters" in record
        }
        rates = ["" if rate is None else f"{rate:,.0f}" for rate in row["tokens_per_second"]]
        parameters = ", ".join(trained.get(row[name], "") for name in ("ours", "theirs"))
        peer = NAMES[row["theirs"]] + (FAILED if row["errors"] else "")
        ratios = (str(row[key] or "") for key in RATIOS)
        rows.append((place(row), peer, *ratios, ", ".join(rates), parameters))
    conditions = (
        f"{harness.machine(result['environment'], 'torch')}; {result['rounds']} rounds.{harness.not_alone(records)}"
    )
    return f"{conditions}\n\n{Table(COLUMNS + MEASURED, rows).markdown()}\n\n{measured([result['environment']])}"


def command(argv: Sequence[str] | None) -> int:
    """Measures, writes JSON and renews docs/speed.md; fewer rounds change no page. Returns the exit status."""
    parser = harness.make_parser("Compare MPNet, ModernBERT and Qwen3 with PEFT.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"rounds (default: {ROUNDS})")
    parser.add_argument("--seconds", type=float, default=6, metavar="X", help="training time of one (default: 6)")
    options = parser.parse_args(argv)
    harness.require_positive(options, "rounds", "seconds")
    conditions = {"environment": environment_record(), "rounds": options.rounds}
    journal = harness.start_journal("families", options, conditions, show=record_line)
    measure_in_processes(WORKS, options.rounds, options.seconds, True, journal)
    harness.publish(journal, OUTPUT, table, "families", partly=harness.reduced(parser, options, "rounds", "seconds"))
    return 0


main = harness.as_main(command)

if __name__ == "__main__":
    sys.exit(main())
