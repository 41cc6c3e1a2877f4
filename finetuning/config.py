"""All settings of one run: what was given, what follows from it, and what is refused.

Users see flat flags, code sees the sections of ``settings.py``. What the flags alone can tell is checked here. What
only data, model or machine can tell is checked where it is found, with the same ``UserError``.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from finetuning.datasets import DATASETS
from finetuning.errors import UserError
from finetuning.settings import (
    DEFAULT_MODEL,
    FLAGS,
    LORA_TARGETS,
    PACKAGED,
    SECTIONS,
    DataSettings,
    HardwareSettings,
    LoRASettings,
    MethodSettings,
    ModelSettings,
    RunSettings,
    TrainingSettings,
)

# What may differ between two runs that compute the same: where they are, and what they print.
NOT_PART_OF_THE_RUN = ("output_dir", "resume", "overwrite", "verbose")
# What may differ when a run is continued: also where model and data are, and the hardware.
MAY_CHANGE = (
    *NOT_PART_OF_THE_RUN, "model_name", "data_dir", "data_source", "offline", "accelerator", "device", "devices",
    "num_nodes", "strategy", "efficient", "gradient_checkpointing", "compile", "frozen_cache_gb",
)  # fmt: skip

# Peak learning rates if --learning_rate is not given. LoRA's are about ten times those of full fine-tuning. SGD's are
# far higher, because its step is not scaled by the size of past gradients.
DEFAULT_LEARNING_RATES: dict[tuple[str, str], float] = {
    ("lora", "adam"): 1e-3,
    ("lora", "adamw"): 1e-3,
    ("lora", "sgd"): 0.5,
    ("lora", "sgd_nesterov"): 0.1,
    ("full", "adam"): 1e-4,
    ("full", "adamw"): 1e-4,
    ("full", "sgd"): 0.1,
    ("full", "sgd_nesterov"): 0.02,
    ("selective", "adam"): 5e-4,
    ("selective", "adamw"): 5e-4,
    ("selective", "sgd"): 0.1,
    ("selective", "sgd_nesterov"): 0.02,
}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Every setting of one run, complete and consistent. A function takes the section it needs, not all of it."""

    method: MethodSettings
    lora: LoRASettings | None  # None with another method
    model: ModelSettings
    data: DataSettings
    training: TrainingSettings
    hardware: HardwareSettings
    run: RunSettings

    @classmethod
    def from_settings(cls, **given: Any) -> "RunConfig":
        """The configuration of these settings, by the names of the flags; ``None`` is "not given".

        Raises:
            UserError: a setting, or a pair of settings, that makes no sense.
        """
        unknown = sorted(set(given) - set(FLAGS))
        if unknown:
            raise UserError(f"unknown settings {', '.join(unknown)}: written by another version of this suite?")
        values = _resolved({name: value for name, value in given.items() if value is not None})
        parts = {
            name: kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})
            for name, kind in SECTIONS.items()
            if name != "lora" or values["method"] == "lora"
        }
        return cls(**({"lora": None} | parts))

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "RunConfig":
        """What ``to_dict`` gave.

        Raises:
            UserError: a setting that does not exist, or a value that is not allowed.
        """
        paths = {name: Path(value) for name, value in stored.items() if _is_path(name) and value is not None}
        return cls.from_settings(**{**stored, **paths})

    def to_dict(self) -> dict[str, Any]:
        """Every setting under its flag's name, as JSON can hold it; ``None`` for those of another method."""
        values = dict.fromkeys(FLAGS) | self._values()
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    def _values(self) -> dict[str, Any]:
        parts = [getattr(self, section) for section in SECTIONS]
        return {f.name: getattr(part, f.name) for part in parts if part is not None for f in dataclasses.fields(part)}

    def changed(self, **changes: Any) -> "RunConfig":
        """The same configuration with other values; nothing else follows from them."""
        return self.from_settings(**{**self._values(), **changes})

    @property
    def instead_of_hub(self) -> str:
        """The flags to advise if the hub cannot be reached."""
        advice = f"--model_name {PACKAGED} or --model_name PATH"
        if self.data.data_dir is not None:
            return advice
        packaged = DATASETS[self.data.dataset].packaged and not self.run.prefetch
        return f"{advice}, and --data_dir PATH" + ("; or --offline for packaged model and reviews" if packaged else "")

    @property
    def name(self) -> str:
        """What is trained, for people: lora, qlora, full or selective."""
        return "qlora" if self.lora is not None and self.lora.q_lora else self.method.method

    def differences(self, other: "RunConfig") -> list[str]:
        """Flags in which two runs differ, of those that change what is computed."""
        mine, others = self.to_dict(), other.to_dict()
        return [
            f"--{name} {others[name]} -> {mine[name]}"
            for name in FLAGS
            if name not in NOT_PART_OF_THE_RUN and mine[name] != others[name]
        ]


def continued(stored: Mapping[str, Any], given: Mapping[str, Any]) -> RunConfig:
    """The configuration with which ``--resume`` continues a run.

    Args:
        stored: the run's own settings.
        given: the flags of this command. One that contradicts the run is refused, unless it is in ``MAY_CHANGE``;
            there may be more epochs if the learning rate of the epochs before does not depend on their number.

    Raises:
        UserError: a contradiction, or stored settings that are not this suite's.
    """
    try:
        run = RunConfig.from_dict({**stored, "resume": False, "overwrite": False})
    except (UserError, TypeError) as error:
        raise UserError(f"--resume: the settings stored in {given['output_dir']} cannot be used: {error}") from None
    values = run.to_dict()
    level = run.training.scheduler == "constant" and run.training.warmup_fraction == 0
    for name, value in given.items():
        before, now = values[name], str(value) if isinstance(value, Path) else value
        more_epochs = name == "epochs" and level and now > before
        if now != before and name not in MAY_CHANGE and not more_epochs:
            raise UserError(
                f"--{name} {now}: the run in {given['output_dir']} has --{name} {before}, and --resume continues it as"
                f" it is: leave this flag out, or start another run"
            )
    return RunConfig.from_dict({**values, **given, "resume": True})


def _is_path(name: str) -> bool:
    return name in FLAGS and FLAGS[name].kind is Path


def check_data_dir(data_dir: Path | None) -> None:
    """Refuses a folder of data that does not exist, before anything is loaded.

    Raises:
        UserError: it does not exist, or may not be read.
    """
    if data_dir is not None and not os.access(data_dir, os.R_OK):
        raise UserError(f"--data_dir {data_dir}: there is no such file or folder, or you may not read it")


# ---------------------------------------------------------------------------------------------------------------------
# defaults and checks


def _resolved(given: dict[str, Any]) -> dict[str, Any]:
    """Every setting, those that depend on others included; ``None`` for those that do not apply."""
    for name, value in given.items():
        choices = FLAGS[name].choices
        if choices and value not in choices:
            raise UserError(f"--{name} {value}: allowed are {', '.join(choices)}")
    for name in given:
        flag, method = FLAGS[name], given.get("method", FLAGS["method"].default)
        wanted = "lora" if flag.section == "lora" else "selective" if name == "trainable_layers" else method
        if wanted != method:
            raise UserError(f"--{name} was given with --method {method}: it belongs to --method {wanted} only")
    defaults = {name: flag.default for name, flag in FLAGS.items()}
    _check_combinations(SimpleNamespace(**defaults | dict.fromkeys(_LORA_FLAGS) | given))
    defaults |= _dependent_defaults(SimpleNamespace(**defaults | given))
    values = defaults | given
    _check_ranges(SimpleNamespace(**values))
    return values


_LORA_FLAGS = tuple(flag.name for flag in FLAGS.values() if flag.section == "lora")


def _dependent_defaults(s: SimpleNamespace) -> dict[str, Any]:
    """Values for the settings that depend on others, as if none of them was given."""
    traits = DATASETS[s.dataset]
    defaults: dict[str, Any] = {
        "model_name": PACKAGED if s.offline else DEFAULT_MODEL,
        "text_column": traits.text_column,
        "agreement": traits.agreement,
        "monitor": traits.monitor,
        "learning_rate": DEFAULT_LEARNING_RATES[s.method, s.optimizer],
        "warmup_fraction": 0.3 if s.scheduler == "onecycle" else 0.06,
        "weight_decay": 0.01 if s.optimizer == "adamw" else 0.0,
        "batch_tokens": s.batch_size * s.max_length if s.batch_size else max(6144, s.max_length),
        "batch_size": 64,
    }
    if s.optimizer.startswith("sgd"):
        defaults["momentum"] = 0.9 if s.optimizer == "sgd_nesterov" else 0.0
    if s.method == "selective":
        defaults["trainable_layers"] = 2
    if s.method == "lora" and s.q_lora:
        defaults["double_quantization"] = True
    return defaults


def _check_combinations(s: SimpleNamespace) -> None:
    """Settings that exclude each other; what was not given, and depends on others, is ``None``."""

    def need(allowed: bool, name: str, what: str) -> None:
        if not allowed:
            raise UserError(f"--{name} {getattr(s, name)}: {what}")

    traits = DATASETS[s.dataset]
    with_agreement = [name for name, other in DATASETS.items() if other.agreement]
    with_resplit = [name for name, other in DATASETS.items() if other.resplit]
    with_source = [name for name, other in DATASETS.items() if other.downloads]
    need(s.double_quantization is None or bool(s.q_lora), "double_quantization", "needs --q_lora True")
    need(s.data_dir is not None or traits.on_hub, "dataset", "needs --data_dir PATH")
    need(s.agreement is None or bool(traits.agreement), "agreement", f"needs --dataset {' or '.join(with_agreement)}")
    need(s.split != "resplit" or bool(traits.resplit), "split", f"needs --dataset {' or '.join(with_resplit)}")
    found = s.data_dir is not None or not s.offline or traits.packaged
    need(found, "offline", f"{s.dataset} is not packaged, give --data_dir PATH")
    downloads = bool(traits.downloads) and s.data_dir is None and not s.offline
    only = f"only for --dataset {' or '.join(with_source)} without --data_dir and --offline"
    need(s.data_source is None or downloads, "data_source", only)
    need(s.momentum is None or s.optimizer.startswith("sgd"), "momentum", "needs an sgd --optimizer")
    need(s.device is None or s.accelerator != "cpu", "device", "is a GPU, but --accelerator is cpu")
    need(s.device is None or s.devices == 1, "device", "is one GPU, but --devices asks for more")
    need(not (s.resume and s.overwrite), "resume", "cannot go with --overwrite")
    need(not s.resume or s.output_dir is not None, "resume", "needs --output_dir, the run to continue")
    need(not (s.estimate and s.devices * s.num_nodes > 1), "estimate", "is for one device")
    need(not (s.prefetch and s.offline), "prefetch", "needs the network, but --offline was given")


def _check_ranges(s: SimpleNamespace) -> None:
    """Every number against the bounds of its field, and those that bound each other."""
    for name, flag in FLAGS.items():
        value = getattr(s, name)
        if value is None or not flag.bounds:
            continue
        # In this order: whole numbers can be too large for a float
        inside = all(_within(value, word, bound) for word, bound in flag.bounds.items())
        if not inside or not value < math.inf:
            words = " and ".join(f"{word} {bound}" for word, bound in flag.bounds.items())
            raise UserError(
                f"--{name} {value}: must be {words if 'above' not in flag.bounds else 'finite and ' + words}"
            )
    if s.method == "lora" and not any(getattr(s, name) for name in LORA_TARGETS):
        raise UserError(f"no LoRA target: at least one of --{' --'.join(LORA_TARGETS)} must be True")
    if s.batch_tokens < s.max_length:
        raise UserError(f"--batch_tokens {s.batch_tokens}: must be at least --max_length {s.max_length}")
    if s.optimizer == "sgd_nesterov" and not s.momentum:
        raise UserError(f"--momentum {s.momentum}: must be above 0 with --optimizer sgd_nesterov")


def _within(value: float, word: str, bound: float) -> bool:
    if word in ("at least", "above"):
        return value >= bound if word == "at least" else value > bound
    return value <= bound if word == "at most" else value < bound
