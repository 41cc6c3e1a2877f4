"""Measures what 8-bit products save: ``python -m benchmarks.int8``.

In one process for each work, this suite with and without 8-bit products and a tuned PEFT + Trainer take turns on
batches of the same texts. A ratio is from two measurements of the same round.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.peers import PLACES, Record, fastest_settings, ratios, spread
from benchmarks.publishing import publish
from benchmarks.workload import MODELS, Job, prepare, read_split, sample, some_batches
from finetuning.errors import UserError, exit_status
from finetuning.flags import OneLineParser, parse_bool
from finetuning.pages import ROOT
from finetuning.processor import VARIABLE, limit_libraries
from finetuning.runs.measurements import environment_record, processor_seconds, was_alone

OUTPUT = Path(__file__).resolve().parent / "results" / "int8.json"


@dataclass(frozen=True)
class Work:
    """What is trained, how many steps a round has, and against whom."""

    model: str
    targets: Literal["qv", "all"]
    max_length: int
    steps: int
    peer: bool = False  # whether the tuned PEFT + Trainer takes part
    processor: str = ""  # instructions to hide, see finetuning/processor.py


PLAN = (
    Work("minilm", "all", 256, 6, peer=True),
    Work("minilm", "all", 512, 5, peer=True),
    Work("minilm", "qv", 256, 6),
    Work("base", "all", 256, 3, peer=True),
    Work("minilm", "all", 256, 3, processor="avx512_vnni"),
    Work("minilm", "all", 256, 3, processor="avx2_vnni"),
)
WITHOUT_INT8 = {
    "": "bf16",
    "avx512_vnni": "fp32, a processor without bf16",
    "avx2_vnni": "fp32, a processor with AVX2-VNNI",
}


def measure(work: Work, rounds: int, folder: Path) -> list[Record]:
    """Trains and evaluates everybody in turns. Rates count real tokens.

    Args:
        work: what to measure.
        rounds: number of rounds, after a warm-up of everybody.
        folder: from ``workload.prepare``.
    """
    from benchmarks.contestants import CONTESTANTS, Contestant  # torch, after instructions are hidden

    job = Job("suite", model=work.model, targets=work.targets, max_length=work.max_length)
    contestants: dict[str, Contestant] = {
        "dense": CONTESTANTS["suite"](job, folder),
        "int8": CONTESTANTS["suite"](replace(job, precision="int8"), folder),
    }
    if work.peer:
        contestants["peft_tuned"] = CONTESTANTS["peft_tuned"](
            replace(job, **fastest_settings(work.model, work.max_length)), folder
        )
    train, held_out = (read_split(folder, name, work.max_length) for name in ("train", "validation"))
    epochs = {name: contestant.batches(train) for name, contestant in contestants.items()}
    evaluated = sample(held_out, 40 * work.steps)
    records: list[Record] = []
    for number in range(-1, rounds):  # the first one is the warm-up
        for name, contestant in contestants.items():
            busy, began = processor_seconds(), time.perf_counter()
            batches = some_batches(epochs[name], train.lengths, work.steps if number >= 0 else 2)
            trained = contestant.train(train, batches)
            record = {"contestant": name, "round": number, "work": asdict(work)}
            record["train_tokens_per_second"] = int(train.lengths[np.concatenate(batches)].sum()) / trained.seconds
            if name != "peft_tuned":
                start = time.perf_counter()
                contestant.evaluate(evaluated)
                record["evaluation_tokens_per_second"] = int(evaluated.lengths.sum()) / (time.perf_counter() - start)
            record["alone"] = was_alone(busy, time.perf_counter() - began)
            if number >= 0:
                records.append(record)
                print(f"{number} {name} {record['train_tokens_per_second']:,.0f} tokens/s", file=sys.stderr, flush=True)
    return records


def table(result: Record) -> str:
    """Markdown: one row for each work, with the ratios of the rounds."""
    machine, records = result["environment"], result["measurements"]
    not_alone = sum(record["alone"] is False for record in records)
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads; torch {machine['versions']['torch']};"
        f" {result['rounds']} rounds."
        + (f" Measurements that were not alone on the machine: {not_alone}." if not_alone else ""),
        "",
        "| model, LoRA on, max_length | without int8 | tokens/s: int8, without | training, int8 / without"
        " | evaluation, int8 / without | training, int8 / tuned PEFT |",
        "|---|---|---|---|---|---|",
    ]
    for work in result["works"]:
        by_name = {
            name: [r for r in records if r["contestant"] == name and r["work"] == work]
            for name in ("dense", "int8", "peft_tuned")
        }
        dense, int8, peer = by_name.values()
        rates = [spread([r["train_tokens_per_second"] for r in part]) for part in (int8, dense)]
        cells = [
            f"{MODELS[work['model']]}, {PLACES[work['targets']]}, {work['max_length']}",
            WITHOUT_INT8[work["processor"]],
            ", ".join("" if rate is None else f"{rate.median:,.0f}" for rate in rates),
            ratios(int8, dense, "train_tokens_per_second"),
            ratios(int8, dense, "evaluation_tokens_per_second"),
            ratios(int8, peer, "train_tokens_per_second"),
        ]
        lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command."""
    parser = OneLineParser(description="Measure what 8-bit products save on a CPU.", allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="number of rounds (default: 5)")
    flag: dict[str, Any] = {"type": parse_bool, "nargs": "?", "const": True, "default": False, "metavar": "BOOL"}
    parser.add_argument("--quick", help="the first work only, one round; changes no page", **flag)
    parser.add_argument("--number", type=int, metavar="N", help="measure work N in this process and print its JSON")
    parser.add_argument("--folder", type=Path, help="prepared models and tokens (default: made for this call)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    return exit_status(lambda: command(argv), "interrupted")


def command(argv: Sequence[str] | None) -> int:
    """Prints the table, writes JSON and renews docs/speed.md. Returns the exit status."""
    options = make_parser().parse_args(argv)
    if options.number is not None:
        limit_libraries()
        with contextlib.redirect_stdout(sys.stderr):
            records = measure(PLAN[options.number], options.rounds, options.folder)
        print(json.dumps(records))
        return 0
    if options.rounds < 1:
        raise UserError(f"--rounds {options.rounds}: must be at least 1")
    result = _measure_all(PLAN[:1] if options.quick else PLAN, 1 if options.quick else options.rounds)
    publish(result, table(result), OUTPUT, "int8_speed", partly=options.quick)
    return 0


def _measure_all(works: Sequence[Work], rounds: int) -> Record:
    """Each work in a process of its own, because instructions are hidden before torch is loaded."""
    result: Record = {"environment": environment_record(), "rounds": rounds, "works": [], "measurements": []}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), {work.model for work in works}, {work.max_length for work in works})
        for number, work in enumerate(works):
            command = [sys.executable, "-m", "benchmarks.int8", "--number", str(number), "--rounds", str(rounds)]
            environment = os.environ | {VARIABLE: work.processor, "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(
                [*command, "--folder", folder],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
            if done.returncode:
                raise UserError(f"{work}: the measurement failed")
            result["works"].append(asdict(work))
            result["measurements"] += json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    sys.exit(main())
