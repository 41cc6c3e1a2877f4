from pathlib import Path
from typing import Any

import pytest

from benchmarks.abstain import RISKS, main, table


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


def test_what_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data_dir", str(tmp_path)]) == 2
    assert "has no folder ag_news" in capsys.readouterr().err
    assert main(["--data_dir", str(tmp_path), "--sets", "mine"]) == 2
    assert "--sets mine: must be one of ag_news, subj" in capsys.readouterr().err
