import json
from pathlib import Path

import pytest

from study_report import README, learning_rates, read_study, shown_command, studies, table, with_table


def test_readme_tables_are_those_of_the_committed_runs() -> None:
    text = README.read_text(encoding="utf8")
    assert with_table(text, "learning_rates", learning_rates()) == text, "run: make tables"
    for study in studies():
        assert with_table(text, study, table(read_study(study))) == text, "run: make tables"


def test_rows_are_sorted_and_failures_stay_visible(tmp_path: Path) -> None:
    finished = {
        "status": "finished", "command": "python finetune_lora.py", "parameters": {"trainable": 1234},
    }  # fmt: skip
    runs = {
        "worse": finished | {"test": {"accuracy": 0.8, "accuracy_ci95": [0.7, 0.9]}},
        "better": finished | {"test": {"accuracy": 0.9, "accuracy_ci95": [0.85, 0.95]}},
        "broken": {"status": "failed", "command": "python finetune_lora.py --epochs 9"},
    }
    for row, run in runs.items():
        (tmp_path / "study" / row).mkdir(parents=True)
        (tmp_path / "study" / row / "result.json").write_text(json.dumps(run))
    lines = table(read_study("study", tmp_path)).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| better", "| worse", "| broken"]
    assert lines[0] == "| better | 90.00 (85.00 to 95.00) | 1,234 | `python finetune_lora.py` |"
    assert lines[2] == "| broken | failed |  | `python finetune_lora.py --epochs 9` |"


def test_commands_are_shown_without_the_places_of_one_machine() -> None:
    command = (
        "python finetune_lora.py --data_dir /data/imdb --q_lora --output_dir /tmp/x --overwrite --epochs 2 --resume"
    )
    assert shown_command(command) == "python finetune_lora.py --data_dir PATH --q_lora --epochs 2"


def test_a_text_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="no markers"):
        with_table("text", "study", "table")
