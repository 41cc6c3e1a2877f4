"""What all contestants start from: base models with one head, and the tokens of a sample of the packaged reviews.

Both are written once into a folder, so that every contestant's process starts from the same bytes.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from benchmarks.harness import TRAINING
from finetuning.config import RunConfig
from finetuning.data.tokens import TokenizedSplit
from finetuning.models.pretrained import load_pretrained
from finetuning.settings import PACKAGED_BASE, PACKAGED_DISTILBERT
from local_dataset_utilities import load_texts, tokenize
from local_model_utilities import find_base_model, load_tokenizer

MODELS = {
    "minilm": "MiniLM",
    "base": "DistilBERT-base's size",
    "mpnet": "MPNet-base",
    "modernbert": "ModernBERT, MiniLM's size",
    "qwen3": "Qwen3, MiniLM's size",
}
# Random models as deep and as wide as MiniLM, with its vocabulary and special tokens.
SHAPES: dict[str, dict[str, int]] = {
    "modernbert": {"intermediate_size": 576, "sep_token_id": 102, "cls_token_id": 101},
    "qwen3": {"intermediate_size": 1024, "num_key_value_heads": 4, "head_dim": 32},
}
TARGETS = {"qv": ("query", "value"), "all": ("query", "key", "value", "projection", "mlp")}
VARIANTS: dict[str, dict[str, Any]] = {  # ways to train, with the flags that each adds
    "lora": {},
    "lora_layers": {"lora_layers": "3-5"},
    "lora_plus": {"lora_plus_ratio": 16},
    "dora": {"lora_variant": "dora"},
    "pissa": {"lora_variant": "pissa"},
    "bitfit": {"method": "bitfit"},
    "norms": {"method": "norms"},
    "head": {"method": "head"},
}
LENGTHS = (128, 256, 512)
LABELS = ("negative", "positive")
TRAINING_TEXTS, HELD_OUT_TEXTS = 6000, 2400
RANK, ALPHA = 8, 16


@dataclass(frozen=True)
class Job:
    """One way to train, at which work, and the settings that are chosen for a tuned peer."""

    contestant: str
    model: str = "minilm"
    targets: Literal["qv", "all"] = "qv"
    max_length: int = 256
    precision: Literal["auto", "bf16", "fp32", "int8"] = "auto"
    batch_size: int = 32  # texts
    attention: Literal["sdpa", "eager"] = "sdpa"
    frozen: Literal["fp32", "bf16"] = "fp32"  # how frozen weights are stored
    accelerator: Literal["cpu", "gpu"] = "cpu"
    variant: str = "lora"  # a key of VARIANTS

    @property
    def config(self) -> RunConfig:
        """The suite's settings for the same work, with its own batches."""
        more = VARIANTS[self.variant]
        if "method" not in more:
            more = more | {"lora_r": RANK, "lora_alpha": ALPHA}
            more |= {f"lora_{name}": name in TARGETS[self.targets] for name in TARGETS["all"]}
        return RunConfig.from_settings(
            model_name=PACKAGED_DISTILBERT,
            offline=True,
            accelerator=self.accelerator,
            precision=self.precision,
            max_length=self.max_length,
            truncation="head",
            epochs=1,
            **TRAINING,
            **more,
        )


def attentions(model: str) -> tuple[Literal["sdpa", "eager"], ...]:
    """The ways in which Hugging Face's code computes attention: of MPNet it has one."""
    return ("eager",) if model == "mpnet" else ("sdpa", "eager")


# --- the folder


def prepare(folder: Path, models: Iterable[str], lengths: Iterable[int]) -> None:
    """Writes the models to ``folder/MODEL`` and the tokens to ``folder/SPLIT-LENGTH.npz``: MiniLM's, for all models."""
    base = RunConfig.from_settings(model_name=PACKAGED_DISTILBERT, offline=True)
    for model in models:
        _save_model(folder / model, model, base)
    for max_length in lengths:
        config = Job("suite", max_length=max_length).config.changed(
            limit_train=TRAINING_TEXTS, limit_validation=HELD_OUT_TEXTS
        )
        tokenizer = load_tokenizer(find_base_model(config))
        splits = tokenize(load_texts(config.data, offline=True), tokenizer, config.data, test=False)
        for name, split in splits.items():
            save_split(folder, name, max_length, split)


@contextmanager
def prepared(models: Iterable[str], lengths: Iterable[int]) -> Iterator[Path]:
    """A folder from ``prepare``, removed at the end."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), models, lengths)
        yield Path(folder)


def _save_model(folder: Path, model: str, config: RunConfig) -> None:
    """A classifier with a new head and Hugging Face's own dropout; MiniLM and MPNet have weights that were trained."""
    torch.manual_seed(0)
    packaged = find_base_model(config.changed(model_name=PACKAGED_BASE) if model == "mpnet" else config)
    classifier: Any
    if model in SHAPES:
        shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12} | SHAPES[model]
        ids = {"vocab_size": 30522, "pad_token_id": 0, "bos_token_id": 101, "eos_token_id": 102}
        classifier = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(model, **ids, **shape))
    elif model == "base":
        classifier = DistilBertForSequenceClassification(DistilBertConfig())
    else:
        classifier = load_pretrained(packaged, config.model, LABELS)
        for name, value in type(classifier.config)().to_dict().items():
            if "dropout" in name:
                setattr(classifier.config, name, value)
    classifier.config.id2label = dict(enumerate(LABELS))  # a head of other classes would be drawn anew
    classifier.config.label2id = {name: i for i, name in enumerate(LABELS)}
    classifier.save_pretrained(folder)
    load_tokenizer(packaged).save_pretrained(folder)


def save_split(folder: Path, name: str, max_length: int, split: TokenizedSplit) -> None:
    """Writes a split for ``read_split``."""
    arrays = {key: array for key, array in vars(split).items() if array is not None}
    np.savez(folder / f"{name}-{max_length}.npz", **arrays)


def read_split(folder: Path, name: str, max_length: int) -> TokenizedSplit:
    """``train`` or ``validation`` as ``prepare`` wrote it."""
    with np.load(folder / f"{name}-{max_length}.npz") as stored:
        return TokenizedSplit(**stored)


# --- samples with the same mix of lengths, because contestants get through different numbers of texts


def some_batches(batches: Sequence[np.ndarray], lengths: np.ndarray, count: int) -> list[np.ndarray]:
    """``count`` batches of an epoch, spread evenly from the shortest to the longest, in random order."""
    order = sorted(range(len(batches)), key=lambda i: (lengths[batches[i]].max(), lengths[batches[i]].sum()))
    return [batches[order[place]] for place in _places(len(batches), count)]


def sample(split: TokenizedSplit, count: int) -> TokenizedSplit:
    """``count`` texts, spread evenly over all lengths, in random order; all of them if there are no more."""
    return split.taken(np.argsort(split.lengths, kind="stable")[_places(len(split), count)])


def _places(total: int, count: int) -> np.ndarray:
    """``count`` of the numbers below ``total``, evenly spaced, in random order."""
    count = min(count, total)
    return np.random.default_rng(0).permutation(((np.arange(count) + 0.5) * total / count).astype(int))
