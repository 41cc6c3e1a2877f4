import json
from pathlib import Path
from typing import Any

import pytest

from finetuning.config import RunConfig
from finetuning.errors import UserError
from finetuning.runs.directory import (
    check_directory,
    default_directory,
    has_checkpoint,
    interrupted_settings,
    open_directory,
)
from finetuning.runs.files import (
    LAST_CHECKPOINT,
    OLD_SETTINGS,
    RESULT,
    RUN_FILES,
    SETTINGS,
    read_settings,
    read_status,
    settings_file,
)
from finetuning.storage import write_json

STORED = RunConfig.from_settings(learning_rate=1e-3, epochs=3).to_dict()


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def begin(directory: Path, settings: dict[str, Any] = STORED, resume: bool = False, overwrite: bool = False) -> None:
    open_directory(directory, settings, resume, overwrite)


def check(directory: Path, resume: bool = False, overwrite: bool = False) -> None:
    check_directory(directory, resume, overwrite)


def held_run(directory: Path, status: str | None = None) -> Path:
    """A directory as a run leaves it that was interrupted, or that ended with ``status``."""
    begin(directory)
    (directory / LAST_CHECKPOINT).write_bytes(b"weights")
    if status:
        write_json(directory / RESULT, {"status": status})
    return directory


def refusal(directory: Path, overwrite: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        check(directory, overwrite=overwrite)
    return one_line(caught.value, directory)


def resume_refusal(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        interrupted_settings(directory)
    return one_line(caught.value, directory)


def one_line(error: UserError, directory: Path) -> str:
    message = str(error)
    assert "\n" not in message
    assert f"--output_dir {directory}" in message
    return message


def test_a_new_directory_is_taken_and_checking_writes_nothing(tmp_path: Path) -> None:
    check(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "notes.txt").write_text("mine")
    check(tmp_path)
    begin(tmp_path / "a" / "b")
    assert read_settings(tmp_path / "a" / "b") == json.loads((tmp_path / "a" / "b" / SETTINGS).read_text()) == STORED


def test_a_directory_of_runs_is_no_run_s(tmp_path: Path) -> None:
    held_run(tmp_path / "first", status="finished")
    assert "contains other runs (first)" in refusal(tmp_path)
    check(tmp_path / "second")
    check(held_run(tmp_path), resume=True)


def test_of_two_runs_that_begin_in_one_directory_the_second_is_refused(tmp_path: Path) -> None:
    for _ in range(2):
        check(tmp_path)  # both find it free
    held_run(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="another run has just started"):
        begin(tmp_path, STORED | {"seed": 1})
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
    with pytest.raises(UserError, match=f"--output_dir {link}: cannot be written"):
        begin(link)


def test_a_directory_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    begin(tmp_path)
    before = contents(tmp_path)
    message = refusal(tmp_path)
    assert f"already contains a run ({SETTINGS})" in message
    assert "--resume or --overwrite" in message
    check(tmp_path, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", RUN_FILES)
@pytest.mark.parametrize("text", ['{"model_type": "bert"}', "half a fi", "[]"])
def test_files_of_others_are_never_replaced(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    for overwrite in (False, True):
        message = refusal(tmp_path, overwrite=overwrite)
        assert f"contains a {name} from another program" in message
    assert contents(tmp_path) == {name: text.encode()}


def test_overwrite_removes_the_runs_files_and_no_others(tmp_path: Path) -> None:
    mine = {"notes.txt": b"mine", "result.json.bak": b"mine", "my_predictions.parquet": b"mine"}
    begin(tmp_path)
    for name in {*RUN_FILES, *mine} - {SETTINGS}:
        (tmp_path / name).write_bytes(mine.get(name, b"earlier"))
    check(tmp_path, overwrite=True)
    begin(tmp_path, STORED | {"seed": 9}, overwrite=True)
    left = contents(tmp_path)
    assert json.loads(left.pop(SETTINGS)) == STORED | {"seed": 9}
    assert left == mine


def test_resume_needs_a_run(tmp_path: Path) -> None:
    assert f"contains no run (no {SETTINGS})" in resume_refusal(tmp_path / "new")
    (tmp_path / LAST_CHECKPOINT).touch()
    assert f"contains no run (no {SETTINGS})" in resume_refusal(tmp_path)
    (tmp_path / OLD_SETTINGS).write_text('{"model_type": "bert"}')  # a model's
    assert f"contains no run (no {SETTINGS})" in resume_refusal(tmp_path)


def test_a_run_without_a_checkpoint_can_only_start_over(tmp_path: Path) -> None:
    begin(tmp_path)
    assert interrupted_settings(tmp_path) == STORED
    assert not has_checkpoint(tmp_path)
    (tmp_path / LAST_CHECKPOINT).touch()
    assert has_checkpoint(tmp_path)


@pytest.mark.parametrize("status", [None, "interrupted", "failed"])
def test_resume_takes_a_run_that_has_not_finished(tmp_path: Path, status: str | None) -> None:
    held_run(tmp_path, status=status)
    assert read_status(tmp_path) == status
    assert interrupted_settings(tmp_path) == STORED
    check(tmp_path, resume=True)
    begin(tmp_path, resume=True)
    assert (tmp_path / LAST_CHECKPOINT).read_bytes() == b"weights"


def test_resume_of_a_finished_run_is_refused(tmp_path: Path) -> None:
    held_run(tmp_path, status="finished")
    assert "has finished" in resume_refusal(tmp_path)


@pytest.mark.parametrize("damaged", ["{", "\udcff"])
def test_resume_of_a_run_whose_settings_are_damaged_is_refused(tmp_path: Path, damaged: str) -> None:
    held_run(tmp_path)
    (tmp_path / SETTINGS).write_bytes(damaged.encode(errors="surrogateescape"))
    assert f"{SETTINGS} cannot be read" in resume_refusal(tmp_path)


def test_settings_under_their_earlier_name_are_still_read_and_renamed(tmp_path: Path) -> None:
    held_run(tmp_path)
    (tmp_path / SETTINGS).rename(tmp_path / OLD_SETTINGS)
    assert settings_file(tmp_path) == tmp_path / OLD_SETTINGS
    assert interrupted_settings(tmp_path) == STORED
    assert "already contains a run" in refusal(tmp_path)
    begin(tmp_path, resume=True)
    assert settings_file(tmp_path) == tmp_path / SETTINGS
    assert not (tmp_path / OLD_SETTINGS).exists()


def test_a_models_config_is_neither_in_the_way_nor_removed(tmp_path: Path) -> None:
    (tmp_path / OLD_SETTINGS).write_text('{"model_type": "bert"}')
    check(tmp_path)
    begin(tmp_path)
    begin(tmp_path, overwrite=True)
    assert contents(tmp_path)[OLD_SETTINGS] == b'{"model_type": "bert"}'


def test_default_directory_says_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)  # a shell of salloc, in which several runs may follow
    assert default_directory("imdb", "qlora").match("runs/imdb-qlora-20*-*")
    assert default_directory("me/films:plain text", "lora").match("runs/me-films-plain-text-lora-20*-*")
    monkeypatch.setenv("SLURM_STEP_ID", "3")
    assert default_directory("imdb", "full") == Path("runs/imdb-full-77.3")
