"""What an export says of its comparison with the run's own predictions, and of which texts they are."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from finetuning.data.texts import LabelledTexts, TextData
from finetuning.errors import UserError
from finetuning.export.proof import ExportFailed, against_predictions, held_out, in_order_of, rounding_of
from finetuning.runs.answers import Answers, Rule

BF16 = 16 * 2.0**-9  # how far bf16 may move a logit of at most 1


def answers(logits: list[list[float]], rule: Rule | None = None) -> Answers:
    values = np.array(logits)
    truth = np.zeros(values.shape, dtype=bool)
    return Answers(np.arange(len(values)), truth, values, rule=rule or Rule())


def compared(reference: list[list[float]], stored: list[list[float]], rule: Rule | None = None) -> str:
    return against_predictions(answers(reference, rule), answers(stored, rule), "bf16")


def test_logits_that_rounding_explains_keep_their_labels() -> None:
    said = compared([[0.5, 0.0], [0.0, 0.5]], [[0.51, 0.0], [0.0, 0.5]])
    assert said.endswith("differ from the fp32 model's by 1.0e-02 at most. The labels of 0 of 2 texts changed.")
    with pytest.raises(ExportFailed, match=r"by up to 0\.04; bf16 explains 0\.031 at most"):
        compared([[0.5, 0.0]], [[0.54, 0.0]])
    with pytest.raises(ExportFailed, match="by up to nan"):
        compared([[0.5, 0.0]], [[float("nan"), 0.0]])


def test_the_margin_of_a_changed_label_is_that_of_two_logits() -> None:
    said = compared([[0.50, 0.51, 0.0], [1.0, 0.0, 0.0]], [[0.51, 0.495, 0.0], [1.0, 0.0, 0.0]])
    assert "The labels of 1 of 2 texts changed." in said
    assert "between its two highest logits, was 1.5e-02 at most" in said
    assert said.endswith(f"bf16 can move it by {2 * BF16:.1e}."), "both logits may move"


def test_the_distance_of_a_changed_label_is_from_the_threshold() -> None:
    boundary = np.log(0.6 / 0.4)
    reference, stored = [[boundary + 0.01, 3.0]], [[boundary - 0.005, 3.0]]
    said = compared(reference, stored, Rule(0.6))
    rounding = rounding_of("bf16", np.array(stored))
    assert rounding == pytest.approx(3 * BF16)
    assert "label's logit from the threshold was 5.0e-03 at most" in said, (
        "the label that did not change does not count"
    )
    assert said.endswith(f"bf16 can move it by {rounding:.1e}."), "one logit moves"


@pytest.mark.parametrize("positive", [0, 1])
def test_with_a_positive_class_the_distance_is_that_of_the_difference_of_two_logits(positive: int) -> None:
    boundary = np.log(0.6 / 0.4)
    reference, stored = np.zeros((1, 2)), np.zeros((1, 2))
    reference[0, positive], stored[0, positive] = boundary + 0.01, boundary - 0.005
    said = compared(reference.tolist(), stored.tolist(), Rule(0.6, positive))
    assert "from the threshold was 5.0e-03 at most" in said, "not of the other class"
    assert said.endswith(f"bf16 can move it by {2 * BF16:.1e}.")


SPLIT = LabelledTexts(["c", "a", "b"], np.array([1, 0, 1]), np.array([7, 2, 4]))


def stored_answers(rows: tuple[int, ...] = (4, 7, 2)) -> Answers:
    """The answers to ``SPLIT`` in another order, each with the row as its first logit."""
    of_row = {7: 1, 2: 0, 4: 1}
    truth = np.array([of_row.get(row, 0) for row in rows])[:, None] == np.arange(2)
    return Answers(np.array(rows), truth, np.array([[float(row), 0.0] for row in rows]))


def test_answers_are_brought_into_the_order_of_the_texts() -> None:
    ordered = in_order_of(SPLIT, stored_answers())
    assert ordered is not None
    assert ordered.rows.tolist() == [7, 2, 4]
    assert ordered.logits[:, 0].tolist() == [7, 2, 4]
    assert in_order_of(SPLIT, None) is None
    assert in_order_of(SPLIT, stored_answers((4, 7))) is None
    assert in_order_of(SPLIT, stored_answers((4, 7, 3))) is None
    others = stored_answers()
    assert in_order_of(SPLIT, replace(others, truth=~others.truth)) is None


def test_held_out_texts_that_are_not_those_of_the_run_are_refused() -> None:
    class Tokens(SimpleNamespace):
        def __len__(self) -> int:
            return len(SPLIT.texts)

        def sequence(self, position: int) -> np.ndarray:
            return np.array([position])

    texts = TextData("reviews", ["bad", "good"], {"validation": SPLIT}, 0)
    tokens: Any = {"validation": Tokens(sha256="v", second_positions=None, windows=None)}

    def found(stored: dict[str, Answers], **hashes: str) -> Any:
        return held_out(texts, tokens, stored, hashes, 9, 0, "mean")

    held = found({"validation": stored_answers()}, validation="v")
    assert held.columns == [["c", "a", "b"]]
    assert [sequence.tolist() for sequence in held.sequences] == [[0], [1], [2]]
    assert held.stored.rows.tolist() == [7, 2, 4]
    for stored, hashes in (
        ({"validation": stored_answers()}, {"validation": "other"}),
        ({"validation": stored_answers((4, 7, 3))}, {"validation": "v"}),
        ({}, {"validation": "v"}),
        ({"validation": stored_answers(), "test": stored_answers()}, {"validation": "v"}),
    ):
        with pytest.raises(UserError, match="data has changed: its held-out texts are not those of predictions"):
            found(stored, **hashes)
