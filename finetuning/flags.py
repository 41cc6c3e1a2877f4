"""Command-line flags, built from the fields of the sections in ``settings``.

Nothing here imports torch, so a wrong flag fails at once.
"""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from finetuning.config import RunConfig
from finetuning.errors import UserError
from finetuning.settings import AUTO, COMMANDS, FLAGS, SECTIONS, CommandSettings, Flag, shown_value

ALLOWED = {  # by type
    "int": "a whole number",
    "float": "a number",
    "parse_bool": "True, yes, 1, False, no or 0",
    "parse_bool_or_auto": f"True, yes, 1, False, no, 0 or {AUTO}",
    "parse_int_or_auto": f"a whole number or {AUTO}",
    "parse_path": "a path",
}


class OneLineParser(argparse.ArgumentParser):
    """Prints an error as one line that says what is allowed, instead of argparse's usage block."""

    def error(self, message: str) -> NoReturn:
        """Raises ``UserError`` for argparse's message."""
        message = message.removeprefix("argument ")
        raise UserError((_wrong_type(message) or _wrong_choice(message) or message) + self._hint(message))

    def _hint(self, message: str) -> str:
        """Suggests the existing flag that is most like an unknown one, or the one of a file without a flag."""
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        known = [option for action in self._actions for option in action.option_strings]
        if unknown is None:
            return ""
        if unknown[1].startswith("-"):
            near = get_close_matches(unknown[1], known, n=1, cutoff=0.8)
        else:
            named = os.path.exists(unknown[1])  # noqa: PTH110  # a Path's own method raises for a long text
            near = [f"{option} {unknown[1]}" for option in ("--file", "--data_dir") if named and option in known][:1]
        return f"; did you mean {near[0]}?" if near else ""


def no_flag(name: str) -> str:
    """What to say of a setting that no flag of a run has."""
    near = get_close_matches(name, FLAGS, n=1, cutoff=0.8)
    return f"{name}: finetune_lora.py has no flag of this name" + (f"; did you mean {near[0]}?" if near else "")


def _wrong_type(message: str) -> str | None:
    """``--lora_r: invalid int value: 'eight'`` -> ``--lora_r eight: must be a whole number``."""
    found = re.fullmatch(r"(\S+): invalid (\w+) value: (['\"])(.*)\3", message, re.DOTALL)
    if not found or found[2] not in ALLOWED:
        return None
    left_out = ", or left out" if found[2] == "parse_path" and found[1].startswith("-") else ""
    return f"{found[1]} {found[4]}: must be {ALLOWED[found[2]]}{left_out}"


def _wrong_choice(message: str) -> str | None:
    """``--method: invalid choice: 'x' (choose from 'a', 'b')`` -> ``--method x: must be one of a, b``."""
    found = re.fullmatch(r"(\S+): invalid choice: (['\"])(.*)\2 \(choose from (.*)\)", message, re.DOTALL)
    return f"{found[1]} {found[3]}: must be one of {found[4].replace(chr(39), '')}" if found else None


def parse_bool(text: str) -> bool:
    """Reads ``True/False/yes/no/1/0`` in upper or lower case; any other text is a ``ValueError``."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise ValueError(f"{text!r} is neither True/yes/1 nor False/no/0")
    return words[text.lower()]


def parse_bool_or_auto(text: str) -> bool | str:
    """Like ``parse_bool``, but also takes the word ``auto``."""
    return AUTO if text.lower() == AUTO else parse_bool(text)


def parse_path(text: str) -> Path:
    """Reads a path. An empty text, as of a variable that is not set, would be the current folder.

    Shells leave ``~`` in ``--flag=~/folder`` as it is, and some libraries take it for the home, as people do.

    Raises:
        ValueError: the text is empty.
    """
    if not text:
        raise ValueError("an empty path")
    with suppress(RuntimeError):  # nobody of this name
        return Path(text).expanduser()
    return Path(text)


def parse_int_or_auto(text: str) -> int | None:
    """Reads a whole number. The word ``auto`` is ``None``, as if the flag were not given."""
    return None if text.lower() == AUTO else int(text)


def make_parser(description: str, defaults: dict[str, Any] | None = None) -> argparse.ArgumentParser:
    """The parser of all settings. Its namespace holds only the flags that were given."""
    parser = OneLineParser(
        description=description,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110),
    )
    add_flags(parser, FLAGS | COMMANDS, defaults or {})
    return parser


def add_flags(parser: argparse.ArgumentParser, flags: Mapping[str, Flag], defaults: Mapping[str, Any]) -> None:
    """Adds flags of a run to a parser. Its namespace gets only those that are given.

    Args:
        parser: gets a group for each section.
        flags: by name, such as ``FLAGS``.
        defaults: defaults that ``--help`` prints instead of the usual ones.
    """
    kinds = SECTIONS | {"command": CommandSettings}
    used = dict.fromkeys(flag.section for flag in flags.values())
    groups = {name: parser.add_argument_group(name, kinds[name].__doc__) for name in used}
    for flag in flags.values():
        shown = defaults.get(flag.name, flag.shown)
        options: dict[str, Any] = {"help": f"{flag.help} (default: {shown})".replace("%", "%%")}
        options["default"] = argparse.SUPPRESS
        if flag.choices:
            options |= {"choices": flag.choices}
        elif flag.kind is bool:
            parse = parse_bool_or_auto if flag.or_auto else parse_bool
            options |= {"type": parse, "nargs": "?", "const": True, "metavar": "BOOL"}
        else:
            kind = parse_path if flag.kind is Path else flag.kind
            options |= {
                "type": parse_int_or_auto if flag.or_auto else kind,
                "metavar": {int: "N", float: "X", str: "NAME", Path: "PATH"}[flag.kind],
            }
        groups[flag.section].add_argument(f"--{flag.name}", **options)


def given_flags(argv: Sequence[str], description: str = "", defaults: dict[str, Any] | None = None) -> dict[str, Any]:
    """The settings that a command line gives, without any defaults.

    Args:
        argv: the flags, without the program's name.
        description: the first sentence of ``--help``.
        defaults: defaults that ``--help`` prints instead of the usual ones, for example those of DistilRoberta.

    Raises:
        UserError: a flag does not exist, or a value has the wrong type.
    """
    parser = make_parser(description, defaults) if description or defaults else _plain_parser()
    return vars(parser.parse_args(argv))


@cache  # a study reads hundreds of command lines, and the parser takes most of the time
def _plain_parser() -> argparse.ArgumentParser:
    return make_parser("")


def flag_words(settings: Mapping[str, Any]) -> list[str]:
    """Settings as words of a command line; ``None`` is the word ``auto``.

    A value that begins with a dash is joined to its flag, for argparse.
    """
    pairs = ((f"--{name}", str(shown_value(value))) for name, value in settings.items())
    return [word for flag, value in pairs for word in ([f"{flag}={value}"] if value[:1] == "-" else [flag, value])]


def split_command(given: dict[str, Any]) -> tuple[CommandSettings, dict[str, Any]]:
    """What the command does instead of a run, and the settings of a run, from the result of ``given_flags``."""
    commands = {name: value for name, value in given.items() if name in COMMANDS}
    return CommandSettings(**commands), {name: value for name, value in given.items() if name not in COMMANDS}


def from_flags(argv: Sequence[str]) -> RunConfig:
    """The configuration for these command-line flags, refused if one does not exist or a value is not allowed."""
    instead, given = split_command(given_flags(argv))
    config = RunConfig.from_settings(**given)
    instead.check(config.hardware, config.run)
    return config
