"""The scores of a run as tables of text: the report and the model card show them."""

from collections.abc import Sequence
from typing import Any

from finetuning.pages import Table
from finetuning.runs.answers import Answers
from finetuning.runs.records import PLAIN_SCORES, score_names
from finetuning.runs.scores import Interval, class_scores, score_intervals


def percent(value: float, interval: Interval | None = None) -> str:
    """``0.966 -> 96.60 %``, with the interval in brackets."""
    return f"{100 * value:.2f} %" + (f" ({100 * interval[0]:.2f} to {100 * interval[1]:.2f})" if interval else "")


def number(value: float, interval: Interval | None = None) -> str:
    """A number with four digits, with the interval in brackets."""
    return f"{value:.4f}" + (f" ({interval[0]:.4f} to {interval[1]:.4f})" if interval else "")


def score_table(result: dict[str, Any], answers: dict[str, Answers]) -> Table:
    """The scores of each split with their 95 % intervals, and next to them the baseline's."""
    splits = [split for split in ("test", "validation") if split in result and split in answers]
    intervals = {split: score_intervals(answers[split]) for split in splits}
    baseline = result.get("baseline", {})
    others = {f"{split}, {baseline['name']}": baseline[split] for split in splits if split in baseline}
    if "kfold" in result and "validation" in splits and "validation" in baseline:
        # the baseline's scores are means of the folds, so those of the run stand next to them
        means = (result["kfold"]["same_epoch"] or result["kfold"])["mean"]
        others = {"validation, mean of the folds": means | {"examples": len(answers["validation"].rows)}} | others
    multi_label = any(part.rule.multi_label for part in answers.values())
    rows = []
    for key, name in score_names(multi_label).items():
        shown = number if key in PLAIN_SCORES else percent
        cells = [shown(result[s][key], intervals[s].get(key)) if key in result[s] else "" for s in splits]
        if any(cells):
            rows.append((name, *cells, *(shown(scores[key]) if key in scores else "" for scores in others.values())))
    sizes = [len(answers[split].rows) for split in splits] + [scores["examples"] for scores in others.values()]
    rows.append(("texts", *(f"{size:,}" for size in sizes)))
    return Table(("score", *splits, *others), rows)


def class_table(answers: Answers, names: Sequence[str]) -> Table:
    """Precision, recall and F1 of each class."""
    return Table(
        ("class", "texts", "precision, %", "recall, %", "F1, % (95 % interval)"),
        [
            (
                name, f"{c.texts:,}", f"{100 * c.precision:.2f}", f"{100 * c.recall:.2f}",
                percent(c.f1, c.f1_interval).replace(" %", ""),
            )
            for name, c in zip(names, class_scores(answers), strict=True)
        ],
    )  # fmt: skip
