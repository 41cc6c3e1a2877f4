"""Flags of the command line, made from the fields of the sections in ``settings.py``.

Nothing here imports torch, so that a wrong flag is refused at once.
"""

import argparse
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from finetuning.config import RunConfig
from finetuning.errors import UserError
from finetuning.settings import FLAGS, SECTIONS


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, instead of argparse's usage block."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument ") + self._hint(message))

    def _hint(self, message: str) -> str:
        """The flag that was perhaps meant, where one does not exist."""
        unknown = re.match(r"unrecognized arguments: (--\w+)", message)
        known = [option for action in self._actions for option in action.option_strings]
        near = get_close_matches(unknown[1], known, n=1, cutoff=0.8) if unknown else []
        return f"; did you mean {near[0]}?" if near else ""


def parse_bool(text: str) -> bool:
    """``True/False/yes/no/1/0`` in any case."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True/yes/1 nor False/no/0")
    return words[text.lower()]


def without_switches(words: Sequence[str], *flags: str) -> list[str]:
    """The words of a command line without these flags, which are true or false, and what was given to them."""
    kept: list[str] = []
    dropped = False  # the word before
    for word in words:
        if dropped and _is_bool(word):
            dropped = False
            continue
        dropped = word in flags
        if not dropped and word.split("=")[0] not in flags:
            kept.append(word)
    return kept


def _is_bool(text: str) -> bool:
    try:
        parse_bool(text)
    except argparse.ArgumentTypeError:
        return False
    return True


def make_parser(description: str, defaults: dict[str, Any] | None = None) -> argparse.ArgumentParser:
    """The parser of all settings; what was not given is absent from its namespace."""
    parser = OneLineParser(
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110),
    )
    groups = {name: parser.add_argument_group(name, kind.__doc__) for name, kind in SECTIONS.items()}
    for flag in FLAGS.values():
        shown = (defaults or {}).get(flag.name, flag.shown)
        options: dict[str, Any] = {"help": f"{flag.help} (default: {shown})".replace("%", "%%")}
        if flag.choices:
            options |= {"choices": flag.choices}
        elif flag.kind is bool:
            options |= {"type": parse_bool, "nargs": "?", "const": True, "metavar": "BOOL"}
        else:
            options |= {"type": flag.kind, "metavar": {int: "N", float: "X", str: "NAME", Path: "PATH"}[flag.kind]}
        groups[flag.section].add_argument(f"--{flag.name}", **options)
    return parser


def given_flags(argv: Sequence[str], description: str = "", defaults: dict[str, Any] | None = None) -> dict[str, Any]:
    """The settings that a command line gives, and no others.

    Args:
        argv: the flags, without the program's name.
        description: what ``--help`` says first.
        defaults: settings of a thin entry such as DistilRoberta's, which ``--help`` shows as defaults.

    Raises:
        UserError: a flag that does not exist, or a value of another type.
    """
    return vars(make_parser(description, defaults).parse_args(argv))


def from_flags(argv: Sequence[str]) -> RunConfig:
    """The configuration that command-line flags ask for.

    Raises:
        UserError: a flag that does not exist, or a value that is not allowed.
    """
    return RunConfig.from_settings(**given_flags(argv))
