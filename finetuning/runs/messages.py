"""What a run prints, besides its progress: scores, baseline, costs, commands. Nothing here imports torch."""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetuning.errors import counted
from finetuning.runs.records import SCORES, BaselineRecord, FoldsRecord, score_names, score_text

INSTALLED = "finetune-lora"  # the command that pip installs
TO_REPORT = "(report this, or the score of a large test split)"
OPTIMISTIC = "(optimistic: each fold chose its epoch)"
TUNED = "(optimistic: each fold tuned its threshold)"
SHOWN_IN_ADVICE = 5  # labels
SCRIPTS = {  # files of the clone
    "lora": "finetune_lora.py", "predict": "predict.py", "export": "export_model.py", "compare": "compare_methods.py",
}  # fmt: skip


def summary(directory: Path, result: dict[str, Any]) -> str:
    """The text that a run prints at the end: scores, time, memory, and a command to try the classifier."""
    trained = result["train"]
    example = '--text "..."' + (' --text_pair "..."' if result["config"]["text_pair_column"] else "")
    shown = {split: result[split] for split in ("validation", "test") if split in result}
    monitor, multi_label = result["config"]["monitor"], "exact_match" in result["validation"]
    lines = []
    if "kfold" in result:
        pooled = shown.pop("validation")
        if result["task"].get("threshold_tuned"):  # each fold has tuned one for the texts that it scores
            lines = pooled_lines(pooled, monitor, multi_label)
        else:
            lines = same_epoch_lines(result["kfold"], monitor, label="out of fold")
    lines += [f"{split:<11} {scores_line(scores, monitor, multi_label)}" for split, scores in shown.items()]
    if "test" in result:
        lines.append(accuracy_line("test", result["test"], multi_label))
    if "baseline" in result:
        texts = None if "kfold" in result else result["data"]["sizes"]["train"]
        lines += baseline_lines(result["baseline"], texts, monitor, multi_label)
        lines += folds_line(result, monitor, multi_label)
        told = "test" if "test" in result else "all folds" if "kfold" in result else "validation"
        lines += largest_class_line(told, result.get("test", result["validation"]))
    lines += threshold_line(result["task"])
    epoch, epochs = result["validation"].get("epoch"), result["config"]["epochs"]
    if epoch and epochs > 1:
        by, _, _ = score_names(multi_label)[monitor].partition(",")  # the loss without its unit
        lines.append(f"{'kept':<11} epoch {epoch} of {epochs}, by {by} on validation")
    lines += [
        f"{'training':<11} {trained['seconds']:.1f} s, {trained['tokens_per_second'] or 0:,.0f} tokens/s,"
        f" {counted(trained['steps'], 'step')}; {result['seconds']:.1f} s including evaluation and files",
        f"{'memory':<11} peak {result['memory']['peak_bytes'] / 2**20:,.0f} MiB ({result['memory']['source']})",
        f"{'trained':<11} {result['parameters']['trainable']:,} of {result['parameters']['total']:,} parameters,"
        f" saved in {next(iter(result['files']))} ({next(iter(result['files'].values())):,} bytes)",
        *(f"{'advice':<11} {sentence}" for sentence in result["advice"]),
        f"{'try it':<11} {called('predict', directory)} {example}",
    ]
    return "\n" + "\n".join(lines)


def threshold_line(task: Mapping[str, Any]) -> list[str]:
    """The threshold of a run that tuned it, or that has a positive class; else nothing."""
    positive, tuned = task.get("positive_label"), task.get("threshold_tuned")
    if not tuned and positive is None:
        return []
    label = "" if positive is None else f" for the positive label {positive!r}"
    return [f"{'threshold':<11} {task['threshold']:g}{label}{', tuned on validation' if tuned else ''}"]


def scores_line(scores: Mapping[str, Any], monitor: str, multi_label: bool) -> str:
    """The main scores of a split, and the one that chose the checkpoint.

    Args:
        scores: by name, and ``examples``, the number of texts.
        monitor: the metric that chose the checkpoint.
    """
    names = dict.fromkeys(("accuracy", *(("micro_f1",) if multi_label else ()), "macro_f1", monitor))
    shown = score_names(multi_label)
    parts = [f"{shown[name]} {score_text(name, scores[name])}" for name in names if name in scores and name != "loss"]
    return "   ".join([*parts, f"loss {scores['loss']:.4f}", f"{scores['examples']:,} texts"])


def accuracy_line(split: str, scores: dict[str, Any], multi_label: bool) -> str:
    """The interval of the accuracy of a split."""
    low, high = scores["accuracy_ci95"]
    name = score_names(multi_label)["accuracy"]
    return f"{'':<11} 95 % interval of the {split} {name}: {low:.2%} to {high:.2%}"


def largest_class_line(split: str, scores: Mapping[str, Any]) -> list[str]:
    """What always answering the largest class would score, and on which texts; nothing for a multi-label run."""
    if "exact_match" in scores:
        return []
    counts = [own["support"] for own in scores["per_class"].values()]
    there = [count for count in counts if count]  # of the classes that there are
    share = max(there) / scores["examples"]
    macro_f1 = 2 * share / (1 + share) / len(there)
    always = (
        f"on {split}, always answering the largest class is right for {share:.2%}, with a macro F1 of {macro_f1:.2%}"
    )
    return [f"{'':<11} {always}"]


def baseline_lines(baseline: BaselineRecord, texts: int | None, monitor: str, multi_label: bool) -> list[str]:
    """The baseline's scores on validation, and on test if the run reads it.

    Args:
        baseline: the ``baseline`` of ``result.json``.
        texts: the training texts of the run; ``None`` if the scores are means over the folds of ``--kfold``.
        monitor, multi_label: as in ``scores_line``.
    """
    note, scored = "", {"validation": baseline["validation"]}
    if "test" in baseline:
        scored["test"] = baseline["test"]
    if texts is None:
        note, scored = ", mean of the folds", {"out of fold": baseline["validation"]}
    elif baseline["texts"] < texts:
        note = f", trained on {baseline['texts']:,} of {texts:,} texts to take little time"
    lines = [f"{'':<11} {split:<11} {scores_line(scores, monitor, multi_label)}" for split, scores in scored.items()]
    return [f"{'baseline':<11} {baseline['name']}{note}", *lines]


def folds_line(result: Mapping[str, Any], monitor: str, multi_label: bool) -> list[str]:
    """The means of a run's folds, which the means of its baseline compare with; nothing without folds."""
    if "kfold" not in result:
        return []
    folds = result["kfold"]
    means = folds["same_epoch"] or folds
    shown = scores_line(means["mean"] | {"examples": result["validation"]["examples"]}, monitor, multi_label)
    after = f"after {counted(folds['epochs'], 'epoch')} in each" if folds["same_epoch"] else "each after its best epoch"
    return [f"{'run':<11} mean of the folds, {after}", f"{'':<11} {'out of fold':<11} {shown}"]


def pooled_lines(scores: dict[str, Any], monitor: str, multi_label: bool) -> list[str]:
    """The scores of all predictions out of fold, each by its fold's best epoch, and the interval of the accuracy."""
    interval = accuracy_line("out-of-fold", scores, multi_label)
    return [f"{'out of fold':<11} {scores_line(scores, monitor, multi_label)}", f"{interval} {OPTIMISTIC}"]


def same_epoch_lines(record: FoldsRecord, monitor: str, tuned: bool = False, label: str = "") -> list[str]:
    """The scores after the same epoch in every fold, if they are known: accuracy, and the monitored one.

    Args:
        record: what the folds tell.
        monitor: the score that chose the epochs.
        tuned: whether each fold tuned a threshold on the texts that it scored.
        label: what the first line begins with.
    """
    if (same := record["same_epoch"]) is None:
        return []
    low, high = same["accuracy_ci95"]
    every = f"after {counted(record['epochs'], 'epoch')} in every fold"
    note = TUNED if tuned else TO_REPORT
    lines = [f"{label:<11} {every}: {same['accuracy']:.2%}, 95 % interval {low:.2%} to {high:.2%} {note}"]
    if monitor != "accuracy" and monitor in same["mean"]:
        score = score_text(monitor, same["mean"][monitor])
        if limits := same["mean_ci95"].get(monitor):
            score += ", 95 % interval " + " to ".join(score_text(monitor, limit) for limit in limits)
        lines.append(f"{'':<11} then {SCORES[monitor]}, mean of the folds: {score}")
    return lines


def command_line(words: Sequence[str]) -> str:
    """The command line to type in the current folder. Paths below it become relative."""
    installed = Path(words[0]).name == INSTALLED
    start = [_callable(INSTALLED, Path(words[0]))] if installed else ["python", words[0]]
    return _joined([*start, *words[1:]])


def called(name: str, *words: object) -> str:
    """A call of a command, to type in the current folder: as pip has installed it, or a file of the clone.

    Args:
        name: ``lora`` (a run), ``predict``, ``export`` or ``compare``.
        words: what follows the command.
    """
    installed = Path(sys.executable).with_name(f"finetune-{name}")
    start = [_callable(installed.name, installed)]
    if not installed.exists():
        file = Path(__file__).parents[2] / SCRIPTS[name]
        start = [_callable("python", Path(sys.executable)), os.path.relpath(file)]
    paths = {str(word) for word in words if isinstance(word, Path)}  # one that begins with a dash would be a flag
    return _joined([*start, *(f"./{word}" if word[:1] == "-" and word in paths else word for word in map(str, words))])


def _joined(words: Sequence[str]) -> str:
    """Words as a command line, with paths below the current folder made relative."""
    here = re.escape(f"{Path.cwd()}{os.sep}")
    return shlex.join(re.sub(f"(^|=){here}", r"\1", word) for word in words)


def _callable(name: str, path: Path) -> str:
    """How to call a program: its name, or its path if the shell finds no or another one (the venv is not active)."""
    found = shutil.which(name)
    if found is not None and Path(found).absolute().parent == path.absolute().parent:
        return name
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
