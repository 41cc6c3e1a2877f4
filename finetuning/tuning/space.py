"""What a search tries: the declared space, a file that replaces or narrows it, and the flags of each point in it."""

import itertools
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from finetuning.comparison.drawn import SEARCHABLE, is_searched
from finetuning.config import RunConfig, method_of
from finetuning.errors import UserError, first_line
from finetuning.pages import Table
from finetuning.settings import ENCODER_TARGETS, FLAGS, LORA_TARGETS, OF_ADAPTER

Value = str | int | float | bool
Point = dict[str, Value]  # a parameter's name -> its value

PLACEMENT = "placement"  # the one parameter that is no flag
PLACEMENTS = {
    "query_value": ("lora_query", "lora_value"),
    "attention": ("lora_query", "lora_key", "lora_value", "lora_projection"),
    "all": ("lora_query", "lora_key", "lora_value", "lora_projection", "lora_mlp"),
}
MAX_LENGTH = "max_length"
KEYS = ("values", "low", "high", "log", "times_default", "if")
REPLACE = "replace"  # the key of a file whose rows are the whole space


@dataclass(frozen=True)
class Parameter:
    """A dimension of the space: a list of values, or a range.

    Attributes:
        name: of a flag, or ``placement``.
        values: to choose from; empty for a range.
        low, high: the bounds of a range. Two whole numbers make a range of whole numbers.
        log: whether a range is drawn on a logarithmic scale.
        times_default: whether the values are multiples of what the run would take without the flag.
        only: parameter or flag -> the values with which this one is there.
        own: whether the user's file has it, so what is refused in it is an error.
    """

    name: str
    values: tuple[Value, ...] = ()
    low: float | None = None
    high: float | None = None
    log: bool = False
    times_default: bool = False
    only: Mapping[str, Sequence[Value]] | None = None
    own: bool = False

    @property
    def condition(self) -> str:
        """When it is there, for people."""
        parts = (f"{name} is {' or '.join(map(str, values))}" for name, values in (self.only or {}).items())
        return " and ".join(parts)

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def contains(self, value: Any) -> bool:
        """Whether the value can be drawn."""
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
    Parameter("learning_rate", low=0.2, high=5.0, log=True, times_default=True),
    Parameter("epochs", low=0.5, high=2.0, log=True, times_default=True),
    Parameter("batch_size", (0.5, 1.0, 2.0), times_default=True),
    Parameter(MAX_LENGTH, ("percentiles 50, 75, 90 and 99 of the lengths of the texts",)),
    Parameter("pooling", ("first", "mean")),
    Parameter("dropout", (0.0, 0.1)),
    Parameter("label_smoothing", (0.0, 0.1)),
)


@dataclass(frozen=True)
class Facts:
    """What texts and model say about the space.

    Attributes:
        epochs, batch_size: what auto gives for these texts.
        lengths: the values of ``--max_length`` that make a difference; at most one if none does.
        layers: of the encoder; 0 if the model has no list of layers.
        multi_label: whether a text may have several labels.
        takes_pooling: whether the model's head can read the mean of the tokens.
        takes_dropout: whether the model has ``--dropout``.
        sizes: split -> its number of texts.
    """

    epochs: int
    batch_size: int
    lengths: tuple[int, ...]
    layers: int
    multi_label: bool
    takes_pooling: bool = True
    takes_dropout: bool = True
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Space:
    """The parameters of a search, each after those that it depends on.

    Attributes:
        parameters: in the order in which they are drawn.
        given: the flags that stay fixed.
        defaults: of whole numbers that texts decide: epochs and batch size.
    """

    parameters: tuple[Parameter, ...]
    given: Mapping[str, Any]
    defaults: Mapping[str, int]

    def drawn(self, pick: Callable[[Parameter], Value]) -> Point:
        """A point, whose values ``pick`` chooses one after another."""
        point: Point = {}
        for parameter in self.parameters:
            if self._applies(parameter, point):
                point[parameter.name] = pick(parameter)
        return point

    def _applies(self, parameter: Parameter, point: Mapping[str, Any]) -> bool:
        method = point.get("method", self.given.get("method", FLAGS["method"].default))
        asked = [name for name in parameter.only or () if name in FLAGS and method_of(name) in (None, method)]
        known = {name: self.given.get(name, FLAGS[name].default) for name in asked} | dict(point)
        return all(known.get(name) in values for name, values in (parameter.only or {}).items())

    def settings(self, point: Point) -> dict[str, Any]:
        """The flags of a run at this point, without the given ones.

        Raises:
            UserError: as ``RunConfig.from_settings``.
        """
        flags: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.name not in point or parameter.times_default:
                continue
            value = point[parameter.name]
            if parameter.name == PLACEMENT:
                flags |= {name: name in PLACEMENTS[str(value)] for name in ENCODER_TARGETS}
            else:
                flags[parameter.name] = value
        config = RunConfig.from_settings(**{**self.given, **flags}).to_dict() | dict(self.defaults)
        if "batch_size" in point:  # a given batch size would lift the usual limit in tokens
            flags.setdefault("batch_tokens", config["batch_tokens"])
        for parameter in self.parameters:
            if parameter.name in point and parameter.times_default:
                usual = config[parameter.name]
                if not isinstance(usual, int | float):
                    raise UserError(f"times_default: it has no number as default, but {usual}")
                product = float(point[parameter.name]) * usual
                whole = FLAGS[parameter.name].kind is int
                flags[parameter.name] = max(1, round(product)) if whole else float(f"{product:.4g}")
        RunConfig.from_settings(**{**self.given, **flags})  # refuses products
        return flags

    @cached_property
    def _usual(self) -> dict[str, Any]:
        """What the suite's default with the given flags has for each parameter."""
        config = RunConfig.from_settings(**self.given).to_dict()
        targets = tuple(name for name in LORA_TARGETS if config[name])
        config[PLACEMENT] = next((name for name, flags in PLACEMENTS.items() if flags == targets), None)
        return {row.name: 1.0 if row.times_default else config[row.name] for row in self.parameters}

    def default_point(self) -> Point:
        """The point of the suite's defaults, without the parameters whose range does not contain them."""
        point: Point = {}
        for row in self.parameters:
            if self._applies(row, point) and row.contains(self._usual[row.name]):
                point[row.name] = self._usual[row.name]
        return point

    def checked(self) -> "Space":
        """The space without declared values that the given flags exclude; each value is tried once.

        Raises:
            UserError: a value of the file is refused, its condition can never hold, or nothing is left to search.
        """
        space = self
        for parameter in sorted(self.parameters, key=lambda row: not row.own):  # an error in the file comes first
            allowed = tuple(value for value in parameter.ends if space._is_allowed(parameter, value))
            whole = parameter if allowed == parameter.ends else replace(parameter, values=allowed)
            kept = whole if allowed and (parameter.values or whole is parameter) else None
            rows = [kept if row is parameter else row for row in space.parameters]
            space = replace(space, parameters=tuple(row for row in rows if row is not None))
        if not any(len(row.ends) > 1 for row in space.parameters):
            raise UserError("the space is empty: no flag is left to search, so give fewer flags or another --search")
        return space

    def _is_allowed(self, parameter: Parameter, value: Value) -> bool:
        usual = self._usual

        def at(forced: Point) -> Point:
            def pick(row: Parameter) -> Value:
                wanted = (forced.get(row.name), usual.get(row.name))
                return next((value for value in wanted if value is not None and row.contains(value)), row.ends[0])

            return self.drawn(pick)

        point = next((point for way in self._ways(parameter, value) if parameter.name in (point := at(way))), Point())
        try:
            if parameter.name not in point:
                raise UserError(f"impossible condition: {parameter.condition} never occurs in this space")
            self.settings(point)
        except UserError as error:
            if not parameter.own:
                return False
            raise UserError(f"--search: {parameter.name}: {error}") from None
        return True

    def _ways(self, parameter: Parameter, value: Value) -> Iterator[Point]:
        """What the others may have if a parameter has this value, by its condition and by those of what that names."""
        ways: list[Point] = [{parameter.name: value}]
        searched = {row.name: row for row in self.parameters}
        for row in reversed(self.parameters):
            if ways and row.only is not None and row.name in ways[0]:
                choices = [
                    [value for value in values if name not in searched or searched[name].contains(value)]
                    for name, values in row.only.items()
                ]
                found = [dict(zip(row.only, values, strict=True)) for values in itertools.product(*choices)]
                ways = [one | way for way in ways for one in found]
        return iter(ways)

    def table(self) -> Table:
        """The space for people."""
        return space_table(self.parameters)

    def to_dict(self) -> dict[str, Any]:
        """What a search stores; JSON makes lists of tuples."""
        return {"parameters": [asdict(parameter) for parameter in self.parameters], "defaults": dict(self.defaults)}

    @staticmethod
    def from_dict(stored: Mapping[str, Any], given: Mapping[str, Any]) -> "Space":
        """The space from the result of ``to_dict``."""
        rows = [Parameter(**(row | {"values": tuple(row["values"])})) for row in stored["parameters"]]
        return Space(tuple(rows), given, stored["defaults"])


def space_table(parameters: Sequence[Parameter] = DECLARED) -> Table:
    """A row for each parameter; without an argument, the declared space."""
    return Table(("parameter", "values", "only if"), [(row.name, row.shown, row.condition) for row in parameters])


def make_space(given: Mapping[str, Any], facts: Facts, search: Path | None = None) -> Space:
    """The space of a search.

    Args:
        given: the flags that stay fixed.
        facts: what texts and model say.
        search: the file of ``--search``.

    Raises:
        UserError: the file cannot be used, or excludes the given flags; or nothing is left to search.
    """
    named, only_these = read_space(search) if search is not None else ({}, False)
    for row in named.values():
        if row is not None and row.name in given and not row.contains(given[row.name]):
            raise UserError(f"--{row.name} {given[row.name]}: --search {search} allows {row.shown}")
    rows = [] if only_these else [row for row in _fitted(facts) if row.name not in named]
    rows += [row for row in named.values() if row is not None]
    rows = [row for row in rows if row.name not in given and (row.own or not _is_decided(row.name, given))]
    return Space(tuple(_in_order(rows)), given, {"epochs": facts.epochs, "batch_size": facts.batch_size}).checked()


def _in_order(rows: Sequence[Parameter]) -> list[Parameter]:
    """Each row after those that its condition names, because it is drawn after them."""
    ordered: list[Parameter] = []
    waiting = sorted(rows, key=lambda row: len(row.only or {}))
    while waiting:
        names = {row.name for row in waiting}
        ready = [row for row in waiting if names.isdisjoint(row.only or ())]
        if not ready:
            named = {name for row in waiting for name in row.only or ()}
            while not names <= named:  # only those on a circle are at fault
                names &= named
                named = {name for row in waiting if row.name in names for name in row.only or ()}
            each = "its condition names itself" if len(names) == 1 else "their conditions name each other"
            raise UserError(f"--search: {', '.join(sorted(names))}: {each}")
        ordered += ready
        waiting = [row for row in waiting if row not in ready]
    return ordered


def _fitted(facts: Facts) -> list[Parameter]:
    """The declared rows that texts and model allow."""
    rows = {row.name: row for row in DECLARED}
    rows[MAX_LENGTH] = replace(rows[MAX_LENGTH], values=facts.lengths)
    if len(facts.lengths) < 2:
        del rows[MAX_LENGTH]
    if facts.multi_label:
        del rows["label_smoothing"]
    for name, taken in (("pooling", facts.takes_pooling), ("dropout", facts.takes_dropout)):
        if not taken:
            del rows[name]
    layers = min(3, facts.layers - 1)
    if layers < 2:
        del rows["trainable_layers"]
    else:
        rows["trainable_layers"] = replace(rows["trainable_layers"], high=layers)
    return list(rows.values())


def _is_decided(name: str, given: Mapping[str, Any]) -> bool:
    """Whether given flags decide a declared parameter that is none of them."""
    if name == "method":  # flags of one method fix it
        return any(flag in FLAGS and method_of(flag) for flag in given)
    if "init_adapter" in given and name in (*OF_ADAPTER, PLACEMENT):
        return True
    return name == PLACEMENT and bool(given.keys() & {*ENCODER_TARGETS, "lora_modules"})


# ---------------------------------------------------------------------------------------------------------------------
# --search FILE.toml


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
    try:
        content = tomllib.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--search {path}: cannot be read: {first_line(error)}") from None
    only_these = content.pop(REPLACE, False)
    try:
        if not isinstance(only_these, bool):
            raise UserError(f"{REPLACE}: must be true or false")
        return {name: _row(name, row) for name, row in content.items()}, only_these
    except UserError as error:
        raise UserError(f"--search {path}: {error}") from None


def _row(name: str, row: Any) -> Parameter | None:
    if not is_searched(name) and name != PLACEMENT:
        raise UserError(f"{name}: cannot be searched: give {PLACEMENT} or {SEARCHABLE}")
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
    if only is not None and not (isinstance(only, dict) and only):
        raise UserError(f'{name}: if: must be a table such as {{ method = "lora" }}')
    given = {key: tuple(value) if isinstance(value, list) else (value,) for key, value in (only or {}).items()}
    only = {**(usual or {}), **given} or None
    if not isinstance(log, bool) or not isinstance(times_default, bool):
        raise UserError(f"{name}: log and times_default must be true or false")
    if (low is None) != (high is None) or bool(values) == (low is not None) or not isinstance(values, list):
        raise UserError(f"{name}: needs a list of values, or low and high")
    numeric = name in FLAGS and FLAGS[name].kind in (int, float)
    if not numeric and (low is not None or times_default):
        what = "times_default is" if times_default else "low and high are"
        raise UserError(f"{name}: {what} for numbers: give a list of values")
    for value in (*values, *(end for end in (low, high) if end is not None)):
        _check_kind(name, value, times_default)
    if low is not None and not (low < high and (not log or low > 0)):
        raise UserError(f"{name}: low {low}, high {high}: low must be below high, and above 0 with log")
    return Parameter(name, tuple(values), low, high, log, times_default, only, own=True)


def _check_kind(name: str, value: Any, times_default: bool) -> None:
    if name == PLACEMENT:
        allowed, fits = ", ".join(PLACEMENTS), value in PLACEMENTS
    else:
        kind = float if times_default else FLAGS[name].kind
        allowed = {bool: "true or false", int: "whole numbers", float: "numbers"}.get(kind, "texts")
        fits = isinstance(value, int | float if kind is float else kind) and (kind is bool) == isinstance(value, bool)
    if not fits:
        raise UserError(f"{name}: {value}: must be {allowed}")
