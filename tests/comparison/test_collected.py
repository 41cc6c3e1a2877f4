from pathlib import Path

import numpy as np
import pytest

from finetuning.comparison.collected import Row, Run, Study, read_study, study_names
from finetuning.comparison.packed import Record, change_records
from finetuning.errors import UserError
from tests.common import check_refusal, refusal_of, some
from tests.synthetic_runs import outcomes, write_run

OTHER = "another commit, processor, number of threads or torch version"


def rows(study: Study) -> dict[str, Row]:
    return {row.name: row for row in study.rows}


def test_rows_gather_final_runs_over_seeds(tmp_path: Path) -> None:
    for seed, accuracy in enumerate([0.90, 0.92]):
        write_run(tmp_path, "s", "lora", seed=seed, correct=outcomes(accuracy, 100, seed))
    write_run(tmp_path, "s", "lora", stage="tune", validation=0.99, axes={"learning_rate": 1e-2})
    write_run(tmp_path, "s", "full", correct=outcomes(0.91, 100, 7))
    study = read_study("s", tmp_path)
    assert [row.name for row in study.rows] == ["full", "lora"]  # 0.91 each: by name
    lora = rows(study)["lora"]
    assert lora.accuracies() == [0.90, 0.92]  # what float32 made of them does not show
    assert lora.accuracies("validation") == [0.9, 0.9]  # the run that tuned is not there
    assert lora.common("test", "examples") == 100
    assert lora.interval == (None, None)
    assert rows(study)["full"].interval == pytest.approx((0.8377, 0.9519), abs=1e-4)  # Wilson's, by hand
    assert len(study.tuning) == 1


def test_failed_runs_have_a_status(tmp_path: Path) -> None:
    write_run(tmp_path, "s", "some", seed=0, correct=outcomes(0.9, 50, 0))
    write_run(tmp_path, "s", "some", seed=1, status="failed")
    write_run(tmp_path, "s", "none", status="failed")
    write_run(tmp_path, "s", "tuned", stage="tune")
    found = rows(read_study("s", tmp_path))
    assert {name: row.status for name, row in found.items()} == {
        "some": "1 finished, 1 failed", "none": "failed", "tuned": "only tuned",
    }  # fmt: skip
    assert found["none"].accuracies("validation") == []  # a run that has not finished has no score


def test_the_same_seed_twice_is_refused(tmp_path: Path) -> None:
    for axis in (1, 2):
        write_run(tmp_path, "s", "lora", seed=3, axes={"lora_r": axis})
    assert "both seed 3 of row lora: delete the line of one" in refusal_of(read_study, "s", tmp_path)


def test_seeds_of_a_row_differ_in_nothing_else(tmp_path: Path) -> None:
    write_run(tmp_path, "s", "lora", config={"learning_rate": 1e-3, "output_dir": "a", "test": True})
    alike = {"learning_rate": 1e-3, "output_dir": "b", "compile": False, "test": False}
    write_run(tmp_path, "s", "lora", seed=1, config=alike)
    assert len(read_study("s", tmp_path).rows[0].runs) == 2
    write_run(tmp_path, "s", "lora", seed=2, config={"learning_rate": 1e-2})
    assert "row lora but differ in --learning_rate: delete the outdated line" in refusal_of(read_study, "s", tmp_path)


def test_predictions_are_checked_against_the_result(tmp_path: Path) -> None:
    correct = outcomes(0.8, 60, 1)
    record = write_run(tmp_path, "s", "lora", correct=correct, first_row=100)
    found = some(read_study("s", tmp_path).runs[0].predictions)
    assert np.array_equal(found.rows, np.arange(100, 160))
    assert np.array_equal(found.correct, correct)
    columns = some(record.predictions)
    swapped = [1 - label for label in columns["predicted"]]
    for other, said in (
        ({"predicted": swapped}, r"accuracy of 20\.0000%, but its result says 80\.0000%"),
        ({"row": [7] * 60}, "must name every test text once"),
        ({"row": [], "label": [], "predicted": []}, "must name every test text once"),
    ):
        change_records(tmp_path / "s", [Record.made(record.folder, record.result, None, {**columns, **other})])
        with pytest.raises(UserError, match=said):
            _ = read_study("s", tmp_path).runs[0].predictions


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, None),
        ({"alone": False}, "possibly not alone on the machine"),
        ({"alone": None}, "possibly not alone on the machine"),
        ({"cpu": "another"}, OTHER),
        ({"gpus": ["one"]}, OTHER),
        ({"cpu_kernels": "compiled for AVX512-BF16"}, None),
        ({"cpu_kernels": "not asked for"}, None),  # a setting, such as the plain forward
        ({"cpu_kernels": "no C++ compiler"}, OTHER),
        ({"threads": 1}, OTHER),
        ({"git": {"commit": "other", "modified": False}}, OTHER),
        ({"git": {"commit": "c0ffee", "modified": True}}, "code differed from its commit"),
        ({"git": None}, "unknown commit"),
        ({"versions": {"torch": "2.14"}}, OTHER),
    ],
)
def test_what_keeps_times_from_being_compared(
    tmp_path: Path, environment: dict[str, object], reason: str | None
) -> None:
    write_run(tmp_path, "s", "full", environment=environment)
    write_run(tmp_path, "s", "lora")
    write_run(tmp_path, "s", "lora", seed=1)
    write_run(tmp_path, "s", "lora", seed=2, environment=environment)
    write_run(tmp_path, "s", "selective")
    write_run(tmp_path, "s", "broken", status="failed", environment={"alone": False})  # measured nothing
    write_run(tmp_path, "s", "lora", stage="tune", environment={"alone": False})  # nor is it in the table
    study = read_study("s", tmp_path)
    assert study.cost_obstacles == ({} if reason is None else {reason: 2})
    measured = {row.name: [run.seed for run in study.measured(row).runs] for row in study.rows}
    assert measured == {
        "broken": [], "full": [] if reason else [0], "lora": [0, 1] if reason else [0, 1, 2], "selective": [0],
    }  # fmt: skip


def test_processor_time_is_that_of_the_processor_of_most_rows(tmp_path: Path) -> None:
    for row, cpu, seconds in (("a", "A", 5.0), ("b", "A", 7.0), ("b", "B", 9.0), ("c", "B", 1.0), ("d", "A", 2.0)):
        more = {"environment": {"cpu": cpu, "alone": False}, "train": {"processor_seconds": seconds}}
        write_run(tmp_path, "s", row, seed=int(cpu == "B"), **more)
    records = read_study("s", tmp_path).records
    assert {r["row"]: r["processor_seconds"] for r in records} == {"a": 5.0, "b": 7.0, "c": None, "d": 2.0}


def test_seeds_of_a_row_have_the_same_texts(tmp_path: Path) -> None:
    for seed, texts in enumerate(("x", None, "x")):
        write_run(tmp_path, "s", "lora", seed=seed, texts_sha256=texts)
    assert len(read_study("s", tmp_path).runs) == 3
    write_run(tmp_path, "s", "lora", seed=3, texts_sha256="y")
    with pytest.raises(UserError, match="lora-final-seed0 and lora-final-seed3 are both row lora but have other texts"):
        read_study("s", tmp_path)
    write_run(tmp_path, "s", "lora", seed=3, texts_sha256="x")
    for seed, weights in ((1, "x"), (2, "x"), (3, "y")):
        write_run(tmp_path, "s", "lora", seed=seed, base_model={"sha256": {"model.safetensors": weights}})
    check_refusal("seed1 and lora-final-seed3 are both row lora but of other base models", read_study, "s", tmp_path)


def test_a_continued_run_was_watched_in_part(tmp_path: Path) -> None:
    write_run(tmp_path, "s", "lora", config={"resume": True})
    (reason,) = read_study("s", tmp_path).cost_obstacles
    assert "continued after an interruption" in reason


def test_of_several_conditions_those_of_most_rows_count(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path, "s", "lora", seed=seed)
    for row in ("full", "selective"):
        write_run(tmp_path, "s", row, environment={"cpu": "another"})
    study = read_study("s", tmp_path)
    assert {row.name for row in study.rows if study.measured(row).runs} == {"full", "selective"}


def test_studies_and_questions(tmp_path: Path) -> None:
    write_run(tmp_path, "b", "lora", study={"question": "Which\n one?"})
    write_run(tmp_path, "a", "lora")
    (tmp_path / "empty").mkdir()
    (tmp_path / "summary.json").touch()
    assert study_names(tmp_path) == ["a", "b"]
    assert [read_study(name, tmp_path).question for name in "ab"] == ["", "Which one?"]
    assert study_names(tmp_path / "nowhere") == []


def test_a_history_without_its_empty_cells(tmp_path: Path) -> None:
    write_run(tmp_path, "s", "lora", curve=[0.8, 0.9])
    write_run(tmp_path, "s", "full")
    full, lora = read_study("s", tmp_path).runs
    assert full.history == []
    assert [point["validation_accuracy"] for point in lora.history if "validation_accuracy" in point] == [0.8, 0.9]
    assert set(lora.history[0]) == {"step", "epoch", "train_loss", "learning_rate", "train_seconds"}


@pytest.mark.parametrize("row", ["10,many", "10", "10,0.5,0.5"])
def test_a_history_with_something_else_than_numbers_for_its_columns_is_refused(tmp_path: Path, row: str) -> None:
    run = Run(Record.made(tmp_path / "s", {"study": {"run": "r"}}, f"step,train_loss\n{row}\n"))
    check_refusal("its metrics must be numbers", lambda: run.history)
