"""Tables over data sets, from synthetic runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t

from finetuning.comparison.collected import read_study
from finetuning.comparison.over_sets import grid_of, headlines, over_sets
from finetuning.comparison.packed import change_records
from finetuning.comparison.report import make_section
from finetuning.comparison.statistics import bayesian_signed_rank
from finetuning.pages import Table
from tests.synthetic_runs import grid_in, made_run, write_run

ACCURACIES = {  # set -> method -> of each seed, in thousandths
    "one": {"a": (900, 910), "b": (880, 890)},
    "two": {"a": (700, 702), "b": (701, 703)},
    "three-x": {"a": (800, 820), "b": (790, 800)},
    "four": {"a": (500, 500)},
}


def results(folder: Path, accuracies: Mapping[str, Mapping[str, tuple[int, ...]]], draw: str = "") -> Path:
    runs = []
    for name, methods in accuracies.items():
        for method, scores in methods.items():
            for seed, score in enumerate(scores):
                row, right = method + (f"{draw}{seed}" if draw else ""), np.arange(1000) < score
                runs.append(made_run(folder, "s", row, data_set=name, seed=0 if draw else seed, correct=right))
    change_records(folder / "s", runs)
    return folder


def tables_of(results: Path) -> list[Table]:
    return [table for table in over_sets(grid_in(results)) if table.rows]


@pytest.mark.parametrize("draw", ["", "-data_seed"], ids=["seeds", "draws"])
def test_sets_and_pairs(tmp_path: Path, draw: str) -> None:
    grid, pairs = tables_of(results(tmp_path, ACCURACIES, draw))
    assert grid.columns == ("data set (2 runs unless noted)", "a, %", "b, %")
    assert grid.rows == [
        ("four", "50.00 ± 0.00", ""),
        ("one", "90.50 ± 0.71", "88.50 ± 0.71"),
        ("three-x", "81.00 ± 1.41", "79.50 ± 0.71"),
        ("two", "70.10 ± 0.14", "70.20 ± 0.14"),
        ("mean of 3 sets", "80.53", "79.40"),
    ]
    ((pair, sets, difference, *chances, loss),) = pairs.rows
    assert loss == "", "the runs have none"
    low, high = t.interval(0.95, 2, np.mean([2, 1.5, -0.1]), np.std([2, 1.5, -0.1], ddof=1) / np.sqrt(3))
    assert (pair, sets) == ("a - b", "3")
    assert difference == f"+1.13 ({low:+.2f} to {high:+.2f})"
    expected = bayesian_signed_rank([90.5, 81, 70.1], [88.5, 79.5, 70.2], 0.5)
    assert [int(share) for share in chances] == [
        round(100 * expected[outcome]) for outcome in ("better", "equivalent", "worse")
    ]


def test_many_methods_on_many_sets_are_split_over_tables(tmp_path: Path) -> None:
    sets = [f"set{i}" for i in range(7)]
    scores = {name: {f"m{j}": (900 + 10 * i + j,) for j in range(8)} for i, name in enumerate(sets)}
    first, second, _ = tables_of(results(tmp_path, scores))
    assert first.columns[1:] + second.columns[1:] == tuple(f"{name}, %" for name in sets)
    assert first.columns[0] == second.columns[0] == "method (1 run unless noted)"
    assert len(first.columns) == 7
    assert second.rows[3] == ("m3", "96.30")


def test_draws_of_a_row_with_an_axis_of_its_own_are_one_method(tmp_path: Path) -> None:
    runs = [
        made_run(tmp_path, "s", f"a-data_seed{draw}-lora_r{rank}", data_set=name, correct=np.arange(1000) < 900)
        for name in ("one", "two", "three") for draw in range(2) for rank in (2, 8)
    ]  # fmt: skip
    change_records(tmp_path / "s", runs)
    assert set(grid_in(tmp_path).methods) == {"a-lora_r2", "a-lora_r8"}


def test_a_pair_has_the_draws_of_the_training_texts_that_both_methods_have(tmp_path: Path) -> None:
    scores = {name: {"a": (900, 800, 100), "b": (890, 780)} for name in ("one", "two", "three")}
    folder = results(tmp_path, scores | {"four": {"a": (900,), "b": ()}}, "-data_seed")
    write_run(folder, "s", "b-data_seed1", data_set="four", correct=np.arange(1000) < 5)  # no draw of both
    _, pairs = tables_of(folder)
    assert [row[:3] for row in pairs.rows] == [("a - b", "3", "+1.50 (+1.50 to +1.50)")]


def test_the_headline_is_the_signed_rank_test_against_the_method_on_most_sets(tmp_path: Path) -> None:
    (sentence,) = headlines(grid_in(results(tmp_path, ACCURACIES)))
    chance = bayesian_signed_rank([88.5, 79.5, 70.2], [90.5, 81, 70.1], 0.5)["worse"]
    assert sentence.startswith(f"Over 3 data sets, b minus a: typically worse ({100 * chance:.0f} %); mean -1.13 (")
    assert make_section(read_study("s", tmp_path), [], []).headlines[-1] == sentence


def test_data_sets_of_the_hub_have_the_name_that_the_study_gives_them(tmp_path: Path) -> None:
    for name in ("ag", "imdb", "trec"):
        for method, score in (("a", 90), ("b", 80)):
            study = {"row": f"{name}-{method}", "run": f"{name}-{method}-seed0", "data": name}
            right = np.arange(100) < score
            write_run(tmp_path, "s", f"{name}-{method}", correct=right, study=study, config={"dataset": f"o/{name}"})
    grid, _ = tables_of(tmp_path)
    assert [row[0] for row in grid.rows] == ["ag", "imdb", "trec", "mean of 3 sets"]


def test_studies_on_few_sets_have_no_such_tables(tmp_path: Path) -> None:
    two = {name: ACCURACIES[name] for name in ("one", "two", "four")}
    assert grid_of(read_study("s", results(tmp_path, two))) is None


def test_costs_are_processor_times_with_and_without_the_trials(tmp_path: Path) -> None:
    for name, seconds in (("one", 10.0), ("two", 20.0), ("three", 60.0)):
        for method, times, trained in (("a", 1, 1000), ("b", 2, 3000)):
            more: dict[str, Any] = {"data_set": name, "parameters": {"trainable": trained}}
            more |= {"base_model": {"precision": "float32"}} if method == "a" else {}
            for seed in (0, 1):
                train = {"processor_seconds": times * (seconds + seed)}
                write_run(tmp_path, "s", method, seed=seed, correct=np.arange(10) < 5, train=train, **more)
            axes, train = {"learning_rate": 0.1}, {"processor_seconds": 5.0}
            write_run(tmp_path, "s", method, stage="tune", axes=axes, validation=0.5, train=train, **more)
    _, _, costs = tables_of(tmp_path)
    assert costs.columns[2:4] == ("training, processor s", "with its trials, processor s")
    assert costs.rows == [
        ("a", "1,000", "30", "36", "1,024", "float32", "A CPU"),
        ("b", "3,000", "61", "66", "1,024", "unknown", "A CPU"),
    ]


def test_the_time_of_trials_under_other_conditions_is_left_out(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        for method, cpu in (("a", "A CPU"), ("b", "Another")):
            more: dict[str, Any] = {"data_set": name, "train": {"processor_seconds": 5.0}}
            write_run(tmp_path, "s", method, correct=np.arange(10) < 5, **more)
            more |= {"axes": {"learning_rate": 0.1}, "environment": {"cpu": cpu}}
            write_run(tmp_path, "s", method, stage="tune", validation=0.5, **more)
    _, _, costs = tables_of(tmp_path)
    assert costs.column("with its trials, processor s") == ["10", ""]


def test_costs_of_forked_and_of_started_runs_and_those_in_eight_bits_are_told_apart(tmp_path: Path) -> None:
    common: dict[str, Any] = {"train": {"processor_seconds": 5.0}, "base_model": {"precision": "bfloat16"}}
    for name in ("one", "two", "three"):
        for method, precision in (("a", "auto"), ("b", "int8")):
            more = common | {"environment": {"forked": method == "b"}, "config": {"precision": precision}}
            write_run(tmp_path, "s", method, data_set=name, correct=np.arange(10) < 5, **more)
    _, _, costs = tables_of(tmp_path)
    assert costs.column("process") == ["started", "forked"]
    assert costs.column("precision") == ["bfloat16", "int8"]


def test_the_losses_of_a_pair(tmp_path: Path) -> None:
    for name, first, second in (("one", 0.5, 0.4), ("two", 0.6, 0.4), ("three", 0.7, 0.4)):
        for method, loss in (("a", first), ("b", second)):
            write_run(tmp_path, "s", method, data_set=name, correct=np.arange(10) < 5, test={"loss": loss})
    low, high = t.interval(0.95, 2, 0.2, 0.1 / np.sqrt(3))
    assert tables_of(tmp_path)[1].rows[0][-1] == f"+0.200 ({low:+.3f} to {high:+.3f})"


def test_many_methods_are_rows(tmp_path: Path) -> None:
    sets = {name: dict.fromkeys("abcd", (500,)) for name in ("one", "two", "three")}
    table, *_ = tables_of(results(tmp_path, sets))
    assert table.columns == ("method (1 run unless noted)", "one, %", "three, %", "two, %")
    assert table.rows[0] == ("a", "50.00", "50.00", "50.00")
    assert len(table.rows) == 4
