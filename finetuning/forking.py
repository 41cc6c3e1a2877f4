"""A server process that has imported everything a script needs, and forks a child for each call of the script.

Python and torch take 6 to 10 s to start; a fork takes 20 ms. The child runs the script's file as ``__main__``, as if
it had been started: with its own ``sys.argv``, directory, environment, files and process group, and with Python's usual
end. Whoever forks needs no library's threads before the fork, so the server imports and computes nothing.

``multiprocessing``'s server would not do: there is one for each process, so all children have the environment that its
libraries read at their import, SIGTERM ends it, and its children leave without what Python does at its end.
"""

import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from finetuning.gpus import has_driver
from finetuning.processes import STOP_SIGNALS
from finetuning.processor import limit_libraries

NUMBER = struct.Struct("<i")  # a process id or exit status
MOST_FILES = 16
STATUS_UNKNOWN = 255  # of a child whose watcher was killed

_forked = False


def can_fork() -> bool:
    """Whether children of a server are as good as processes: not on macOS, and not with a GPU, which a fork breaks."""
    return sys.platform == "linux" and not has_driver()


def is_forked() -> bool:
    """Whether this process is a child of a server. Then its time is without the imports, and its peak memory without
    the code that only they ran: on a CPU about 100 MiB less than in a process that was started."""
    return _forked


class ForkServer:
    """Starts the server. It ends when this process closes it or ends; its children go on.

    Args:
        folder: the folder that the children's ``import`` looks at first.
        modules: what the server imports.
        environment: of the server, and of children that get no other one.
    """

    def __init__(self, folder: Path, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        self._channel, theirs = socket.socketpair()
        code = "import sys; sys.path[0] = sys.argv[1]; from finetuning.forking import serve; serve(*sys.argv[2:])"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, str(folder.resolve()), str(theirs.fileno()), *modules],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env=environment, process_group=0, pass_fds=[theirs.fileno()],
            )  # fmt: skip

    def start(
        self,
        words: Sequence[str],
        files: tuple[int, int, int],
        kept: Sequence[int] = (),
        directory: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> "ForkedProcess":
        """Forks a child. Waits for the server if that is still importing.

        Args:
            words: a script's path and its flags.
            files: descriptors of standard input, output and error.
            kept: other descriptors that stay open in the child.
            directory: the child's; the present one if ``None``.
            environment: the child's; the server's if ``None``. A library that read it at its import has not seen it.

        Raises:
            OSError: the server has ended, for example because it cannot import a module.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(self._channel, [b"."], [theirs.fileno(), *files, *kept])
            job = {"words": words, "directory": str(directory or Path.cwd()), "environment": environment}
            ours.sendall(json.dumps(job, default=dict).encode() + b"\n")
            return ForkedProcess(ours)
        except BaseException:
            ours.close()
            raise

    def close(self) -> None:
        self._channel.close()
        self._process.kill()  # it may still be importing
        self._process.wait()


class ForkedProcess:
    """A child of the server, with the part of ``subprocess.Popen``'s interface that its users need."""

    def __init__(self, report: socket.socket) -> None:
        self._report = report
        self.returncode: int | None = None
        (self.pid,) = NUMBER.unpack(_received(report))

    def poll(self) -> int | None:
        """The exit status, ``None`` while the process runs; that of a process killed by a signal is negative."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the exit status, at most ``timeout`` seconds: else ``subprocess.TimeoutExpired``."""
        if self.returncode is None:
            if timeout is not None and not select.select([self._report], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            try:
                (self.returncode,) = NUMBER.unpack(_received(self._report))
            except ConnectionError:
                self.returncode = STATUS_UNKNOWN
            self._report.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless ``wait`` or ``poll`` has seen the end. Handlers of signals may call it."""
        if self.returncode is None:  # until then no other process gets the number, see _watch
            with suppress(ProcessLookupError):  # its watcher was killed
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _received(report: socket.socket) -> bytes:
    data = report.recv(NUMBER.size)
    if len(data) < NUMBER.size:
        raise ConnectionResetError("the server has ended")
    return data


# --- the server


def serve(channel: str, *modules: str) -> NoReturn:
    """The server: imports the modules, then forks a watcher for each job, until its client has ended."""
    for number in STOP_SIGNALS:  # SLURM sends them to all processes of a job
        signal.signal(number, signal.SIG_IGN)
    limit_libraries()
    for module in modules:
        importlib.import_module(module)
    sys.stdout.flush()
    gc.freeze()  # a collection in a child would copy these pages
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the watchers
    with socket.socket(fileno=int(channel)) as client:
        while True:
            message, files, *_ = socket.recv_fds(client, 1, MOST_FILES)
            if not message:
                sys.exit()
            if os.fork() == 0:
                client.close()
                _watch(*files)
            for file in files:
                os.close(file)


def _watch(report: int, *files: int) -> NoReturn:
    """Forks the child, and reports its exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    client = socket.socket(fileno=report)
    job = json.loads(client.makefile().readline())
    pid = os.fork()
    if pid == 0:
        _run(client, files, **job)
    for file in files:
        os.close(file)
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    with suppress(OSError):  # the client may have ended
        client.sendall(NUMBER.pack(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status))
        client.recv(1)  # until the client has seen it, no other process may get the child's number
    os.waitpid(pid, 0)
    os._exit(0)


def _run(
    client: socket.socket, files: tuple[int, ...], words: list[str], directory: str, environment: dict[str, str] | None
) -> NoReturn:
    """The child: becomes the process that was asked for, and runs the script."""
    global _forked
    _forked = True
    os.setpgid(0, 0)
    try:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for standard, file in enumerate(files[:3]):
            os.dup2(file, standard)
            os.close(file)
        for standard, name in enumerate(("stdin", "stdout", "stderr")):
            stream = _opened(standard, getattr(sys, name))
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        with suppress(OSError):  # the client may have ended
            client.sendall(NUMBER.pack(os.getpid()))  # from here on signals reach the script
        os.chdir(directory)
        if environment is not None:
            os.environ.clear()
            os.environ.update(environment)
        sys.argv = words
        sys.path[0] = str(Path(words[0]).resolve().parent)
    except KeyboardInterrupt:  # before the script could hear it: ends by the signal, without a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    runpy.run_path(words[0], run_name="__main__")
    sys.exit()


def _opened(file: int, like: io.TextIOWrapper) -> io.TextIOWrapper:
    """A standard stream of a child, as Python opens it at its start; the server's one knows another kind of file."""
    raw = open(file, "wb" if file else "rb", 0 if file and like.write_through else -1, closefd=False)  # noqa: SIM115
    lines = like.line_buffering or raw.isatty()
    return io.TextIOWrapper(raw, like.encoding, like.errors, None, lines, like.write_through)
