import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from finetuning.comparison import plots
from finetuning.comparison.collected import read_study
from finetuning.comparison.packed import change_records
from finetuning.comparison.page import Plot
from finetuning.comparison.plots import FILES, _fronts, _rate_scores, _row_without, draw_plots
from tests.common import Patch
from tests.synthetic_runs import made_run, outcomes, write_run


def drawn(results: Path, study: str = "s") -> dict[str, Plot]:
    return {plot.file: plot for plot in draw_plots(read_study(study, results))}


def test_a_study_without_data_has_no_plots(tmp_path: Path) -> None:
    write_run(tmp_path, "s", "lora", status="failed")
    write_run(tmp_path, "s", "full", correct=outcomes(0.9, 100, 0))  # one point is no comparison
    assert drawn(tmp_path) == {}


def test_every_plot_where_there_is_data_for_it_and_the_same_bytes_twice(tmp_path: Path) -> None:
    for k, (rank, alpha) in enumerate([(4, 8), (8, 8), (8, 16)]):
        write_run(
            tmp_path, "s", f"r{rank}_{alpha}", correct=outcomes(0.9 + 0.01 * k, 200, k), curve=[0.8, 0.9],
            axes={"lora_r": rank, "lora_alpha": alpha}, parameters={"trainable": 1000 * rank},
        )  # fmt: skip
        for rate in (1e-3, 1e-2):
            write_run(tmp_path, "s", f"r{rank}_{alpha}", stage="tune", axes={"learning_rate": rate}, validation=0.9)
    found = drawn(tmp_path)
    assert tuple(found) == FILES
    assert [plot.png for plot in found.values()] == [plot.png for plot in drawn(tmp_path).values()]
    for plot in found.values():
        assert plot.png.startswith(b"\x89PNG")
        assert b"tEXt" not in plot.png  # neither date nor version
        assert plot.png[25] == 3  # a palette: a third of the bytes
        width, height = struct.unpack(">II", plot.png[16:24])
        assert min(width, height) > 300


def test_costs_that_may_not_be_compared_are_not_drawn(tmp_path: Path) -> None:
    for k, name in enumerate(["lora", "full"]):
        write_run(tmp_path, "s", name, correct=outcomes(0.9, 100, k), curve=[0.8], environment={"alone": k == 0})
    assert set(drawn(tmp_path)) == {"accuracy_parameters.png", "learning_curves.png"}


def test_more_rows_than_can_be_told_apart_are_the_front_and_the_best(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(plots, "STYLES", 3)
    labels: list[str] = []
    real = Axes.errorbar

    def watched(self: Axes, *given: Any, **more: Any) -> Any:
        labels.append(more["label"])
        return real(self, *given, **more)

    monkeypatch.setattr(Axes, "errorbar", watched)
    for k, (name, size) in enumerate({"best": 9, "second": 9, "third": 9, "small": 1, "worst": 5}.items()):
        right = np.arange(100) < 95 - k
        write_run(tmp_path, "s", name, correct=right, parameters={"trainable": size}, environment={"alone": False})
    (plot,) = (plot for plot in drawn(tmp_path).values() if plot.file == "accuracy_parameters.png")
    assert labels == ["best", "second", "small"]
    assert plot.caption.endswith(" Shown: 3 of 5 rows, the front and the best on the test.")


def test_a_row_far_below_does_not_flatten_the_others(tmp_path: Path, monkeypatch: Patch) -> None:
    limits: list[tuple[float, float]] = []
    set_ylim = Axes.set_ylim

    def record(self: Axes, low: float, high: float) -> object:
        limits.append((low, high))
        return set_ylim(self, low, high)

    monkeypatch.setattr(Axes, "set_ylim", record)
    for name, accuracy in {"a": 0.93, "b": 0.92, "chance": 0.5}.items():
        write_run(tmp_path, "s", name, correct=outcomes(accuracy, 1000, 0), environment={"alone": False})
    (plot,) = drawn(tmp_path).values()
    assert "Triangles: more than 10 points below the best." in plot.caption
    ((low, high),) = limits
    assert 90 < low < 92
    assert 93 < high < 94


def test_captions_say_what_is_not_drawn(tmp_path: Path) -> None:
    change_records(
        tmp_path / "s",
        [
            made_run(tmp_path, "s", f"row{k}", correct=outcomes(0.9 + k / 1e4, 1000, 0), curve=[0.5, 0.8 + k / 1e3])
            for k in range(30)
        ],
    )
    found = drawn(tmp_path)
    curves = found["learning_curves.png"].caption
    assert "the first seed of the 12 rows (of 30) that are best on the test" in curves
    untested = [made_run(tmp_path, "t", f"row{k}", curve=[0.5, 0.8 + k / 1e3]) for k in range(30)]
    change_records(tmp_path / "t", untested)
    assert "that are best on validation" in drawn(tmp_path, "t")["learning_curves.png"].caption
    assert "Triangles: more than 10 points below the best." in curves


def test_each_test_split_has_a_front_of_its_own(tmp_path: Path) -> None:
    for source, best in {"imdb": 0.93, "financial": 0.8}.items():
        for k, size in enumerate([1000, 2000]):
            correct, trainable = outcomes(best - 0.1 * k, 100, k), {"trainable": size}
            write_run(
                tmp_path, "s", f"{source}-{k}", correct=correct, parameters=trainable, config={"data_dir": source},
                environment={"alone": False},
            )  # fmt: skip
    (plot,) = drawn(tmp_path).values()
    assert "Each test split has its own front." in plot.caption
    assert _fronts(["a", "b", "b", "a"], [1, 1, 2, 2], [0.9, 0.7, 0.6, 0.95]) == [True, True, False, True]


def test_rates_are_an_axis_of_studies_that_do_not_tune(tmp_path: Path) -> None:
    for optimizer in ("lora-adam", "lora-sgd"):
        for rate in (1e-5, 1e-2):
            write_run(tmp_path, "s", f"{optimizer}-learning_rate{rate:g}", axes={"learning_rate": rate})
    scores = _rate_scores(read_study("s", tmp_path))
    assert {name: list(rates) for name, rates in scores.items()} == {
        "lora-adam": [1e-5, 1e-2], "lora-sgd": [1e-5, 1e-2],
    }  # fmt: skip
    assert set(drawn(tmp_path)) == {"learning_rates.png"}


@pytest.mark.parametrize(
    ("row", "left"),
    [
        ("lora_r8-lora_alpha16", "all"),
        ("q-lora_r8-lora_alpha16", "q"),
        ("lora_r8-lora_key-True-lora_alpha16", "lora_key-True"),
    ],
)
def test_what_axes_leave_of_a_row(tmp_path: Path, row: str, left: str) -> None:
    write_run(tmp_path, "s", row, axes={"lora_r": 8, "lora_alpha": 16.0})
    (run,) = read_study("s", tmp_path).runs
    assert _row_without(run, "lora_r", "lora_alpha") == left
