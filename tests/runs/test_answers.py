from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from finetuning.runs.answers import Answers, Rule, joined, read_answers
from finetuning.runs.history import write_predictions


def test_answers_are_read_as_they_were_written(tmp_path: Path) -> None:
    logits = np.array([[0.5, -1.5, 2.0], [1.0, 0.25, -3.0]])
    splits = {
        "validation": (np.array([3, 7]), np.array([2, 1]), logits),
        "test": (np.array([1]), np.array([0]), -logits[:1]),
    }
    write_predictions(tmp_path, splits, {"validation": {3: 30, 7: 70}, "test": {1: 10}})
    found = read_answers(tmp_path)
    assert list(found) == ["validation", "test"]
    validation = found["validation"]
    assert validation.rows.tolist() == [3, 7]
    assert validation.truth.tolist() == [[False, False, True], [False, True, False]]
    assert validation.logits.tolist() == logits.tolist()
    assert validation.tokens is not None
    assert validation.tokens.tolist() == [30, 70]
    assert validation.right.tolist() == [True, False]
    assert found["test"].given.tolist() == [[False, True, False]]
    assert not validation.rule.multi_label


def test_multi_label_answers_are_lists(tmp_path: Path) -> None:
    logits, truth = np.array([[2.0, 0.5], [-2.0, -1.0]]), np.array([[1, 1], [0, 0]], dtype=np.int8)
    write_predictions(tmp_path, {"validation": (np.array([3, 7]), truth, logits)}, {"validation": {3: 30, 7: 70}})
    validation = read_answers(tmp_path, Rule(0.7))["validation"]
    assert validation.rule.multi_label
    assert validation.truth.tolist() == [[True, True], [False, False]]
    assert validation.given.tolist() == [[True, False], [False, False]]  # the sigmoid of 0.5 is 0.62
    assert validation.right.tolist() == [False, True]


def test_probabilities_and_losses_are_torchs() -> None:
    generator = np.random.default_rng(0)
    logits = 20 * generator.normal(size=(50, 4))
    labels = generator.integers(4, size=50)
    one = Answers(np.arange(50), np.eye(4, dtype=bool)[labels], logits)
    given = torch.from_numpy(logits)
    assert one.probabilities == pytest.approx(given.softmax(1).numpy())
    assert one.losses == pytest.approx(cross_entropy(given, torch.from_numpy(labels), reduction="none").numpy())
    truth = generator.random((50, 4)) < 0.5
    several = Answers(np.arange(50), truth, logits, None, Rule(0.3))
    expected = binary_cross_entropy_with_logits(given, torch.from_numpy(truth).double(), reduction="none")
    assert several.probabilities == pytest.approx(given.sigmoid().numpy())
    assert several.losses == pytest.approx(expected.mean(1).numpy())
    assert (several.given == (given.sigmoid().numpy() > 0.3)).all()


@pytest.mark.parametrize("rule", [Rule(0.3), Rule(0.3, 1)])
def test_a_temperature_changes_no_label(rule: Rule) -> None:
    logits = np.log([[0.65, 0.35], [0.75, 0.25], [0.2, 0.8]])
    answers = Answers(np.arange(3), np.zeros((3, 2), dtype=bool), logits, rule=rule)
    for temperature in (0.4, 3.0):
        assert (answers.cooled(temperature).given == answers.given).all()


def test_joined_answers_keep_their_rule() -> None:
    part = Answers(np.arange(2), np.eye(2, dtype=bool), np.zeros((2, 2)), rule=Rule(0.3))
    assert joined([part, part]).rule == Rule(0.3)
