import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetuning.runs import records
from finetuning.runs.messages import baseline_lines, called, command_line, folds_line, largest_class_line
from finetuning.runs.records import BaselineRecord, accuracy_interval
from tests.common import ROOT


def test_wilson_interval() -> None:
    # by hand, z = 1.96: centre (0.8 + 3.8416 / 200) / 1.038416 = 0.78890,
    # spread 1.96 / 1.038416 * sqrt(0.16 / 100 + 3.8416 / 40000) = 0.07773
    assert accuracy_interval(0.8, 100) == pytest.approx((0.71117, 0.86663), abs=1e-4)
    low, high = accuracy_interval(0.5, 400)
    assert low + high == pytest.approx(1)
    assert accuracy_interval(1.0, 10) == pytest.approx((1 / (1 + 1.959964**2 / 10), 1.0))
    assert accuracy_interval(0.0, 10) == pytest.approx((0.0, 1 - 1 / (1 + 1.959964**2 / 10)))
    assert accuracy_interval(0.9, 25_000)[1] - accuracy_interval(0.9, 25_000)[0] < 0.008


def test_the_record_of_the_test_brings_the_interval_of_its_accuracy() -> None:
    record = records.scores_record({"accuracy": 0.8, "loss": 0.4}, examples=100, seconds=2.5)
    interval = list(accuracy_interval(0.8, 100))
    assert record == {"accuracy": 0.8, "loss": 0.4, "accuracy_ci95": interval, "examples": 100, "seconds": 2.5}


def test_the_folds_of_a_run_are_shown_as_those_of_its_baseline() -> None:
    own, same = ({"mean": {"accuracy": value, "macro_f1": 0.5, "loss": 0.4}} for value in (0.75, 0.7))
    result: dict[str, Any] = {"validation": {"examples": 72}, "kfold": {"epochs": 9, "same_epoch": same, **own}}
    first, second = folds_line(result, "accuracy", False)
    assert first == "run         mean of the folds, after 9 epochs in each"
    assert second == f"{'':12}out of fold accuracy 70.00%   macro F1 50.00%   loss 0.4000   72 texts"
    result["kfold"]["same_epoch"] = None
    first, second = folds_line(result, "accuracy", False)
    assert first.endswith("each after its best epoch")
    assert "accuracy 75.00%" in second
    assert not folds_line({"validation": {}}, "accuracy", False)


def test_the_baseline_is_shown_by_split_and_says_what_it_was_trained_on() -> None:
    validation, test = ({"accuracy": value, "macro_f1": 0.5, "loss": 0.4, "examples": 1200} for value in (0.7, 0.852))
    baseline = BaselineRecord(name="words", texts=60, seconds=1.0, validation=validation)
    scores = "accuracy 70.00%   macro F1 50.00%   loss 0.4000   1,200 texts"
    assert baseline_lines(baseline, 60, "accuracy", False) == ["baseline    words", f"{'':12}validation  {scores}"]
    first, second = baseline_lines(baseline, None, "accuracy", False)
    assert first == "baseline    words, mean of the folds"
    assert second == f"{'':12}out of fold {scores}"
    baseline["test"] = test
    first, second, third = baseline_lines(baseline, 9000, "macro_f1", True)
    assert first == "baseline    words, trained on 60 of 9,000 texts to take little time"
    assert second.startswith("            validation  exact match 70.00%   macro F1 50.00%")
    assert third.startswith("            test        exact match 85.20%   macro F1 50.00%")


def test_the_largest_class_is_shown_if_there_is_one() -> None:
    scores = {"per_class": {"a": {"support": 5}, "b": {"support": 3}}, "examples": 8}
    score = "62.50%, with a macro F1 of 38.46%"  # F1 of the two classes: 2 * 5 / (5 + 8) and 0
    shown = f"{'':12}on test, always answering the largest class is right for {score}"
    assert largest_class_line("test", scores) == [shown]
    unseen = {"per_class": {**scores["per_class"], "c": {"support": 0}}, "examples": 8}  # type: ignore[dict-item]
    assert largest_class_line("test", unseen) == [shown]
    assert largest_class_line("test", scores | {"exact_match": 0.5}) == [], "of a multi-label run"


def test_a_command_is_recorded_as_it_can_be_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "venv" / "bin" / "finetune-lora"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", "")
    assert command_line([str(program), "--epochs", "1"]) == "venv/bin/finetune-lora --epochs 1"
    monkeypatch.setenv("PATH", str(program.parent))
    assert command_line([str(program), "--epochs", "1"]) == "finetune-lora --epochs 1"
    assert command_line([str(tmp_path / "finetune_lora.py"), "-x"]) == "python finetune_lora.py -x"
    words = [f"--data_dir={tmp_path}/a b", f"/mnt{tmp_path}/c", f"{tmp_path}/d"]  # only its beginning is this folder
    shown = f"python finetune_lora.py '--data_dir=a b' /mnt{tmp_path}/c d"
    assert command_line(["finetune_lora.py", *words]) == shown


def test_a_command_is_called_as_it_is_installed_or_as_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert called("predict", ROOT / "runs/my run") == "python predict.py 'runs/my run'"
    (tmp_path / "python").unlink()
    assert called("lora", "--resume").endswith("/python finetune_lora.py --resume"), "not python, which is another one"
    (tmp_path / "finetune-compare").touch(mode=0o755)
    assert called("compare", "tune", "--resume") == "finetune-compare tune --resume"


def test_what_was_trained_counts_in_epochs() -> None:
    class Batches(list[int]):
        tokens_per_epoch = 3000

    trainer = SimpleNamespace(fit_loop=SimpleNamespace(total_batch_idx=19), global_step=5)
    meter = SimpleNamespace(train_seconds=4.0, processor_seconds=8.0)
    record = records.train_record(trainer, meter, Batches(range(10)), 100)
    assert (record["batches"], record["steps"], record["epochs"]) == (20, 5, 2.0)
    assert (record["examples_per_second"], record["tokens_per_second"]) == (50.0, 1500.0)


def test_a_run_that_continues_has_the_same_classes_in_the_same_order() -> None:
    first, second = (
        records.data_hashes(SimpleNamespace(label_names=names, pool=None), {}) for names in (["a", "b"], ["b", "a"])
    )
    assert first != second
