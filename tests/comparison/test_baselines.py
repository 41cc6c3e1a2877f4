"""The baseline equals plain scikit-learn, its work is counted before it is done, and advice needs a better score."""

from typing import Any

import numpy as np
import pytest
from scipy.special import expit, softmax
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline

from finetuning.comparison import baselines
from finetuning.comparison.baselines import Size, advice, affordable, baseline_logits, budget, size_of
from finetuning.data.splits import sampled
from finetuning.data.texts import LabelledTexts

WORDS = ("plot", "scene", "camera", "story", "actor", "music", "ending", "dialogue", "director", "script", "joy")


def made(n: int, classes: int, seed: int, multi_label: bool = False, pairs: bool = False) -> LabelledTexts:
    """Texts in which the word of a class is frequent if the text has the class."""
    generator = np.random.default_rng(seed)
    labels = (
        generator.integers(2, size=(n, classes), dtype=np.int8) if multi_label else generator.integers(classes, size=n)
    )
    truth = labels if multi_label else np.eye(classes, dtype=int)[labels]
    texts = []
    for row in truth:
        own = [WORDS[i] for i in np.flatnonzero(row)]
        texts.append(" ".join([*generator.choice(WORDS, size=generator.integers(2, 9)), *own]))
    second = [" ".join(generator.choice(WORDS, size=2)) for _ in texts] if pairs else None
    return LabelledTexts(texts, labels, np.arange(n), second)


@pytest.mark.parametrize(
    ("classes", "multi_label", "pairs"),
    [(2, False, False), (5, False, False), (4, True, False), (3, False, True)],
    ids=["two classes", "classes", "multi-label", "pairs"],
)
def test_probabilities_are_those_of_scikit_learn(classes: int, multi_label: bool, pairs: bool) -> None:
    train, held_out = (made(n, classes, seed, multi_label, pairs) for n, seed in ((200, 0), (60, 1)))
    regression = LogisticRegression(**baselines.REGRESSION)
    plain = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=20_000),
        regression if classes == 2 else OneVsRestClassifier(regression),
    )
    documents = [
        split.texts if split.pairs is None else [f"{a} {b}" for a, b in zip(split.texts, split.pairs, strict=True)]
        for split in (train, held_out)
    ]
    plain.fit(documents[0], train.labels)
    logits = baseline_logits(train, {"validation": held_out}, classes, lambda: None)["validation"]
    found = expit(logits) if multi_label else softmax(logits.astype(np.float64), axis=1)
    assert found == pytest.approx(plain.predict_proba(documents[1]), abs=1e-6)
    answers = logits > 0 if multi_label else logits.argmax(1)
    assert (answers == held_out.labels).mean() > 1.5 * (0.5 if multi_label else 1 / classes)


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_class_without_a_text_is_never_the_answer(multi_label: bool) -> None:
    train = made(60, 3, 0, multi_label)
    if multi_label:
        train.labels[:, 1] = 0
    else:
        train.labels[train.labels == 1] = 2
    logits = baseline_logits(train, {"test": made(20, 3, 1, multi_label)}, 3, lambda: None)["test"]
    assert (logits[:, 1] < 0).all()
    assert np.isfinite(logits).all()
    if not multi_label:
        assert not (logits.argmax(1) == 1).any()


def test_texts_without_a_word_have_no_baseline() -> None:
    texts = LabelledTexts(["!", "?"] * 4, np.arange(8) % 2, np.arange(8))
    with pytest.raises(ValueError, match="empty vocabulary"):
        baseline_logits(texts, {"validation": texts}, 2, lambda: None)


@pytest.mark.parametrize("calls", [1, 30, 75, 82])  # while words are counted, applied, and classes are learned
def test_a_check_ends_the_work(calls: int) -> None:
    left = calls

    def check() -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        baseline_logits(made(60, 3, 0), {"validation": made(20, 3, 1)}, 3, check)


def estimate(sizes: dict[str, Size], counts: dict[str, int], classes: int) -> float:
    """The seconds that a sample takes, by the estimate of the work."""
    used = {name: Size(counts[name], size.characters * counts[name] // size.texts) for name, size in sizes.items()}
    held_out = sum(baselines.scoring_seconds(size, classes) for name, size in used.items() if name != "train")
    return baselines.LOADING + baselines.training_seconds(used["train"], classes) + held_out


SETS = {  # as large as known sets
    "small": ({"train": Size(120, 9_000), "validation": Size(40, 3_000), "test": Size(40, 3_000)}, 2),
    "77 classes": ({"train": Size(8_996, 531_148), "validation": Size(999, 61_690), "test": Size(3_080, 167_036)}, 77),
    "long": ({"train": Size(22_377, 29_264_919), "validation": Size(2_485, 3_176_692)}, 2),
    "long, test": ({"train": Size(90, 99_000), "validation": Size(90, 99_000), "test": Size(25_000, 31_844_420)}, 2),
    "huge": ({"train": Size(9_000_000, 10**10), "validation": Size(10**6, 10**9), "test": Size(10**6, 10**9)}, 1000),
}  # fmt: skip


@pytest.mark.parametrize("seconds", baselines.BUDGETS)
@pytest.mark.parametrize("name", SETS)
def test_the_estimated_work_is_within_the_budget(name: str, seconds: float) -> None:
    sizes, classes = SETS[name]
    counts = affordable(sizes, classes, seconds, None)
    assert list(counts) == [*(split for split in sizes if split != "train"), "train"]
    assert all(1 <= counts[split] <= size.texts for split, size in sizes.items())
    assert estimate(sizes, counts, classes) <= seconds
    everything = {split: size.texts for split, size in sizes.items()}
    if name == "small":
        assert counts == everything
    elif name in ("long", "huge"):  # as many as the budget allows, if memory does
        assert counts["train"] < sizes["train"].texts
        characters = counts["train"] * sizes["train"].characters / sizes["train"].texts
        assert estimate(sizes, counts, classes) > 0.9 * seconds or characters > 0.9 * baselines.MOST_CHARACTERS


def test_little_memory_means_fewer_texts() -> None:
    sizes, classes = SETS["long"]
    counts = affordable(sizes, classes, 48.0, 52_000_000)
    assert counts["train"] * sizes["train"].characters / sizes["train"].texts <= 1_000_000
    assert counts["train"] > 700
    assert affordable(sizes, classes, 48.0, 0)["train"] == 1


def test_the_budget_is_three_seconds_or_three_percent_in_few_steps() -> None:
    assert [budget(seconds) for seconds in (0, 99, 199, 201, 500, 10**6)] == [3, 3, 3, 6, 12, 48]


def test_the_size_of_pairs_counts_both_texts() -> None:
    assert size_of(LabelledTexts(["ab", "c"], np.arange(2), np.arange(2))) == Size(2, 3)
    assert size_of(LabelledTexts(["ab", "c"], np.arange(2), np.arange(2), ["d", "efg"])) == Size(2, 7)


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_sample_is_stratified_and_keeps_what_belongs_together(multi_label: bool) -> None:
    classes = np.repeat(np.arange(3), (600, 300, 100))
    labels = np.eye(3, dtype=np.int8)[classes] if multi_label else classes
    names = [f"text {i}" for i in range(1000)]
    split = LabelledTexts(names, labels, np.arange(1000) + 7, [f"pair {i}" for i in range(1000)])
    sample = sampled(split, 50, seed=3)
    counts = sample.labels.sum(0) if multi_label else np.bincount(sample.labels)
    assert counts.tolist() == [30, 15, 5]
    for i, row in enumerate(sample.rows):
        assert sample.texts[i] == f"text {row - 7}"
        assert sample.pairs is not None
        assert sample.pairs[i] == f"pair {row - 7}"
        assert (sample.labels[i] == labels[row - 7]).all()
    assert sampled(split, 50, seed=3).rows.tolist() == sample.rows.tolist() == sorted(sample.rows)
    assert sampled(split, 50, seed=4).rows.tolist() != sample.rows.tolist()
    assert sampled(split, 1000, seed=3) is split


def test_a_better_baseline_brings_advice_with_both_numbers() -> None:
    both: dict[str, Any] = {"monitor": "accuracy", "multi_label": False, "all_linears": True, "early": False}
    (sentence,) = advice({"accuracy": 0.811}, {"accuracy": 0.852, "examples": 1000}, **both)
    assert sentence == (
        "TF-IDF + logistic regression is better on 1,000 validation texts: accuracy 85.20% against 81.10% of this"
        " classifier: consider more --epochs, LoRA on all linears, the default, a higher --learning_rate, or"
        " more training texts"
    )
    (sentence,) = advice({"accuracy": 0.2}, {"accuracy": 0.3, "examples": 10}, "accuracy", True, False, early=False)
    assert (
        "which may be chance: exact match 30.00% against 20.00% of this classifier: consider more --epochs, a higher"
        in sentence
    )
    (sentence,) = advice({"accuracy": 0.2}, {"accuracy": 0.3, "examples": 10}, "accuracy", True, False, early=True)
    assert sentence.endswith(": consider more training texts")
    both["early"] = True
    (sentence,) = advice({"accuracy": 0.831}, {"accuracy": 0.852, "examples": 1000}, **both)
    assert "1,000 validation texts, which may be chance: accuracy" in sentence
    assert sentence.endswith("of this classifier: consider LoRA on all linears, the default, or more training texts")
    for monitor, doubted in (("macro_f1", True), ("auroc", True), ("mcc", False), ("loss", False)):
        run, baseline = (0.6, 0.5) if monitor == "loss" else (0.5, 0.6)
        (sentence,) = advice({monitor: run}, {monitor: baseline, "examples": 20}, **both | {"monitor": monitor})
        assert ("may be chance" in sentence) is doubted, monitor
    for mine in (0.852, 0.9):
        assert advice({"accuracy": mine}, {"accuracy": 0.852, "examples": 1000}, **both) == []


def test_a_loss_is_better_if_it_is_lower_and_a_missing_score_is_no_reason() -> None:
    baseline = {"accuracy": 1.0, "loss": 0.5, "examples": 9}
    (sentence,) = advice({"accuracy": 0.1, "loss": 0.51}, baseline, "loss", False, all_linears=False, early=False)
    assert "loss, nats 0.5000 against 0.5100" in sentence
    assert advice({"accuracy": 0.1, "loss": 0.5}, baseline, "loss", False, all_linears=False, early=False) == []
    assert advice({"accuracy": 0.1}, baseline, "auroc", False, all_linears=False, early=False) == []
