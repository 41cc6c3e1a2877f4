"""The ways a command ends early, and how any error becomes one line."""

import sys
import textwrap
from collections.abc import Iterable


class UserError(Exception):
    """Refused input, in one line: the flag and its value, what is allowed, what to do. Exit status 2."""


class TrainingFailed(Exception):
    """A run that cannot continue, in one line. Exit status 1."""


class ExportFailed(Exception):
    """An exported folder that does not compute what its run does, in one line. Exit status 1."""


class OutputFailed(Exception):
    """An output that cannot be written, in one line. Exit status 1."""


class Interrupted(Exception):
    """A run that a signal stopped after it wrote its checkpoint. Exit status 130."""


def first_line(error: BaseException, name_file: bool = False) -> str:
    """The first line of an error's message.

    Args:
        error: any error.
        name_file: whether to name the file of an ``OSError``. Leave it out if the text around the line names it.
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if name_file and error.filename else error.strerror
    return (text.strip() or type(error).__name__).splitlines()[0]


def listed(names: Iterable[object]) -> str:
    """Names in one line. Long names are shortened, because the first line of a file without a header can be a text."""
    return ", ".join(textwrap.shorten(str(name), 40, placeholder="...") for name in names) or "none"


def not_installed(error: ModuleNotFoundError) -> str:
    """The line to print if a package of requirements.txt is missing."""
    return f"error: {error.name} is not installed for {sys.executable}: activate the virtual environment first"
