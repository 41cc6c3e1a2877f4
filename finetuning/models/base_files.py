"""The files of a base model, by their hashes: a run records them, so that later uses know that they are the same."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from finetuning.errors import UserError

# What a classifier is made of: sizes, weights and tokenizer. Other files may change without changing a prediction.
PATTERNS = ("config.json", "*.safetensors", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.model")


def file_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a base model, by name."""
    paths = {path.name: path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()}
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
