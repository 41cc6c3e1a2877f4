"""All settings of one run: given values, defaults that depend on other settings, and checks.

Users see flat flags; code sees the sections of ``settings``. This module checks everything that needs only the
flags. Checks that need the data, the model or the machine are next to the code that reads them.
"""

import dataclasses
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.datasets import hub_name, traits_of
from finetuning.errors import UserError
from finetuning.settings import (
    FLAGS,
    MINILM_FORMS,
    PACKAGED,
    SECTIONS,
    DataSettings,
    HardwareSettings,
    LoRASettings,
    MethodSettings,
    ModelSettings,
    RunSettings,
    TrainingSettings,
    Values,
    full_name,
    recorded_name,
)

# Settings that do not change what a run computes.
NOT_PART_OF_THE_RUN = (
    "output_dir", "resume", "overwrite", "checkpoint_minutes", "checkpoint_steps", "force", "report", "report_texts",
    "tracker", "verbose", "baseline",
)  # fmt: skip
# Settings that --resume may change: also the location of model and data, and the hardware.
MAY_CHANGE = (
    *NOT_PART_OF_THE_RUN, "model_name", "data_dir", "data_source", "offline", "accelerator", "device", "devices",
    "num_nodes", "strategy", "efficient", "gradient_checkpointing", "compile", "frozen_cache_gb", "init_adapter",
)  # fmt: skip
# Settings that only one method has, in addition to section lora.
OF_ONE_METHOD = {"trainable_layers": "selective", "lora_plus_ratio": "lora"}
WITHIN = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Every setting of one run, complete and consistent."""

    method: MethodSettings
    lora: LoRASettings | None  # None unless the method is lora
    model: ModelSettings
    data: DataSettings
    training: TrainingSettings
    hardware: HardwareSettings
    run: RunSettings

    @classmethod
    def from_settings(cls, **given: Any) -> "RunConfig":
        """Builds the configuration from settings named like the flags. ``None`` means "not given".

        Raises:
            UserError: a setting is unknown, a value is not allowed, or two settings exclude each other.
        """
        unknown = sorted(set(given) - set(FLAGS))
        if unknown:
            raise UserError(
                f"unknown settings {', '.join(unknown)}: this version does not have them, use the one that wrote them"
            )
        values = _resolved({name: value for name, value in given.items() if value is not None})
        parts = {
            name: kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})
            for name, kind in SECTIONS.items()
            if name != "lora" or values["method"] == "lora"
        }
        return cls(**({"lora": None} | parts))

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "RunConfig":
        """Builds the configuration from the result of ``to_dict``, or refuses it like ``from_settings``."""
        named = {name: stored.get(name) for name, flag in FLAGS.items() if flag.kind is Path}
        paths = {name: Path(value) for name, value in named.items() if value is not None}
        names = {"model_name": recorded_name(stored["model_name"])} if stored.get("model_name") else {}
        return cls.from_settings(**{**stored, **paths, **names})

    def to_dict(self) -> dict[str, Any]:
        """Every setting under its flag's name, ready for JSON. Settings of other methods are ``None``."""
        values = dict.fromkeys(FLAGS) | self._values()
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    def _values(self) -> dict[str, Any]:
        parts = [getattr(self, section) for section in SECTIONS]
        return {f.name: getattr(part, f.name) for part in parts if part is not None for f in dataclasses.fields(part)}

    def changed(self, **changes: Any) -> "RunConfig":
        """A copy with other values. Defaults that depend on them are not computed again."""
        return self.from_settings(**{**self._values(), **changes})

    def instead_of_hub(self) -> str:
        """The flags to advise if the hub cannot be reached."""
        advice = f"--model_name {PACKAGED} or --model_name PATH"
        if self.data.data_dir is not None:
            return advice
        files = "--dataset text --data_dir PATH" if hub_name(self.data.dataset) else "--data_dir PATH"
        return f"{advice}, and {files}" + (
            "; or --offline for packaged model and reviews" if traits_of(self.data.dataset).packaged else ""
        )

    @property
    def name(self) -> str:
        """The method, for people: the one of ``--method``, or qlora."""
        return "qlora" if self.lora is not None and self.lora.q_lora else self.method.method

    @property
    def quantized(self) -> str:
        """In how many bits the frozen weights are; empty if in floats."""
        return quantized_bits(self.to_dict())

    @property
    def takes_kfold(self) -> bool:
        """Whether ``--kfold`` could be given as well. An adapter may know the texts of a fold."""
        data, adapted = self.data, self.lora is not None and self.lora.init_adapter is not None
        chosen = data.kfold or data.fold is not None or data.limit_validation or adapted
        return not chosen and self.hardware.processes == 1 and self.training.epochs != 0

    def differences(self, others: Mapping[str, Any]) -> list[str]:
        """The flags whose values differ and change what the run computes, for example ``--seed 0 -> 1``.

        Args:
            others: every setting of another run, from ``to_dict``.
        """
        mine = self.to_dict()
        return [
            f"--{name} {others[name]} -> {mine[name]}"
            for name in FLAGS
            if name not in NOT_PART_OF_THE_RUN and mine[name] != others[name]
        ]


def quantized_bits(stored: Mapping[str, Any]) -> str:
    """In how many bits a run with these settings held the frozen weights; empty if in floats, or if nobody knows."""
    return "4 bits" if stored.get("q_lora") else "8 bits" if stored.get("precision") == "int8" else ""


def resumed_config(stored: Mapping[str, Any], given: Mapping[str, Any]) -> RunConfig:
    """The configuration with which ``--resume`` continues a run.

    Args:
        stored: the settings that the run stored.
        given: the flags of this command. Only flags in ``MAY_CHANGE`` may differ from the run. ``--epochs`` may grow
            if the learning rate is constant and no average is taken, because earlier epochs then do not depend on it.
            With ``--kfold`` it may not, because finished folds do not train on.

    Raises:
        UserError: a flag contradicts the run, or the stored settings cannot be used.
    """
    try:
        run = RunConfig.from_dict({**stored, "resume": False, "overwrite": False})
    except (UserError, TypeError) as error:
        raise UserError(f"--resume: the settings stored in {given['output_dir']} cannot be used: {error}") from None
    values, given = run.to_dict(), {name: value for name, value in given.items() if value is not None}
    if "model_name" in given:
        given["model_name"] = full_name(given["model_name"])
    training = run.training
    level = (training.scheduler, training.warmup_fraction, training.average) == ("constant", 0, "none")
    for name, value in given.items():
        before, now = values[name], str(value) if isinstance(value, Path) else value
        if (name, now) == ("precision", "fast"):  # the run stored what it meant
            continue
        more_epochs = name == "epochs" and level and run.data.kfold is None and now > before
        elsewhere = name in MAY_CHANGE and (name != "init_adapter" or None not in (before, now))
        elsewhere = elsewhere and {before, now} != {*MINILM_FORMS}  # two models of one file
        if now != before and not elsewhere and not more_epochs:
            raise UserError(
                f"--{name} {now}: the run in {given['output_dir']} has --{name} {before}, and --resume cannot change"
                f" it: leave out this flag, or start another run"
            )
    if given.get("accelerator") == "cpu":
        values["device"] = None  # no flag could unset it
    if given.get("data_dir") or given.get("offline"):
        values["data_source"] = None
    return RunConfig.from_dict({**values, **given, "resume": True, "precision": values["precision"]})


# --- defaults and checks


def method_of(flag: str) -> str | None:
    """The only method that takes this flag; ``None`` if several do."""
    return "lora" if FLAGS[flag].section == "lora" else OF_ONE_METHOD.get(flag)


def _resolved(given: dict[str, Any]) -> dict[str, Any]:
    """The value of every setting, checked; ``None`` if it does not apply."""
    for name, value in given.items():
        choices = FLAGS[name].choices
        if choices and value not in choices:
            raise UserError(f"--{name} {value}: must be one of {', '.join(choices)}")
        try:
            str(value).encode()  # no name of a file that no text can hold
        except UnicodeEncodeError:
            raise UserError(f"--{name} {value}: is not valid UTF-8: rename it") from None
        if "\0" in str(value):  # a study's file can hold one; no command and no path can
            raise UserError(f"--{name} {value}: must not contain the character NUL")
    for name in given:
        method = given.get("method", FLAGS["method"].default)
        wanted = method_of(name) or method
        if wanted != method:
            raise UserError(f"--{name} {given[name]}: needs --method {wanted}, but the method is {method}")
    plain = {name: flag.default for name, flag in FLAGS.items()} | given
    dependent: dict[str, Any] = {}
    for kind in SECTIONS.values():
        if hasattr(kind, "defaults"):
            dependent |= kind.defaults(Values(**plain))
    values = plain | dependent | given
    values["model_name"] = full_name(values["model_name"])
    _check_ranges(values)
    for kind in SECTIONS.values():
        if hasattr(kind, "check"):
            kind.check(Values(**values))
    return values


def _check_ranges(values: dict[str, Any]) -> None:
    """Checks every number against its bounds."""
    for name, flag in FLAGS.items():
        value = values[name]
        if value is None or not flag.bounds:
            continue
        # The bounds come before the comparison with infinity: a whole number can be too large for a float.
        inside = all(WITHIN[word](value, bound) for word, bound in flag.bounds.items())
        if not inside or not value < math.inf:
            words = " and ".join(f"{word} {bound}" for word, bound in flag.bounds.items())
            finite = "finite and " if inside or "above" in flag.bounds else ""
            raise UserError(f"--{name} {value}: must be {finite}{words}")
