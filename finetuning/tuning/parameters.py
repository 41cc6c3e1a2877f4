"""The parameters of a search: their values and conditions, the declared ones, and a file that changes them."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.comparison.drawn import is_float, is_searched, searchable
from finetuning.config import method_of
from finetuning.errors import UserError, as_user_error
from finetuning.settings import FLAGS, PACKAGED, PACKAGED_MODELS, full_name

Value = str | int | float | bool
Point = dict[str, Value]  # a parameter's name -> its value

PLACEMENT = "placement"  # the one parameter that is no flag
PLACEMENTS = {
    "query_value": ("lora_query", "lora_value"),
    "attention": ("lora_query", "lora_key", "lora_value", "lora_projection"),
    "all": ("lora_query", "lora_key", "lora_value", "lora_projection", "lora_mlp"),
}
MAX_LENGTH, MODEL = "max_length", "model_name"
KEYS = ("values", "low", "high", "log", "times_default", "if")
REPLACE = "replace"  # the key of a file whose rows are the whole space


@dataclass(frozen=True)
class Parameter:
    """A dimension of the space: a list of values, or a range."""

    name: str  # of a flag, or ``placement``
    values: tuple[Value, ...] = ()  # to choose from; empty for a range
    # low, high: the bounds of a range; of whole numbers if the flag takes these
    low: float | None = None
    high: float | None = None
    log: bool = False  # whether a range is drawn on a logarithmic scale
    times_default: bool = False  # whether the values are multiples of what the run would take without the flag
    only: Mapping[str, Sequence[Value]] | None = None  # parameter or flag -> the values with which this one is there
    own: bool = False  # whether the user's file has it, so what is refused in it is an error

    @property
    def condition(self) -> str:
        """When it is there, for people."""
        parts = (f"{name} is {' or '.join(map(str, values))}" for name, values in (self.only or {}).items())
        return " and ".join(parts)

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are drawn."""
        return not self.values and not self.times_default and FLAGS[self.name].kind is int

    def contains(self, value: Any) -> bool:
        if self.values:
            return value in self.values
        assert self.low is not None
        assert self.high is not None
        return isinstance(value, int | float) and self.low <= value <= self.high

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values that a check tries."""
        return self.values or tuple(end for end in (self.low, self.high) if end is not None)

    @property
    def shown(self) -> str:
        """Its values for people."""
        scale = ", log-uniform" if self.log else ""
        text = ", ".join(map(str, self.values)) or f"{self.low:g} to {self.high:g}{scale}"
        return f"{text} times the default" if self.times_default else text


LORA, SELECTIVE = {"method": ("lora",)}, {"method": ("selective",)}
# The declared space. A rate's default depends on method and optimizer, epochs and batch on the number of texts.
DECLARED = (
    Parameter("method", ("lora", "full", "selective", "head")),
    Parameter(PLACEMENT, tuple(PLACEMENTS), only=LORA),
    Parameter("lora_r", (4, 8, 16, 32), only=LORA),
    Parameter("lora_variant", ("lora", "dora", "pissa"), only=LORA),
    Parameter("trainable_layers", low=1, high=3, only=SELECTIVE),
    Parameter("learning_rate", low=0.3, high=3.0, log=True, times_default=True),
    Parameter("epochs", low=0.5, high=2.0, log=True, times_default=True),
    Parameter("batch_size", (0.5, 1.0, 2.0), times_default=True),
    Parameter(MAX_LENGTH, ("percentiles 50, 75, 90 and 99 of the lengths of the texts",)),
    Parameter("pooling", ("first", "mean")),
    Parameter("dropout", (0.0, 0.1)),
    Parameter("label_smoothing", (0.0, 0.1)),
)


# --- --search FILE.toml


def read_space(path: Path) -> tuple[dict[str, Parameter | None], bool]:
    """The rows of a file, and whether they are the whole space.

    .. code-block:: toml

        replace = false                                  # true: nothing but these rows is searched
        method = ["lora", "full"]                        # values to choose from
        learning_rate = { low = 1e-4, high = 1e-2, log = true }
        epochs = { low = 2, high = 6 }                   # whole numbers
        batch_size = { values = [0.5, 1], times_default = true }
        lora_dropout = { values = [0, 0.1], if = { method = "lora" } }
        dropout = false                                  # not searched

    Returns:
        Rows by name, ``None`` for one that is not searched; and the value of ``replace``.

    Raises:
        UserError: the file cannot be read, or a key or value is not allowed. The message names file and key.
    """
    with as_user_error(f"--search {path}: cannot be read", ValueError):
        content = tomllib.loads(search_text(path))
    only_these = content.pop(REPLACE, False)
    with as_user_error(f"--search {path}", UserError):
        if not isinstance(only_these, bool):
            raise UserError(f"{REPLACE}: must be true or false")
        return {name: _row(name, row) for name, row in content.items()}, only_these


def search_text(path: Path) -> str:
    """What the file of a space holds, refused if it cannot be read."""
    with as_user_error(f"--search {path}: cannot be read", OSError, ValueError):
        return path.read_text(encoding="utf-8-sig")  # Windows may have marked it


def model_anywhere(name: str) -> str:
    """A base model as workers in other directories know it: a folder by its whole path, others by their name."""
    is_folder = name not in ("", PACKAGED, *PACKAGED_MODELS) and Path(name).is_dir()
    return str(Path(name).resolve()) if is_folder else name


def whole_name(name: str) -> str:
    """A base model that may be chosen: what a short name means, and the whole path of a folder."""
    return model_anywhere(full_name(name))


def _row(name: str, row: Any) -> Parameter | None:
    if name == MODEL:
        raise UserError(f"{name}: cannot be searched by a file: give --models NAME NAME")
    if not is_searched(name) and name != PLACEMENT:
        raise UserError(f"{name}: cannot be searched: give {searchable(PLACEMENT)}")
    if row is False:
        return None
    declared = next((other for other in DECLARED if other.name == name), None)
    method = method_of(name) if name in FLAGS else None
    usual = declared.only if declared else {"method": (method,)} if method else None
    if isinstance(row, list):
        row = {"values": row}
    if not isinstance(row, dict) or (unknown := sorted(set(row) - set(KEYS))):
        what = f"has unknown keys {', '.join(unknown)}" if isinstance(row, dict) else "is neither a list nor a table"
        raise UserError(f"{name}: {what}: allowed are a list of values, false, or a table with {', '.join(KEYS)}")
    values, low, high = row.get("values", []), row.get("low"), row.get("high")
    only, log, times_default = row.get("if"), row.get("log", False), row.get("times_default", False)
    if only is not None and not (isinstance(only, dict) and only and [] not in only.values()):
        raise UserError(f'{name}: if: must be a table such as {{ method = "lora" }}, without empty lists')
    given = {key: tuple(value) if isinstance(value, list) else (value,) for key, value in (only or {}).items()}
    if MODEL in given:
        given[MODEL] = tuple(whole_name(str(model)) for model in given[MODEL])
    only = {**(usual or {}), **given} or None
    if not isinstance(log, bool) or not isinstance(times_default, bool):
        raise UserError(f"{name}: log and times_default must be true or false")
    if (low is None) != (high is None) or bool(values) == (low is not None) or not isinstance(values, list):
        raise UserError(f"{name}: needs a list of values, or low and high")
    if log and values:
        raise UserError(f"{name}: log is for low and high: leave it out")
    numeric = name in FLAGS and FLAGS[name].kind in (int, float)
    if not numeric and (low is not None or times_default):
        what = "times_default is" if times_default else "low and high are"
        raise UserError(f"{name}: {what} for numbers: give a list of values")
    for value in (*values, *(end for end in (low, high) if end is not None)):
        _check_kind(name, value, times_default)
    if len(set(values)) < len(values):
        raise UserError(f"{name}: {values}: must be different values")
    if low is not None and not (low < high and (not log or low > 0)):
        raise UserError(f"{name}: low {low}, high {high}: low must be below high, and above 0 with log")
    return Parameter(name, tuple(values), low, high, log, times_default, only, own=True)


def _check_kind(name: str, value: Any, times_default: bool) -> None:
    if name == PLACEMENT:
        allowed, fits = ", ".join(PLACEMENTS), isinstance(value, str) and value in PLACEMENTS
    else:
        kind = float if times_default else FLAGS[name].kind
        allowed = {bool: "true or false", int: "whole numbers", float: "numbers"}.get(kind, "texts")
        fits = isinstance(value, int | float if kind is float else kind) and (kind is bool) == isinstance(value, bool)
        fits = fits and (kind not in (int, float) or is_float(value))
    if not fits:
        raise UserError(f"{name}: {value}: must be {allowed}")
