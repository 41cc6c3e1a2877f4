import errno
import fcntl
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from finetuning.errors import UserError
from finetuning.runs import lock as lock_module
from finetuning.runs.lock import LOCK, DirectoryLock, claimed, is_held
from tests.common import ROOT, Capture, Patch, check_refusal, full_disk, refusal_of, some

HOLD = """
import sys, pathlib
from finetuning.runs.lock import DirectoryLock
lock = DirectoryLock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
input()
"""


def test_a_living_process_is_named_and_a_killed_one_is_not_in_the_way(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "run"
    command = [sys.executable, "-c", HOLD, str(directory)]
    other = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert some(other.stdout).readline() == "held\n"
    holder = f"process {other.pid} on {os.uname().nodename} since 20"
    check_refusal(f"--output_dir {directory}: is being written by {holder}.*: wait, or give", DirectoryLock, directory)
    other.kill()
    other.communicate()
    with DirectoryLock(directory) as lock:
        assert some(lock.killed).startswith(holder)
        assert json.loads((directory / LOCK).read_text())["process"] == os.getpid()
    assert list(directory.iterdir()) == []
    with DirectoryLock(directory) as lock:
        assert lock.killed is None


def test_who_has_patience_waits_for_the_holder(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    first, slept = DirectoryLock(tmp_path), []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            first.release()

    monkeypatch.setattr(lock_module.time, "sleep", sleep)
    with DirectoryLock(tmp_path, patience=60):
        assert len(slept) == 2
    assert capsys.readouterr().out.count(": waiting for it\n") == 1


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path: Path, monkeypatch: Patch) -> None:
    first, flock, taken = DirectoryLock(tmp_path), fcntl.flock, []

    def end_of_the_first(file: object, how: int) -> None:
        taken.append(file)
        if len(taken) == 1:  # between the second one's opening of the file and its lock
            first.release()
        flock(file, how)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", end_of_the_first)
    with DirectoryLock(tmp_path), pytest.raises(UserError, match="is being written by"):
        DirectoryLock(tmp_path)
    assert len(taken) == 4, "the one that was refused has looked twice"


def test_who_only_looks_refuses_nobody(tmp_path: Path, monkeypatch: Patch) -> None:
    with (tmp_path / LOCK).open("w+", encoding="utf8") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        monkeypatch.setattr("finetuning.runs.lock.time.sleep", lambda _: fcntl.flock(looking, fcntl.LOCK_UN))
        with DirectoryLock(tmp_path):
            pass


def test_a_lock_with_damaged_content_is_not_in_the_way(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_bytes(b"\xff\x80\x00")
    with DirectoryLock(tmp_path) as lock:
        assert lock.killed is None
        (tmp_path / LOCK).write_bytes(b"\xff\x80\x00")
        assert "is being written by another process" in refusal_of(DirectoryLock, tmp_path)


def test_a_file_system_without_locks_lets_the_run_start_with_a_warning(
    tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with DirectoryLock(tmp_path):
        (line,) = capsys.readouterr().err.splitlines()
    assert line == f"warning: {tmp_path} cannot be locked (No locks available): start no second run"


def test_a_full_disk_refuses_the_directory_in_one_line(tmp_path: Path, monkeypatch: Patch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(json, "dump", full_disk)
        check_refusal(f"--output_dir {tmp_path}: cannot be written: No space left on device", DirectoryLock, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with DirectoryLock(tmp_path) as lock:
        assert lock.killed is None


def test_a_claim_is_for_one_process_and_for_the_children_that_inherit_it(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with claimed(path) as lock:
        assert lock is not None
        assert json.loads(path.read_text())["process"] == os.getpid()
        with claimed(path) as second:
            assert second is None
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock])
    with claimed(path) as third:
        assert third is None
    child.communicate(b"\n")
    with claimed(path) as fourth:
        assert fourth is not None
    assert path.read_text() == ""


def test_a_lease_is_for_other_hosts_whose_locks_may_not_be_seen(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    for host, held in (("elsewhere", True), (platform.node(), False)):
        path.write_text(json.dumps({"host": host, "process": 1, "since": "today"}))
        assert is_held(path, lease=60) == held
        with claimed(path, lease=60) as descriptor:
            assert (descriptor is None) == held, "a killed process of this host is known to be gone"
