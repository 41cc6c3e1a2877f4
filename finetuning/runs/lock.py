"""One writer per run directory: a lock that says who holds it. And claims: the lock of work that processes share.

The system frees the lock when its process ends, however it ends. A directory's file stays only if the process was
killed, so the next run can say so; a claim's file always stays. On a network file system, other hosts see the lock if
the file system passes locks on: NFS does, Lustre if it was mounted with ``-o flock``. A file system without locks lets
the run start, with a warning.
"""

import fcntl
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from finetuning.errors import UserError

LOCK = ".lock"
LOOK_AGAIN_SECONDS = 0.5
A_MOMENT = 0.01  # seconds
ANOTHER = "another process"  # whose name the lock does not say


class DirectoryLock:
    """Holds a run directory until the context ends. The directory is made if it does not exist.

    Args:
        patience: seconds to wait for another holder.

    Attributes:
        killed: what ``who`` says of a process that was killed while it held the directory; ``None`` if none was.

    Raises:
        UserError: a living process holds the directory, or it cannot be written.
    """

    def __init__(self, directory: Path, patience: float = 0.0) -> None:
        self.path = directory / LOCK
        self._file: Any = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = self._locked(directory, time.monotonic() + patience)
            self.killed = who(self._file.read())
            _sign(self._file)
        except OSError as error:
            if self._file is not None:
                self.release()
            raise UserError(f"--output_dir {directory}: cannot be written: {error.strerror}") from None

    def _locked(self, directory: Path, until: float) -> Any:
        waits = False
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            file = os.fdopen(descriptor, "r+", encoding="utf8", errors="replace")  # a crash may leave any bytes
            try:
                locked = _locks(file, fcntl.LOCK_EX)
                if not locked:  # a command that only looks, see ``holder``, has a shared lock for a moment
                    time.sleep(A_MOMENT)
                    locked = _locks(file, fcntl.LOCK_EX)
            except OSError as error:
                print(f"warning: {directory} cannot be locked ({error.strerror}): start no second run", file=sys.stderr)
                return file
            if not locked:
                with file:
                    other = who(file.read()) or ANOTHER
                if time.monotonic() >= until:
                    raise in_use(directory, other)
                if not waits:
                    print(f"{directory} is held by {other}: waiting for it", flush=True)
                waits = True
                time.sleep(LOOK_AGAIN_SECONDS)
            elif _same_file(file.fileno(), self.path):
                return file
            else:
                file.close()  # the holder removed it between our open and our lock

    def __enter__(self) -> "DirectoryLock":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        with suppress(OSError):  # the file system may have become read-only
            self.path.unlink(missing_ok=True)
        with suppress(OSError):  # closing writes what is buffered, which fails on a full disk
            self._file.close()


@contextmanager
def claimed(path: Path, lease: float = 0.0) -> Iterator[int | None]:
    """Claims what a lock file stands for. The file is never removed.

    A child process that inherits the descriptor has the claim as well. The system frees it when all of them have ended,
    however they end.

    Args:
        lease: seconds in which the claim of a process on another host counts after its last ``os.utime``, even if that
            host's lock is not seen here; 0 trusts the lock alone.

    Returns:
        The file's descriptor; ``None`` if another process has the claim.

    Raises:
        OSError: the file cannot be written (the error names it), or the file system has no locks (it does not).
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    with os.fdopen(descriptor, "r+", encoding="utf8", errors="replace") as file:
        if not _locks(file, fcntl.LOCK_EX) or _is_leased(file, lease):
            file.close()  # a claim that fails lets go at once: its context may end long after the next attempt
            yield None
            return
        _sign(file)
        try:
            yield descriptor
        finally:
            with suppress(OSError):
                os.ftruncate(descriptor, 0)


def is_held(path: Path, lease: float = 0.0) -> bool:
    """Whether a process has the claim of a lock file, see ``claimed``. Changes nothing."""
    try:
        file = path.open(encoding="utf8", errors="replace")
    except FileNotFoundError:
        return False
    with file:
        return not _locks(file, fcntl.LOCK_SH) or _is_leased(file, lease)


def _locks(file: Any, kind: int) -> bool:
    """Locks an open file, shared or alone. ``False`` if another process has locked it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_leased(file: Any, lease: float) -> bool:
    """Whether a process of another host has signed an open lock file, not longer ago than its lease."""
    recent = time.time() - os.fstat(file.fileno()).st_mtime < lease
    return recent and f'"{platform.node()}"' not in (content := file.read()) and who(content) is not None


def _sign(file: Any) -> None:
    """Writes who holds an open lock file."""
    file.seek(0)
    file.truncate()
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    json.dump({"host": platform.node(), "process": os.getpid(), "since": since}, file)
    file.flush()


def holder(directory: Path) -> str | None:
    """Who holds a directory, as ``who`` says it; ``None`` if nobody does. Changes nothing."""
    with suppress(OSError), (directory / LOCK).open(encoding="utf8", errors="replace") as file:
        if not _locks(file, fcntl.LOCK_SH):
            return who(file.read()) or ANOTHER
    return None


def in_use(directory: Path, other: str) -> UserError:
    """The refusal of a directory that ``other`` holds."""
    return UserError(f"--output_dir {directory}: is being written by {other}: wait, or give another directory")


def who(content: str) -> str | None:
    """``process 12 on HOST since TIME``, from a lock's content; ``None`` if it says nothing."""
    try:
        holder = json.loads(content)
        return f"process {holder['process']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return None


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
