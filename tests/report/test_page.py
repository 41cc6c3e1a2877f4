import re
from pathlib import Path
from typing import Any

import numpy as np

from finetune_lora import main
from finetuning.config import RunConfig
from finetuning.report.page import make_report
from finetuning.report.sections import cost_table
from finetuning.runs.files import REPORT, write_result, write_settings
from finetuning.runs.history import write_predictions
from finetuning.runs.lock import DirectoryLock
from tests.common import Capture, random_answers
from tests.html_reader import read

Split = tuple[np.ndarray, np.ndarray]  # labels (n,), logits (n, classes)
SECTIONS = ("scores", "classes", "calibration", "coverage", "length", "mistakes", "labels", "cost", "repeat")


def result_of_run(names: list[str], splits: dict[str, Split], **settings: Any) -> dict[str, Any]:
    """The content of ``result.json`` that the report reads."""
    scores = {
        split: {"accuracy": float((logits.argmax(1) == labels).mean()), "loss": 0.5, "examples": len(labels)}
        for split, (labels, logits) in splits.items()
    }
    return {
        "status": "finished",
        "config": RunConfig.from_settings(**settings).to_dict(),
        "command": "python finetune_lora.py --dataset 'a <b>'",
        "environment": {
            "python": "3.11", "versions": {"torch": "2"}, "cpu": "a processor", "threads": 2, "gpus": [], "git": None,
            "alone": False,
        },
        "parameters": {"total": 200, "trainable": 10},
        "data": {
            "source": "a set <i>", "label_names": names, "sizes": {s: len(v[0]) for s, v in splits.items()},
            "leaks_dropped": 3, "notes": ["a note & more"],
        },
        "task": {"kind": "single-label", "class_weights": None},
        "train": {"seconds": 12.5, "steps": 40, "epochs": 2.0, "tokens_per_second": 1234.0},
        "files": {"adapter_model.safetensors": 2**20},
        "memory": {"peak_bytes": 2**30, "source": "a counter"},
        "seconds": 20.0,
        **scores,
    }  # fmt: skip


def leave_predictions(directory: Path, splits: dict[str, Split]) -> None:
    """``predictions.parquet``; the row of a text is its position, its length one more, but at most 9."""
    stored = {split: (np.arange(len(labels)), labels, logits) for split, (labels, logits) in splits.items()}
    lengths = {split: {row: min(row + 1, 9) for row in range(len(part[0]))} for split, part in splits.items()}
    write_predictions(directory, stored, lengths)


def random_split(n: int, classes: int, seed: int) -> Split:
    answers = random_answers(n, classes, seed)
    return answers.truth.argmax(1), answers.logits


def said_of(directory: Path, splits: dict[str, Split]) -> str:
    """What the report of a run with two classes says, without texts."""
    leave_predictions(directory, splits)
    return read(make_report(directory, result_of_run(["a", "b"], splits), None)).text


def test_the_report_is_whole_and_needs_no_other_file(tmp_path: Path) -> None:
    names = ["a", "b <em>", "c"]
    splits = {"validation": random_split(200, 3, 0), "test": random_split(300, 3, 1)}
    leave_predictions(tmp_path, splits)
    (tmp_path / "learning_curve.png").write_bytes(b"\x89PNG bytes")
    texts = {split: {row: (f"{split} text {row} </p><script>",) for row in range(300)} for split in splits}
    result = result_of_run(names, splits, max_length=9)
    text = make_report(tmp_path, result, texts)
    reader = read(text)
    assert {address.partition(",")[0] for address in reader.addresses} == {
        "data:", "data:image/png;base64", *(f"#{name}" for name in SECTIONS)
    }  # fmt: skip
    assert all(f'<section id="{name}">' in text for name in SECTIONS)
    assert "<script" not in text
    assert "url(" not in text
    accuracy = 100 * result["test"]["accuracy"]
    for said in (
        f"test accuracy {accuracy:.2f} %", "a set <i>", "b <em>", "a note & more", "--dataset 'a <b>'", "12.5 s",
        "1,024 MiB", "10 of 200", "other programs used the processor", "--max_length", "</p><script>",
    ):  # fmt: skip
        assert said in reader.text, said


def test_a_missing_report_of_a_finished_run_is_written_again(
    distilbert: Path, review_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    splits = {"validation": random_split(40, 2, 0), "test": random_split(40, 2, 1)}
    leave_predictions(tmp_path, splits)
    settings = {"model_name": str(distilbert), "max_length": 32, "dataset": "text"}
    result = result_of_run(["bad", "good"], splits, **settings, data_dir=review_folder, output_dir=tmp_path)
    write_settings(tmp_path, result["config"], {"data": {}})
    write_result(tmp_path, result)
    words = ["--resume", "auto", "--output_dir", str(tmp_path)]
    before = {path.name for path in tmp_path.iterdir()}
    assert main([*words, "--report", "False"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == before
    with DirectoryLock(tmp_path):  # of the process that is about to write it
        assert main(words) == 0
    assert {path.name for path in tmp_path.iterdir()} == before
    assert capsys.readouterr().err == ""
    assert main(words) == 0
    assert {path.name for path in tmp_path.iterdir()} == {*before, REPORT}
    assert "number 2 " in read((tmp_path / REPORT).read_text(encoding="utf8")).text, "it quotes test texts"
    (tmp_path / REPORT).unlink()
    leave_predictions(tmp_path, {"test": splits["test"]})
    capsys.readouterr()
    assert main(words) == 2
    assert "predictions.parquet was changed after its run wrote it" in capsys.readouterr().err
    assert not (tmp_path / REPORT).exists()


def test_without_texts_none_is_shown(tmp_path: Path) -> None:
    splits = {"validation": random_split(100, 2, 0), "test": random_split(100, 2, 1)}
    leave_predictions(tmp_path, splits)
    text = make_report(tmp_path, result_of_run(["a", "b"], splits), None)
    assert "Texts are left out: --report_texts False." in text
    assert 'class="quoted"' not in text
    assert "test accuracy" in read(text).text
    assert "coverage: share of the texts that are answered" in read(text).text
    assert "validation is too small or too often wrong" in read(text).text, "1 % needs more than 100 texts"


def test_a_run_without_test_shows_validation_and_says_what_that_means(tmp_path: Path) -> None:
    said = said_of(tmp_path, {"validation": random_split(100, 2, 0)})
    assert "validation accuracy" in said
    assert "these scores may be too high" in said
    assert "on the same texts" in said


def test_a_perfect_run_has_no_mistakes_and_no_temperature(tmp_path: Path) -> None:
    labels = np.arange(60) % 2
    said = said_of(tmp_path, {split: (labels, np.eye(2)[labels] * 8.0) for split in ("validation", "test")})
    for sentence in ("No wrong answer.", "No such text.", "Validation gives no temperature"):
        assert sentence in said


def test_a_run_that_has_not_learned_lists_no_wrong_labels(tmp_path: Path) -> None:
    labels, logits = random_split(60, 2, 0)
    said = said_of(tmp_path, {split: (labels, np.roll(logits, 1, axis=0)) for split in ("validation", "test")})
    assert "No list: validation does not show that the classifier learned anything" in said
    assert "rather" not in said


def test_after_folds_the_larger_split_is_the_headline_and_the_folds_are_a_cost(tmp_path: Path) -> None:
    for count, headline in ((20, "out-of-fold accuracy"), (300, "test accuracy")):
        splits = {"validation": random_split(200, 2, 0), "test": random_split(count, 2, 1)}
        leave_predictions(tmp_path, splits)
        result = result_of_run(["a", "b"], splits, kfold=5) | {"kfold": {"seconds": 383.4, "same_epoch": None}}
        assert headline in (text := read(make_report(tmp_path, result, None)).text)
        assert re.search(r"\.\s+Validation is out of fold", text)
        same = {"accuracy": 0.7, "accuracy_ci95": [0.6, 0.8], "mean_ci95": {}}
        fair = result | {"kfold": {"seconds": 1.0, "epochs": 9, "same_epoch": same}}
        shown = "after 9 epochs in every fold, "
        assert (shown in read(make_report(tmp_path, fair, None)).text) == (count == 20)
        tuned = fair | {"task": {**fair["task"], "threshold_tuned": True}}
        text = read(make_report(tmp_path, tuned, None)).text
        assert shown not in text, "each fold has tuned its threshold on its texts"
        assert cost_table(result).rows[2:4] == [("all folds, before that", "383.4 s"), ("final run", "20.0 s")]


def test_a_multi_label_run_leaves_out_what_does_not_apply(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(80, 3))
    truth = generator.random((80, 3)) < 1 / (1 + np.exp(-logits))
    splits = {"validation": (np.zeros(80, int), logits), "test": (np.zeros(80, int), logits)}
    leave_predictions(tmp_path, {split: (truth.astype(np.int8), logits) for split in splits})
    result = result_of_run(["a", "b", "c"], splits)
    result["task"] = {"kind": "multi-label", "threshold": 0.4}
    exact = float(((1 / (1 + np.exp(-logits)) > 0.4) == truth).all(1).mean())
    result["test"] = {"accuracy": exact, "micro_f1": 0.7, "macro_f1": 0.6, "loss": 0.5}
    pairs = {row: (f"text {row}", f"second {row}") for row in range(80)}
    text = make_report(tmp_path, result, dict.fromkeys(splits, pairs))
    said = read(text).text
    assert f"test exact match {100 * exact:.2f} %" in said
    assert "micro F1" in said
    assert "second " in said  # of a pair
    assert "Confusion matrix" not in said
    assert '<section id="labels">' not in text
    assert "Every label of every text counts as one answer." in said
