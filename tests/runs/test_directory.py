# mypy: disable-error-code="union-attr,arg-type,operator"
import csv
import json
import struct
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from finetuning.config import RunConfig
from finetuning.errors import UserError
from finetuning.runs.directory import (
    check_directory,
    default_directory,
    open_directory,
    plot_learning_curve,
    write_metrics,
    write_predictions,
)
from finetuning.runs.files import CONFIG, CURVE, LAST_CHECKPOINT, METRICS, PREDICTIONS, RESULT, RUN_FILES, read_status
from finetuning.storage import write_json

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["bad", "good"]
CONFIGURATION = RunConfig.of(learning_rate=1e-3, epochs=3)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def held_run(directory: Path, config: RunConfig = CONFIGURATION, status: str | None = None) -> Path:
    """A directory as a run leaves it that was interrupted, or that ended with ``status``."""
    open_directory(directory, config)
    (directory / LAST_CHECKPOINT).write_bytes(b"weights")
    if status:
        write_json(directory / RESULT, {"status": status})
    return directory


def refusal(directory: Path, config: RunConfig = CONFIGURATION) -> str:
    with pytest.raises(UserError) as caught:
        check_directory(directory, config)
    message = str(caught.value)
    assert "\n" not in message
    assert f"--output_dir {directory}" in message
    return message


# --- the directory


def test_a_new_directory_is_taken_and_checking_writes_nothing(tmp_path: Path) -> None:
    check_directory(tmp_path / "a" / "b", CONFIGURATION)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "notes.txt").write_text("mine")
    check_directory(tmp_path, CONFIGURATION)
    open_directory(tmp_path / "a" / "b", CONFIGURATION)
    stored = json.loads((tmp_path / "a" / "b" / CONFIG).read_text())
    assert RunConfig.from_dict(stored) == CONFIGURATION


def test_a_directory_of_runs_is_no_run_s(tmp_path: Path) -> None:
    held_run(tmp_path / "first", status="finished")
    assert "holds runs (first)" in refusal(tmp_path)
    check_directory(tmp_path / "second", CONFIGURATION)
    check_directory(held_run(tmp_path), replace(CONFIGURATION, resume=True, output_dir=tmp_path))


def test_of_two_runs_that_begin_in_one_directory_the_second_is_refused(tmp_path: Path) -> None:
    for _ in range(2):
        check_directory(tmp_path, CONFIGURATION)  # both find it free
    held_run(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="a run that has just begun"):
        open_directory(tmp_path, replace(CONFIGURATION, seed=1))
    assert contents(tmp_path) == before


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert "is a file" in refusal(file)
    assert f"{file} is not a directory" in refusal(file / "run")
    assert f"{file} is not a directory" in refusal(file / "deep" / "run")
    assert contents(tmp_path) == {"file": b"mine"}


def test_what_cannot_be_made_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"--output_dir {link} cannot be written"):
        open_directory(link, CONFIGURATION)


def test_a_directory_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    open_directory(tmp_path, CONFIGURATION)
    before = contents(tmp_path)
    message = refusal(tmp_path)
    assert f"holds a run already ({CONFIG})" in message
    assert "--resume or --overwrite" in message
    check_directory(tmp_path, replace(CONFIGURATION, overwrite=True))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", RUN_FILES)
@pytest.mark.parametrize("text", ['{"model_type": "bert"}', "half a fi", "[]"])
def test_files_of_others_are_never_replaced(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    for overwrite in (False, True):
        message = refusal(tmp_path, replace(CONFIGURATION, overwrite=overwrite))
        assert f"holds a {name} that is no run's" in message
    assert contents(tmp_path) == {name: text.encode()}


def test_overwrite_removes_the_runs_files_and_no_others(tmp_path: Path) -> None:
    mine = {"notes.txt": b"mine", "result.json.bak": b"mine", "my_predictions.parquet": b"mine"}
    open_directory(tmp_path, CONFIGURATION)
    for name in {*RUN_FILES, *mine} - {CONFIG}:
        (tmp_path / name).write_bytes(mine.get(name, b"earlier"))
    config = replace(CONFIGURATION, overwrite=True, output_dir=tmp_path)
    check_directory(tmp_path, config)
    open_directory(tmp_path, config)
    left = contents(tmp_path)
    assert RunConfig.from_dict(json.loads(left.pop(CONFIG))) == config
    assert left == mine


def test_resume_needs_a_checkpoint(tmp_path: Path) -> None:
    config = replace(CONFIGURATION, resume=True, output_dir=tmp_path)
    assert f"no run with a checkpoint ({LAST_CHECKPOINT})" in refusal(tmp_path / "new", config)
    open_directory(tmp_path, CONFIGURATION)
    assert f"no run with a checkpoint ({LAST_CHECKPOINT})" in refusal(tmp_path, config)
    (tmp_path / CONFIG).unlink()
    (tmp_path / LAST_CHECKPOINT).touch()
    assert f"no run with a checkpoint ({LAST_CHECKPOINT})" in refusal(tmp_path, config)


@pytest.mark.parametrize("status", [None, "interrupted", "failed"])
def test_resume_takes_a_run_that_has_not_finished(tmp_path: Path, status: str | None) -> None:
    held_run(tmp_path, status=status)
    assert read_status(tmp_path) == status
    config = replace(CONFIGURATION, resume=True, output_dir=tmp_path, verbose=True)
    check_directory(tmp_path, config)
    open_directory(tmp_path, config)
    assert (tmp_path / LAST_CHECKPOINT).read_bytes() == b"weights"


def test_resume_of_a_finished_run_is_refused(tmp_path: Path) -> None:
    held_run(tmp_path, status="finished")
    assert "has finished" in refusal(tmp_path, replace(CONFIGURATION, resume=True, output_dir=tmp_path))


def test_resume_of_another_configuration_names_the_flags(tmp_path: Path) -> None:
    held_run(tmp_path)
    message = refusal(tmp_path, replace(CONFIGURATION, resume=True, output_dir=tmp_path, seed=4, lora_r=2))
    assert message.endswith("another configuration: --lora_r 8 -> 2, --seed 0 -> 4")


@pytest.mark.parametrize("damaged", ["{", '{"lora_rank": 8}', '{"epochs": 0}', "\udcff"])
def test_resume_of_a_run_whose_configuration_is_damaged_is_refused(tmp_path: Path, damaged: str) -> None:
    held_run(tmp_path)
    (tmp_path / CONFIG).write_bytes(damaged.encode(errors="surrogateescape"))
    config = replace(CONFIGURATION, resume=True, output_dir=tmp_path)
    assert f"{CONFIG} cannot be used" in refusal(tmp_path, config)


def test_default_directory_says_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)  # a shell of salloc, in which several runs may follow
    assert default_directory(RunConfig.of(q_lora=True)).match("runs/imdb-qlora-20*-*")
    monkeypatch.setenv("SLURM_STEP_ID", "3")
    assert default_directory(RunConfig.of(method="full")) == Path("runs/imdb-full-77.3")


# --- predictions, metrics, curve


def test_predictions_are_a_table_of_splits_rows_labels_and_logits(tmp_path: Path) -> None:
    scores = np.array([[0.5, -1.5, 2.0], [1.0, 0.25, -3.0]], dtype=np.float64)
    validation = (np.array([7, 3]), np.array([2, 0]), scores)
    write_predictions(tmp_path, {"validation": validation, "test": (np.array([1]), np.array([1]), scores[:1] + 1)})
    table = pd.read_parquet(tmp_path / PREDICTIONS)
    assert list(table.columns) == ["split", "row", "label", "logits"]
    assert table["split"].tolist() == ["validation", "validation", "test"]
    assert table["row"].tolist() == [7, 3, 1]
    assert table["label"].tolist() == [2, 0, 1]
    assert np.array_equal(np.stack(table["logits"]), [*scores, scores[0] + 1])
    assert [path.name for path in tmp_path.iterdir()] == [PREDICTIONS]


def test_what_was_not_measured_stays_empty(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": 1, "train_loss": 0.5}, {"step": 2, "validation_accuracy": 0.0}])
    with (tmp_path / METRICS).open(newline="", encoding="utf8") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"step": "1", "train_loss": "0.5", "validation_accuracy": ""},
        {"step": "2", "train_loss": "", "validation_accuracy": "0.0"},
    ]


@pytest.mark.parametrize(
    ("monitor", "validated"), [("accuracy", True), ("macro_f1", True), ("loss", True), ("accuracy", False)]
)
def test_the_learning_curve_is_a_picture(tmp_path: Path, monitor: str, validated: bool) -> None:
    rows: list[dict[str, float]] = [{"step": i, "train_loss": 1 / i} for i in range(1, 41)]
    if validated:
        for step in (20, 40):
            scores = {"validation_loss": 0.3, "validation_accuracy": 0.8, "validation_macro_f1": 0.7}
            rows.append({"step": step} | scores)
    plot_learning_curve(tmp_path, rows, monitor, r"my $\folder_{: lora")
    assert [path.name for path in tmp_path.iterdir()] == [CURVE]
    data = (tmp_path / CURVE).read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (1050, 900)
    pixels = matplotlib.image.imread(tmp_path / CURVE)[..., :3]
    colours = len(np.unique(pixels.reshape(-1, 3), axis=0))
    assert colours > 20  # two lines and text, not an empty sheet
    orange = np.abs(pixels - np.array([0xD9, 0x48, 0x01]) / 255).sum(-1) < 0.02
    below = orange[int(0.65 * height) : int(0.9 * height)]
    assert below.any() == validated
