"""The runs on the folds of ``--kfold``, and what the final run on all training texts takes from them."""

import dataclasses
import gc
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.errors import Interrupted, TrainingFailed, Unheard, UserError, as_user_error, counted, say
from finetuning.runs.answers import joined
from finetuning.runs.directory import fold_directories, holds_run
from finetuning.runs.files import METRICS, check_unchanged, read_status
from finetuning.runs.finished import FinishedRun, read_finished, read_own_answers
from finetuning.runs.history import scores_by_epoch
from finetuning.runs.measurements import forget_peak
from finetuning.runs.messages import largest_class_line, pooled_lines, same_epoch_lines, scores_line
from finetuning.runs.records import SCORES, FoldsRecord, Means, accuracy_interval, scores_record
from finetuning.runs.scores import mean_interval
from finetuning.steps.claim import Claim
from finetuning.steps.inputs import Inputs
from finetuning.training.hardware import return_freed_memory
from finetuning.training.module import Predictions, all_scores
from finetuning.training.tasks import MultiLabel

RANGES = {"mcc": (-1.0, 1.0), "loss": (0.0, math.inf)}  # of scores; the others are from 0 to 1


@dataclass(frozen=True)
class Folds:
    """What the folds tell: how long to train, and what each text got from the run that did not train on it."""

    record: FoldsRecord
    predictions: Predictions  # out of fold
    scores: dict[str, float]  # of these predictions


def cross_validate(claim: Claim, inputs: Inputs, carry_out: Callable[[Path, Inputs], dict[str, Any]]) -> Folds | None:
    """Does the runs on the folds that have not finished yet. ``None`` for a run without folds.

    Args:
        claim: the final run, whose directory has those of the folds.
        inputs: of the final run.
        carry_out: does a run in a directory and returns what its ``result.json`` got.

    Raises:
        Interrupted: a signal has stopped the run on a fold.
        TrainingFailed: the run on a fold has failed.
    """
    if not inputs.folds:
        return None
    count, training = len(inputs.folds), claim.config.training
    shown = training.monitor, isinstance(inputs.task, MultiLabel)
    texts, epochs = f"{len(inputs.splits['train']):,} texts", counted(training.epochs, "epoch")
    say(f"{count} folds of {texts}; each run has {epochs}, and validates on one of them")
    say(f"with the final run on all of them, it takes about {count} times as long as one run")
    for sentence in inputs.advice:
        say(f"{'advice':<11} {sentence}")
    runs = []
    for directory, fold in zip(fold_directories(claim.directory, claim.config.data), inputs.folds, strict=True):
        runs.append(_finished(directory, fold, carry_out))
        scores, seconds = runs[-1].result["validation"], runs[-1].result["seconds"]
        begin, left = f"fold {len(runs)}/{count}", timedelta(seconds=round(time_left(runs, count)))
        say(f"{begin:<11} {scores_line(scores, *shown)}   epoch {scores['epoch']}   {seconds:.1f} s, about {left} left")
    folds = _joined(inputs, runs)
    record, (rows, labels, logits) = folds.record, folds.predictions
    scores = scores_record(folds.scores | inputs.task.details(labels, logits), len(rows), record["seconds"])
    tuned = bool(inputs.task.record().get("threshold_tuned"))
    lines = pooled_lines(scores, *shown) + same_epoch_lines(record, training.monitor, tuned)
    for line in (*lines, *largest_class_line("all folds", scores)):
        say(line)
    chosen = ", ".join(str(fold["epoch"]) for fold in record["folds"])
    median = f"the {'median' if count % 2 else 'higher median'} of the folds' {chosen}"
    stop = f"schedule of {counted(training.epochs, 'epoch')}, stopped after {record['epochs']}, {median}"
    say(f"{'final run':<11} {stop}\n")
    return folds


def time_left(runs: Sequence[FinishedRun], count: int) -> float:
    """Seconds that the other folds and the final run take, as far as is known: that one stops after fewer epochs."""
    done = [(run.result["seconds"], run.result["validation"]["epoch"] / run.config.training.epochs) for run in runs]
    seconds, epochs = (statistics.fmean(column) for column in zip(*done, strict=True))
    return seconds * (count - len(runs) + epochs * count / (count - 1))


def _finished(directory: Path, fold: Inputs, carry_out: Callable[[Path, Inputs], dict[str, Any]]) -> FinishedRun:
    """The finished run on a fold. It is begun or continued if necessary."""
    if read_status(directory) != "finished":
        begun = holds_run(directory)  # not if its settings are damaged: then it starts over
        config = fold.config.changed(output_dir=directory, resume=begun, overwrite=not begun)
        terminal = sys.stdout if sys.stdout.isatty() else None
        with closing(Unheard(terminal, f"fold {fold.config.data.fold}  ")) as unheard, redirect_stdout(unheard):
            result = carry_out(directory, dataclasses.replace(fold, config=config))
        gc.collect()  # Lightning's objects refer to each other, and would keep the classifier
        return_freed_memory()
        forget_peak(fold.hardware.on_gpu)  # the next run's memory is its own
        if result["status"] == "interrupted":
            raise Interrupted
        if result["status"] == "failed":
            raise TrainingFailed(f"fold {fold.config.data.fold}: {result['error']}")
    return read_finished(directory)


def _joined(inputs: Inputs, runs: list[FinishedRun]) -> Folds:
    """The predictions of all folds in the order of their rows, and their scores."""
    answers = joined([read_own_answers(run)["validation"] for run in runs])
    pool, order = inputs.splits["train"], np.argsort(answers.rows)
    answers, labels = answers.taken(order), pool.labels[np.argsort(pool.rows)]
    if not np.array_equal(answers.rows, np.sort(pool.rows)):  # versions that did not record the cut may have begun
        raise UserError("--kfold: its runs are of different cuts into folds: start the run over with --overwrite")
    logits = answers.logits.astype(np.float32)
    inputs.task.tune(labels, logits)
    scores = all_scores(inputs.task, labels, logits, float(answers.losses.mean()))
    return Folds(_record(runs), (answers.rows, labels, logits), scores)


def _record(runs: list[FinishedRun]) -> FoldsRecord:
    """Each fold's scores, their means, and the number of epochs."""
    folds = [
        {name: score for name, score in run.result["validation"].items() if name in (*SCORES, "epoch", "examples")}
        | {"seconds": run.result["seconds"], "baseline": run.result.get("baseline")}
        for run in runs
    ]
    epochs = statistics.median_high(fold["epoch"] for fold in folds)
    return FoldsRecord(
        folds=folds,
        epochs=epochs,
        same_epoch=_same_epoch(runs, epochs),
        **means(folds),
        seconds=sum(fold["seconds"] for fold in folds),
    )


def means(folds: Sequence[Mapping[str, Any]]) -> Means:
    """The means of the scores that all folds have. Folds that score alike do not say how much they vary."""
    columns = {name: [fold[name] for fold in folds] for name in SCORES if all(name in fold for fold in folds)}
    vary = {name: values for name, values in columns.items() if len(set(values)) > 1}
    return Means(
        mean={name: statistics.fmean(values) for name, values in columns.items()},
        mean_ci95={name: mean_interval(values, *RANGES.get(name, (0.0, 1.0))) for name, values in vary.items()},
    )


def _same_epoch(runs: list[FinishedRun], epochs: int) -> dict[str, Any] | None:
    """The scores of the folds after this epoch; ``None`` if a fold has stopped before it.

    Raises:
        UserError: the history of a fold is missing or was changed.
    """
    histories = []
    for run in runs:
        path = run.directory / METRICS
        check_unchanged(path)
        what = f"{path} cannot be read (restore it, or remove {run.directory} and train again)"
        with as_user_error(what, OSError):
            histories.append(scores_by_epoch(run.directory))
    if not all(epochs in history for history in histories):
        return None
    folds = [history[epochs] for history in histories]
    texts = [run.result["validation"]["examples"] for run in runs]
    right = sum(fold["accuracy"] * count for fold, count in zip(folds, texts, strict=True))
    accuracy = right / sum(texts)
    return {"accuracy": accuracy, "accuracy_ci95": list(accuracy_interval(accuracy, sum(texts))), **means(folds)}
