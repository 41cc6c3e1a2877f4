"""The tables of docs/budget.md, from synthetic runs."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import budget
from finetuning.flags import from_flags
from finetuning.settings import PACKAGED_DISTILBERT
from tests.synthetic_runs import ENVIRONMENT, write_run


def test_the_steps_have_a_row_for_each_budget_and_a_column_for_each_set(tmp_path: Path) -> None:
    def run(row: str, score: float, seed: int = 0, **given: Any) -> None:
        config: dict[str, Any] = {"method": "lora", "batch_size": 32, "learning_rate": 1e-3, "data_dir": row} | given
        write_run(
            tmp_path, "steps", row, seed=seed, axes=config, validation=score, train={"steps": 63 * config["epochs"]}
        )

    run("trec6", 0.91, limit_train=2000, epochs=5)
    run("trec6", 0.93, seed=1, limit_train=2000, epochs=5)
    run("emotion", 0.8, limit_train=2000, epochs=5)
    run("trec6", 0.93, limit_train=2000, epochs=10)
    run("trec6", 0.5, limit_train=250, epochs=5)
    lines = budget.steps_table(tmp_path / "steps").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:1] + lines[2:5]]
    assert rows[0][-2:] == ["emotion", "trec6"]
    assert [row[1] for row in rows[1:]] == ["250", "2,000", "2,000"]
    assert [row[-2:] for row in rows[1:]] == [["", "50.00"], ["80.00", "92.00 (2)"], ["", "93.00"]]


def test_multi_label_runs_have_the_labels_that_they_find(tmp_path: Path) -> None:
    for epochs, recalls in ((4, (0.5, 0.1, 0.0)), (2, (0.2, 0.0, 0.0))):
        axes = {"method": "lora", "limit_train": 9, "batch_size": 32, "epochs": epochs}
        write_run(tmp_path, "steps", "trec6", axes=axes | {"data_dir": "trec6"}, train={"steps": 1})
        scores = {
            "exact_match": 0.1,
            "micro_f1": 0.25 * epochs,
            "per_class": {str(i): {"recall": r} for i, r in enumerate(recalls)},
        }
        found: dict[str, Any] = {"train": {"steps": 50 * epochs}, "validation": scores}
        write_run(tmp_path, "steps", "goemotions", axes=axes | {"data_dir": "goemotions"}, **found)
    lines = budget.rare_labels_table(tmp_path / "steps").splitlines()
    assert lines[2:4] == ["| 32 | 2 | 100 | 1 of 3 | 50.00 |", "| 32 | 4 | 200 | 2 of 3 | 100.00 |"]
    assert "goemotions" not in budget.steps_table(tmp_path / "steps")


def test_defaults_have_both_budgets_in_a_row(tmp_path: Path) -> None:
    runs = ("a-b-before", 0, 0.5, 60), ("a-b-auto", 0, 0.7, 300), ("a-b-auto", 1, 0.8, 300)
    for row, seed, accuracy, steps in runs:
        test = {"accuracy": accuracy}
        write_run(tmp_path, "defaults", row, seed=seed, test=test, train={"steps": steps, "seconds": steps / 4})
    lines = budget.defaults_table(tmp_path / "defaults").splitlines()
    assert lines[2] == "| a-b | 50.00 (1) | 75.00 ± 7.07 (2) | 60 / 300 | 15 / 75 |"


def test_patience_stops_after_so_many_epochs_without_gain(tmp_path: Path) -> None:
    curve = [0.5, 0.6, 0.6, 0.55, 0.7, 0.7]
    write_run(tmp_path, "steps", "trec6", axes={"limit_train": 100}, curve=curve)
    lines = budget.patience_table(tmp_path / "steps").splitlines()[2:]
    assert lines[0] == "| fewer than 1,000 | 1 | 1 | 10.00 | 10.00 | 50 |"
    assert lines[1] == "| fewer than 1,000 | 2 | 1 | 10.00 | 10.00 | 33 |"
    assert lines[2] == "| fewer than 1,000 | 3 | 1 | 0.00 | 0.00 | 0 |"


def test_few_texts_are_means_over_draws() -> None:
    def record(kind: str, draw: int, accuracy: float) -> dict[str, Any]:
        return {"set": "trec6", "texts": 100, "draw": draw, "kind": kind, "accuracy": accuracy}

    records = [record("before", 0, 0.2), record("before", 1, 0.4), record("auto", 0, 0.7)]
    lines = budget.few_texts_table({"measurements": records, "environments": [ENVIRONMENT]}).splitlines()
    assert lines[2] == "| trec6 | 100 | 30.00 ± 14.14 (2) | 70.00 (1) |"


def test_mean_vectors_leave_padding_out_and_keep_the_ends_of_long_texts() -> None:
    folder = budget.find_folder(PACKAGED_DISTILBERT, True, "")
    texts = ["short", "a much longer text with many more tokens than the other one"]
    data = from_flags(["--offline", "--max_length", "32"]).data
    together, alone = budget.mean_vectors(texts, folder, data), budget.mean_vectors(texts[:1], folder, data)
    np.testing.assert_allclose(together[0], alone[0], atol=1e-5)
    one, other = (budget.mean_vectors([f"{'film ' * 40}{end}"], folder, data)[0] for end in ("good", "bad"))
    assert not np.allclose(one, other, atol=1e-3), "a run reads the end of a long text, too"
