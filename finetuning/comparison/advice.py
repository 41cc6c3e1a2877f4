"""Small tables inside a page of advice: the writer names rows of studies in a marker, the report fills in numbers.

    <!-- rows: methods/lora full | best/lora lora-epochs3; learning rate, saved -->
    <!-- end -->

becomes a table of these four rows, in this order, with two extra columns (``COLUMNS`` lists all). A row without a study
belongs to the study named before it. The last column compares each row with a reference, which is the first row of its
study; after a ``|`` the next reference begins. ``<!-- studies -->`` becomes a table of all studies. A marker may take
several lines.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from finetuning.comparison.collected import Row, Study
from finetuning.comparison.pairs import Comparison, compare_rows
from finetuning.comparison.tables import GIB, record
from finetuning.errors import UserError, listed
from finetuning.pages import Table

BEGIN = re.compile(r"<!--\s*(rows|studies)\b:?(.*?)-->", flags=re.DOTALL)
END = "<!-- end -->"
SAVED = ("adapter_model.safetensors", "trained_weights.safetensors")  # what a run keeps of its training
REFERENCE = "(reference)"
Cell = Callable[[dict[str, Any], Row], str]  # from a row's record, with that of its reference as "reference"
SMALLEST_P = 0.001  # below it, digits would only distract


def with_rows(text: str, studies: Sequence[Study], link: str) -> str:
    """``text`` with the tables between its markers made anew; unchanged if it has none.

    Args:
        text: a Markdown page.
        studies: all collected studies.
        link: the way from the page to the results folder, for links to each study's full table.

    Raises:
        UserError: a marker without its end, or one that names a study, row or column that does not exist.
    """
    tables, parts, position = Tables(studies, link), [], 0
    for marker in BEGIN.finditer(text):
        before, after = text[position : marker.start()], text[marker.end() :]
        table_end = after.find(END)
        following = BEGIN.search(after)
        if END in before or table_end < 0 or (following and following.start() < table_end):
            raise UserError(f"--pages: {_one_line(marker[0])} needs {END} after its table, and no other marker between")
        table = tables.of_studies() if marker[1] == "studies" else tables.of_rows(marker[2])
        parts += [before, marker[0], "\n", table.markdown(), "\n", END]
        position = marker.end() + table_end + len(END)
    if END in text[position:]:
        raise UserError(f"--pages: {END} has no <!-- rows: ... --> or <!-- studies --> before it")
    return "".join([*parts, text[position:]])


def _one_line(text: str) -> str:
    return " ".join(text.split())


class Tables:
    """The tables of a page; pairs of rows are compared once for each study, and only if a table needs it."""

    def __init__(self, studies: Sequence[Study], link: str) -> None:
        self.studies = {study.name: study for study in studies}
        self.link = link
        self._compared: dict[str, dict[frozenset[str], Comparison]] = {}

    def of_rows(self, spec: str) -> Table:
        """The rows that ``study/row row | study/row; column, column`` names."""
        names, _, extra = spec.partition(";")
        columns = [_one_line(name) for name in extra.split(",") if name.strip()]
        for column in columns:
            if column not in COLUMNS:
                raise UserError(f"--pages: no column {column!r} for a table of rows: there are {', '.join(COLUMNS)}")
        groups = self._groups(names)
        shown = ["test accuracy, %", *columns, "seeds", "training, s", "peak memory, GiB"]
        cells = []
        for group in groups:
            for study, row in group:
                same_study = [other for s, other in group if s is study]
                values = record(study, row) | {"reference": record(study, same_study[0])}
                made = (CELLS[column](values, row) for column in shown)
                cells.append((self._link(study), row.name, *made, self._p(study, row, same_study)))
        titles = [TITLES.get(column, column) for column in shown]
        return Table(("study", "row", *titles, "corrected p"), cells).without_empty_columns()

    def of_studies(self) -> Table:
        """Each study: the size of its data, its rows and its runs."""
        columns = ("training texts", "validation texts", "test texts", "tokens", "epochs", "rows", "seeds a row")
        cells = []
        for study in self.studies.values():
            runs = [run for run in study.final if run.finished]
            sizes = [_values(run.get("data", "sizes", split) for run in runs) for split in ("train", "validation")]
            limits = [_values(run.get("config", key) for run in runs) for key in ("max_length", "epochs")]
            seeds = _values(len(row.tested) or None for row in study.rows)
            tests = _values(run.get("test", "examples") for run in runs)
            cells.append((self._link(study), *sizes, tests, *limits, str(len(study.rows)), seeds))
        return Table(("study", *columns), cells)

    def _groups(self, names: str) -> list[list[tuple[Study, Row]]]:
        groups, study_name = [], ""
        for group in names.split("|"):
            found = []
            for name in group.split():
                before, slash, row_name = name.rpartition("/")
                study_name = before if slash else study_name
                found.append(self._row(study_name, row_name))
            if not found:
                raise UserError("--pages: a table without a row: write <!-- rows: STUDY/ROW ROW | STUDY/ROW ROW -->")
            groups.append(found)
        return groups

    def _row(self, study_name: str, row_name: str) -> tuple[Study, Row]:
        study = self.studies.get(study_name)
        if study is None:
            raise UserError(f"--pages: no study {study_name!r} (row {row_name!r}): there are {listed(self.studies)}")
        rows = {row.name: row for row in study.rows}
        if row_name not in rows:
            raise UserError(f"--pages: no row {row_name!r} in study {study_name}: there are {listed(rows)}")
        return study, rows[row_name]

    def _link(self, study: Study) -> str:
        return f"[{study.name}]({self.link}/{study.name}/table.md)"

    def _p(self, study: Study, row: Row, group: Sequence[Row]) -> str:
        """The corrected p of ``row`` and the first row of its study in a group; empty if the two were not compared."""
        if len(group) == 1:
            return ""
        if study.name not in self._compared:
            self._compared[study.name] = {frozenset((c.first, c.second)): c for c in compare_rows(study)[0]}
        compared = self._compared[study.name]
        found = [compared.get(frozenset((group[0].name, other.name))) for other in group]
        if row is group[0]:
            return REFERENCE if any(found) else ""
        own = found[group.index(row)]
        return "" if own is None else shown_p(own.corrected_p)


def shown_p(p: float) -> str:
    """A p value to two digits; one that is far below every level as a bound."""
    return f"< {SMALLEST_P:g}" if p < SMALLEST_P else f"{p:.2g}"


def _values(values: Iterable[Any]) -> str:
    """Different values in rising order: ``3,869; 5,000``."""
    return "; ".join(f"{value:,}" for value in sorted({value for value in values if value is not None}))


def _shown(value: float | None, form: str, factor: float = 1) -> str:
    return "" if value is None else form.format(factor * value)


def _accuracy(r: dict[str, Any], _: Row) -> str:
    if r["accuracy_mean"] is None:
        return "" if r["status"] == "finished" else r["status"]
    mean, deviation, low, high = (
        _shown(r[key], "{:.2f}", 100)
        for key in ("accuracy_mean", "accuracy_std", "accuracy_ci95_low", "accuracy_ci95_high")
    )
    return f"{mean} ± {deviation}" if deviation else f"{mean} ({low} to {high})" if low else mean


def _difference(key: str, form: str, factor: float) -> Cell:
    """What a row has more of than its reference; empty for the reference itself, and if one of the two is unknown."""

    def cell(r: dict[str, Any], _: Row) -> str:
        value, of_reference = r[key], r["reference"][key]
        if r["row"] == r["reference"]["row"] or value is None or of_reference is None:
            return ""
        return f"{factor * (value - of_reference):+{form}}"

    return cell


def _saved(_: dict[str, Any], row: Row) -> str:
    bytes_ = next((size for name in SAVED if (size := row.common("files", name)) is not None), None)
    return _shown(bytes_, "{:.1f}", 1e-6)


COLUMNS: dict[str, Cell] = {  # that a marker may ask for
    "GiB": _difference("peak_memory_bytes", ".2f", 1 / GIB),
    "learning rate": lambda _, row: _shown(row.common("config", "learning_rate"), "{:g}"),
    "macro F1": lambda r, _: _shown(r["macro_f1_mean"], "{:.2f}", 100),
    "points": _difference("accuracy_mean", ".2f", 100),
    "saved": _saved,
    "trained": lambda r, _: _shown(r["trainable"], "{:,}"),
    "validation": lambda r, _: _shown(r["validation_accuracy_mean"], "{:.2f}", 100),
}
CELLS: dict[str, Cell] = COLUMNS | {
    "test accuracy, %": _accuracy,
    "seeds": lambda r, _: _shown(r["seeds"] or None, "{}"),
    "training, s": lambda r, _: _shown(r["train_seconds"], "{:,.0f}"),
    "peak memory, GiB": lambda r, _: _shown(r["peak_memory_bytes"], "{:.2f}", 1 / GIB),
}
TITLES = {
    "GiB": "difference, GiB", "macro F1": "macro F1, %", "points": "difference, points", "saved": "saved, MB",
    "trained": "trained parameters", "validation": "validation accuracy, %",
}  # fmt: skip
