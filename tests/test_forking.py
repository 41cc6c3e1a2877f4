"""Children of the server are like processes that were started: what they get, how they end, what outlives what."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.slurm_cluster import wait_until
from finetuning import forking, gpus
from finetuning.forking import ForkedProcess, ForkServer
from finetuning.processes import STOP_SIGNALS
from tests.common import ROOT

PATIENCE_SECONDS = 60
SEEN = """
import json, os, random, signal, sys
print(json.dumps({
    "argv": sys.argv, "path": sys.path[0], "name": __name__, "cwd": os.getcwd(), "input": sys.stdin.read(),
    "variables": dict(os.environ), "group": os.getpgid(0) == os.getpid(), "torch": "torch" in sys.modules,
    "handlers": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)],
    "random": random.random(),
    "streams": [[s.isatty(), s.seekable(), s.encoding, s.errors, s.line_buffering, s.write_through]
                for s in (sys.stdin, sys.stdout, sys.stderr, sys.__stdout__)],
}))
print("to the other file", file=sys.stderr)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="servers are used on Linux only")


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    started = ForkServer(ROOT, ["json"], os.environ | {"OF_THE_SERVER": "1"})
    yield started
    started.close()


def start(server: ForkServer, folder: Path, code: str, *words: str, **options: Any) -> ForkedProcess:
    """A script with this code; its output is in ``out`` and ``err``."""
    (folder / "script.py").write_text(code, encoding="utf8")
    with Path(os.devnull).open() as nothing, (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        files = nothing.fileno(), out.fileno(), err.fileno()
        return server.start([str(folder / "script.py"), *words], files, **options)


@pytest.fixture
def no_signal_is_ignored() -> Iterator[None]:
    """A process inherits that signals are ignored, and an earlier test may have left them so."""
    earlier = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS}
    yield
    for number, handler in earlier.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("no_signal_is_ignored")
def test_a_child_is_what_a_process_is(server: ForkServer, tmp_path: Path) -> None:
    variables = dict(os.environ) | {"A": "ä"}
    seen: list[dict[str, Any]] = []
    for environment in (variables, None):
        child = start(server, tmp_path, SEEN, "--flag", "ä b", directory=tmp_path, environment=environment)
        assert child.wait() == 0
        assert (tmp_path / "err").read_text() == "to the other file\n"
        seen.append(json.loads((tmp_path / "out").read_text()))
    words = [sys.executable, str(tmp_path / "script.py"), "--flag", "ä b"]
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        subprocess.run(
            words, cwd=tmp_path, env=variables, stdin=subprocess.DEVNULL, stdout=out, stderr=err, process_group=0
        )
    expected = json.loads((tmp_path / "out").read_text())
    assert seen[0].pop("random") != seen[1].pop("random") != expected.pop("random")
    assert seen[0] == expected
    assert seen[1].pop("variables")["OF_THE_SERVER"] == "1"
    del expected["variables"]
    assert seen[1] == expected


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("", 0, ""),
        ("import sys; sys.exit(7)", 7, ""),
        ("import sys; sys.exit('why')", 1, "why\n"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import atexit, sys; atexit.register(print, 'at its end', file=sys.stderr)", 0, "at its end\n"),
        ("open('/nowhere')", 1, "FileNotFoundError: [Errno 2] No such file or directory: '/nowhere'\n"),
    ],
)
def test_how_a_child_ends(server: ForkServer, tmp_path: Path, code: str, status: int, said: str) -> None:
    child = start(server, tmp_path, code)
    assert child.wait() == child.poll() == child.returncode == status
    assert (tmp_path / "err").read_text().endswith(said)
    assert bool((tmp_path / "err").read_text()) == bool(said)
    child.kill()  # nobody: its number may be another process's


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_signals_end_a_child_and_not_the_server(server: ForkServer, tmp_path: Path, number: int) -> None:
    child = start(server, tmp_path, "import time; time.sleep(60)")
    assert child.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.01)
    child.send_signal(number)  # at once: none is lost
    assert child.wait(PATIENCE_SECONDS) == -number
    if number != signal.SIGKILL:
        os.kill(server._process.pid, number)  # as SLURM does
    assert start(server, tmp_path, "").wait() == 0


def test_a_child_outlives_server_and_client_and_keeps_the_lock(tmp_path: Path) -> None:
    code = "import pathlib, time\npathlib.Path('began').touch()\n"
    code += "while not pathlib.Path('go').exists(): time.sleep(0.01)\npathlib.Path('ended').touch()"
    server = ForkServer(ROOT, [], os.environ)
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        child = start(server, tmp_path, code, kept=[lock.fileno()], directory=tmp_path)
    server.close()
    wait_until((tmp_path / "began").exists, "the child")
    with (tmp_path / "lock").open("w") as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (tmp_path / "go").touch()
        assert child.wait() == 0
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert (tmp_path / "ended").exists()


def test_a_server_that_cannot_import_what_it_should_is_an_error(tmp_path: Path) -> None:
    server = ForkServer(ROOT, ["no_such_module"], os.environ)
    for _ in range(2):
        with pytest.raises(OSError):  # noqa: PT011  # a broken pipe or a reset connection
            start(server, tmp_path, "")
    server.close()


def test_no_server_with_a_gpu_or_on_macos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "DRIVERS", [str(tmp_path / "card")])
    assert forking.can_fork()
    (tmp_path / "card").touch()
    assert not forking.can_fork()
    (tmp_path / "card").unlink()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not forking.can_fork()
