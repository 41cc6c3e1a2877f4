"""All studies on one HTML page that needs no other file. The page itself is the template ``report.html.j2``."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from finetuning.comparison.pairs import READING
from finetuning.comparison.tables import Table

TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Plot:
    """A plot: the name of its file, a caption, and its PNG."""

    file: str
    caption: str
    png: bytes

    @property
    def data_url(self) -> str:
        """The PNG as the address of an image."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class Section:
    """What the report says about one study; tables without rows are not shown."""

    study: str
    question: str
    answers: Table
    table: Table
    headlines: Sequence[str]
    notes: Sequence[str]
    comparisons: Table
    pairs: int  # number of compared pairs, shown or not
    f1_comparisons: Table  # micro F1, only for texts with several labels
    tuning: Table
    plots: Sequence[Plot]

    @property
    def title(self) -> str:
        """The study's name in words."""
        return self.study.replace("_", " ")

    @property
    def comparisons_title(self) -> str:
        """The heading of the compared pairs."""
        shown = len(self.comparisons.rows)
        if shown == self.pairs:
            return f"All pairs of rows ({self.pairs})"
        return f"The best row compared with all others ({shown} of {self.pairs} pairs)"


def render_page(sections: Sequence[Section]) -> str:
    """The page. The same sections give the same text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"with_code": _with_code, "cell_classes": _cell_classes}
    return environment.get_template(TEMPLATE).render(sections=sections, reading=READING)


def _with_code(text: str) -> Markup:
    """HTML of a sentence with code between Markdown's backticks."""
    return Markup(re.sub("`(.+?)`", r"<code>\1</code>", str(escape(text))))


def _cell_classes(table: Table) -> list[str]:
    """A CSS class for each column: words are on the left, numbers on the right."""
    return [
        "text" if number == 0 or any(map(_is_words, table.column(name))) else "number"
        for number, name in enumerate(table.columns)
    ]


def _is_words(cell: str) -> bool:
    return bool(cell) and not (cell[0].isdigit() or cell[0] in "+-")
