"""How a run can end early, each a type of its own, and how any error is put into one line."""

import sys
import textwrap
from collections.abc import Iterable


class UserError(Exception):
    """Refused input. Its text is one line: what was given, what is allowed, which flag. Exit status 2."""


class TrainingFailed(Exception):
    """A run that cannot go on, in one line. Exit status 1."""


class Interrupted(Exception):
    """A run that was asked to stop and has written its checkpoint. Exit status 130."""


def first_line(error: BaseException, name_file: bool = False) -> str:
    """What an error says, in one line.

    Args:
        error: any error.
        name_file: whether to name the file of an ``OSError``; not needed if the message around it does.
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if name_file and error.filename else error.strerror
    return (text.strip() or type(error).__name__).splitlines()[0]


def listed(names: Iterable[object]) -> str:
    """Names in one line. A long name is shortened: the first line of a file without a header can be a whole text."""
    return ", ".join(textwrap.shorten(str(name), 40, placeholder="...") for name in names) or "none"


def not_installed(error: ModuleNotFoundError) -> str:
    """The line to print if a package of requirements.txt is missing."""
    return f"error: {error.name} is not installed for {sys.executable}: activate the venv first"
