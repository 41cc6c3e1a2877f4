"""Compares whole runs with the tutorial script, and renews the tables about speed: ``python -m benchmarks.headline``.

Nothing is measured here. The runs are from a row of a study in ``results/``. The tutorial script's time for a text is
from ``make benchmark`` on the machine of these runs. It is also kept in ``headline.json``, because a later benchmark on
another machine replaces ``peers.json``. The table goes to docs/speed.md, and a short table of all peers to README.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import peers
from finetuning.comparison.packed import read_records
from finetuning.errors import UserError, exit_status
from finetuning.flags import OneLineParser
from finetuning.pages import README, RESULTS, SPEED, measured_line, renew_tables
from finetuning.storage import read_json, write_json

OUTPUT = peers.RESULTS / "headline.json"
TUTORIALS = ("tutorial_fp32", "tutorial_bf16")


def table(runs: Sequence[dict[str, Any]], peers_result: dict[str, Any]) -> str:
    """Markdown: the runs of one row, and how long the tutorial script would train on as many texts.

    Args:
        runs: ``result.json`` of each seed.
        peers_result: from ``measured_on_same_machine``.

    Raises:
        UserError: a run was not alone on its machine or has no time for the whole command, or the processor or the
            number of threads differs between the measurements.
    """
    machines = set(map(_machine, (*runs, peers_result)))
    if len(machines) > 1:
        raise UserError(f"the runs and {peers.OUTPUT.name} were measured on different machines: {sorted(machines)}")
    for run in runs:
        if not run["environment"].get("alone") or run.get("process_seconds") is None:
            raise UserError(f"{run['study']['run']}: was not alone on its machine all the time")
    scores = [100 * run["test"]["accuracy"] for run in runs]
    minutes = [run["process_seconds"] / 60 for run in runs]
    config, sizes, machine = runs[0]["config"], runs[0]["data"]["sizes"], runs[0]["environment"]
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    lines = [
        f"{sizes['train']:,} training and {sizes['test']:,} test texts, {config['epochs']} epochs, up to"
        f" {config['max_length']} tokens; {machine['cpu']}, {machine['threads']} threads.",
        "",
        "| | minutes | test accuracy, % |",
        "|---|---|---|",
        f"| this suite, the whole command ({len(runs)} seeds) | {peers.spread(minutes)} |"
        f" {statistics.mean(scores):.2f}{spread} |",
    ]
    for name in TUTORIALS:
        measured = [m for m in peers_result["measurements"] if _is_measurement_of(m, name, config["max_length"])]
        texts = sum(m["train_examples"] for m in measured)
        if not texts:
            continue
        seconds_per_text = statistics.median(m["train_seconds"] / m["train_examples"] for m in measured)
        extrapolated = seconds_per_text * sizes["train"] * config["epochs"] / 60
        factor = extrapolated / statistics.median(minutes)
        lines.append(
            f"| {peers.NAMES[name]}, training only, extrapolated from {texts} texts | {extrapolated:,.0f}"
            f" ({factor:.0f} times as long) | not measured |"
        )
    return "\n".join([*lines, "", measured_line(run["environment"] for run in runs)])


def _machine(record: dict[str, Any]) -> tuple[str, int]:
    return record["environment"]["cpu"], record["environment"]["threads"]


def measured_on_same_machine(
    runs: Sequence[dict[str, Any]], files: Sequence[Path] = (peers.OUTPUT, OUTPUT)
) -> dict[str, Any]:
    """The environment and the tutorial script's measurements, from the first file of the runs' machine.

    Raises:
        UserError: no file was measured on this machine.
    """
    for path in filter(Path.exists, files):
        result = read_json(path)
        if _machine(result) == _machine(runs[0]):
            tutorials = [m for m in result["measurements"] if m.get("contestant") in TUTORIALS]
            return {"environment": result["environment"], "measurements": tutorials}
    raise UserError(f"make benchmark has not run on {_machine(runs[0])[0]}, the machine of the runs: run it there")


def _is_measurement_of(measurement: dict[str, Any], contestant: str, max_length: int) -> bool:
    """The tutorial script pads every text to ``max_length``, so each text takes the same time."""
    wanted = {"contestant": contestant, "model": "minilm", "targets": "qv", "max_length": max_length}
    return "error" not in measurement and wanted.items() <= measurement.items()


def read_row(study: Path, row: str) -> list[dict[str, Any]]:
    """The result of each finished final run of a row, ordered by seed.

    Raises:
        UserError: the study has no such run.
    """
    found = [record.result for name, record in read_records(study)[0].items() if name.startswith(f"{row}-seed")]
    runs = [run for run in found if run["status"] == "finished" and run["study"]["row"] == row]
    if not runs:
        raise UserError(f"--row {row}: {study} has no finished run of this row")
    return sorted(runs, key=lambda run: run["study"]["seed"])


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    return exit_status(lambda: command(argv), "interrupted")


def command(argv: Sequence[str] | None) -> int:
    """Prints the table, and renews docs/speed.md and README. Returns the exit status."""
    parser = OneLineParser(description="Compare whole runs with the tutorial script.", allow_abbrev=False)
    parser.add_argument(
        "--study",
        type=Path,
        default=RESULTS / "earlier_work",
        help="folder of collected runs (default: results/earlier_work)",
    )
    parser.add_argument("--row", default="lora", help="row of the study (default: lora)")
    options: argparse.Namespace = parser.parse_args(argv)
    runs = read_row(options.study, options.row)
    peers_result = measured_on_same_machine(runs)
    content = table(runs, peers_result)
    renew_tables(SPEED, {"headline": content})
    renew_tables(README, {"speed_short": peers.short_table(read_json(peers.OUTPUT))})
    write_json(OUTPUT, peers_result)
    print(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
