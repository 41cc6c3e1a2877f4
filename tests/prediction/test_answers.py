from pathlib import Path

import numpy as np
import pytest

from finetuning.config import RunConfig
from finetuning.errors import UserError
from finetuning.prediction.answers import AnswerColumns, make_answers, names_beside
from finetuning.prediction.trained import Trained
from finetuning.runs.answers import MOST_PROBABLE, Rule
from tests.common import refusal_of

NAMES = ["bad", "good", "fair"]
ROWS = np.array([[0.2, 0.5, 0.3], [np.nan, np.nan, np.nan], [0.4, 0.2, 0.4]])


def test_one_label_and_all_probabilities() -> None:
    answers = AnswerColumns(NAMES)
    assert answers.columns == {
        "label": str, "probability_bad": float, "probability_good": float, "probability_fair": float,
    }  # fmt: skip
    label, bad, good, fair = answers.of(ROWS)
    assert label == ["good", None, "bad"], "the first of equals"
    assert (bad, good, fair) == ([0.2, None, 0.4], [0.5, None, 0.2], [0.3, None, 0.4])


def test_multi_label_answers() -> None:
    answers = AnswerColumns(NAMES, Rule(0.3))
    assert answers.columns["label"] is list
    assert answers.of(ROWS)[0] == [["good"], None, ["bad", "fair"]], "above, not at"
    assert AnswerColumns(NAMES, Rule(0.9)).of(ROWS)[0] == [[], None, []]


def test_the_best_labels() -> None:
    answers = AnswerColumns(NAMES, top_k=2)
    assert list(answers.columns) == ["label", "label_1", "probability_1", "label_2", "probability_2"]
    assert answers.of(ROWS) == [
        ["good", None, "bad"],
        ["good", None, "bad"],
        [0.5, None, 0.4],
        ["fair", None, "fair"],
        [0.3, None, 0.4],
    ]
    assert AnswerColumns(NAMES, Rule(0.25), top_k=1).of(ROWS)[:2] == [
        [["good", "fair"], None, ["bad", "fair"]],
        ["good", None, "bad"],
    ]


def test_what_the_flags_ask_for() -> None:
    config = RunConfig.from_settings(offline=True)
    one = Trained(Path("run"), config, NAMES, MOST_PROBABLE)
    several = Trained(Path("run"), config, NAMES, Rule(0.4))
    assert make_answers(several, None, None).rule == Rule(0.4)
    assert make_answers(several, 0.7, 3) == AnswerColumns(NAMES, Rule(0.7), 3)
    assert "--threshold 0.7: needs a multi-label run, or two classes" in refusal_of(make_answers, one, 0.7, None)
    assert "--top_k 4: run has 3 labels, so at most 3" in refusal_of(make_answers, one, None, 4)


def test_names_that_the_input_has() -> None:
    ours = ["label", "probability_a"]
    assert names_beside(ours, ["text"]) == ours
    assert names_beside(ours, ["text", "label"]) == ["predicted_label", "predicted_probability_a"]
    guess = ["predicted_label", "confidence"]  # of --most_uncertain
    assert names_beside(guess, ["text", "confidence"]) == ["predicted_label", "predicted_confidence"]
    assert names_beside(guess, ["confidence", "predicted_label"])[0] == "predicted_predicted_label"
    with pytest.raises(UserError, match="--output: the input already has a column predicted_label: rename or remove"):
        names_beside(ours, ["label", "predicted_label"])
