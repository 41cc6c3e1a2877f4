"""Pages from templates: HTML that needs no other file. The ones in ``templates/`` hold what several pages share."""

import base64
import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from finetuning.pages import Table

SHARED = Path(__file__).parent / "templates"


def render(template: Path, escape_text: bool = True, **content: Any) -> str:
    """The page that a template makes of its content. The same content gives the same page.

    Args:
        template: the file; it can include those in ``templates/``.
        escape_text: whether text is escaped for HTML; not for a page in Markdown.
        content: what the template names.
    """
    return _environment(template.parent, escape_text).get_template(template.name).render(**content)


@cache  # it holds the compiled templates
def _environment(folder: Path, escape_text: bool) -> Environment:
    environment = Environment(
        loader=FileSystemLoader([folder, SHARED]),
        autoescape=escape_text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "with_code": _with_code, "cell_classes": _cell_classes, "with_whole_brackets": _with_whole_brackets,
    }  # fmt: skip
    return environment


def data_url(png: bytes) -> str:
    """A PNG as the address of an image."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _with_code(text: str) -> Markup:
    """HTML of a sentence with code between Markdown's backticks."""
    return Markup(re.sub("`(.+?)`", r"<code>\1</code>", str(escape(text))))


def _with_whole_brackets(cell: str) -> Markup:
    """HTML of a cell that can break only before an interval in brackets: ``96.60 % (94.63 to 97.86)``."""
    whole = r'<span class="whole">\1</span> <span class="whole">\2</span>'
    return Markup(re.sub(r"^([^(]+) (\([^()]+ to [^()]+\))$", whole, str(escape(cell))))


def _cell_classes(table: Table) -> list[str]:
    """A CSS class for each column: words are on the left, numbers on the right."""
    return [
        "text" if number == 0 or any(map(_is_words, table.column(name))) else "number"
        for number, name in enumerate(table.columns)
    ]


def _is_words(cell: str) -> bool:
    return bool(cell) and not (cell[0].isdigit() or cell[0] in "+-")
