"""Texts in one column or in several."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from finetuning.data.columns import Kind, find_label_column, find_text_column, texts_in
from finetuning.data.tables import checked
from finetuning.errors import UserError
from finetuning.settings import DataSettings
from tests.common import check_refusal, text_config, texts_of, write_texts

TABLE = pd.DataFrame(
    {
        "title": ["Good", "", None, "Bad", "  "],
        "body": ["film", "only a body", "no title", None, ""],
        "year": [1, 2, 3, 4, 5],
        "a,b": list("vwxyz"),
    }
)


def test_one_column_is_as_it_is() -> None:
    assert texts_in(TABLE, "body", "here").tolist()[:3] == ["film", "only a body", "no title"]
    assert texts_in(TABLE, "year", "here").tolist() == [1, 2, 3, 4, 5]
    assert texts_in(TABLE, "a,b", "here").tolist() == list("vwxyz"), "a column of this name comes first"


def test_several_are_joined_with_a_space_without_empty_parts() -> None:
    for wanted in ("title,body", "title, body"):
        assert texts_in(TABLE, wanted, "here").tolist() == ["Good film", "only a body", "no title", "Bad", ""]
    assert texts_in(TABLE, "body,title", "here")[0] == "film Good"


def test_a_number_is_no_part_of_a_text() -> None:
    assert texts_in(TABLE, "title,year", "here").isna().all()


def test_a_table_with_another_separator_is_named() -> None:
    with pytest.raises(UserError, match=r"which has: text;label \(one column: separate columns by commas instead of"):
        texts_in(pd.DataFrame({"text;label": ["a;b"]}), "text", "here")


def test_a_column_that_is_named_twice_is_refused() -> None:
    check_refusal(r"^--text_column title, title: names a column twice$", texts_in, TABLE, "title, title", "here")


def test_a_column_in_both_texts_of_a_pair_is_refused() -> None:
    settings: dict[str, Any] = {"label_column": "year", "text_pair_column": "body"}
    line = r"^--text_pair_column body: column body must not be in --text_column title,body"
    check_refusal(line, checked, TABLE, "here", DataSettings(text_column="title,body", **settings))
    whole = TABLE.rename(columns={"a,b": "title,body"})[2:4].assign(body="film")
    assert checked(whole, "here", DataSettings(text_column="title,body", **settings)).text.tolist() == ["x", "y"]


@pytest.mark.parametrize(
    ("kinds", "text", "label"),
    [
        ({"text": "text", "label": "classes"}, "text", "label"),
        ({"sentence": "text", "idx": "other", "intent": "classes"}, "sentence", "intent"),
        ({"text": "text", "labels": "classes", "id": "text"}, "text", "labels"),
        ({"text": "text", "label": "other", "label_text": "text"}, "text", "label"),
        ({"tweet_id": "other", "tweet": "text", "Label": "text", "length": "other"}, "tweet", "Label"),
        ({"review": "text", "stars": "other", "review_id": "text"}, "review", "stars"),
        ({"question": "text", "coarse": "classes", "fine": "classes"}, "question", None),
        ({"text": "text", "length": "other", "stars": "other"}, "text", None),
        ({"review": "text", "sentiment": "text"}, None, None),
        ({"premise": "text", "hypothesis": "text", "label": "classes"}, None, "label"),
        ({"audio": "other", "label": "classes"}, None, "label"),
        ({"text": "text", "id": "other"}, "text", None),
    ],
)
def test_columns_are_found_where_there_is_only_one_answer(
    kinds: dict[str, Kind], text: str | None, label: str | None
) -> None:
    if label is None:
        line = r"^--dataset me/x: .* the labels: give --label_column NAME; the columns are"
        check_refusal(line, find_label_column, kinds, [], "--dataset me/x")
    else:
        assert find_label_column(kinds, [], "--dataset me/x") == label
    taken = [] if label is None else [label]
    if text is None:
        line = r"^--dataset me/x: .* the texts: give --text_column NAME, or A,B for two"
        check_refusal(line, find_text_column, kinds, taken, "--dataset me/x")
    else:
        assert find_text_column(kinds, taken, "--dataset me/x") == text


PAIR, BY = {"text_pair_column": "second"}, {"group_column": "by"}
UNREADABLE = [
    ("text,label\na,0\nb,1", PAIR, "text_pair_column second: must be a column of .*, which has: text, label"),
    ("text,second,label\na,,0\nb,c,1", PAIR, "text_pair_column second: .* has no text in row 0 "),
    ("premise,second,label\na,b,0", PAIR, "text_column text: must be a column of .*: premise, second, label"),
    ("text,label\na,0\nb,1", BY, "group_column by: must be a column of .*, which has: text, label"),
    ("text,by,label\na,x,0\nb, ,1", BY, "group_column by: .* has no group in row 1 .*: give each such text a group"),
]


@pytest.mark.parametrize(("content", "columns", "line"), UNREADABLE)
def test_pairs_and_groups_that_cannot_be_read(tmp_path: Path, content: str, columns: dict[str, str], line: str) -> None:
    write_texts(tmp_path, content)
    check_refusal(f"^--{line}", texts_of, text_config(tmp_path, **columns))
