"""What a row of a study tries on validation: a list of learning rates, or random settings."""

import math
import random
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from finetuning.errors import UserError
from finetuning.flags import no_flag
from finetuning.settings import AUTO, FLAGS

RATE = "learning_rate"
TRIAL = "trial"  # with a number, how the name of a run with random settings ends
DRAWN = re.compile(rf"-{TRIAL}\d+$")
Settings = dict[str, Any]
SEARCHED = ("method", "lora", "model", "training")  # sections whose flags can be tuned or searched
NOT_SEARCHED = ("seed", "monitor", "threshold", "positive_label", "init_adapter", "model_name")
ALSO_SEARCHED = ("max_length", "truncation")


def tried_settings(name: str, tune: Mapping[str, Any], search: Mapping[str, int] | None) -> dict[str, Settings]:
    """The settings that a row tries: name of each trial -> its flags.

    Args:
        name: of the row. Rows draw independently of each other.
        tune: flag -> a list of values or, with ``search``, also ``{low, high}``, drawn on a logarithmic scale.
        search: ``trials``, the number of random trials, and ``seed``; ``None`` tries each learning rate of a list.
    """
    if search is None:
        return {f"{rate:g}": {RATE: rate} for rate in tune.get(RATE, ())}
    if not tune:
        return {}
    generator = random.Random(f"{search.get('seed', 0)} {name}")
    drawn = [{flag: _drawn(flag, values, generator) for flag, values in tune.items()} for _ in range(search["trials"])]
    return {f"{TRIAL}{number}": settings for number, settings in enumerate(drawn)}


def _drawn(flag: str, values: Sequence[Any] | Mapping[str, float], generator: random.Random) -> Any:
    if not isinstance(values, Mapping):
        return generator.choice(values)
    value = log_uniform(values["low"], values["high"], generator)
    if FLAGS[flag].kind is int:
        return round(value)
    return min(max(float(f"{value:.3g}"), values["low"]), values["high"])  # rounded, so that a command stays readable


def log_uniform(low: float, high: float, generator: random.Random) -> float:
    """A number from ``low`` to ``high``, uniform on a logarithmic scale."""
    return math.exp(generator.uniform(math.log(low), math.log(high)))


def shown_settings(settings: Mapping[str, Any]) -> str:
    """What a trial set, for people."""
    rate = [f"{settings[RATE]:g}"] if RATE in settings else []
    return ", ".join([*rate, *(f"{flag} {value}" for flag, value in settings.items() if flag != RATE)])


def check_search(search: Any) -> None:
    """Refuses keys and values of ``[search]`` that are not allowed."""
    if search is None:
        return
    if not isinstance(search, dict) or not set(search) <= {"trials", "seed"}:
        raise UserError("[search] must be a table with trials and seed")
    for key, least in (("trials", 1), ("seed", 0)):
        value = search.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"[search] {key} {value!r}: must be a whole number of at least {least}")


def is_float(value: Any) -> bool:
    """Whether a value is a number that a float can hold; a whole number can be too large."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and -sys.float_info.max <= value <= sys.float_info.max


def check_numbers(where: str, flag: str, values: Sequence[Any]) -> None:
    """Refuses a text as the value of a flag that takes numbers: a command takes ``"1e-3"``, but a table cannot."""
    texts = [value for value in values if isinstance(value, str) and value != AUTO]
    if FLAGS[flag].kind in (int, float) and texts:
        raise UserError(f"{where} {texts[0]!r}: must be a number, without quotes")


def is_searched(flag: str) -> bool:
    """Whether random or proposed values of a flag can be compared: others change the texts or what judges a trial."""
    return flag in ALSO_SEARCHED or (flag in FLAGS and FLAGS[flag].section in SEARCHED and flag not in NOT_SEARCHED)


def searchable(*more: str) -> str:
    """What can be searched, for people.

    Args:
        more: names that only this search takes.
    """
    excluded = ", ".join(flag for flag in NOT_SEARCHED if flag not in more)
    return f"a flag of method, LoRA, model or training but {excluded}, or {', '.join((*ALSO_SEARCHED, *more))}"


def check_tuned(where: str, tune: Mapping[str, Any], search: Mapping[str, int] | None) -> None:
    """Refuses the ``tune`` of a row that names something else than flags, or gives no values for one."""
    if search is None:
        rates = tune.get(RATE)
        if set(tune) != {RATE} or not isinstance(rates, list) or not rates:
            raise UserError(f"{where}must be {{ {RATE} = [...] }}, or the study needs [search]")
        if not all(map(is_float, rates)):
            raise UserError(f"{where}{RATE}: must be numbers")
        if len({f"{rate:g}" for rate in rates}) < len(rates):  # the names of their runs
            raise UserError(f"{where}{RATE}: must be numbers that differ in their first six digits")
        return
    for flag, values in tune.items():
        if flag not in FLAGS:
            raise UserError(f"{where}{no_flag(flag)}")
        if not is_searched(flag):
            raise UserError(f"{where}{flag}: cannot be tuned: give {searchable()}")
        if isinstance(values, dict):
            ends = [values.get(key) for key in ("low", "high")]
            if set(values) != {"low", "high"} or not all(map(is_float, ends)) or not 0 < ends[0] < ends[1]:  # type: ignore[operator]
                raise UserError(f"{where}{flag}: must be {{ low = X, high = Y }} with 0 < X < Y")
            if FLAGS[flag].kind is int and any(end != int(end) for end in ends):  # type: ignore[arg-type]
                raise UserError(f"{where}{flag}: low and high must be whole numbers")
        elif not isinstance(values, list) or not values:
            raise UserError(f"{where}{flag}: must be a list of values, or {{ low = X, high = Y }}")
        else:
            check_numbers(f"{where}{flag}", flag, values)
