"""Measures one contestant in this process and prints one line of JSON: ``python -m benchmarks.measure suite``.

With ``--choose`` it finds the best settings of a tuned peer instead. ``peers.py`` starts it for each measurement.
"""

import gc
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from benchmarks.contestants import CONTESTANTS, Contestant, Peft
from benchmarks.harness import Record
from benchmarks.workload import Job, attentions, prepared, read_split, sample, some_batches
from finetuning.data.batches import evaluation_loader
from finetuning.data.tokens import TokenizedSplit
from finetuning.runs.measurements import forget_peak, peak_memory, processor_seconds, was_alone
from finetuning.training.hardware import return_freed_memory

WARM_UP_STEPS = 2
FEWEST_STEPS = 3  # measured steps, at least
EVALUATED_PER_TRAINED = 2  # texts evaluated for each text trained on: inference takes less than half the time
MERGED_BATCHES_TOKENS = (6144, 24576)  # the faster one counts
TRIAL_TEXTS, TRIAL_REPEATS = 128, 2  # the faster of two counts
TRIAL_BATCHES = (4, 64)  # the smallest and the largest


# --- one measurement


def measure(job: Job, folder: Path, seconds: float) -> Record:
    """Trains for about ``seconds`` after a warm-up of two steps, then evaluates. Rates count real tokens only.

    All contestants make batches of the same texts and train on some of them. The speed of the warm-up decides how many
    batches. Short and long batches keep their shares (``workload.some_batches``). Memory is the peak from the start of
    the warm-up to the end of training, minus what the process held before: libraries and loaded weights.

    Args:
        job: who trains, and on what.
        folder: from ``workload.prepare``.
        seconds: training time to aim at; at least three steps are done.
    """
    busy, began = processor_seconds(), time.perf_counter()
    train, held_out = (read_split(folder, name, job.max_length) for name in ("train", "validation"))
    contestant = CONTESTANTS[job.contestant](job, folder)
    loaded = memory_before()
    epoch = contestant.batches(train)
    warm_up = contestant.train(train, some_batches(epoch, train.lengths, WARM_UP_STEPS))
    batches = some_batches(epoch, train.lengths, max(FEWEST_STEPS, math.ceil(seconds / warm_up.seconds_per_step)))
    measured = contestant.train(train, batches)
    peak = peak_memory(on_gpu=False)
    trained_on = np.concatenate(batches)
    tokens = int(train.lengths[trained_on].sum())
    evaluated = sample(held_out, EVALUATED_PER_TRAINED * len(trained_on))
    record = asdict(job) | {
        "trainable_parameters": contestant.trainable_parameters(),
        "train_examples": len(trained_on),
        "train_tokens": tokens,
        "train_steps": len(measured.ends),
        "train_seconds": measured.seconds,
        "train_tokens_per_second": tokens / measured.seconds,
        "padding_fraction": 1 - tokens / measured.padded_tokens,
        "loaded_bytes": loaded,
        "peak_bytes": peak["peak_bytes"],
        "peak_bytes_above_loaded": peak["peak_bytes"] - loaded,
        "peak_source": peak["source"],
        "evaluation_examples": len(evaluated),
    }
    if isinstance(contestant, Peft) and contestant.tuned:
        ways = [partial(contestant.evaluate, attention=attention) for attention in attentions(job.model)]
        record["evaluation_tokens_per_second"] = rate_of_the_fastest(ways, evaluated)
        if job.contestant == "peft_tuned":
            record["merged_evaluation_tokens_per_second"] = merged_rate(contestant, job, evaluated)
    else:
        record["evaluation_tokens_per_second"] = evaluation_rate(contestant.evaluate, evaluated)
    return record | {"alone": was_alone(busy, time.perf_counter() - began)}


def evaluation_rate(evaluate: Callable[[TokenizedSplit], None], split: TokenizedSplit) -> float:
    """Real tokens per second of the whole call, after a warm-up with an eighth of the texts."""
    evaluate(sample(split, max(1, len(split) // 8)))
    return rate_of(evaluate, split)


def rate_of(evaluate: Callable[[TokenizedSplit], None], split: TokenizedSplit) -> float:
    """Real tokens per second of the whole call."""
    began = time.perf_counter()
    evaluate(split)
    return float(split.lengths.sum() / (time.perf_counter() - began))


def rate_of_the_fastest(ways: Sequence[Callable[[TokenizedSplit], None]], split: TokenizedSplit) -> float:
    """The rate of the fastest way to evaluate, chosen on a quarter of the texts."""
    few = sample(split, max(1, len(split) // 4))
    return rate_of(max(ways, key=lambda evaluate: evaluation_rate(evaluate, few)), split)


def merged_rate(contestant: Peft, job: Job, split: TokenizedSplit) -> float:
    """The evaluation rate of the merged Hugging Face model, in batches sorted by length like the suite's."""
    model: Any = contestant.merge()

    def evaluate(part: TokenizedSplit, batch_tokens: int, attention: str) -> None:
        model.set_attn_implementation(attention)
        with torch.inference_mode():
            for batch in evaluation_loader(part, job.config.changed(batch_tokens=batch_tokens).training, pad_id=0):
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    ways = product(MERGED_BATCHES_TOKENS, attentions(job.model))
    return rate_of_the_fastest([partial(evaluate, batch_tokens=size, attention=name) for size, name in ways], split)


def memory_before() -> int:
    """Bytes held now. Freed memory is returned to the system first; on Linux the record of the peak is reset."""
    gc.collect()
    return_freed_memory()
    forget_peak(on_gpu=False)
    return int(peak_memory(on_gpu=False)["peak_bytes"])


# --- a tuned peer's settings


def choose(job: Job, folder: Path) -> Record:
    """The fastest settings of a tuned peer for this work. One setting is changed at a time and kept if it is faster.

    The batch is halved, or doubled, as long as that helps.
    """
    split = read_split(folder, "train", job.max_length)
    tried = []

    def rate(candidate: Job) -> float:
        contestant: Contestant = CONTESTANTS[job.contestant](candidate, folder)
        epoch = contestant.batches(split)
        contestant.train(split, some_batches(epoch, split.lengths, 1))
        batches = some_batches(epoch, split.lengths, TRIAL_TEXTS // candidate.batch_size)
        tokens = int(split.lengths[np.concatenate(batches)].sum())
        result = tokens / min(contestant.train(split, batches).seconds for _ in range(TRIAL_REPEATS))
        tried.append({**tuned_settings(candidate), "train_tokens_per_second": result})
        return result

    known = attentions(job.model)
    best = replace(job, attention=known[0])
    best_rate = rate(best)

    def kept(**change: Any) -> bool:
        nonlocal best, best_rate
        candidate = replace(best, **change)
        candidate_rate = rate(candidate)
        if candidate_rate <= best_rate:
            return False
        best, best_rate = candidate, candidate_rate
        return True

    for attention in known[1:]:
        kept(attention=attention)
    kept(frozen="bf16")
    least, greatest = TRIAL_BATCHES
    while best.batch_size > least and kept(batch_size=best.batch_size // 2):
        pass
    while job.batch_size <= best.batch_size < greatest and kept(batch_size=best.batch_size * 2):
        pass
    return {"chosen": tuned_settings(best), "tried": tried}


def tuned_settings(job: Job) -> Record:
    """The settings that are chosen for a tuned peer."""
    return {name: getattr(job, name) for name in ("batch_size", "attention", "frozen")}


# --- the command


@harness.as_main
def main(argv: Sequence[str] | None) -> int:
    """Prints one line of JSON. Returns the exit status: 0, or 2 if the input is refused."""
    parser = harness.make_parser("Measure one contestant.", choose="find the best settings of a tuned peer instead")
    parser.add_argument("contestant", choices=CONTESTANTS)
    for field in fields(Job):
        if field.name != "contestant":
            choices = getattr(field.type, "__args__", None)
            kind = int if field.type is int else str
            parser.add_argument(f"--{field.name}", type=kind, default=field.default, choices=choices)
    parser.add_argument("--seconds", type=float, default=10.0, help="training time to aim at (default: 10)")
    parser.add_argument("--folder", type=Path, help="prepared models and tokens (default: made for this call)")
    arguments = parser.parse_args(argv)
    job = Job(**{field.name: getattr(arguments, field.name) for field in fields(Job)})

    def record() -> Record:
        given = arguments.folder and nullcontext(arguments.folder)
        with given or prepared([job.model], [job.max_length]) as folder:
            return choose(job, folder) if arguments.choose else measure(job, folder, arguments.seconds)

    return harness.answer(record)


if __name__ == "__main__":
    sys.exit(main())
