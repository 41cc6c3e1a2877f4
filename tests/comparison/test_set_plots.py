"""Pictures of studies over data sets, from synthetic runs."""

from pathlib import Path
from typing import Any

import pytest

from finetuning.comparison import set_plots
from finetuning.comparison.packed import change_records
from finetuning.comparison.set_plots import SET_FILES, draw_set_plots, losses
from finetuning.comparison.statistics import TuningCurve, tuning_curve
from tests.synthetic_runs import grid_in, made_run, outcomes, write_run

SETS, TRIALS = ("one", "two", "three", "four"), 6


def write_grid(results: Path, seconds: bool = True, trials: int = TRIALS) -> None:
    runs = []
    for k, name in enumerate(SETS):
        for method, accuracy, cost in (("head", 0.7, 10.0), ("lora", 0.8 + 0.01 * k, 40.0)):
            train = {"processor_seconds": cost * (k + 1)} if seconds else {}
            more: dict[str, Any] = {"data_set": name, "train": train, "parameters": {"trainable": 1000}}
            runs.append(made_run(results, "s", method, correct=outcomes(accuracy, 100, k), **more))
            for i in range(trials):
                more |= {"axes": {"learning_rate": 0.1 * (i + 1)}, "validation": accuracy - 0.01 * i}
                runs.append(made_run(results, "s", method, stage="tune", **more))
    change_records(results / "s", runs)


def test_losses_to_the_best_method_of_each_set(tmp_path: Path) -> None:
    write_grid(tmp_path)
    found = losses(grid_in(tmp_path))
    assert found["lora"].tolist() == [0, 0, 0, 0]
    assert sorted(found["head"].round(6).tolist()) == pytest.approx([10, 11, 12, 13])


def test_each_picture_where_there_is_data_for_it_and_the_same_bytes_twice(tmp_path: Path) -> None:
    write_grid(tmp_path / "all")
    found, again = (draw_set_plots(grid_in(tmp_path / "all")) for _ in range(2))
    assert tuple(plot.file for plot in found) == SET_FILES[:3]
    assert [plot.png for plot in found] == [plot.png for plot in again]
    assert all(plot.png.startswith(b"\x89PNG") and plot.caption.endswith(".") for plot in found)
    write_grid(tmp_path / "few", seconds=False, trials=1)
    assert [plot.file for plot in draw_set_plots(grid_in(tmp_path / "few"))] == [SET_FILES[0]]


def test_a_failed_trial_lowers_the_curve_of_its_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[float]] = []

    def watched(scores: list[float], most: int) -> TuningCurve:
        drawn.append(scores)
        return tuning_curve(scores, most)

    monkeypatch.setattr(set_plots, "tuning_curve", watched)
    write_grid(tmp_path)
    for name in SETS:
        axes = {"learning_rate": 9}
        write_run(tmp_path, "s", "lora", data_set=name, stage="tune", status="failed", axes=axes)
        write_run(tmp_path, "s", "head", data_set=name, stage="tune", validation=0.6, axes=axes)
    assert set_plots.tuning_plot(grid_in(tmp_path)) is not None
    head, lora = drawn
    assert len(head) == len(lora) == len(SETS) * (TRIALS + 1)
    assert min(lora) < -50 < min(head)


def test_times_under_other_conditions_are_left_out(tmp_path: Path) -> None:
    write_grid(tmp_path)
    more: dict[str, Any] = {"environment": {"cpu": "Another"}, "train": {"processor_seconds": 5.0}}
    for k, name in enumerate(SETS):
        write_run(tmp_path, "s", "last-two", data_set=name, correct=outcomes(0.75, 100, k), **more)
    (plot,) = (plot for plot in draw_set_plots(grid_in(tmp_path)) if plot.file == SET_FILES[1])
    assert plot.caption.endswith("Left out, because they ran under other conditions: last-two.")
    for k, name in enumerate(SETS):  # two methods under each conditions: neither are those of most
        write_run(tmp_path, "s", "full", data_set=name, correct=outcomes(0.75, 100, k), **more)
    assert SET_FILES[1] not in [plot.file for plot in draw_set_plots(grid_in(tmp_path))]


def test_methods_without_epochs_take_no_time_to_be_compared(tmp_path: Path) -> None:
    write_grid(tmp_path)
    more: dict[str, Any] = {"train": {"processor_seconds": 0.0}}
    for k, name in enumerate(SETS):
        write_run(tmp_path, "s", "none", data_set=name, correct=outcomes(0.5, 100, k), **more)
    assert SET_FILES[1] not in [plot.file for plot in draw_set_plots(grid_in(tmp_path))]


def test_methods_with_a_number_of_texts_are_curves_over_it(tmp_path: Path) -> None:
    for k, name in enumerate(SETS[:3]):
        for texts in (50, 1000):
            for method, accuracy in (("head", 0.6), ("lora", 0.5 + 0.2 * (texts > 50))):
                correct, data = outcomes(accuracy, 100, k), {"sizes": {"train": texts}}
                write_run(tmp_path, "s", f"{texts}-{method}", data_set=name, correct=correct, data=data)
    files = [plot.file for plot in draw_set_plots(grid_in(tmp_path))]
    assert files == [SET_FILES[0], SET_FILES[3]]
