from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from finetuning.data.files import FORMATS, read_frame
from finetuning.prediction import confidence
from finetuning.prediction.answers import AnswerColumns
from finetuning.prediction.confidence import Confidence, Coverage, most_uncertain, reached, read_confidence, surer
from finetuning.prediction.outputs import is_parquet, write_answers
from finetuning.prediction.rows import Answered, Source, file_of, survey
from finetuning.runs.answers import MOST_PROBABLE, Answers, Rule
from tests.common import Patch, some
from tests.runs.test_abstention import answers as answers_for
from tests.runs.test_abstention import drawn

pytestmark = pytest.mark.usefixtures("small_chunks")

ANSWERS = AnswerColumns(["bad", "good"], confidence=Confidence())


def test_the_temperature_cools_what_the_label_says() -> None:
    probabilities = np.array([[0.2, 0.8], [0.9, 0.1], [np.nan, np.nan]])
    cooled = Confidence(temperature=2).of(probabilities, MOST_PROBABLE)
    assert cooled[:2] == pytest.approx([2 / 3, 3 / 4])  # the odds of 4 and 9 become 2 and 3
    assert np.isnan(cooled[2])
    spam = Confidence().of(probabilities[:2], Rule(0.05, 1))
    assert spam == pytest.approx([0.8, 0.1]), "above the threshold, although the other class is more probable"
    several = Confidence().of(probabilities[:2], Rule(0.5))
    assert several == pytest.approx([0.8 * 0.8, 0.9 * 0.9]), "all decisions must be right"
    assert Confidence(temperature=3).of(np.array([[1.0, 0.0]]), Rule(0.5)) == pytest.approx([1])


def test_a_confidence_comes_with_what_validation_says_of_it() -> None:
    logits = np.log([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.4, 0.6]])
    answers = Answers(np.arange(4), np.eye(2, dtype=bool)[[0, 0, 0, 1]], logits)
    assert reached(answers, 0.7, False) == (
        3,
        "confidence 0.7: 3 of 4 validation texts reach it,"
        " and 2 of these answers are right (67%; 95 % interval 21% to 94%)",
    )
    assert reached(answers, 0.95, True) == (0, "confidence 0.95: 0 of 4 texts out of fold reach it")


def test_below_the_least_confidence_there_is_no_label() -> None:
    answers = AnswerColumns(["bad", "good"], confidence=Confidence(least=0.7), top_k=1)
    assert list(answers.columns) == ["label", "confidence", "label_1", "probability_1"]
    label, confidence, best, _ = answers.of(np.array([[0.2, 0.8], [0.6, 0.4], [np.nan, np.nan]]))
    assert (label, confidence) == (["good", None, None], [pytest.approx(0.8), pytest.approx(0.6), None])
    assert best == ["good", "bad", None]


def test_a_positive_class_has_a_threshold() -> None:
    answers = AnswerColumns(["ham", "spam"], Rule(0.3, 1))
    assert answers.columns["label"] is str
    assert answers.of(np.array([[0.6, 0.4], [0.7, 0.3]]))[0] == ["spam", "ham"], "above, not at"


def answered(source: Source, skip: bool = False) -> Iterator[Answered]:
    """The probability of good is the number in the text."""
    for rows in source.rows(skip):
        good = np.array(
            [np.nan if bad else float(text) for bad, text in zip(rows.bad, rows.texts["text"], strict=True)]
        )
        yield rows, ANSWERS.of(np.stack([1 - good, good], axis=1))


@pytest.mark.parametrize("kind", FORMATS)
def test_the_most_uncertain_of_all_chunks(tmp_path: Path, kind: str) -> None:
    good = np.random.default_rng(0).uniform(size=23).round(6)
    texts = [f"{value}" for value in good]
    texts[5] = ""
    table = pd.DataFrame({"text": texts, "id": range(23)})
    pd.concat([table, table.assign(id=99)]).to_csv(tmp_path / "in.csv", index=False)  # a label for one is for both
    out = tmp_path / f"out.{kind}"
    with file_of(tmp_path / "in.csv", "text", None) as source:
        surveyed = survey(source, True, is_parquet(out), lambda _: None)
        rows = most_uncertain(answered(source, True), 6, list(ANSWERS.columns))
        write_answers(out, rows, surveyed, ANSWERS)
    distance = np.abs(good - 0.5)
    distance[5] = np.inf
    found = read_frame(out)
    assert found["id"].astype(int).tolist() == np.argsort(distance)[:6].tolist()
    assert found["confidence"].astype(float).tolist() == pytest.approx((0.5 + np.sort(distance)[:6]).tolist(), abs=1e-5)
    assert list(found.columns) == ["text", "id", *ANSWERS.columns]


def test_columns_that_differ_between_chunks_and_few_rows(tmp_path: Path) -> None:
    lines = [f'{{"text": "0.9{i}", "n": 1}}' for i in range(4)] + ['{"text": "0.4", "other": [1, 2]}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out.parquet"
    with file_of(tmp_path / "in.jsonl", "text", None) as source:
        surveyed = survey(source, False, True, lambda _: None)
        write_answers(out, most_uncertain(answered(source), 50, list(ANSWERS.columns)), surveyed, ANSWERS)
    table = pq.read_table(out).to_pydict()
    assert table["text"] == ["0.4", "0.90", "0.91", "0.92", "0.93"]
    assert table["n"] == [None, 1, 1, 1, 1]
    assert table["other"] == [[1, 2], None, None, None, None]


def test_rows_without_a_text_repeat_none(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": null}\n{"text": "None"}\n{"text": 5}\n{"text": "5"}')
    with file_of(tmp_path / "in.jsonl", "text", None) as source:
        surveyed = survey(source, True, False, lambda _: None)
        chunks = (rows for rows in source.rows(skip_bad=True))
        numbers = ((rows, [[None if bad else 0.5 for bad in rows.bad] for _ in ANSWERS.columns]) for rows in chunks)
        least = most_uncertain(numbers, 9, list(ANSWERS.columns))
        assert write_answers(tmp_path / "few.csv", least, surveyed, ANSWERS) == 2


def test_a_classifier_that_is_surer_than_on_validation_is_told() -> None:
    said = str(Coverage(0.7, reached=(29, 72), texts=200, answered=150))
    assert said.splitlines()[1].startswith("warning: 75% of these texts are answered, but 40% of validation")
    for texts, answered in ((200, 90), (2, 2), (200, 10), (0, 0)):
        assert "warning" not in str(Coverage(0.7, reached=(29, 72), texts=texts, answered=answered))
    assert "warning" not in str(Coverage(0.7, texts=200, answered=200)), "an exported folder has no validation"


def test_chance_exceeds_the_test_of_two_shares_once_in_a_thousand() -> None:
    draws = np.random.default_rng(0).binomial([[200], [100]], 0.5, (2, 20_000)).T.tolist()
    warned = sum(surer((a, 200), (b, 100)) for a, b in draws)
    assert warned / len(draws) == pytest.approx(0.001, abs=0.0007)


def test_at_the_least_confidence_there_is_a_label() -> None:
    answers = AnswerColumns(["bad", "good"], confidence=Confidence(least=0.5))
    assert answers.of(np.array([[0.5, 0.5]]))[:2] == [["bad"], [0.5]], "at it, not only above"


def run_on_validation(monkeypatch: Patch, validation: Answers, epochs: int = 1) -> Any:
    """What a finished run with these answers gives ``read_confidence``, which takes them as they are."""
    config = SimpleNamespace(data=SimpleNamespace(group_column=None))
    run = SimpleNamespace(result={"config": {"epochs": epochs}}, config=config)
    monkeypatch.setattr(confidence, "read_finished", lambda _: run)
    monkeypatch.setattr(confidence, "read_validation", lambda _: validation)
    monkeypatch.setattr(confidence, "fit_temperature", lambda _: None)
    return SimpleNamespace(exported=False, directory=Path("run"))


def test_the_best_of_many_checkpoints_must_show_more(monkeypatch: Patch) -> None:
    validation = answers_for(*drawn(np.random.default_rng(0), 1_000))
    one, many = (
        some(read_confidence(run_on_validation(monkeypatch, validation, n), MOST_PROBABLE, None, 0.05).reached)[0]
        for n in (1, 20)
    )
    assert 0 < many < one, "the best of 20 checkpoints must show more"


def test_validation_gets_labels_by_the_given_threshold(monkeypatch: Patch) -> None:
    validation = answers_for(np.repeat([0.6, 0.9], 10), np.arange(20) % 2 == 0)
    trained = run_on_validation(monkeypatch, validation)
    assert read_confidence(trained, MOST_PROBABLE, 0.6, None).reached == (20, 20)
    assert read_confidence(trained, Rule(0.3, 1), 0.6, None).reached == (10, 20), "0.4 is the second class there"
