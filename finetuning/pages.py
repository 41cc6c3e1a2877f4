"""Tables, and pages in Markdown: a table is between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.errors import UserError, as_user_error
from finetuning.storage import write_text


@dataclass(frozen=True)
class Table:
    """A table of plain text, from which Markdown and HTML are made. The columns in ``code`` hold commands."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    code: tuple[str, ...] = ("command",)

    def column(self, name: str) -> list[str]:
        return [row[self.columns.index(name)] for row in self.rows]

    def without_empty_columns(self) -> "Table":
        """The same table without columns that have no value."""
        return self.only(*(name for name in self.columns if any(self.column(name))))

    def without(self, column: str) -> "Table":
        return self.only(*(name for name in self.columns if name != column))

    def only(self, *columns: str) -> "Table":
        """The same table with these columns only."""
        kept = [self.columns.index(name) for name in columns]
        return Table(columns, [tuple(row[i] for i in kept) for row in self.rows], self.code)

    def markdown(self) -> str:
        names = [f" {name} " if name else " " for name in self.columns]
        lines = [f"|{'|'.join(names)}|", "|" + "---|" * len(self.columns)]
        for row in self.rows:
            cells = [cell.replace("|", "\\|").replace("\n", " ") for cell in row]
            cells = [as_code(c) if c and n in self.code else c for n, c in zip(self.columns, cells, strict=True)]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)


def as_code(text: str) -> str:
    """A text as code in Markdown, also one with backticks."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if len(fence) > 1 else f"`{text}`"


def measured(environments: Iterable[Mapping[str, Any]]) -> str:
    """The line below a table of measurements: their days, and the commits of the code with the dates of these.

    Args:
        environments: the ``environment`` in the record of each measurement. Older records lack the day.
    """
    found = list(environments)
    days = sorted(str(each["date"])[:10] for each in found if each.get("date"))
    when = _range(days) if days else "not recorded"
    if 0 < len(days) < len(found):
        when += ", some not recorded"
    commits = {
        (str(git.get("date", ""))[:10], git["commit"][:7] + " with changes" * bool(git.get("modified")))
        for each in found
        if (git := each.get("git"))
    }
    ordered = sorted(commits, key=lambda dated: (not dated[0], *dated))  # those without a date are the last
    named = [f"{commit} ({date})" if date else commit for date, commit in ordered] or ["not recorded"]
    number = f"{len(named)} commits," if len(named) > 1 else "commit"
    return f"*Measured: {when}. Code: {number} {_range(named)}.*"


def dated(table: Table, environments: Iterable[Mapping[str, Any]]) -> str:
    """A table in Markdown, with the line of ``measured`` below it."""
    return f"{table.markdown()}\n\n{measured(environments)}"


def _range(ordered: Sequence[str]) -> str:
    return " to ".join(dict.fromkeys([ordered[0], ordered[-1]]))


def with_table(text: str, name: str, content: str) -> str:
    """A page's text with a new table between the markers of this name; unchanged if the page has no such markers.

    Raises:
        UserError: only one of the two markers is there, or they are in the wrong order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if begin not in text and end not in text:
        return text
    before, _, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not closed:
        raise UserError(f"the markers of a table must be {begin} and, below it, {end}")
    return f"{before}{begin}\n{content}\n{end}{after}"


def page_with_tables(page: Path, tables: Mapping[str, str]) -> str:
    """The text of a page with all of these tables renewed; nothing is written.

    Args:
        page: a Markdown file.
        tables: the content of each table, by the name in its markers.

    Raises:
        UserError: the page cannot be read, or the markers of a table are not a pair.
    """
    try:
        text = page.read_text(encoding="utf8")
    except (OSError, ValueError) as error:
        raise UserError(f"{page} cannot be read: {error}") from None
    for name, content in tables.items():
        with as_user_error(str(page), UserError):
            text = with_table(text, name, content)
    return text


def renew_tables(page: Path, tables: Mapping[str, str]) -> None:
    """Renews the ``page_with_tables`` and writes it in one step: a reader sees the old page or the new one."""
    write_text(page, page_with_tables(page, tables))
