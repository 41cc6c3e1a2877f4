"""Synthetic collected runs for the tests of the report: what finetune_lora.py and the collector would have written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.comparison.collected import Study, read_study, study_names
from finetuning.comparison.over_sets import Grid, grid_of
from finetuning.comparison.packed import Columns, Record, change_records
from finetuning.runs.records import scores_record

ENVIRONMENT = {
    "cpu": "A CPU", "gpus": [], "threads": 2, "alone": True, "git": {"commit": "c0ffee", "modified": False},
}  # fmt: skip


def write_run(results: Path, study: str, row: str, /, **known: Any) -> Record:
    """Adds one run to the collected ones. Arguments as in ``made_run``."""
    record = made_run(results, study, row, **known)
    change_records(record.folder, [record])
    return record


def made_run(
    results: Path,
    study: str,
    row: str,
    /,
    *,
    seed: int = 0,
    stage: str = "final",
    data_set: str | None = None,
    correct: np.ndarray | None = None,
    first_row: int = 0,
    validation: float | dict[str, float] | None = 0.9,
    axes: dict[str, Any] | None = None,
    curve: Sequence[float] = (),
    predictions: Columns | None = None,
    **changes: Any,
) -> Record:
    """A run, to be collected by ``change_records``. Many runs are written much faster in one call of it.

    Args:
        results: the results folder.
        study: the study's name.
        row: the row's name.
        seed: also part of the run's name.
        stage: ``tune`` or ``final``.
        data_set: of a study over data sets; the name of the row begins with it.
        correct: ``(n,)`` bool, what the run got right of its test texts; no test where it is not given.
        first_row: the row number of the first test text.
        validation: accuracy on 1,000 validation texts, or other scores.
        axes: the run's place on the study's axes.
        curve: validation accuracies for the metrics.
        predictions: of the test, in place of those that ``correct`` gives.
        changes: keys of the result, merged into those that are dictionaries.
    """
    axes = axes or {}
    row = row if data_set is None else f"{data_set}-{row}"
    name = "-".join([row, stage, *(f"{key}{value}" for key, value in axes.items()), f"seed{seed}"])
    result: dict[str, Any] = {
        "status": "finished",
        "config": {"seed": seed, "learning_rate": 1e-3, "data_dir": data_set} | axes,
        "command": f"python finetune_lora.py --data_dir /data/imdb --output_dir runs/{name} --seed {seed}",
        "environment": ENVIRONMENT,
        "parameters": {"trainable": 1234},
        "data": {"source": "synthetic"},
        "train": {"seconds": 100.0},
        "memory": {"peak_bytes": 2**30},
        "study": {"study": study, "row": row, "run": name, "stage": stage, "seed": seed, "axes": axes},
    }
    if validation is not None:
        scores = validation if isinstance(validation, dict) else {"accuracy": validation}
        result["validation"] = {"accuracy": 0.9, "examples": 1000} | scores
    if correct is not None:
        accuracy = float(np.float32(correct.mean()))  # as torchmetrics gives it
        result["test"] = scores_record({"accuracy": accuracy}, len(correct), 1.0)
        predictions = predictions or _predictions(correct, first_row)
    for key, value in changes.items():
        result[key] = {**result[key], **value} if isinstance(value, dict) and key in result else value
    return Record.made(results / study, result, _metrics(curve) if curve else None, predictions)


def grid_in(results: Path, study: str = "s") -> Grid:
    """The grid of a study over data sets."""
    grid = grid_of(read_study(study, results))
    assert grid is not None
    return grid


def _predictions(correct: np.ndarray, first_row: int) -> Columns:
    rows = np.arange(len(correct))
    labels = rows % 2
    columns = {"row": rows + first_row, "label": labels, "predicted": np.where(correct, labels, 1 - labels)}
    return {name: column.tolist() for name, column in columns.items()}


def _metrics(curve: Sequence[float]) -> str:
    """Ten rows of training to each row of validation."""
    lines = ["step,epoch,train_loss,learning_rate,train_seconds,validation_accuracy"]
    for step in range(10, 10 * len(curve) * 10 + 1, 10):
        lines.append(f"{step},{step / 100},{0.7 * np.exp(-step / 150) + 0.1},0.001,{step / 2},")
        if step % 100 == 0:
            lines.append(f"{step},{step / 100},,,{step / 2},{curve[step // 100 - 1]}")
    return "\n".join(lines) + "\n"


def outcomes(accuracy: float, texts: int, seed: int, difficulty: np.ndarray | None = None) -> np.ndarray:
    """``(texts,)`` bool with this share right; texts of high ``difficulty`` are more often wrong, for every run."""
    noise = np.random.default_rng(seed).normal(size=texts)
    order = np.argsort(noise + (0 if difficulty is None else 2 * difficulty))
    correct = np.zeros(texts, bool)
    correct[order[: round(accuracy * texts)]] = True
    return correct


def two_studies(results: Path) -> list[Study]:
    """Study a: x (two seeds) and y (one, and slower); study b: x, and broken, which failed."""
    for seed in range(2):
        write_run(results, "a", "x", seed=seed, correct=outcomes(0.90 + 0.01 * seed, 1000, seed))
    write_run(
        results, "a", "y", correct=outcomes(0.5, 1000, 9), train={"seconds": 2000.4},
        files={"adapter_model.safetensors": 1_932_152, "last.ckpt": 9_000_000},
    )  # fmt: skip
    write_run(results, "b", "x", correct=outcomes(0.8, 500, 3), environment={"alone": False})
    write_run(results, "b", "broken", status="failed")
    write_run(results, "b", "tried", stage="tune", axes={"learning_rate": 0.1}, validation=0.5)
    return [read_study(name, results) for name in study_names(results)]
