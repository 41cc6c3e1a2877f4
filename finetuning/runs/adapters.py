"""Reads an adapter in PEFT's format, made by PEFT or by an earlier run. Nothing here imports torch."""

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from finetuning.config import quantized_bits
from finetuning.errors import UserError, as_user_error, first_line, listed
from finetuning.runs.files import ADAPTER, ADAPTER_CONFIG, check_unchanged, read_origin, read_result
from finetuning.settings import CUTTING, DataSettings, recorded_name
from finetuning.storage import read_json, sha256_of

PREFIX = "base_model.model."
PICKLE = "adapter_model.bin"  # PEFT's earlier format, which can contain any code
# Entries of adapter_config.json that are read here, or that say nothing about what the file's tensors compute.
UNDERSTOOD = {
    "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "use_rslora",
    "rank_pattern", "alpha_pattern", "target_modules", "modules_to_save", "bias", "init_lora_weights", "inference_mode",
    "revision", "auto_mapping", "peft_version", "layers_pattern", "layers_to_transform", "exclude_modules",
    "megatron_core", "eva_config", "qalora_group_size", "fan_in_fan_out", "use_dora", "pooling",
}  # fmt: skip
MOST_CONTINUED = 100  # runs, each of which has begun with the adapter of another one
# Ways to begin that leave the base model as it is. Others (PiSSA, LoftQ, OLoRA) change its weights.
PLAIN_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none", None), "init_lora_weights": PLAIN_BEGINNINGS,
    "pooling": ("first", "mean", None),  # this suite writes it
}  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """An adapter's settings, and its linears with LoRA."""

    folder: Path
    base: str | None  # the base model that it names
    rank: int
    alpha: float
    scaling: str  # standard or rslora
    variant: str  # lora or dora
    linears: dict[str, tuple[int, float]]  # full name of each linear with LoRA -> rank, alpha
    pooling: str | None  # what its head reads; None: what the base model's class reads
    shapes: Mapping[str, tuple[int, ...]]  # of its tensors, by their names in the file
    result: Mapping[str, Any]  # of the run that wrote it; empty if PEFT did

    @property
    def label_names(self) -> list[str] | None:
        """The classes of the run that wrote it; ``None`` if they are not known."""
        names: list[str] | None = self.result.get("data", {}).get("label_names")
        return names

    @property
    def quantized(self) -> str:
        """In how many bits the run that wrote it held the frozen weights; empty if in floats, or if nobody knows."""
        return quantized_bits(self.result.get("config", {}))

    def runs_on(self, data: DataSettings) -> "list[EarlierRun]":
        """The runs that have read the same data set, in whatever parts: its own, and those that this one continued.

        The latest comes first. A run that has gone ends the list, because nobody knows what it continued.
        """
        found, run = [], EarlierRun(self.folder, self.result)
        for _ in range(MOST_CONTINUED):
            if run.has_read(data):
                found.append(run)
            if (before := run.continued()) is None:
                break
            run = before
        return found

    def file_hashes(self) -> dict[str, str]:
        """The SHA-256 of each of its files, by name."""
        return {name: sha256_of(self.folder / name) for name in (ADAPTER, ADAPTER_CONFIG)}


@dataclass(frozen=True)
class EarlierRun:
    """A finished run whose adapter a later one has continued."""

    folder: Path
    result: Mapping[str, Any]

    def has_read(self, data: DataSettings) -> bool:
        """Whether it read this data set, in whatever parts."""
        place = data.data_dir and data.data_dir.resolve()
        return self.result.get("config", {}).get("dataset") == data.dataset and place in self._places("data_dir")

    def continued(self) -> "EarlierRun | None":
        """The run whose adapter it has continued; ``None`` if there is none, or it has gone."""
        for place in filter(None, self._places("init_adapter")):
            with suppress(OSError, ValueError):
                return EarlierRun(place, read_result(place))
        return None

    def held_out_differs(self, data: DataSettings, hashes: Mapping[str, str]) -> bool:
        """Whether its validation or test were other texts. If texts are now cut in another way, nobody knows.

        Args:
            data: the settings of a run on the same data.
            hashes: of its splits, from ``data_hashes``.
        """
        config = self.result.get("config", {})
        with suppress(OSError, ValueError, KeyError):
            before = read_origin(self.folder)["data"]
            cut_alike = all(config.get(name) == getattr(data, name) for name in CUTTING)
            held_out = {name: hashes[name] for name in ("validation", "test") if name in hashes}
            return cut_alike and any(before.get(name) not in (None, value) for name, value in held_out.items())
        return False

    def _places(self, setting: str) -> list[Path | None]:
        """Where a path of its settings leads from the folder in which its command was given, and from this one."""
        value = self.result.get("config", {}).get(setting)
        if value is None:
            return [None]
        begun_in = ""  # earlier versions did not record it
        with suppress(OSError, ValueError, KeyError):
            begun_in = read_origin(self.folder)["folder"]
        return [Path(start, value).resolve() for start in (begun_in, "")]


def read_adapter(folder: Path) -> Adapter:
    """The adapter in a folder. The tensors' names say where it is placed, so patterns of names need no reading.

    Raises:
        UserError: there is no adapter, it is damaged, was changed after its run, or contains what this suite does not
            compute.
    """
    if folder.is_file():
        raise UserError(f"--init_adapter {folder}: must be the folder of the adapter")
    for name in (ADAPTER, ADAPTER_CONFIG):
        check_unchanged(folder / name)
    config = _read_config(folder)
    shapes = _read_shapes(folder)
    strange = sorted(name for name, value in config.items() if value and name not in UNDERSTOOD)
    if strange:
        raise UserError(f"{folder}: {ADAPTER_CONFIG} has {strange[0]} {config[strange[0]]!r}, which is not supported")
    for name, allowed in SUPPORTED.items():
        if config.get(name) not in allowed:
            choices = listed(value for value in allowed if value is not None)
            raise UserError(f"{folder}: {ADAPTER_CONFIG} has {name} {config.get(name)!r}: supported are {choices}")
    try:
        rank, alpha = int(config["r"]), _finite(config["lora_alpha"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(f"{folder}: {ADAPTER_CONFIG} must have the numbers r and lora_alpha") from None
    ranks, alphas = (_patterns(folder, config, name) for name in ("rank_pattern", "alpha_pattern"))
    linears = {}
    for tensor, shape in shapes.items():
        if not tensor.endswith(".lora_A.weight"):
            continue
        name = tensor.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        wanted = _by_pattern(ranks, name, rank)
        if shape[:1] != (wanted,):
            raise UserError(f"{folder}: {tensor} has shape {shape}, but {ADAPTER_CONFIG} says rank {wanted:g}")
        linears[name] = (shape[0], _by_pattern(alphas, name, alpha))
    if not linears:
        raise UserError(f"{folder}: {ADAPTER} contains no LoRA matrices")
    scaling = "rslora" if config.get("use_rslora") else "standard"
    variant = "dora" if config.get("use_dora") else "lora"
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str | None):
        raise UserError(f"{folder}: {ADAPTER_CONFIG} has base_model_name_or_path {base!r}: must be a text")
    named, pooling = base and recorded_name(base), config.get("pooling")
    return Adapter(folder, named, rank, alpha, scaling, variant, linears, pooling, shapes, _result_of_run(folder))


def _result_of_run(folder: Path) -> dict[str, Any]:
    """The result of the run in a folder; empty if it holds no run."""
    with suppress(OSError, ValueError):
        return read_result(folder)
    return {}


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / ADAPTER_CONFIG)
    except FileNotFoundError:
        raise UserError(f"{folder}: must be a folder with an adapter, but has no {ADAPTER_CONFIG}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {ADAPTER_CONFIG} cannot be read: {first_line(error)}") from None


def _read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in the adapter's file."""
    path = folder / ADAPTER
    if not path.is_file() and (folder / PICKLE).is_file():
        raise UserError(f"{folder}: {PICKLE} is a pickle, which is never loaded: save the adapter as {ADAPTER}")
    with as_user_error(f"{path} cannot be read", OSError, SafetensorError), safe_open(path, framework="numpy") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _patterns(folder: Path, config: Mapping[str, Any], key: str) -> dict[re.Pattern[str], float]:
    """The patterns of ``rank_pattern`` or ``alpha_pattern``, each for the end of a name, with their numbers."""
    try:
        return {re.compile(rf"(.*\.)?({end})$"): _finite(value) for end, value in (config.get(key) or {}).items()}
    except (re.error, AttributeError, TypeError, ValueError, OverflowError):
        raise UserError(
            f"{folder}: {ADAPTER_CONFIG} has {key} {config[key]!r}: must have patterns and numbers"
        ) from None


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _by_pattern(patterns: Mapping[re.Pattern[str], float], name: str, default: float) -> float:
    """The value of the first pattern that matches a name, as in PEFT's ``get_pattern_key``."""
    return next((value for pattern, value in patterns.items() if pattern.match(name)), default)
