"""The tables of the study of rare classes in docs/data_sets.md: what flags for classes of unequal size change."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from finetuning.comparison.collected import Run, Study
from finetuning.comparison.over_sets import accuracy_on_test, compare_pair, grid_of, sets_tables
from finetuning.comparison.unequal import rarest
from finetuning.pages import Table, dated

STUDY = "rare_classes"
NAME = "rare_classes_scores"  # of the tables on a page
DEFAULT = "default"  # the row that has none of the flags
COLUMNS = ("row", "score", "data sets", "mean difference, points (95 %)", "better, %", "equivalent, %", "worse, %")


def macro_f1(run: Run) -> float | None:
    """Of a tested run, 0 to 1."""
    value: float | None = run.get("test", "macro_f1")
    return value


def of_rarest(name: str) -> Callable[[Run], float | None]:
    """The score of this name, of the class that is rarest on test."""

    def score(run: Run) -> float | None:
        value: float | None = run.get("test", "per_class", rarest(run), name)
        return value

    return score


SCORES = {
    "macro F1": macro_f1,
    "accuracy": accuracy_on_test,
    "recall of the rarest class": of_rarest("recall"),
    "precision of the rarest class": of_rarest("precision"),
}


def rare_classes_tables(studies: Mapping[str, Study]) -> str:
    """Macro F1 by set, and each row against the default by each score of ``SCORES``: Markdown; empty without runs."""
    grid = grid_of(studies[STUDY]) if STUDY in studies else None
    if grid is None:
        return ""
    by_set = "\n\n".join(table.markdown() for table in sets_tables(replace(grid, score=macro_f1)))
    rows = []
    for method in grid.methods:
        for name, score in SCORES.items():
            pair = compare_pair(replace(grid, score=score), method, DEFAULT) if method != DEFAULT else None
            if pair is not None:
                chances = (f"{100 * chance:.0f}" for chance in pair.chances.values())
                rows.append((method, name, str(len(pair.grid.runs)), pair.difference, *chances))
    return f"{by_set}\n\n{dated(Table(COLUMNS, rows), grid.environments())}"
