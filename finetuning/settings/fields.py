"""What a field of a section is: a flag with its help, its bounds and its default."""

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

from finetuning.errors import UserError

Values = SimpleNamespace  # every setting of a run by name, with its default if it was not given


def setting(
    default: Any,
    help: str,
    shown: str | None = None,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    or_auto: bool = False,
) -> Any:
    """A field that is also a flag.

    Args:
        default: the value if the flag is not given. ``None`` means "none", or that it depends on other settings.
        help: one sentence, with the unit.
        shown: the default as ``--help`` prints it, if that differs from ``default``.
        at_least, at_most, above, below: bounds of a number. A number with bounds must also be finite.
        or_auto: whether the flag also takes the word auto. For a number it means "not given".
    """
    given = {"at least": at_least, "at most": at_most, "above": above, "below": below}
    bounds = {name: value for name, value in given.items() if value is not None}
    metadata = {"help": help, "shown": shown or str(default), "bounds": bounds, "or_auto": or_auto}
    return dataclasses.field(default=default, metadata=metadata)


def require(values: Values, name: str, allowed: bool, message: str) -> None:
    """Refuses a setting, with its value, unless it is allowed."""
    if not allowed:
        raise UserError(f"--{name} {getattr(values, name)}: {message}")


@dataclass(frozen=True)
class Flag:
    """One field of a section, as a command-line flag."""

    name: str
    section: str  # a key of SECTIONS
    kind: type  # of the value, without ``| None``
    choices: tuple[str, ...]  # empty if any value of the type is allowed
    default: Any
    shown: str  # the default as --help prints it
    help: str
    bounds: dict[str, float]
    or_auto: bool


def flags(sections: dict[str, type]) -> Iterator[Flag]:
    """Every setting, section by section."""
    for section, kind in sections.items():
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            hint = hints[field.name]
            if typing.get_origin(hint) is not Literal:  # X | None -> X
                hint = next((o for o in typing.get_args(hint) if o is not type(None)), hint)
            choices, value_type = (typing.get_args(hint), str) if typing.get_origin(hint) is Literal else ((), hint)
            yield Flag(field.name, section, value_type, choices, field.default, **field.metadata)
