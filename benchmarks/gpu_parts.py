"""The parts of ``benchmarks.gpu`` that are whole runs; ``gpu_steps.py`` has those that measure steps.

Each part runs in a process of its own and gives a record that JSON can hold. A part gets ``Sizes``: on a GPU those of
DistilBERT-base, in the small form those of a toy on a CPU. They need a folder with a model and texts, which the first
part makes from random numbers.
"""

import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.harness import TRAINING_FLAGS, Record
from compare_methods import ROOT
from finetuning.runs.files import read_result

RUN_FLAGS = ("--epochs", "1", *TRAINING_FLAGS.split(), "--limit_validation", "200", "--limit_test", "200")
METHODS: dict[str, tuple[str, ...]] = {
    "lora": (),
    "qlora": ("--q_lora", "True"),
    "full": ("--method", "full"),
    "selective": ("--method", "selective"),
    "lora, plain path": ("--efficient", "False"),
}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Sizes:
    """How much is done, and where."""

    accelerator: Literal["cpu", "gpu"] = "gpu"
    start: Literal["spawn", "fork"] = "spawn"  # of a part's process; a forked one cannot use a GPU, but starts at once
    texts: int = 2000
    max_length: int = 256
    layers: int = 6
    width: int = 768
    heads: int = 12
    vocabulary: int = 30522
    steps: int = 30
    batch_sizes: tuple[int, ...] = (16, 64, 128, 256)
    lengths: tuple[int, ...] = (64, 128, 256, 512)
    tokens: int = 32_768  # of attention at each length
    precisions: tuple[str, ...] = ("bf16", "fp16", "fp32")


SMALL = Sizes(
    accelerator="cpu", start="fork", texts=48, max_length=32, layers=2, width=32, heads=2, vocabulary=500, steps=3,
    batch_sizes=(8,), lengths=(16,), tokens=64, precisions=("fp32",),
)  # fmt: skip


# --- model and texts


def make_folder(folder: Path, sizes: Sizes) -> Record:
    """A model with random weights, a tokenizer with one token a word, texts whose words tell the label, and tokens."""
    import pandas as pd
    import torch
    from transformers import BertTokenizer, DistilBertConfig, DistilBertForSequenceClassification

    from benchmarks.workload import save_split
    from finetuning.config import RunConfig
    from finetuning.models.base_model import load_tokenizer, read_base_model
    from local_dataset_utilities import load_texts, tokenize

    torch.manual_seed(0)
    model, texts = folder / "model", folder / "texts"
    config = DistilBertConfig(
        vocab_size=sizes.vocabulary, dim=sizes.width, n_layers=sizes.layers, n_heads=sizes.heads,
        hidden_dim=4 * sizes.width,
    )  # fmt: skip
    DistilBertForSequenceClassification(config).save_pretrained(model)
    words = [f"w{number}" for number in range(sizes.vocabulary - len(SPECIAL))]
    (model / "vocab.txt").write_text("\n".join([*SPECIAL, *words]) + "\n", encoding="utf8")
    BertTokenizer(str(model / "vocab.txt")).save_pretrained(model)
    texts.mkdir()
    generator = random.Random(0)
    for name, count in {"train": sizes.texts, "validation": 200, "test": 200}.items():
        rows = [_text(generator, words, i % 2, sizes.max_length) for i in range(count)]
        pd.DataFrame(rows, columns=["text", "label"]).to_csv(texts / f"{name}.csv", index=False)
    run = RunConfig.from_settings(dataset="text", data_dir=texts, model_name=str(model), max_length=sizes.max_length)
    splits = tokenize(
        load_texts(run.data, offline=True), load_tokenizer(read_base_model(str(model), model)), run.data, test=False
    )
    save_split(folder, "train", sizes.max_length, splits["train"])
    lengths = splits["train"].lengths
    return {
        "texts": len(lengths),
        "tokens": int(lengths.sum()),
        "longest_share": float((lengths == lengths.max()).mean()),
    }


def _text(generator: random.Random, words: list[str], label: int, max_length: int) -> tuple[str, int]:
    """A text of IMDb's spread of lengths; a third of its words come from the label's half of the vocabulary."""
    count = max(4, min(int(generator.lognormvariate(0, 0.7) * max_length * 0.8), 4 * max_length))
    half = len(words) // 2
    own = words[:half] if label else words[half:]
    return " ".join(generator.choice(own if i % 3 == 0 else words) for i in range(count)), label


# --- environment and tests


def environment(_: Path, sizes: Sizes) -> Record:
    """Versions and hardware, and what this card can do."""
    import torch

    from finetuning.runs.measurements import environment_record

    record = environment_record()
    if sizes.accelerator == "gpu":
        card = torch.cuda.get_device_properties(0)
        record |= {
            "gpu": card.name,
            "gpu_memory_bytes": card.total_memory,
            "compute_capability": f"{card.major}.{card.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "flash_attention": torch.backends.cuda.is_flash_attention_available(),
        }
    return record


def gpu_tests(_: Path, sizes: Sizes) -> Record:
    """The tests that need a GPU; without one all are skipped."""
    import pytest

    outcomes: Counter[str] = Counter()
    failed: list[str] = []

    class Plugin:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                outcomes[report.outcome] += 1
            if report.outcome == "failed":
                failed.append(report.nodeid)

    files = [ROOT / "tests" / "test_gpu_runs.py"] if sizes.accelerator == "cpu" else [ROOT / "tests"]
    # Some modules are imported already: their asserts cannot be rewritten.
    options = "-m gpu -q -p no:xdist -p no:cacheprovider -o addopts= -o filterwarnings=default --assert=plain"
    status = int(pytest.main([*options.split(), "--rootdir", str(ROOT), *map(str, files)], plugins=[Plugin()]))
    return {**outcomes, "failed_tests": failed, "exit_status": status}


# --- whole runs


def one_run(folder: Path, sizes: Sizes, method: str, precision: str) -> Record:
    """One epoch of the command, with its test."""
    output = folder / f"run-{method}-{precision}".replace(", ", "-").replace(" ", "-")
    status = _command(_words(folder, sizes, output, "--precision", precision, *METHODS[method]))
    result = read_result(output)
    if status:
        raise RuntimeError(result["error"])
    tokens = result["data"]["tokens"]["train"]
    return {
        "test_accuracy": result["test"]["accuracy"],
        "train_seconds": result["train"]["seconds"],
        "run_seconds": result["seconds"],
        "train_tokens_per_second": tokens / result["train"]["seconds"],
        "peak_bytes": result["memory"]["peak_bytes"],
    }


def _words(folder: Path, sizes: Sizes, output: Path, *more: str) -> list[str]:
    return [
        "--model_name", str(folder / "model"), "--dataset", "text", "--data_dir", str(folder / "texts"),
        "--output_dir", str(output), "--max_length", str(sizes.max_length), *RUN_FLAGS,
        "--accelerator", sizes.accelerator, "--baseline", "False", *more,
    ]  # fmt: skip


def _command(words: list[str]) -> int:
    from finetune_lora import main

    sys.argv = ["finetune_lora.py", *words]
    return main(words)


def interrupt_and_resume(folder: Path, sizes: Sizes) -> Record:
    """A run that SIGTERM ends after its first batches and that is continued, against one that was left alone."""
    batch = max(1, sizes.texts // 250)  # many batches, so that there is time
    more = (
        "--batch_size", str(batch), "--batch_tokens", str(batch * sizes.max_length), "--test", "False",
        "--precision", "fp32",
    )  # fmt: skip
    whole, parts = folder / "whole", folder / "interrupted"
    statuses = [
        _in_a_process(sizes, _words(folder, sizes, whole, *more), whole),
        _in_a_process(sizes, _words(folder, sizes, parts, *more), parts, interrupt=True),
        _in_a_process(sizes, ["--resume", "--output_dir", str(parts)], parts),
    ]
    if statuses != [0, 130, 0]:
        raise RuntimeError(f"exit statuses {statuses} instead of 0, 130 and 0")

    import torch
    from safetensors.torch import load_file

    first, second = (load_file(path / "adapter_model.safetensors") for path in (whole, parts))
    far = max(float((first[name] - second[name]).norm() / first[name].norm().clamp(min=1e-9)) for name in first)
    equal = all(torch.equal(first[name], second[name]) for name in first)
    return {"largest_relative_difference": far, "equal": equal}


def _in_a_process(sizes: Sizes, words: list[str], output: Path, interrupt: bool = False) -> int:
    """The exit status of the command, in a process of its own because signals go to whole processes."""
    log = output.with_suffix(".log")
    log.write_text("", encoding="utf8")
    context: Any = multiprocessing.get_context(sizes.start)
    process = context.Process(target=_logged, args=(words, log))
    process.start()
    while interrupt and process.is_alive():
        if "  batch " in log.read_text(encoding="utf8"):
            os.kill(int(process.pid or 0), signal.SIGTERM)
            break
        time.sleep(0.01)
    process.join()
    return int(process.exitcode or 0)


def _logged(words: list[str], log: Path) -> None:
    with log.open("w", encoding="utf8", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        status = _command(words)
    sys.exit(status)
