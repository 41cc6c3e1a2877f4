"""The baselines on the sets of a study, with small real texts."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks import sets_baselines
from benchmarks.budget import FROZEN
from compare_methods import ROOT
from finetuning.comparison.baselines import NAME
from finetuning.comparison.over_sets import Grid
from finetuning.comparison.plan import PlannedRun
from finetuning.flags import from_flags
from tests.synthetic_runs import grid_in, write_run


def test_the_study_has_texts_and_trials_for_every_set() -> None:
    runs, trials = sets_baselines.cells_of(ROOT / "studies" / "methods_on_sets.toml")
    assert len(runs) == len({cell.set for cell in runs}) == 14
    assert trials == 6
    default, _ = sets_baselines.cells_of(ROOT / "studies" / "placement.toml")
    methods, placement = (
        {cell.set: from_flags(run.flags(Path())).data for cell, run in found.items()} for found in (runs, default)
    )
    assert methods == placement


def test_both_baselines_learn_the_words_and_validation_chooses(tmp_path: Path) -> None:
    generator = random.Random(0)
    rows = [
        (f"a {generator.choice(words)} film about {generator.randrange(99)} dogs {i}", label)
        for i in range(150)
        for words, label in ((("superb", "lovely"), "good"), (("dull", "tedious"), "bad"))
    ]
    (tmp_path / "films").mkdir()
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(tmp_path / "films" / "train.csv", index=False)
    settings = {"dataset": "text", "data_dir": "films", "model_name": "packaged", "max_length": 32}
    run = PlannedRun("films-a-seed0", "films-a", "final", settings)
    known: sets_baselines.Known = {}
    found = sets_baselines.measure(run, 3, tmp_path, known)
    assert [record["baseline"] for record in found] == [NAME, FROZEN]
    for record in found:
        assert record["accuracy"] > 0.9
        assert sets_baselines.LEAST < record["C"] < sets_baselines.MOST
    assert len(known) == len(rows)
    assert found == sets_baselines.measure(run, 3, tmp_path, known), "with known vectors"


def test_of_equal_scores_the_strongest_regularization_is_chosen() -> None:
    x, y = np.array([[0.0], [1.0]] * 20), np.array([0, 1] * 20)
    features, labels = (dict.fromkeys(("train", "validation", "test"), values) for values in (x, y))
    record = sets_baselines.chosen("a", features, labels, 5)
    again = sets_baselines.chosen("a", features, labels, 1)
    assert record["accuracy"] == record["validation"] == 1
    assert record["C"] <= again["C"]


def default_runs(folder: Path, sets: dict[str, tuple[int, int]]) -> Grid:
    """Runs of the default command: data set -> right ones of 1,000 test texts, classes."""
    for name, (right, classes) in sets.items():
        data = {"sizes": {"train": 2000}, "tokens": {"train": 24_000}, "label_names": [str(i) for i in range(classes)]}
        for method in ("all", "query-value"):
            config = {"data_dir": f"in/{name}"}
            write_run(folder, "s", f"{name}-{method}", correct=np.arange(1000) < right, config=config, data=data)
    return grid_in(folder)


def test_the_table_has_sizes_and_the_default_command(tmp_path: Path) -> None:
    records = [
        {"set": name, "texts": 0, "draw": 0, "baseline": kind, "accuracy": accuracy}
        for name, accuracies in (("a", (0.7, 0.85)), ("b", (0.5, 0.75)))
        for kind, accuracy in zip((NAME, FROZEN), accuracies, strict=True)
    ]
    result = {"measurements": records, "environment": {}}
    others = {"c": (900, 2), "d": (900, 2)}
    for default in (None, default_runs(tmp_path / "lacks", {"a": (860, 2)} | others)):
        text = sets_baselines.table(result, default)
        assert f"| data set | {NAME}, % | {FROZEN}, % |" in text
        assert "| a | 70.00 | 85.00 |\n| b | 50.00 | 75.00 |\n| mean of 2 sets | 60.00 | 80.00 |" in text
        assert "the default command" not in text, "it was not given, or lacks a set"
    text = sets_baselines.table(result, default_runs(tmp_path, {"a": (860, 6), "b": (740, 2)} | others))
    assert f"| data set | classes | texts | tokens, cut | {NAME}, % | {FROZEN}, % |" in text
    assert "| b | 2 | 2,000 | 12 | 50.00 | 75.00 | 74.00 |\n| a | 6 | 2,000 | 12 | 70.00 | 85.00 | 86.00 |" in text
    assert "| mean of 2 sets |  |  |  | 60.00 | 80.00 | 80.00 |" in text
    assert f"the default command - {FROZEN}: +0.00 (-12.71 to +12.71) points; better on 1 of 2 sets." in text


def test_lora_is_better_from_the_first_number_of_texts_after_the_last_defeat() -> None:
    words = [sets_baselines.better_from(dict(zip((50, 100, 2000), gains, strict=True)))
             for gains in ((1, 2, 3), (-1, 2, 3), (1, -2, 3), (1, 2, 0))]  # fmt: skip
    assert words == ["50 or fewer", "over 50, at most 100", "over 100, at most 2,000", "not up to 2,000"]


def test_gains_over_the_frozen_model_are_means_over_draws(tmp_path: Path) -> None:
    few = {"measurements": [
        {"set": "a", "texts": 100, "draw": draw, "kind": kind, "accuracy": accuracy}
        for draw, pair in enumerate(((0.7, 0.72), (0.8, 0.72)))
        for kind, accuracy in zip(("auto", FROZEN), pair, strict=True)
    ], "environments": []}  # fmt: skip
    whole = {"measurements": [{"set": name, "baseline": FROZEN, "accuracy": 0.85} for name in "abc"], "environment": {}}
    default = default_runs(tmp_path, dict.fromkeys("abc", (860, 2)))
    for draw in range(2):
        axes = {"data_dir": "a", "data_seed": draw}
        for name in "abc":
            for method in sets_baselines.WITH_FEW_TEXTS.values():
                row, right = f"{name}-50-{method}-data_seed{draw}", np.arange(1000) < 500 + 100 * draw
                write_run(tmp_path / "few", "s", row, correct=right, axes=axes | {"data_dir": name})
    runs = grid_in(tmp_path / "few")
    known = {"set": "a", "texts": 50, "baseline": FROZEN}
    frozen = [known | {"draw": draw, "accuracy": 0.5 + 0.14 * draw} for draw in (0, 1)]
    text = sets_baselines.crossing_table(few, {"measurements": frozen, "environment": {}}, runs, whole, default)
    assert "| a | -2.00 | +3.00 | +1.00 | over 50, at most 100 |" in text


def drawn(*cells: tuple[str, int, float], step: float = 0.1) -> dict[str, Any]:
    """Both baselines with two draws: of each set and number of texts the accuracies X and X + ``step``."""
    records = [
        {"set": name, "texts": texts, "draw": draw, "baseline": kind, "accuracy": accuracy + step * draw}
        for name, texts, accuracy in cells
        for draw in (0, 1)
        for kind in (NAME, FROZEN)
    ]
    return {"measurements": records, "environment": {}}


def test_draws_of_one_number_of_texts_have_their_mean() -> None:
    assert "| a | 55.00 | 55.00 |" in sets_baselines.table(drawn(("a", 200, 0.5), ("b", 400, 0.5)), None)


def test_several_numbers_of_texts_are_rows_with_their_draws() -> None:
    text = sets_baselines.table(drawn(("a", 0, 0.8), ("a", 50, 0.5)), None)
    assert f"| 50 | {NAME} | 55.00 ± 7.07 (2) |" in text
    assert text.index("| 50 |") < text.index(f"| all | {FROZEN} | 85.00 ± 7.07 (2) |")


def test_few_texts_have_the_baselines_beside_the_runs_and_the_mean_of_the_sets(tmp_path: Path) -> None:
    for name, classes in (("a", 6), ("b", 2), ("c", 3)):
        data = {"sizes": {"train": 50}, "tokens": {"train": 500}, "label_names": [str(i) for i in range(classes)]}
        for draw in range(2):
            for i, method in enumerate(sets_baselines.WITH_FEW_TEXTS.values()):
                right = np.arange(1000) < 500 + 100 * i
                row, axes = f"{name}-50-{method}-data_seed{draw}", {"data_dir": name, "data_seed": draw}
                write_run(tmp_path, "s", row, correct=right, axes=axes, data=data)
    records = drawn(*((name, 50, 0.4) for name in "abc"), step=0.02)
    lines = sets_baselines.few_texts_table(records, grid_in(tmp_path)).splitlines()
    assert lines[0].endswith(
        "| TF-IDF, % | frozen model, % | default, % | default on the mean, % | head on the mean, % |"
    )
    cells = "41.00 ± 1.41 (2) | 41.00 ± 1.41 (2) | 50.00 ± 0.00 (2) | 60.00 ± 0.00 (2) | 70.00 ± 0.00 (2) |"
    assert lines[2:5] == [f"| {name} | {classes} | 50 | {cells}" for name, classes in (("b", 2), ("c", 3), ("a", 6))]
    assert lines[5] == "| mean of 3 sets |  | 50 | 41.00 | 41.00 | 50.00 | 60.00 | 70.00 |"
