"""Files: where the cache is, and writing a file so that a reader finds the old one or the new one, never half of it."""

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """Where downloads, tokens and kernels are kept: ``$FINETUNE_LORA_CACHE``, or ``~/.cache/finetune_lora``."""
    return Path(os.environ.get("FINETUNE_LORA_CACHE") or Path.home() / ".cache" / "finetune_lora")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write`` with a temporary path next to ``path`` and renames it. On failure nothing is left behind.

    Several processes may write the same path at once: each has a temporary file of its own, and the last one wins.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp{path.suffix}")
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())  # some libraries hide their files from the user's group
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file, atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a binary file, atomically."""
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file, atomically; NaN and infinity are refused, because JSON has neither.

    Raises:
        ValueError: a number that is not finite.
    """
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds.

    Raises:
        OSError, ValueError: there is no such file, or it holds no JSON.
    """
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf8"))
    return content
