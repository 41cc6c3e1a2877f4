"""The ways a command ends early, and how any error becomes one line."""

import errno
import io
import os
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

NO_WAY_THERE = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)  # of a look at a path: a Path's exists() raises them
# What torch, the system's loader, Python's threads, the tokenizers' threads and CUDA say if they find no memory.
NO_MEMORY = (
    "can't allocate memory", "failed to map segment", "can't start new thread", "ThreadPoolBuildError",
    "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
)  # fmt: skip
PROGRESS = "epoch "  # with which a line of a run's progress begins
UNSEEN = ("Cc", "Cs", "Zl", "Zp")  # Unicode's categories of control characters, stray surrogates and line breaks


class OneLine(Exception):
    """An error whose message is one line, whatever was given: a line break or a terminal's command in it is spelled."""

    def __init__(self, message: str) -> None:
        seen = (c.encode("unicode_escape").decode() if unicodedata.category(c) in UNSEEN else c for c in message)
        super().__init__("".join(seen))


class Unheard(io.TextIOBase):
    """Standard output of a run that is part of another one. What it says goes nowhere, its warnings are printed.

    Args:
        shown_on: a terminal that shows the latest line of its progress, and nothing when the run is over.
        title: stands before that line.
    """

    def __init__(self, shown_on: TextIO | None = None, title: str = "") -> None:
        self._terminal, self._title = shown_on, title

    def write(self, text: str) -> int:
        return len(text)

    def progress(self, line: str) -> None:
        """Replaces the line that the terminal shows."""
        if self._terminal is not None:
            shown = f"{self._title}{line}"[: shutil.get_terminal_size().columns - 1]
            with suppress(OSError):  # it was closed
                self._terminal.write(f"\r\x1b[K{shown}")
                self._terminal.flush()

    def close(self) -> None:
        if self._terminal is not None and not self.closed:
            with suppress(OSError):
                self._terminal.write("\r\x1b[K")
        super().close()


class UserError(OneLine):
    """Refused input, in one line: the flag and its value, what is allowed, what to do. Exit status 2."""


class TrainingFailed(OneLine):
    """A run that cannot continue, in one line. Exit status 1."""


class ExportFailed(OneLine):
    """An exported folder that does not compute what its run does, in one line. Exit status 1."""


class OutputFailed(OneLine):
    """An output that cannot be written, in one line. Exit status 1."""


class Interrupted(Exception):
    """A run that a signal stopped after it wrote its checkpoint. Exit status 130."""


def first_line(error: BaseException, name_file: bool = False) -> str:
    """The first line of an error's message.

    Args:
        name_file: whether to name the file of an ``OSError``. Leave it out if the text around the line names it.
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if name_file and error.filename else error.strerror
    return (text.strip() or type(error).__name__).splitlines()[0]


@contextmanager
def as_user_error(what: str, *kinds: type[Exception], name_file: bool = False) -> Iterator[None]:
    """Turns errors of these kinds into a ``UserError``: ``what``, a colon, and the first line of the error.

    Args:
        what: the flag or file, and what is wrong.
        kinds: the errors of the block that are the user's to mend.
        name_file: as in ``first_line``.

    Raises:
        UserError: the block raised one of them.
    """
    try:
        yield
    except kinds as error:
        raise UserError(f"{what}: {first_line(error, name_file)}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU, torch's allocator, Arrow, Python or the system's loader had no memory left."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    said = any(text in str(error) for text in NO_MEMORY)  # by errors that have no kind of their own
    known = {"OutOfMemoryError", "MemoryError"}
    return said or bool(kinds & known) or getattr(error, "errno", None) == errno.ENOMEM


def listed(names: Iterable[object], most: int | None = None) -> str:
    """Names in one line. Long names lose their middle, because the first line of a file without a header can be a text.

    Args:
        names: their letters that cannot be printed, which could change a terminal, become question marks.
        most: how many are shown; ``None``: all.
    """
    words = [" ".join(str(name).split()) for name in names]
    words = ["".join(letter if letter.isprintable() else "?" for letter in word) for word in words]
    shown = [name if len(name) <= 40 else f"{name[:18]}...{name[-19:]}" for name in words]
    more = [f"{len(shown) - most:,} more"] if most is not None and len(shown) > most else []
    return ", ".join([*shown[:most], *more]) or "none"


def counted(number: int, noun: str) -> str:
    """A number of things, for example ``1 epoch`` or ``2 epochs``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def exit_status(command: Callable[[], int], interrupted: str = "") -> int:
    """Runs a command. If it ends early, it says why in one line on standard error.

    Args:
        interrupted: the line after Ctrl-C; empty if the command has said enough.

    Returns:
        The command's status, or 2 input refused or a package missing, 1 failed, 130 interrupted.
    """
    if sys.stdout is None:  # whoever started the command has closed it
        sys.stdout = open(os.devnull, "w", encoding="utf8")  # noqa: SIM115, PTH123  # for the rest of the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf8")  # noqa: SIM115, PTH123
    try:
        with output_flushed():
            return command()
    except UserError as error:
        status, line = 2, f"error: {error}"
    except ModuleNotFoundError as error:
        activate = "activate the virtual environment first"
        status, line = 2, f"error: {error.name} is not installed for {sys.executable}: {activate}"
    except (ExportFailed, OutputFailed) as error:
        status, line = 1, f"failed: {error}"
    except KeyboardInterrupt:
        status, line = 130, interrupted
    except BrokenPipeError:  # whoever read standard output has seen enough, for example `head`
        status, line = 1, ""
    except BaseException as error:  # a panic of the tokenizers is no Exception
        if is_out_of_memory(error):
            status, line = 1, "failed: out of memory: use fewer or shorter texts or a smaller model, or free memory"
        elif isinstance(error, OSError) and error.errno in NO_WAY_THERE:
            status, line = 2, f"error: {first_line(error, name_file=True)}"
        else:
            raise
    if line:
        say(line, sys.stderr)
    return status


@contextmanager
def output_flushed() -> Iterator[None]:
    """Writes what is left of standard output. Python itself would do it at its end, with a traceback if it fails.

    Raises:
        OutputFailed: it cannot be written. If only its reader has ended, nothing is said.
    """
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        except OSError as error:
            forget_output()
            if not isinstance(error, BrokenPipeError):
                raise OutputFailed(f"standard output cannot be written: {first_line(error)}") from None


def forget_output(stream: TextIO | None = None) -> None:
    """Drops what standard output could not take, which Python would try to write again at its end; later text as well.

    Args:
        stream: another one, such as standard error.
    """
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), (stream or sys.stdout).fileno())


def say(text: str, stream: TextIO | None = None) -> None:
    """Prints a text of a run. If nobody reads it any more, as after Ctrl-C in ``| tee``, the run still goes on.

    The same holds for a terminal that was closed: writing to it fails a moment before SIGHUP arrives.

    Args:
        stream: where to; standard output if ``None``. If that is ``Unheard``, only progress is shown.
    """
    if isinstance(sys.stdout, Unheard):
        if text.startswith(PROGRESS):
            sys.stdout.progress(text)
        return
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        forget_output(stream)
