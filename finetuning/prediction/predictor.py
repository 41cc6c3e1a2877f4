"""Texts -> the probability of each label, through the suite's own batches and forward."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetuning.data.batches import evaluation_loader
from finetuning.data.tokens import encode
from finetuning.errors import UserError
from finetuning.models.base_model import BaseModel, check_vocabulary, find_base_model, load_tokenizer, read_base_model
from finetuning.models.build import build_classifier
from finetuning.models.classifier import Classifier
from finetuning.models.merged import keep_merged
from finetuning.models.pretrained import check_head
from finetuning.models.quantization import try_four_bits
from finetuning.prediction.answers import AnswerColumns
from finetuning.prediction.rows import PAIR, TEXT, Answered, Source
from finetuning.prediction.trained import Trained, read_trained
from finetuning.runs.loading import base_of_run, load_classifier
from finetuning.settings import HardwareSettings
from finetuning.training.hardware import (
    Hardware,
    gpu_obstacle,
    multiplies_bf16,
    prepare_process,
    resolve_hardware,
    seen_gpus,
    without_int8,
)


class Predictor:
    """Labels texts with a classifier.

    Args:
        trained: where the classifier comes from: how it reads texts.
        classifier: on any device.
    """

    def __init__(
        self, trained: Trained, base: BaseModel, classifier: Classifier, tokenizer: Any, device: torch.device
    ) -> None:
        self.trained, self.base, self.tokenizer, self.device = trained, base, tokenizer, device
        self.classifier = classifier.eval().to(device)
        keep_merged(self.classifier.model)  # for good: a call with a few texts takes less time than merging

    def __call__(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, done: Callable[[int], object] = lambda _: None
    ) -> np.ndarray:
        """The probabilities of each text's labels. They sum to 1, unless the run is multi-label.

        Texts are sorted by length into batches, so give many at once.

        Args:
            texts: at least one text; long texts are cut as in the run.
            pairs: the second text of each pair.
            done: is told how many texts were labelled.

        Returns:
            (n, labels) float64, in the order of the texts.

        Raises:
            UserError: a token has no embedding, or the classifier gives no number for a text.
        """
        config, clean = self.trained.config, self.trained.clean
        pairs = None if pairs is None else list(pairs)  # data sets of pairs need no cleaning
        rows = np.arange(len(texts))
        encoded = encode([clean(text) for text in texts], pairs, self.tokenizer, config.data)
        try:
            check_vocabulary(self.base, self.tokenizer, [encoded.tokens])
        except UserError as error:  # its message names the flag of a run
            raise UserError(str(error).removeprefix("--model_name ")) from None
        split = encoded.labelled(np.zeros_like(rows), rows)
        probabilities, parts = np.empty((len(texts), len(self.trained.label_names))), []
        pinned = self.device.type == "cuda"
        with torch.inference_mode():
            loader = evaluation_loader(split, config.training, int(self.tokenizer.pad_token_id), pin_memory=pinned)
            for batch in loader:
                given = {k: v.to(self.device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
                logits = self.classifier.logits(given)
                multi_label = self.trained.rule.multi_label
                parts.append((batch["rows"], torch.sigmoid(logits) if multi_label else torch.softmax(logits, dim=-1)))
                done(len(logits))
            for places, found in parts:  # only now: on a GPU each reading waits for all queued work
                probabilities[places.numpy()] = found.cpu().numpy()
        if not np.isfinite(probabilities).all():
            raise UserError(
                f"{self.trained.directory}: gives no number for a text: a weight is not finite, or a product too large"
                f" for {self.classifier.dtype}: restore its files, or predict on a CPU"
            )
        return probabilities


def answered(
    source: Source, predict: Predictor, answers: AnswerColumns, skip_bad: bool, done: Callable[[int], object]
) -> Iterator[Answered]:
    """The rows, in chunks, with the values of the columns of ``answers``.

    Args:
        skip_bad: whether rows without a text are allowed. They get an empty answer.
        done: is told how many rows were labelled or skipped.

    Raises:
        UserError: as in ``Source.rows``.
    """
    for rows in source.rows(skip_bad):
        good = np.flatnonzero(~rows.bad)
        probabilities = np.full((len(rows.bad), len(answers.names)), np.nan)
        if len(good):
            texts = {name: [column[i] for i in good] for name, column in rows.texts.items()}
            probabilities[good] = predict(texts[TEXT], texts.get(PAIR), done)
        done(len(rows.bad) - len(good))
        yield rows, answers.of(probabilities)


# --- loading


def predict(
    directory: Path, texts: Sequence[str], pairs: Sequence[str] | None = None
) -> tuple[list[str], list[list[float]]]:
    """The probability of each label, for each text: what other programs can call.

    Args:
        directory: a finished run, or an exported folder.
        texts: at least one text; long texts are cut as in the run.
        pairs: the second text of each pair, for a run on pairs.

    Returns:
        The label names, and one row of probabilities per text. They sum to 1, unless the run is multi-label.

    Raises:
        UserError: there is no trained classifier, its model or weights cannot be loaded, or it was not trained on
            pairs, or only on pairs.
    """
    trained = read_trained(directory)
    trained.check_pairs(pairs is not None)
    return trained.label_names, load_predictor(trained)(texts, pairs).tolist()


def load_predictor(trained: Trained) -> Predictor:
    """The classifier, ready to label texts on this machine.

    Raises:
        UserError: base model or weights cannot be loaded or have changed, or ``--precision`` needs other hardware.
    """
    stored = trained.config.hardware
    config = trained.config.changed(**on_this_machine(stored))
    hardware = resolve_hardware(config.hardware)
    if stored.precision == "int8":  # without the products, the same weights in others
        hardware = replace(hardware, int8=without_int8(hardware) is None)
        config = config.changed(precision="int8")
    prepare_process(hardware)
    if trained.exported:
        try:
            base = read_base_model(config.model.model_name, trained.directory)
            config = config.changed(max_length=min(config.data.max_length, base.longest_input))
            base = find_base_model(config, trained.directory)
            classifier = build_classifier(config, base, trained.label_names, _dtype(hardware, base))
            tokenizer = load_tokenizer(base)
        except UserError as error:  # the messages of a base model name the flag of a run
            raise UserError(str(error).removeprefix("--model_name ")) from None
        check_head(classifier.model, base.family, base.folder)
        trained = replace(trained, config=config)
    else:
        base = base_of_run(trained.directory, config, trained.base_files)
        names, dtype = trained.label_names, _dtype(hardware, base)
        if config.name == "qlora":
            try_four_bits(hardware.device, dtype)
        classifier = load_classifier(trained.directory, config, base, names, dtype, hardware.int8)
        tokenizer = load_tokenizer(base)
    return Predictor(trained, base, classifier, tokenizer, hardware.device)


def _dtype(hardware: Hardware, base: BaseModel) -> torch.dtype:
    return hardware.dtype if base.family.half else torch.float32


def on_this_machine(stored: HardwareSettings) -> dict[str, Any]:
    """Settings of a run, changed for one process on this machine. A run from a GPU can also predict on a CPU."""
    accelerator = "cpu" if stored.accelerator == "cpu" else "auto"
    without_gpu = accelerator == "cpu" or gpu_obstacle([0] if seen_gpus() else []) is not None
    lacking = stored.precision == "int8" or (stored.precision == "fp16" and without_gpu)
    lacking |= stored.precision == "bf16" and not without_gpu and not multiplies_bf16(0)
    return {
        "device": None, "devices": 1, "num_nodes": 1, "accelerator": accelerator,
        "precision": "auto" if lacking else stored.precision,
        "compile": False,  # compilation would take minutes
    }  # fmt: skip
