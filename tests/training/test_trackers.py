"""Each tracker for real, where it is installed: what was logged is read back from its own files."""

import importlib
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetuning.config import RunConfig
from finetuning.runs.files import TRACKED
from finetuning.storage import read_json, write_json, write_text
from finetuning.training.trackers import OPEN, PROJECT, Trackers, final_values
from tests.common import Capture, Patch

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trackers' own code

ROWS: list[dict[str, Any]] = [
    {"step": 1, "epoch": 0.5, "train_loss": 0.75, "learning_rate": 0.001, "train_seconds": 1.0},
    {"step": 2, "epoch": 1.0, "train_seconds": 2.0, "validation_accuracy": 0.5, "validation_loss": 0.6},
]


def result_of(settings: dict[str, Any], status: str = "finished") -> dict[str, Any]:
    return {
        "status": status, "config": settings, "command": "python finetune_lora.py", "seconds": 9.0,
        "train": {"seconds": 2.0, "steps": 2}, "memory": {"peak_bytes": 1000}, "parameters": {"trainable": 7},
        "validation": {"accuracy": 0.5}, "test": {"accuracy": 0.875, "accuracy_ci95": [0.8, 0.9]},
    }  # fmt: skip


def track(name: str, directory: Path, replaced: bool = False) -> None:
    """Two rows, then an interruption, and a third row in the continued run, which then ends."""
    settings = RunConfig.from_settings(lora_r=3).to_dict()
    directory.mkdir(exist_ok=True)
    trackers = Trackers([name], directory)
    trackers.open(settings, resumed=False, replaced=replaced)
    for row in ROWS:
        trackers.log(row)
    trackers.close(result_of(settings, "interrupted"))
    trackers = Trackers([name], directory)
    trackers.open(settings | {"resume": True, "data_dir": "elsewhere"}, resumed=True)
    trackers.log({"step": 3, "train_loss": 0.25})
    write_json(directory / "result.json", result_of(settings))
    write_text(directory / "report.html", "<p>report</p>")
    trackers.close(result_of(settings))


def tensorboard_events(directory: Path) -> Any:
    """What TensorBoard reads."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(directory / "tensorboard")).Reload()


def test_final_values_are_numbers_under_flat_names() -> None:
    assert final_values(result_of({})) == {
        "best_validation_accuracy": 0.5, "test_accuracy": 0.875, "run_seconds": 9.0, "training_seconds": 2.0,
        "peak_memory_bytes": 1000.0, "trained_parameters": 7.0,
    }  # fmt: skip
    assert final_values({"status": "failed"}) == {}


def test_tensorboard_reads_what_was_logged(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    track("tensorboard", tmp_path)
    assert "warning" not in capsys.readouterr().err
    events = tensorboard_events(tmp_path)
    values = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert values["train_loss"] == [(1, 0.75), (3, 0.25)]
    assert values["learning_rate"] == [(1, pytest.approx(0.001))]
    assert values["validation_accuracy"] == [(2, 0.5)]
    assert (2, 0.875) in values["test_accuracy"]
    (text,) = events.Tensors("finished/text_summary")
    assert b"report.html" in text.tensor_proto.string_val[0]
    hparams = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"lora_r" in hparams
    track("tensorboard", tmp_path, replaced=True)
    assert len(tensorboard_events(tmp_path).Scalars("train_loss")) == 2


@pytest.mark.parametrize(
    ("first", "losses"),
    [({"step": 3, "train_loss": 0.25}, [(1, 0.75), (3, 0.25)]), ({"step": 3, "validation_loss": 0.5}, [(1, 0.75)])],
)
def test_tensorboard_forgets_what_a_killed_run_logged_after_its_checkpoint(
    tmp_path: Path, first: dict[str, Any], losses: list[tuple[int, float]]
) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    settings = RunConfig.from_settings().to_dict()
    later: list[dict[str, Any]] = [{"step": 3, "train_loss": 0.5}, {"step": 4, "train_loss": 0.375}]
    for resumed, rows in (False, [*ROWS, *later]), (True, [first]):
        time.sleep(1.1 * resumed)  # TensorBoard reads files in the order of the seconds in their names
        trackers = Trackers(["tensorboard"], tmp_path)
        trackers.open(settings, resumed)
        for row in rows:
            trackers.log(row)
        trackers.close(result_of(settings, "interrupted"))
    events = tensorboard_events(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("train_loss")] == losses
    assert [event.step for event in events.Scalars("learning_rate")] == [1]


def test_only_the_log_of_a_run_that_is_replaced_is_removed(tmp_path: Path) -> None:
    log = tmp_path / "tensorboard" / "events.out.tfevents.1"
    log.parent.mkdir()
    log.touch()
    for replaced in (False, True):
        Trackers([], tmp_path).open({}, resumed=False, replaced=replaced)
        assert log.exists() == (not replaced), "another program's, if no run was there"


def test_a_tracker_that_is_away_once_keeps_its_run(tmp_path: Path, monkeypatch: Patch) -> None:
    def away(*_: Any) -> None:
        raise OSError("no route to host")

    (tmp_path / TRACKED).write_text('{"wandb": "a", "mlflow": "b"}')
    monkeypatch.setitem(OPEN, "wandb", lambda _, version: SimpleNamespace(experiment=None, version=version))
    monkeypatch.setitem(OPEN, "mlflow", away)
    Trackers(["wandb", "mlflow"], tmp_path).open({}, resumed=True)
    assert read_json(tmp_path / TRACKED) == {"wandb": "a", "mlflow": "b"}


def test_mlflow_finds_what_was_logged(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    track("mlflow", tmp_path / "run")
    assert "failed" not in capsys.readouterr().err
    client = mlflow.tracking.MlflowClient(uri)
    experiment = client.get_experiment_by_name(PROJECT)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert run.data.params["lora_r"] == "3"
    assert run.data.metrics["test_accuracy"] == 0.875
    losses = client.get_metric_history(run.info.run_id, "train_loss")
    assert [(loss.step, loss.value) for loss in losses] == [(1, 0.75), (3, 0.25)]
    assert run.data.tags["status"] == "finished"
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"report.html", "result.json"}


def test_wandb_keeps_what_was_logged_offline(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    track("wandb", tmp_path)
    wandb.teardown()  # as at the end of a process: until then its service may still be writing
    assert "failed" not in capsys.readouterr().err
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    records = [record for file in files for record in wandb_records(file)]
    logged = [
        {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [row["train_loss"] for row in logged if "train_loss" in row] == ["0.75", "0.25"]
    assert "0.875" in [row.get("test_accuracy") for row in logged]
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert len({run.run_id for run in runs}) == 1, "the continued run is the same one"
    assert {run.project for run in runs} == {PROJECT}
    artifacts = [record.artifact.type for record in records if record.WhichOneof("record_type") == "artifact"]
    assert set(artifacts) == {"report", "result"}


def wandb_records(file: Path) -> list[Any]:
    """The records of a file of W&B: LevelDB's log format, behind a header of seven bytes."""
    record_type = importlib.import_module("wandb.proto.wandb_internal_pb2").Record  # made when it is loaded
    content, block = file.read_bytes(), 32768
    assert content.startswith(b":W&B")
    place, record, records = 7, b"", []
    while place + 7 <= len(content):
        if block - place % block < 7:  # the rest of a block that has no room for a header
            place += block - place % block
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(record_type.FromString(record))
            record = b""
    return records
