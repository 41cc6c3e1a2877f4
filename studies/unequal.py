"""The table of unequal classes in docs/best_practices.md: what the default command gives on the rarest class."""

from collections.abc import Mapping
from statistics import fmean

from finetuning.comparison.collected import Run, Study
from finetuning.comparison.over_sets import grid_of, score_cell
from finetuning.comparison.unequal import has_rare_class, rarest, rarest_share
from finetuning.pages import Table, dated

NAME = "unequal_classes"  # of the table on a page
STUDY, METHOD = "placement", "all"  # the runs of the default command
COLUMNS = (
    "data set", "classes", "rarest class, % of test", "its test texts", "accuracy, %", "macro F1, %",
    "macro F1 of TF-IDF, %", "F1 of the rarest class, %",
)  # fmt: skip


def unequal_table(studies: Mapping[str, Study]) -> str:
    """A row for each set with a rare class, rarest first: Markdown."""
    grid = grid_of(studies[STUDY]) if STUDY in studies else None
    rows, environments = [], []
    for name, found in grid.runs.items() if grid else ():
        runs = [run for run in found.get(METHOD, []) if run.get("test", "per_class")]
        if runs and has_rare_class(runs[0]):
            rows.append((rarest_share(runs[0]), (name, *_cells(runs))))
            environments += [run.environment for run in runs]
    return dated(Table(COLUMNS, [row for _, row in sorted(rows)]), environments)


def _cells(runs: list[Run]) -> tuple[str, ...]:
    """A row without its first cell; the runs differ in their seed alone."""
    first = runs[0]
    baselines = [run.get("baseline", "test", "macro_f1") for run in runs]
    return (
        str(len(first.get("test", "per_class"))),
        f"{100 * rarest_share(first):.2f}",
        f"{first.get('test', 'per_class', rarest(first), 'support'):,}",
        score_cell([100 * (run.accuracy("test") or 0.0) for run in runs]),
        score_cell([100 * run.get("test", "macro_f1") for run in runs]),
        "" if None in baselines else f"{100 * fmean(baselines):.1f}",
        score_cell([100 * run.get("test", "per_class", rarest(run), "f1") for run in runs]),
    )
