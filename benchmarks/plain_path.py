"""Compares the efficient path with Hugging Face's code in selective fine-tuning: ``python -m benchmarks.plain_path``.

Runs ``finetune_lora.py`` several times with ``--efficient True`` and ``False`` in turns, each in a process of its own.
Prints a table, writes JSON and renews docs/speed.md.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import spread
from finetuning.errors import UserError, exit_status
from finetuning.flags import OneLineParser
from finetuning.pages import ROOT, SPEED, renew_tables
from finetuning.runs.files import RESULT
from finetuning.storage import read_json, write_json

OUTPUT = Path(__file__).resolve().parent / "results" / "plain_path.json"
FLAGS = "--offline --method selective --trainable_layers 2 --limit_validation 200 --test False --accelerator cpu"


def measure(repeats: int, flags: str) -> dict[str, Any]:
    """Trains ``repeats`` times on each path.

    Args:
        repeats: number of rounds.
        flags: further flags of ``finetune_lora.py``.

    Raises:
        UserError: a training failed; the message ends with its last line.
    """
    records = []
    for number in range(repeats):
        for efficient in (True, False):
            with tempfile.TemporaryDirectory() as folder:
                words = f"{ROOT}/finetune_lora.py {FLAGS} {flags} --efficient {efficient} --output_dir {folder}/run"
                done = subprocess.run([sys.executable, *words.split()], check=False, capture_output=True, text=True)
                if done.returncode:
                    raise UserError(f"{words}: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
                result = read_json(Path(folder) / "run" / RESULT)
            kept = {name: result[name] for name in ("config", "train", "validation", "memory", "environment")}
            records.append({"round": number, "efficient": efficient, **kept})
            print(f"efficient {efficient}: {result['train']['seconds']:.0f} s", file=sys.stderr, flush=True)
    return {"runs": records}


def table(measured: dict[str, Any]) -> str:
    """Markdown: training time, validation accuracy and peak memory of each path, and the ratio of the times."""
    runs = measured["runs"]
    config, machine = runs[0]["config"], runs[0]["environment"]
    lines = [
        f"Selective fine-tuning of the last {config['trainable_layers']} layers, {config['limit_train']:,} texts,"
        f" {config['epochs']} epochs, up to {config['max_length']} tokens, {1 + max(run['round'] for run in runs)}"
        f" round(s); {machine['cpu']}, {machine['threads']} threads.",
        "",
        "| | training time, s | validation accuracy, % | peak memory, MiB |",
        "|---|---|---|---|",
    ]
    seconds: dict[bool, list[float]] = {}
    for efficient, name in ((False, "plain path (`--efficient False`)"), (True, "efficient path")):
        mine = [run for run in runs if run["efficient"] == efficient]
        seconds[efficient] = [run["train"]["seconds"] for run in mine]
        accuracies = sorted({f"{100 * run['validation']['accuracy']:.1f}" for run in mine})
        memory = max(run["memory"]["peak_bytes"] for run in mine) / 2**20
        lines.append(f"| {name} | {spread(seconds[efficient])} | {', '.join(accuracies)} | {memory:,.0f} |")
    ratios = spread([plain / ours for plain, ours in zip(seconds[False], seconds[True], strict=True)])
    return "\n".join([*lines, f"| plain / efficient | {ratios} | | |"])


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    return exit_status(lambda: command(argv), "interrupted")


def command(argv: Sequence[str] | None) -> int:
    """Prints the table, writes JSON and renews docs/speed.md. Returns the exit status."""
    parser = OneLineParser(description="Compare the efficient path with Hugging Face's own code.", allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=2, help="number of trainings on each path (default: 2)")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of a training (default: 5)")
    parser.add_argument("--limit_train", type=int, default=1000, help="training texts (default: 1000)")
    options: argparse.Namespace = parser.parse_args(argv)
    if min(vars(options).values()) < 1:
        raise UserError("--repeats, --epochs, --limit_train: must be at least 1")
    measured = measure(options.repeats, f"--epochs {options.epochs} --limit_train {options.limit_train}")
    content = table(measured)
    print(content)
    write_json(OUTPUT, measured)
    renew_tables(SPEED, {"plain_path": content})
    return 0


if __name__ == "__main__":
    sys.exit(main())
