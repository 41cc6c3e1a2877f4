import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from finetuning.runs.answers import Answers
from finetuning.runs.calibration import fit_temperature, reliability
from tests.common import random_answers, some


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_undoes_what_was_done_to_the_logits(multi_label: bool, temperature: float) -> None:
    answers = random_answers(8_000, 3, 0, multi_label).cooled(1 / temperature)
    found = some(fit_temperature(answers))
    assert found == pytest.approx(temperature, rel=0.06)
    best = answers.cooled(found).losses.mean()
    assert all(best < answers.cooled(found * factor).losses.mean() for factor in (0.97, 1.03))


def test_there_is_no_temperature_if_all_answers_are_right_or_worse_than_chance() -> None:
    labels = np.arange(60) % 3
    right = Answers(np.arange(60), np.eye(3, dtype=bool)[labels], np.eye(3)[labels])
    assert fit_temperature(right) is None
    # at the coldest the true class's probability is 1, and another one's is not 0 yet
    assert fit_temperature(Answers(np.arange(1), np.eye(3, dtype=bool)[[1]], np.array([[0.38, 2.47, -2.37]]))) is None
    assert fit_temperature(Answers(right.rows, right.truth, -right.logits)) is None


def test_the_error_is_that_of_torchmetrics() -> None:
    answers = random_answers(500, 3, 1).cooled(0.5)
    expected = multiclass_calibration_error(
        torch.from_numpy(answers.probabilities), torch.from_numpy(answers.truth.argmax(1)), num_classes=3, n_bins=15
    )
    found = reliability(answers)
    assert found.error == pytest.approx(float(expected), abs=1e-6)
    assert found.loss == pytest.approx(answers.losses.mean())
    assert sum(part.share for part in found.bins) == pytest.approx(1)
    assert found.error == pytest.approx(sum(b.share * abs(b.observed - b.probability) for b in found.bins))


def test_the_temperature_brings_the_error_down() -> None:
    validation, test = random_answers(4_000, 3, 2).cooled(0.4), random_answers(4_000, 3, 3).cooled(0.4)
    before, after = reliability(test), reliability(test.cooled(some(fit_temperature(validation))))
    assert before.interval[0] > 0.1
    assert after.error < 0.03
    assert after.interval[0] < 0.01 < after.interval[1] + 0.02


def test_multi_label_calibration_counts_every_label() -> None:
    found = reliability(random_answers(3_000, 3, 4, multi_label=True))
    assert found.error < 0.02
    assert len(found.bins) == 15
