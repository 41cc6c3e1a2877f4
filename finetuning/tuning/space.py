"""The space of a search: which parameters these texts and flags leave, and the flags of each point in it."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from finetuning.config import RunConfig, method_of
from finetuning.errors import UserError, as_user_error
from finetuning.pages import Table
from finetuning.settings import ENCODER_TARGETS, FLAGS, LORA_TARGETS, OF_ADAPTER, shown_value
from finetuning.tuning.parameters import (
    DECLARED,
    LORA,
    MAX_LENGTH,
    MODEL,
    PLACEMENT,
    PLACEMENTS,
    Parameter,
    Point,
    Value,
    read_space,
)

PLACES = (*ENCODER_TARGETS, "lora_modules")  # flags that say where LoRA is, as the placement does
BY_ADAPTER = (*OF_ADAPTER, PLACEMENT)  # parameters that --init_adapter decides


@dataclass(frozen=True)
class Facts:
    """What texts and model say about the space."""

    epochs: int  # what auto gives for these texts
    batch_size: int  # the same
    lengths: tuple[int, ...]  # the values of ``--max_length`` that make a difference; at most one if none does
    layers: int  # of the encoder; 0 if the model has no list of layers
    fuses: bool = False  # whether query, key and value are one linear, of which a part takes no DoRA
    sizes: Mapping[str, int] = field(default_factory=dict)  # split -> its number of texts
    texts: str = ""  # their SHA-256
    check: Callable[[RunConfig], None] = lambda _: None  # raises a ``UserError`` for a run that model or texts refuse


@dataclass(frozen=True)
class Space:
    """The parameters of a search, each after those that it depends on."""

    parameters: tuple[Parameter, ...]  # in the order in which they are drawn
    given: Mapping[str, Any]  # the flags that stay fixed
    defaults: Mapping[str, int]  # of whole numbers that texts decide: epochs and batch size

    @property
    def models(self) -> tuple[Value, ...]:
        """The base models that are searched; none if there is only one."""
        return next((row.values for row in self.parameters if row.name == MODEL), ())

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
        """The flags of a run at this point, without the given ones, or refused like ``from_settings``."""
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
            others = {name: value for name, value in flags.items() if name != "batch_size"}
            usual_tokens = RunConfig.from_settings(**{**self.given, **others}).training.batch_tokens
            flags.setdefault("batch_tokens", usual_tokens)
        for parameter in self.parameters:
            if parameter.name in point and parameter.times_default:
                usual = config[parameter.name]
                if not isinstance(usual, int | float):
                    raise UserError(f"times_default: it has no number as default, but {usual}")
                product = float(point[parameter.name]) * usual
                if math.isinf(product):
                    raise UserError(f"times_default: {point[parameter.name]} times {usual} is too large")
                whole = FLAGS[parameter.name].kind is int
                flags[parameter.name] = max(1, round(product)) if whole else float(f"{product:.4g}")
        RunConfig.from_settings(**{**self.given, **flags})  # refuses products
        return flags

    @cached_property
    def _usual(self) -> dict[str, Any]:
        return self._usual_with({})

    def _usual_with(self, changed: Mapping[str, Value]) -> dict[str, Any]:
        """What the suite's default with the given flags, and with these instead, has for each parameter."""
        config = RunConfig.from_settings(**{**self.given, **changed}).to_dict() | dict(self.defaults)
        targets = tuple(name for name in LORA_TARGETS if config[name])
        config[PLACEMENT] = next((name for name, flags in PLACEMENTS.items() if flags == targets), None)
        return {row.name: 1.0 if row.times_default else config[row.name] for row in self.parameters}

    def default_point(self, **changed: Value) -> Point:
        """The point of the suite's defaults, without the parameters whose range does not contain them.

        Args:
            changed: a model or method instead of the default one, or of the given one.
        """
        usual = self._usual_with(changed)
        point: Point = {}
        for row in self.parameters:
            if self._applies(row, point) and row.contains(usual[row.name]):
                point[row.name] = usual[row.name]
        return point

    def first_points(self) -> list[Point]:
        """The default's point, then those of the other models' and methods', likely better than random ones."""
        rows = {row.name: row.values for row in self.parameters}
        others = [{name: v} for name in (MODEL, "method") for v in rows.get(name, ()) if v != self._usual[name]]
        points = ((changed, self.default_point(**changed)) for changed in others)
        return [self.default_point(), *(point for changed, point in points if changed.items() <= point.items())]

    def checked(self, check: Callable[[RunConfig], None]) -> "Space":
        """The space without declared values that flags, models or texts exclude; each value is tried with each model.

        Args:
            check: raises a ``UserError`` for a run that model or texts refuse.

        Raises:
            UserError: a value of the file is refused, its condition can never hold, or nothing is left to search.
        """
        space = self
        for parameter in sorted(self.parameters, key=lambda row: not row.own):  # an error in the file comes first
            allowed = tuple(value for value in parameter.ends if space._is_allowed(parameter, value, check))
            whole = parameter if allowed == parameter.ends else replace(parameter, values=allowed)
            kept = whole if allowed and (parameter.values or whole is parameter) else None
            if whole is not parameter and allowed == (self._usual[parameter.name],):
                kept = None  # the default alone is no choice
            rows = [kept if row is parameter else row for row in space.parameters]
            space = replace(space, parameters=tuple(row for row in rows if row is not None))
        if not any(len(row.ends) > 1 for row in space.parameters):
            raise UserError("the space is empty: no flag is left to search, so give fewer flags or another --search")
        return space

    def _is_allowed(self, parameter: Parameter, value: Value, check: Callable[[RunConfig], None]) -> bool:
        found: dict[Value | None, Point] = {}  # a point of each model that has the parameter
        for way in self._ways(parameter, value):
            models = (way[MODEL],) if MODEL in way else self.models
            for wanted in [{**way, MODEL: model} for model in models] or [way]:
                point = self._point_near(wanted)
                if parameter.name in point:
                    found.setdefault(point.get(MODEL), point)
        try:
            if not found:
                raise UserError(f"impossible condition: {parameter.condition} never occurs in this space")
            for point in found.values():
                check(RunConfig.from_settings(**{**self.given, **self.settings(point)}))
        except UserError as error:
            if not parameter.own:
                return False
            raise UserError(f"--search: {parameter.name}: {error}") from None
        return True

    def _point_near(self, wanted: Point) -> Point:
        """The point with these values and the usual ones, as far as the space has them.

        A parameter with neither is left out.
        """
        point: Point = {}
        for row in self.parameters:
            values = [value for value in (wanted.get(row.name), self._usual[row.name]) if value is not None]
            if values and self._applies(row, point):
                point[row.name] = next((value for value in values if row.contains(value)), row.ends[0])
        return point

    def _ways(self, parameter: Parameter, value: Value) -> list[Point]:
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
        return ways

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


def make_space(given: Mapping[str, Any], facts: Facts, search: Path | None = None, models: Sequence[str] = ()) -> Space:
    """The space of a search.

    Args:
        given: the flags that stay fixed; of models that are searched, the default's.
        facts: what texts and models say.
        search: the file of ``--search``.
        models: those of ``--models``, by their whole names.

    Raises:
        UserError: the file cannot be used, or excludes the given flags; or nothing is left to search.
    """
    named, only_these = read_space(search) if search is not None else ({}, False)
    for row in named.values():
        if row is None or row.name not in given or row.times_default:
            continue
        if not row.contains(given[row.name]):
            raise UserError(f"--{row.name} {shown_value(given[row.name])}: --search {search} allows {row.shown}")
    own = [row for row in named.values() if row is not None]
    with as_user_error(f"--search {search}", UserError):
        _check_undecided([row.name for row in own], given)
    rows = [] if only_these else [row for row in _fitted(facts) if row.name not in named]
    rows += own
    rows += [Parameter(MODEL, tuple(models), own=True)] if models else []
    if any(row.name in PLACES for row in own):  # in the place of the placement
        rows = [row for row in rows if row.own or row.name != PLACEMENT]
    free = [row for row in rows if row.name not in given or row.name == MODEL]  # the given model is the default's
    rows = [row for row in free if row.own or not _is_decided(row.name, given)]
    if facts.fuses:
        rows = [_of_fused(row, given, any(row.name == PLACEMENT for row in rows)) for row in rows]
    defaults = {"epochs": facts.epochs, "batch_size": facts.batch_size}
    return Space(tuple(_in_order(rows)), given, defaults).checked(facts.check)


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
    rows["trainable_layers"] = replace(rows["trainable_layers"], high=min(3, facts.layers - 1))
    if facts.layers < 3:
        del rows["trainable_layers"]
    return list(rows.values())


def _of_fused(row: Parameter, given: Mapping[str, Any], placed: bool) -> Parameter:
    """The row where query, key and value are one linear, which takes DoRA only as a whole.

    Args:
        row: of the space.
        given: the flags that stay fixed.
        placed: whether the placement is searched.
    """
    whole = ("attention", "all")
    if row.name == PLACEMENT and given.get("lora_variant") == "dora" and not row.own:
        return replace(row, values=tuple(value for value in row.values if value in whole))
    if row.name != "lora_variant" or "dora" not in row.values:
        return row
    if placed:
        return replace(row, only={**(row.only or LORA), PLACEMENT: whole})
    return row if row.own else replace(row, values=tuple(value for value in row.values if value != "dora"))


def _check_undecided(names: Sequence[str], given: Mapping[str, Any]) -> None:
    """Refuses parameters of a file that given flags or the adapter decide, or that contradict each other."""
    for name in names:
        if "init_adapter" in given and name in BY_ADAPTER:
            raise UserError(f"{name}: the adapter of --init_adapter decides it: leave it out")
    places = [name for name in PLACES if name in names or name in given]
    if PLACEMENT in names and places:
        raise UserError(f"{PLACEMENT}: {places[0]} says where LoRA is as well: leave out one of the two")


def _is_decided(name: str, given: Mapping[str, Any]) -> bool:
    """Whether given flags decide a declared parameter that is none of them."""
    if name == "method":  # flags of one method fix it
        return any(map(method_of, given))
    if "init_adapter" in given and name in BY_ADAPTER:
        return True
    return name == PLACEMENT and not set(PLACES).isdisjoint(given)
