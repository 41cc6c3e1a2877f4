"""Compares the efficient path with Hugging Face's code in selective fine-tuning: ``python -m benchmarks.plain_path``.

Runs ``finetune_lora.py`` several times with ``--efficient True`` and ``False`` in turns, each in a process of its own.
Prints a table, writes JSON and renews docs/speed.md.
"""

import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Record
from compare_methods import ROOT
from finetuning.errors import UserError
from finetuning.pages import Table, measured
from finetuning.runs.files import read_result
from finetuning.runs.measurements import environment_record
from finetuning.settings import PACKAGED_DISTILBERT

FLAGS = (
    f"--model_name {PACKAGED_DISTILBERT} --offline --method selective --trainable_layers 2 --limit_validation 200"
    f" --test False --accelerator cpu {harness.TRAINING_FLAGS}"
)
KEPT = ("config", "train", "validation", "memory", "environment")
COLUMNS = ("", "training time, s", "validation accuracy, %", "peak memory, MiB")


def measure(repeats: int, flags: str, journal: harness.Journal) -> None:
    """Trains ``repeats`` times on each path.

    Args:
        flags: further flags of ``finetune_lora.py``.
        journal: gets what each training measured.

    Raises:
        UserError: a training failed; the message ends with its last line.
    """
    for number in range(repeats):
        for efficient in (True, False):
            train = partial(one_training, f"{FLAGS} {flags} --efficient {efficient}".split())
            journal.measured(train, round=number, efficient=efficient)


def one_training(flags: Sequence[str]) -> Record:
    """What a training with these flags left in its ``result.json``."""
    with tempfile.TemporaryDirectory() as folder:
        words = [str(ROOT / "finetune_lora.py"), *flags, "--output_dir", f"{folder}/run"]
        _, reason = harness.in_process(words)
        if reason is not None:
            raise UserError(f"{' '.join(words)}: {reason}")
        result = read_result(Path(folder) / "run")
    return {name: result[name] for name in KEPT}


def table(result: Record) -> str:
    """Markdown: training time, validation accuracy and peak memory of each path, and the ratio of the times."""
    runs = result["measurements"]
    config, environment = runs[0]["config"], runs[0]["environment"]
    conditions = (
        f"Selective fine-tuning of the last {config['trainable_layers']} layers, {config['limit_train']:,} texts,"
        f" {config['epochs']} epochs, up to {config['max_length']} tokens, {1 + max(run['round'] for run in runs)}"
        f" round(s); {harness.machine(environment)}."
    )
    rows, seconds = [], {}
    for efficient, name in ((False, "plain path (`--efficient False`)"), (True, "efficient path")):
        mine = [run for run in runs if run["efficient"] == efficient]
        seconds[efficient] = [run["train"]["seconds"] for run in mine]
        accuracies = sorted({f"{100 * run['validation']['accuracy']:.1f}" for run in mine})
        memory = max(run["memory"]["peak_bytes"] for run in mine) / 2**20
        rows.append((name, str(harness.spread(seconds[efficient])), ", ".join(accuracies), f"{memory:,.0f}"))
    ratio = harness.spread([plain / ours for plain, ours in zip(seconds[False], seconds[True], strict=True)])
    lines = f"{Table(COLUMNS, rows).markdown()}\n| plain / efficient | {ratio} | | |"
    return f"{conditions}\n\n{lines}\n\n{measured(run['environment'] for run in runs)}"


@harness.as_main
def main(argv: Sequence[str] | None) -> int:
    """Prints the table, writes JSON and renews docs/speed.md. Returns the exit status."""
    parser = harness.make_parser("Compare the efficient path with Hugging Face's own code.")
    parser.add_argument("--repeats", type=int, default=2, help="number of trainings on each path (default: 2)")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of a training (default: 5)")
    parser.add_argument("--limit_train", type=int, default=1000, help="training texts (default: 1000)")
    options = parser.parse_args(argv)
    harness.require_positive(options, "repeats", "epochs", "limit_train")
    journal = harness.start_journal("plain_path", options, {"environment": environment_record()}, show=record_line)
    measure(options.repeats, f"--epochs {options.epochs} --limit_train {options.limit_train}", journal)
    less = harness.reduced(parser, options, "repeats", "epochs", "limit_train")
    harness.publish("plain_path", journal, table, partly=less)
    return 0


def record_line(record: Record) -> str:
    """A training in one line of output."""
    return f"efficient {record['efficient']}: {record['train']['seconds']:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
