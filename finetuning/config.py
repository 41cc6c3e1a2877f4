"""All settings of one run: given values, defaults that depend on other settings, and checks.

Users see flat flags; code sees the sections of ``settings.py``. This module checks everything that needs only the
flags. Checks that need the data, the model or the machine are next to the code that reads them.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from finetuning.datasets import DATASETS, hub_name, split_names, traits_of
from finetuning.errors import UserError
from finetuning.settings import (
    DEFAULT_MODEL,
    FLAGS,
    LORA_TARGETS,
    PACKAGED,
    SECTIONS,
    TRACKERS,
    DataSettings,
    HardwareSettings,
    LoRASettings,
    MethodSettings,
    ModelSettings,
    RunSettings,
    TrainingSettings,
)

# Settings that do not change what a run computes.
NOT_PART_OF_THE_RUN = (
    "output_dir", "resume", "overwrite", "checkpoint_minutes", "checkpoint_steps", "force", "report", "report_texts",
    "tracker", "verbose",
)  # fmt: skip
# Settings that --resume may change: also the location of model and data, and the hardware.
MAY_CHANGE = (
    *NOT_PART_OF_THE_RUN, "model_name", "data_dir", "data_source", "offline", "accelerator", "device", "devices",
    "num_nodes", "strategy", "efficient", "gradient_checkpointing", "compile", "frozen_cache_gb", "init_adapter",
)  # fmt: skip
# Settings that --init_adapter decides.
FROM_ADAPTER = ("lora_r", "lora_alpha", "lora_scaling", *LORA_TARGETS)

# Peak learning rates if --learning_rate is not given. LoRA needs about ten times the rate of full fine-tuning. SGD
# needs a far higher rate, because it does not scale its step by the size of past gradients.
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
        """Builds the configuration from the result of ``to_dict``.

        Raises:
            UserError: like ``from_settings``.
        """
        paths = {name: Path(value) for name, value in stored.items() if _is_path(name) and value is not None}
        return cls.from_settings(**{**stored, **paths})

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

    def instead_of_hub(self, packaged: bool = True) -> str:
        """The flags to advise if the hub cannot be reached; without ``packaged``, no packages."""
        advice = f"--model_name {PACKAGED} or --model_name PATH"
        if self.data.data_dir is not None:
            return advice
        packaged = packaged and traits_of(self.data.dataset).packaged
        files = "--dataset text --data_dir PATH" if hub_name(self.data.dataset) else "--data_dir PATH"
        return f"{advice}, and {files}" + ("; or --offline for packaged model and reviews" if packaged else "")

    @property
    def name(self) -> str:
        """The method, for people: lora, qlora, full or selective."""
        return "qlora" if self.lora is not None and self.lora.q_lora else self.method.method

    @property
    def excludes_int8(self) -> str | None:
        """The setting that excludes 8-bit products of frozen linears; ``None`` if none does."""
        return _excludes_int8(SimpleNamespace(**self._values() | {"q_lora": self.name == "qlora"}))

    def differences(self, other: "RunConfig") -> list[str]:
        """The flags whose values differ and change what the run computes, for example ``--seed 0 -> 1``."""
        mine, others = self.to_dict(), other.to_dict()
        return [
            f"--{name} {others[name]} -> {mine[name]}"
            for name in FLAGS
            if name not in NOT_PART_OF_THE_RUN and mine[name] != others[name]
        ]


def resumed_config(stored: Mapping[str, Any], given: Mapping[str, Any]) -> RunConfig:
    """The configuration with which ``--resume`` continues a run.

    Args:
        stored: the settings that the run stored.
        given: the flags of this command. Only flags in ``MAY_CHANGE`` may differ from the run. ``--epochs`` may grow
            if the learning rate is constant, because earlier epochs then do not depend on it.

    Raises:
        UserError: a flag contradicts the run, or the stored settings cannot be used.
    """
    try:
        run = RunConfig.from_dict({**stored, "resume": False, "overwrite": False})
    except (UserError, TypeError) as error:
        raise UserError(f"--resume: the settings stored in {given['output_dir']} cannot be used: {error}") from None
    values = run.to_dict()
    level = run.training.scheduler == "constant" and run.training.warmup_fraction == 0
    for name, value in given.items():
        before, now = values[name], str(value) if isinstance(value, Path) else value
        if (name, now) == ("precision", "fast"):  # the run stored what it meant
            continue
        more_epochs = name == "epochs" and level and now > before
        elsewhere = name in MAY_CHANGE and (name != "init_adapter" or None not in (before, now))
        if now != before and not elsewhere and not more_epochs:
            raise UserError(
                f"--{name} {now}: the run in {given['output_dir']} has --{name} {before}, and --resume cannot change"
                f" it: leave out this flag, or start another run"
            )
    return RunConfig.from_dict({**values, **given, "resume": True, "precision": values["precision"]})


def parsed_class_weights(setting: str) -> dict[str, float]:
    """The weights that ``--class_weights NAME=WEIGHT,...`` gives, by name. A name may contain commas.

    Raises:
        UserError: it has another form, a class twice, or a weight that is negative or not finite.
    """
    parts = re.findall(r"(.+?)=([^=,]*)(?:,|$)", setting)
    try:
        weights = {name.strip(): float(weight) for name, weight in parts}
    except ValueError:
        weights = {}
    whole = ",".join(f"{name}={weight}" for name, weight in parts) == setting.rstrip(",")
    allowed = all(0 <= weight < math.inf for weight in weights.values())
    if not (weights and whole and allowed) or len(weights) < len(parts):
        raise UserError(
            f"--class_weights {setting}: must be balanced, none, or NAME=WEIGHT,NAME=WEIGHT with each class once,"
            f" and weights of at least 0"
        )
    return weights


def _is_path(name: str) -> bool:
    return name in FLAGS and FLAGS[name].kind is Path


def check_data_dir(data_dir: Path | None) -> None:
    """Checks that the data exists, before anything is loaded.

    Raises:
        UserError: it does not exist or is not readable.
    """
    if data_dir is not None and not os.access(data_dir, os.R_OK):
        raise UserError(f"--data_dir {data_dir}: no such file or folder, or you may not read it")


def check_trackers(run: RunSettings) -> None:
    """Checks that the trackers are installed, before anything is loaded.

    Raises:
        UserError: one is not installed, or would connect although ``--offline`` is set.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    connects = {
        "wandb": os.environ.get("WANDB_MODE") not in ("offline", "disabled"),
        "mlflow": bool(re.match(r"(?!file:|sqlite:)\w[\w+.-]*:|databricks", uri)),
    }
    for name in run.trackers:
        if find_spec(name) is None:
            raise UserError(f"--tracker {name}: is not installed: pip install {name}")
        if run.offline and connects.get(name, False):
            local = "WANDB_MODE=offline" if name == "wandb" else "MLFLOW_TRACKING_URI to a folder"
            raise UserError(f"--tracker {name}: connects, but --offline allows no connection: set {local}")


# ---------------------------------------------------------------------------------------------------------------------
# defaults and checks


def _resolved(given: dict[str, Any]) -> dict[str, Any]:
    """The value of every setting, checked; ``None`` if it does not apply."""
    for name, value in given.items():
        choices = FLAGS[name].choices
        if choices and value not in choices:
            raise UserError(f"--{name} {value}: must be one of {', '.join(choices)}")
    for name in given:
        flag, method = FLAGS[name], given.get("method", FLAGS["method"].default)
        wanted = "lora" if flag.section == "lora" else "selective" if name == "trainable_layers" else method
        if wanted != method:
            raise UserError(f"--{name} {given[name]}: needs --method {wanted}, but the method is {method}")
    defaults = {name: flag.default for name, flag in FLAGS.items()}
    settings = SimpleNamespace(**defaults | dict.fromkeys(_LORA_FLAGS) | given)
    _check_names(settings)
    _check_combinations(settings)
    defaults |= _dependent_defaults(SimpleNamespace(**defaults | given))
    values = defaults | given
    _check_ranges(SimpleNamespace(**values))
    return values


_LORA_FLAGS = tuple(flag.name for flag in FLAGS.values() if flag.section == "lora")


def _dependent_defaults(s: SimpleNamespace) -> dict[str, Any]:
    """Defaults of the settings whose default depends on other settings."""
    traits = traits_of(s.dataset)
    defaults: dict[str, Any] = {
        "model_name": PACKAGED if s.offline else DEFAULT_MODEL,
        "text_column": traits.text_column,
        "label_column": traits.label_column,
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
    if s.lora_modules is not None:
        defaults |= {"lora_query": False, "lora_value": False}
    if s.init_adapter is not None:  # ``adopt_adapter`` takes them from the adapter
        defaults |= dict.fromkeys(FROM_ADAPTER)
    if s.method == "lora" and s.q_lora:
        defaults["double_quantization"] = True
    return defaults


def _check_names(s: SimpleNamespace) -> None:
    """Refuses names of files that no text can hold, and an adapter that its own run would replace."""
    for name, value in vars(s).items():
        try:
            str(value).encode()
        except UnicodeEncodeError:
            raise UserError(f"--{name} {value}: is not valid UTF-8: rename it") from None
    folders = (s.init_adapter, s.output_dir)
    if None not in folders and len(set(map(os.path.realpath, folders))) == 1:
        raise UserError(
            f"--init_adapter {s.init_adapter}: is --output_dir as well, whose files a run replaces: give another one"
        )


def _check_combinations(s: SimpleNamespace) -> None:
    """Refuses settings that exclude each other. A setting that was not given and depends on others is ``None``."""

    def require(allowed: bool, name: str, message: str) -> None:
        if not allowed:
            raise UserError(f"--{name} {getattr(s, name)}: {message}")

    traits, on_hub = traits_of(s.dataset), hub_name(s.dataset) is not None
    with_agreement = [name for name, other in DATASETS.items() if other.agreement]
    with_resplit = [name for name, other in DATASETS.items() if other.resplit]
    with_source = [name for name, other in DATASETS.items() if other.downloads]
    require(s.double_quantization is None or bool(s.q_lora), "double_quantization", "needs --q_lora True")
    named = s.lora_modules is not None
    require(not named or bool(s.lora_modules.replace(",", "").strip()), "lora_modules", "needs at least one name")
    for name in LORA_TARGETS[:-1]:
        require(not (named and getattr(s, name)), name, "cannot be used with --lora_modules")
    require(s.data_dir is not None or traits.on_hub, "dataset", "needs --data_dir PATH")
    require(
        s.agreement is None or bool(traits.agreement), "agreement", f"needs --dataset {' or '.join(with_agreement)}"
    )
    require(s.split != "resplit" or bool(traits.resplit), "split", f"needs --dataset {' or '.join(with_resplit)}")
    require(not (on_hub and s.data_dir), "data_dir", f"needs --dataset text, but --dataset is {s.dataset}")
    require(not s.split_names or on_hub, "split_names", "needs --dataset OWNER/NAME, a data set of the hub")
    split_names(s.split_names)
    others = (s.text_column or traits.text_column, s.label_column or traits.label_column)
    named = traits.label_names is not None  # its reader knows the columns
    pairs = s.text_pair_column is None or not named
    require(pairs, "text_pair_column", f"{s.dataset} has no pairs of texts: use --dataset text")
    require(s.label_separator is None or not named, "label_separator", f"{s.dataset} is not multi-label")
    require(s.label_separator != "", "label_separator", "must not be empty")
    threshold = s.threshold in (None, "tuned") or _is_share(s.threshold)
    require(threshold, "threshold", "must be tuned, or above 0 and below 1")
    require(
        s.text_pair_column is None or s.text_pair_column not in others,
        "text_pair_column",
        "must be another column than text and label",
    )
    found = s.data_dir is not None or not s.offline or traits.packaged or on_hub  # the cache may have a hub set
    require(found, "offline", f"no package contains {s.dataset}: give --data_dir PATH")
    downloads = bool(traits.downloads) and s.data_dir is None and not s.offline
    only = f"needs --dataset {' or '.join(with_source)} without --data_dir and --offline"
    require(s.data_source is None or downloads, "data_source", only)
    require(s.momentum is None or s.optimizer.startswith("sgd"), "momentum", "needs an sgd --optimizer")
    excludes = _excludes_int8(s)
    require(s.precision != "int8" or excludes is None, "precision", f"cannot be used, because {excludes}")
    require(s.device is None or s.accelerator != "cpu", "device", "needs a GPU: leave out --accelerator cpu")
    require(s.device is None or s.devices == 1, "device", f"needs --devices 1, but --devices is {s.devices}")
    require(
        set(RunSettings(tracker=s.tracker).trackers) <= set(TRACKERS),
        "tracker",
        f"must be one or more of {', '.join(TRACKERS)}",
    )
    require(not (s.resume and s.overwrite), "resume", "cannot be used with --overwrite")
    require(not s.resume or s.output_dir is not None, "resume", "needs --output_dir PATH, the run to continue")
    if s.class_weights not in ("none", "balanced"):
        parsed_class_weights(s.class_weights)


def _excludes_int8(s: SimpleNamespace) -> str | None:
    """The setting that excludes ``--precision int8``, if any."""
    if s.method == "full":
        return "--method full trains all weights"
    if s.q_lora:
        return "--q_lora True holds the frozen weights in 4 bits"
    return "--compile True is for GPUs" if s.compile else None


def _check_ranges(s: SimpleNamespace) -> None:
    """Checks every number against its bounds, and numbers that limit each other."""
    for name, flag in FLAGS.items():
        value = getattr(s, name)
        if value is None or not flag.bounds:
            continue
        # The bounds come before the comparison with infinity: a whole number can be too large for a float.
        inside = all(_within(value, word, bound) for word, bound in flag.bounds.items())
        if not inside or not value < math.inf:
            words = " and ".join(f"{word} {bound}" for word, bound in flag.bounds.items())
            raise UserError(
                f"--{name} {value}: must be {words if 'above' not in flag.bounds else 'finite and ' + words}"
            )
    chosen = any(getattr(s, name) for name in (*LORA_TARGETS, "lora_modules"))
    if s.method == "lora" and s.init_adapter is None and not chosen:
        raise UserError(f"no LoRA target: at least one of --{', --'.join(LORA_TARGETS)} must be True")
    if s.batch_tokens < s.max_length:
        raise UserError(f"--batch_tokens {s.batch_tokens}: must be at least --max_length {s.max_length}")
    if s.optimizer == "sgd_nesterov" and not s.momentum:
        raise UserError(f"--momentum {s.momentum}: must be above 0 with --optimizer sgd_nesterov")


def _is_share(text: str) -> bool:
    """Whether it is a number above 0 and below 1."""
    try:
        return 0 < float(text) < 1
    except ValueError:
        return False


def _within(value: float, word: str, bound: float) -> bool:
    if word in ("at least", "above"):
        return value >= bound if word == "at least" else value > bound
    return value <= bound if word == "at most" else value < bound
