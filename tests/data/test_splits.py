"""Splits, leaks, limits and label codes."""

from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from finetuning.config import RunConfig
from finetuning.data.splits import stratified_parts, without_leaks
from finetuning.data.texts import LabelledTexts, TextData
from finetuning.errors import UserError
from tests.common import check_refusal, frame, refusal_of, some, text_config, texts_of


@pytest.mark.parametrize("seed", range(5))
def test_stratified_parts_are_disjoint_exact_and_in_proportion(seed: int) -> None:
    labels = np.random.default_rng(seed).choice(4, 1003, p=[0.5, 0.3, 0.15, 0.05])
    parts = stratified_parts(labels, [802, 100, 101], seed)
    assert [len(part) for part in parts] == [802, 100, 101]
    assert sorted(np.concatenate(parts)) == list(range(1003))
    for part in parts:
        expected = np.bincount(labels) * len(part) / 1003
        assert np.abs(np.bincount(labels[part], minlength=4) - expected).max() <= 2
    again = stratified_parts(labels, [802, 100, 101], seed)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not np.array_equal(parts[0], stratified_parts(labels, [802, 100, 101], seed + 1)[0])


def test_smaller_limits_lie_in_larger_ones() -> None:
    labels = np.arange(500) % 3
    small, large = (stratified_parts(labels, [size], 0)[0] for size in (50, 120))
    assert set(small) < set(large)


def test_official_split_carves_validation_out_of_train(tmp_path: Path) -> None:
    frame(200).to_parquet(tmp_path / "train.parquet")
    frame(50, word="test").to_csv(tmp_path / "test.csv", index=False)
    texts = texts_of(RunConfig.from_settings(data_dir=tmp_path))
    assert texts.source == "IMDb, official test (local files)"
    assert [len(split.texts) for split in texts.splits.values()] == [180, 20, 50]
    assert texts.splits["test"].rows.tolist() == list(range(50))
    for name in ("train", "validation"):
        split = texts.splits[name]
        assert split.texts == [f"train text {row}" for row in split.rows]
        assert (split.labels == split.rows % 2).all()
    other = texts_of(RunConfig.from_settings(data_dir=tmp_path, data_seed=1))
    assert set(other.splits["validation"].rows) != set(texts.splits["validation"].rows)
    same = texts_of(RunConfig.from_settings(data_dir=tmp_path, seed=7))
    assert same.splits["validation"].texts == texts.splits["validation"].texts


@pytest.mark.parametrize(("split", "sizes"), [("resplit", [350, 50, 100]), ("stratified", [400, 50, 50])])
def test_all_reviews_split_anew(tmp_path: Path, split: Any, sizes: list[int]) -> None:
    frame(300).to_parquet(tmp_path / "train.parquet")
    frame(200, word="test").to_parquet(tmp_path / "test.parquet")
    texts = texts_of(RunConfig.from_settings(data_dir=tmp_path, split=split))
    assert texts.source.startswith("IMDb train + test, ")
    assert [len(part.texts) for part in texts.splits.values()] == sizes
    everything = [f"train text {i}" for i in range(300)] + [f"test text {i}" for i in range(200)]
    rows = np.concatenate([part.rows for part in texts.splits.values()])
    assert sorted(rows) == list(range(500))
    assert all(part.texts == [everything[row] for row in part.rows] for part in texts.splits.values())


def test_of_a_given_validation_and_no_test_only_the_test_is_carved_out(tmp_path: Path) -> None:
    for name, n in (("train", 40), ("validation", 10)):
        frame(n, word=name).to_parquet(tmp_path / f"{name}.parquet")
    texts = texts_of(text_config(tmp_path))
    assert texts.source.endswith(", held-out test (local files)")
    assert [len(split.texts) for split in texts.splits.values()] == [36, 10, 4]
    assert {text.split()[0] for text in texts.splits["validation"].texts} == {"validation"}
    everything = texts_of(text_config(tmp_path, split="stratified"))
    assert [len(split.texts) for split in everything.splits.values()] == [40, 5, 5]


def test_leaks_leave_train_before_the_limit(tmp_path: Path) -> None:
    train, test = frame(40), frame(6, word="test")
    test.loc[0, "text"] = "  train text 4\n"
    test.loc[1, "text"] = "train text 5"
    for name, table in (("train", train), ("validation", frame(6, word="valid")), ("test", test)):
        table.to_parquet(tmp_path / f"{name}.parquet")
    texts = texts_of(text_config(tmp_path, limit_train=38))
    assert texts.leaks_dropped == 2
    assert not {4, 5} & set(texts.splits["train"].rows)
    with pytest.raises(UserError, match="--limit_train 39: must be from 2 to 38, because the train split has 38 texts"):
        texts_of(text_config(tmp_path, limit_train=39))


@pytest.mark.parametrize(("split", "validation_size"), [("official", 40), ("stratified", 44)])
def test_no_text_of_test_chooses(tmp_path: Path, split: str, validation_size: int) -> None:
    train, test = frame(400), frame(40, word="test")
    train.loc[200:, "text"] = train.text[:200].to_numpy()  # each twice
    test.loc[:19, "text"] = train.text[:20].to_numpy()
    for name, table in (("train", train), ("test", test)):
        table.to_parquet(tmp_path / f"{name}.parquet")
    texts = texts_of(text_config(tmp_path, split=split))
    validation, tested = texts.splits["validation"].texts, texts.splits["test"].texts
    assert not set(validation) & set(tested)
    left_out = validation_size - len(validation)
    assert left_out > 0
    assert texts.notes == [f"removed {left_out} validation texts that also appear in test (before --limit_validation)"]


def test_a_validation_that_was_given_stays_whole(tmp_path: Path) -> None:
    for name, count in (("train", 40), ("validation", 10), ("test", 4)):
        frame(count, word="train" if name == "train" else "held out").to_parquet(tmp_path / f"{name}.parquet")
    texts = texts_of(text_config(tmp_path))
    assert [len(split.texts) for split in texts.splits.values()] == [40, 10, 4]
    assert texts.notes == ["warning: 4 of 10 validation texts also appear in test, so the test score may be too high"]


def grouped(count: int, first: int = 0, word: str = "train") -> pd.DataFrame:
    """Five texts in each group."""
    return frame(count, word=word).assign(patient=[first + i // 5 for i in range(count)])


@pytest.mark.parametrize("several", [False, True])
def test_no_group_is_in_two_parts_of_a_table(tmp_path: Path, several: bool) -> None:
    table = grouped(400)
    table = table.assign(label=table.label.map({0: ["a"], 1: ["a", "b"]})) if several else table
    table.to_parquet(tmp_path / "train.parquet")
    for seed in range(3):
        splits = texts_of(text_config(tmp_path, group_column="patient", data_seed=seed)).splits
        groups = [set(splits[name].rows // 5) for name in splits]
        assert [len(split.texts) for split in splits.values()] == [320, 40, 40]
        assert [len(part) for part in groups] == [64, 8, 8]
        assert sum(len(part) for part in groups) == len(set.union(*groups))
        assert set(some(splits["test"].groups)) == groups[2]
    notes = texts_of(text_config(tmp_path, group_column="patient")).notes
    assert any("texts as independent; those of one group are not" in note for note in notes)


def test_a_large_group_trains_and_each_class_as_well(tmp_path: Path) -> None:
    table = frame(400).assign(by=[max(i - 299, 0) for i in range(400)])
    table.loc[390:, "label"], table.loc[390:, "by"] = 2, [1000] * 5 + [1001] * 5  # a class of two groups
    table.to_parquet(tmp_path / "train.parquet")
    for seed in range(8):
        splits = texts_of(text_config(tmp_path, group_column="by", data_seed=seed)).splits
        assert set(range(300)) <= set(splits["train"].rows)
        assert set(splits["train"].labels) == {0, 1, 2}
        assert all(len(splits[name].texts) in range(38, 43) for name in ("validation", "test"))


@pytest.mark.parametrize(("classes", "of_each"), [(5, 2), (10, 3), (10, 4), (50, 4)])
def test_groups_of_one_class_are_cut(tmp_path: Path, classes: int, of_each: int) -> None:
    """As of authors, or of patients and their diagnosis."""
    table = frame(10 * classes * of_each)
    group = np.arange(len(table)) // 10
    table.assign(by=group, label=group % classes).to_parquet(tmp_path / "train.parquet")
    splits = texts_of(text_config(tmp_path, group_column="by")).splits
    shares = [len(split.texts) / len(table) for split in splits.values()]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.06)
    assert len(set(splits["train"].labels)) == classes


UNEVEN = [
    ([i % 3 for i in range(100)], "3 groups are too few or too unequal for parts 80:10:10 that share none: a"),
    ([max(i - 92, 0) for i in range(100)], "8 groups are too few or too unequal for parts 80:10:10"),
]


@pytest.mark.parametrize(("groups", "message"), UNEVEN)
def test_groups_that_cannot_be_cut_are_refused(tmp_path: Path, groups: list[int], message: str) -> None:
    frame(100).assign(by=groups).to_parquet(tmp_path / "train.parquet")
    assert refusal_of(texts_of, text_config(tmp_path, group_column="by")).startswith(f"--group_column by: {message}")


def test_groups_of_test_leave_train_and_a_validation_that_was_taken_from_it(tmp_path: Path) -> None:
    grouped(400).to_parquet(tmp_path / "train.parquet")
    test = grouped(20, first=70, word="test")  # 70 to 73
    test.loc[0, "text"] = "train text 350"  # of group 70
    test.astype(str).to_csv(tmp_path / "test.csv", index=False)
    texts = texts_of(text_config(tmp_path, group_column="patient"))
    kept = {name: set(split.rows // 5) for name, split in texts.splits.items()}
    assert not (kept["train"] | kept["validation"]) & {70, 71, 72, 73}
    assert not kept["train"] & kept["validation"]
    assert [len(texts.splits[name].texts) for name in ("train", "validation")] == [340, 40], "a tenth of what is left"
    assert texts.leaks_dropped == 1
    assert "removed 19 more training texts whose group is in another split" in texts.notes

    grouped(20, first=72, word="validation").to_parquet(tmp_path / "validation.parquet")  # 72 to 75
    texts = texts_of(text_config(tmp_path, group_column="patient"))
    assert len(texts.splits["validation"].texts) == 20
    assert not set(texts.splits["train"].rows // 5) & set(range(70, 76))
    known = "10 of 20 validation texts also appear in, or share a group with, test, so the test score may be too high"
    assert f"warning: {known}" in texts.notes


def test_a_test_that_is_cut_has_no_group_of_a_validation_that_was_given(tmp_path: Path) -> None:
    grouped(400).to_parquet(tmp_path / "train.parquet")
    grouped(200, first=40, word="validation").to_parquet(tmp_path / "validation.parquet")  # half of the groups
    texts = texts_of(text_config(tmp_path, group_column="patient"))
    groups = {name: set(split.rows // 5 + 40 * (name == "validation")) for name, split in texts.splits.items()}
    assert {name: len(split.texts) for name, split in texts.splits.items()} == {
        "train": 180,
        "validation": 200,
        "test": 20,
    }
    assert not groups["train"] & groups["test"] | (groups["train"] | groups["test"]) & groups["validation"]
    grouped(400, word="test").to_parquet(tmp_path / "validation.parquet")
    message = refusal_of(texts_of, text_config(tmp_path, group_column="patient"))
    assert message.startswith("--group_column patient: each group of train is in validation, so none is left")


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (lambda i: Decimal(f"{i}.00"), "1"),
        (lambda i: Decimal(2**60 + i), str(2**60 + 1)),
        (lambda i: f"Jos\u00e9 {i}", "Jose\u0301 1"),
    ],
)
def test_a_group_has_one_name_in_every_form(tmp_path: Path, train: Callable[[int], Any], test: str) -> None:
    frame(100).assign(by=[train(i // 5) for i in range(100)]).to_parquet(tmp_path / "train.parquet")
    frame(2, word="test").assign(by=test).to_csv(tmp_path / "test.csv", index=False)
    assert len(texts_of(text_config(tmp_path, group_column="by", kfold=2)).splits["train"].texts) == 95


@pytest.mark.parametrize("label", [lambda i: Decimal(2**60 + i % 3), lambda i: 1e19 * (1 + i % 3)])
def test_large_numbers_stay_different_labels(tmp_path: Path, label: Callable[[int], Any]) -> None:
    frame(60).assign(label=[label(i) for i in range(60)]).to_parquet(tmp_path / "train.parquet")
    assert texts_of(text_config(tmp_path)).label_names == [str(label(i)) for i in range(3)]


def test_a_list_is_no_group(tmp_path: Path) -> None:
    frame(40).assign(by=[["a"]] * 40).to_parquet(tmp_path / "train.parquet")
    told = refusal_of(texts_of, text_config(tmp_path, group_column="by"))
    assert told.endswith("holds lists or objects: must be one name or number a row")


def test_a_number_is_the_same_group_in_every_form(tmp_path: Path) -> None:
    grouped(100).to_parquet(tmp_path / "train.parquet")  # groups 0 to 19, whole numbers
    for written in ([0.0, 1.0], ["0.0", "1"], ["00", "01"]):
        frame(2, word="test").assign(patient=written).to_csv(tmp_path / "test.csv", index=False)
        texts = texts_of(text_config(tmp_path, group_column="patient", kfold=2))
        assert len(texts.splits["train"].texts) == (100 if written == ["00", "01"] else 90)


def test_training_texts_that_all_share_a_group_with_test(tmp_path: Path) -> None:
    for name in ("train", "test"):
        grouped(20, word=name).assign(label=[["a"], ["b"]] * 10).to_parquet(tmp_path / f"{name}.parquet")
    message = refusal_of(texts_of, text_config(tmp_path, kfold=2, group_column="patient"))
    assert message.endswith("or test, or their group does: leave some groups to train alone")


def test_train_that_is_nothing_but_test(tmp_path: Path) -> None:
    for name in ("train", "test"):
        frame(20).to_parquet(tmp_path / f"{name}.parquet")
    assert "in validation or test but not in train" in refusal_of(texts_of, text_config(tmp_path))
    for name in ("train", "test"):
        frame(20).assign(label=[["a"], ["b"]] * 10).to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match="all 20 training texts also appear in validation or test: remove repeats"):
        texts_of(text_config(tmp_path, kfold=5))


def test_limits(tmp_path: Path) -> None:
    frame(200).to_parquet(tmp_path / "train.parquet")
    frame(50, word="test").to_parquet(tmp_path / "test.parquet")
    limits: dict[str, Any] = {"limit_train": 60, "limit_validation": 10, "limit_test": 20}
    texts = texts_of(text_config(tmp_path, **limits))
    assert [np.bincount(split.labels).tolist() for split in texts.splits.values()] == [[30, 30], [5, 5], [10, 10]]
    for name, size in (("validation", 20), ("test", 50)):
        line = f"--limit_{name} {size + 1}: must be from 1 to {size}, because the {name} split has {size} texts"
        check_refusal(line, texts_of, text_config(tmp_path, **{f"limit_{name}": size + 1}))
    assert "--limit_train 1" in refusal_of(texts_of, text_config(tmp_path, limit_train=1))


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([0, 1, 2], ["0", "1", "2"]),
        ([1, 5, 10], ["1", "5", "10"]),
        ([0.0, 1.0, 3.0], ["0", "1", "3"]),
        ([0.5, 1.0, 1.5], ["0.5", "1.0", "1.5"]),
        ([False, True, True], ["False", "True"]),
        (["b", "B", "a"], ["B", "a", "b"]),
    ],
)
def test_label_names_come_from_the_labels(tmp_path: Path, values: list[Any], names: list[str]) -> None:
    table = frame(30).assign(label=values * 10)
    table.to_parquet(tmp_path / "train.parquet")
    texts = texts_of(text_config(tmp_path))
    assert texts.label_names == names
    by_value = dict(zip(sorted(set(values)), range(len(names)), strict=True))
    for split in texts.splits.values():
        assert split.labels.tolist() == [by_value[table.label[row]] for row in split.rows]


@pytest.mark.parametrize(
    ("train", "test", "names"),
    [
        ("1,x", "1", ["1", "x"]),  # words in one file, and what looks like a number in the other
        ("9,10", "9.0", ["9", "10"]),
        ("0.5,1", "1.0", ["0.5", "1.0"]),
        ("no, yes", "no ", ["no", "yes"]),
        ("NA,none", "NA", ["NA", "none"]),
    ],
)
def test_labels_of_csv_files_are_numbers_where_all_are(tmp_path: Path, train: str, test: str, names: list[str]) -> None:
    for split, labels, count in (("train", train.split(","), 40), ("test", [test], 5)):
        frame(count, 2, split).assign(label=(labels * count)[:count]).to_csv(tmp_path / f"{split}.csv", index=False)
    texts = texts_of(text_config(tmp_path))
    assert texts.label_names == names
    assert set(texts.splits["train"].labels.tolist()) == {0, 1}
    assert {names[label] for label in texts.splits["test"].labels} == {test.strip() if test != "9.0" else "9"}


def test_labels_that_train_or_the_data_set_does_not_know(tmp_path: Path) -> None:
    frame(30).to_csv(tmp_path / "train.csv", index=False)
    frame(30, 3, "test").to_csv(tmp_path / "test.csv", index=False)
    assert "label '2' appears in validation or test but not in train" in refusal_of(texts_of, text_config(tmp_path))
    frame(30).assign(label=["caf\u00e9", "tea"] * 15).to_csv(tmp_path / "train.csv", index=False)
    frame(30, 2, "test").assign(label=["cafe\u0301", "tea"] * 15).to_csv(tmp_path / "test.csv", index=False)
    with pytest.raises(UserError, match=r"train: it is 'cafe\\u0301', and the other 'caf\\xe9': spell them alike"):
        texts_of(text_config(tmp_path))
    frame(30).to_csv(tmp_path / "train.csv", index=False)
    frame(30, 3, "test").to_csv(tmp_path / "test.csv", index=False)
    with pytest.raises(UserError, match="label 2 is not one of 0 or negative, 1 or positive"):
        texts_of(RunConfig.from_settings(data_dir=tmp_path))


def test_too_few_texts_to_split(tmp_path: Path) -> None:
    frame(6, 2).to_csv(tmp_path / "train.csv", index=False)
    frame(6, 2, "test").to_csv(tmp_path / "test.csv", index=False)
    assert len(texts_of(text_config(tmp_path)).splits["validation"].texts) == 1
    frame(4, 2).to_csv(tmp_path / "train.csv", index=False)
    assert "4 texts are too few for a split 90:10" in refusal_of(texts_of, text_config(tmp_path))


def test_of_pairs_both_texts_make_a_leak(tmp_path: Path) -> None:
    rows = [("a", "x", 0), ("a", "y", 1), ("b", "x", 0), ("c", "z", 1)]
    for name, kept in (("train", rows), ("validation", rows[:1]), ("test", [("a", "z", 1)])):
        pd.DataFrame(kept, columns=["text", "second", "label"]).to_csv(tmp_path / f"{name}.csv", index=False)
    found = texts_of(text_config(tmp_path, text_pair_column="second"))
    assert found.leaks_dropped == 1
    train = found.splits["train"]
    assert list(zip(train.texts, train.pairs or (), train.labels, strict=True)) == [
        ("a", "y", 1), ("b", "x", 0), ("c", "z", 1),
    ]  # fmt: skip
    assert texts_of(text_config(tmp_path)).splits["train"].pairs is None


def test_the_texts_of_a_pair_stay_apart() -> None:
    tables = [pd.DataFrame(rows, columns=["text", "pair", "label"]) for rows in
              ([("ab", "c", 0), ("d", "e", 1)], [("a", "bc", 0), ("f", "g", 1)])]  # fmt: skip
    kept, dropped, _ = without_leaks({"train": tables[0], "test": tables[1]}, ["no", "yes"])
    assert (len(kept["train"]), dropped) == (2, 0), "ab and c are not a and bc"


def test_the_hash_of_texts_is_also_of_their_pairs() -> None:
    labels = np.array([0, 1])
    found = {
        TextData("here", ["a", "b"], {"train": LabelledTexts(["x", "y"], labels, labels, pairs)}, 0).sha256
        for pairs in (None, ["p", "q"], ["p", "r"])
    }
    assert len(found) == 3
