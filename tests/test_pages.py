from pathlib import Path
from typing import Any

import pytest

from finetuning.pages import Table, measured, page_with_tables, renew_tables, with_table
from tests.common import refusal_of


def test_a_cell_stays_in_its_line() -> None:
    shown = Table(("class", "texts"), [("a|b\nc", "3")]).markdown()
    assert shown.splitlines()[2:] == [r"| a\|b c | 3 |"]
    assert "| `` a`b `` |" in Table(("class", "n"), [("a`b", "")], code=("class",)).markdown()
    commands = Table(("row", "command"), [("a|b", "x"), ("c", "")]).markdown()
    assert commands == "| row | command |\n|---|---|\n| a\\|b | `x` |\n| c |  |"
    assert Table(("row", "n"), [("a", "")]).without_empty_columns().markdown() == "| row |\n|---|\n| a |"


def test_markers_come_in_pairs_or_not_at_all() -> None:
    assert with_table("text", "study", "table") == "text"
    for text in ("<!-- study:begin -->", "<!-- study:end -->", "<!-- study:end --> <!-- study:begin -->"):
        assert "the markers of a table must be <!-- study:begin -->" in refusal_of(with_table, text, "study", "table")


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
    assert "page.md: the markers" in refusal_of(renew_tables, page, {"a": "| A |", "b": "| B |"})
    assert page.read_bytes() == before
    assert "nowhere" in refusal_of(page_with_tables, tmp_path / "nowhere.md", {})


@pytest.mark.parametrize(
    ("environments", "line"),
    [
        ([], "*Measured: not recorded. Code: commit not recorded.*"),
        ([{"git": None}], "*Measured: not recorded. Code: commit not recorded.*"),
        (
            [{"date": "2026-12-02T08:00:00+00:00", "git": {"commit": "b" * 40, "date": "2026-12-01T23:00:00Z"}}] * 2,
            "*Measured: 2026-12-02. Code: commit bbbbbbb (2026-12-01).*",
        ),
        (
            [
                {"date": "2026-12-03", "git": {"commit": "a" * 40, "date": "2026-12-02"}},
                {"date": "2026-12-02", "git": {"commit": "b" * 40, "date": "2026-12-01"}},
                {"git": {"commit": "c" * 40}},
            ],
            "*Measured: 2026-12-02 to 2026-12-03, some not recorded. Code: 3 commits, bbbbbbb (2026-12-01) to ccccccc"
            ".*",
        ),
    ],
)
def test_the_line_below_a_table_of_measurements(environments: list[dict[str, Any]], line: str) -> None:
    assert measured(environments) == line
