from pathlib import Path

import pytest

from finetuning.errors import UserError
from finetuning.pages import page_with_tables, renew_tables, with_table


def test_markers_come_in_pairs_or_not_at_all() -> None:
    assert with_table("text", "study", "table") == "text"
    for text in ("<!-- study:begin -->", "<!-- study:end -->", "<!-- study:end --> <!-- study:begin -->"):
        with pytest.raises(UserError, match="the markers of a table must be <!-- study:begin -->"):
            with_table(text, "study", "table")


def test_several_tables_of_a_page_are_renewed_at_once(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("top é\n<!-- a:begin -->\nold\n<!-- a:end -->\n<!-- b:begin -->\n<!-- b:end -->\nend\n", "utf8")
    renew_tables(page, {"a": "| A |", "b": "| B |", "not there": "| C |"})
    expected = "top é\n<!-- a:begin -->\n| A |\n<!-- a:end -->\n<!-- b:begin -->\n| B |\n<!-- b:end -->\nend\n"
    assert page.read_text("utf8") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


def test_a_page_that_is_refused_stays_as_it_was(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- a:begin -->\n<!-- a:end -->\n<!-- b:begin -->\n", "utf8")
    before = page.read_bytes()
    with pytest.raises(UserError, match=r"page\.md: the markers"):
        renew_tables(page, {"a": "| A |", "b": "| B |"})
    assert page.read_bytes() == before
    with pytest.raises(UserError, match="nowhere"):
        page_with_tables(tmp_path / "nowhere.md", {})
