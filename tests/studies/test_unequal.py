"""The table of unequal classes, from synthetic runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.comparison.collected import read_study
from studies.unequal import COLUMNS, METHOD, STUDY, unequal_table
from tests.synthetic_runs import write_run


def write_set(results: Path, name: str, counts: Sequence[int], scores: Sequence[dict[str, Any]], **more: Any) -> None:
    """Two runs for each of two methods, with so many test texts of each class and these scores."""
    classes = {f"class {k}": {"f1": 0.9 - 0.1 * k, "support": n} for k, n in enumerate(counts)}
    for seed, test in enumerate(scores):
        for method in (METHOD, "query-value"):
            own, correct = test | ({"per_class": classes} if classes else {}), np.arange(100) < 80 + seed
            write_run(results, STUDY, method, data_set=name, seed=seed, correct=correct, test=own, **more)


def rows_of(results: Path) -> list[str]:
    head, _, *rows, empty, measured = unequal_table({STUDY: read_study(STUDY, results)}).splitlines()
    assert head == "| " + " | ".join(COLUMNS) + " |"
    assert (empty, measured) == ("", "*Measured: not recorded. Code: commit c0ffee.*")
    return rows


def test_a_set_with_a_rare_class_has_its_score(tmp_path: Path) -> None:
    scores = [{"macro_f1": 0.7}, {"macro_f1": 0.8}]
    for name, counts in {"even": (50, 50), "rarer": (95, 4, 1), "unknown": ()}.items():
        write_set(tmp_path, name, counts, scores)
    write_set(tmp_path, "rare", (90, 10), scores, baseline={"test": {"macro_f1": 0.6}})
    assert rows_of(tmp_path) == [
        "| rarer | 3 | 1.00 | 1 | 80.50 ± 0.71 (2) | 75.00 ± 7.07 (2) |  | 70.00 ± 0.00 (2) |",
        "| rare | 2 | 10.00 | 10 | 80.50 ± 0.71 (2) | 75.00 ± 7.07 (2) | 60.0 | 80.00 ± 0.00 (2) |",
    ]


def test_classes_without_test_texts_and_texts_with_several_labels_do_not_count(tmp_path: Path) -> None:
    write_set(tmp_path, "three", (90, 10, 0), [{"macro_f1": 0.7}])
    write_set(tmp_path, "several", (90, 10), [{"macro_f1": 0.7, "exact_match": 0.5}])
    write_set(tmp_path, "even", (50, 50), [{"macro_f1": 0.7}])
    write_run(tmp_path, STUDY, METHOD, data_set="three", seed=1, correct=np.arange(100) < 80)  # it lacks its classes
    assert [row.split(" | ")[:4] for row in rows_of(tmp_path)] == [["| three", "3", "10.00", "10"]]


def test_without_the_study_the_table_is_empty() -> None:
    assert len(unequal_table({}).splitlines()) == 4
