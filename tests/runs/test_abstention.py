from typing import Any

import numpy as np
import pytest
from scipy.stats import beta

from finetuning.runs.abstention import Abstention, checkpoints_compared, least_confidence, smallest_risk
from finetuning.runs.answers import Answers
from tests.common import some


def answers(confidence: np.ndarray, right: np.ndarray) -> Answers:
    """Answers of two classes, of which the first is always given."""
    logits = np.stack([np.log(confidence), np.log(1 - confidence)], axis=1)
    return Answers(np.arange(len(right)), np.stack([right, ~right], axis=1), logits)


def drawn(generator: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    confidence = 0.5 + 0.5 * generator.beta(1.5, 0.5, n)
    return confidence, generator.random(n) < confidence


def test_the_bound_of_clopper_and_pearson_is_at_most_the_risk() -> None:
    found = answers(*drawn(np.random.default_rng(0), 1_000))
    chosen = some(least_confidence(found, 0.05))
    answered = found.confidence >= chosen.least
    assert (int(answered.sum()), int((answered & ~found.right).sum())) == (chosen.answered, chosen.wrong)
    left_out = found.confidence[~answered].max()
    assert chosen.least - left_out == pytest.approx(chosen.last - chosen.least), "no text is on the edge"
    assert 200 < chosen.answered < chosen.texts == 1_000
    assert beta.ppf(1 - 0.05 / 2, chosen.wrong + 1, chosen.answered - chosen.wrong) <= 0.05
    fewer = some(least_confidence(found, 0.05, candidates=20))
    assert fewer.answered < chosen.answered, "the best of 20 classifiers must show more"


def test_the_shown_threshold_can_be_given_and_answers_the_same_texts() -> None:
    sure = 1 - np.linspace(1e-14, 1e-9, 400)
    close = np.linspace(0.9999989, 0.9999981, 400)
    closer = 0.9 - np.arange(400) * 1e-9
    for confidence, right in ((np.linspace(0.9, 0.99, 400), 400), (sure, 380), (close, 380), (closer, 380)):
        found, risk = answers(confidence, np.arange(400) < right), 0.05 if right == 400 else 0.02
        chosen = some(least_confidence(found, risk))
        assert 0 < float(chosen.shown) < 1
        assert int((found.confidence >= float(chosen.shown)).sum()) == chosen.answered


def test_a_threshold_of_1_is_shown_as_the_largest_number_below() -> None:
    assert 0 < float(Abstention(1.0, 1.0, 2, 1, 0).shown) < 1


def test_the_statement_holds_in_most_draws() -> None:
    """The true risk is known here: the mean of one minus the confidence of what is answered."""
    generator, broken, found = np.random.default_rng(1), 0, 0
    population, _ = drawn(generator, 100_000)
    for _ in range(300):
        chosen = least_confidence(answers(*drawn(generator, 500)), 0.05)
        if chosen is not None:
            found += 1
            broken += float(1 - population[population >= chosen.least].mean()) > 0.05
    assert found > 100
    assert broken <= 0.05 * 300


def test_one_wrong_label_at_the_top_does_not_end_the_search() -> None:
    confidence, right = np.linspace(0.99, 0.6, 1_000), np.ones(1_000, dtype=bool)
    right[0] = False
    chosen = some(least_confidence(answers(confidence, right), 0.02))
    assert (chosen.answered, chosen.wrong, chosen.least) == (1_000, 1, 0.0)


def test_equal_confidences_are_answered_together() -> None:
    confidence = np.repeat([0.9, 0.7], [300, 100])
    right = np.arange(400) < 310
    chosen = some(least_confidence(answers(confidence, right), 0.02))
    assert chosen.answered == 300
    assert 0.7 < chosen.least <= 0.9


def test_the_smallest_risk_that_few_texts_can_show() -> None:
    few = answers(np.linspace(0.99, 0.6, 100), np.ones(100, dtype=bool))
    assert least_confidence(few, 0.02) is None
    smallest = smallest_risk(few)
    assert smallest == pytest.approx(1 - 0.025 ** (1 / 100), abs=1e-4)
    assert least_confidence(few, smallest) is not None
    assert least_confidence(few, smallest - 2e-4) is None


def test_each_epoch_is_a_checkpoint_that_validation_compares() -> None:
    runs: list[dict[str, Any]] = [{"config": {"epochs": epochs}} for epochs in (0, 1, 3)]
    assert [checkpoints_compared(run) for run in runs] == [1, 1, 3]
    assert checkpoints_compared(runs[2] | {"checkpoints_compared": 40}) == 40, "the best run of a search"
