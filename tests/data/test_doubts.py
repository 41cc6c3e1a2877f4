"""Warnings about texts that are read and split."""

from pathlib import Path

import pandas as pd
import pytest

from finetuning.data.doubts import alike_groups, respelled, wordless
from tests.common import text_config, texts_of, write_texts


@pytest.mark.parametrize(("twice", "warned"), [(8, True), (1, False)])
def test_texts_with_two_labels_each_may_be_half_of_a_pair(tmp_path: Path, twice: int, warned: bool) -> None:
    rows = [f"question {i},{label}\n" for i in range(twice) for label in "ab"]
    rows += [f"text {i},{'ab'[i % 2]}\n" for i in range(30)]
    notes = texts_of(write_texts(tmp_path, "text,label\n" + "".join(rows))).notes
    found = [note for note in notes if "training texts have different labels elsewhere in train" in note]
    assert bool(found) == warned


def test_a_column_of_numbers_is_doubted(tmp_path: Path) -> None:
    rows = "".join(f"{i},{2021 + i}-01,T{i:04},a film {i},{'ab'[i % 2]}\n" for i in range(30))
    write_texts(tmp_path, "number,month,ticket,text,label\n" + rows)
    for column, doubted in (("number", True), ("month", True), ("ticket", True), ("text", False)):
        notes = texts_of(text_config(tmp_path, text_column=column)).notes
        line = "warning: 100% of the training texts have no letter, or are one word with a digit: is --text_column the"
        assert any(note.startswith(line) for note in notes) == doubted
    write_texts(tmp_path, "text,label\n" + "".join(f"是的{i},{'ab'[i % 2]}\n" for i in range(30)))
    assert not any("no letter" in note for note in texts_of(text_config(tmp_path)).notes)


@pytest.mark.parametrize(("numbers", "doubted"), [(14, False), (15, True)])
def test_half_of_the_texts_may_have_no_letter(numbers: int, doubted: bool) -> None:
    texts = [f" {i}\n. " if i < numbers else f"film\n{i}" for i in range(30)]
    assert bool(wordless(pd.DataFrame({"text": texts}))) == doubted


def held_out_text(twin: str, texts: int = 100) -> list[str]:
    """What is said of ``texts`` held-out texts, of which one has the training text ``twin`` in another spelling."""
    test = pd.DataFrame({"text": ["A good film", *(f"test {i}" for i in range(1, texts))]})
    train = pd.DataFrame({"text": [twin, *(f"train {i}" for i in range(9))]})
    return respelled({"train": train, "test": test, "validation": test.iloc[:0]})


@pytest.mark.parametrize(
    "twin", ["a GOOD film", "A  good\u00a0film", "A good\u200b film", "\ufeffA good film", "\uff21 good film"]
)
def test_texts_that_look_alike_are_warned_of_from_one_in_a_hundred_on(twin: str) -> None:
    (said,) = held_out_text(twin)
    assert said.startswith(
        "warning: 1 held-out text is a training text but for capitals, spaces or invisible characters"
    )
    assert held_out_text(twin, 101) == [], "a hundredth is less than one"
    assert held_out_text("A goodfilm") == held_out_text("A good film?") == []


def test_in_folds_each_text_is_held_out_once() -> None:
    test = pd.DataFrame({"text": ["one", "two"]})
    train = pd.DataFrame({"text": ["Good", "good", "good", "bad", "bad"]})
    (said,) = respelled({"train": train, "test": test})
    assert said.startswith("warning: 3 held-out texts are"), "copies alone stay in one fold"
    assert respelled({"train": train, "test": test, "validation": test}) == []


def test_a_pair_looks_like_another_if_both_texts_do() -> None:
    def said(second: str) -> list[str]:
        train = pd.DataFrame({"text": ["a", "b"], "pair": ["x", "y"]})
        return respelled(
            {"train": train, "test": pd.DataFrame({"text": ["A"], "pair": [second]}), "validation": train[:0]}
        )

    assert said("X")
    assert not said("Y")


def test_groups_that_look_alike_are_named(tmp_path: Path) -> None:
    names = ["Acme", "acme ", "ACME"]
    rows = [f"text {i},{'ab'[i % 2]},{names[i // 2] if i < 6 else i // 2}\n" for i in range(60)]
    write_texts(tmp_path, "text,label,by\n" + "".join(rows))
    said = "warning: groups 'Acme' and 'acme' and 'ACME' count as different, so their texts may be in two splits: spell"
    assert any(note.startswith(said) for note in texts_of(text_config(tmp_path, group_column="by")).notes)
    assert alike_groups(["1", "2", "Bell"]) == []


def test_a_run_prints_the_warning(tmp_path: Path) -> None:
    write_texts(tmp_path, "text,label\n" + "".join(f"a film {i},{'ab'[i % 2]}\n" for i in range(30)))
    write_texts(tmp_path, "text,label\n" + "".join(f"A Film {i},{'ab'[i % 2]}\n" for i in range(8)), "test.csv")
    found = texts_of(text_config(tmp_path))
    assert found.leaks_dropped == 0, "capitals may matter, so they are kept"
    assert any("held-out texts are training texts but for capitals" in note for note in found.notes)
