"""Proves an exported folder: a fresh process without this suite must give the run's own logits.

It loads the folder with Transformers, an adapter with PEFT, and an ONNX file with onnxruntime. The reference is the
run's merged model in fp32, by Hugging Face's own forward. ``predictions.parquet`` is the second witness: the run wrote
it in its own precision, through its own code.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetuning.data.splits import stratified_parts
from finetuning.data.texts import LabelledTexts, TextData
from finetuning.data.tokens import TokenizedSplit
from finetuning.errors import ExportFailed, UserError
from finetuning.export import fresh_process
from finetuning.export.fresh_process import logits_of
from finetuning.models.classifier import Classifier, pool_windows
from finetuning.runs.answers import Answers, joined
from finetuning.runs.finished import FinishedRun
from finetuning.settings import DataSettings

LARGEST_DIFFERENCE = 1e-4  # of two logits, or of two probabilities, that count as the same
# Unit roundoff; int8: of both factors.
ROUNDING = {"fp32": 2.0**-24, "tf32": 2.0**-11, "fp16": 2.0**-11, "bf16": 2.0**-9, "int8": 2.0**-7}
# How many times its unit roundoff a precision may move a logit, relative to the largest logit, or to 1 if all are
# smaller: the logits of a run that has learned little are small sums of larger terms. MiniLM in bf16: 2 to 4.
ROUNDING_STEPS = 16


@dataclass(frozen=True)
class HeldOut:
    """Texts of validation and test, with what the run predicted for them."""

    columns: list[list[str]]  # the texts, or the first and the second texts of pairs
    sequences: list[np.ndarray]  # the token ids of each text, as the run cut them, its windows one after another
    second_positions: np.ndarray | None  # (n,) where token type 1 begins; None if all tokens have one type
    windows: np.ndarray | None  # (n,) of each text; None: one
    stored: Answers  # of predictions.parquet
    total: int  # number of held-out texts of the run
    pad_id: int  # of the tokenizer
    window_pooling: str  # of the run

    def answers_of(self, model: Any) -> Answers:
        """What Hugging Face's classifier answers to these texts."""
        sequences, second_positions = self.model_inputs
        return replace(self.stored, logits=self.pooled(logits_of(model, sequences, self.pad_id, second_positions)))

    @property
    def model_inputs(self) -> tuple[list[np.ndarray], np.ndarray | None]:
        """The windows of all texts, and where token type 1 begins in each."""
        if self.windows is None:
            return self.sequences, self.second_positions
        parts = [part for ids, count in zip(self.sequences, self.windows, strict=True) for part in np.split(ids, count)]
        begins = self.second_positions
        return parts, None if begins is None else np.repeat(begins, self.windows)

    def pooled(self, logits: np.ndarray) -> np.ndarray:
        """The logits of the texts, from those of ``model_inputs``."""
        if self.windows is None:
            return logits
        return pool_windows(torch.from_numpy(logits), torch.from_numpy(self.windows), self.window_pooling).numpy()


@dataclass(frozen=True)
class Loaded:
    """A run that is exported. Writing it changes the classifier and the tokenizer."""

    run: FinishedRun
    base: Path  # the folder of its base model
    classifier: Classifier
    precision: str  # of the run's products: a key of ``ROUNDING``
    tokenizer: Any
    held: HeldOut  # the texts of the proof
    onnx_alone: bool = False  # whether Transformers' class cannot compute what the run does
    with_base: bool = False  # whether the folder of its adapter also has the base model


def held_out(
    texts: TextData,
    tokens: Mapping[str, TokenizedSplit],
    stored: Mapping[str, Answers],
    hashes: Mapping[str, str],
    limit: int,
    pad_id: int,
    window_pooling: str,
) -> HeldOut:
    """At most ``limit`` held-out texts, stratified by label, or by all labels of a text together.

    Args:
        texts: the splits that the run predicted.
        tokens: the same splits as token ids.
        stored: the run's own answers, split by split.
        hashes: of the splits when the run began, from ``data_hashes``.

    Raises:
        UserError: these are not the texts that the run predicted.
    """
    found = [in_order_of(split, stored.get(name)) for name, split in texts.splits.items()]
    parts = [part for part in found if part is not None]
    if len(parts) < max(len(found), len(stored)) or any(hashes.get(name) != s.sha256 for name, s in tokens.items()):
        raise UserError(
            "the run's data has changed: its held-out texts are not those of predictions.parquet: give the run's data"
            " with --data_dir"
        )
    answers = joined(parts)
    _, labels = np.unique(answers.truth, axis=0, return_inverse=True)
    chosen = np.sort(stratified_parts(labels.ravel(), [min(limit, len(labels))], seed=0)[0])
    given = [text for split in texts.splits.values() for text in split.by_row().values()]
    sequences = [split.sequence(i) for split in tokens.values() for i in range(len(split))]
    begins = [split.second_positions for split in tokens.values() if split.second_positions is not None]
    windows = [split.windows for split in tokens.values() if split.windows is not None]
    return HeldOut(
        [list(column) for column in zip(*(given[i] for i in chosen), strict=True)],
        [sequences[i] for i in chosen],
        np.concatenate(begins)[chosen] if begins else None,
        np.concatenate(windows)[chosen] if windows else None,
        answers.taken(chosen),
        len(sequences),
        pad_id,
        window_pooling,
    )


def in_order_of(split: LabelledTexts, answers: Answers | None) -> Answers | None:
    """The answers in the order of a split's texts; ``None`` if they are about other texts or labels."""
    if answers is None or len(answers.rows) != len(split.rows):
        return None
    places = np.empty(len(split.rows), dtype=np.int64)
    places[np.argsort(split.rows)] = np.argsort(answers.rows)
    ordered, labels = answers.taken(places), split.labels
    truth = labels == 1 if labels.ndim == 2 else labels[:, None] == np.arange(ordered.truth.shape[1])
    same = np.array_equal(ordered.rows, split.rows) and np.array_equal(ordered.truth, truth)
    return ordered if same else None


def fresh_answers(folder: Path, held: HeldOut, **job: Any) -> dict[str, np.ndarray]:
    """What a new Python process computes that loads ``folder``, and cannot import this project.

    Args:
        folder: the exported folder; the process starts in the folder above it.
        job: ``texts``, ``onnx``, ``onnx_alone``, ``base`` and ``classes`` of ``fresh_process.py``.

    Raises:
        ExportFailed: the process could not load the folder or classify with it.
    """
    desk = beside(folder, "proof")
    desk.mkdir(exist_ok=True)
    job = {"model": folder.name, "pad_id": held.pad_id} | job
    (desk / "job.json").write_text(json.dumps(job), encoding="utf8")
    sequences, second_positions = held.model_inputs
    offsets = np.cumsum([0, *(len(sequence) for sequence in sequences)])
    types: dict[str, Any] = {} if second_positions is None else {"second_positions": second_positions}
    np.savez(desk / "tokens.npz", tokens=np.concatenate(sequences), offsets=offsets, **types)
    run_alone([fresh_process.__file__, desk.name], folder.parent)
    with np.load(desk / "answers.npz") as answers:
        return dict(answers) | {name: held.pooled(answers[name]) for name in ("logits", "onnx") if name in answers}


def beside(folder: Path, name: str) -> Path:
    """A path of this name next to the exported folder, which may have the name itself."""
    return folder.parent / (f"{name}_" if folder.name == name else name)


def run_alone(words: Sequence[str], folder: Path) -> str:
    """Runs Python in a folder, without a network, and returns what it printed: ``ExportFailed`` if it failed."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}  # it may print names of labels
    # -P: the folder of the script is not searched for modules
    done = subprocess.run(
        [sys.executable, "-P", *words], cwd=folder, env=environment, capture_output=True, encoding="utf8"
    )
    if done.returncode:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise ExportFailed(f"a fresh process cannot use the exported folder: {reason}")
    return done.stdout


def compare_logits(what: str, found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference: ``ExportFailed`` if it is above ``LARGEST_DIFFERENCE``, or not a number."""
    largest = float(np.abs(found - expected).max(initial=0.0))
    if not largest <= LARGEST_DIFFERENCE:
        raise ExportFailed(
            f"{what} differ from the run's by up to {largest:.2g}, more than {LARGEST_DIFFERENCE:g}: nothing is kept"
        )
    return largest


def rounding_of(precision: str, logits: np.ndarray) -> float:
    """How far products in a precision may move one of these logits."""
    return max(ROUNDING_STEPS * ROUNDING[precision] * max(float(np.abs(logits).max()), 1.0), LARGEST_DIFFERENCE)


def changed_texts(answers: Answers, others: Answers) -> int:
    """Texts that get other labels."""
    return int((answers.given != others.given).any(1).sum())


# --- comparisons that say what they found: the command prints the sentences, and the model card keeps them


def in_fresh_process(what: str, found: np.ndarray, expected: np.ndarray, held: HeldOut) -> str:
    """Compares the logits of a fresh process with those of the run's merged model, by ``compare_logits``."""
    largest, texts = compare_logits(what, found, expected), len(held.sequences)
    sample = f"all {texts:,}" if texts == held.total else f"a stratified sample of {texts:,} of {held.total:,}"
    return (
        f"A fresh process loaded the folder without this suite and read the token ids of {sample} held-out texts. Its"
        f" logits differ from the run's merged fp32 model by {largest:.1e} at most (allowed: {LARGEST_DIFFERENCE:g})."
    )


def against_predictions(reference: Answers, stored: Answers, precision: str) -> str:
    """Compares the reference with the logits that the run stored.

    The margin of a label is the difference of the two highest logits. Multi-label: it is the distance of each
    label's logit from the threshold's. Two classes and a threshold: it is the distance of their difference from that.

    Args:
        reference: of the merged model in fp32.
        stored: of the run's own evaluation.
        precision: of the run's products: a key of ``ROUNDING``.

    Raises:
        ExportFailed: they differ by more than the rounding of that precision can explain.
    """
    largest = float(np.abs(reference.logits - stored.logits).max())
    rounding = rounding_of(precision, stored.logits)
    if not largest <= rounding:  # a label whose margin is larger than that of two logits has then not changed
        raise ExportFailed(
            f"predictions.parquet differs from the merged model by up to {largest:.2g}; {precision} explains"
            f" {rounding:.2g} at most: the run's files do not belong together, and nothing is kept"
        )
    changed, texts = reference.given != stored.given, changed_texts(reference, stored)  # (n, classes)
    said = (
        f"The run stored its predictions in {precision}. Its logits differ from the fp32 model's by {largest:.1e} at"
        f" most. The labels of {texts:,} of {len(changed):,} texts changed."
    )
    if not texts:
        return said
    rule = stored.rule
    if rule.threshold is None:
        ordered = np.sort(stored.logits[changed.any(1)], axis=1)
        margins, rounding = ordered[:, -1] - ordered[:, -2], 2 * rounding  # both logits may move
        of_what = "margin of a changed label, between its two highest logits,"
    else:
        scores, boundary = stored.logits, np.log(rule.threshold / (1 - rule.threshold))
        if rule.positive is not None:
            scores, rounding = scores - scores[:, ::-1], 2 * rounding
            changed = changed & (np.arange(2) == rule.positive)
        margins = np.abs(scores - boundary)[changed]
        of_what = "distance of a changed label's logit from the threshold"
    return f"{said} The {of_what} was {margins.max():.1e} at most; {precision} can move it by {rounding:.1e}."


def in_pipeline(
    scores: np.ndarray, reference: Answers, same: np.ndarray, tolerance: float, settings: DataSettings
) -> str:
    """Compares a pipeline's probabilities with the reference.

    Args:
        scores: ``(n, classes)``, the pipeline's.
        reference: the answers of the written weights.
        same: ``(n,)`` bool, whether a pipeline reads the same tokens: it cuts long texts at their end.
        tolerance: the largest difference of probabilities of texts with the same tokens.
        settings: how the run read its texts.

    Raises:
        ExportFailed: a probability of a text with the same tokens differs by more.
    """
    largest = float(np.abs(scores - reference.probabilities)[same].max(initial=0.0))
    if not largest <= tolerance:
        raise ExportFailed(f"a pipeline's probabilities differ from the run's by up to {largest:.2g}: nothing is kept")
    others = "the others"
    said = (
        f"A Transformers pipeline reads {same.sum():,} of {len(same):,} texts as the run did, and gives them the"
        f" probabilities of the exported weights (largest difference {largest:.1e})."
    )
    if not same.any():
        said, others = f"A Transformers pipeline reads none of {len(same):,} texts as the run did.", "them"
    if same.all():
        return said
    reason = ": it cuts long texts at their end, and the run kept their beginning and end"
    if settings.windows > 1:
        reason = ": it cuts long texts, and the run read them as windows"
    elif settings.truncation != "head_tail":
        reason = ""
    given, measure = reference.rule.given(scores), "exact match" if reference.rule.multi_label else "accuracy"
    return (
        f"{said} It reads {others} differently{reason}. That changes the labels of"
        f" {(given != reference.given).any(1).sum():,}: {measure} on these texts is"
        f" {(given == reference.truth).all(1).mean():.2%} in a pipeline and {reference.right.mean():.2%} with the run's"
        " tokens."
    )
