"""Texts -> the probability of each label, through the suite's own batches and forward."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from finetuning.data.batches import evaluation_loader
from finetuning.data.tokens import TokenizedSplit, encode
from finetuning.models.classifier import Classifier
from finetuning.prediction.answers import AnswerColumns
from finetuning.prediction.rows import PAIR, TEXT, Rows, Source
from finetuning.prediction.trained import Trained


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
        """The probabilities of each text's labels. They sum to 1, unless the run is multi-label.

        Texts are sorted by length into batches, so give many at once.

        Args:
            texts: at least one text; long texts are cut as in the run.
            pairs: the second text of each pair.
            done: is told how many texts were labelled.

        Returns:
            (n, labels) float64, in the order of the texts.
        """
        config, clean = self.trained.config, self.trained.clean
        pairs = None if pairs is None else list(pairs)  # data sets of pairs need no cleaning
        encoded = encode([clean(text) for text in texts], pairs, self.tokenizer, config.data)
        rows = np.arange(len(texts))
        tokens, offsets, second_positions = encoded
        split = TokenizedSplit(tokens, offsets, np.zeros_like(rows), rows, second_positions)
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
