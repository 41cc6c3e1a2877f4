"""Checkpoint files: the last two of a run and the best one, each with a checksum. Nothing here imports torch.

A checkpoint is a zip archive, as torch writes it. Its SHA-256 is the archive's comment. So torch can still read the
file, and file and checksum can never belong to two different checkpoints.
"""

import hashlib
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from finetuning.runs.files import BEST_CHECKPOINT, LAST_CHECKPOINT, PREVIOUS_CHECKPOINT
from finetuning.storage import TEMPORARY, remove, write_atomically

MARK = b"sha256:"
COMMENT_BYTES = len(MARK) + 64
NO_COMMENT, WITH_COMMENT = (0).to_bytes(2, "little"), COMMENT_BYTES.to_bytes(2, "little")  # a zip archive's last field
CHUNK = 1 << 20


def write_checkpoint(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a checkpoint, next to the old one, and renames it. The last checkpoint so far becomes the previous one.

    Args:
        path: the file.
        write: writes a zip archive without a comment, as ``torch.save`` does, to the file that it is given.
    """

    def with_checksum(temporary: Path) -> None:
        with temporary.open("w+b") as file:
            write(file)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest().encode()
            file.seek(-len(NO_COMMENT), os.SEEK_END)
            file.write(WITH_COMMENT + MARK + digest)

    keep = path.with_name(PREVIOUS_CHECKPOINT) if path.name == LAST_CHECKPOINT else None
    write_atomically(path, with_checksum, keep)


def is_intact(path: Path) -> bool:
    """Whether a checkpoint is as it was written."""
    try:
        with path.open("rb") as file:
            left = path.stat().st_size - len(WITH_COMMENT) - COMMENT_BYTES
            file.seek(max(left, 0))
            tail = file.read()
            digest = hashlib.sha256()
            file.seek(0)
            while left > 0 and (chunk := file.read(min(CHUNK, left))):
                digest.update(chunk)
                left -= len(chunk)
            digest.update(NO_COMMENT)
            return tail == WITH_COMMENT + MARK + digest.hexdigest().encode()
    except OSError:
        return False


def has_checkpoint(directory: Path) -> bool:
    """Whether the run has a checkpoint, intact or not."""
    return any((directory / name).is_file() for name in (LAST_CHECKPOINT, PREVIOUS_CHECKPOINT))


def usable_checkpoint(directory: Path) -> Path | None:
    """The newest intact checkpoint; ``None`` if the run must start over."""
    files = (directory / name for name in (LAST_CHECKPOINT, PREVIOUS_CHECKPOINT))
    return next((path for path in files if is_intact(path)), None)


def discard_damaged(directory: Path) -> None:
    """Removes damaged checkpoints, with a line of warning for each; else the next one would push out the good one.

    Raises:
        OSError: one cannot be removed, for example because it is a folder with files.
    """
    for name in (LAST_CHECKPOINT, PREVIOUS_CHECKPOINT):
        path = directory / name
        if path.exists() and not is_intact(path):
            remove(path)
            print(f"warning: {path} is damaged: the run continues without it", file=sys.stderr)


def forget_unneeded(directory: Path) -> None:
    """Removes what only a run that continues needs, and what a killed process left half-written.

    The last checkpoint stays. What cannot be removed does no harm.
    """
    for path in (directory / PREVIOUS_CHECKPOINT, directory / BEST_CHECKPOINT, *directory.glob(TEMPORARY)):
        with suppress(OSError):
            path.unlink()
