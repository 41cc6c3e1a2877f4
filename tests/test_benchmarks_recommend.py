"""What a recommender loses on a data set that it has not seen, from synthetic runs."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import recommend
from compare_methods import ROOT
from finetuning.comparison.over_sets import Grid
from tests.common import refusal_of
from tests.synthetic_runs import grid_in, write_run

# Data set -> classes, and of each method the right ones of 1,000 test texts and the validation score. With few classes
# "a" is best, with many "b".
SETS = {
    "few1": (2, {"a": (900, 0.8), "b": (880, 0.9)}),
    "few2": (3, {"a": (800, 0.8), "b": (785, 0.7)}),
    "many1": (90, {"a": (500, 0.5), "b": (540, 0.6)}),
    "many2": (100, {"a": (600, 0.5), "b": (660, 0.6)}),
}


def grid(folder: Path, sets: dict[str, Any]) -> Grid:
    for name, (classes, methods) in sets.items():
        data = {"sizes": {"train": 100}, "tokens": {"train": 2000}, "label_names": [str(i) for i in range(classes)]}
        for method, (right, score) in methods.items():
            more: dict[str, Any] = {"config": {"data_dir": f"in/{name}"}, "data": data}
            write_run(folder, "s", f"{name}-{method}", correct=np.arange(1000) < right, **more)
            axes = {"learning_rate": 0.1}
            write_run(folder, "s", f"{name}-{method}", stage="tune", axes=axes, validation=score, **more)
    return grid_in(folder)


def test_each_set_is_chosen_for_without_its_own_test_scores(tmp_path: Path) -> None:
    found = grid(tmp_path, SETS)
    rows = {row[0]: row[1:] for row in recommend.table(found, {}).rows}
    assert rows["always a"][0].startswith("2.50 (")
    assert rows["always a"][1:] == ("6.00", "2 of 4")
    assert rows["always b"][0].startswith("0.88 (")
    assert rows["always b"][1:] == ("2.00", "2 of 4")
    assert rows["best on the other sets"][0].startswith("0.88 ("), "without one set, b is still the best on average"
    assert rows["nearest set"] == ("0.00 (0.00 to 0.00)", "0.00", "4 of 4")
    assert rows["3 nearest sets"] == rows["best on the other sets"], "with four sets these are all others"
    assert rows["validation, after all trials of all methods"][1] == "2.00", "it takes b for few1"


def test_a_method_on_few_sets_is_left_out(tmp_path: Path) -> None:
    classes, scores = SETS["few1"]
    found = grid(tmp_path, SETS | {"few1": (classes, {**scores, "c": (950, 0.9)})})
    rows = {row[0]: row[1:] for row in recommend.table(found, {}).rows}
    assert "always c" not in rows
    assert rows["always a"][1:] == ("6.00", "2 of 4")


def test_too_few_sets_are_one_line(tmp_path: Path) -> None:
    found = grid(tmp_path, {name: SETS[name] for name in ("few1", "few2", "many1")})
    assert "3 data sets have runs of all methods: must be over 3" in refusal_of(recommend.table, found, {})


def test_the_default_counts_where_it_ran_on_the_same_texts(tmp_path: Path) -> None:
    found = grid(tmp_path / "methods", SETS)
    default = {name: {"all": (905, 0.0), "query-value": (700, 0.0)} for name in SETS}
    ran = grid(tmp_path / "placement", {name: (SETS[name][0], own) for name, own in default.items()})
    scores = recommend.default_scores(found, ran)
    rows = {row[0]: row[1:] for row in recommend.table(found, scores).rows}
    assert rows["the default command"][1:] == ("-0.50", "4 of 4", "", ""), "it can be better than all methods"
    assert rows["the default before: query and value"][1:] == ("20.00", "2 of 4", "-20.50 (-20.50 to -20.50)", "")
    assert rows["always a"][-1] == "-20.50 (-49.55 to +8.55), 4 sets"
    del scores["the default command"]["few1"]
    rows = {row[0]: row[1:] for row in recommend.table(found, scores).rows}
    assert "the default command" not in rows
    assert rows["always a"][-1].endswith(", 3 sets"), "the method's gain over it needs only the sets of both"


def test_sets_that_nobody_chose_on_are_chosen_for_by_the_other_study(tmp_path: Path) -> None:
    def methods(lora: int, full: int, head: int, names: tuple[str, ...]) -> dict[str, tuple[int, float]]:
        return dict(zip(names, ((lora, 0.0), (full, 0.0), (head, 0.0)), strict=True))

    seen, there = ("lora-all", "full", "head-mean"), ("lora", "full", "head-mean")
    few, many = (900, 800, 700), (500, 400, 600)  # with few classes LoRA is best, with many the head
    old = {name: (count, methods(*(few if count < 9 else many), seen)) for name, (count, _) in SETS.items()}
    new = {
        "new1": (3, methods(800, 810, 700, there)),
        "new2": (95, methods(500, 510, 480, there)),
        "new3": (2, methods(910, 900, 800, there)),
    }
    rows = recommend.unseen_table(grid(tmp_path / "old", old), grid(tmp_path / "new", new)).rows
    found = {row[0]: row[1:] for row in rows}
    assert found["always lora-all"] == ("0.67 (-0.77 to 2.10)", "1.00", "3 of 3", "")
    assert found["always full"][1:3] == ("1.00", "3 of 3")
    assert found["nearest set"][1:3] == ("3.00", "2 of 3"), "the head for 95 classes, LoRA for 2 and 3"
    assert found["nearest set"][3].startswith("-0.67 ("), "two points less on one of three"


def test_the_page_has_the_tables_of_the_collected_runs() -> None:
    page = (ROOT / "docs" / "data_sets.md").read_text(encoding="utf8")
    for text in recommend.sections().values():
        table = text.partition("\n\n")[0]  # what else it says tells when the runs were made
        assert table in page, "python -m benchmarks.recommend"
