"""Collected runs as a study's report sees them: runs, rows, the study.

Under ``study``, a result says to which row of the table the run belongs, its seed, its values on the study's axes, and
whether it tuned (``tune``) or counts (``final``).
"""

import csv
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from finetuning.comparison.drawn import DRAWN, RATE
from finetuning.comparison.packed import RUNS, Record, read_records
from finetuning.comparison.plan import shown_command
from finetuning.comparison.predictions import Predictions
from finetuning.comparison.statistics import mean_and_deviation
from finetuning.config import NOT_PART_OF_THE_RUN
from finetuning.errors import UserError
from finetuning.runs.records import NOT_ASKED_FOR
from finetuning.settings import recorded_name

OTHER_CONDITIONS = "another commit, processor, number of threads or torch version"


@dataclass(frozen=True)
class Run:
    """A collected run, as the report reads it."""

    record: Record

    def get(self, *keys: str) -> Any:
        """A value of the result; ``None`` if it, or a key above it, is missing."""
        value: Any = self.record.result
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def row(self) -> str:
        """The row of the table that it belongs to."""
        return str(self.get("study", "row"))

    @property
    def data_set(self) -> str:
        """The name of its data set: the study's, or that of the folder."""
        return str(self.get("study", "data") or Path(str(self.get("config", "data_dir"))).name)

    @property
    def tunes(self) -> bool:
        """Whether it only tuned the learning rate."""
        return self.get("study", "stage") == "tune"

    @property
    def seed(self) -> int:
        return int(self.get("study", "seed"))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings that must be equal for all runs of a row."""
        config = self.get("config") or {}
        config = config | {"model_name": recorded_name(config.get("model_name", ""))}
        others = (*NOT_PART_OF_THE_RUN, "seed", "data_dir", "test")  # a test changes nothing in the training
        return {key: value for key, value in config.items() if key not in others}

    @property
    def axes(self) -> dict[str, Any]:
        """Its values on the axes of the study."""
        axes: dict[str, Any] = self.get("study", "axes")
        return axes

    @property
    def status(self) -> str:
        return str(self.get("status"))

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def cost_obstacle(self) -> str | None:
        """Why its time and memory cannot be compared with other runs; ``None`` if nothing speaks against it."""
        if self.get("environment", "alone") is not True:
            return "possibly not alone on the machine"
        if self.get("config", "resume"):
            return "continued after an interruption, so only the last part was measured"
        if self.get("environment", "git", "commit") is None:
            return "unknown commit"
        return "code differed from its commit" if self.get("environment", "git", "modified") else None

    @property
    def forked(self) -> bool:
        """Whether its process was forked, which saves memory; runs of earlier versions do not say it."""
        return bool(self.get("environment", "forked"))

    @property
    def conditions(self) -> str:
        """What time and memory depend on besides the settings: commit, processor, threads, missing kernels, torch, and
        whether the run was forked."""
        keys = (("git", "commit"), ("cpu",), ("gpus",), ("threads",), ("versions", "torch"))
        kernels = str(self.get("environment", "cpu_kernels") or "")
        missing = "" if kernels.startswith(("compiled", NOT_ASKED_FOR)) else kernels  # that is a setting
        return json.dumps([missing, self.forked, *(self.get("environment", *key) for key in keys)])

    @property
    def environment(self) -> dict[str, Any]:
        """What ``measured`` needs; empty if the run failed before it was recorded."""
        return self.get("environment") or {}

    def accuracy(self, split: str) -> float | None:
        """The share of ``split`` that a finished run got right, as a ratio of whole texts (no float32 rounding)."""
        accuracy, examples = self.get(split, "accuracy"), self.get(split, "examples")
        if not self.finished or accuracy is None:
            return None
        return round(accuracy * examples) / examples

    @property
    def monitor(self) -> str:
        """The metric that chose its checkpoint. If it tuned, the metric also chose the learning rate."""
        return str(self.get("config", "monitor") or "accuracy")

    @property
    def monitored(self) -> float | None:
        """Its best value on validation."""
        if self.monitor == "accuracy" or not self.finished:
            return self.accuracy("validation")
        return self.get("validation", self.monitor)

    @cached_property
    def predictions(self) -> Predictions | None:
        """The test predictions; ``None`` if they were not kept. Those of another run are refused."""
        columns = self.record.predictions
        if columns is None:
            return None
        where = json.dumps([self.get("config", name) for name in ("dataset", "data_dir")])  # the same on all machines
        found = Predictions.of(where, columns)
        accuracy = self.accuracy("test")
        if len(np.unique(found.rows)) != len(found.rows) or not len(found.rows):
            raise UserError(f"{self.record.path}: column row of its predictions must name every test text once")
        if accuracy is not None and abs(found.correct.mean() - accuracy) > 0.5 / len(found.rows):
            raise UserError(
                f"{self.record.path}: its predictions have an accuracy of {found.correct.mean():.4%}, but its result"
                f" says {accuracy:.4%}"
            )
        return found

    @cached_property
    def history(self) -> list[dict[str, float]]:
        """The rows of ``metrics.csv`` without their empty cells; no rows if there was no such file."""
        names, *rows = [*csv.reader((self.record.metrics or "").splitlines())] or [[]]
        try:
            return [{key: float(cell) for key, cell in zip(names, row, strict=True) if cell} for row in rows if row]
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.record.path}: its metrics must be numbers: {error}") from None


@dataclass(frozen=True)
class Row:
    """The final runs of one row of a table, one for each seed."""

    name: str
    runs: tuple[Run, ...]

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.finished]

    @property
    def tested(self) -> list[Run]:
        """The runs with a test accuracy."""
        return [run for run in self.runs if run.accuracy("test") is not None]

    @property
    def status(self) -> str:
        """``finished``, or how its runs ended: ``2 finished, 1 failed``; ``only tuned`` without final runs."""
        statuses = [run.status for run in self.runs]
        kinds = sorted(set(statuses), key=lambda status: (status != "finished", status))
        if not kinds:
            return "only tuned"
        return kinds[0] if len(kinds) == 1 else ", ".join(f"{statuses.count(kind)} {kind}" for kind in kinds)

    def accuracies(self, split: str = "test") -> list[float]:
        """The accuracy of each run that has one."""
        return [value for run in self.runs if (value := run.accuracy(split)) is not None]

    @property
    def interval(self) -> tuple[float | None, float | None]:
        """The 95 % interval of the test accuracy, for a row with one run; several runs have a deviation instead."""
        if len(self.tested) != 1:
            return None, None
        low, high = self.tested[0].get("test", "accuracy_ci95")
        return low, high

    def common(self, *keys: str) -> Any:
        """A value that all finished runs share, for example the number of test texts; ``None`` if they differ."""
        values = {run.get(*keys) for run in self.finished}
        return values.pop() if len(values) == 1 else None

    def mean(self, *keys: str) -> float | None:
        """The mean of a measurement over the finished runs; ``None`` if one of them lacks it."""
        values = [run.get(*keys) for run in self.finished]
        return fmean(values) if values and None not in values else None


@dataclass(frozen=True)
class Study:
    """All collected runs of a study."""

    name: str
    question: str
    runs: tuple[Run, ...]
    planned: tuple[str, ...] = ()  # names of the final runs; empty if unknown

    @property
    def missing(self) -> list[str]:
        """Names of planned final runs that were not collected."""
        collected = {run.name for run in self.runs}
        return [name for name in self.planned if name not in collected]

    @property
    def unplanned(self) -> list[str]:
        """Names of collected final runs that the study's file no longer has."""
        return [run.name for run in self.final if self.planned and run.name not in self.planned]

    @cached_property
    def data_sets(self) -> frozenset[str]:
        """The names of the runs' data sets."""
        return frozenset(run.data_set for run in self.runs)

    @cached_property
    def rows(self) -> list[Row]:
        """The rows, best test accuracy first; then by validation accuracy; rows without scores come last."""
        runs: dict[str, list[Run]] = {run.row: [] for run in self.runs}
        for run in self.final:
            runs[run.row].append(run)
        rows = [Row(name, tuple(own)) for name, own in runs.items()]

        def order(row: Row) -> tuple[float, float, str]:
            test, validation = (mean_and_deviation(row.accuracies(split))[0] for split in ("test", "validation"))
            return -(test or 0), -(validation or 0), row.name

        return sorted(rows, key=order)

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """Each row in numbers: accuracies as fractions, times in seconds, memory in bytes; ``None`` if not measured.

        Time and memory are means over the seeds that were measured under the same conditions as the other rows.
        """
        return [self._record(row) for row in self.rows]

    def _record(self, row: Row) -> dict[str, Any]:
        counted = row.tested or row.finished
        mean, deviation = mean_and_deviation(row.accuracies())
        low, high = row.interval
        measured = self.measured(row)
        on_one_processor = Row(row.name, tuple(run for run in row.runs if run.name in self._of_one_processor))
        commands = [run.get("command") for run in sorted(counted or row.runs, key=lambda run: run.seed)]
        return {
            "study": self.name,
            "row": row.name,
            "status": row.status,
            "reported_percent": row.common("study", "reported"),
            "accuracy_mean": mean,
            "accuracy_std": deviation,
            "accuracy_ci95_low": low,
            "accuracy_ci95_high": high,
            "macro_f1_mean": row.mean("test", "macro_f1"),
            "seeds": len(counted),
            "test_examples": row.common("test", "examples"),
            "trainable": row.common("parameters", "trainable"),
            "train_seconds": measured.mean("train", "seconds"),
            "processor_seconds": on_one_processor.mean("train", "processor_seconds"),
            "peak_memory_bytes": measured.mean("memory", "peak_bytes"),
            "validation_accuracy_mean": mean_and_deviation(row.accuracies("validation"))[0],
            "command": next((shown_command(command) for command in commands if command), None),
        }

    @property
    def final(self) -> list[Run]:
        return [run for run in self.runs if not run.tunes]

    @property
    def tuning(self) -> list[Run]:
        """The runs that only tuned."""
        return [run for run in self.runs if run.tunes]

    @property
    def rate_trials(self) -> list[Run]:
        """The ones that tried a list of learning rates. A random trial has no neighbour on both sides."""
        return [run for run in self.tuning if set(run.axes) == {RATE} and not DRAWN.search(run.name)]

    def measured(self, row: Row) -> Row:
        """The row, with only the runs whose time and memory can be compared with other rows."""
        return Row(row.name, tuple(run for run in row.runs if run.name in self._comparable))

    @cached_property
    def _of_one_processor(self) -> frozenset[str]:
        """Names of the runs whose processor time can be compared: on the processor of most rows, forked as they are."""
        return _of_most_rows(((run.get("environment", "cpu"), run.forked), run) for run in self.final if run.finished)

    @cached_property
    def cost_obstacles(self) -> dict[str, int]:
        """Why time and memory of finished runs cannot be compared, and of how many runs."""
        others = [run for run in self.final if run.finished and run.name not in self._comparable]
        return dict(Counter(run.cost_obstacle or OTHER_CONDITIONS for run in others))

    @cached_property
    def _comparable(self) -> frozenset[str]:
        """Names of the runs that were measured under the same conditions: the conditions that most rows have."""
        return _of_most_rows((run.conditions, run) for run in self.final if run.finished and run.cost_obstacle is None)


def _of_most_rows(found: Iterable[tuple[Any, Run]]) -> frozenset[str]:
    """The names of the runs in the group that most rows, then most runs have; of equal groups the first."""
    groups: dict[Any, list[Run]] = {}
    for group, run in found:
        groups.setdefault(group, []).append(run)
    most = max(groups.values(), key=lambda runs: (len({run.row for run in runs}), len(runs)), default=[])
    return frozenset(run.name for run in most)


def study_names(results: Path) -> list[str]:
    """The names of all studies that have a run."""
    return sorted(path.parent.name for path in results.glob(f"*/{RUNS}"))


def read_study(study: str, results: Path) -> Study:
    """The runs of a study, refused if unreadable, or if finished runs of one row differ in more than their seed."""
    records, planned = read_records(results / study)
    runs = tuple(map(Run, records.values()))
    _check_rows(runs)
    question = next((str(run.get("study", "question")) for run in runs if run.get("study", "question")), "")
    return Study(study, " ".join(question.split()), runs, tuple(planned))


def _check_rows(runs: Iterable[Run]) -> None:
    """The same seed twice would count as two runs, and another setting would look like another seed."""
    seen: dict[str, dict[int, Run]] = {}
    for run in runs:
        if not run.finished or run.tunes:
            continue
        seeds = seen.setdefault(run.row, {})
        for seed, earlier in seeds.items():
            both = f"{run.record.folder / RUNS}: {earlier.name} and {run.name}"
            if seed == run.seed:
                raise UserError(f"{both} are both seed {run.seed} of row {run.row}: delete the line of one")
            for key, value in run.settings.items():
                if value != earlier.settings.get(key, value):  # a flag may be newer than one of the two
                    raise UserError(f"{both} are both row {run.row} but differ in --{key}: delete the outdated line")
            texts = {each.get("texts_sha256") for each in (earlier, run)} - {None}  # earlier versions lack it
            if len(texts) > 1:
                raise UserError(f"{both} are both row {run.row} but have other texts: delete the outdated line")
            one, other = (each.get("base_model", "sha256") or {} for each in (earlier, run))
            if any(one[name] != other[name] for name in one.keys() & other.keys()):  # of files that both have
                raise UserError(f"{both} are both row {run.row} but of other base models: delete the outdated line")
        seeds[run.seed] = run
