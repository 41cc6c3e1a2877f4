"""Collected runs -> the report: ``python study_report.py``, see ``--help``.

From the run files in ``results/`` alone, the same ones giving the same bytes: for each study ``table.md``,
``table.csv`` and plots; for all of them ``summary.json`` and ``report.html``; and the tables between
the markers of README.md and docs/best_practices.md.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from finetuning.comparison.advice import with_rows
from finetuning.comparison.collected import Study, read_study, studies
from finetuning.comparison.page import Section, page
from finetuning.comparison.pairs import READING, compare_rows, headlines, worth_showing
from finetuning.comparison.plots import FILES, plots
from finetuning.comparison.tables import comparison_table, csv_text, main_table, notes, summary, tuning_table
from finetuning.config import DEFAULT_LEARNING_RATES
from finetuning.errors import UserError
from finetuning.flags import OneLineParser
from finetuning.storage import write_atomically

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
BEST_PRACTICES = ROOT / "docs" / "best_practices.md"
PAGES = (README, BEST_PRACTICES)
RESULTS = ROOT / "results"
DEFAULT_RATES = "default_learning_rates"


def learning_rates() -> str:
    """The suite's default peak learning rates as a Markdown table."""
    methods, optimizers = (list(dict.fromkeys(key[i] for key in DEFAULT_LEARNING_RATES)) for i in range(2))
    lines = ["| | " + " | ".join(f"`{name}`" for name in optimizers) + " |", "|---|" + "---|" * len(optimizers)]
    for method in methods:
        rates = [f"{DEFAULT_LEARNING_RATES[method, name]:g}" for name in optimizers]
        lines.append(f"| `{method}` | " + " | ".join(rates) + " |")
    return "\n".join(lines)


def with_table(text: str, study: str, content: str) -> str:
    """``text`` with what stands between the study's markers replaced; unchanged where it has none.

    Raises:
        UserError: a marker without the other.
    """
    begin, end = f"<!-- {study}:begin -->", f"<!-- {study}:end -->"
    if begin not in text and end not in text:
        return text
    before, _, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not closed:
        raise UserError(f"--pages: the markers of a table must come as {begin} ... {end}")
    return f"{before}{begin}\n{content}\n{end}{after}"


def section(study: Study) -> Section:
    """All that the report says of a study."""
    comparisons, not_compared = compare_rows(study)
    return Section(
        study=study.name,
        question=study.question,
        table=main_table(study),
        headlines=headlines(comparisons),
        notes=[*notes(study), *not_compared],
        comparisons=comparison_table(worth_showing(comparisons)),
        pairs=len(comparisons),
        tuning=tuning_table(study),
        plots=plots(study),
    )


def short_table(section: Section) -> str:
    """The study as a page of Markdown shows it: no empty columns, what was found, what is missing."""
    text = " ".join([*section.headlines, *section.notes])
    return section.table.without_empty_columns().markdown() + (f"\n\n{text}" if text else "")


def study_text(section: Section) -> str:
    """``table.md``: everything about a study."""
    parts = [f"# {section.study}", section.question, section.table.markdown(), *section.headlines, *section.notes]
    if section.comparisons.rows:
        parts += [f"## {section.comparisons_title}", section.comparisons.markdown(), READING]
    if section.tuning.rows:
        parts += ["## Learning rates tried on validation", section.tuning.markdown()]
    parts += [f"![{plot.caption}]({plot.file})" for plot in section.plots]
    return "\n\n".join(part for part in parts if part) + "\n"


def build(results: Path, pages: Sequence[Path]) -> dict[Path, bytes | None]:
    """The report, before anything is written.

    Args:
        results: holds a folder a study.
        pages: Markdown with markers.

    Returns:
        Contents of every file below ``results``, ``None`` for a plot that must go; and of the pages.
    """
    found = [read_study(name, results) for name in studies(results)]
    sections = [section(study) for study in found]
    files: dict[Path, bytes | None] = {}
    for study, said in zip(found, sections, strict=True):
        folder = results / study.name
        files |= dict.fromkeys(folder / name for name in FILES)  # a plot goes when its data has gone
        files |= {folder / plot.file: plot.png for plot in said.plots}
        files[folder / "table.md"] = study_text(said).encode()
        files[folder / "table.csv"] = csv_text(study).encode()
    rows = [row for study in found for row in summary(study)]
    files[results / "summary.json"] = (json.dumps(rows, indent=2, allow_nan=False) + "\n").encode()
    files[results / "report.html"] = page(sections).encode()
    tables = {said.study: short_table(said) for said in sections} | {DEFAULT_RATES: learning_rates()}
    for path in pages:
        text = path.read_text(encoding="utf8")
        for name, table in tables.items():
            text = with_table(text, name, table)
        text = with_rows(text, found, os.path.relpath(results, path.parent))
        files[path] = text.encode()
    return files


def make_parser(program: str | None = None) -> argparse.ArgumentParser:
    """The parser of the command; ``program`` is its name where it is not this file's."""
    parser = OneLineParser(
        program, description="Rebuild tables, plots and the HTML page from collected runs.", allow_abbrev=False
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="PATH",
        help="holds the runs as STUDY/RUN/result.json, and takes tables and plots (default: results/ of the suite)",
    )  # fmt: skip
    parser.add_argument(
        "--pages", type=Path, nargs="*", metavar="FILE",
        help="Markdown in which what stands between <!-- STUDY:begin --> and <!-- STUDY:end --> is renewed"
        " (default: README.md and docs/best_practices.md; with other --results: none)",
    )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None, program: str | None = None) -> int:
    """The command. Returns the exit status: 0, or 2 where a flag or a file is refused."""
    try:
        options = make_parser(program).parse_args(argv)
        pages = options.pages
        if pages is None:
            pages = PAGES if options.results.resolve() == RESULTS else ()
        if not options.results.is_dir():
            raise UserError(f"--results {options.results} is not a folder: give one that holds STUDY/RUN/result.json")
        for path in pages:
            if not path.is_file():
                raise UserError(f"--pages {path} is not a file: give Markdown files with markers")
        for path, content in build(options.results, pages).items():
            if content is None:
                path.unlink(missing_ok=True)
            else:
                write_atomically(path, partial(_write, content))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.results / "report.html")
    return 0


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)


if __name__ == "__main__":
    sys.exit(main())
