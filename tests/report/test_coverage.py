import numpy as np
import pytest

from finetuning.report.coverage import coverage_curve, risk_table
from tests.runs.test_abstention import answers


def test_the_curve_ends_with_the_accuracy_of_all_texts() -> None:
    found = answers(np.array([0.6, 0.9, 0.8, 0.7]), np.array([False, True, True, True]))
    curve = coverage_curve(found)
    assert [point.coverage for point in curve] == [0.25, 0.5, 0.75, 1]
    assert [point.accuracy for point in curve] == [1, 1, 1, 0.75]
    assert all(point.low <= point.accuracy <= point.high for point in curve)


def test_thresholds_of_validation_are_applied_to_the_other_split() -> None:
    confidence = np.linspace(0.99, 0.51, 400)
    validation = answers(confidence, np.arange(400) < 200)  # wrong from the 201st on
    rows = risk_table(validation, answers(confidence[::2], np.arange(200) < 99), "test", 1).rows
    assert rows[0][1].startswith("validation is too small or too often wrong: it can show ")
    risk, least, covered, wrong = rows[2]
    assert risk == "5.00 %"
    assert confidence[204] < float(least) <= confidence[203], "4 wrong answers are allowed"
    count = int((confidence[::2] >= float(least)).sum())
    assert covered == f"{count / 2:.2f} %"
    assert float(wrong.split()[0]) == pytest.approx(100 * (count - 99) / count, abs=0.01)
