"""The baseline of a run: TF-IDF and logistic regression, by scikit-learn, trained on the run's own training texts.

It counts words and pairs of neighbouring words, so a classifier that scores less has learned less than a word count.
Words are what scikit-learn takes for words; for a language without spaces the baseline is weak. Importing this module
loads scikit-learn (0.7 to 1 s), so it is imported when a baseline is asked for. Nothing here imports torch.

How the regression was chosen: CPU seconds of one fit, and test accuracy. Measured on a busy machine with one thread.

| data | texts, classes | as below | with liblinear's own tolerance | C = 1 | multinomial (lbfgs) |
|---|---|---|---|---|---|
| emotion | 2,000, 6 | 0.04 s, 68.7 % | 0.07 s, 68.7 % | 0.03 s, 55.0 % | 0.85 s, 68.1 % |
| trec6 | 5,452, 6 | 0.08 s, 88.6 % | 0.12 s, 88.6 % | 0.05 s, 85.2 % | 1.4 s, 88.8 % |
| banking77 | 10,001, 77 | 2.3 s, 89.4 % | 4.5 s, 89.4 % | 1.5 s, 85.7 % | 12 s, 89.3 % |
| clinc150 | 7,500, 150 | 2.3 s, 89.2 % | 4.1 s, 89.2 % | 1.9 s, 86.0 % | 15 s, 89.3 % |
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from finetuning.runs.records import accuracy_interval, score_names

if TYPE_CHECKING:
    from finetuning.data.texts import LabelledTexts

NAME = "TF-IDF + logistic regression"
VECTORIZER = {"ngram_range": (1, 2), "sublinear_tf": True, "max_features": 20_000}
REGRESSION = {"solver": "liblinear", "dual": True, "C": 10.0, "tol": 0.1, "random_state": 0}
# scores that move at least as much as the accuracy; macro F1 more, because it counts classes of few texts as well
JUDGED = ("accuracy", "macro_f1", "auroc")
SHARE = 0.03  # of the run's time
BUDGETS = (3.0, 6.0, 12.0, 24.0, 48.0)  # seconds. Few, so that a repeated run uses the same texts
HELD_OUT_SHARE = 1 / 6  # of the budget, for each held-out split; training texts get the rest
# What the parts take, in seconds of one thread, as measured on the sets above, IMDb, AG News and GoEmotions.
LOADING = 1.0
COUNTING = 0.6e-6  # for a character of a training text
LEARNING = 0.07e-6  # for a character of a training text and a class
READING = 0.35e-6  # for a character of a held-out text
SCORING = 0.6e-6  # for a held-out text and a class
MOST_CHARACTERS = 16_000_000  # of training texts: about 350 MiB
CHARACTER_BYTES = 26  # of memory, at most


@dataclass(frozen=True)
class Size:
    """The size of a split."""

    texts: int
    characters: int


def size_of(split: "LabelledTexts") -> Size:
    """The size of a split; the two texts of a pair count as one."""
    return Size(len(split.texts), sum(map(len, split.texts)) + sum(map(len, split.pairs or ())))


def budget(run_seconds: float) -> float:
    """The seconds that the baseline may take after a run that took ``run_seconds``."""
    return max((seconds for seconds in BUDGETS if seconds <= SHARE * run_seconds), default=BUDGETS[0])


def training_seconds(size: Size, classes: int) -> float:
    """What training on these texts takes, by an estimate."""
    return size.characters * (COUNTING + LEARNING * classes)


def scoring_seconds(size: Size, classes: int) -> float:
    """What scoring these texts takes, by an estimate."""
    return size.characters * READING + size.texts * SCORING * classes


def affordable(sizes: Mapping[str, Size], classes: int, seconds: float, free_bytes: int | None) -> dict[str, int]:
    """How many texts of each split the baseline uses, at least one: all of them if time and memory allow it.

    Args:
        sizes: split -> its size; train is among them.
        seconds: what it may take.
        free_bytes: memory that the process may still take; half of it is used at most. ``None`` if it is not known.
    """
    left, shares = seconds - LOADING, {}
    for name in (name for name in sizes if name != "train"):
        needed = scoring_seconds(sizes[name], classes)
        shares[name] = min(1.0, HELD_OUT_SHARE * seconds / max(needed, 1e-9))
        left -= shares[name] * needed
    train = sizes["train"]
    most = MOST_CHARACTERS if free_bytes is None else min(MOST_CHARACTERS, free_bytes // (2 * CHARACTER_BYTES))
    needed = training_seconds(train, classes)
    shares["train"] = min(1.0, left / max(needed, 1e-9), most / max(train.characters, 1))
    return {name: max(1, int(share * sizes[name].texts)) for name, share in shares.items()}


def baseline_logits(
    train: "LabelledTexts", held_out: "Mapping[str, LabelledTexts]", classes: int, check: Callable[[], object]
) -> dict[str, np.ndarray]:
    """Trains the baseline, and returns its logits for held-out texts.

    Each class is learned against all others; with two classes one regression is enough. The texts of a pair are
    joined with a line break, so the vectorizer sees both, and does not know which is which.

    Args:
        held_out: split -> its texts.
        check: is called often. What it raises ends the work.

    Returns:
        Split -> logits (n, classes) float32. Their softmax (multi-label: sigmoid) are the probabilities.

    Raises:
        ValueError: the training texts have no word.
    """
    vectorizer = TfidfVectorizer(**VECTORIZER)
    words = vectorizer.fit_transform(documents(train, check))
    features = {name: vectorizer.transform(documents(split, check)) for name, split in held_out.items()}
    multi_label = train.labels.ndim == 2
    truth = train.labels == 1 if multi_label else train.labels[:, None] == np.arange(classes)
    decisions = {name: np.empty((part.shape[0], classes)) for name, part in features.items()}
    two = classes == 2 and not multi_label
    for number in (1,) if two else range(classes):
        check()
        weights, intercept = _learned(words, truth[:, number])
        for name, part in features.items():
            decisions[name][:, number] = part @ weights + intercept
    if two:
        for decision in decisions.values():
            decision[:, 0] = -decision[:, 1]
    if not multi_label:  # the softmax of these are the sigmoids, divided by their sum
        decisions = {name: -np.logaddexp(0, -decision) for name, decision in decisions.items()}
    return {name: decision.astype(np.float32) for name, decision in decisions.items()}


def documents(split: "LabelledTexts", check: Callable[[], object] = lambda: None) -> Iterator[str]:
    """The texts, one by one; the two of a pair are joined. ``check`` is called for each, so a signal ends this soon."""
    for i, text in enumerate(split.texts):
        check()
        yield text if split.pairs is None else f"{text}\n{split.pairs[i]}"


def _learned(words: Any, truth: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights and intercept of a class, from the words (n, features) of the texts and whether they have it (n,)."""
    having, n = int(truth.sum()), len(truth)
    if having in (0, n):
        return np.zeros(words.shape[1]), float(np.log((having + 0.5) / (n - having + 0.5)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(**REGRESSION).fit(words, truth)
    return model.coef_[0], float(model.intercept_[0])


def advice(
    run: Mapping[str, float],
    baseline: Mapping[str, float],
    monitor: str,
    multi_label: bool,
    all_linears: bool,
    early: bool,
) -> list[str]:
    """What to try if the baseline is better on validation; empty if it is not, or if a score is missing.

    Args:
        baseline: the baseline's scores, and ``examples``, the texts that both were scored on.
        monitor: the score that counts.
        all_linears: whether to advise LoRA on all linears.
        early: whether the best epoch came before the middle of the run, so that more of them gain nothing.
    """
    if monitor not in run or monitor not in baseline:
        return []
    mine, other = run[monitor], baseline[monitor]
    if (mine <= other) if monitor == "loss" else (mine >= other):
        return []
    shown = "{:.4f}" if monitor == "loss" else "{:.2%}"
    tries = [*([] if early else ["more --epochs"]), *(["LoRA on all linears, the default"] if all_linears else [])]
    tries += [] if early else ["a higher --learning_rate"]
    texts = int(baseline["examples"])
    doubt = ""
    if monitor in JUDGED:
        low, high = accuracy_interval(mine, texts)
        doubt = ", which may be chance" if other - mine < (high - low) / 2 else ""
    return [
        f"{NAME} is better on {texts:,} validation texts{doubt}: {score_names(multi_label)[monitor]}"
        f" {shown.format(other)} against {shown.format(mine)} of this classifier: consider"
        f" {''.join(f'{each}, ' for each in tries)}{'or ' if tries else ''}more training texts"
    ]
