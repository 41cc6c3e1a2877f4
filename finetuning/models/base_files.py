"""The folder of a base model: where it is, whether all its files are there and can be read, and their hashes.

A base model is always loaded from a local folder: of a package, of the user, or of the hub's cache. If the hub's cache
lacks the model, it is downloaded if possible. A run records the hashes of the files, so that later uses know that they
are the same. Nothing here imports torch.
"""

import os
import pickle
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from finetuning.errors import UserError, as_user_error, first_line
from finetuning.hub import hub_snapshot
from finetuning.models.packaged import MPNET_FILES, packaged_folder
from finetuning.settings import PACKAGED_BASE, PACKAGED_MODELS
from finetuning.storage import read_json, sha256_of

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in the order in which transformers looks for them
HUB_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
DAMAGED = (ValueError, LookupError, TypeError, AttributeError)  # what reading a damaged index can raise
OLD_WEIGHTS = "pytorch_model*.bin"  # what some models have instead of safetensors; torch reads tensors alone from it
ADAPTER_CONFIG = "adapter_config.json"  # of a folder that PEFT wrote
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")

# What a classifier is made of: sizes, weights and tokenizer. Other files may change without changing a prediction.
# Of pytorch_model.bin, only what is read.
PATTERNS = (
    "config.json", "*.safetensors", "*.index.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "*.model",
)  # fmt: skip


def find_folder(model_name: str, offline: bool, instead: str) -> Path:
    """The folder of the base model; unpacks it, or downloads it if the hub's cache does not contain it.

    Args:
        instead: the flags that the error message advises if the hub cannot be reached.

    Raises:
        UserError: the model does not exist, a package is missing or damaged, or the hub cannot be reached.
    """
    if model_name in PACKAGED_MODELS:
        return packaged_folder(model_name)
    if os.access(model_name, os.R_OK) and Path(model_name).is_dir():
        return Path(model_name)
    return _hub_folder(model_name, offline, instead)


def check_folder(model_name: str, folder: Path) -> None:
    """Refuses a model, before torch is loaded, if its config, weights or tokenizer are missing or damaged."""
    stored_config(model_name, folder)
    check_weights(model_name, folder)
    check_tokenizer(model_name, folder)


def _hub_folder(name: str, offline: bool, instead: str) -> Path:
    """The hub's snapshot of a model, from the cache if it is complete there: compute nodes then need no network."""

    def is_complete(folder: Path) -> bool:
        return (folder / "config.json").is_file() and has_weights(folder) and has_tokenizer(folder)

    flag = f"--model_name {name}"
    folder = hub_snapshot(flag, name, offline, instead, is_complete, "model", HUB_FILES)
    if has_weights(folder):
        return folder
    return hub_snapshot(flag, name, offline, instead, is_complete, "model", [*HUB_FILES, OLD_WEIGHTS])


def stored_config(model_name: str, folder: Path) -> dict[str, Any]:
    """The content of a model's ``config.json``.

    Raises:
        UserError: there is none that can be used, the folder is an adapter, or its weights are quantized.
    """
    if (folder / ADAPTER_CONFIG).exists():  # transformers would download the base model that it names
        raise UserError(
            f"--model_name {model_name}: is an adapter: give its base model, and the folder to --init_adapter"
        )
    with as_user_error(f"--model_name {model_name}: no usable config.json in it", OSError, ValueError):
        stored = read_json(folder / "config.json")
    if stored.get("quantization_config"):
        raise UserError(
            f"--model_name {model_name}: its weights are already quantized: give the model in full precision, with"
            f" --q_lora True for 4 bits"
        )
    return stored


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a file that a tokenizer can be made from."""
    return any(path.is_file() for pattern in TOKENIZER_FILES for path in folder.glob(pattern))


def check_tokenizer(model_name: str, folder: Path) -> None:
    """Checks that a folder has a tokenizer, and the packages to read it. Without, transformers makes an empty one.

    Raises:
        UserError: a file or a package is missing.
    """
    if not has_tokenizer(folder):
        raise UserError(f"--model_name {model_name}: has no tokenizer: needs one of {', '.join(TOKENIZER_FILES)}")
    if not (folder / "tokenizer.json").is_file() and list(folder.glob("*.model")) and not find_spec("sentencepiece"):
        raise UserError(f"--model_name {model_name}: its tokenizer needs a package: pip install sentencepiece protobuf")


def weight_files(folder: Path) -> list[str]:
    """The names of the files with a model's weights: one, or the parts that an index names, there or not.

    Raises:
        one of ``DAMAGED``: the index is damaged.
    """
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [name]
        if index.is_file():
            return sorted(set(read_json(index)["weight_map"].values()))
    return []


def has_weights(folder: Path) -> bool:
    """Whether all files with the weights are in a folder of the hub's cache, where only a part may be."""
    try:
        names = weight_files(folder)
        return bool(names) and all((folder / name).is_file() for name in names)
    except DAMAGED:
        return False


def check_weights(model_name: str, folder: Path) -> None:
    """Checks that the files with the weights are all in the folder, and that safetensors are not damaged.

    Only their headers are read. They say how long a file must be.

    Raises:
        UserError: a file is missing, damaged, or in another folder, where transformers would read it.
    """
    flag = f"--model_name {model_name}"
    try:
        names = weight_files(folder)
        if not names:
            raise UserError(f"{flag} cannot be loaded: it has no {' and no '.join(WEIGHTS)}")
        for name in names:
            if Path(name).name != name:
                raise UserError(f"{flag}: its index names {name}, which is not in its folder")
            if not (folder / name).is_file():
                raise UserError(f"{flag} cannot be loaded: it lacks {name}, which its index names")
            if name.endswith(".safetensors"):
                safe_open(folder / name, framework="numpy")
    except (OSError, *DAMAGED, SafetensorError) as error:
        raise UserError(f"{flag} cannot be loaded: {first_line(error, name_file=True)}") from None


def stored_shapes(folder: Path) -> dict[str, list[int]]:
    """The name and shape of each weight in a folder. Damaged files of the older format count as empty."""
    shapes: dict[str, list[int]] = {}
    for path in (folder / name for name in weight_files(folder)):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy") as file:
                shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        else:
            import torch

            with suppress(OSError, EOFError, RuntimeError, pickle.UnpicklingError):  # loading the model says it
                stored = torch.load(path, map_location="meta", weights_only=True)  # runs no code
                shapes |= {name: list(weight.shape) for name, weight in stored.items()}
    return shapes


def hashes_of(model_name: str, folder: Path) -> dict[str, str]:
    """``file_hashes``, known for the packaged base-size model: finding it has already compared its files with them."""
    return dict(sorted(MPNET_FILES.items())) if model_name == PACKAGED_BASE else file_hashes(folder)


def file_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a base model, by name."""
    paths = {path.name: path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()}
    with suppress(*DAMAGED):  # a damaged index, whose own hash tells
        paths |= {name: folder / name for name in weight_files(folder) if (folder / name).is_file()}
    return {name: sha256_of(paths[name]) for name in sorted(paths)}


def check_base_unchanged(folder: Path, present: Mapping[str, str], recorded: Mapping[str, str]) -> None:
    """Checks that the base model's ``file_hashes`` are those of the run. Others are ignored, if not read instead.

    Raises:
        UserError: a file is gone or has changed, or there is one that is read instead.
    """
    for name, digest in recorded.items():
        if present.get(name) != digest:
            what = "has changed since the run" if name in present else "is gone"
            raise UserError(f"the run's base model {folder}: {name} {what}: restore it, or train again")
    for name in (*weight_files(folder), "tokenizer.json"):
        if recorded and name in present and name not in recorded:
            raise UserError(f"the run's base model {folder}: {name} is new since the run: remove it, or train again")
