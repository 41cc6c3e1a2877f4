"""Collected runs -> the report, that is what ``python compare_methods.py report`` writes.

The report is made only from the run files in the results, and from what the ``Repository`` adds for its own pages. The
same files give the same bytes. Each study gets ``table.md`` and plots. All studies together get ``summary.json``, with
each row in numbers, ``report.html``, and the tables between markers in pages. Plots of studies and ``report.html`` are
not committed.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

from finetuning.comparison.collected import Study, read_study, study_names
from finetuning.comparison.over_sets import DRAW, OVER_SETS, grid_of, headlines, over_sets
from finetuning.comparison.page import Plot, Section, render_page
from finetuning.comparison.pairs import (
    READING,
    Comparison,
    answers,
    compare_rows,
    method_of,
    pooled_sentences,
    worth_showing,
)
from finetuning.comparison.plots import FILES, draw_plots
from finetuning.comparison.rates import rates_table
from finetuning.comparison.repository import Repository
from finetuning.comparison.set_plots import SET_FILES, draw_set_plots
from finetuning.comparison.tables import (
    REPORTED,
    answer_table,
    comparison_table,
    main_table,
    notes,
    short_table,
    studies_table,
    tuning_table,
)
from finetuning.errors import UserError
from finetuning.pages import measured, page_with_tables
from finetuning.storage import write_bytes

ALL_STUDIES = "studies"  # the name of the table of all studies, in its markers
WIDTH = 150  # of a line of text on a page
SHORT = "_short"  # what the name of a study's short table ends with
ROWS = "_rows"  # and the one of its table without commands
SETS = "_sets"  # and the one of its tables over data sets


def write_report(repository: Repository) -> Path:
    """Makes the report, writes it and returns its HTML page; a refused input leaves every file as it was.

    Raises:
        UserError: a folder or file is missing or cannot be read.
    """
    results = repository.results
    if not results.is_dir():
        raise UserError(f"--results {results}: must be a folder with STUDY/runs.json")
    if not study_names(results):
        raise UserError(f"--results {results}: has no STUDY/runs.json: collect a study there first")
    for page in repository.pages:
        if not page.is_file():
            raise UserError(f"--pages {page}: must be a Markdown file")
    report = build_report(repository)
    for path, plot in report.plots.items():
        if plot is None:
            path.unlink(missing_ok=True)
        else:
            write_bytes(path, plot.png)
    for path, content in report.texts.items():
        write_bytes(path, content.encode())
    html = results / "report.html"
    write_bytes(html, render_page(report.sections).encode())
    return html


@dataclass(frozen=True)
class Report:
    """What is written; no plot is drawn yet."""

    texts: dict[Path, str]  # path -> content of tables and pages
    plots: dict[Path, Plot | None]  # path -> plot; ``None`` if there is no data for it any more, and it must be deleted
    sections: list[Section]  # of the HTML page


def build_report(repository: Repository) -> Report:
    """Everything of the report; writes nothing."""
    results = repository.results
    studies = [read_study(name, results) for name in study_names(results)]
    compared = {study.name: compare_rows(study) for study in studies}
    sections = [make_section(study, *compared[study.name]) for study in studies]
    texts: dict[Path, str] = {}
    plots = {results / name: plot for name, plot in repository.plots(studies).items()}
    tables: dict[str, str] = {}
    for study, section in zip(studies, sections, strict=True):
        folder = results / study.name
        plots |= dict.fromkeys(folder / name for name in (*FILES, *SET_FILES))
        plots |= {folder / plot.file: plot for plot in section.plots}
        texts[folder / "table.md"] = study_text(section)
        caption = measured(run.environment for run in study.final if run.finished)
        table, found = section.table.without_empty_columns(), " ".join([*section.headlines, *section.notes])
        tables[study.name] = "\n\n".join(filter(None, [table.markdown(), found, caption]))
        parts = [table.without("command").markdown(), *map(wrapped, section.notes), caption]
        tables[study.name + ROWS] = "\n\n".join(parts)
        tables[study.name + SETS] = f"{sets_text(section)}\n\n{caption}"
        tables[study.name + SHORT] = f"{short_table(study).without_empty_columns().markdown()}\n\n{caption}"
    rows = [json.dumps(record, allow_nan=False) for study in studies for record in study.records]
    texts[results / "summary.json"] = "[\n" + ",\n".join(rows) + "\n]\n"
    pairs = {name: comparisons for name, (comparisons, _) in compared.items()}
    links = {page: os.path.relpath(results, page.parent) for page in repository.pages}
    more = repository.tables(studies, pairs, set(links.values()))
    for page, link in links.items():
        tables[ALL_STUDIES] = studies_table(studies, link)
        texts[page] = page_with_tables(page, more.get(link, {}) | tables)
    return Report(texts, plots, sections)


def make_section(study: Study, comparisons: Sequence[Comparison], not_compared: Sequence[str]) -> Section:
    """What the report says about a study. The last two arguments are what ``compare_rows`` gives."""
    best, grid = answers(study, comparisons), grid_of(study)
    return Section(
        study=study.name,
        question=study.question,
        answers=answer_table(study, best),
        table=main_table(study),
        headlines=[*(answer.sentence for answer in best), *(headlines(grid) if grid else pooled_sentences(study))],
        notes=[*notes(study), *not_compared],
        comparisons=comparison_table(worth_showing(comparisons)),
        pairs=len(comparisons),
        f1_comparisons=comparison_table(compare_rows(study, "micro_f1")[0]),
        tuning=tuning_table(study),
        over_sets=[table for table in (*over_sets(grid), rates_table(grid)) if table.rows] if grid else [],
        part=part_done(study, on_sets=grid is not None),
        plots=[*draw_plots(study), *(draw_set_plots(grid) if grid else [])],
    )


def study_text(section: Section) -> str:
    """``table.md``: everything about a study."""
    table = section.table if any(section.table.column(REPORTED)) else section.table.without(REPORTED)
    parts = [f"# {section.study}", section.question, *section.headlines, table.markdown(), *section.notes]
    if section.comparisons.rows:
        parts += [f"## {section.comparisons_title}", section.comparisons.markdown(), READING]
    if section.f1_comparisons.rows:
        parts += ["## Micro F1 of multi-label data", section.f1_comparisons.markdown()]
    if section.over_sets:
        parts += ["## Over data sets", sets_text(section)]
    if section.tuning.rows:
        parts += ["## Settings tried on validation", section.tuning.markdown()]
    if section.plots:  # they are not committed
        parts.append("## Plots that `python compare_methods.py report` draws next to this file")
        parts.append("\n".join(f"- `{plot.file}`: {plot.caption}" for plot in section.plots))
    return "\n\n".join(part for part in parts if part) + "\n"


def sets_text(section: Section) -> str:
    """The tables over data sets, and how to read them."""
    tables = [table.markdown() for table in section.over_sets]
    parts = [wrapped(section.part), *tables, wrapped(OVER_SETS) if tables else ""]
    return "\n\n".join(part for part in parts if part)


def wrapped(text: str) -> str:
    """Lines of a Markdown page. Names of rows, which have hyphens, stay whole."""
    return fill(text, WIDTH, break_on_hyphens=False)


def part_done(study: Study, on_sets: bool = False) -> str:
    """How many of the planned final runs are there, with the trials that chose their settings, and which have failed.

    Empty if all are there and none has failed.

    Args:
        on_sets: whether its rows are named SET-METHOD. Then the methods that lack runs are named.
    """
    parts = []
    if study.missing:
        parts.append(f"{len(study.planned) - len(study.missing):,} of {len(study.planned):,} runs are there.")
        if study.tuning:  # each row has equally many
            trials = max(Counter(run.row for run in study.tuning).values()) * len(set(map(row_of, study.planned)))
            parts.append(f"Trials that chose their settings: {len(study.tuning):,} of {trials:,}.")
        if on_sets:
            rows = (dict.fromkeys(map(row_of, runs)) for runs in (study.planned, study.missing))
            planned, lacking = (Counter(method_of(study, row) for row in each) for each in rows)  # rows SET-METHOD
            shown = (f"{method} {count} of {planned[method]}" for method, count in lacking.items())
            parts.append(f"Data sets on which runs are missing: {', '.join(shown)}.")
    if failed := [run.name for run in study.final if not run.finished]:
        parts.append(f"Failed, so in no mean: {', '.join(failed)}.")
    return " ".join(parts)


def row_of(run: str) -> str:
    """The row of a final run, by its name; draws of the training texts are of one row."""
    return DRAW.sub("", re.sub(r"-seed\d+$", "", run))
