from typing import Any

from benchmarks.abstain import RISKS, table


def record(seed: int, wrong: int) -> dict[str, Any]:
    found: list[dict[str, Any]] = [{"risk": risk, "least": 0.9, "answered": 500, "wrong": wrong} for risk in RISKS]
    found[0] |= {"least": None, "answered": 0, "wrong": 0}
    sizes = {"validation": 950, "test": 1000}
    return {"set": "subj", "seed": seed, "accuracy": 0.9, "sizes": sizes, "found": found, "environment": {"git": None}}


def test_the_table_counts_splits_in_which_the_share_was_as_asked() -> None:
    content = table({"measurements": [record(0, 5), record(1, 15)]})
    assert "at most as asked in 5 of 6" in content
    assert "| subj, 90.0 % | 1 % | 0 of 2 |  |  |  |  |" in content
    assert "| subj, 90.0 % | 2 % | 2 of 2 | 50.0 | 2.00 | 3.00 | 1 of 2 |" in content
