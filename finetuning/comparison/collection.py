"""Keeps what the report needs of every run that has ended: ``runs/STUDY/RUN`` -> ``results/STUDY``, see ``packed``."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.comparison.packed import Columns, Record, change_records, read_records
from finetuning.comparison.plan import PlannedRun, shown_command, stated_command
from finetuning.comparison.study_runs import StudyRuns, stands_for
from finetuning.errors import UserError, first_line, listed
from finetuning.runs.answers import MOST_PROBABLE, Rule, read_answers
from finetuning.runs.files import METRICS, PREDICTIONS, check_unchanged, read_text_hashes

NAMED = 5  # of the runs that a message is about


def collect(runs: StudyRuns, stage: str, results: Path) -> None:
    """Collects every finished or failed run of a stage in ``results/STUDY``, and prints which runs it left out.

    Runs of the study that were collected before, for example on another machine, stay there. One that has finished
    stays finished if it fails later or on another machine.

    Raises:
        UserError: there is no folder of runs; or the files of a run cannot be read, then all others are collected.
    """
    kept = {"finished": 0, "failed": 0}
    target = results / runs.study.name
    chosen, before = runs.study.stage(stage), read_records(target)[0]
    if not before and not runs.folder.is_dir():
        raise UserError(f"--runs_dir {runs.folder.parent}: has no folder {runs.folder.name} with runs of this study")
    found, damaged = [], list[str]()
    for run in map(runs.tuned_if_possible, chosen):
        state = runs.state(run)
        if state not in kept:
            print(f"not collected: {run.name} is {state}", file=sys.stderr)
            stays = state in ("missing", "changed")  # another run goes on, and replaces its line
            if stays and run.name in before and not stands_for(run, before[run.name].result, own=True):
                print(f"kept: {run.name} of {target}, with other settings: delete its line there", file=sys.stderr)
            continue
        if state == "failed" and run.name in before and has_finished(before[run.name], run):
            print(f"kept: {run.name} failed here, but has finished before", file=sys.stderr)
            state = "finished"
        elif runs.holds(run):  # else it was collected on another machine
            try:
                found.append(make_record(runs, run, target))
            except UserError as error:
                damaged.append(str(error))
                continue
        kept[state] += 1
    if any(kept.values()):
        change_records(target, found, [run.name for run in runs.study.stage("final")])
    planned = {run.name for run in runs.study.runs}
    if others := sorted(before.keys() - planned):
        print(
            f"kept: {listed(others, NAMED)} of {target}, no longer in the study: delete the lines there",
            file=sys.stderr,
        )
    print(f"{target}: {kept['finished']} finished and {kept['failed']} failed of {len(chosen)} runs")
    if damaged:
        raise UserError("; ".join(damaged))


def has_finished(record: Record, run: PlannedRun) -> bool:
    """Whether a collected run finished with the settings and data of the plan, here earlier or on another machine."""
    return bool(record.result["status"] == "finished" and stands_for(run, record.result, own=True))


def make_record(runs: StudyRuns, run: PlannedRun, target: Path) -> Record:
    """What is kept of a run: its result with its place in the study, its metrics, and the predictions of the test."""
    source, result = runs.directory(run), runs.result(run)
    result["study"] = runs.place_in_study(run)
    # paths of this machine mean nothing on another one
    result["command"] = shown_command(stated_command(result["command"], result["config"]))
    result["config"] |= {"data_dir": run.settings.get("data_dir"), "output_dir": None}
    result.pop("traceback", None)
    hashes = read_text_hashes(source)
    texts = [hashes.get(split, "") for split in ("train", "validation")]
    result["texts_sha256"] = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    if not run.reads_test:
        result.pop("test", None)  # of a run that another study tested
    metrics = predictions = None
    if (source / METRICS).exists():
        check_unchanged(source / METRICS)
        metrics = (source / METRICS).read_bytes().decode()
    if result["status"] == "finished" and "test" in result:
        check_unchanged(source / PREDICTIONS)
        task = result["task"]
        try:
            rule = Rule.of_task(task, result.get("data", {}).get("label_names", ()))
            predictions = read_test_predictions(source, rule)
        except (OSError, ValueError, LookupError) as error:  # includes pyarrow's errors
            path = source / PREDICTIONS
            raise UserError(f"{path} cannot be read ({first_line(error)}): restore it, or train again") from None
    return Record.made(target, result, metrics, predictions)


def read_test_predictions(directory: Path, rule: Rule = MOST_PROBABLE) -> Columns:
    """What a run predicted for the test texts by its rule, in the order of their rows."""
    test = read_answers(directory, rule)["test"]
    test = test.taken(np.argsort(test.rows))

    def numbers(labels: np.ndarray) -> list[Any]:
        return [np.flatnonzero(row).tolist() for row in labels] if test.rule.multi_label else labels.argmax(1).tolist()

    return {"row": test.rows.tolist(), "label": numbers(test.truth), "predicted": numbers(test.given)}
