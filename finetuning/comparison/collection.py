"""Copies a compact record of every run that has ended, from ``runs/STUDY/RUN`` to ``results/STUDY/RUN``."""

import sys
from pathlib import Path
from typing import Any

from finetuning.comparison.plan import PlannedRun, shown_command
from finetuning.comparison.study_runs import StudyRuns, forget_test
from finetuning.errors import UserError, first_line
from finetuning.runs.files import METRICS, PLANNED, PREDICTIONS, check_unchanged, write_result
from finetuning.storage import write_atomically, write_bytes, write_json


def collect(runs: StudyRuns, stage: str, results: Path) -> None:
    """Copies every finished or failed run of a stage to ``results/STUDY/RUN``, and prints which runs it left out."""
    kept = {"finished": 0, "failed": 0}
    target = results / runs.study.name
    chosen = runs.study.stage(stage)
    for run in map(runs.tuned_if_possible, chosen):
        state = runs.state(run)
        if state in kept:
            if runs.holds(run):  # else it was collected on another machine
                copy_record(runs, run, target / run.name)
            kept[state] += 1
        else:
            print(f"not collected: {run.name} is {state}", file=sys.stderr)
    if any(kept.values()):
        write_json(target / PLANNED, {"final": [run.name for run in runs.study.stage("final")]})
    print(f"{target}: {kept['finished']} finished and {kept['failed']} failed of {len(chosen)} runs")


def copy_record(runs: StudyRuns, run: PlannedRun, target: Path) -> None:
    """Writes ``result.json`` with the run's place in the study, ``metrics.csv``, and the predictions of the test."""
    source, result = runs.directory(run), runs.result(run)
    result["study"] = runs.place_in_study(run)
    # paths of this machine mean nothing on another one
    result["command"] = shown_command(result["command"])
    result["config"] |= {"data_dir": run.settings.get("data_dir"), "output_dir": None}
    result.pop("traceback", None)
    if run.stage == "tune":
        forget_test(result, target)
    target.mkdir(parents=True, exist_ok=True)
    if (source / METRICS).exists():
        check_unchanged(source / METRICS)
        write_bytes(target / METRICS, (source / METRICS).read_bytes())
    if result["status"] == "finished" and "test" in result:
        check_unchanged(source / PREDICTIONS)
        threshold = result.get("task", {}).get("threshold")  # older runs have no task
        try:
            predictions = read_test_predictions(source / PREDICTIONS, threshold)
        except (OSError, ValueError) as error:  # includes pyarrow's errors
            path = source / PREDICTIONS
            raise UserError(f"{path} cannot be read ({first_line(error)}): restore it, or train again") from None
        write_atomically(target / PREDICTIONS, lambda temporary: write_small_parquet(predictions, temporary))
    else:
        (target / PREDICTIONS).unlink(missing_ok=True)
    write_result(target, result)  # last: if it is there, the rest is there


def read_test_predictions(path: Path, threshold: float | None = None) -> Any:
    """What a run predicted for the test texts, in the order of their rows.

    Args:
        path: the run's predictions.
        threshold: of a multi-label run, the probability above which a label is given.

    Returns:
        A pyarrow table with columns ``row`` (int32), ``label`` and ``predicted`` (int8; int16 for many classes). With
        a threshold, the last two hold a list of labels for each text.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path, filters=[("split", "=", "test")]).sort_by("row")
    logits = np.array(table["logits"].to_pylist())  # (n, classes)
    small = np.int8 if logits.shape[1] <= 127 else np.int16
    if threshold is not None:
        given = 1 / (1 + np.exp(-logits)) > threshold
        kind = pa.list_(pa.from_numpy_dtype(small))
        predicted = pa.array([np.flatnonzero(row).astype(small) for row in given], kind)
        rows = table["row"].to_numpy().astype(np.int32)
        return pa.table({"row": rows, "label": table["label"].cast(kind), "predicted": predicted})
    return pa.table(
        {
            "row": table["row"].to_numpy().astype(np.int32),
            "label": table["label"].to_numpy().astype(small),
            "predicted": logits.argmax(axis=1).astype(small),
        }
    )


def write_small_parquet(table: Any, path: Path) -> None:
    """Writes the smallest Parquet file: row numbers as differences, classes as they are, all compressed by zstd."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lists = pa.types.is_list(table["label"].type)
    encodings = {"row": "DELTA_BINARY_PACKED"} | {
        f"{name}.list.element" if lists else name: "PLAIN" for name in ("label", "predicted")
    }
    pq.write_table(
        table, path, compression="zstd", compression_level=19, use_dictionary=False, column_encoding=encodings
    )
