"""Collected runs: ``results/STUDY/RUN/result.json``, and beside it ``predictions.parquet`` and ``metrics.csv``.

A run says under ``study`` which row of the table it belongs to, its seed, its place on the study's axes, and whether it
tuned (``tune``) or counts (``final``). One without that key is a row of its own, named after its folder.
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

from finetuning.comparison.statistics import mean_and_deviation
from finetuning.config import NOT_PART_OF_THE_RUN
from finetuning.errors import UserError
from finetuning.runs.files import METRICS, PLANNED, PREDICTIONS, RESULT
from finetuning.runs.records import NOT_ASKED_FOR, accuracy_interval

MISSING = "missing"  # the status of a run's folder without a result
OTHER_CONDITIONS = "of another commit, processor, number of threads or torch"


@dataclass(frozen=True)
class Predictions:
    """What a run said of its test texts, in the order of their rows: each array ``(n,)``."""

    source: str
    rows: np.ndarray
    labels: np.ndarray
    correct: np.ndarray  # bool

    @property
    def test_set(self) -> tuple[str, bytes, bytes]:
        """Equal for two runs exactly if they were tested on the same rows of one source, with the same labels."""
        return self.source, self.rows.tobytes(), self.labels.tobytes()


@dataclass(frozen=True)
class Run:
    """One run's folder and what its ``result.json`` holds."""

    folder: Path
    result: dict[str, Any]

    def get(self, *keys: str) -> Any:
        """A value of the result, ``None`` where it or anything above it is missing."""
        value: Any = self.result
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def row(self) -> str:
        return str(self.get("study", "row") or self.name)

    @property
    def tunes(self) -> bool:
        return self.get("study", "stage") == "tune"

    @property
    def seed(self) -> int:
        seed = self.get("study", "seed")
        return int((self.get("config", "seed") or 0) if seed is None else seed)

    @property
    def settings(self) -> dict[str, Any]:
        """What the runs of a row share of their configuration."""
        config = self.get("config") or {}
        return {key: value for key, value in config.items() if key not in (*NOT_PART_OF_THE_RUN, "seed", "data_dir")}

    @property
    def axes(self) -> dict[str, Any]:
        return self.get("study", "axes") or {}

    @property
    def status(self) -> str:
        return str(self.get("status") or MISSING)

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def cost_obstacle(self) -> str | None:
        """Why times and memory of this run say nothing beside another's; ``None`` where nothing is known to."""
        if self.get("environment", "alone") is not True:
            return "not known to have been alone on the machine"
        if self.get("config", "resume"):
            return "continued after an interruption, of which only the last part was watched"
        if self.get("environment", "git", "commit") is None:
            return "of no known commit"
        return "of files that differed from their commit" if self.get("environment", "git", "modified") else None

    @property
    def conditions(self) -> str:
        """What times and memory depend on beside the settings: commit, processor, threads, lacking kernels, torch."""
        keys = (("git", "commit"), ("cpu",), ("gpus",), ("threads",), ("versions", "torch"))
        kernels = str(self.get("environment", "cpu_kernels") or "")
        lacking = "" if kernels.startswith(("compiled", NOT_ASKED_FOR)) else kernels  # not to ask is a setting
        return json.dumps([lacking, *(self.get("environment", *key) for key in keys)])

    def accuracy(self, split: str) -> float | None:
        """The share of ``split`` that a finished run got right; its texts are counted, so that no float32 shows."""
        accuracy, examples = self.get(split, "accuracy"), self.get(split, "examples")
        if not self.finished or accuracy is None:
            return None
        return round(accuracy * examples) / examples if examples else float(accuracy)

    @property
    def monitor(self) -> str:
        """The metric that chose its checkpoint, and of runs that tune the learning rate."""
        return str(self.get("config", "monitor") or "accuracy")

    @property
    def monitored(self) -> float | None:
        """Its best value on validation."""
        if self.monitor == "accuracy" or not self.finished:
            return self.accuracy("validation")
        return self.get("validation", self.monitor)

    @cached_property
    def predictions(self) -> Predictions | None:
        """The test predictions; ``None`` where none were kept.

        Raises:
            UserError: the file is not what its name says, or of another run.
        """
        import pandas as pd

        path = self.folder / PREDICTIONS
        if not path.is_file():
            return None
        try:
            frame = pd.read_parquet(path, columns=["row", "label", "predicted"]).sort_values("row")
        except (OSError, ValueError) as error:  # pyarrow's errors are these too
            raise UserError(f"{path} cannot be read (columns row, label, predicted): {error}") from None
        rows, labels = frame["row"].to_numpy(np.int64), frame["label"].to_numpy(np.int64)
        correct = labels == frame["predicted"].to_numpy(np.int64)
        accuracy = self.accuracy("test")
        if len(np.unique(rows)) != len(rows) or not len(rows):
            raise UserError(f"{path}: its column row must name every test text once")
        if accuracy is not None and abs(correct.mean() - accuracy) > 0.5 / len(rows):
            raise UserError(f"{path} has an accuracy of {correct.mean():.4%}, {RESULT} beside it {accuracy:.4%}")
        return Predictions(str(self.get("data", "source")), rows, labels, correct)

    def history(self) -> list[dict[str, float]]:
        """The rows of ``metrics.csv`` without their empty cells; none where there is no such file."""
        path = self.folder / METRICS
        if not path.is_file():
            return []
        with path.open(newline="", encoding="utf8") as file:
            try:
                return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
            except (TypeError, ValueError) as error:
                raise UserError(f"{path} holds what is not a number: {error}") from None


@dataclass(frozen=True)
class Row:
    """The final runs of one row of a table, over seeds."""

    name: str
    runs: tuple[Run, ...]

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.finished]

    @property
    def tested(self) -> list[Run]:
        return [run for run in self.runs if run.accuracy("test") is not None]

    @property
    def status(self) -> str:
        """``finished``, or what became of its runs: ``2 finished, 1 failed``; one that was only tuned has none."""
        statuses = [run.status for run in self.runs]
        kinds = sorted(set(statuses), key=lambda status: (status != "finished", status))
        if not kinds:
            return "only tuned"
        return kinds[0] if len(kinds) == 1 else ", ".join(f"{statuses.count(kind)} {kind}" for kind in kinds)

    def accuracies(self, split: str = "test") -> list[float]:
        return [value for run in self.runs if (value := run.accuracy(split)) is not None]

    @property
    def interval(self) -> tuple[float | None, float | None]:
        """The 95 % interval of a single run's test accuracy; of several runs the deviation says more."""
        if len(self.tested) != 1:
            return None, None
        given, examples = (self.tested[0].get("test", key) for key in ("accuracy_ci95", "examples"))
        if given is None and examples:
            given = accuracy_interval(self.accuracies()[0], examples)
        low, high = given or (None, None)
        return low, high

    def common(self, *keys: str) -> Any:
        """A value that all finished runs share, e.g. the number of test texts; ``None`` where they differ."""
        values = {run.get(*keys) for run in self.finished}
        return values.pop() if len(values) == 1 else None

    def mean(self, *keys: str) -> float | None:
        """Of a measurement, over the finished runs; ``None`` where one of them lacks it."""
        values = [run.get(*keys) for run in self.finished]
        return fmean(values) if values and None not in values else None


@dataclass(frozen=True)
class Study:
    """All runs of ``results/STUDY``."""

    name: str
    question: str
    runs: tuple[Run, ...]
    planned: tuple[str, ...] = ()  # names of the final runs; empty where the collector did not say

    @property
    def missing(self) -> list[str]:
        """Final runs that the study plans, and of which nothing was collected."""
        collected = {run.name for run in self.runs}
        return [name for name in self.planned if name not in collected]

    @cached_property
    def rows(self) -> list[Row]:
        """The best first, by test accuracy, then those that have none by validation; without scores last."""
        names = dict.fromkeys(run.row for run in self.runs)
        rows = [Row(name, tuple(r for r in self.final if r.row == name)) for name in names]

        def order(row: Row) -> tuple[float, float, str]:
            test, validation = (mean_and_deviation(row.accuracies(split))[0] for split in ("test", "validation"))
            return -(test or 0), -(validation or 0), row.name

        return sorted(rows, key=order)

    @property
    def final(self) -> list[Run]:
        return [run for run in self.runs if not run.tunes]

    @property
    def tuning(self) -> list[Run]:
        return [run for run in self.runs if run.tunes]

    def measured(self, row: Row) -> Row:
        """The row with those runs alone whose times and memory can stand beside the other rows'."""
        return Row(row.name, tuple(run for run in row.runs if run.name in self._side_by_side))

    @cached_property
    def cost_obstacles(self) -> dict[str, int]:
        """Why times and memory of finished runs cannot stand beside the others', and of how many."""
        others = [run for run in self.final if run.finished and run.name not in self._side_by_side]
        return dict(Counter(run.cost_obstacle or OTHER_CONDITIONS for run in others))

    @cached_property
    def _side_by_side(self) -> frozenset[str]:
        """The names of the runs measured under the same conditions; of several conditions those of most rows."""
        groups: dict[str, list[Run]] = {}
        for run in self.final:
            if run.finished and run.cost_obstacle is None:
                groups.setdefault(run.conditions, []).append(run)
        most = max(groups.values(), key=lambda runs: (len({run.row for run in runs}), len(runs)), default=[])
        return frozenset(run.name for run in most)


def studies(results: Path) -> list[str]:
    """The names of all studies that have a run."""
    if not results.is_dir():
        return []
    return sorted(path.name for path in results.iterdir() if path.is_dir() and _run_folders(path))


def _run_folders(study: Path) -> list[Path]:
    return sorted(path for path in study.iterdir() if path.is_dir() and not path.name.startswith("."))


def read_study(study: str, results: Path) -> Study:
    """All runs of a study.

    Raises:
        UserError: a result that cannot be read, or finished runs of one row that do not differ in their seeds alone.
    """
    runs = tuple(Run(folder, _read_json(folder / RESULT)) for folder in _run_folders(results / study))
    _check_rows(runs)
    question = next((str(run.get("study", "question")) for run in runs if run.get("study", "question")), "")
    planned = _read_json(results / study / PLANNED).get("final", [])
    return Study(study, " ".join(question.split()), runs, tuple(planned))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        result = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(result, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(result).__name__}")
    return result


def _check_rows(runs: Iterable[Run]) -> None:
    """Twice the same seed would pass for two, and another setting for a seed."""
    seen: dict[str, dict[int, Run]] = {}
    for run in runs:
        if not run.finished or run.tunes:
            continue
        seeds = seen.setdefault(run.row, {})
        for seed, earlier in seeds.items():
            where = f"{earlier.folder} and {run.folder} are both"
            if seed == run.seed:
                raise UserError(f"{where} seed {run.seed} of row {run.row}")
            for key, value in run.settings.items():
                if value != earlier.settings.get(key, value):  # an older version may not have had it
                    raise UserError(f"{where} of row {run.row}, and differ in --{key}: remove the outdated one")
        seeds[run.seed] = run
