"""Measures what checkpoints inside an epoch cost: ``python -m benchmarks.checkpoints``. Renews docs/faults.md."""

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl

import finetune_lora
from benchmarks import harness
from benchmarks.harness import Record
from compare_methods import ROOT
from finetuning.errors import UserError
from finetuning.pages import Table, dated
from finetuning.runs.files import LAST_CHECKPOINT, read_result
from finetuning.runs.measurements import environment_record
from finetuning.settings import PACKAGED_DISTILBERT

PAGE = ROOT / "docs" / "faults.md"
METHODS = ("lora", "full")
FLAGS = (
    "--model_name", PACKAGED_DISTILBERT, "--offline", "--accelerator", "cpu", "--epochs", "1",
    "--limit_validation", "64", "--test", "False", "--checkpoint_steps", "1", *harness.TRAINING_FLAGS.split(),
)  # fmt: skip
COLUMNS = ("", "checkpoints measured", "bytes", "writing one, s")
RUN_SECONDS, EVERY_SECONDS = 20 * 60, 5 * 60


def measure(method: str, texts: int) -> Record:
    """Trains with a checkpoint after each step: ``UserError`` if the run fails."""
    seconds: list[float] = []
    save = pl.Trainer.save_checkpoint

    def timed(trainer: pl.Trainer, *arguments: Any, **named: Any) -> None:
        began = time.perf_counter()
        save(trainer, *arguments, **named)
        seconds.append(time.perf_counter() - began)

    with tempfile.TemporaryDirectory(dir=ROOT) as folder:  # not in memory, as folders of temporary files can be
        run = Path(folder) / "run"
        words = [*FLAGS, "--method", method, "--limit_train", str(texts), "--output_dir", str(run)]
        with patch.object(pl.Trainer, "save_checkpoint", timed):
            if finetune_lora.main(words):
                raise UserError(f"the run with --method {method} failed")
        size, result = (run / LAST_CHECKPOINT).stat().st_size, read_result(run)
    return {"seconds": seconds, "bytes": size, "environment": result["environment"]}


def table(result: Record) -> str:
    """Markdown: the size of a checkpoint, how long writing takes, and its share of a run of 20 minutes."""
    inside, records = RUN_SECONDS // EVERY_SECONDS, result["measurements"]
    columns = (*COLUMNS, f"{inside} in a run of {RUN_SECONDS // 60} minutes")
    rows = []
    for record in records:
        median, longest = statistics.median(record["seconds"]), max(record["seconds"])
        name, count = f"`--method {record['method']}`", str(len(record["seconds"]))
        share = f"{inside * median / RUN_SECONDS:.3%} of the time"
        rows.append((name, count, f"{record['bytes']:,}", f"{median:.3f}, {longest:.3f}", share))
    environments = [record["environment"] for record in records]
    machine = f"{environments[0]['cpu']}, {environments[0]['threads']} thread(s)"
    conditions = f"{machine}. Writing: median and longest, until the disk has it."
    return f"{conditions}\n\n{dated(Table(columns, rows), environments)}"


@harness.as_main
def main(argv: Sequence[str] | None) -> int:
    """Prints the table, writes JSON and renews docs/faults.md. Returns the exit status."""
    parser = harness.make_parser("Measures what checkpoints cost.")
    parser.add_argument("--texts", type=int, default=2000, help="training texts of each run")
    options = parser.parse_args(argv)
    journal = harness.start_journal("checkpoints", options, {"environment": environment_record()})
    for method in METHODS:
        journal.measured(partial(measure, method, options.texts), method=method)
    harness.publish("checkpoints", journal, table, harness.reduced(parser, options, "texts"), PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
