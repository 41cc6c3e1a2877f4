import numpy as np
import pytest

from finetuning.export.scores import scores_of


def test_scores_of_a_small_table() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    predicted = np.array([0, 0, 1, 1, 0, 2])
    scores = scores_of(4 * np.eye(3, dtype=np.float32)[predicted], labels)
    assert [c.texts for c in scores.classes] == [3, 2, 1]
    assert [c.precision for c in scores.classes] == pytest.approx([2 / 3, 1 / 2, 1])
    assert [c.recall for c in scores.classes] == pytest.approx([2 / 3, 1 / 2, 1])
    assert scores.macro_f1 == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert scores.macro_f1_interval[0] < scores.macro_f1 < scores.macro_f1_interval[1]
    certainty = np.exp(4) / (np.exp(4) + 2)
    assert scores.calibration_error == pytest.approx(certainty - 4 / 6, abs=1e-5)


def test_more_texts_make_a_narrower_interval() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 2000)
    logits = np.stack([1 - labels, labels], 1) + generator.normal(0, 1, (2000, 2))
    (low, high), (first, last) = (scores_of(logits[:n], labels[:n]).macro_f1_interval for n in (200, 2000))
    assert last - first < (high - low) / 2


def test_a_class_that_nobody_predicted_has_no_score() -> None:
    scores = scores_of(np.array([[1.0, 0, 0], [1, 0, 0]], dtype=np.float32), np.array([0, 1]))
    assert [c.f1 for c in scores.classes] == pytest.approx([2 / 3, 0, 0])
