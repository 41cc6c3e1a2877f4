"""Compares LoRA's variants and the methods that train little with LoRA: ``python -m benchmarks.variants``.

Each measurement is a process of its own, on MiniLM and 128 tokens, and all take turns in a round. ``--equality`` shows
how exactly each variant equals PEFT's instead; ``equality.py`` computes it. Prints a table, writes JSON, renews
docs/speed.md.
"""

import statistics
import sys
from collections.abc import Sequence
from functools import partial

from benchmarks import harness
from benchmarks.equality import differences
from benchmarks.harness import Record
from benchmarks.workload import VARIANTS, prepared
from finetuning.pages import Table, dated
from finetuning.runs.measurements import environment_record

MODEL, LENGTH, ROUNDS, SECONDS = "minilm", 128, 3, 5.0
COLUMNS = ("variant", "flags", "training time / LoRA", "peak memory / LoRA", "tokens/s", "peak, MiB", "trained")


def record_line(record: Record) -> str:
    """A measurement in one line of output."""
    rate = record.get("error") or f"{record['train_tokens_per_second']:,.0f} tokens/s"
    return f"{record['round']} {record['variant']} {rate}"


def table(result: Record) -> str:
    """Markdown: a row for each variant. Ratios are of the same round; rate and memory are medians."""
    records, rows = result["measurements"], []
    flags = {name: " ".join(f"--{flag} {value}" for flag, value in more.items()) for name, more in VARIANTS.items()}
    of = {name: [r for r in records if r["variant"] == name and "error" not in r] for name in VARIANTS}
    for name, own in of.items():
        if not own:
            rows.append((name, flags[name], *[""] * 5))
            continue
        slower = harness.ratios(of["lora"], own, "train_tokens_per_second")  # LoRA's rate / its own: time
        memory = harness.ratios(own, of["lora"], "peak_bytes")
        rate, peak = (statistics.median(r[key] for r in own) for key in ("train_tokens_per_second", "peak_bytes"))
        values = (f"{rate:,.0f}", f"{peak / 2**20:,.0f}", f"{own[0]['trainable_parameters']:,}")
        rows.append((name, flags[name], str(slower or ""), str(memory or ""), *values))
    return f"{harness.conditions(result)}\n\n{dated(Table(COLUMNS, rows, code=('flags',)), [result['environment']])}"


def equality_table(result: Record) -> str:
    """Markdown: a row for each variant that PEFT has, with the largest relative differences."""
    kinds = ("logits", "gradients", "merged weight")
    rows = [(r["variant"], *(f"{r[kind]:.1e}" for kind in kinds)) for r in result["measurements"]]
    return dated(Table(("variant", *kinds), rows), [result["environment"]])


@harness.as_main
def main(argv: Sequence[str] | None) -> int:
    """Measures, writes JSON and renews docs/speed.md; fewer rounds change no page. Returns the exit status."""
    parser = harness.make_parser("Compare LoRA's variants with LoRA.", equality="compare each variant with PEFT's")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"rounds (default: {ROUNDS})")
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="X", help="training time of one (default: 5)")
    options = parser.parse_args(argv)
    harness.require_positive(options, "rounds", "seconds")
    conditions = {"environment": environment_record()}
    if options.equality:
        journal = harness.start_journal("variants_equality", options, conditions)
        if not journal.records:
            journal.keep(*differences())
        harness.publish("variants_equality", journal, equality_table, partly=False)
        return 0
    journal = harness.start_journal("variants", options, conditions | {"rounds": options.rounds}, show=record_line)
    with prepared([MODEL], [LENGTH]) as folder:
        words = ["benchmarks.measure", "suite", "--targets", "all", "--max_length", str(LENGTH), "--model", MODEL]
        words += ["--folder", str(folder), "--seconds", str(options.seconds)]
        for number in range(options.rounds):
            for name in VARIANTS:
                asked = [*words, "--variant", name]
                journal.measured(partial(harness.measured_in_process, asked), round=number, variant=name)
    harness.publish("variants", journal, table, partly=harness.reduced(parser, options, "rounds", "seconds"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
