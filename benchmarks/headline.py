"""Whole runs, from the command to the result, beside the tutorial script: ``python -m benchmarks.headline``.

Measures nothing itself: the runs are those of a row of a study in ``results/``, the tutorial script's time a text is
that of ``make benchmark`` on the machine of the runs, kept in ``headline.json`` for when another has been measured
since. Prints a table and renews README's.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import peers
from finetuning.comparison.report import README, RESULTS, with_table
from finetuning.errors import UserError
from finetuning.flags import OneLineParser
from finetuning.runs.files import RESULT
from finetuning.storage import write_atomically, write_json

OUTPUT = peers.RESULTS / "headline.json"
TUTORIALS = ("tutorial_fp32", "tutorial_bf16")


def table(runs: Sequence[dict[str, Any]], peers_result: dict[str, Any]) -> str:
    """Markdown: the runs of one row, then how long the tutorial script would train on as many texts.

    Args:
        runs: ``result.json`` of each seed.
        peers_result: from ``measured_beside``.

    Raises:
        UserError: a run that was not alone on its machine, or whose time from the command on is not known; or not all
            was measured on one processor with one number of threads.
    """
    machines = set(map(_machine, (*runs, peers_result)))
    if len(machines) > 1:
        raise UserError(f"the runs and {peers.OUTPUT.name} are of different machines: {sorted(machines)}")
    for run in runs:
        if not run["environment"].get("alone") or run.get("process_seconds") is None:
            raise UserError(f"{run['study']['run']}: was not alone on its machine from its beginning to its end")
    scores = [100 * run["test"]["accuracy"] for run in runs]
    minutes = [run["process_seconds"] / 60 for run in runs]
    config, sizes, machine = runs[0]["config"], runs[0]["data"]["sizes"], runs[0]["environment"]
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    lines = [
        f"{sizes['train']:,} training and {sizes['test']:,} test texts, {config['epochs']} epochs, at most"
        f" {config['max_length']} tokens; {machine['cpu']}, {machine['threads']} threads.",
        "",
        "| | minutes | test accuracy, % |",
        "|---|---|---|",
        f"| this suite, from the command to its result ({len(runs)} seeds) | {peers.spread(minutes)} |"
        f" {statistics.mean(scores):.2f}{spread} |",
    ]
    for name in TUTORIALS:
        measured = [m for m in peers_result["measurements"] if _is_of(m, name, config["max_length"])]
        texts = sum(m["train_examples"] for m in measured)
        if not texts:
            continue
        seconds_per_text = statistics.median(m["train_seconds"] / m["train_examples"] for m in measured)
        extrapolated = seconds_per_text * sizes["train"] * config["epochs"] / 60
        factor = extrapolated / statistics.median(minutes)
        lines.append(
            f"| {peers.NAMES[name]}, training alone, extrapolated from {texts} texts | {extrapolated:,.0f}"
            f" ({factor:.0f} times as long) | not run to its end |"
        )
    return "\n".join(lines)


def _machine(record: dict[str, Any]) -> tuple[str, int]:
    return record["environment"]["cpu"], record["environment"]["threads"]


def measured_beside(runs: Sequence[dict[str, Any]], files: Sequence[Path] = (peers.OUTPUT, OUTPUT)) -> dict[str, Any]:
    """The environment, and the tutorial script's measurements, of the first file that is of the first run's machine.

    Raises:
        UserError: none is.
    """
    for path in filter(Path.exists, files):
        result = json.loads(path.read_text(encoding="utf8"))
        if _machine(result) == _machine(runs[0]):
            tutorials = [m for m in result["measurements"] if m.get("contestant") in TUTORIALS]
            return {"environment": result["environment"], "measurements": tutorials}
    raise UserError(f"make benchmark has not run on {_machine(runs[0])[0]}, the machine of the runs")


def _is_of(measurement: dict[str, Any], contestant: str, max_length: int) -> bool:
    """It pads every text to ``max_length``, so that a text takes the same time whatever its length."""
    wanted = {"contestant": contestant, "model": "minilm", "targets": "qv", "max_length": max_length}
    return "error" not in measurement and wanted.items() <= measurement.items()


def read_row(study: Path, row: str) -> list[dict[str, Any]]:
    """``result.json`` of each finished final run of a study's row, by seed.

    Raises:
        UserError: there is none.
    """
    found = [json.loads(path.read_text(encoding="utf8")) for path in sorted(study.glob(f"{row}-seed*/{RESULT}"))]
    runs = [run for run in found if run["status"] == "finished" and run["study"]["row"] == row]
    if not runs:
        raise UserError(f"--row {row}: {study} holds no finished run of it")
    return sorted(runs, key=lambda run: run["study"]["seed"])


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and writes README's. Returns the exit status."""
    parser = OneLineParser(description="Whole runs beside the tutorial script.", allow_abbrev=False)
    parser.add_argument("--study", type=Path, default=RESULTS / "earlier_work", help="collected runs")
    parser.add_argument("--row", default="lora", help="of the study (default: lora)")
    try:
        options: argparse.Namespace = parser.parse_args(argv)
        runs = read_row(options.study, options.row)
        peers_result = measured_beside(runs)
        content = table(runs, peers_result)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_json(OUTPUT, peers_result)
    print(content)
    text = with_table(README.read_text(encoding="utf8"), "headline", content)
    write_atomically(README, lambda path: path.write_text(text, encoding="utf8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
