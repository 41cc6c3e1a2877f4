import shlex
from pathlib import Path
from typing import Any

import pytest

from compare_methods import RESULTS
from finetuning.comparison import tables
from finetuning.comparison.collected import Study, read_study, study_names
from finetuning.comparison.packed import change_records, read_records
from finetuning.comparison.pairs import answers, compare_rows
from finetuning.comparison.plan import shown_command
from finetuning.comparison.tables import answer_table, main_table, notes, short_table, studies_table, tuning_table
from finetuning.config import RunConfig
from finetuning.flags import from_flags
from tests.synthetic_runs import outcomes, two_studies, write_run


def cells(study: Study) -> dict[str, dict[str, str]]:
    table = main_table(study)
    return {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}


@pytest.fixture(autouse=True)
def _tests_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test splits of these runs have a hundred texts, which is few."""
    monkeypatch.setattr(tables, "FEW_TEST_TEXTS", 100)


def test_rows_over_seeds_single_runs_and_failures(tmp_path: Path) -> None:
    for seed, accuracy in enumerate([0.90, 0.92, 0.94]):
        write_run(tmp_path, "s", "three", seed=seed, correct=outcomes(accuracy, 1000, seed))
    write_run(tmp_path, "s", "single", correct=outcomes(0.9, 1000, 0))
    write_run(tmp_path, "s", "partly", seed=0, correct=outcomes(0.5, 1000, 0))
    write_run(tmp_path, "s", "partly", seed=1, status="failed")
    write_run(tmp_path, "s", "untested", validation=0.875)
    write_run(tmp_path, "s", "broken", status="failed")
    study = read_study("s", tmp_path)
    found = cells(study)
    column = "test accuracy, % (95 % interval, or ± SD)"
    assert main_table(study).columns[2] == column
    assert {name: row[column] for name, row in found.items()} == {
        "three": "92.00 ± 2.00", "single": "90.00 (87.98 to 91.71)", "partly": "50.00 (46.91 to 53.09)",
        "untested": "", "broken": "failed",
    }  # fmt: skip
    assert [row["seeds"] for row in found.values()] == ["3", "1", "1 (1 failed)", "1", ""]
    assert [row["test texts"] for row in found.values()] == ["1,000", "1,000", "1,000", "", ""]
    assert [row["validation accuracy, %"] for row in found.values()] == ["90.00"] * 3 + ["87.50", ""]
    assert found["three"]["command"] == "python finetune_lora.py --data_dir PATH --seed 0"


def test_what_others_have_reported_is_in_a_column_of_its_own(tmp_path: Path) -> None:
    write_run(tmp_path, "s", "lora", correct=outcomes(0.9, 100, 0), study={"reported": 89.71})
    write_run(tmp_path, "s", "full", correct=outcomes(0.8, 100, 0))
    found = cells(read_study("s", tmp_path))
    assert [row["reported by others, %"] for row in found.values()] == ["89.71", ""]
    write_run(tmp_path, "t", "full", correct=outcomes(0.8, 100, 0))
    table = main_table(read_study("t", tmp_path))
    assert "reported by others, %" not in table.without_empty_columns().columns
    short = short_table(read_study("s", tmp_path))
    assert short.columns == ("row", "reported by others, %", "test accuracy, %", "trainable parameters")
    assert short.rows == [("lora", "89.71", "90.00", "1,234"), ("full", "", "80.00", "1,234")]


def test_what_was_not_measured_is_empty_never_0(tmp_path: Path) -> None:
    write_run(
        tmp_path, "s", "bare", train={"seconds": None}, memory={"peak_bytes": None}, parameters={"trainable": None}
    )
    study = read_study("s", tmp_path)
    (row,) = study.records
    assert tuple(row) == (  # what a row of summary.json has
        "study", "row", "status", "reported_percent", "accuracy_mean", "accuracy_std", "accuracy_ci95_low",
        "accuracy_ci95_high", "macro_f1_mean", "seeds", "test_examples", "trainable", "train_seconds",
        "processor_seconds", "peak_memory_bytes", "validation_accuracy_mean", "command",
    )  # fmt: skip
    for key in ("accuracy_mean", "accuracy_std", "test_examples", "trainable", "train_seconds", "peak_memory_bytes"):
        assert row[key] is None
    bare = cells(study)["bare"]
    assert "0" not in "".join(bare[key] for key in ("training time, s", "peak memory, GiB", "test texts"))


def test_times_and_memory_are_those_of_the_runs_measured_alone(tmp_path: Path) -> None:
    for seed, seconds in enumerate([100.0, 110.0]):
        write_run(
            tmp_path, "s", "lora", seed=seed, train={"seconds": seconds}, memory={"peak_bytes": (1 + seed) * 2**30}
        )
    write_run(tmp_path, "s", "other")
    study = read_study("s", tmp_path)
    lora, _ = study.records
    assert (lora["train_seconds"], lora["peak_memory_bytes"]) == (105.0, 1.5 * 2**30)  # means
    assert cells(study)["lora"]["peak memory, GiB"] == "1.50"
    assert not any("Time" in note for note in notes(study))

    write_run(tmp_path, "s", "lora", seed=2, train={"seconds": 900.0}, environment={"alone": False})
    write_run(tmp_path, "s", "never alone", environment={"alone": False})
    study = read_study("s", tmp_path)
    times = {row["row"]: (row["train_seconds"], row["peak_memory_bytes"]) for row in study.records}
    assert times == {"lora": (105.0, 1.5 * 2**30), "other": (100.0, 2**30), "never alone": (None, None)}
    assert cells(study)["never alone"]["training time, s"] == ""
    note = "Time and memory exclude 2 of 5 runs: possibly not alone on the machine (2)."
    assert note in notes(study)


def test_tuning_never_counts_and_has_a_table_of_its_own(tmp_path: Path) -> None:
    for rate, accuracy in {1e-2: 0.5, 1e-4: 0.90, 1e-3: 0.91}.items():
        correct = outcomes(0.99, 100, 0) if rate == 1e-3 else None  # even if a test was read
        write_run(
            tmp_path, "s", "lora", stage="tune", validation=accuracy, correct=correct, axes={"learning_rate": rate}
        )
    write_run(tmp_path, "s", "lora", stage="tune", status="failed", axes={"learning_rate": 1.0})
    write_run(tmp_path, "s", "lora", correct=outcomes(0.8, 100, 0))
    study = read_study("s", tmp_path)
    (row,) = study.records
    assert (row["accuracy_mean"], row["seeds"]) == (0.8, 1)
    tried = "0.0001: 90.00; 0.001: 91.00; 0.01: 50.00; 1: no score"
    assert tuning_table(study).rows == [("lora", "accuracy", tried, "0.001")]


def test_rates_are_shown_with_the_metric_that_chose_among_them(tmp_path: Path) -> None:
    for monitor, scores in {"macro_f1": (0.5, 0.75), "loss": (0.5, 0.3)}.items():
        for rate, score in zip((1e-4, 1e-3), scores, strict=True):
            axes, config = {"learning_rate": rate}, {"monitor": monitor}
            write_run(tmp_path, "s", monitor, stage="tune", axes=axes, config=config, validation={monitor: score})
    assert tuning_table(read_study("s", tmp_path)).rows == [
        ("loss", "loss", "0.0001: 0.5000; 0.001: 0.3000", ""),
        ("macro_f1", "macro_f1", "0.0001: 50.00; 0.001: 75.00", ""),
    ]


def test_a_rate_at_the_edge_of_those_tried_is_noted(tmp_path: Path) -> None:
    tried = {"least": (1e-3, 1e-2), "inner": (1e-4, 1e-3, 1e-2), "most": (1e-4, 1e-3), "alone": (1e-3,)}
    for row, rates in tried.items():
        write_run(tmp_path, "s", row, correct=outcomes(0.8, 100, 0))  # at 1e-3
        for rate in rates:
            write_run(tmp_path, "s", row, stage="tune", axes={"learning_rate": rate})
    write_run(tmp_path, "s", "failed_beyond", correct=outcomes(0.8, 100, 0))
    write_run(tmp_path, "s", "failed_beyond", stage="tune", axes={"learning_rate": 1e-4})
    write_run(tmp_path, "s", "failed_beyond", stage="tune", status="failed", axes={"learning_rate": 1e-2})
    assert notes(read_study("s", tmp_path)) == [
        "The learning-rate grid was too narrow: tuning chose its largest value for most (0.001).",
        "The learning-rate grid was too narrow: tuning chose its smallest value for least (0.001).",
    ]


def test_macro_f1_has_a_column_where_it_chose(tmp_path: Path) -> None:
    for seed, score in enumerate((0.5, 0.7)):
        write_run(tmp_path, "s", "a", seed=seed, correct=outcomes(0.8, 100, seed), test={"macro_f1": score})
    assert cells(read_study("s", tmp_path))["a"]["macro F1, %"] == ""
    write_run(tmp_path, "s", "b", correct=outcomes(0.8, 100, 0), config={"monitor": "macro_f1"})
    study = read_study("s", tmp_path)
    assert [cells(study)[row]["macro F1, %"] for row in "ab"] == ["60.00", ""]
    unequal = {"few": {"support": 20}, "many": {"support": 80}}
    test = {"macro_f1": 0.6, "per_class": unequal}
    write_run(tmp_path, "t", "a", correct=outcomes(0.8, 100, 0), test=test)
    assert cells(read_study("t", tmp_path))["a"]["macro F1, %"] == "60.00", "accuracy chose, but misleads here"
    assert [record["macro_f1_mean"] for record in study.records] == [pytest.approx(0.6), None]


def test_what_has_not_run_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path, "s", "a", correct=outcomes(0.8, 100, 0)).name
    planned = [run, *(f"b-seed{seed}" for seed in range(14))]
    change_records(tmp_path / "s", [], planned[:2])
    assert notes(read_study("s", tmp_path)) == ["Not run yet (1 of 2): b-seed0."]
    change_records(tmp_path / "s", [], planned)
    (note,) = notes(read_study("s", tmp_path))
    assert note.startswith("Not run yet (14 of 15): b-seed0, b-seed1, ")
    assert note.endswith("b-seed11, and others.")
    change_records(tmp_path / "s", [], ["b-seed0"])
    assert notes(read_study("s", tmp_path))[1:] == [f"Compared here, but no longer in the study's file: {run}."]


def test_a_small_test_split_is_said_to_be_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, "s", "a", correct=outcomes(0.9, 100, 0))
    monkeypatch.undo()
    (note,) = notes(read_study("s", tmp_path))
    said = "100 test texts are few: an accuracy of 85 % is uncertain by 7 points (95 %), also where all seeds agree."
    assert note == said


def test_rows_whose_runs_differ_in_precision_are_named(tmp_path: Path) -> None:
    for seed, precision in enumerate(("bfloat16", "float32")):
        write_run(tmp_path, "s", "a", seed=seed, base_model={"precision": precision})
        write_run(tmp_path, "s", "b", seed=seed, base_model={"precision": "float32"})
    said = "Rows whose runs differ in precision, as `auto` does between machines: a."
    assert said in notes(read_study("s", tmp_path))


def test_the_best_on_validation_is_named_for_each_data_set(tmp_path: Path) -> None:
    for source, scores in {"imdb": (0.9, 0.92, 0.91), "financial": (0.8, 0.8)}.items():
        for k, score in enumerate(scores):
            data = {"source": f"{source}, test file {k % 2}"}  # in other words, as those of another version
            write_run(tmp_path, "s", f"{source}{k}", validation=score, data=data, config={"data_dir": source})
    assert notes(read_study("s", tmp_path)) == ["Best on validation: imdb1 (92.00 %)."]  # a tie names none
    for row, agreement in {"half": "50", "all": "all", "again": "all"}.items():
        config = {"dataset": "financial_phrasebank", "data_dir": "bank", "agreement": agreement}
        write_run(tmp_path, "t", row, validation=0.7 + 0.1 * (row == "half"), config=config)
    write_run(tmp_path, "t", "best", validation=0.75, config=config)
    assert notes(read_study("t", tmp_path)) == ["Best on validation: best (75.00 %)."], "half has other texts"
    for row, loss in {"sure": 0.6, "unsure": 0.5}.items():
        validation = {"accuracy": 0.9 + loss / 100, "loss": loss}
        write_run(tmp_path, "u", row, validation=validation, config={"monitor": "loss"})
    assert notes(read_study("u", tmp_path)) == ["Best on validation: unsure (loss, nats: 0.5000)."]
    write_run(tmp_path, "u", "other", validation=0.99)
    assert notes(read_study("u", tmp_path)) == [], "it was chosen by accuracy"
    write_run(tmp_path, "s", "imdb3", validation=0.99, config={"data_dir": "imdb", "data_seed": 1})
    assert notes(read_study("s", tmp_path)) == [], "another draw has other validation texts"


def test_commands_are_shown_without_the_places_of_one_machine() -> None:
    command = (
        "python finetune_lora.py --data_dir /data/imdb --q_lora --output_dir /tmp/x --overwrite --epochs 2 --resume"
    )
    assert shown_command(command) == "python finetune_lora.py --data_dir PATH --q_lora --epochs 2"
    command = "python finetune_lora.py --output_dir='a b' --data_dir=/data --text_column 'the text' --model_name=x"
    shown = "python finetune_lora.py --data_dir PATH --text_column 'the text' --model_name=x"
    assert shown_command(command) == shown


@pytest.mark.parametrize("name", study_names(RESULTS))
def test_every_recorded_command_gives_the_settings_of_its_run(name: str) -> None:
    """Defaults, and what auto chooses, may change: a command that reproduces a number states what its run used."""
    records, _ = read_records(RESULTS / name)
    assert records
    for record in records.values():
        config, stored = from_flags(shlex.split(record.result["command"])[2:]), record.result["config"]
        again = RunConfig.from_dict(stored | {"data_dir": config.data.data_dir, "resume": False}).to_dict()
        assert config.differences(again) == [], record.path
        assert None not in (config.training.epochs, config.training.batch_size, config.training.patience), record.path


def test_seeds_differ_in_the_command_that_is_not_shown(tmp_path: Path) -> None:
    options: dict[str, Any] = {"correct": outcomes(0.9, 100, 0)}
    write_run(tmp_path, "s", "lora", seed=1, **options)
    assert notes(read_study("s", tmp_path)) == []
    write_run(tmp_path, "s", "lora", seed=0, **options)
    assert notes(read_study("s", tmp_path)) == [
        "If a row has several seeds, its command is for the first one; the others differ only in `--seed`."
    ]


def test_the_answer_is_the_best_row_with_its_cost_and_how_sure_it_is(tmp_path: Path) -> None:
    write_run(tmp_path, "s", "lora", correct=outcomes(0.9, 1000, 0))
    write_run(tmp_path, "s", "full", correct=outcomes(0.5, 1000, 0))
    study = read_study("s", tmp_path)
    table = answer_table(study, answers(study, compare_rows(study)[0]))
    assert table.columns == ("best row", "test accuracy, %", "training time, s", "peak memory, GiB", "how sure")
    assert table.rows == [("lora", "90.00", "100", "1.00", "significantly better than full")]

    write_run(tmp_path, "alone", "lora", correct=outcomes(0.9, 1000, 0))
    write_run(tmp_path, "untested", "lora")
    rows = [answer_table(read_study(name, tmp_path), []).rows for name in ("alone", "untested")]
    assert rows == [[("lora", "90.00", "100", "1.00", "not compared")], []]


def test_all_studies(tmp_path: Path) -> None:
    *lines, empty, measured = studies_table(two_studies(tmp_path), "../results").splitlines()
    assert (empty, measured) == ("", "*Measured: not recorded. Code: commit c0ffee.*")
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert head[-2:] == ["rows", "seeds a row"]
    assert [(row[0], row[3], *row[-2:]) for row in rows] == [
        ("[a](../results/a/table.md)", "1,000", "2", "1; 2"),
        ("[b](../results/b/table.md)", "500", "2", "1"),
    ]
