"""Measures what checkpoints inside an epoch cost: ``python -m benchmarks.checkpoints``. Renews docs/faults.md."""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl

import finetune_lora
from finetuning.errors import UserError
from finetuning.pages import ROOT, renew_tables
from finetuning.runs.files import LAST_CHECKPOINT, RESULT
from finetuning.storage import read_json

PAGE = ROOT / "docs" / "faults.md"
METHODS = {
    "lora": ["--lora_key", "--lora_projection", "--lora_mlp"],
    "full": ["--method", "full"],
}
FLAGS = (
    "--offline", "--accelerator", "cpu", "--epochs", "1", "--limit_validation", "64", "--test", "False",
    "--checkpoint_steps", "1",
)  # fmt: skip
RUN_SECONDS, EVERY_SECONDS = 20 * 60, 5 * 60


def measure(method: str, texts: int) -> dict[str, Any]:
    """Trains with a checkpoint after each step.

    Args:
        method: a key of ``METHODS``.
        texts: number of training texts.

    Raises:
        UserError: the run failed.
    """
    seconds: list[float] = []
    save = pl.Trainer.save_checkpoint

    def timed(trainer: pl.Trainer, *arguments: Any, **named: Any) -> None:
        began = time.perf_counter()
        save(trainer, *arguments, **named)
        seconds.append(time.perf_counter() - began)

    with tempfile.TemporaryDirectory(dir=ROOT) as folder:  # not in memory, as folders of temporary files can be
        run = Path(folder) / "run"
        words = [*FLAGS, *METHODS[method], "--limit_train", str(texts), "--output_dir", str(run)]
        with patch.object(pl.Trainer, "save_checkpoint", timed):
            if finetune_lora.main(words):
                raise UserError(f"the run with --method {method} failed")
        size, result = (run / LAST_CHECKPOINT).stat().st_size, read_json(run / RESULT)
    return {"method": method, "seconds": seconds, "bytes": size, "environment": result["environment"]}


def table(measured: Sequence[dict[str, Any]]) -> str:
    """Markdown: the size of a checkpoint, how long writing takes, and its share of a run of 20 minutes."""
    inside = RUN_SECONDS // EVERY_SECONDS
    machine = measured[0]["environment"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} thread(s). Writing: median and longest, until the disk has it.",
        "",
        f"| | checkpoints measured | bytes | writing one, s | {inside} in a run of {RUN_SECONDS // 60} minutes |",
        "|---|---|---|---|---|",
    ]
    for record in measured:
        median, longest = statistics.median(record["seconds"]), max(record["seconds"])
        lines.append(
            f"| `--method {record['method']}` | {len(record['seconds'])} | {record['bytes']:,} |"
            f" {median:.3f}, {longest:.3f} | {inside * median / RUN_SECONDS:.3%} of the time |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Measures what checkpoints cost.")
    parser.add_argument("--texts", type=int, default=2000, help="training texts of each run")
    options = parser.parse_args(argv)
    shown = table([measure(method, options.texts) for method in METHODS])
    print(shown)
    renew_tables(PAGE, {"checkpoints": shown})
    return 0


if __name__ == "__main__":
    sys.exit(main())
