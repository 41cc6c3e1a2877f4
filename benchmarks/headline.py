"""Compares whole runs with the tutorial script, and renews the tables about speed: ``python -m benchmarks.headline``.

Nothing is measured here. The runs are from a row of a study in ``results/``. The tutorial script's time for a text is
from ``make benchmark`` on the machine of these runs. It is also kept in ``headline.json``, because a later benchmark on
another machine replaces ``peers.json``. The table goes to docs/speed.md. README gets a short table of three benchmarks:
peers, other families and 8-bit products.
"""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import accuracy_table, harness, int8, peers
from benchmarks.harness import Record
from compare_methods import README, RESULTS, SPEED
from finetuning.comparison.packed import read_records
from finetuning.errors import UserError
from finetuning.pages import Table, dated, renew_tables
from finetuning.storage import read_json, write_json

OUTPUT = harness.RESULTS / "headline.json"
TUTORIALS = ("tutorial_fp32", "tutorial_bf16")
COLUMNS = ("", "minutes", "test accuracy, %")
SHORT = (  # model, LoRA on, max_length, peer: the rows of README's table
    ("minilm", "all", 256, "peft_tuned"),
    ("minilm", "all", 512, "peft_tuned"),
    ("base", "all", 256, "peft_tuned"),
    ("mpnet", "all", 256, "peft_tuned"),
    ("minilm", "qv", 512, "tutorial_bf16"),
)
SHORT_COLUMNS = (
    "compared with", "model, LoRA on, max_length", "training speed, bf16", "training speed, `--precision fast`",
    "memory of training, bf16",
)  # fmt: skip
PARTS = ("peers", "families", "int8_speed")  # the benchmarks of that table


def table(runs: Sequence[Record], peers_result: Record) -> str:
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
        if run["environment"].get("forked"):
            raise UserError(f"{run['study']['run']}: was forked, so its time is without the start of the command")
    minutes = [run["process_seconds"] / 60 for run in runs]
    config, sizes, environment = runs[0]["config"], runs[0]["data"]["sizes"], runs[0]["environment"]
    ours = f"this suite, the whole command ({len(runs)} seeds)"
    rows = [(ours, str(harness.spread(minutes)), accuracy_table.mean(runs, "accuracy"))]
    for name in TUTORIALS:
        timed = [m for m in peers_result["measurements"] if _is_measurement_of(m, name, config["max_length"])]
        texts = sum(m["train_examples"] for m in timed)
        if texts:
            seconds_per_text = statistics.median(m["train_seconds"] / m["train_examples"] for m in timed)
            extrapolated = seconds_per_text * sizes["train"] * config["epochs"] / 60
            time = f"{extrapolated:,.0f} ({extrapolated / statistics.median(minutes):.0f} times as long)"
            what = f"{peers.NAMES[name]}, training only, extrapolated from {texts} texts"
            rows.append((what, time, "not measured"))
    conditions = (
        f"{sizes['train']:,} training and {sizes['test']:,} test texts, {config['epochs']} epochs, up to"
        f" {config['max_length']} tokens; {harness.machine(environment)}."
    )
    environments = [record["environment"] for record in (*runs, peers_result)]
    return f"{conditions}\n\n{dated(Table(COLUMNS, rows), environments)}"


def short_table(peers_result: Record, families_result: Record, int8_result: Record) -> str:
    """The comparisons of ``SHORT`` in Markdown, medians only; what was not measured stays empty.

    Where two benchmarks have measured a speed, the one counts that has taken turns in bf16 and in 8 bits.
    """
    results = peers_result, families_result, int8_result
    speeds: dict[tuple[Any, ...], Any] = {}
    memories: dict[tuple[Any, ...], Any] = {}
    for result in (peers_result, families_result):
        for row in peers.compare(result["measurements"]):
            key = (*row["work"], row["theirs"])
            speeds[row["ours"], *key] = row["train"]
            if row["ours"] == "suite":
                memories[key] = row["memory"]
    for work, by_contestant in int8.by_work(int8_result):
        key = work["model"], work["targets"], work["max_length"], "peft_tuned"
        for ours, name in (("suite", "dense"), ("suite_int8", "int8")):
            ratio = harness.ratios(by_contestant[name], by_contestant["peft_tuned"], "train_tokens_per_second")
            if ratio is not None:
                speeds[ours, *key] = ratio
    rows = []
    for key in SHORT:
        ratios = speeds.get(("suite", *key)), speeds.get(("suite_int8", *key)), memories.get(key)
        shown = ("" if ratio is None else f"{ratio.median:.2f}" for ratio in ratios)
        rows.append((peers.NAMES[key[-1]], peers.place(*key[:3]), *shown))
    machines = " and ".join(dict.fromkeys(harness.machine(result["environment"]) for result in results))
    return f"{machines}.\n\n{dated(Table(SHORT_COLUMNS, rows), [result['environment'] for result in results])}"


def _machine(record: Record) -> tuple[str, int]:
    return record["environment"]["cpu"], record["environment"]["threads"]


def measured_on_same_machine(runs: Sequence[Record], files: Sequence[Path] = (peers.OUTPUT, OUTPUT)) -> Record:
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


def _is_measurement_of(measurement: Record, contestant: str, max_length: int) -> bool:
    """The tutorial script pads every text to ``max_length``, so each text takes the same time."""
    wanted = {"contestant": contestant, "model": "minilm", "targets": "qv", "max_length": max_length}
    return "error" not in measurement and wanted.items() <= measurement.items()


def read_row(study: Path, row: str) -> list[Record]:
    """The result of each finished final run of a row, ordered by seed; refused if the study has none."""
    found = [record.result for name, record in read_records(study)[0].items() if name.startswith(f"{row}-seed")]
    runs = [run for run in found if run["status"] == "finished" and run["study"]["row"] == row]
    if not runs:
        raise UserError(f"--row {row}: {study} has no finished run of this row")
    return sorted(runs, key=lambda run: run["study"]["seed"])


@harness.as_main
def main(argv: Sequence[str] | None) -> int:
    """Prints the table, and renews docs/speed.md and README. Returns the exit status."""
    parser = harness.make_parser("Compare whole runs with the tutorial script.")
    study = RESULTS / "earlier_work"
    parser.add_argument("--study", type=Path, default=study, help=f"collected runs (default: results/{study.name})")
    parser.add_argument("--row", default="lora", help="row of the study (default: lora)")
    options = parser.parse_args(argv)
    runs = read_row(options.study, options.row)
    peers_result = measured_on_same_machine(runs)
    content = table(runs, peers_result)
    renew_tables(SPEED, {"headline": content})
    renew_tables(README, {"speed_short": short_table(*(read_json(harness.RESULTS / f"{name}.json") for name in PARTS))})
    write_json(OUTPUT, peers_result)
    print(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
