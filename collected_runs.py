"""Collected runs: ``results/STUDY/RUN/result.json``, and beside it ``predictions.parquet`` and ``metrics.csv``.

A run says under ``study`` which row of the table it belongs to, its seed, its place on the study's axes, and whether it
tuned (``tune``) or counts (``final``). One without that key is a row of its own, named after its folder.
"""

import csv
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from local_run_utilities import accuracy_interval
from run_config import UserError
from run_files import METRICS, PREDICTIONS, RESULT
from study_statistics import mean_and_deviation

MISSING = "missing"  # the status of a run's folder without a result


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
    def axes(self) -> dict[str, Any]:
        return self.get("study", "axes") or {}

    @property
    def status(self) -> str:
        return str(self.get("status") or MISSING)

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    def accuracy(self, split: str) -> float | None:
        """The share of ``split`` that a finished run got right; its texts are counted, so that no float32 shows."""
        accuracy, examples = self.get(split, "accuracy"), self.get(split, "examples")
        if not self.finished or accuracy is None:
            return None
        return round(accuracy * examples) / examples if examples else float(accuracy)

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

    def over_runs(self, combine: Callable[[list[float]], float], *keys: str) -> float | None:
        """``combine`` of a measurement over the finished runs; ``None`` where one of them lacks it."""
        values = [run.get(*keys) for run in self.finished]
        return combine(values) if values and None not in values else None


@dataclass(frozen=True)
class Study:
    """All runs of ``results/STUDY``."""

    name: str
    question: str
    runs: tuple[Run, ...]

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

    @cached_property
    def cost_obstacles(self) -> list[str]:
        """Why times and memory of this table's runs cannot stand side by side; nothing where they can."""
        runs = [run for run in self.final if run.finished]
        hardware = {json.dumps([run.get("environment", key) for key in ("cpu", "gpus", "threads")]) for run in runs}
        commits = {run.get("environment", "git", "commit") for run in runs}
        obstacles = {
            "not every run is known to have been alone on its machine": not all(
                run.get("environment", "alone") is True for run in runs
            ),
            "the runs are of different commits": len(commits) > 1,
            "the commit of a run is not known": None in commits,
            "a run's files differed from its commit": any(run.get("environment", "git", "modified") for run in runs),
            "the runs are of different hardware or numbers of threads": len(hardware) > 1,
        }
        return [reason for reason, holds in obstacles.items() if holds]


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
        UserError: a result that cannot be read, or two finished runs of one row and seed.
    """
    runs = tuple(Run(folder, _read_result(folder / RESULT)) for folder in _run_folders(results / study))
    _check_seeds(runs)
    question = next((str(run.get("study", "question")) for run in runs if run.get("study", "question")), "")
    return Study(study, " ".join(question.split()), runs)


def _read_result(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        result = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(result, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(result).__name__}")
    return result


def _check_seeds(runs: Iterable[Run]) -> None:
    """Twice the same seed would pass for two."""
    seen: dict[tuple[str, int], Run] = {}
    for run in runs:
        if run.finished and not run.tunes:
            earlier = seen.setdefault((run.row, run.seed), run)
            if earlier is not run:
                raise UserError(f"{earlier.folder} and {run.folder} are both seed {run.seed} of row {run.row}")
