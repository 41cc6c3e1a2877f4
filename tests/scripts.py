"""Starts the project's commands as children of one server for each worker of pytest: Python and torch start once."""

import atexit
import functools
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from finetuning.comparison.execution import PRELOADED
from finetuning.forking import ForkedProcess, ForkServer, can_fork
from tests.common import ROOT


class Script:
    """A command as a child of the server, with the part of ``subprocess.Popen``'s interface that tests need."""

    def __init__(
        self, words: Sequence[str], directory: Path, environment: Mapping[str, str], joined: bool, given: IO[str]
    ) -> None:
        out, its_out = os.pipe()
        error, its_error = (out, its_out) if joined else os.pipe()
        files = given.fileno(), its_out, its_error
        process = _server().start(words, files, directory=directory, environment=environment)
        for file in {its_out, its_error}:
            os.close(file)
        self._process = process
        self.pid = process.pid
        self.poll, self.wait = process.poll, process.wait
        self.send_signal, self.kill = process.send_signal, process.kill
        self.stdout: IO[str] | None = os.fdopen(out, encoding="utf8")
        self.stderr: IO[str] | None = None if joined else os.fdopen(error, encoding="utf8")

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What was printed, at the end of the process. After the timeout, in seconds, it is killed."""
        killer = threading.Timer(timeout, self.kill)
        killer.start()
        streams = (self.stdout, self.stderr)
        with ThreadPoolExecutor() as readers:  # at once: a process waits for whoever reads a full pipe
            out, error = readers.map(lambda stream: stream.read() if stream and not stream.closed else "", streams)
        self.wait()
        killer.cancel()
        for stream in filter(None, streams):
            stream.close()
        return out, error


@functools.cache
def _server() -> ForkServer:
    server = ForkServer(ROOT, (*PRELOADED, "finetuning.comparison.baselines"), os.environ | {"OMP_NUM_THREADS": "1"})
    atexit.register(server.close)
    return server


class SharedServer:
    """Stands in for the ``ForkServer`` that a command in this process would start: the children are this worker's."""

    def __init__(self, _folder: Path, _modules: Sequence[str], environment: Mapping[str, str]) -> None:
        self._environment = environment

    def start(
        self, words: Sequence[str], files: tuple[int, int, int], kept: Sequence[int] = (),
        directory: Path | None = None, environment: Mapping[str, str] | None = None,
    ) -> ForkedProcess:  # fmt: skip
        return _server().start(words, files, kept, directory, environment or self._environment)

    def close(self) -> None:
        """Leaves the server to the next test."""


def start_script(
    script: str,
    words: Sequence[str],
    directory: Path = ROOT,
    joined: bool = False,
    given: str = "",
    more: Mapping[str, str] | None = None,
) -> "Script | subprocess.Popen[str]":
    """Starts a command with one thread, in a process group of its own.

    Variables that a library reads at its import need a new process instead.

    Args:
        script: a file of the root.
        words: its flags.
        directory: the current one of the process.
        joined: whether standard error goes where standard output goes.
        given: its standard input.
        more: variables of its environment.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | dict(more or {})
    command = [str(ROOT / script), *words]
    with tempfile.TemporaryFile("w+", encoding="utf8") as reads:
        reads.write(given)
        reads.seek(0)
        if can_fork():
            return Script(command, directory, environment, joined, reads)
        return subprocess.Popen(
            [sys.executable, *command], cwd=directory, env=environment, text=True, process_group=0, stdin=reads,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT if joined else subprocess.PIPE,
        )  # fmt: skip


def start_with_server(script: str, words: Sequence[str], directory: Path = ROOT) -> Script | subprocess.Popen[str]:
    """``start_script`` for a command that starts a server itself: that one is a fork too. Its output is joined."""
    if can_fork():
        return start_script("tests/with_server.py", [script, *words], directory, joined=True)
    return start_script(script, words, directory, joined=True)


def start(words: Sequence[str]) -> Script | subprocess.Popen[str]:
    return start_script("finetune_lora.py", words)


def finish(process: Script | subprocess.Popen[str]) -> None:
    """Waits for a process that must succeed."""
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
