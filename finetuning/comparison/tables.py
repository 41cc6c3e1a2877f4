"""A study's rows -> tables as Markdown."""

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

from finetuning.comparison.collected import Study
from finetuning.comparison.drawn import RATE, shown_settings
from finetuning.comparison.pairs import Answer, Comparison
from finetuning.comparison.statistics import p_text
from finetuning.comparison.unequal import has_rare_class
from finetuning.errors import listed
from finetuning.pages import Table, dated
from finetuning.runs.records import PLAIN_SCORES, SCORES, accuracy_interval

GIB = 2**30
REPORTED, ACCURACY, SECONDS, PROCESSOR, MEMORY = (
    "reported by others, %",
    "test accuracy, %",
    "training time, s",
    "training, processor s",  # of runs that share a machine too
    "peak memory, GiB",
)
MOST_VALUES = 4  # in a cell of the table of studies
NAMED_IN_ANSWER = 4  # largest number of names in the table of answers
# what decides which texts validate
OF_VALIDATION = ("dataset", "data_dir", "agreement", "split", "group_column", "limit_validation")
NAMED = 12  # largest number of names in a note
FEW_TEST_TEXTS = 300  # with fewer, seeds that agree look more certain than they are


def main_table(study: Study) -> Table:
    """The rows of a study. What was not measured stays empty; a row without a finished run shows its status."""
    records = study.records
    f1_counts = any(run.monitor in ("macro_f1", "mcc") or has_rare_class(run) for run in study.final)
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "row": lambda r: r["row"],
        REPORTED: lambda r: shown(r["reported_percent"], "{:.2f}"),
        _accuracy_title(records): accuracy_cell,
        "macro F1, %": lambda r: percent(r["macro_f1_mean"]) if f1_counts else "",
        "seeds": _seeds_cell,
        "test texts": lambda r: shown(r["test_examples"], "{:,}"),
        "validation accuracy, %": lambda r: percent(r["validation_accuracy_mean"]),
        "trainable parameters": lambda r: shown(r["trainable"], "{:,}"),
        SECONDS: lambda r: shown(r["train_seconds"], "{:,.0f}"),
        PROCESSOR: lambda r: shown(r["processor_seconds"], "{:,.0f}"),
        MEMORY: memory_cell,
        "command": lambda r: r["command"] or "",
    }
    return Table(tuple(columns), [tuple(cell(r) for cell in columns.values()) for r in records])


def _accuracy_title(records: Sequence[dict[str, Any]]) -> str:
    parts = []
    if any(r["accuracy_ci95_low"] is not None for r in records):
        parts.append("95 % interval")
    if any(r["accuracy_std"] is not None for r in records):
        parts.append("± SD")
    return ACCURACY + (f" ({', or '.join(parts)})" if parts else "")


def accuracy_cell(r: dict[str, Any]) -> str:
    """The test accuracy of a record in percent, with its deviation or interval; or why there is none."""
    if r["accuracy_mean"] is None:
        return "" if r["status"] == "finished" else r["status"]
    cell = percent(r["accuracy_mean"])
    if r["accuracy_std"] is not None:
        return f"{cell} ± {percent(r['accuracy_std'])}"
    if r["accuracy_ci95_low"] is not None:
        return f"{cell} ({percent(r['accuracy_ci95_low'])} to {percent(r['accuracy_ci95_high'])})"
    return cell


def _seeds_cell(r: dict[str, Any]) -> str:
    if not r["seeds"]:
        return ""
    others = r["status"].split(", ", 1)[1:]  # besides the finished ones
    return str(r["seeds"]) + (f" ({others[0]})" if others else "")


def memory_cell(r: dict[str, Any]) -> str:
    """The peak memory of a record in GiB."""
    return shown(r["peak_memory_bytes"] and r["peak_memory_bytes"] / GIB, "{:.2f}")


def shown(value: float | None, form: str) -> str:
    """A number in this form; empty if it was not measured."""
    return "" if value is None else form.format(value)


def percent(value: float | None) -> str:
    """A fraction in percent; empty if it was not measured."""
    return shown(None if value is None else 100 * value, "{:.2f}")


def short_table(study: Study) -> Table:
    """The rows of a study without commands, costs and details, for a page that only gives an overview."""
    return Table(
        ("row", REPORTED, ACCURACY, "trainable parameters"),
        [
            (
                r["row"], shown(r["reported_percent"], "{:.2f}"), percent(r["accuracy_mean"]),
                shown(r["trainable"], "{:,}"),
            )
            for r in study.records
        ],
    )  # fmt: skip


def studies_table(studies: Sequence[Study], link: str) -> str:
    """Each study: the size of its data, its rows that did more than tune, and their runs."""
    columns = ("training texts", "validation texts", "test texts", "tokens", "epochs", "rows", "seeds a row")
    cells, environments = [], []
    for study in studies:
        runs = [run for run in study.final if run.finished]
        sizes = [_values(run.get("data", "sizes", split) for run in runs) for split in ("train", "validation")]
        limits = [_values(run.get("config", key) for run in runs) for key in ("max_length", "epochs")]
        seeds = _values(len(row.tested) or None for row in study.rows)
        tests = _values(run.get("test", "examples") for run in runs)
        cells.append(
            (study_link(study, link), *sizes, tests, *limits, str(sum(bool(row.runs) for row in study.rows)), seeds)
        )
        environments += [run.environment for run in runs]
    return dated(Table(("study", *columns), cells), environments)


def study_link(study: Study, link: str) -> str:
    """A study's name as a link to its full table; ``link`` is the way from the page to the results folder."""
    return f"[{study.name}]({link}/{study.name}/table.md)"


def _values(values: Iterable[Any]) -> str:
    """Different values in rising order: ``3,869; 5,000``; of more than four, the ends: ``483 to 2,000``."""
    found = [f"{value:,}" for value in sorted({value for value in values if value is not None})]
    return f"{found[0]} to {found[-1]}" if len(found) > MOST_VALUES else "; ".join(found)


def answer_table(study: Study, answers: Sequence[Answer]) -> Table:
    """What the study found: its best row (one for each group with the same test texts), the cost, how sure it is."""
    records = {r["row"]: r for r in study.records}
    certainties = {
        answer.best: answer.certainty(most=NAMED_IN_ANSWER) + ("; other rows not compared" if answer.uncompared else "")
        for answer in answers
    }
    if not certainties:  # no two rows can be compared
        tested = [name for name, r in records.items() if r["accuracy_mean"] is not None]
        certainties = dict.fromkeys(tested[:1], "not compared")
    return Table(
        ("best row", ACCURACY, SECONDS, MEMORY, "how sure"),
        [
            (
                name,
                percent(records[name]["accuracy_mean"]),
                shown(records[name]["train_seconds"], "{:,.0f}"),
                memory_cell(records[name]),
                certainty,
            )
            for name, certainty in certainties.items()
        ],
    )


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """A row for each pair: its difference in percentage points, the p value, and what follows from it."""
    return Table(
        ("row", "other row", "difference, points (95 % interval)", "p", "corrected p", "test", "verdict"),
        [
            (
                c.first, c.second,
                c.difference.cell,
                p_text(c.difference.p), p_text(c.corrected_p), c.test, c.verdict,
            )
            for c in comparisons
        ],
    )  # fmt: skip


def tuning_table(study: Study) -> Table:
    """For each row the settings that were tried, and those of its final runs; a number alone is a learning rate."""
    rows = []
    for name in sorted({run.row for run in study.tuning}):
        trials = sorted((run for run in study.tuning if run.row == name), key=lambda run: run.axes.get(RATE, 0.0))
        in_words = "{:.4f}".format if trials[0].monitor in PLAIN_SCORES else percent
        tried = [
            f"{shown_settings(run.axes)}: {'no score' if run.monitored is None else in_words(run.monitored)}"
            for run in trials
        ]
        finals = next((row for row in study.rows if row.name == name), None)
        taken = {} if finals is None else {flag: finals.common("config", flag) for flag in trials[0].axes}
        chosen = "" if None in taken.values() else shown_settings(taken)
        rows.append((name, trials[0].monitor, "; ".join(tried), chosen))
    return Table(
        ("row", "metric", "metric on validation (%; loss, MCC: number), by what was tried", "the final runs have"), rows
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:NAMED], *(["and others"] if len(names) > NAMED else [])])


def notes(study: Study) -> list[str]:
    """What a reader of the main table must know, one sentence or two each."""
    found = []
    if study.missing:
        found.append(f"Not run yet ({len(study.missing)} of {len(study.planned)}): {_some(study.missing)}.")
    if study.unplanned:
        found.append(f"Compared here, but no longer in the study's file: {_some(study.unplanned)}.")
    if study.cost_obstacles:
        left_out, finished = sum(study.cost_obstacles.values()), sum(run.finished for run in study.final)
        reasons = "; ".join(f"{reason} ({count})" for reason, count in study.cost_obstacles.items())
        found.append(f"Time and memory exclude {left_out} of {finished} runs: {reasons}.")
    precisions = {row.name: {run.get("base_model", "precision") for run in row.finished} - {None} for row in study.rows}
    if mixed := [name for name, own in precisions.items() if len(own) > 1]:
        found.append(f"Rows whose runs differ in precision, as `auto` does between machines: {listed(mixed, NAMED)}.")
    found += _best_on_validation(study)
    tested = [run.get("test", "examples") for row in study.rows for run in row.tested]
    if tested and min(tested) < FEW_TEST_TEXTS:
        low, high = accuracy_interval(0.85, min(tested))
        found.append(
            f"{min(tested)} test texts are few: an accuracy of 85 % is uncertain by {50 * (high - low):.0f} points"
            " (95 %), also where all seeds agree."
        )
    if any(len(row.tested) > 1 for row in study.rows):
        found.append(
            "If a row has several seeds, its command is for the first one; the others differ only in `--seed`."
        )
    for name, extreme in (("largest", max), ("smallest", min)):
        at_the_edge = [f"{row} ({rate:g})" for row, rate, tried in _tuned_rates(study) if rate == extreme(tried)]
        if at_the_edge:
            found.append(
                f"The learning-rate grid was too narrow: tuning chose its {name} value for {', '.join(at_the_edge)}."
            )
    return found


def _best_on_validation(study: Study) -> list[str]:
    """The row to choose without reading the test, for each data set; none if two rows are equal.

    It is best by the metric that chose the checkpoints, which must be the same for all rows of the data set. Draws of
    the training texts have validation texts of their own, so of several draws none is named.
    """
    found: list[str] = []
    if len({run.get("config", "data_seed") for run in study.final}) > 1:
        return found
    finished = [row for row in study.rows if row.accuracies("validation")]
    texts = [tuple(row.common("config", name) for name in OF_VALIDATION) for row in finished]
    for same in dict.fromkeys(texts):
        rows = [row for row, own in zip(finished, texts, strict=True) if own == same]
        metrics = {run.monitor for row in rows for run in row.finished}
        metric = next(iter(metrics), "")
        values = {row.name: [run.monitored for run in row.finished if run.monitored is not None] for row in rows}
        if len(metrics) != 1 or not all(values.values()):
            continue
        scores = {name: fmean(own) for name, own in values.items()}
        highest = (min if metric == "loss" else max)(scores.values())
        best = [name for name, score in scores.items() if score == highest]
        if len(best) == 1 < len(scores):
            shown = f"{highest:.4f}" if metric in PLAIN_SCORES else f"{percent(highest)} %"
            named = "" if metric == "accuracy" else f"{SCORES[metric]}: "
            found.append(f"Best on validation: {best[0]} ({named}{shown}).")
    return found


def _tuned_rates(study: Study) -> list[tuple[str, float, set[float]]]:
    """For each row with more than one tried rate: its name, the rate of its final runs, and all tried rates."""
    tried: dict[str, set[float]] = {}
    for run in study.rate_trials:
        tried.setdefault(run.row, set()).add(run.axes[RATE])
    taken = [(row.name, row.common("config", RATE)) for row in study.rows]
    return [(name, rate, tried[name]) for name, rate in taken if rate and len(tried.get(name, ())) > 1]
