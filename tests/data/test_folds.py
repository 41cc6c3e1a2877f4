"""Folds of ``--kfold``: how the training texts are cut."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from finetuning.data.folds import group_folds
from finetuning.data.texts import LabelledTexts, Pool, TextData
from tests.common import refusal_of, text_config, texts_of


def write(folder: Path, name: str, rows: list[tuple[str, Any]]) -> None:
    (folder / f"{name}.json").write_text(json.dumps([{"text": text, "label": label} for text, label in rows]))


def folds_of(folder: Path, kfold: int, **settings: Any) -> list[TextData]:
    """The data of the run of each fold."""
    return [texts_of(text_config(folder, kfold=kfold, fold=fold + 1, **settings)) for fold in range(kfold)]


def rows(split: LabelledTexts) -> list[int]:
    return split.rows.tolist()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """23 training texts: 12 a, 8 b, 3 c; and a test split."""
    write(tmp_path, "train", [(f"text {i}", "a" if i < 12 else "b" if i < 20 else "c") for i in range(23)])
    write(tmp_path, "test", [(f"test {i}", "abc"[i % 3]) for i in range(6)])
    return tmp_path


def test_folds_are_a_stratified_partition(folder: Path) -> None:
    everything = texts_of(text_config(folder, kfold=4))
    assert rows(everything.splits["train"]) == rows(everything.splits["validation"]) == list(range(23))
    assert everything.sizes == {"train": 23, "test": 6}
    folds = folds_of(folder, 4)
    assert sorted(row for fold in folds for row in rows(fold.splits["validation"])) == list(range(23))
    for fold in folds:
        train, validation = fold.splits["train"], fold.splits["validation"]
        assert sorted(rows(train) + rows(validation)) == list(range(23))
        assert rows(fold.splits["test"]) == list(range(6))
        assert validation.texts == [f"text {row}" for row in rows(validation)]
        counts = np.bincount(validation.labels, minlength=3)
        assert counts[0] == 3
        assert counts[1] == 2
        assert counts[2] in (0, 1)
        assert counts.sum() in (5, 6)
    assert "warning: class 'c' is in 3 of the 4 folds only, which validate on it" in everything.notes


def test_folds_depend_on_the_seed_of_the_data_only(folder: Path) -> None:
    def first(**settings: Any) -> list[int]:
        return rows(folds_of(folder, 4, **settings)[0].splits["validation"])

    assert first() == first(seed=7)
    assert first() != first(data_seed=7)


def test_copies_of_a_text_are_in_one_fold(tmp_path: Path) -> None:
    write(tmp_path, "train", [(f" text {i // 3} " if i % 3 else f"text {i // 3}", i // 3 % 2) for i in range(30)])
    write(tmp_path, "test", [("test 0", 0), ("test 1", 1)])
    for fold in folds_of(tmp_path, 5):
        train, validation = ({text.strip() for text in fold.splits[name].texts} for name in ("train", "validation"))
        assert not train & validation
        assert len(validation) == 2
        assert len(fold.splits["validation"].texts) == 6


def test_a_validation_file_is_part_of_the_training_texts(folder: Path) -> None:
    write(folder, "validation", [("more 0", "a"), ("test 1", "b"), ("more 2", "c"), ("text 0", "a")])
    everything = texts_of(text_config(folder, kfold=4))
    train = everything.splits["train"]
    assert rows(train) == [*range(24), 25, 26]  # row 24 appears in test
    assert train.texts[23:] == ["more 0", "more 2", "text 0"]
    assert everything.leaks_dropped == 1
    assert "validation is part of the training texts, because of --kfold" in everything.notes
    (with_copy,) = [fold for fold in folds_of(folder, 4) if 0 in rows(fold.splits["validation"])]
    assert 26 in rows(with_copy.splits["validation"])


def test_rows_of_a_validation_file_follow_those_of_train_also_if_test_was_taken_out(tmp_path: Path) -> None:
    write(tmp_path, "train", [(f"text {i}", i % 2) for i in range(10)])
    write(tmp_path, "validation", [(f"more {i}", i % 2) for i in range(6)])
    for seed in range(12):  # of some the last row of train is test
        train = texts_of(text_config(tmp_path, kfold=2, data_seed=seed)).splits["train"]
        assert [text for text, row in zip(train.texts, rows(train), strict=True) if row >= 10] == [
            f"more {i}" for i in range(6)
        ]


def test_the_test_split_is_the_one_of_a_run_without_folds(tmp_path: Path) -> None:
    write(tmp_path, "train", [(f"text {i}", i % 2) for i in range(40)])
    alone, folds = (texts_of(text_config(tmp_path, **more)) for more in ({}, {"kfold": 4}))
    assert rows(alone.splits["test"]) == rows(folds.splits["test"])
    together = rows(alone.splits["train"]) + rows(alone.splits["validation"])
    assert sorted(together) == rows(folds.splits["train"])


def test_a_limit_applies_before_the_folds_are_cut(folder: Path) -> None:
    folds = folds_of(folder, 2, limit_train=16)
    parts = [rows(fold.splits["validation"]) for fold in folds]
    assert [len(part) for part in parts] == [8, 8]
    assert sorted(parts[0] + parts[1]) == sorted(rows(folds[0].splits["train"]) + parts[0])


def test_pairs_and_several_labels_are_cut_as_well(tmp_path: Path) -> None:
    table = [{"text": f"a {i % 4}", "pair": f"b {i}", "label": [["x"], ["x", "y"], []][i % 3]} for i in range(18)]
    for name in ("train", "test"):
        marked = [row | {"pair": f"{name} {row['pair']}"} for row in table]
        (tmp_path / f"{name}.json").write_text(json.dumps(marked))
    folds = folds_of(tmp_path, 3, text_pair_column="pair")
    for fold in folds:
        validation = fold.splits["validation"]
        assert validation.pairs == [f"train b {row}" for row in rows(validation)]
        assert Counter(map(tuple, validation.labels.tolist())) == {(1, 0): 2, (1, 1): 2, (0, 0): 2}


def test_a_label_that_a_fold_does_not_train_brings_a_warning(tmp_path: Path) -> None:
    write(tmp_path, "train", [(f"a {i}", ["x", "rare"] if i == 7 else [["x"], ["y"]][i % 2]) for i in range(30)])
    write(tmp_path, "test", [("b", ["y"])])
    (fold,) = (i for i, one in enumerate(folds_of(tmp_path, 3), 1) if 7 in one.splits["validation"].rows)
    notes = texts_of(text_config(tmp_path, kfold=3)).notes
    assert f"warning: fold {fold} trains without the label rare, but validates on it" in notes


@pytest.mark.parametrize(
    ("kfold", "labels", "message"),
    [
        (5, [0, 0, 1, 1], "--kfold 5: must be at most 4, the number of different training texts"),
        (2, [0, 0, 0, 1, 1], "--kfold 2: class '1' has 1 different training text: must be at least 2"),
    ],
)
def test_too_few_texts_are_refused(tmp_path: Path, kfold: int, labels: list[int], message: str) -> None:
    texts = [f"text {min(i, 3)}" for i in range(len(labels))]  # the fifth is a copy
    write(tmp_path, "train", list(zip(texts, labels, strict=True)))
    write(tmp_path, "validation", [("text 0", 0)])
    write(tmp_path, "test", [("test 0", 0), ("test 1", 1)])
    assert refusal_of(texts_of, text_config(tmp_path, kfold=kfold)).startswith(message)


def test_a_limit_may_be_why_a_class_has_one_text(tmp_path: Path) -> None:
    """Of 60 texts in 30 classes, which look like ids: two of each."""
    write(tmp_path, "train", [(f"text {i}", i % 30) for i in range(60)])
    write(tmp_path, "test", [("test 0", 0), ("test 1", 1)])
    told = refusal_of(texts_of, text_config(tmp_path, kfold=2, limit_train=40))
    assert told.endswith(
        ": give a larger --limit_train; if it has no more of this class, add texts of it, or leave it out"
    )


def test_a_class_that_would_leave_train_is_refused(tmp_path: Path) -> None:
    """Its texts are copies of one text with another label."""
    write(tmp_path, "train", [(f"text {i}", i % 2) for i in range(20)] + [("text 3", 2)] * 3)
    write(tmp_path, "test", [("test 0", 0), ("test 1", 1)])
    assert refusal_of(texts_of, text_config(tmp_path, kfold=4)) == (
        "--kfold 4: the texts of class '2' are in one fold, because they are copies of texts with other labels: correct"
        " the labels"
    )


def test_no_group_is_in_two_folds_and_each_fold_has_all_classes(tmp_path: Path) -> None:
    table = [{"text": f"text {i % 45}", "label": "ab"[i % 2], "by": f"author {i // 10}"} for i in range(60)]
    held_out = [{"text": f"test {i}", "label": "ab"[i % 2], "by": "author 3"} for i in range(4)]
    for name, rows_of in (("train", table), ("test", held_out)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows_of))
    folds, copied = folds_of(tmp_path, 5, group_column="by"), {f"text {i}" for i in range(15)}  # authors 0, 1; 4, 5
    parts = [{row // 10 for row in rows(fold.splits["validation"])} for fold in folds]
    assert sorted(map(list, parts)) == [[0], [1], [2], [4], [5]]  # author 3 is in test
    for fold in folds:
        assert len(fold.splits["validation"].texts) == 10
        assert len(fold.splits["train"].texts) == 40 - len(set(fold.splits["validation"].texts) & copied)
        assert not set(fold.splits["train"].texts) & set(fold.splits["validation"].texts)
        assert np.bincount(fold.splits["validation"].labels).tolist() == [5, 5]
        assert "removed 10 more training texts whose group is in another split" in fold.notes
        assert "30 training texts have copies in groups of other folds, which train without them" in fold.notes
    other = folds_of(tmp_path, 5, group_column="by", data_seed=1)
    assert [rows(fold.splits["validation"]) for fold in other] != [rows(fold.splits["validation"]) for fold in folds]


def test_a_class_of_few_groups_is_not_in_all_folds(tmp_path: Path) -> None:
    table: list[dict[str, Any]] = [
        {"text": f"text {i}", "label": i // 2 % 2 if i < 36 else 2, "by": i // 2} for i in range(40)
    ]
    for name, groups in (("train", 0), ("test", 100)):
        marked = [row | {"text": f"{name} {row['text']}", "by": groups + row["by"]} for row in table]
        (tmp_path / f"{name}.json").write_text(json.dumps(marked))
    texts = texts_of(text_config(tmp_path, kfold=5, group_column="by"))
    assert "warning: class '2' is in 2 of the 5 folds only, which validate on it" in texts.notes


def test_a_class_whose_texts_are_copied_into_each_fold_is_refused(tmp_path: Path) -> None:
    """Without the copies a fold would train without the class."""
    table = [{"text": f"text {i}", "label": i % 2, "by": i // 4} for i in range(40)]
    table += [{"text": f"copied {i % 2}", "label": 2, "by": 100 + i // 2} for i in range(4)]
    for name in ("train", "test"):
        marked = [row | {"text": f"{name} {row['text']}", "by": f"{name} {row['by']}"} for row in table]
        (tmp_path / f"{name}.json").write_text(json.dumps(marked))
    message = refusal_of(texts_of, text_config(tmp_path, kfold=2, group_column="by"))
    assert message.startswith(
        "--kfold 2: fold 1 would train without class '2', because it has all of its texts or copies"
    )


def test_a_fold_that_is_nearly_everything_is_said(tmp_path: Path) -> None:
    table = [{"text": f"text {i}", "label": i % 2, "by": max(i - 80, 0)} for i in range(100)]
    (tmp_path / "train.json").write_text(json.dumps(table))
    (tmp_path / "test.json").write_text(json.dumps([{"text": f"test {i}", "label": i, "by": -i - 1} for i in (0, 1)]))
    texts = texts_of(text_config(tmp_path, kfold=5, group_column="by"))
    said = (
        "81 of 100 training texts are in one fold, because groups stay together: the run that validates on it trains on"
    )
    assert f"warning: {said} 19 at most" in texts.notes


@pytest.mark.parametrize("unequal", [False, True])
def test_groups_of_any_size_fill_folds_evenly(unequal: bool) -> None:
    """As evenly as scikit-learn's StratifiedGroupKFold, within a text."""
    rng = np.random.default_rng(3)
    strata, groups = rng.choice(3, 2000, p=[0.7, 0.2, 0.1]), (400 * rng.random(2000) ** (1 + unequal)).astype(int)
    ours, theirs = group_folds(strata, groups, [1] * 5, 0), np.empty(2000, dtype=int)
    for fold, (_, held_out) in enumerate(StratifiedGroupKFold(5).split(strata, strata, groups), 1):
        theirs[held_out] = fold
    assert set(ours) == {1, 2, 3, 4, 5}
    assert pd.Series(ours).groupby(groups).nunique().max() == 1
    spread = [pd.crosstab(folds, strata, margins=True).iloc[:5].std().to_numpy() for folds in (ours, theirs)]
    assert (spread[0] <= spread[1] + 1).all()
    assert (group_folds(strata, groups, [1] * 5, 1) != ours).any()


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (lambda i: i % 3, "--kfold 4: must be at most 3, the number of groups of the training texts"),
        (
            lambda i: i % 4 if i < 36 else 4,
            "--kfold 4: the texts of class '2' are in one fold, because they belong to few",
        ),
    ],
)
def test_groups_that_cannot_be_cut_into_folds_are_refused(tmp_path: Path, group: Any, message: str) -> None:
    table = [{"text": f"text {i}", "label": i % 2 if i < 36 else 2, "by": f"by {group(i)}"} for i in range(40)]
    for name in ("train", "test"):
        marked = [row | {"text": f"{name} {row['text']}", "by": f"{name} {row['by']}"} for row in table]
        (tmp_path / f"{name}.json").write_text(json.dumps(marked))
    assert refusal_of(texts_of, text_config(tmp_path, kfold=4, group_column="by")).startswith(message)


def test_the_hash_of_folds_tells_copies() -> None:
    numbers = np.arange(2)
    pools = [Pool(LabelledTexts(["a", other], numbers, numbers), numbers + 1) for other in ("b", " a ")]
    assert pools[0].sha256 != pools[1].sha256, "a copy is held out with its text"
