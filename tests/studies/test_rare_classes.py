"""The tables of the study of rare classes, from synthetic runs."""

from pathlib import Path

import numpy as np

from finetuning.comparison.collected import read_study
from studies.rare_classes import COLUMNS, DEFAULT, SCORES, STUDY, rare_classes_tables
from tests.synthetic_runs import write_run

GAINS = {"one": 0.02, "two": 0.04, "three": 0.06}  # of the row with weights, by set


def write_results(results: Path) -> None:
    """Weights gain macro F1 and recall of class b, and lose its precision and accuracy; class a is the larger one."""
    for name, gain in GAINS.items():
        for row, more in ((DEFAULT, 0.0), ("weights", gain)):
            rare = {"support": 10, "f1": 0.5, "recall": 0.4 + more, "precision": 0.6 - more}
            classes = {"a": {"support": 90, "f1": 0.9, "recall": 0.9, "precision": 0.9}, "b": rare}
            test, right = {"macro_f1": 0.7 + more, "per_class": classes}, np.arange(100) < 80 - 100 * more
            write_run(results, STUDY, row, data_set=name, correct=right, test=test)


def test_each_score_of_each_row_is_compared_with_the_default(tmp_path: Path) -> None:
    write_results(tmp_path)
    first, second, measured = rare_classes_tables({STUDY: read_study(STUDY, tmp_path)}).split("\n\n")
    assert first.splitlines()[2:] == [
        "| one | 70.00 | 72.00 |",
        "| three | 70.00 | 76.00 |",
        "| two | 70.00 | 74.00 |",
        "| mean of 3 sets | 70.00 | 74.00 |",
    ]
    head, _, *rows = second.splitlines()
    assert head == "| " + " | ".join(COLUMNS) + " |"
    found = {row.split(" | ")[1]: row.split(" | ")[3].split(" ")[0] for row in rows}
    assert found == dict(zip(SCORES, ("+4.00", "-4.00", "+4.00", "-4.00"), strict=True))
    assert {row.split(" | ")[0] for row in rows} == {"| weights"}
    assert measured.startswith("*Measured:")


def test_without_runs_there_is_no_table() -> None:
    assert rare_classes_tables({}) == ""
