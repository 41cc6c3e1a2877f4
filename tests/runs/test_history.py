import csv
import struct
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from finetuning.runs.files import CURVE, METRICS, PREDICTIONS
from finetuning.runs.history import plot_learning_curve, scores_by_epoch, write_metrics, write_predictions


def test_predictions_are_a_table_of_splits_rows_labels_and_logits(tmp_path: Path) -> None:
    scores = np.array([[0.5, -1.5, 2.0], [1.0, 0.25, -3.0]], dtype=np.float64)
    validation = (np.array([7, 3]), np.array([2, 0]), scores)
    splits = {"validation": validation, "test": (np.array([1]), np.array([1]), scores[:1] + 1)}
    write_predictions(tmp_path, splits, {"validation": {3: 30, 7: 70}, "test": {1: 10}})
    table = pd.read_parquet(tmp_path / PREDICTIONS)
    assert list(table.columns) == ["split", "row", "label", "logits", "tokens"]
    assert table["split"].tolist() == ["validation", "validation", "test"]
    assert table["row"].tolist() == [7, 3, 1]
    assert table["label"].tolist() == [2, 0, 1]
    assert table["tokens"].tolist() == [70, 30, 10]
    assert np.array_equal(np.stack(table["logits"]), [*scores, scores[0] + 1])
    assert [path.name for path in tmp_path.iterdir()] == [PREDICTIONS]


def test_a_folder_that_looks_like_an_address_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (folder := Path("glue:sst2")).mkdir()
    write_predictions(folder, {"test": (np.array([1]), np.array([0]), np.zeros((1, 2)))})
    assert [path.name for path in folder.iterdir()] == [PREDICTIONS]


def test_what_was_not_measured_stays_empty(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": 1, "train_loss": 0.5}, {"step": 2, "validation_accuracy": 0.0}])
    with (tmp_path / METRICS).open(newline="", encoding="utf8") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"step": "1", "train_loss": "0.5", "validation_accuracy": ""},
        {"step": "2", "train_loss": "", "validation_accuracy": "0.0"},
    ]


@pytest.mark.parametrize(
    ("monitor", "validated"),
    [("accuracy", True), ("macro_f1", True), ("mcc", True), ("loss", True), ("accuracy", False)],
)
def test_the_learning_curve_is_a_picture(tmp_path: Path, monitor: str, validated: bool) -> None:
    rows: list[dict[str, float]] = [{"step": i, "train_loss": 1 / i} for i in range(1, 41)]
    if validated:
        for step in (20, 40):
            scores = {
                "validation_loss": 0.3,
                "validation_accuracy": 0.8,
                "validation_macro_f1": 0.7,
                "validation_mcc": 0.6,
            }
            rows.append({"step": step, "epoch": step / 20} | scores)
    plot_learning_curve(tmp_path, rows, monitor, r"my $\folder_{: lora", kept=1 if validated else None)
    assert [path.name for path in tmp_path.iterdir()] == [CURVE]
    data = (tmp_path / CURVE).read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (1050, 900)
    pixels = matplotlib.image.imread(tmp_path / CURVE)[..., :3]
    colours = np.unique((pixels * 255).round() @ [65536, 256, 1])  # one number for each: sorting rows takes seconds
    assert len(colours) > 20  # two lines and text, not an empty sheet
    orange = np.abs(pixels - np.array([0xD9, 0x48, 0x01]) / 255).sum(-1) < 0.02
    below = orange[int(0.65 * height) : int(0.9 * height)]
    assert below.any() == validated


def test_scores_are_those_after_each_epoch(tmp_path: Path) -> None:
    rows = [{"step": 5, "epoch": 0.5, "train_loss": 1.0}]
    rows += [{"step": 10 * epoch, "epoch": epoch, "validation_accuracy": epoch / 10} for epoch in (1, 2)]
    write_metrics(tmp_path, rows)
    assert scores_by_epoch(tmp_path) == {1: {"accuracy": 0.1}, 2: {"accuracy": 0.2}}
