"""Texts in one column or in several."""

import pandas as pd
import pytest

from finetuning.data.columns import texts_in
from finetuning.errors import UserError

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


def test_missing_columns() -> None:
    columns = "which has: title, body, year, a,b$"
    with pytest.raises(UserError, match=f"--text_column text: must be a column of here, {columns}"):
        texts_in(TABLE, "text", "here")
    with pytest.raises(UserError, match=f"--text_column title,text: must be columns of here, {columns}"):
        texts_in(TABLE, "title,text", "here")
