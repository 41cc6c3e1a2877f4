"""Proves an exported folder: a fresh process loads it with Transformers alone and must give the run's own logits.

The reference is the run's merged model in fp32, by Hugging Face's own forward. ``predictions.parquet`` is the second
witness: the run wrote it in its own precision, through its own code.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.data.splits import stratified_parts
from finetuning.data.texts import TextData
from finetuning.data.tokens import TokenizedSplit
from finetuning.errors import ExportFailed, UserError
from finetuning.export import fresh_process

LARGEST_DIFFERENCE = 1e-4  # of two logits, or of two probabilities, that count as the same
ROUNDING = {
    "fp32": 2.0**-24,
    "tf32": 2.0**-11,
    "fp16": 2.0**-11,
    "bf16": 2.0**-9,
    "int8": 2.0**-7,
}  # unit roundoff; int8: of both
# How many times its unit roundoff a precision may move a logit, relative to the largest logit. MiniLM in bf16: 2 to 4.
ROUNDING_STEPS = 16
PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class HeldOut:
    """Texts of validation and test, with what the run predicted for them."""

    texts: list[str]
    sequences: list[np.ndarray]  # the token ids of each text, as the run cut them
    labels: np.ndarray  # (n,)
    stored: np.ndarray  # (n, classes), the logits of predictions.parquet
    total: int  # number of held-out texts of the run


@dataclass(frozen=True)
class AgainstPredictions:
    """How the fp32 logits compare with those that the run stored."""

    precision: str
    largest_difference: float
    changed: int  # labels
    largest_margin: float  # of the changed labels: between the two highest logits that the run stored
    rounding: float  # what the precision may move the difference of two logits by


@dataclass(frozen=True)
class InPipeline:
    """What a pipeline makes of the same texts, which it cuts at their end."""

    same_tokens: int  # texts that a pipeline reads as the run did
    largest_difference: float  # of the probabilities of these texts
    changed: int  # labels, of all texts
    run_accuracy: float
    accuracy: float


@dataclass(frozen=True)
class Proof:
    """What was compared, and how large the differences were."""

    texts: int
    total: int
    largest_difference: float  # of the logits: fresh process and reference
    dtype_difference: float | None  # what rounding the weights to --dtype costs; None for fp32
    dtype_changed: int
    predictions: AgainstPredictions
    pipeline: InPipeline | None  # None for an adapter
    onnx_difference: float | None


def held_out(
    texts: TextData, tokens: Mapping[str, TokenizedSplit], stored: Mapping[tuple[str, int], Any], limit: int
) -> HeldOut:
    """At most ``limit`` held-out texts, stratified by label.

    Args:
        texts: validation, and test if the run evaluated it.
        tokens: the same splits as token ids.
        stored: from ``read_predictions``.
        limit: largest number of texts.

    Raises:
        UserError: these are not the texts that the run predicted.
    """
    keys = [(name, int(row)) for name, split in texts.splits.items() for row in split.rows]
    labels = np.concatenate([split.labels for split in texts.splits.values()])
    if set(keys) != set(stored) or any(stored[key][0] != label for key, label in zip(keys, labels, strict=True)):
        raise UserError("the run's data has changed: its held-out texts are not those of predictions.parquet")
    everything = [text for split in texts.splits.values() for text in split.texts]
    sequences = [split.sequence(i) for split in tokens.values() for i in range(len(split))]
    chosen = np.sort(stratified_parts(labels, [min(limit, len(keys))], seed=0)[0])
    return HeldOut(
        [everything[i] for i in chosen],
        [sequences[i] for i in chosen],
        labels[chosen],
        np.array([stored[keys[i]][1] for i in chosen], dtype=np.float32),
        len(keys),
    )


def fresh_answers(folder: Path, held: HeldOut, pad_id: int, **job: Any) -> dict[str, np.ndarray]:
    """What a new Python process computes that loads ``folder`` and cannot import this project.

    Args:
        folder: the exported folder; the process starts in the folder above it.
        held: the texts.
        pad_id: the tokenizer's padding id.
        job: ``texts``, ``onnx``, ``base`` and ``classes`` of ``fresh_process.py``.

    Raises:
        ExportFailed: the process could not load the folder or classify with it.
    """
    desk = folder.parent / "proof"
    desk.mkdir(exist_ok=True)
    job = {"model": folder.name, "pad_id": pad_id, "base": None, "texts": None, "onnx": None} | job
    (desk / "job.json").write_text(json.dumps(job), encoding="utf8")
    offsets = np.cumsum([0, *(len(sequence) for sequence in held.sequences)])
    np.savez(desk / "tokens.npz", tokens=np.concatenate(held.sequences), offsets=offsets)
    run_alone([fresh_process.__file__, desk.name], folder.parent)
    with np.load(desk / "answers.npz") as answers:
        return dict(answers)


def run_alone(words: Sequence[str], folder: Path) -> str:
    """Runs Python in a folder without this project, without a network, and returns what it printed.

    Raises:
        ExportFailed: the process failed.
    """
    places = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    kept = [place for place in places if Path(place).resolve() != PROJECT]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(kept), "HF_HUB_OFFLINE": "1"}
    # -P: the folder of the script is not searched for modules
    done = subprocess.run([sys.executable, "-P", *words], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise ExportFailed(f"a fresh process cannot use the exported folder: {reason}")
    return done.stdout


def check_same(what: str, found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference.

    Raises:
        ExportFailed: it is larger than ``LARGEST_DIFFERENCE``, or not a number.
    """
    largest = float(np.abs(found - expected).max(initial=0.0))
    if not largest <= LARGEST_DIFFERENCE:
        raise ExportFailed(
            f"{what} differ from the run's by up to {largest:.2g}, more than {LARGEST_DIFFERENCE:g}: nothing is kept"
        )
    return largest


def rounding_of(precision: str, logits: np.ndarray) -> float:
    """How far products in a precision may move one of these logits."""
    return max(ROUNDING_STEPS * ROUNDING[precision] * float(np.abs(logits).max()), LARGEST_DIFFERENCE)


def against_predictions(reference: np.ndarray, stored: np.ndarray, precision: str) -> AgainstPredictions:
    """Compares the reference with the logits that the run stored.

    Args:
        reference: ``(n, classes)``, of the merged model in fp32.
        stored: ``(n, classes)``, of the run's own evaluation.
        precision: of the run's products: a key of ``ROUNDING``.

    Raises:
        ExportFailed: they differ by more than the rounding of that precision can explain.
    """
    largest = float(np.abs(reference - stored).max())
    rounding = 2 * rounding_of(precision, stored)  # the difference of two logits moves by twice as much as one logit
    changed = reference.argmax(1) != stored.argmax(1)
    ordered = np.sort(stored[changed], axis=1)
    margin = float((ordered[:, -1] - ordered[:, -2]).max(initial=0.0))
    if not 2 * largest <= rounding:  # a label whose margin is larger has then not changed
        raise ExportFailed(
            f"predictions.parquet differs from the merged model by up to {largest:.2g}; {precision} explains"
            f" {rounding / 2:.2g} at most: the run's files do not belong together, and nothing is kept"
        )
    return AgainstPredictions(precision, largest, int(changed.sum()), margin, rounding)


def in_pipeline(
    scores: np.ndarray, reference: np.ndarray, held: HeldOut, same: np.ndarray, tolerance: float
) -> InPipeline:
    """Compares a pipeline's probabilities with the reference.

    Args:
        scores: ``(n, classes)``, the pipeline's.
        reference: ``(n, classes)`` logits.
        held: the texts.
        same: ``(n,)`` bool, whether a pipeline reads the same tokens.
        tolerance: the largest difference of probabilities of texts with the same tokens.

    Raises:
        ExportFailed: a probability of a text with the same tokens differs by more.
    """
    exponentials = np.exp(reference - reference.max(1, keepdims=True))
    probabilities = exponentials / exponentials.sum(1, keepdims=True)
    largest = float(np.abs(scores - probabilities)[same].max(initial=0.0))
    if not largest <= tolerance:
        raise ExportFailed(f"a pipeline's probabilities differ from the run's by up to {largest:.2g}: nothing is kept")
    run_labels, labels = reference.argmax(1), scores.argmax(1)
    return InPipeline(
        int(same.sum()),
        largest,
        int((run_labels != labels).sum()),
        float((run_labels == held.labels).mean()),
        float((labels == held.labels).mean()),
    )
