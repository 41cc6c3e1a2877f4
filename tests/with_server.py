"""Runs a command whose server is a fork of this process, which has imported everything: torch starts no second time.

See ``start_with_server`` in tests/scripts.py.
"""

import os
import runpy
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from finetuning import forking  # noqa: E402
from finetuning.comparison import execution  # noqa: E402

ours, theirs = socket.socketpair()
server = os.fork()
if server == 0:
    ours.close()
    os.setpgid(0, 0)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):  # nobody waits for the end of the server's output
        os.dup2(nothing, standard)
    forking.serve(str(theirs.detach()))
theirs.close()


class EarlyServer(forking.ForkServer):
    """The server above, for the command that would start one. Its children have the environment of this process."""

    def __init__(self, _folder: Path, _modules: Sequence[str], _environment: Mapping[str, str]) -> None:
        self._channel = ours

    def close(self) -> None:
        """The server sees the end of its channel. A command may have several of these, for one fork."""
        self._channel.close()
        with suppress(ChildProcessError):
            os.waitpid(server, 0)


execution.ForkServer = EarlyServer  # type: ignore[assignment, misc]
sys.argv = [str(ROOT / sys.argv[1]), *sys.argv[2:]]
runpy.run_path(sys.argv[0], run_name="__main__")
