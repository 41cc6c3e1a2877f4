"""The score of answers against true labels in the input, by scikit-learn's numbers."""

import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
from sklearn.metrics import accuracy_score, f1_score

from finetuning.config import RunConfig
from finetuning.errors import UserError
from finetuning.prediction.rows import Rows, Source
from finetuning.prediction.scoring import Score, label_codes, trained_on
from finetuning.prediction.trained import Trained
from finetuning.runs.answers import MOST_PROBABLE, Rule
from finetuning.runs.records import accuracy_interval
from tests.common import refusal_of

TRAINED = Trained(Path("run"), RunConfig.from_settings(), ["0", "1", "spam"], MOST_PROBABLE)


def source(*tables: list[Any]) -> Source:
    return Source("--file a.csv", lambda: iter([pd.DataFrame({"y": labels}) for labels in tables]), {})


def rows(labels: list[Any]) -> Rows:
    return Rows(pd.DataFrame({"y": labels}), {}, np.zeros(len(labels), dtype=bool))


def test_the_score_is_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    true, given = (generator.choice(["0", "1"], 60).tolist() for _ in range(2))
    score, chunks = Score(TRAINED, "y"), ((true[:40], given[:40]), (true[40:], given[40:]))
    passed = list(score.counted((rows(labels), [answers, [0.5] * len(labels)]) for labels, answers in chunks))
    assert [values[0] for _, values in passed] == [answers for _, answers in chunks]
    accuracy, macro_f1 = accuracy_score(true, given), f1_score(true, given, average="macro")
    low, high = accuracy_interval(accuracy, 60)
    assert str(score) == (
        f"accuracy {accuracy:.2%}, 95 % interval {low:.2%} to {high:.2%}; macro F1 {macro_f1:.2%};"
        " 60 labelled and answered texts"
    )


def test_a_label_that_multi_label_training_lacked_is_missed() -> None:
    score = Score(replace(TRAINED, rule=Rule(0.5)), "y")
    labels: list[Any] = [["0", "ham"], ["1"]]
    list(score.checking(source(labels)).tables())
    list(score.counted([(rows(labels), [[["0"], ["1"]]])]))
    assert "exact match 50.00%" in str(score)
    assert f"micro F1 {4 / 5:.2%}; macro F1 {2 / 3:.2%}" in str(score)
    assert str(score).endswith("; unknown to the classifier, so missed: ham")


def test_a_0_or_1_for_each_label_is_refused_as_in_training() -> None:
    score = Score(replace(TRAINED, label_names=["0", "1", "2"], rule=Rule(0.5)), "y")
    marks: list[Any] = [[0, 1, 0], np.array([1, 1, 0])]
    message = refusal_of(list, score.checking(source(marks, [[0, 0, 1]])).tables())
    assert message.startswith("--label_column y: each list has a 0 or 1 for each of 3 labels")
    list(score.checking(source(marks, [[0, 1]])).tables())


def test_precision_and_recall_of_the_positive_class() -> None:
    score = Score(replace(TRAINED, label_names=["ham", "spam"], rule=Rule(0.1, 1)), "y")
    list(score.counted([(rows(["ham", "ham", "spam", "spam"]), [["ham", "spam", "spam", "spam"]])]))
    assert str(score).endswith("; 'spam': precision 66.67%, recall 100.00%")
    score = Score(replace(TRAINED, label_names=["ham", "spam"], rule=Rule(0.9, 1)), "y")
    list(score.counted([(rows(["ham", "spam"]), [["ham", "ham"]])]))
    assert str(score).endswith("; 'spam': no precision, recall 0.00%")


def test_texts_without_a_label_or_an_answer_do_not_count() -> None:
    score = Score(TRAINED, "y")
    labels: list[Any] = [1, 1.0, Decimal("1.00"), None, float("nan"), " ", "spam ", 0]
    assert len(list(score.checking(source(["", None], labels)).tables())) == 2
    list(score.counted([(rows(labels), [["1", "1", "1", "1", "1", "1", "spam", None]])]))
    assert "accuracy 100.00%" in str(score)
    assert str(score).endswith("; 4 labelled and answered texts")
    assert str(Score(TRAINED, "y")) == "no labelled text was answered"


UNCOUNTED = [
    (["1"], "label", "--label_column label: must be a column of a.csv, which has: y"),
    (["1", "ham"], "y", "--label_column y: 'ham' is none of the classifier's labels: 0, 1, spam"),
    (["", None], "y", "--label_column y: has no label: leave it out"),
    ([["1"], "1"], "y", "--label_column y: \"['1']\" is none of the classifier's labels: 0, 1, spam"),
    ([np.array(["0", "1"])], "y", "--label_column y: \"['0', '1']\" is none of the classifier's labels: 0, 1, spam"),
]


@pytest.mark.parametrize(("labels", "column", "message"), UNCOUNTED)
def test_labels_that_cannot_be_counted_are_refused(labels: list[Any], column: str, message: str) -> None:
    assert refusal_of(list, Score(TRAINED, column).checking(source(labels)).tables()) == message


def test_numbers_are_codes_where_the_data_set_or_the_file_names_its_classes(tmp_path: Path) -> None:
    imdb = replace(TRAINED, config=RunConfig.from_settings(dataset="imdb"), label_names=["negative", "positive"])
    codes = label_codes(tmp_path / "missing.parquet", "y", imdb)
    assert list(codes) == ["negative", "positive"]
    score = Score(imdb, "y", codes)
    list(score.counted([(rows(["0", 1, "positive"]), [["negative", "positive", "positive"]])]))
    assert "accuracy 100.00%" in str(score)
    info = {"info": {"features": {"y": {"names": ["1", "0"], "_type": "ClassLabel"}}}}
    table = pyarrow.table({"y": [0, 1]}).replace_schema_metadata({"huggingface": json.dumps(info)})
    pyarrow.parquet.write_table(table, tmp_path / "named.parquet")
    own = replace(TRAINED, config=RunConfig.from_settings(dataset="text", data_dir=tmp_path))
    score = Score(own, "y", label_codes(tmp_path / "named.parquet", "y", own))
    list(score.counted([(rows([0, 1, "1"]), [["1", "0", "1"]])]))  # numbers are codes, words are names
    assert "accuracy 100.00%" in str(score)
    (tmp_path / "named.parquet").rename(tmp_path / "train.parquet")
    pd.DataFrame({"y": [0, 1]}).to_csv(tmp_path / "test.csv", index=False)
    own = replace(own, config=RunConfig.from_settings(dataset="text", data_dir=tmp_path, label_column="y"))
    assert label_codes(tmp_path / "test.csv", "y", own) == ["1", "0"], "as training reads it next to such a file"


def test_an_export_has_numbers_for_its_classes_unless_they_are_numbers(tmp_path: Path) -> None:
    export = replace(TRAINED, exported=True, label_names=["negative", "positive"])
    assert label_codes(tmp_path / "test.csv", "y", export) == ["negative", "positive"]
    assert not label_codes(tmp_path / "test.csv", "y", replace(export, label_names=["1", "2"]))


def test_a_label_in_another_spelling_is_shown_by_its_codes() -> None:
    trained = replace(TRAINED, label_names=["caf\u00e9", "tea"])
    line = refusal_of(list, Score(trained, "y").checking(source(["cafe\u0301"])).tables())
    assert line.endswith(r"labels: it is 'cafe\u0301', and the other 'caf\xe9': spell them alike")
    short = replace(TRAINED, label_names=["0.1", "0.5"])
    table = pd.DataFrame({"text": ["a", "b"], "y": np.array([0.1, 0.5], np.float32)})
    assert Score(short, "y")._true(table) == [{"0.1"}, {"0.5"}]
    long = replace(TRAINED, label_names=[str(float(np.float32(0.1))), "0.5"])  # of a run of an earlier version
    assert Score(long, "y")._true(table) == [{long.label_names[0]}, {"0.5"}]


@pytest.mark.parametrize("separator", [None, ";"])
def test_lists_of_labels_are_scored_as_by_scikit_learn(separator: str | None) -> None:
    multi, generator = replace(TRAINED, rule=Rule(0.5)), np.random.default_rng(0)
    names = np.array(multi.label_names)
    true, answers = generator.random((2, 50, 3)) < 0.4
    lists: list[Any] = [names[row].tolist() for row in true]
    given: list[Any] = [names[row].tolist() for row in answers]
    written = lists if separator is None else [" ; ".join(row) for row in lists]
    score = Score(multi, "y", separator=separator)
    list(score.checking(source(written)).tables())
    unknown = [None, float("nan")] if separator is None else []
    some = [written[:20] + unknown + written[20:], given[:20] + [["0"]] * len(unknown) + given[20:]]
    list(score.counted([(rows([*some[0], written[0]]), [[*some[1], None]])]))  # the last text got no answer
    exact = accuracy_score(true, answers)
    micro, macro = (f1_score(true, answers, average=mean) for mean in ("micro", "macro"))
    low, high = accuracy_interval(exact, 50)
    assert str(score) == (
        f"exact match {exact:.2%}, 95 % interval {low:.2%} to {high:.2%}; micro F1 {micro:.2%}; macro F1 {macro:.2%};"
        " 50 labelled and answered texts"
    )


@pytest.mark.parametrize(
    ("labels", "separator", "message"),
    [
        (["0;1"], None, "'0;1' is no list, but the run is multi-label: give --label_separator, or write lists"),
        ([3], ";", "3 is no list, but the run is multi-label: write lists of labels"),
        ([["ham"]], None, "'ham' is none of the classifier's labels: 0, 1, spam"),
        (
            [["0", "Spam"]],
            None,
            "'Spam' is none of the classifier's labels: it is 'Spam', and the other 'spam': spell them alike",
        ),
        (["0,1", "1"], ";", "'0,1' is none of the classifier's labels: give --label_separator ','"),
        ([["x"]], None, "'x' is none of the classifier's labels: 0, 1, spam"),
        (["0,1,x"], ";", "'0,1,x' is none of the classifier's labels: 0, 1, spam"),
        (["", " ; "], ";", "has no label: leave it out"),
    ],
)
def test_lists_that_cannot_be_counted_are_refused(labels: list[Any], separator: str | None, message: str) -> None:
    score = Score(replace(TRAINED, rule=Rule(0.5)), "y", separator=separator)
    line = refusal_of(list, score.checking(source(labels)).tables())
    assert line.replace("--label_column y: ", "") == message


def test_texts_that_all_have_no_label_are_scored_where_labels_are_lists() -> None:
    score = Score(replace(TRAINED, rule=Rule(0.5)), "y")
    assert list(score.checking(source([[], []])).tables())
    assert refusal_of(list, score.checking(source([None, None])).tables()).endswith("has no label: leave it out")


@pytest.mark.parametrize(
    ("settings", "known"),
    [
        ({}, {"train"}),
        ({"split": "official"}, {"train"}),
        ({"kfold": 5}, {"train", "validation"}),
        ({"split": "stratified"}, {"train", "validation", "test"}),
        ({"data_dir": None}, set()),
    ],
)
def test_files_whose_texts_trained_the_run_are_known(tmp_path: Path, settings: dict[str, Any], known: set[str]) -> None:
    files = {name: tmp_path / f"{name}.csv" for name in ("train", "validation", "test", "other")}
    for path in files.values():
        path.touch()
    data = replace(TRAINED.config.data, **{"data_dir": tmp_path} | settings)
    assert {name for name, path in files.items() if trained_on(path, data)} == known


def test_any_file_of_a_folder_with_other_names_may_have_trained_the_run(tmp_path: Path) -> None:
    sentences = tmp_path / "sentences_50agree.csv"
    sentences.touch()
    data = replace(TRAINED.config.data, data_dir=tmp_path)
    assert trained_on(sentences, data)
    assert not trained_on(Path(__file__), data)


def test_with_a_separator_an_empty_cell_is_a_text_without_a_label_as_in_training() -> None:
    for empty in ("", None):
        score = Score(replace(TRAINED, rule=Rule(0.5)), "y", separator=";")
        list(score.counted([(rows(["0", empty]), [[["0"], ["1"]]])]))
        assert str(score).startswith("exact match 50.00%"), empty
        assert str(score).endswith("; 2 labelled and answered texts")


def test_a_separator_is_for_lists_of_labels() -> None:
    with pytest.raises(UserError, match="--label_separator ';': run gives each text one label: leave it out"):
        Score(TRAINED, "y", separator=";")
