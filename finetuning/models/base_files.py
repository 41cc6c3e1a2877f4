"""The files of a base model: whether all are there and can be read, and their hashes.

A run records the hashes, so that later uses know that the files are the same.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from finetuning.errors import UserError, first_line

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in the order in which transformers looks for them

# What a classifier is made of: sizes, weights and tokenizer. Other files may change without changing a prediction.
# Of pytorch_model.bin, only what is read.
PATTERNS = (
    "config.json", "*.safetensors", "*.index.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json",
    "*.model",
)  # fmt: skip


def weight_files(folder: Path) -> list[str]:
    """The names of the files with a model's weights: one, or the parts that an index names, there or not.

    Raises:
        ValueError, KeyError, AttributeError: the index is damaged.
    """
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [name]
        if index.is_file():
            return sorted(set(json.loads(index.read_text(encoding="utf8"))["weight_map"].values()))
    return []


def has_weights(folder: Path) -> bool:
    """Whether all files with the weights are in a folder of the hub's cache, where only a part may be."""
    try:
        names = weight_files(folder)
    except (ValueError, KeyError, AttributeError):
        return False
    return bool(names) and all((folder / name).is_file() for name in names)


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
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise UserError(f"{flag} cannot be loaded: {first_line(error, name_file=True)}") from None


def file_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a base model, by name."""
    paths = {path.name: path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()}
    with suppress(ValueError, KeyError, AttributeError):  # a damaged index, whose own hash tells
        paths |= {name: folder / name for name in weight_files(folder) if (folder / name).is_file()}
    hashes = {}
    for name in sorted(paths):
        with paths[name].open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def check_unchanged(folder: Path, recorded: Mapping[str, str]) -> None:
    """Checks that the base model's files are those of the run. Files that the run did not have are ignored.

    Raises:
        UserError: a file is gone or has changed.
    """
    present = file_hashes(folder)
    for name, digest in recorded.items():
        if present.get(name) != digest:
            what = "has changed since the run" if name in present else "is gone"
            raise UserError(f"the run's base model {folder}: {name} {what}: restore it, or train again")
