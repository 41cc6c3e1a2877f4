from typing import Any

import numpy as np
import pytest

from finetuning.runs.answers import Answers, Rule
from finetuning.runs.score_tables import class_table, score_table
from tests.common import answers_of


def test_scores_have_intervals_and_what_was_not_measured_is_left_out() -> None:
    answers = answers_of([0, 1] * 50, [0, 1] * 40 + [1, 0] * 10)
    result = {"test": {"accuracy": 0.8, "auroc": 0.9, "loss": 0.5}}
    table = score_table(result, {"test": answers})
    rows = {row[0]: row[1] for row in table.rows}
    assert table.columns == ("score", "test")
    assert list(rows) == ["accuracy", "AUROC", "loss, nats", "texts"]
    assert rows["accuracy"].startswith("80.00 % (")
    assert rows["AUROC"] == "90.00 %"
    assert rows["texts"] == "100"


def test_the_baseline_is_next_to_the_run() -> None:
    answers = answers_of([0, 1] * 50, [0, 1] * 50)
    scores = {"accuracy": 0.75, "loss": 0.625, "examples": 80}
    result: dict[str, Any] = {"test": {"accuracy": 1.0, "loss": 0.5, "auroc": 1.0}, "validation": {"accuracy": 1.0}}
    result["baseline"] = {"name": "words", "texts": 9, "test": scores, "validation": scores}
    table = score_table(result, {"test": answers})
    assert table.columns == ("score", "test", "test, words")
    rows = {row[0]: row[2] for row in table.rows}
    assert rows == {"accuracy": "75.00 %", "AUROC": "", "loss, nats": "0.6250", "texts": "80"}
    columns = score_table(result, {"test": answers, "validation": answers}).columns
    assert columns[3:] == ("test, words", "validation, words")
    result["kfold"] = {"same_epoch": None, "mean": {"accuracy": 0.875}}
    table = score_table(result, {"test": answers, "validation": answers})
    assert table.columns[3:] == ("validation, mean of the folds", "test, words", "validation, words")
    assert [row[3] for row in table.rows] == ["87.50 %", "", "", "100"]
    result["kfold"]["same_epoch"] = {"mean": {"accuracy": 0.625}}
    assert score_table(result, {"validation": answers}).rows[0][2] == "62.50 %"


@pytest.mark.parametrize(("threshold", "name"), [(None, "accuracy"), (0.5, "exact match")])
def test_the_accuracy_of_multi_label_runs_is_the_exact_match(threshold: float | None, name: str) -> None:
    result: dict[str, Any] = {"test": {"accuracy": 0.5, "micro_f1": 0.7}}
    answers = Answers(np.arange(4), np.eye(4, dtype=bool), np.eye(4), None, Rule(threshold))
    assert [row[0] for row in score_table(result, {"test": answers}).rows] == [name, "micro F1", "texts"]


def test_each_class_has_a_row() -> None:
    table = class_table(answers_of([0, 0, 0, 0, 1], [0, 1, 1, 1, 1]), ["a|b", "c"])
    assert table.column("class") == ["a|b", "c"]
    assert table.column("texts") == ["4", "1"]
    assert table.column("precision, %") == ["100.00", "25.00"]
    assert table.column("recall, %") == ["25.00", "100.00"]
    assert "a\\|b" in table.markdown()
