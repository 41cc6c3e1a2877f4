"""Texts -> the probability of each label, through the suite's own batches and forward."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetuning.config import RunConfig
from finetuning.data.batches import evaluation_loader
from finetuning.data.tokens import TokenizedSplit, encode
from finetuning.errors import UserError
from finetuning.models.base_files import check_unchanged
from finetuning.models.classifier import Classifier
from finetuning.models.pretrained import check_head, load_tokenizer, longest_input
from finetuning.prediction.answers import AnswerColumns
from finetuning.prediction.rows import PAIR, TEXT, Rows, Source
from finetuning.prediction.trained import Trained, read_trained
from finetuning.training.hardware import Hardware, prepare_process, resolve_hardware, without_int8
from finetuning.training.trainer import quiet_lightning
from local_model_utilities import build_classifier, find_base_model, load_classifier


class Predictor:
    """Labels texts with a classifier.

    Args:
        trained: where the classifier comes from: how it reads texts.
        classifier: on any device.
        tokenizer: its tokenizer.
        device: where to compute.
    """

    def __init__(self, trained: Trained, classifier: Classifier, tokenizer: Any, device: torch.device) -> None:
        self.trained, self.tokenizer, self.device = trained, tokenizer, device
        self.classifier = classifier.eval().to(device)

    def __call__(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, done: Callable[[int], object] = lambda _: None
    ) -> np.ndarray:
        """The probabilities of each text's labels. They sum to 1, unless a text can have several labels.

        Texts are sorted by length into batches, so give many at once.

        Args:
            texts: at least one text; long texts are cut as in the run.
            pairs: the second text of each pair.
            done: is told how many texts were labelled.

        Returns:
            (n, labels) float64, in the order of the texts.
        """
        config, clean = self.trained.config, self.trained.clean
        seconds_of = None if pairs is None else list(pairs)  # data sets of pairs need no cleaning
        tokens, offsets, seconds = encode([clean(text) for text in texts], seconds_of, self.tokenizer, config.data)
        rows = np.arange(len(texts))
        split = TokenizedSplit(tokens, offsets, np.zeros_like(rows), rows, seconds)
        probabilities = np.empty((len(texts), len(self.trained.label_names)))
        with torch.inference_mode():
            for batch in evaluation_loader(split, config.training, int(self.tokenizer.pad_token_id)):
                given = {k: v.to(self.device) if torch.is_tensor(v) else v for k, v in batch.items()}
                logits = self.classifier.logits(given)
                several = self.trained.threshold is not None
                found = torch.sigmoid(logits) if several else torch.softmax(logits, dim=-1)
                probabilities[batch["rows"].numpy()] = found.cpu().numpy()
                done(len(logits))
        return probabilities


def answered(
    source: Source, predict: Predictor, answers: AnswerColumns, skip_bad: bool, done: Callable[[int], object]
) -> Iterator[tuple[Rows, list[list[Any]]]]:
    """The rows, in chunks, with the values of the columns of ``answers``.

    Args:
        source: the rows.
        predict: labels texts.
        answers: what to say about each text.
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


# ---------------------------------------------------------------------------------------------------------------------
# loading


def predict(
    directory: Path, texts: Sequence[str], pairs: Sequence[str] | None = None
) -> tuple[list[str], list[list[float]]]:
    """The probability of each label, for each text: what other programs can call.

    Args:
        directory: a finished run, or an exported folder.
        texts: at least one text; long texts are cut as in the run.
        pairs: the second text of each pair, for a run on pairs.

    Returns:
        The label names, and one row of probabilities per text. They sum to 1, unless texts have several labels.

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
    config = for_this_machine(trained.config)
    with quiet_lightning():  # hides Lightning's advice to use srun
        settings = config.hardware
        if settings.precision == "int8" and without_int8(settings) is not None:  # the same weights in other products
            settings = replace(settings, precision="auto")
        hardware = resolve_hardware(settings)
    prepare_process(hardware)
    if trained.exported:
        try:
            trained, classifier = exported_classifier(trained, config, hardware)
            tokenizer = load_tokenizer(config.model.model_name, trained.directory)
        except UserError as error:  # the messages of a base model name the flag of a run
            raise UserError(str(error).removeprefix("--model_name ")) from None
    else:
        folder = find_base_model(config)
        check_unchanged(folder, trained.base_files)
        classifier = load_classifier(
            trained.directory, config, folder, trained.label_names, hardware.dtype, hardware.int8
        )
        tokenizer = load_tokenizer(config.model.model_name, folder)
    return Predictor(trained, classifier, tokenizer, hardware.device)


def exported_classifier(trained: Trained, config: RunConfig, hardware: Hardware) -> tuple[Trained, Classifier]:
    """The classifier of an exported folder, and how it reads texts: no longer ones than its model has positions.

    Raises:
        UserError: the folder has no trained classifier, or it cannot be loaded.
    """
    longest = longest_input(config.model.model_name, trained.directory)
    config = config.changed(max_length=min(config.data.max_length, longest))
    folder = find_base_model(config)
    classifier = build_classifier(config, folder, trained.label_names, hardware.dtype)
    check_head(classifier.model, classifier.family, folder)
    return replace(trained, config=config), classifier


def for_this_machine(config: RunConfig) -> RunConfig:
    """The run's settings, changed for one process on this machine. A run from a GPU can also predict on a CPU."""
    accelerator = "cpu" if config.hardware.accelerator == "cpu" else "auto"
    without_gpu = accelerator == "cpu" or not torch.cuda.is_available()
    precision = "auto" if config.hardware.precision == "fp16" and without_gpu else config.hardware.precision
    return config.changed(
        device=None, devices=1, num_nodes=1, accelerator=accelerator, precision=precision,
        compile=False,  # compilation would take minutes
    )  # fmt: skip
