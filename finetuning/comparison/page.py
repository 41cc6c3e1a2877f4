"""All studies on one HTML page that needs no other file: tables, comparisons, plots; readable on a phone."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from finetuning.comparison.pairs import READING
from finetuning.comparison.tables import Table

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; color: #1a1a1a;
  background: #fff; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { font-size: 1.3rem; margin: 0 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
section { border-top: 2px solid #0072b2; margin-top: 2.5rem; padding-top: 1rem; }
nav a { display: inline-block; padding: .4rem .8rem .4rem 0; }
a { color: #00568a; }
.question { font-size: 1.1rem; max-width: 45rem; }
.headline { font-weight: 600; max-width: 45rem; }
.note { color: #555; font-size: .9rem; max-width: 45rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ddd; padding: .4rem .8rem .4rem 0; text-align: right; vertical-align: top; }
th { border-bottom: 2px solid #999; font-weight: 600; vertical-align: bottom; }
th.text, td.text { text-align: left; }
td.nowrap { white-space: nowrap; }
code { font-size: .85em; }
dl.commands dt { font-weight: 600; margin-top: .6rem; }
dl.commands dd { margin: 0; }
summary { cursor: pointer; padding: .5rem 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; }
figure img { width: 100%; height: auto; }
figcaption { color: #555; font-size: .9rem; }
"""


@dataclass(frozen=True)
class Plot:
    """A plot of a study: its file's name, what it shows in a sentence, and its PNG."""

    file: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Section:
    """What the report says of one study; empty tables are not shown."""

    study: str
    question: str
    table: Table
    headlines: Sequence[str]
    notes: Sequence[str]
    comparisons: Table
    pairs: int  # that were compared
    tuning: Table
    plots: Sequence[Plot]

    @property
    def comparisons_title(self) -> str:
        shown = len(self.comparisons.rows)
        if shown == self.pairs:
            return f"Every pair of rows compared ({self.pairs})"
        return f"The highest row compared with the others ({shown} of {self.pairs} pairs)"


def page(sections: Sequence[Section]) -> str:
    """The page; the same sections give the same text."""
    links = "\n".join(f'<a href="#{escape(s.study)}">{escape(_title(s.study))}</a>' for s in sections)
    body = "\n".join(_section(section) for section in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Fine-tuning methods compared</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<h1>Fine-tuning methods compared</h1>
<nav>
{links}
</nav>
{body or "<p>No runs yet.</p>"}
</body>
</html>
"""


def _with_code(text: str) -> str:
    """HTML of a sentence in which Markdown's backticks stand around code."""
    return re.sub("`(.+?)`", r"<code>\1</code>", escape(text))


def _title(study: str) -> str:
    return study.replace("_", " ")


def _section(section: Section) -> str:
    parts = [f'<section id="{escape(section.study)}">', f"<h2>{escape(_title(section.study))}</h2>"]
    if section.question:
        parts.append(f'<p class="question">{escape(section.question)}</p>')
    parts += [f'<p class="headline">{escape(sentence)}</p>' for sentence in section.headlines]
    parts.append(_table(section.table.without("command").without_empty_columns()))
    parts += [f'<p class="note">{_with_code(note)}</p>' for note in section.notes]
    parts.append(_commands(section.table))
    if section.plots:
        parts += ['<div class="plots">', *(_figure(plot) for plot in section.plots), "</div>"]
    if section.comparisons.rows:
        inner = f'{_table(section.comparisons)}\n<p class="note">{escape(READING)}</p>'
        parts.append(_details(section.comparisons_title, inner))
    if section.tuning.rows:
        parts.append(_details("Learning rates tried on validation", _table(section.tuning)))
    return "\n".join([*parts, "</section>"])


def _table(table: Table) -> str:
    """Numbers stand right, words left; a wide table scrolls within itself."""
    words = [any(_is_words(row[i]) for row in table.rows) or i == 0 for i in range(len(table.columns))]
    classes = [' class="text"' if is_words else "" for is_words in words]
    head = "".join(f"<th{c}>{escape(name)}</th>" for c, name in zip(classes, table.columns, strict=True))
    lines = [f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>']
    for row in table.rows:
        cells = "".join(f"<td{c}>{escape(cell)}</td>" for c, cell in zip(classes, row, strict=True))
        lines.append(f"<tr>{cells}</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def _is_words(cell: str) -> bool:
    return bool(cell) and not (cell[0].isdigit() or cell[0] in "+-")


def _commands(table: Table) -> str:
    names, commands = table.column("row"), table.column("command")
    items = [
        f"<dt>{escape(name)}</dt><dd><code>{escape(command)}</code></dd>"
        for name, command in zip(names, commands, strict=True)
        if command
    ]
    return _details("The command of each row", "\n".join(['<dl class="commands">', *items, "</dl>"])) if items else ""


def _details(summary: str, inner: str) -> str:
    return f"<details>\n<summary>{escape(summary)}</summary>\n{inner}\n</details>"


def _figure(plot: Plot) -> str:
    source = "data:image/png;base64," + base64.b64encode(plot.png).decode("ascii")
    caption = escape(plot.caption)
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
