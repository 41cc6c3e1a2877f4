"""Compares other families than BERT's with PEFT: ``python -m benchmarks.families``.

MPNet has real weights; ModernBERT and Qwen3 are random models of MiniLM's size. The tuned peer's settings are chosen
first, as in ``make benchmark``. Where ``--precision fast`` means 8 bits, the suite trains in them as well. Prints a
table, writes JSON, renews docs/speed.md.
"""

import sys
from collections.abc import Sequence

from benchmarks import harness
from benchmarks.harness import Record
from benchmarks.peers import FAILED, Work, compare, for_memory, measure_in_processes, place, record_line
from finetuning.models.int8_products import refused, slow
from finetuning.pages import Table, dated
from finetuning.runs.measurements import environment_record

COMPARED = (("mpnet", 128), ("mpnet", 256), ("modernbert", 128), ("qwen3", 128))  # model, longest text in tokens
ROUNDS = 5
RATIOS = {"train": "training", "merged": "evaluation (merged peer)", "memory": "memory"}
PRECISIONS = {"suite": "auto", "suite_int8": "int8"}
COLUMNS = (
    "model, LoRA on, max_length", "`--precision`", *RATIOS.values(), "training, tokens/s: suite, peer",
    "trained: suite, peer",
)  # fmt: skip


def plan() -> list[Work]:
    """The works to measure on this machine."""
    contestants = ["suite", "peft_tuned", *for_memory(["peft_tuned"])]
    if (refused() or slow((), without_bf16=True)) is None:
        contestants.insert(1, "suite_int8")
    return [Work(model, "all", max_length, tuple(contestants)) for model, max_length in COMPARED]


def table(result: Record) -> str:
    """Markdown: a row for each model, length and precision of the suite, with ratios, rates and trained parameters."""
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
        ratios = (str(row[key] or "") for key in RATIOS)
        precision = PRECISIONS[row["ours"]] + (FAILED if row["errors"] else "")
        rows.append((place(*row["work"]), precision, *ratios, ", ".join(rates), parameters))
    return f"{harness.conditions(result)}\n\n{dated(Table(COLUMNS, rows), [result['environment']])}"


@harness.as_main
def main(argv: Sequence[str] | None) -> int:
    """Measures, writes JSON and renews docs/speed.md; fewer rounds change no page. Returns the exit status."""
    parser = harness.make_parser("Compare MPNet, ModernBERT and Qwen3 with PEFT.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"rounds (default: {ROUNDS})")
    parser.add_argument("--seconds", type=float, default=6, metavar="X", help="training time of one (default: 6)")
    options = parser.parse_args(argv)
    harness.require_positive(options, "rounds", "seconds")
    conditions = {"environment": environment_record(), "rounds": options.rounds}
    journal = harness.start_journal("families", options, conditions, show=record_line)
    measure_in_processes(plan(), options.rounds, options.seconds, True, journal)
    harness.publish("families", journal, table, partly=harness.reduced(parser, options, "rounds", "seconds"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
