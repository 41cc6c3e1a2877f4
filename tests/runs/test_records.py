import pytest

from finetuning.runs import records
from finetuning.runs.records import accuracy_interval


def test_wilson_interval() -> None:
    # by hand, z = 1.96: centre (0.8 + 3.8416 / 200) / 1.038416 = 0.78890,
    # spread 1.96 / 1.038416 * sqrt(0.16 / 100 + 3.8416 / 40000) = 0.07773
    assert accuracy_interval(0.8, 100) == pytest.approx((0.71117, 0.86663), abs=1e-4)
    low, high = accuracy_interval(0.5, 400)
    assert low + high == pytest.approx(1)
    assert accuracy_interval(1.0, 10) == pytest.approx((1 / (1 + 1.959964**2 / 10), 1.0))
    assert accuracy_interval(0.0, 10) == pytest.approx((0.0, 1 - 1 / (1 + 1.959964**2 / 10)))
    assert accuracy_interval(0.9, 25_000)[1] - accuracy_interval(0.9, 25_000)[0] < 0.008


def test_the_record_of_the_test_brings_the_interval_of_its_accuracy() -> None:
    record = records.test_record({"accuracy": 0.8, "loss": 0.4}, examples=100, seconds=2.5)
    interval = list(accuracy_interval(0.8, 100))
    assert record == {"accuracy": 0.8, "loss": 0.4, "accuracy_ci95": interval, "examples": 100, "seconds": 2.5}
