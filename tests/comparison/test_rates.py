"""The parabola of random trials over the learning rate, against one that made the scores."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetuning.comparison.over_sets import Grid
from finetuning.comparison.packed import change_records
from finetuning.comparison.rates import COLUMNS, LEAST_TRIALS, fitted, rates_table
from tests.synthetic_runs import grid_in, made_run, write_run

SETS = {"one": 0.9, "two": 0.8, "three": 0.7}
BEST = 2e-3  # of the parabola; LoRA's default is 1e-3


def score(level: float, rate: float, epochs: int, batch: int) -> float:
    far = math.log10(rate / BEST)
    return level - 0.05 * far**2 + 0.01 * math.log2(epochs / 5) - 0.02 * math.log2(batch / 32)


def trials(folder: Path, count: int, rates: Sequence[float] = ()) -> Grid:
    """Random trials of LoRA on three sets; with ``rates``, of these in turn."""
    generator, runs, right = np.random.default_rng(0), [], np.arange(10) < 5
    for name, level in SETS.items():
        more: dict[str, Any] = {"data_set": name, "config": {"method": "lora", "optimizer": "adamw"}}
        runs.append(made_run(folder, "s", "other", data_set=name, correct=right))
        runs.append(made_run(folder, "s", "lora", correct=right, **more))
        for number in range(count):
            rate, epochs = float(10 ** generator.uniform(-3.5, -2.3)), int(generator.choice([3, 5, 8]))
            rate = rates[number % len(rates)] if rates else rate
            batch = int(generator.choice([16, 32, 64]))
            found = score(level, rate, epochs, batch)
            axes = {"learning_rate": rate, "epochs": epochs, "batch_size": batch}
            runs.append(made_run(folder, "s", "lora", stage="tune", axes=axes, validation=found, **more))
    change_records(folder / "s", runs)
    return grid_in(folder)


def mean(cell: str) -> float:
    return float(cell.partition(" ")[0])


def test_the_fit_finds_the_parabola_in_spite_of_levels_epochs_and_batches(tmp_path: Path) -> None:
    (row,) = rates_table(trials(tmp_path, 8)).rows
    cells = dict(zip(COLUMNS, row, strict=True))
    known = [cells[name] for name in ("method", "trials", "default rate", "best rate")]
    assert known == ["lora", "24", "0.001", "0.002"]
    gain, lower = (100 * 0.05 * (math.log10(2) ** 2 - math.log10(far) ** 2) for far in (1, 4))
    assert mean(cells["validation over the default (95 %)"]) == pytest.approx(gain, abs=0.03)
    assert mean(cells["2 times"]) == pytest.approx(gain, abs=0.03)
    assert mean(cells["0.5 times"]) == pytest.approx(lower, abs=0.03)
    assert cells["0.125 times"] == "", "no trial had such a rate"


def test_the_interval_holds_the_truth_as_often_as_it_says(tmp_path: Path) -> None:
    grid = trials(tmp_path, 8)
    runs = [grid.trials[name]["lora"] for name in SETS]
    scores = {run.name: run.monitored or 0.0 for own in runs for run in own}
    truth, held, repetitions = 100 * 0.05 * math.log10(2) ** 2, 0, 100
    generator = np.random.default_rng(0)
    for _ in range(repetitions):
        for run in (run for own in runs for run in own):
            run.record.result["validation"]["accuracy"] = scores[run.name] + 0.01 * generator.standard_normal()
        fit = fitted(runs, 1e-3)
        assert fit is not None
        cell = fit.gain(math.log10(2))
        low, high = (float(part) for part in cell.partition("(")[2].rstrip(")").split(" to "))
        held += low <= truth <= high
    assert 89 <= held <= 100


def test_few_trials_say_nothing(tmp_path: Path) -> None:
    assert rates_table(trials(tmp_path, LEAST_TRIALS // 3)).rows == []


def test_as_many_trials_as_numbers_of_the_fit_say_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.comparison.test_rates.SETS", {f"set{k}": 0.9 for k in range(LEAST_TRIALS + 2)})
    assert rates_table(trials(tmp_path, 1)).rows == []


@pytest.mark.parametrize("rates", [[2e-3], [5e-4, 2e-3]])
def test_two_rates_make_no_parabola(tmp_path: Path, rates: list[float]) -> None:
    assert rates_table(trials(tmp_path, LEAST_TRIALS, rates)).rows == []


def test_rates_on_one_side_of_the_default_say_nothing_of_it(tmp_path: Path) -> None:
    (row,) = rates_table(trials(tmp_path, LEAST_TRIALS, [2e-3, 3e-3, 4e-3])).rows
    cells = dict(zip(COLUMNS, row, strict=True))
    assert cells["best rate"] == "0.002 (end of the range)"
    assert not any(cells[name] for name in COLUMNS if name.endswith("times") or "over the default" in name)


def test_a_trial_that_failed_is_not_fitted(tmp_path: Path) -> None:
    ((method, count, *fit),) = rates_table(trials(tmp_path, 8)).rows
    for name in SETS:
        write_run(tmp_path, "s", "lora", data_set=name, stage="tune", status="failed", axes={"learning_rate": 0.01})
    grid = grid_in(tmp_path)
    assert len(grid.trials["one"]["lora"]) == 9
    assert rates_table(grid).rows == [(method, f"{count}, and {len(SETS)} that failed", *fit)]


def test_a_trial_without_epochs_says_nothing_about_rates(tmp_path: Path) -> None:
    before = rates_table(trials(tmp_path, 8)).rows
    none = {"learning_rate": 0.01, "epochs": 0, "batch_size": 32}
    more: dict[str, Any] = {"config": {"method": "lora", "optimizer": "adamw"}, "validation": 0.1, "axes": none}
    write_run(tmp_path, "s", "lora", data_set="one", stage="tune", **more)
    assert rates_table(grid_in(tmp_path)).rows == before


def test_trials_that_chose_among_methods_have_no_single_default(tmp_path: Path) -> None:
    grid = trials(tmp_path, 8)
    grid.trials["one"]["lora"][0].record.result["config"]["method"] = "full"
    assert rates_table(grid).rows == []


def test_losses_are_not_taken_for_scores(tmp_path: Path) -> None:
    grid = trials(tmp_path, LEAST_TRIALS)
    assert rates_table(grid).rows
    for found in grid.trials.values():
        for runs in found.values():
            for run in runs:
                run.record.result["config"]["monitor"] = "loss"
    assert rates_table(grid).rows == []
