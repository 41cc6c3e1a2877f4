"""The table of unequal classes, from synthetic runs."""

from pathlib import Path
from typing import Any

import numpy as np

from finetuning.comparison.collected import read_study
from finetuning.comparison.unequal import COLUMNS, METHOD, STUDY, unequal_table
from tests.synthetic_runs import write_run


def test_a_set_with_a_rare_class_has_its_score(tmp_path: Path) -> None:
    supports = {"even": (50, 50), "rare": (90, 10), "rarer": (95, 4, 1), "unknown": ()}
    for name, counts in supports.items():
        classes = {f"class {k}": {"f1": 0.9 - 0.1 * k, "support": n} for k, n in enumerate(counts)}
        for seed in range(2):
            more: dict[str, Any] = {"baseline": {"test": {"macro_f1": 0.6}}} if name == "rare" else {}
            test = {"macro_f1": 0.7 + 0.1 * seed} | ({"per_class": classes} if classes else {})
            for method in (METHOD, "query-value"):
                write_run(
                    tmp_path, STUDY, f"{name}-{method}", seed=seed, correct=np.arange(100) < 80 + seed, test=test,
                    config={"data_dir": f"in/{name}"}, **more,
                )  # fmt: skip
    head, _, *rows, empty, measured = unequal_table({STUDY: read_study(STUDY, tmp_path)}).splitlines()
    assert head == "| " + " | ".join(COLUMNS) + " |"
    assert rows == [
        "| rarer | 3 | 1.0 | 1 | 80.50 ± 0.71 (2) | 75.00 ± 7.07 (2) |  | 70.00 ± 0.00 (2) |",
        "| rare | 2 | 10.0 | 10 | 80.50 ± 0.71 (2) | 75.00 ± 7.07 (2) | 60.0 | 80.00 ± 0.00 (2) |",
    ]
    assert (empty, measured) == ("", "*Measured: not recorded. Code: commit c0ffee.*")


def test_classes_without_test_texts_and_texts_with_several_labels_do_not_count(tmp_path: Path) -> None:
    several = {"exact_match": 0.5}
    for name, counts, more in (("three", (90, 10, 0), {}), ("several", (90, 10), several), ("even", (50, 50), {})):
        classes = {f"class {k}": {"f1": 0.9 - 0.1 * k, "support": n} for k, n in enumerate(counts)}
        for seed, test in enumerate(({"macro_f1": 0.7, "per_class": classes} | more, {"macro_f1": 0.7})):
            for method in (METHOD, "query-value"):
                write_run(
                    tmp_path, STUDY, f"{name}-{method}", seed=seed, correct=np.arange(100) < 80, test=test,
                    config={"data_dir": f"in/{name}"},
                )  # fmt: skip
    _, _, *rows, _, _ = unequal_table({STUDY: read_study(STUDY, tmp_path)}).splitlines()
    assert [row.split(" | ")[:4] for row in rows] == [["| three", "3", "10.0", "10"]]


def test_without_the_study_the_table_is_empty() -> None:
    assert len(unequal_table({}).splitlines()) == 4
