"""The table of choices in docs/best_practices.md, from synthetic runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetuning.comparison.collected import read_study
from finetuning.comparison.over_sets import ROPE
from finetuning.comparison.packed import change_records
from finetuning.comparison.statistics import bayesian_signed_rank
from studies import decisions
from studies.decisions import COLUMNS, Decision, decisions_table, how_sure, typical
from tests.synthetic_runs import made_run, write_run

DECISION = Decision("`--flag`", "s", "b", "a")


def table(
    folder: Path, sets: int, monkeypatch: pytest.MonkeyPatch, times: bool = True, tuned: str = "", precision: str = "x"
) -> list[str]:
    """The cells of the only row; ``b`` is two points better, a little more on later sets, and has the precision."""
    monkeypatch.setattr(decisions, "DECISIONS", (DECISION,))
    runs = []
    for number in range(sets):
        for method, right, seconds in (("a", 800, 10), ("b", 820 + number, 25)):
            more: dict[str, Any] = {"data": {"sizes": {"train": 100 + number}}, "correct": np.arange(1000) < right}
            more |= {"base_model": {"precision": precision if method == "b" else "x"}}
            more |= {"train": {"processor_seconds": seconds} if times else {}}
            runs.append(made_run(folder, "s", method, data_set=f"d{number}", **more))
            if method in tuned:
                runs.append(made_run(folder, "s", method, data_set=f"d{number}", stage="tune"))
    change_records(folder / "s", runs)
    text = decisions_table({"s": read_study("s", folder)})
    (row,) = (line for line in text.splitlines() if line.startswith("| `--flag`"))
    return [cell.strip() for cell in row.split("|")[2:-1]]


def test_a_decision_has_its_difference_costs_and_certainty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned, texts, sets, difference, outcome, time, memory, word = table(tmp_path, 9, monkeypatch)
    assert (tuned, texts, sets, time, memory) == ("", "100 to 108", "9", "2.50", "1.00")
    assert difference.startswith("+2.40 (+2.1")
    chance = bayesian_signed_rank([82 + i / 10 for i in range(9)], [80.0] * 9, ROPE)["better"]
    assert outcome == f"better, {100 * chance:.0f} %"
    assert word == "sure"


def test_an_outcome_is_typical_if_it_is_more_probable_than_not() -> None:
    assert typical({"better": 0.48, "equivalent": 0.2, "worse": 0.32}) == "unclear"
    assert typical({"better": 0.1, "equivalent": 0.5, "worse": 0.4}) == "equivalent, 50 %"


def test_tuned_is_a_pair_whose_methods_both_had_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert table(tmp_path / "both", 3, monkeypatch, tuned="ab")[0] == "both"
    assert table(tmp_path / "one", 3, monkeypatch, tuned="b")[0] == ""


def test_costs_in_another_precision_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert table(tmp_path / "same", 3, monkeypatch)[5:7] == ["2.50", "1.00"]
    assert table(tmp_path / "other", 3, monkeypatch, precision="y")[5:7] == ["", ""]


def test_memory_of_forked_and_of_started_runs_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert table(tmp_path, 3, monkeypatch)[6] == "1.00"
    for number in range(3):
        more: dict[str, Any] = {"environment": {"forked": True}, "train": {"processor_seconds": 9}}
        more |= {"data": {"sizes": {"train": 100 + number}}, "base_model": {"precision": "x"}}
        write_run(tmp_path, "s", "b", data_set=f"d{number}", correct=np.arange(1000) < 820, **more)
    assert "|  |  | open |" in decisions_table({"s": read_study("s", tmp_path)})


def test_a_ratio_is_over_the_sets_where_both_ran_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert table(tmp_path, 4, monkeypatch)[5] == "2.50"
    more: dict[str, Any] = {"base_model": {"precision": "y"}, "train": {"processor_seconds": 999}}
    more |= {"data": {"sizes": {"train": 100}}}
    write_run(tmp_path, "s", "b", data_set="d0", correct=np.arange(1000) < 820, **more)
    assert " | 2.50 | " in decisions_table({"s": read_study("s", tmp_path)})


def test_few_sets_leave_it_open_and_missing_times_are_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = table(tmp_path, 4, monkeypatch, times=False)
    assert cells[5] == ""
    assert cells[-1] == "open"


def test_what_no_study_has_yet_stays_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert table(tmp_path, 2, monkeypatch) == [*[""] * (len(COLUMNS) - 2), "not run yet"]


def test_how_sure_needs_sets_and_probability() -> None:
    words = [how_sure(*each) for each in ((0.95, 8), (0.94, 14), (0.79, 14), (1.0, 7))]
    assert words == ["sure", "likely", "open", "open"]
