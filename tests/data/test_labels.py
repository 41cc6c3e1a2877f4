"""Multi-label data: how they are read and split; what is learned from them is tested in training/test_tasks.py."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetuning.data.labels import rarest_labels
from finetuning.data.texts import TextData
from tests.common import check_refusal, text_config, texts_of, write_texts


def write(folder: Path, labels: list[Any], *splits: str) -> None:
    """Writes these splits, by default all of them, with the same labels and other texts."""
    for split in splits or ("train", "validation", "test"):
        rows = [{"text": f"{split} text {i}", "label": label} for i, label in enumerate(labels)]
        (folder / f"{split}.json").write_text(json.dumps(rows))


def read(folder: Path, **settings: object) -> TextData:
    return texts_of(text_config(folder, **settings))


def given(data: TextData, split: str) -> dict[int, list[str]]:
    """The labels of each row of a split."""
    part = data.splits[split]
    return {
        int(row): [data.label_names[i] for i in np.flatnonzero(labels)]
        for row, labels in zip(part.rows, part.labels, strict=True)
    }


LISTS = [["joy"], ["joy", "fear"], [], ["anger", "joy", "anger"]]


def test_lists_of_labels(tmp_path: Path) -> None:
    write(tmp_path, LISTS)
    data = read(tmp_path)
    assert data.label_names == ["anger", "fear", "joy"]
    assert given(data, "train") == {0: ["joy"], 1: ["fear", "joy"], 2: [], 3: ["anger", "joy"]}
    assert data.splits["train"].labels.dtype == np.int8
    assert "splits and limits are stratified by each text's rarest label" in data.notes


def test_a_separator_and_numbers_give_the_same_labels(tmp_path: Path) -> None:
    write(tmp_path, ["joy", "joy| fear", "anger|joy|", "fear"])
    data = read(tmp_path, label_separator="|")
    assert given(data, "test") == {0: ["joy"], 1: ["fear", "joy"], 2: ["anger", "joy"], 3: ["fear"]}
    write(tmp_path, [["joy"], ["joy", "fear", " "], [""], ["fear"]])
    assert given(read(tmp_path), "test") == {0: ["joy"], 1: ["fear", "joy"], 2: [], 3: ["fear"]}
    write(tmp_path, [[10], [9, 10], [], [2]])
    assert read(tmp_path).label_names == ["2", "9", "10"]  # numbers are sorted as numbers


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_an_empty_cell_with_a_separator_is_no_label(tmp_path: Path, ending: str) -> None:
    for name in ("train", "validation", "test"):
        table = pd.DataFrame({"text": [f"{name} {i}" for i in range(3)], "label": ["joy|fear", None, "joy"]})
        content = table.to_csv(index=False) if ending == "csv" else table.to_json(orient="records")
        (tmp_path / f"{name}.{ending}").write_text(content)
    assert given(read(tmp_path, label_separator="|"), "test") == {0: ["fear", "joy"], 1: [], 2: ["joy"]}


def write_parquet(folder: Path, feature: Any, labels: list[list[int]], *splits: str) -> None:
    """Writes these splits as the datasets library does, which stores the feature of the label column."""
    info = {"info": {"features": {"label": feature, "text": {"dtype": "string", "_type": "Value"}}}}
    for split in splits:
        table = pa.table({"text": [f"{split} {i}" for i in range(len(labels))], "label": labels})
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), folder / f"{split}.parquet")


@pytest.mark.parametrize("older", [True, False])
def test_parquet_of_the_datasets_library_names_the_labels(tmp_path: Path, older: bool) -> None:
    names = {"names": ["no", "maybe", "yes"], "_type": "ClassLabel"}
    feature: Any = [names] if older else {"feature": names, "_type": "List"}
    write_parquet(tmp_path, feature, [[0], [2, 0], [1], []], "train", "validation", "test")
    data = read(tmp_path)
    assert given(data, "train") == {0: ["no"], 1: ["no", "yes"], 2: ["maybe"], 3: []}


def test_parts_and_limits_keep_rare_labels_in_proportion(tmp_path: Path) -> None:
    kinds = [["a"], ["a", "b"], ["a"], ["a", "c"], ["a"], ["c", "b"], [], ["a"]]
    write(tmp_path, [kinds[i % 8] for i in range(400)], "train")
    data = read(tmp_path, limit_train=200)
    assert [len(data.splits[name].texts) for name in ("train", "validation", "test")] == [200, 40, 40]
    shares = np.array([data.splits[name].labels.mean(0) for name in ("train", "validation", "test")])
    assert np.ptp(shares, axis=0).max() < 0.06
    rows = [set(data.splits[name].rows.tolist()) for name in ("train", "validation", "test")]
    assert not rows[0] & rows[1] | rows[0] & rows[2] | rows[1] & rows[2]


@pytest.mark.parametrize("labels", [[[0], [1], [0, 1]], [["0", "1"], ["1", "1"], ["1"]]])
def test_zeros_and_ones_can_be_labels(tmp_path: Path, labels: list[Any]) -> None:
    write(tmp_path, labels)
    assert read(tmp_path).label_names == ["0", "1"]


def test_a_label_that_train_lacks_brings_a_warning(tmp_path: Path) -> None:
    write(tmp_path, [["a"], ["b"], ["a", "b"]], "train")
    write(tmp_path, [["a"], ["c", "b"]], "validation")
    write(tmp_path, [["a"], ["d"]], "test")
    assert "warning: no training text has the label c, d, but other texts have it" in read(tmp_path).notes


def test_labels_with_two_separators_bring_a_warning(tmp_path: Path) -> None:
    """As if texts that predict.py has labelled were added to others."""
    rows = "".join(f"text {i},{label}\n" for i, label in enumerate(["a;b", '"a, b"', "a", "b"] * 10))
    write_texts(tmp_path, f"text,label\n{rows}")
    said = "warning: label 'a, b' consists of other labels: is there another separator?"
    assert said in read(tmp_path, label_separator=";").notes


@pytest.mark.parametrize(
    ("labels", "doubt"),
    [
        (["joy", "fear", "joy;fear", "fear; anger", "anger"] * 8, "labels such as 'fear; anger' look like lists: if"),
        (["['joy']", "['joy', 'fear']", "['fear']"] * 8, "labels such as \"['fear']\" look like lists written as text"),
        (["[1]", "[1 2]", "[2]"] * 8, "labels such as '[1 2]' look like lists written as text"),
        (["Smith, John", "Smith, Jane", "Doe, Jim"] * 8, ""),
        (["1.5", "2", "2.5"] * 8, ""),
        ([f"{i / 7:.3f}" for i in range(1, 40)], "numbers such as 0.143 would each be a class: make classes of them"),
    ],
)
def test_labels_that_are_probably_no_classes(tmp_path: Path, labels: list[str], doubt: str) -> None:
    write(tmp_path, labels)
    warnings = [note for note in read(tmp_path).notes if note.startswith("warning: ")]
    assert len(warnings) == bool(doubt)
    assert all(note.startswith(f"warning: {doubt}") for note in warnings)


def test_what_a_refused_split_says_of_such_labels(tmp_path: Path) -> None:
    write(tmp_path, ["joy", "fear", "joy;fear", "fear;anger", "anger"] * 3 + ["joy;anger"], "train")
    check_refusal(r"has 1 text: must be .* look like lists: if they are, give --label_separator", read, tmp_path)


UNREADABLE = [
    ([["a"], 3], None, "--label_column label: labels must be all lists, but one is 3"),
    ([["a", 3], ["b"]], None, "--label_column label: the labels in the lists must be all whole numbers or all"),
    ([["a", None], ["b"]], None, "--label_column label: the labels in the lists must be all whole numbers or all"),
    ([[0.5], [1.5]], None, "--label_column label: the labels in the lists must be all whole numbers or all"),
    ([["a"], None], None, "--label_column label: .* has no label in row 1 "),
    ([["a"], ["a"]], None, "--label_column label: must have at least two different labels, but has a"),
    ([[], []], None, "--label_column label: must have at least two different labels, but has none"),
    ([[0, 1, 0], [0, 0, 1]], None, "--label_column label: each list has a 0 or 1 for each of 3 labels, but must"),
    ([[1.0, 0.0], [1.0, 1.0]], None, "--label_column label: each list has a 0 or 1 for each of 2 labels, but must"),
    ([[0, 1], [1, 0]], None, "--label_column label: each list has a 0 or 1 for each of 2 labels, but must"),
    ([["a", "b"], ["b", "a"]], None, r"--label_column label: all texts have the same labels \(a, b\), so there is"),
    (["a;b", "b;a"], ";", r"--label_column label: all texts have the same labels \(a, b\), so there is nothing"),
    ([[[1, 2], [3]], [[2, 1], [0]]], None, "--label_column label: the labels in the lists must be all whole numbers"),
    (["a", "b"], ",", "--label_separator ',': never separates two labels in column label: leave it out$"),
    (["a;b", "a", "b"], ",", "--label_separator ',': never .*: labels such as 'a;b' need --label_separator ';'$"),
    ([["a"], ["b"]], ",", "--label_separator ',': column label has lists, so leave it out"),
    (["['a', 'b']", "['a']"], ",", "--label_separator ',': column label has lists written as text, such as .*: save"),
    ([1, 2], ",", "--label_separator ',': column label has numbers, and only text has a separator"),
    (["a", ""], None, "--label_column label: .* has no label in row 1 "),
]


@pytest.mark.parametrize(("labels", "separator", "line"), UNREADABLE)
def test_labels_that_cannot_be_read(tmp_path: Path, labels: list[Any], separator: str | None, line: str) -> None:
    write(tmp_path, labels, "train")
    check_refusal(f"^{line}", read, tmp_path, label_separator=separator)


def test_lists_in_lists_are_refused_in_parquet_as_well(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(2)]
    pq.write_table(pa.table({"text": texts, "label": [[[1], [1, 2]], [[2], [3]]]}), tmp_path / "train.parquet")
    check_refusal(r"^--label_column label: the labels in the lists must be all whole numbers", read, tmp_path)


def test_a_number_that_has_no_name(tmp_path: Path) -> None:
    write_parquet(tmp_path, {"feature": {"names": ["no", "yes"]}, "_type": "List"}, [[0], [2]], "train")
    check_refusal(r"^--label_column label: label 2 is not one of no, yes", read, tmp_path)


def test_texts_without_a_label_next_to_lists_are_not_to_be_removed(tmp_path: Path) -> None:
    rows = [*["joy;fear", "joy", "fear;anger", "anger"] * 8, ""]
    config = write_texts(tmp_path, "text,label\n" + "".join(f"text {i},{label}\n" for i, label in enumerate(rows)))
    check_refusal(r"no label in row 32 .*: labels such as .* give --label_separator ';'$", texts_of, config)


def test_a_label_without_a_text_is_nobodys_rarest() -> None:
    assert rarest_labels(np.array([[0, 1], [0, 1]])).tolist() == [1, 1], "a label without a text is nobody's"
