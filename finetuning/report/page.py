"""``report.html`` of a finished run, from its run directory and its held-out texts. Nothing here imports torch."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.errors import counted, first_line, say
from finetuning.html import data_url, render
from finetuning.processes import is_helper
from finetuning.report import sections
from finetuning.report.coverage import coverage_curve, risk_table
from finetuning.report.texts import SUSPECTS, Texts, confident_mistakes, maybe_wrong
from finetuning.runs.abstention import LEVEL, checkpoints_compared
from finetuning.runs.answers import Answers, Rule, read_answers
from finetuning.runs.calibration import fit_temperature, reliability
from finetuning.runs.files import CURVE, REPORT
from finetuning.runs.records import accuracy_interval
from finetuning.runs.score_tables import class_table, percent, score_table
from finetuning.runs.scores import shows_learning
from finetuning.settings import RunSettings
from finetuning.storage import write_text

if TYPE_CHECKING:
    from finetuning.data.texts import LabelledTexts

TEMPLATE = Path(__file__).parent / "report.html.j2"


def present(
    directory: Path, result: dict[str, Any], settings: RunSettings, splits: "Mapping[str, LabelledTexts]"
) -> None:
    """Writes the report of a finished run, if it is asked for, in the first process. If that fails, it only warns."""
    if is_helper() or not settings.report or result["status"] != "finished":
        return
    held_out = {name: split.by_row() for name, split in splits.items() if name != "train"}
    path = directory / REPORT
    try:
        write_text(path, make_report(directory, result, held_out if settings.report_texts else None))
        say(f"{'report':<11} {path}")
    except (Exception, KeyboardInterrupt) as error:
        say(f"warning: {REPORT} was not written: {first_line(error, name_file=True)}", sys.stderr)


def make_report(directory: Path, result: dict[str, Any], texts: Texts | None) -> str:
    """The text of ``report.html``.

    Args:
        directory: the run directory, with its predictions and learning curve.
        texts: of the held-out splits; ``None`` keeps them out of the report.

    Raises:
        OSError, ValueError: a file of the run cannot be read.
    """
    names = result["data"]["label_names"]
    answers = read_answers(directory, Rule.of_task(result["task"], names))
    split = _main_split(answers, "kfold" in result)
    main, validation = answers[split], answers["validation"]
    temperature = fit_temperature(validation)
    learned = main.rule.multi_label or shows_learning(validation, result.get("kfold"))
    wrong = maybe_wrong(answers, names, texts) if learned and not main.rule.multi_label else []
    longest = result["config"]["max_length"] * result["config"]["windows"]
    return render(
        TEMPLATE,
        name=directory.resolve().name,
        result=result,
        split=split,
        names=names,
        headline=_headline(split, main, result.get("kfold"), bool(result["task"].get("threshold_tuned"))),
        scores=score_table(result, answers),
        curve=data_url((directory / CURVE).read_bytes()) if (directory / CURVE).exists() else None,
        classes=class_table(main, names),
        confusion=sections.confusion_cells(main),
        confusions=sections.confusion_table(main, names),
        calibration=_calibration(main, temperature),
        abstention=_abstention(validation, main, split, temperature or 1.0, result),
        lengths=sections.length_table(main, longest),
        cut=_cut(main, longest),
        with_texts=texts is not None,
        mistakes=confident_mistakes(split, main, names, texts),
        wrong_count=int((~main.right).sum()),
        learned=learned,
        suspects=wrong[:SUSPECTS],
        suspect_count=len(wrong),
        held_out=sum(len(part.rows) for part in answers.values()),
        data=sections.data_table(result),
        cost=sections.cost_table(result),
        settings=sections.settings_table(result),
        environment=sections.environment_table(result),
    )  # fmt: skip


def _main_split(answers: dict[str, Answers], folds: bool) -> str:
    """The split that most of the page shows: test; after folds validation, if that has more texts."""
    if "test" in answers and not (folds and len(answers["validation"].rows) > len(answers["test"].rows)):
        return "test"
    return "validation"


def _headline(split: str, answers: Answers, kfold: Mapping[str, Any] | None, tuned: bool) -> str:
    """The main score. Out of fold, the one after the same epoch in each fold comes first, if it is known.

    If each fold has tuned its threshold on the texts that it scores (``tuned``), that one is far too high.
    """
    measure = "exact match" if answers.rule.multi_label else "accuracy"
    accuracy = float(answers.right.mean())
    shown = percent(accuracy, accuracy_interval(accuracy, len(answers.rows)))
    if kfold is None or split != "validation":
        return f"{split} {measure} {shown}"
    if tuned or (same := kfold["same_epoch"]) is None:  # a fold has stopped before
        return f"out-of-fold {measure} {shown}"
    every, after = percent(same["accuracy"], same["accuracy_ci95"]), counted(kfold["epochs"], "epoch")
    return f"out-of-fold {measure} {every} after {after} in every fold, {shown} if each fold chooses,"


def _calibration(main: Answers, temperature: float | None) -> dict[str, Any]:
    """Reliability of a split, with the temperature that validation gives, if there is one."""
    before = reliability(main)
    after = reliability(main.cooled(temperature)) if temperature else None
    return {
        "temperature": temperature,
        "before": before.bins,
        "after": after.bins if after else [],
        "table": sections.calibration_table(before, after),
        "multi_label": main.rule.multi_label,
    }


def _abstention(
    validation: Answers, main: Answers, split: str, temperature: float, result: dict[str, Any]
) -> dict[str, Any]:
    """What happens to a split if the least confident texts get no answer."""
    validation, main = validation.cooled(temperature), main.cooled(temperature)
    return {
        "curve": coverage_curve(main),
        "table": risk_table(validation, main, split, checkpoints_compared(result)),
        "level": LEVEL,
    }


def _cut(answers: Answers, max_length: int) -> str | None:
    """The share of texts that reach the longest length; ``None`` if none does, or lengths are not known."""
    share = 0.0 if answers.tokens is None else float((answers.tokens >= max_length).mean())
    return percent(share) if share else None
