"""Runs with ``--kfold``, from end to end: the folds, the final classifier, interruptions, refusals."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file

from benchmarks.tiny import write_reviews, write_splits
from finetune_lora import main
from finetuning.export.command import main as export
from finetuning.flags import from_flags
from finetuning.materials import find_materials
from finetuning.prediction.command import main as predict
from finetuning.runs.answers import Answers, Rule
from finetuning.runs.files import ADAPTER, PREDICTIONS, read_result
from finetuning.runs.finished import read_finished, read_own_answers
from finetuning.runs.history import write_metrics
from finetuning.runs.messages import TO_REPORT, TUNED, called, same_epoch_lines
from finetuning.runs.records import accuracy_interval, data_hashes
from finetuning.runs.scores import mean_interval
from finetuning.steps import claim, folds, read_inputs
from finetuning.steps.folds import _record, means, time_left
from finetuning.training.callbacks import Meter
from finetuning.training.tasks import MultiLabel
from tests.common import Capture, Patch, config_of_flags, flags, some

pytestmark = pytest.mark.xdist_group("folds")  # in one process: the whole run is made once
Words = Callable[..., list[str]]
FILES = {
    "result.json", "settings.json", "adapter_model.safetensors", "adapter_config.json", "predictions.parquet",
    "metrics.csv", "learning_curve.png", "last.ckpt",
}  # fmt: skip


@pytest.fixture(scope="module")
def few_reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("few"), train=40, test=20)


@pytest.fixture(scope="module")
def words(distilbert: Path, few_reviews: Path) -> Words:
    """A function: the directory, and more flags -> the flags of a run with two folds."""
    own = "--learning_rate 0.01 --dropout 0.1 --epochs 4 --patience auto --report True --kfold 2"

    def given(output: Path, *more: str, data: Path = few_reviews) -> list[str]:
        return flags(distilbert, data, output, *own.split(), *more)

    return given


@pytest.fixture(scope="module")
def finished(words: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing has interrupted."""
    output = tmp_path_factory.mktemp("finished") / "run"
    assert main(words(output)) == 0
    return output


def predictions(directory: Path) -> dict[int, tuple[Any, list[float]]]:
    """Row of validation -> label or labels, and logits."""
    table = pq.read_table(directory / PREDICTIONS)
    part = table.filter(np.array(table["split"].to_pylist()) == "validation").to_pydict()
    found = dict(zip(part["row"], zip(part["label"], part["logits"], strict=True), strict=True))
    assert len(found) == len(part["row"])
    return found


def test_a_run_leaves_its_folds_and_a_final_classifier(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == FILES | {"report.html", "folds"}
    assert [path.name for path in sorted((finished / "folds").iterdir())] == ["1", "2"]
    result, folds = read_result(finished), [read_result(finished / "folds" / name) for name in "12"]
    for number, fold in enumerate(folds, start=1):
        assert {path.name for path in (finished / "folds" / str(number)).iterdir()} == FILES
        assert (fold["config"]["kfold"], fold["config"]["fold"]) == (2, number)
        assert fold["data"]["sizes"] == {"train": 20, "validation": 20, "test": 20}
        assert fold["validation"]["examples"] == 20
        assert 1 <= fold["validation"]["epoch"] <= 4
        assert "test" not in fold
    assert result["data"]["sizes"] == {"train": 40, "test": 20}
    assert (result["config"]["kfold"], result["config"]["fold"]) == (2, None)
    assert result["config"]["epochs"] == 4
    epochs = max(fold["validation"]["epoch"] for fold in folds)  # of two, the median is the higher one
    assert result["train"]["epochs"] == result["kfold"]["epochs"] == epochs
    assert result["train"]["steps"] == 5 * epochs
    assert result["test"]["examples"] == 20
    for name in ("accuracy", "macro_f1", "loss"):
        values = [fold["validation"][name] for fold in folds]
        assert [fold[name] for fold in result["kfold"]["folds"]] == values
        assert result["kfold"]["mean"][name] == pytest.approx(np.mean(values))
    histories = [pd.read_csv(finished / "folds" / name / "metrics.csv").query(f"epoch == {epochs}") for name in "12"]
    accuracies = [history["validation_accuracy"].dropna().item() for history in histories]
    assert result["kfold"]["same_epoch"]["accuracy"] == pytest.approx(np.mean(accuracies))
    assert result["kfold"]["same_epoch"]["accuracy_ci95"][0] < np.mean(accuracies)
    assert result["kfold"]["seconds"] == pytest.approx(sum(fold["seconds"] for fold in folds))


def test_the_folds_predictions_are_the_validation_of_the_run(finished: Path) -> None:
    result, out_of_fold = read_result(finished), predictions(finished)
    assert sorted(out_of_fold) == list(range(40))
    of_folds = [predictions(finished / "folds" / name) for name in "12"]
    assert out_of_fold == of_folds[0] | of_folds[1]
    right = [int(np.argmax(logits)) == label for label, logits in out_of_fold.values()]
    assert result["validation"]["accuracy"] == pytest.approx(np.mean(right))
    assert result["validation"]["accuracy_ci95"] == pytest.approx(accuracy_interval(float(np.mean(right)), 40))
    assert result["validation"]["loss"] == pytest.approx(result["kfold"]["mean"]["loss"], abs=1e-5)
    assert sum(map(sum, result["validation"]["confusion_matrix"])) == 40


def test_the_final_run_has_the_learning_rates_of_the_folds(finished: Path) -> None:
    """The schedule is the one of all epochs: 20 steps here, and 12 in a fold."""
    steps = 5 * read_result(finished)["kfold"]["epochs"]
    history = pd.read_csv(finished / "metrics.csv")
    rates = dict(zip(history["step"], history["learning_rate"], strict=True))
    falling = {step: 0.01 * (21 - step) / 18 for step in range(3, steps + 1)}
    assert rates == pytest.approx({1: 0.0, 2: 0.005} | falling), "those with which the steps were made"


def test_what_a_finished_run_is_for(finished: Path, capsys: Capture) -> None:
    assert predict([str(finished), "--text", "a dull and tedious mess"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("a dull and tedious mess,")
    report = (finished / "report.html").read_text(encoding="utf8")
    assert "Validation is out of fold" in report
    assert "the classifier that was trained on all training texts" in report
    assert set(read_own_answers(read_finished(finished))) == {"test"}  # what an export is compared with


def test_the_command_prints_a_line_for_each_fold(words: Words, tmp_path: Path, capsys: Capture) -> None:
    more = ("--epochs", "1", "--test", "False", "--report", "False")
    assert main(words(tmp_path / "run", *more)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[5].endswith(" (optimistic: each fold chose its epoch)")
    assert lines[6].endswith(" (report this, or the score of a large test split)")
    begins = (
        "2 folds of 40 texts; each run has 1 epoch, and validates on one of them",
        "with the final run on all of them, it takes about 2 times as long as one run",
        "fold 1/2 ",
        "fold 2/2 ",
        "out of fold accuracy ",
        "            95 % interval of the",
    )
    assert all(line.startswith(begin) for line, begin in zip(lines, begins, strict=False))
    assert re.search(r"   epoch 1   \d+\.\d s, about 0:\d\d:\d\d left$", lines[2])
    assert lines[6].startswith("            after 1 epoch in every fold: ")
    assert (
        lines[7]
        == "            on all folds, always answering the largest class is right for 50.00%, with a macro F1 of 33.33%"
    )
    assert lines[8] == "final run   schedule of 1 epoch, stopped after 1, the higher median of the folds' 1, 1"
    assert any(line.endswith(" texts a batch, 1 of 1 epoch, 5 steps") for line in lines), "no patience in the final run"
    assert sum(line.startswith("data ") for line in lines) == 1
    assert lines.count(lines[6].replace("            after", "out of fold after")) == 1, "again where the run ends"
    assert export([str(tmp_path / "run"), str(tmp_path / "model")]) == 2
    assert "has predicted no held-out text" in capsys.readouterr().err


def test_a_multi_label_run_tunes_its_threshold_on_the_predictions_out_of_fold(
    words: Words, tmp_path: Path, capsys: Capture
) -> None:
    for name in ("train", "test"):
        write_reviews(tmp_path / f"{name}.csv", 24, seed=len(name))
        table = pd.read_csv(tmp_path / f"{name}.csv")
        table["label"] = ["film;" * (i % 3 > 0) + label for i, label in enumerate(table["label"])]
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    more = ("--label_separator", ";", "--threshold", "tuned", "--monitor", "micro_f1", "--report", "False")
    assert main(words(tmp_path / "run", *more, "--epochs", "2", data=tmp_path)) == 0
    result = read_result(tmp_path / "run")
    truth, logits = (np.zeros((24, 3), dtype=bool), np.zeros((24, 3)))
    for row, (labels, found) in predictions(tmp_path / "run").items():
        truth[row, labels], logits[row] = True, found
    given = 1 / (1 + np.exp(-logits)) > result["task"]["threshold"]
    f1 = 2 * (truth & given).sum() / (truth.sum() + given.sum())
    assert result["validation"]["micro_f1"] == pytest.approx(f1)
    assert result["validation"]["exact_match"] == pytest.approx((truth == given).all(1).mean())
    assert "95 % interval of the out-of-fold exact match" in capsys.readouterr().out


# --- interruptions


def interrupting(monkeypatch: Patch, folder: str, hook: str, step: int | None, how: Callable[[], object]) -> None:
    """At a step of the run in ``folder``, or at the first one with this hook, does something once."""
    done: list[int] = []

    def hooked(self: Meter, trainer: Any, *_: Any) -> None:
        if self.directory.name == folder and step in (None, trainer.global_step) and not done:
            done.append(trainer.global_step)
            how()

    monkeypatch.setattr(Meter, hook, hooked)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def kill() -> None:
    raise KeyboardInterrupt


def test_an_interrupted_run_continues_to_the_same_weights(
    finished: Path, words: Words, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    output = tmp_path / "run"
    flags = words(output)
    epochs = read_result(finished)["kfold"]["epochs"]
    assert epochs > 1, "the test needs an end of an epoch inside the final training"
    interruptions: list[tuple[str, str, int, Callable[[], object], list[str]]] = [
        ("2", "on_train_batch_start", 4, stop, flags),  # inside an epoch of the second fold
        ("run", "on_train_epoch_start", 5, kill, ["--resume", "--output_dir", str(output)]),  # between two epochs
        ("run", "on_test_start", 5 * epochs, stop, [*flags, "--resume", "auto"]),  # after the training
    ]
    for folder, hook, step, how, command in interruptions:
        with monkeypatch.context() as patch:
            interrupting(patch, folder, hook, step, how)
            assert main(command) == 130
        assert read_result(output)["status"] == "interrupted"
        said = capsys.readouterr().err
        assert f"interrupted; continue with: {called('lora', '--resume', '--output_dir')} " in said
        assert ("SIGTERM: stopping as soon as there is a checkpoint" in said) == (how is stop), "also in a fold"
        first = (output / "folds" / "1" / "result.json").stat()
    assert main([*flags, "--resume"]) == 0
    assert (output / "folds" / "1" / "result.json").stat() == first
    for place in ("", "folds/1", "folds/2"):
        for name in (ADAPTER, PREDICTIONS):
            assert (output / place / name).read_bytes() == (finished / place / name).read_bytes()
    before = (output / "result.json").read_bytes()
    assert main([*flags, "--resume", "auto"]) == 0
    assert "has finished: nothing to do" in capsys.readouterr().out
    assert (output / "result.json").read_bytes() == before


def test_a_folds_changed_history_is_refused_and_one_with_damaged_settings_starts_over(
    finished: Path, tmp_path: Path, capsys: Capture
) -> None:
    run, history = Path(shutil.copytree(finished, tmp_path / "run")), tmp_path / "run" / "folds" / "1" / "metrics.csv"
    again = ["--resume", "--output_dir", str(run)]
    (run / "result.json").unlink()
    intact = history.read_bytes()
    history.write_bytes(intact.replace(b"0.", b"1.", 1))
    assert main(again) == 1
    assert f"{history} was changed after its run wrote it" in capsys.readouterr().err
    history.unlink()
    assert main(again) == 1
    assert f"{history} cannot be read (restore it, or remove {history.parent}" in capsys.readouterr().err
    history.write_bytes(intact)
    (run / "folds" / "2" / "result.json").unlink()  # as if it had been killed
    (run / "folds" / "2" / "settings.json").write_text("{", encoding="utf8")
    assert main(again) == 0
    assert (run / ADAPTER).read_bytes() == (finished / ADAPTER).read_bytes()


def test_a_run_whose_texts_have_changed_is_not_continued(
    words: Words, few_reviews: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    data, output = Path(shutil.copytree(few_reviews, tmp_path / "data")), tmp_path / "run"
    flags = words(output, data=data)
    with monkeypatch.context() as patch:
        interrupting(patch, "1", "on_train_batch_start", 2, stop)
        assert main(flags) == 130
    write_reviews(data / "train.csv", 40, seed=9)
    before = (output / "result.json").read_bytes()
    capsys.readouterr()
    assert main([*flags, "--resume"]) == 2
    assert "train of the data is not the one with which" in capsys.readouterr().err
    assert (output / "result.json").read_bytes() == before
    assert main([*flags, "--kfold", "3", "--resume"]) == 2
    assert "--kfold 3: the run in" in capsys.readouterr().err
    assert main(flags) == 2
    assert "already contains a run" in capsys.readouterr().err
    assert main([*flags, "--overwrite", "--kfold", "3", "--epochs", "1", "--report", "False"]) == 0
    assert [path.name for path in sorted((output / "folds").iterdir())] == ["1", "2", "3"]
    assert main([*flags[:-2], "--overwrite", "--epochs", "0", "--report", "False"]) == 0  # without folds
    assert not (output / "folds").exists()


@pytest.mark.parametrize(
    ("old", "status", "said"),
    [
        (False, 2, "--resume: cut into folds of the data is not the one with which"),
        (True, 1, "failed: --kfold: its runs are of different cuts into folds: start the run over with --overwrite"),
    ],
)
def test_a_run_whose_texts_would_be_in_other_folds_is_not_continued(
    words: Words,
    few_reviews: Path,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: Capture,
    old: bool,
    status: int,
    said: str,
) -> None:
    """The first fold has finished, and the tokens are the same: only the groups are others."""
    data, output = Path(shutil.copytree(few_reviews, tmp_path / "data")), tmp_path / "run"
    for name in ("train", "test"):
        table = pd.read_csv(data / f"{name}.csv")
        table.assign(by=[f"{name} {i // 2}" for i in range(len(table))]).to_csv(data / f"{name}.csv", index=False)
    flags = words(output, "--group_column", "by", "--epochs", "1", data=data)
    with monkeypatch.context() as patch:
        interrupting(patch, "2", "on_train_batch_start", 2, stop)
        if old:  # a version that did not record the cut
            patch.setattr(claim, "data_hashes", lambda texts, splits: data_hashes(replace(texts, pool=None), splits))
        assert main(flags) == 130
    if old:
        shutil.rmtree(output / "folds" / "2")  # as if it was killed between two folds
    table = pd.read_csv(data / "train.csv")
    table.assign(by=table["by"].sample(frac=1, random_state=0).to_numpy()).to_csv(data / "train.csv", index=False)
    capsys.readouterr()
    assert main([*flags, "--resume"]) == status
    assert said in capsys.readouterr().err


def test_a_fold_that_fails_ends_the_run(words: Words, tmp_path: Path, capsys: Capture) -> None:
    flags = words(tmp_path / "run", "--precision", "fp32")
    assert main([*flags, "--learning_rate", "1e38", "--gradient_clip", "0"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("failed: fold 1: the loss is not finite")
    assert read_result(tmp_path / "run")["error"] == line.removeprefix("failed: ")
    assert read_result(tmp_path / "run" / "folds" / "1")["status"] == "failed"


# --- one fold, and refusals


def test_a_fold_alone_is_the_same_run(finished: Path, words: Words, tmp_path: Path) -> None:
    assert main(words(tmp_path / "run", "--fold", "2", "--report", "False")) == 0
    for directory in (tmp_path / "run", finished / "folds" / "2"):
        assert read_result(directory)["config"]["fold"] == 2
    assert (tmp_path / "run" / ADAPTER).read_bytes() == (finished / "folds" / "2" / ADAPTER).read_bytes()


def test_a_fold_alone_has_the_budget_of_the_whole_run(words: Words) -> None:
    found = []
    for more in ((), ("--fold", "1")):
        config = from_flags(words(Path("unused"), "--epochs", "auto", "--batch_size", "1", *more))
        inputs = read_inputs(config, find_materials(config))
        alone = inputs.folds[0] if inputs.folds else inputs
        found.append((alone.config.training.epochs, len(alone.splits["train"])))
    assert found == [(8, 20)] * 2, "300 steps of 40 texts"


def test_the_estimate_is_of_the_first_fold_and_of_all(words: Words, tmp_path: Path, capsys: Capture) -> None:
    assert main(words(tmp_path / "run", "--estimate")) == 0
    shown = capsys.readouterr().out
    assert "20 train, 20 validation" in shown
    line = r"\nThis is the first of 2 folds. With the final run, all take at most about 0:\d\d:\d\d.\n"
    assert re.search(line, shown)
    assert not (tmp_path / "run").exists()


def test_the_time_left_counts_the_epochs_of_the_final_run() -> None:
    runs = [
        SimpleNamespace(
            result={"seconds": seconds, "validation": {"epoch": epoch}},
            config=config_of_flags("--epochs 10 --patience 0"),
        )
        for seconds, epoch in ((90, 2), (110, 6))
    ]
    assert time_left(cast(Any, runs), 5) == pytest.approx(100 * (3 + 0.4 * 5 / 4))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--kfold", "1"], "--kfold 1: must be at least 2"),
        (["--kfold", "41"], "--kfold 41: must be at most 40, the number of different training texts"),
        (["--fold", "3"], "--fold 3: must be from 1 to 2, the number of --kfold"),
        (["--epochs", "0"], "--epochs 0: cannot be used with --kfold"),
        (["--limit_validation", "8"], "--limit_validation 8: cannot be used with --kfold"),
        (["--devices", "2"], "--devices 2: must be 1 with --kfold"),
        (["--num_nodes", "2"], "--num_nodes 2: must be 1 with --kfold"),
        (["--accumulate", "30"], "20 training texts: must be at least 30"),
        (["--limit_train", "2", "--monitor", "auroc"], "--kfold 2: class 'bad' has 1 different training text"),
        (["--kfold", "40", "--monitor", "auroc"], "--monitor auroc: all validation texts have the same label"),
    ],
)
def test_what_is_refused_leaves_nothing(
    words: Words, tmp_path: Path, capsys: Capture, more: list[str], message: str
) -> None:
    assert main(words(tmp_path / "run", *more)) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_fold_needs_its_number_of_folds(capsys: Capture) -> None:
    assert main(["--offline", "--fold", "1"]) == 2
    assert capsys.readouterr().err == "error: --fold 1: needs --kfold N, the number of folds\n"


def test_other_runs_in_the_folder_of_the_folds_are_kept(words: Words, tmp_path: Path, capsys: Capture) -> None:
    for name, content in (("1/result.json", json.dumps({"mine": 1})), ("1/notes.txt", "mine")):
        path = tmp_path / "run" / "folds" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert main(words(tmp_path / "run", "--overwrite")) == 2
    assert "folds/1: contains a result.json from another program" in capsys.readouterr().err


# --- the interval of a mean


def test_the_interval_of_a_mean_of_folds() -> None:
    # by hand: t with 4 degrees of freedom is 2.77645, the standard deviation of these scores 0.0158114,
    # and sqrt(1 / 5 + 1 / 4) is 0.670820
    scores = [0.88, 0.89, 0.90, 0.91, 0.92]
    low, high = mean_interval(scores)
    assert (high + low) / 2 == pytest.approx(0.9)
    assert (high - low) / 2 == pytest.approx(2.77645 * 0.0158114 * 0.670820, rel=1e-4)
    assert mean_interval([0.4, 0.6], 0.0, 1.0) == (0.0, 1.0)  # t with 1 degree of freedom is 12.7062
    low, high = mean_interval([0.4, 0.6])
    assert (high - low) / 2 == pytest.approx(12.7062 * np.sqrt(0.02) * np.sqrt(1.5), rel=1e-4)


def test_folds_that_score_alike_have_no_interval() -> None:
    found = means([{"accuracy": 0.9, "mcc": 1.0}, {"accuracy": 0.8, "mcc": 1.0}])
    assert (found["mean"]["mcc"], set(found["mean_ci95"])) == (1.0, {"accuracy"})
    record: Any = {"epochs": 9, "same_epoch": {"accuracy": 0.85, "accuracy_ci95": [0.6, 0.9], **found}}
    assert same_epoch_lines(record, "mcc")[1].endswith("mean of the folds: 1.0000")


def test_the_monitored_score_after_the_same_epoch_is_shown() -> None:
    same = {"accuracy": 0.7, "accuracy_ci95": [0.6, 0.8], "mean": {"macro_f1": 0.5, "loss": 1.25}}
    same["mean_ci95"] = {"macro_f1": (0.25, 0.75), "loss": (1.0, 1.5)}
    record: Any = {"epochs": 9, "same_epoch": same}
    (first,) = same_epoch_lines(record, "accuracy")
    assert first.endswith("after 9 epochs in every fold: 70.00%, 95 % interval 60.00% to 80.00% " + TO_REPORT)
    _, line = same_epoch_lines(record, "macro_f1")
    assert line.endswith("then macro F1, mean of the folds: 50.00%, 95 % interval 25.00% to 75.00%")
    assert same_epoch_lines(record, "loss")[1].endswith("1.2500, 95 % interval 1.0000 to 1.5000")
    assert same_epoch_lines(record, "auroc") == [first], "not defined in each fold"
    assert not same_epoch_lines(record | {"same_epoch": None}, "loss")
    (line,) = same_epoch_lines(record, "accuracy", tuned=True)
    assert line.endswith(TUNED), "a threshold that was tuned on the scored texts is not to be reported"


def test_the_final_run_saves_its_average(words: Words, tmp_path: Path, monkeypatch: Patch) -> None:
    flags = words(tmp_path / "run", "--average", "ema", "--epochs", "2", "--report", "False")
    with monkeypatch.context() as patch:
        interrupting(patch, "run", "on_test_start", None, stop)  # so the resumed run does not train
        assert main(flags) == 130
    assert main([*flags, "--resume"]) == 0
    saved, last = load_file(tmp_path / "run" / ADAPTER), torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    (name,) = (name for name in last["state_dict"] if "layer.0.attention.q_lin.lora.lora_B" in name)
    (of_adapter,) = (key for key in saved if "layer.0.attention.q_lin" in key and "lora_B" in key)
    assert np.array_equal(saved[of_adapter], last["average"]["weights"][name].numpy())
    assert not torch.equal(last["average"]["weights"][name], last["state_dict"][name])


def fold_of(folder: Path, number: int, epoch: int, right: int, texts: int) -> Any:
    """A finished run on a fold, whose accuracy after each of 9 epochs is the same."""
    directory = folder / str(number)
    directory.mkdir()
    rows = [{"step": i, "epoch": i, "validation_accuracy": right / texts} for i in range(1, 10)]
    write_metrics(directory, rows)
    validation = {"accuracy": right / texts, "epoch": epoch, "examples": texts}
    return SimpleNamespace(directory=directory, result={"validation": validation, "seconds": 1.0})


def test_folds_of_unequal_size_count_by_their_texts(tmp_path: Path) -> None:
    record = _record([fold_of(tmp_path, 1, 3, 5, 10), fold_of(tmp_path, 2, 7, 30, 30)])
    assert record["epochs"] == 7, "of two folds, the higher median"
    assert some(record["same_epoch"])["accuracy"] == pytest.approx(35 / 40), "each text counts once"
    assert some(record["same_epoch"])["mean"]["accuracy"] == pytest.approx((5 / 10 + 1) / 2)


def test_the_threshold_is_tuned_on_the_predictions_of_all_folds(monkeypatch: Patch) -> None:
    found = np.array([[0.30, 0.20], [0.255, 0.10], [0.10, 0.28], [0.20, 0.05]])
    logits, truth = np.log(found / (1 - found)), found > 0.25
    task = MultiLabel(["a", "b"], None, Rule(0.5), tuned=True)
    pool = SimpleNamespace(rows=np.arange(4), labels=truth.astype(np.int8))
    inputs: Any = SimpleNamespace(task=task, splits={"train": pool})
    parts = [Answers(np.array(rows), truth[rows], logits[rows], rule=Rule(0.5)) for rows in ([0, 2], [1, 3])]
    monkeypatch.setattr(folds, "read_own_answers", lambda run: {"validation": run})
    monkeypatch.setattr(folds, "_record", lambda _: {})
    assert folds._joined(inputs, parts).scores["micro_f1"] == 1  # type: ignore[arg-type]
    assert task.rule == Rule(0.25), "tuned on the predictions of all folds"
