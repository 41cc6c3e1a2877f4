"""A run as it is left on disk, with answers of our choice."""

from pathlib import Path
from typing import Any

import numpy as np

from finetuning.config import RunConfig
from finetuning.runs.history import write_predictions

Split = tuple[np.ndarray, np.ndarray]  # labels (n,), logits (n, classes)


def result_of_run(names: list[str], splits: dict[str, Split], **settings: Any) -> dict[str, Any]:
    """The content of ``result.json`` that the report reads."""
    scores = {
        split: {"accuracy": float((logits.argmax(1) == labels).mean()), "loss": 0.5, "examples": len(labels)}
        for split, (labels, logits) in splits.items()
    }
    return {
        "status": "finished",
        "config": RunConfig.from_settings(**settings).to_dict(),
        "command": "python finetune_lora.py --dataset 'a <b>'",
        "environment": {
            "python": "3.11", "versions": {"torch": "2"}, "cpu": "a processor", "threads": 2, "gpus": [], "git": None,
            "alone": False,
        },
        "parameters": {"total": 200, "trainable": 10},
        "data": {
            "source": "a set <i>", "label_names": names, "sizes": {s: len(v[0]) for s, v in splits.items()},
            "leaks_dropped": 3, "notes": ["a note & more"],
        },
        "task": {"kind": "single-label", "class_weights": None},
        "train": {"seconds": 12.5, "steps": 40, "epochs": 2.0, "tokens_per_second": 1234.0},
        "files": {"adapter_model.safetensors": 2**20},
        "memory": {"peak_bytes": 2**30, "source": "a counter"},
        "seconds": 20.0,
        **scores,
    }  # fmt: skip


def leave_predictions(directory: Path, splits: dict[str, Split], tokens: int = 9) -> None:
    """``predictions.parquet``; the row of a text is its position, and its length ``tokens`` or the row, if shorter."""
    stored = {split: (np.arange(len(labels)), labels, logits) for split, (labels, logits) in splits.items()}
    lengths = {split: {row: min(row + 1, tokens) for row in range(len(part[0]))} for split, part in splits.items()}
    write_predictions(directory, stored, lengths)


def random_split(n: int, classes: int, seed: int, scale: float = 2.0) -> Split:
    """Labels drawn from the probabilities of random logits, so that the probabilities are true."""
    generator = np.random.default_rng(seed)
    logits = scale * generator.normal(size=(n, classes))
    labels = (logits + generator.gumbel(size=(n, classes))).argmax(1)
    return labels, logits
