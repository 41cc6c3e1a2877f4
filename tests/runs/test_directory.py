import json
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from finetuning.config import RunConfig
from finetuning.errors import UserError
from finetuning.runs import directory as run_directory
from finetuning.runs.checkpoints import write_checkpoint
from finetuning.runs.directory import (
    check_directory,
    checkpoint_to_resume,
    claimed_directory,
    default_directory,
    interrupted_settings,
    open_directory,
    settings_to_run,
)
from finetuning.runs.files import (
    ADAPTER,
    BEST_CHECKPOINT,
    LAST_CHECKPOINT,
    PREDICTIONS,
    PREVIOUS_CHECKPOINT,
    RESULT,
    RUN_FILES,
    SETTINGS,
    SUMS,
    read_origin,
    read_settings,
    read_status,
    write_result,
)
from finetuning.runs.lock import LOCK, DirectoryLock
from tests.common import Capture, Patch, check_refusal, contents, refusal_of, some

STORED = RunConfig.from_settings(learning_rate=1e-3, epochs=3).to_dict()
ORIGIN = {
    "base_model": {"model.safetensors": "1"},
    "adapter": {"adapter_model.safetensors": "4"},
    "data": {"train": "2", "test": "3"},
    "threads": 2,
    "job": None,
    "command": "python finetune_lora.py",
    "folder": "/work",
}


def archive(file: BinaryIO) -> None:
    file.write(b"weights" + b"PK\x05\x06".ljust(22, b"\0"))


def begin(directory: Path, settings: dict[str, Any] = STORED, resume: bool = False, overwrite: bool = False) -> None:
    open_directory(directory, settings | {"resume": resume, "overwrite": overwrite}, ORIGIN)


def check(directory: Path, resume: bool = False, overwrite: bool = False) -> None:
    check_directory(directory, resume, overwrite)


def held_run(directory: Path, status: str | None = None) -> Path:
    """A directory as a run leaves it that was interrupted, or that ended with ``status``."""
    begin(directory)
    write_checkpoint(directory / LAST_CHECKPOINT, archive)
    if status:
        write_result(directory, {"status": status})
    return directory


def refusal(directory: Path, overwrite: bool = False) -> str:
    return naming(directory, refusal_of(check, directory, overwrite=overwrite))


def resume_refusal(directory: Path) -> str:
    return naming(directory, refusal_of(interrupted_settings, directory))


def naming(directory: Path, message: str) -> str:
    """The message, which must name the directory."""
    assert f"--output_dir {directory}" in message
    return message


def test_a_new_directory_is_taken_and_checking_writes_nothing(tmp_path: Path) -> None:
    check(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "notes.txt").write_text("mine")
    check(tmp_path)
    begin(tmp_path / "a" / "b")
    assert read_settings(tmp_path / "a" / "b") == STORED
    assert json.loads((tmp_path / "a" / "b" / SETTINGS).read_text()).keys() == {*STORED, "origin", SUMS}


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
    assert "another run has just started" in refusal_of(begin, tmp_path, STORED | {"seed": 1})
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
    assert f"--output_dir {link}: cannot be written" in refusal_of(begin, link)


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


def test_a_run_with_damaged_settings_is_named(tmp_path: Path) -> None:
    begin(tmp_path)
    (tmp_path / SETTINGS).write_text("half a fi")
    message = refusal(tmp_path, overwrite=True)
    assert f"contains a {SETTINGS} from another program, or a run whose {SETTINGS} is damaged: give" in message


def test_overwrite_removes_the_runs_files_and_no_others(tmp_path: Path) -> None:
    mine = {"notes.txt": b"mine", "result.json.bak": b"mine", "my_predictions.parquet": b"mine"}
    begin(tmp_path)
    for name in {*RUN_FILES, *mine} - {SETTINGS}:
        (tmp_path / name).write_bytes(mine.get(name, b"earlier"))
    check(tmp_path, overwrite=True)
    begin(tmp_path, STORED | {"seed": 9}, overwrite=True)
    left = contents(tmp_path)
    assert read_settings(tmp_path) == STORED | {"seed": 9, "overwrite": True}
    del left[SETTINGS]
    assert left == mine


def test_resume_needs_a_run(tmp_path: Path) -> None:
    assert f"contains no run (no {SETTINGS})" in resume_refusal(tmp_path / "new")
    (tmp_path / LAST_CHECKPOINT).touch()
    assert f"contains no run (no {SETTINGS})" in resume_refusal(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')  # a model's
    assert f"contains no run (no {SETTINGS})" in resume_refusal(tmp_path)


def test_a_run_without_an_intact_checkpoint_can_only_start_over(tmp_path: Path, capsys: Capture) -> None:
    begin(tmp_path)
    assert interrupted_settings(tmp_path) == STORED
    assert checkpoint_to_resume(tmp_path) is None
    assert capsys.readouterr().out == f"{tmp_path} has no checkpoint yet: starting over\n"
    (tmp_path / LAST_CHECKPOINT).touch()
    assert checkpoint_to_resume(tmp_path) is None
    assert "has no intact checkpoint" in capsys.readouterr().out
    write_checkpoint(tmp_path / LAST_CHECKPOINT, archive)
    assert checkpoint_to_resume(tmp_path) == tmp_path / LAST_CHECKPOINT


def test_a_continued_run_falls_back_to_the_checkpoint_before_a_damaged_one(tmp_path: Path, capsys: Capture) -> None:
    begin(tmp_path)
    for _ in range(2):
        write_checkpoint(tmp_path / LAST_CHECKPOINT, archive)
    (tmp_path / LAST_CHECKPOINT).write_bytes((tmp_path / LAST_CHECKPOINT).read_bytes()[:-1])
    (tmp_path / f".last.ckpt.{'0' * 32}.tmp.ckpt").write_bytes(b"half")
    assert checkpoint_to_resume(tmp_path) == tmp_path / PREVIOUS_CHECKPOINT
    begin(tmp_path, resume=True)
    warning = f"warning: {tmp_path / LAST_CHECKPOINT} is damaged: the run continues without it\n"
    assert capsys.readouterr().err == warning
    assert {path.name for path in tmp_path.iterdir()} == {SETTINGS, PREVIOUS_CHECKPOINT}
    write_checkpoint(tmp_path / LAST_CHECKPOINT, archive)
    assert {path.name for path in tmp_path.iterdir()} == {SETTINGS, PREVIOUS_CHECKPOINT, LAST_CHECKPOINT}


@pytest.mark.parametrize("with_previous", [True, False])
def test_a_checkpoint_that_became_a_folder_gives_way_or_is_refused(
    tmp_path: Path, with_previous: bool, capsys: Capture
) -> None:
    resumed = interrupted_run(tmp_path)
    last = tmp_path / LAST_CHECKPOINT
    if with_previous:
        last.rename(tmp_path / PREVIOUS_CHECKPOINT)
    last.unlink(missing_ok=True)
    last.mkdir()
    (last / "mine").touch()
    before = {path.name for path in tmp_path.iterdir()}
    check_refusal(f"--output_dir {tmp_path}: .*not empty: {last}", claimed, tmp_path, resumed)
    assert {path.name for path in tmp_path.iterdir()} == before
    (last / "mine").unlink()
    capsys.readouterr()
    lock, checkpoint = claimed(tmp_path, resumed)
    with lock:
        stored = read_settings(tmp_path)
        assert (stored["resume"], stored["overwrite"]) == (with_previous, not with_previous)
        assert checkpoint == (tmp_path / PREVIOUS_CHECKPOINT if with_previous else None)
        said = f"warning: {last} is damaged: the run continues without it\n"
        assert capsys.readouterr().err == said * with_previous
        write_checkpoint(last, archive)


def _refuse(*_: object) -> None:
    raise PermissionError(13, "Permission denied")


def test_resume_auto_starts_continues_or_does_nothing(tmp_path: Path, monkeypatch: Patch) -> None:
    given = {"output_dir": tmp_path, "resume": "auto", "epochs": 3}
    fresh = some(settings_to_run(given, {"seed": 5}))
    assert (fresh.run.resume, fresh.run.overwrite, fresh.training.seed) == (False, False, 5)
    begin(tmp_path, fresh.to_dict())
    continued = some(settings_to_run(given, {"seed": 6}))
    assert (continued.run.resume, continued.training.seed) == (True, 5)
    write_result(tmp_path, {"status": "finished"})
    (tmp_path / BEST_CHECKPOINT).touch()  # killed between its last two steps
    assert "--epochs 4: the run in" in refusal_of(settings_to_run, given | {"epochs": 4}, {})
    assert settings_to_run(given, {}) is None
    assert {path.name for path in tmp_path.iterdir()} == {SETTINGS, RESULT}
    (tmp_path / BEST_CHECKPOINT).touch()
    with DirectoryLock(tmp_path):  # of another process that looks as well
        assert settings_to_run(given, {}) is None
    monkeypatch.setattr("finetuning.runs.lock.os.open", _refuse)
    assert settings_to_run(given, {}) is None, "a directory that may only be read"
    monkeypatch.undo()
    assert "--resume auto: needs --output_dir PATH" in refusal_of(settings_to_run, {"resume": "auto"}, {})
    for directory in (tmp_path, tmp_path / "new"):
        with pytest.raises(UserError, match=r"--resume \w+: cannot be used with --overwrite"):
            settings_to_run({"output_dir": directory, "resume": "auto", "overwrite": True}, {})


def test_a_requeued_job_continues_its_own_run_and_replaces_an_earlier_one(tmp_path: Path, monkeypatch: Patch) -> None:
    flags = {"output_dir": tmp_path, "resume": "auto", "overwrite": True, "seed": 5}
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    begin(tmp_path, wanted(tmp_path, seed=0).to_dict())
    write_result(tmp_path, {"status": "finished"})
    replaces = some(settings_to_run(flags, {}))  # the job was stopped before it had replaced this run
    assert (replaces.run.resume, replaces.run.overwrite, replaces.training.seed) == (False, True, 5)

    with claimed(tmp_path, replaces, job="12")[0]:
        write_checkpoint(tmp_path / LAST_CHECKPOINT, archive)
    continues = some(settings_to_run(flags, {}))
    assert (continues.run.resume, continues.run.overwrite) == (True, False)
    write_result(tmp_path, {"status": "finished"})
    assert settings_to_run(flags, {}) is None
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    assert settings_to_run(flags, {}) is not None
    (tmp_path / SETTINGS).write_text("half a fi")
    assert settings_to_run(flags, {}) is not None  # what check_directory refuses


def claimed(directory: Path, config: RunConfig, **origin: Any) -> tuple[DirectoryLock, Path | None]:
    return claimed_directory(directory, config.to_dict(), ORIGIN | origin)


def wanted(directory: Path, **flags: Any) -> RunConfig:
    return RunConfig.from_settings(output_dir=directory, **flags)


def test_a_directory_has_one_writer(tmp_path: Path) -> None:
    lock, checkpoint = claimed(tmp_path, wanted(tmp_path))
    with lock:
        assert (lock.killed, checkpoint) == (None, None)
        assert "is being written by process " in refusal(tmp_path)
        for flags in ({"resume": True}, {"overwrite": True}, {}):
            with pytest.raises(UserError, match=f"--output_dir {tmp_path}: is being written by process "):
                claimed(tmp_path, wanted(tmp_path, **flags))
    assert {path.name for path in tmp_path.iterdir()} == {SETTINGS}
    assert "already contains a run" in refusal(tmp_path)
    assert "another run has just started" in refusal_of(claimed, tmp_path, wanted(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {SETTINGS}, "a refused one does not stay the holder"


@pytest.mark.parametrize("restarts", [None, "0", "1"])
def test_a_requeued_job_waits_for_the_lock_of_a_dead_node(
    tmp_path: Path, restarts: str | None, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.setattr(run_directory, "DEAD_NODE_SECONDS", 0.1)
    with claimed(tmp_path, wanted(tmp_path))[0]:
        if restarts is not None:
            monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        assert "is being written by" in refusal_of(claimed, tmp_path, wanted(tmp_path, resume=True))
    assert ("waiting for it" in capsys.readouterr().out) == (restarts == "1")


@pytest.mark.parametrize("with_checkpoint", [False, True])
def test_the_next_resume_says_that_the_last_process_was_killed(
    tmp_path: Path, with_checkpoint: bool, capsys: Capture
) -> None:
    config = wanted(tmp_path, resume=True)
    begin(tmp_path, config.to_dict())
    if with_checkpoint:
        write_checkpoint(tmp_path / LAST_CHECKPOINT, archive)
    (tmp_path / LOCK).write_text('{"host": "node1", "process": 12, "since": "today"}')
    lock, _ = claimed(tmp_path, config)
    with lock:
        assert read_settings(tmp_path)["resume"] == with_checkpoint
        said = "process 12 on node1 since today ended without a result: it was killed"
        assert capsys.readouterr().out.startswith(said)


@pytest.mark.parametrize("with_checkpoint", [False, True])
def test_a_run_that_ends_while_a_second_process_prepares_loses_nothing(tmp_path: Path, with_checkpoint: bool) -> None:
    first = wanted(tmp_path)
    lock, _ = claimed(tmp_path, first)
    if with_checkpoint:
        write_checkpoint(tmp_path / LAST_CHECKPOINT, archive)
    second = some(settings_to_run({"output_dir": tmp_path, "resume": "auto"}, {}))
    with lock:
        for name in (ADAPTER, LAST_CHECKPOINT):
            (tmp_path / name).write_bytes(b"weights")
        write_result(tmp_path, {"status": "finished"})
    before = contents(tmp_path)
    check_refusal(f"--output_dir {tmp_path}: .* has finished: nothing to do", claimed, tmp_path, second)
    assert contents(tmp_path) == before


def test_a_run_that_continues_has_no_result_until_it_ends(tmp_path: Path) -> None:
    """Otherwise a study would read the old one if this process was killed."""
    lock, _ = claimed(tmp_path, wanted(tmp_path))
    with lock:
        write_checkpoint(tmp_path / LAST_CHECKPOINT, archive)
        write_result(tmp_path, {"status": "failed", "error": "no space left"})
    config = some(settings_to_run({"output_dir": tmp_path, "resume": True}, {}))
    with claimed(tmp_path, config)[0]:
        assert read_status(tmp_path) is None
        assert not (tmp_path / RESULT).exists()


def test_what_changed_while_a_process_prepared_is_read_again(tmp_path: Path) -> None:
    lock, _ = claimed(tmp_path, wanted(tmp_path))
    second = some(settings_to_run({"output_dir": tmp_path, "resume": True}, {}))
    with lock:  # at first there was no checkpoint
        write_checkpoint(tmp_path / LAST_CHECKPOINT, archive)
        write_result(tmp_path, {"status": "interrupted"})
    lock, checkpoint = claimed(tmp_path, second)
    with lock:
        assert (read_settings(tmp_path)["resume"], checkpoint) == (True, tmp_path / LAST_CHECKPOINT)
    with claimed(tmp_path, wanted(tmp_path, overwrite=True, seed=7))[0]:
        before = contents(tmp_path)
    check_refusal(r"--seed 0: the run in .* has --seed 7", claimed, tmp_path, second)
    assert contents(tmp_path).keys() == before.keys() - {LOCK}


def interrupted_run(directory: Path, **origin: Any) -> RunConfig:
    """Leaves one with a checkpoint. Returns what resume asks for."""
    with claimed(directory, wanted(directory), **origin)[0]:
        write_checkpoint(directory / LAST_CHECKPOINT, archive)
        write_result(directory, {"status": "interrupted"})
    return wanted(directory, resume=True)


@pytest.mark.parametrize(
    ("origin", "said"),
    [
        ({"base_model": {"model.safetensors": "9"}}, "model.safetensors of the base model .* correct --model_name"),
        ({"adapter": {"adapter_model.safetensors": "9"}}, r"of the adapter is not the one .* correct --init_adapter"),
        ({"adapter": {}}, r"adapter_model.safetensors of the adapter is not the one"),
        ({"data": {"train": "2", "test": "9"}}, "test of the data is not the one .* correct --data_dir"),
    ],
)
def test_other_weights_or_texts_are_refused_and_the_run_stays(
    tmp_path: Path, origin: dict[str, Any], said: str
) -> None:
    resumed = interrupted_run(tmp_path)
    before = contents(tmp_path)
    check_refusal(said, claimed, tmp_path, resumed, **origin)
    assert contents(tmp_path) == before
    (tmp_path / LAST_CHECKPOINT).unlink()
    with claimed(tmp_path, resumed, **origin)[0]:  # starts over
        assert read_origin(tmp_path) == ORIGIN | origin


def test_another_number_of_processes_is_refused_and_the_run_stays(tmp_path: Path) -> None:
    interrupted_run(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"--devices 2 --num_nodes 1: the run in {tmp_path} has 1 processes"):
        claimed(tmp_path, wanted(tmp_path, resume=True, devices=2))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("began", "now", "words"),
    [
        ({}, {"threads": 2}, ""),
        ({}, {"threads": 3}, "with 2 threads and continues with 3"),
        ({}, {"threads": None}, ""),
        ({"precision": "bfloat16"}, {"precision": "bfloat16"}, ""),
        ({"precision": "bfloat16"}, {"precision": "float16"}, "in bfloat16 and continues in float16"),
    ],
)
def test_another_number_of_threads_or_another_precision_gives_a_warning(
    tmp_path: Path, began: dict[str, Any], now: dict[str, Any], words: str, capsys: Capture
) -> None:
    resumed = interrupted_run(tmp_path, **began)
    with claimed(tmp_path, resumed, **now)[0]:
        said = capsys.readouterr().err
    assert said.startswith(f"warning: the run began {words}") if words else said == ""
    assert read_origin(tmp_path) == ORIGIN | began


@pytest.mark.parametrize("status", [None, "interrupted", "failed"])
def test_resume_takes_a_run_that_has_not_finished(tmp_path: Path, status: str | None) -> None:
    held_run(tmp_path, status=status)
    assert read_status(tmp_path) == status
    assert interrupted_settings(tmp_path) == STORED
    check(tmp_path, resume=True)
    checkpoint = (tmp_path / LAST_CHECKPOINT).read_bytes()
    begin(tmp_path, resume=True)
    assert (tmp_path / LAST_CHECKPOINT).read_bytes() == checkpoint


@pytest.mark.parametrize("damaged", ["{", "\udcff"])
def test_resume_of_a_run_whose_settings_are_damaged_is_refused(tmp_path: Path, damaged: str) -> None:
    held_run(tmp_path)
    (tmp_path / SETTINGS).write_bytes(damaged.encode(errors="surrogateescape"))
    assert f"{SETTINGS} cannot be read" in resume_refusal(tmp_path)
    write_result(tmp_path, {"status": "finished"})
    line = refusal_of(settings_to_run, {"resume": "auto", "output_dir": tmp_path}, {})
    assert f"{SETTINGS} cannot be read" in naming(tmp_path, line)  # a job script does not know that it has finished


@pytest.mark.parametrize("damaged", ["", "{", "[]", "{}", '{"status": "failed", "sha256": {"result.json": "1"}}', None])
def test_resume_of_a_run_whose_result_is_damaged_is_refused(tmp_path: Path, damaged: str | None) -> None:
    held_run(tmp_path, status="finished")
    (tmp_path / RESULT).unlink()
    (tmp_path / RESULT).mkdir() if damaged is None else (tmp_path / RESULT).write_text(damaged)
    before = sorted(tmp_path.rglob("*"))
    for resume in (True, "auto"):
        line = refusal_of(settings_to_run, {"resume": resume, "output_dir": tmp_path}, {})
        assert f"{RESULT} cannot be read" in naming(tmp_path, line)
    assert f"{RESULT} cannot be read" in refusal_of(claimed, tmp_path, wanted(tmp_path, resume=True))
    assert sorted(tmp_path.rglob("*")) == before


def test_resume_with_settings_that_were_changed_is_refused(tmp_path: Path) -> None:
    held_run(tmp_path)
    begin(tmp_path, resume=True)
    text = (tmp_path / SETTINGS).read_text()
    (tmp_path / SETTINGS).write_text(text.replace('"seed": ', '"seed": 1'))
    assert f"{SETTINGS} cannot be read: it was changed after it was written" in resume_refusal(tmp_path)
    (tmp_path / SETTINGS).write_text(json.dumps(STORED))  # without a checksum
    assert f"{SETTINGS} cannot be read: it was changed after it was written" in resume_refusal(tmp_path)


def test_a_models_config_is_neither_in_the_way_nor_removed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    check(tmp_path)
    begin(tmp_path)
    begin(tmp_path, overwrite=True)
    assert contents(tmp_path)["config.json"] == b'{"model_type": "bert"}'


def test_default_directory_says_what_runs(monkeypatch: Patch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)  # a shell of salloc, in which several runs may follow
    assert default_directory("imdb", "qlora").match("runs/imdb-qlora-20*-*")
    assert default_directory("me/films:plain text", "lora").match("runs/me-films-plain-text-lora-20*-*")
    monkeypatch.setenv("SLURM_STEP_ID", "3")
    assert default_directory("imdb", "full") == Path("runs/imdb-full-77.3")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # a shell of srun --pty
    assert default_directory("imdb", "full").match("runs/imdb-full-20*-*")


def test_a_run_on_several_nodes_is_continued_on_as_many(tmp_path: Path) -> None:
    flags = {"devices": 2, "num_nodes": 2}
    with claimed(tmp_path, wanted(tmp_path, **flags))[0]:
        write_checkpoint(tmp_path / LAST_CHECKPOINT, archive)
    lock, checkpoint = claimed(tmp_path, wanted(tmp_path, resume=True, **flags))
    lock.release()
    assert checkpoint == tmp_path / LAST_CHECKPOINT
    others = wanted(tmp_path, resume=True, devices=2)
    assert "the run in" in (line := refusal_of(claimed, tmp_path, others))
    assert "has 4 processes" in line


def test_resume_auto_does_not_call_a_run_finished_whose_files_were_changed(tmp_path: Path) -> None:
    with claimed(tmp_path, wanted(tmp_path))[0]:
        (tmp_path / PREDICTIONS).write_bytes(b"predictions")
        write_result(tmp_path, {"status": "finished"})
    given = {"output_dir": tmp_path, "resume": "auto"}
    assert settings_to_run(given, {}) is None
    (tmp_path / PREDICTIONS).write_bytes(b"others")
    assert f"{PREDICTIONS} was changed after its run wrote it" in refusal_of(settings_to_run, given, {})


def test_a_run_next_to_another_inside_it_is_replaced(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "other"):
        claimed(directory, wanted(directory))[0].release()
    check_directory(tmp_path, resume=False, overwrite=True)
