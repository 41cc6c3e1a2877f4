"""Compares ``predict.py`` with a Transformers pipeline: ``python -m benchmarks.prediction``.

All label the same reviews with the same exported folder. Each measurement is a process of its own, and the contestants
take turns. A ratio is from two measurements of the same round.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.publishing import publish
from finetuning.config import RunConfig, check_data_dir
from finetuning.errors import UserError, exit_status
from finetuning.flags import OneLineParser, parse_bool
from finetuning.pages import ROOT
from finetuning.processes import processor_seconds
from finetuning.storage import read_json, write_json

OUTPUT = Path(__file__).resolve().parent / "results" / "prediction.json"
NAMES = {
    "suite": "this suite",
    "pipeline": "pipeline, batches of 32",
    "pipeline_tuned": "pipeline, batches of 32, bf16, sorted by length",
}
BATCH = 32
MAX_LENGTH = 256  # tokens, the suite's default
MODEL, WORK = "minilm", "work.json"  # in the folder of a benchmark
Record = dict[str, Any]
Labels = list[str]


def prepare(folder: Path, texts: int, data_dir: Path | None) -> None:
    """Writes an exported folder, and test reviews with their number of tokens.

    Args:
        folder: where to write.
        texts: number of reviews.
        data_dir: the official IMDb; ``None`` takes the packaged reviews.

    Raises:
        UserError: the data cannot be read.
    """
    from benchmarks import workload
    from finetuning.data.tokens import encode_texts
    from finetuning.export.plain import write_tokenizer
    from finetuning.models.pretrained import load_tokenizer
    from local_dataset_utilities import load_texts
    from local_model_utilities import find_base_model

    config = RunConfig.from_settings(
        offline=True, data_dir=data_dir, limit_test=texts, max_length=MAX_LENGTH, truncation="head"
    )
    workload.prepare(folder, [MODEL], [])
    tokenizer = load_tokenizer(config.model.model_name, find_base_model(config))
    write_tokenizer(folder / MODEL, tokenizer, MAX_LENGTH)
    reviews = load_texts(config.data, offline=True).splits["test"].texts
    tokens = len(encode_texts(reviews, tokenizer, config.data)[0])
    write_json(folder / WORK, {"texts": reviews, "tokens": tokens})


# ---------------------------------------------------------------------------------------------------------------------
# one measurement, in a process of its own


def suite(folder: Path) -> Callable[[list[str]], Labels]:
    """Labels texts as ``predict.py`` does."""
    from finetuning.prediction.predictor import load_predictor
    from finetuning.prediction.trained import read_trained

    trained = read_trained(folder)
    predict = load_predictor(trained)
    return lambda texts: [trained.label_names[i] for i in predict(texts).argmax(1)]


def pipeline(folder: Path, tuned: bool) -> Callable[[list[str]], Labels]:
    """Labels texts as a pipeline does; ``tuned`` in bf16 and sorted by length, which a user must do."""
    import torch
    from transformers import pipeline as make_pipeline

    options: dict[str, Any] = {"dtype": torch.bfloat16 if tuned else torch.float32}
    classify: Any = make_pipeline("text-classification", model=str(folder), truncation=True, device="cpu", **options)

    def label(texts: list[str]) -> Labels:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i])) if tuned else range(len(texts))
        answers = classify([texts[i] for i in order], batch_size=BATCH)
        labels = [""] * len(texts)
        for i, answer in zip(order, answers, strict=True):
            labels[i] = answer["label"]
        return labels

    return label


def measure(contestant: str, folder: Path) -> Record:
    """Labels all reviews after a warm-up. The time is from texts to labels, the memory that of the whole process."""
    from finetuning.runs.measurements import peak_memory, was_alone

    work = read_json(folder / WORK)
    texts: list[str] = work["texts"]
    label = suite(folder / MODEL) if contestant == "suite" else pipeline(folder / MODEL, contestant != "pipeline")
    label(texts[:BATCH])
    busy, began = processor_seconds(), time.perf_counter()
    labels = label(texts)
    seconds = time.perf_counter() - began
    return {
        "contestant": contestant,
        "seconds": seconds,
        "tokens_per_second": work["tokens"] / seconds,
        "peak_bytes": peak_memory(on_gpu=False)["peak_bytes"],
        "alone": was_alone(busy, seconds),
        "labels": labels,
    }


# ---------------------------------------------------------------------------------------------------------------------
# all of them


def measure_all(rounds: int, texts: int, data_dir: Path | None) -> Record:
    """All contestants in turns.

    Raises:
        UserError: a measurement failed; the message has its last line.
    """
    from finetuning.runs.measurements import environment_record

    result: Record = {"environment": environment_record(), "rounds": rounds, "texts": texts, "measurements": []}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), texts, data_dir)
        result["tokens"] = read_json(Path(folder) / WORK)["tokens"]
        for number in range(rounds):
            labels: dict[str, Labels] = {}
            for contestant in NAMES:
                record = measure_in_process(contestant, Path(folder)) | {"round": number}
                labels[contestant] = record.pop("labels")
                print(f"{number} {contestant} {record['tokens_per_second']:,.0f} tokens/s", file=sys.stderr, flush=True)
                result["measurements"].append(record)
            for record in result["measurements"][-len(NAMES) :]:
                pairs = zip(labels[record["contestant"]], labels["pipeline"], strict=True)
                record["same_labels"] = statistics.mean(ours == theirs for ours, theirs in pairs)
    return result


def measure_in_process(contestant: str, folder: Path) -> Record:
    """What ``measure`` returns, from a new process."""
    command = [sys.executable, "-m", "benchmarks.prediction", "--contestant", contestant, "--folder", str(folder)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{contestant}: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
    record: Record = json.loads(done.stdout.splitlines()[-1])
    return record


def table(result: Record) -> str:
    """Markdown: speed and memory of each contestant, the suite's speed as a multiple, and equal labels."""
    from benchmarks.peers import ratios, spread

    machine, records = result["environment"], result["measurements"]
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "transformers"))
    not_alone = sum(record["alone"] is False for record in records)
    tokens = result["tokens"] / result["texts"]
    lines = [
        f"{result['texts']:,} reviews of {tokens:.0f} tokens on average, up to {MAX_LENGTH}; MiniLM.\n"
        f"{machine['cpu']}, {machine['threads']} threads; {versions}; {result['rounds']} round(s)."
        + (f" Measurements that were not alone on the machine: {not_alone}." if not_alone else ""),
        "",
        "| | tokens/s | suite / it | peak memory, MiB | same label as the pipeline in fp32, % |",
        "|---|---|---|---|---|",
    ]
    ours = [record for record in records if record["contestant"] == "suite"]
    for contestant, name in NAMES.items():
        mine = [record for record in records if record["contestant"] == contestant]
        rate = statistics.median(record["tokens_per_second"] for record in mine)
        speed = "" if contestant == "suite" else ratios(ours, mine, "tokens_per_second")
        memory = spread([record["peak_bytes"] / 2**20 for record in mine])
        same = statistics.mean(record["same_labels"] for record in mine)
        peak = "" if memory is None else f"{memory.median:,.0f}"
        lines.append(f"| {name} | {rate:,.0f} | {speed} | {peak} | {100 * same:.1f} |")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command."""
    parser = OneLineParser(description="Compare predict.py with a Transformers pipeline on a CPU.", allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="number of rounds (default: 3)")
    parser.add_argument("--texts", type=int, default=2000, metavar="N", help="number of reviews (default: 2000)")
    parser.add_argument("--data_dir", type=Path, help="the official IMDb (default: the packaged reviews)")
    flag: dict[str, Any] = {"type": parse_bool, "nargs": "?", "const": True, "default": False, "metavar": "BOOL"}
    parser.add_argument("--quick", help="200 reviews, one round; changes no page", **flag)
    parser.add_argument("--contestant", choices=list(NAMES), help="measure it in this process and print JSON")
    parser.add_argument("--folder", type=Path, help="for --contestant: prepared model and reviews")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    return exit_status(lambda: command(argv), "interrupted")


def command(argv: Sequence[str] | None) -> int:
    """Prints the table, writes JSON and renews docs/speed.md. Returns the exit status."""
    options = make_parser().parse_args(argv)
    if options.contestant is not None:
        with contextlib.redirect_stdout(sys.stderr):
            record = measure(options.contestant, options.folder)
        print(json.dumps(record))
        return 0
    if min(options.rounds, options.texts) < 1:
        raise UserError("--rounds, --texts: must be at least 1")
    check_data_dir(options.data_dir)
    rounds, texts = (1, min(200, options.texts)) if options.quick else (options.rounds, options.texts)
    result = measure_all(rounds, texts, options.data_dir)
    publish(result, table(result), OUTPUT, "prediction", partly=options.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
