"""How a run's end is recorded, and said in one line."""

from pathlib import Path

import pytest
import torch

from finetuning.config import RunConfig
from finetuning.runs.files import BEST_CHECKPOINT, LAST_CHECKPOINT, PREVIOUS_CHECKPOINT, read_result
from finetuning.runs.messages import called
from finetuning.runs.recording import NO_PRIMITIVE, recorded
from tests.common import Capture, Patch, full_disk

ADVICE = "lower --batch_tokens, or use --gradient_checkpointing True; the last checkpoint is kept"


@pytest.mark.parametrize(
    ("error", "begin"),
    [
        (MemoryError(), f"out of memory: {ADVICE}"),
        (torch.OutOfMemoryError("CUDA out of memory.\nGPU 0"), f"out of memory: {ADVICE}"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 12"), f"out of memory: {ADVICE}"),
        (OSError(12, "Cannot allocate memory"), f"out of memory: {ADVICE}"),
        (ImportError("/x.so: failed to map segment from shared object"), f"out of memory: {ADVICE}"),
        (RuntimeError(NO_PRIMITIVE), f"{NO_PRIMITIVE}, perhaps because the process was out of memory: {ADVICE}"),
        (OSError(28, "No space left on device", "/disk/last.ckpt"), "No space left on device: /disk/last.ckpt"),
        (RuntimeError("shapes differ\nin detail"), "shapes differ"),
    ],
)
def test_the_reason_of_a_failure_is_one_line(tmp_path: Path, capsys: Capture, error: Exception, begin: str) -> None:
    with recorded(tmp_path, RunConfig.from_settings().to_dict()):
        raise error
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"failed: {begin}")
    result = read_result(tmp_path)
    assert (result["status"], f"failed: {result['error']}") == ("failed", line)


def test_a_directory_that_begins_with_a_dash_is_no_flag_of_the_next_command(
    tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    (directory := Path("-run")).mkdir()
    (directory / LAST_CHECKPOINT).touch()
    with recorded(directory, RunConfig.from_settings().to_dict()):
        raise KeyboardInterrupt
    assert "--resume --output_dir=-run\n" in capsys.readouterr().err
    assert called("predict", directory).endswith(" ./-run")


def test_an_interrupted_run_keeps_the_best_checkpoint_so_far(tmp_path: Path) -> None:
    (tmp_path / BEST_CHECKPOINT).touch()
    (tmp_path / PREVIOUS_CHECKPOINT).touch()
    with recorded(tmp_path, RunConfig.from_settings().to_dict()):
        raise KeyboardInterrupt
    assert (tmp_path / BEST_CHECKPOINT).exists()
    assert (tmp_path / PREVIOUS_CHECKPOINT).exists()


def test_a_run_whose_result_cannot_be_written_has_failed(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr("finetuning.runs.recording.write_result", full_disk)
    with recorded(tmp_path, RunConfig.from_settings().to_dict()) as record:
        raise KeyboardInterrupt
    assert record.written["status"] == "failed"
    assert capsys.readouterr().err.endswith("failed: result.json cannot be written: No space left on device\n")
