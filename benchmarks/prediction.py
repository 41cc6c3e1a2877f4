"""Compares ``predict.py`` with a Transformers pipeline: ``python -m benchmarks.prediction``.

All label the same reviews with the same exported folder. Each measurement is a process of its own, and the contestants
take turns. A ratio is from two measurements of the same round.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Record
from finetuning.config import RunConfig
from finetuning.errors import UserError
from finetuning.pages import Table, dated
from finetuning.processes import processor_seconds
from finetuning.settings import check_data_dir
from finetuning.storage import read_json, write_json

NAMES = {
    "suite": "this suite",
    "pipeline": "pipeline, batches of 32",
    "pipeline_tuned": "pipeline, batches of 32, bf16, sorted by length",
}
BATCH = 32
MAX_LENGTH = 256  # tokens, the suite's default
MODEL, WORK = "minilm", "work.json"  # in the folder of a benchmark
COLUMNS = ("", "tokens/s", "suite / it", "peak memory, MiB", "same label as the pipeline in fp32, %")
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
    from local_dataset_utilities import load_texts
    from local_model_utilities import find_base_model, load_tokenizer

    config = RunConfig.from_settings(
        offline=True, data_dir=data_dir, limit_test=texts, max_length=MAX_LENGTH, truncation="head"
    )
    workload.prepare(folder, [MODEL], [])
    tokenizer = load_tokenizer(find_base_model(config))
    write_tokenizer(folder / MODEL, tokenizer, MAX_LENGTH)
    reviews = load_texts(config.data, offline=True).splits["test"].texts
    tokens = len(encode_texts(reviews, tokenizer, config.data)[0])
    write_json(folder / WORK, {"texts": reviews, "tokens": tokens})


# --- one measurement, in a process of its own


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


# --- all of them


def measure_all(rounds: int, folder: Path, journal: harness.Journal) -> None:
    """All contestants in turns: ``UserError`` with the last line of a measurement that fails."""
    for number in range(rounds):
        for contestant in NAMES:
            journal.measured(partial(measure_one, contestant, folder), contestant=contestant, round=number)
        measured = [record for record in journal.records if record["round"] == number]
        labels = {record["contestant"]: record.pop("labels", None) for record in measured}
        for record in measured:
            if labels[record["contestant"]] is not None:
                pairs = zip(labels[record["contestant"]], labels["pipeline"], strict=True)
                record["same_labels"] = statistics.mean(ours == theirs for ours, theirs in pairs)


def measure_one(contestant: str, folder: Path) -> Record:
    """What ``measure`` returns, from a new process."""
    words = ["benchmarks.prediction", "--contestant", contestant, "--folder", str(folder)]
    record: Record = harness.measured_in_process(words, CUDA_VISIBLE_DEVICES="")  # the pipeline computes on the CPU
    if "error" in record:
        raise UserError(f"{contestant}: {record['error']}")
    return record


def record_line(record: Record) -> str:
    """A measurement in one line of output."""
    return f"{record['round']} {record['contestant']} {record['tokens_per_second']:,.0f} tokens/s"


def table(result: Record) -> str:
    """Markdown: speed and memory of each contestant, the suite's speed as a multiple, and equal labels."""
    environment, records = result["environment"], result["measurements"]
    tokens = result["tokens"] / result["texts"]
    by_name = {name: [record for record in records if record["contestant"] == name] for name in NAMES}
    rows = []
    for contestant, mine in by_name.items():
        rate = statistics.median(record["tokens_per_second"] for record in mine)
        speed = "" if contestant == "suite" else harness.ratios(by_name["suite"], mine, "tokens_per_second")
        peak = statistics.median(record["peak_bytes"] / 2**20 for record in mine)
        same = statistics.mean(record["same_labels"] for record in mine)
        rows.append((NAMES[contestant], f"{rate:,.0f}", str(speed), f"{peak:,.0f}", f"{100 * same:.1f}"))
    conditions = (
        f"{result['texts']:,} reviews of {tokens:.0f} tokens on average, up to {MAX_LENGTH}; MiniLM.\n"
        f"{harness.machine(environment, 'torch', 'transformers')}; {result['rounds']} round(s)."
        f"{harness.not_alone(records)}"
    )
    return f"{conditions}\n\n{dated(Table(COLUMNS, rows), [environment])}"


@harness.as_main
def main(argv: Sequence[str] | None) -> int:
    """Prints the table, writes JSON and renews docs/speed.md. Returns the exit status."""
    from finetuning.runs.measurements import environment_record

    parser = harness.make_parser(
        "Compare predict.py with a Transformers pipeline on a CPU.", quick="200 reviews, one round; changes no page"
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="number of rounds (default: 3)")
    parser.add_argument("--texts", type=int, default=2000, metavar="N", help="number of reviews (default: 2000)")
    parser.add_argument("--data_dir", type=Path, help="the official IMDb (default: the packaged reviews)")
    parser.add_argument("--contestant", choices=list(NAMES), help="measure it in this process and print JSON")
    parser.add_argument("--folder", type=Path, help="for --contestant: prepared model and reviews")
    options = parser.parse_args(argv)
    if options.contestant is not None:
        return harness.answer(partial(measure, options.contestant, options.folder))
    harness.require_positive(options, "rounds", "texts")
    check_data_dir(options.data_dir)
    rounds, texts = (1, min(200, options.texts)) if options.quick else (options.rounds, options.texts)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, texts, options.data_dir)
        conditions = {"environment": environment_record(), "rounds": rounds, "texts": texts}
        conditions["tokens"] = read_json(folder / WORK)["tokens"]
        journal = harness.start_journal("prediction", options, conditions, show=record_line)
        measure_all(rounds, folder, journal)
    harness.publish("prediction", journal, table, partly=harness.reduced(parser, options, "rounds", "texts"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
