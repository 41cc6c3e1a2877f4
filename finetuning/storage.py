"""Files: the cache folder, and atomic writes. A reader finds the old file or the new one, never half of it.

Where the old one is kept under another name, there is none for a moment.
"""

import hashlib
import json
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from finetuning.errors import UserError

UNIQUE = "[0-9a-f]" * 32  # a part of a name that nobody else has, as a pattern
TEMPORARY = f".*.{UNIQUE}.tmp*"  # names of files that are being written, and of no others
OUR_PREFIX = "finetune_lora-"  # of temporary files and folders directly in the cache folder
LEFT_OVER_SECONDS = 3600.0  # a file that is still being written is younger


def cache_dir() -> Path:
    """The folder for downloads, tokens, kernels and a model: ``$FINETUNE_LORA_CACHE``, or ``~/.cache/finetune_lora``.

    Raises:
        UserError: the variable is not set and the user has no home folder.
    """
    try:
        given = os.environ.get("FINETUNE_LORA_CACHE")
        return Path(given or "~/.cache/finetune_lora").expanduser()  # no shell expands it in a file of variables
    except RuntimeError:
        raise UserError("you have no home folder for caches: set FINETUNE_LORA_CACHE to a folder") from None


def check_writable(path: Path, flag: str = "") -> None:
    """Checks that a directory can be made or written. Writes nothing.

    Args:
        flag: what gave it, with a space.

    Raises:
        UserError: a file is in the way, or the user may not write there.
    """
    existing = next(p for p in (path, *path.absolute().parents) if os.access(p, os.F_OK))
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise UserError(f"{flag}{path}: cannot be written: {existing} is not a directory that you may write to")


def write_atomically(path: Path, write: Callable[[Path], object], keep: Path | None = None) -> None:
    """Calls ``write`` with a temporary path next to ``path``, then renames it. A failure leaves no file behind.

    The content is on the disk before the file gets its name, so a power failure cannot leave an empty file either.
    Several processes may write the same path at once. Each uses its own temporary file, and the last one wins.

    Args:
        write: writes the content to the path that it is given.
        keep: the name that an old file at ``path`` gets; ``None`` replaces it.
    """
    with _written_next_to(path, write) as temporary:
        if keep is not None and path.exists():
            path.replace(keep)
        temporary.replace(path)


def write_new(path: Path, write: Callable[[Path], object]) -> None:
    """Like ``write_atomically``, but never replaces a file, even if another process makes it meanwhile.

    Raises:
        FileExistsError: ``path`` exists.
    """
    with _written_next_to(path, write) as temporary:
        try:
            path.hardlink_to(temporary)  # unlike a renaming, it fails if the name is taken
        except OSError:  # the name is taken, as the next line finds, or the file system has no hard links
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
            temporary.replace(path)


@contextmanager
def _written_next_to(path: Path, write: Callable[[Path], object]) -> Iterator[Path]:
    """The complete temporary file, to be given its name. Afterwards the name is on the disk."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp{path.suffix}")  # as TEMPORARY says
    try:
        write(temporary)
        readable_by_all(temporary)
        _synchronize(temporary)
        yield temporary
        _synchronize(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path, make: Callable[[Path], None], is_intact: Callable[[Path], bool]) -> None:
    """Makes a folder of the cache, unless another process is faster. A damaged one in its place is replaced.

    Args:
        make: fills the empty folder that it is given. The folder around that is its own as well, and temporary.
        is_intact: whether all files are there and as they were made.

    Raises:
        OSError: it cannot be made, and no other process has made it.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{OUR_PREFIX}{folder.name}-") as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            make(made)
            if not is_intact(folder):
                with suppress(FileNotFoundError):  # missing, or just replaced by another process
                    folder.replace(made.parent / "damaged")
            made.replace(folder)  # fails if there are files in it
    except OSError:
        if not is_intact(folder):
            raise


def remove(path: Path) -> None:
    """Removes a file, or an empty folder in its place. Nothing there is fine.

    Raises:
        OSError: it cannot be removed, or the folder is not empty.
    """
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def is_left_over(path: Path) -> bool:
    """Whether a killed process left this temporary file or folder: nothing in it has changed for an hour."""
    before = time.time() - LEFT_OVER_SECONDS
    files = (path, *(file for file in path.rglob("*") if file.is_file()))
    return max((file.stat().st_mtime for file in files if file.exists()), default=before) < before


def readable_by_all(path: Path) -> None:
    """Gives a file, or all files in a folder, the usual rights: some libraries make files for the owner only."""
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    for file in path.rglob("*") if path.is_dir() else (path,):
        if file.is_file():
            file.chmod(0o666 & ~mask)


def _synchronize(path: Path) -> None:
    """Waits until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append_sum(path: Path) -> None:
    """Appends the SHA-256 of a file's content. Its format must allow further bytes at the end."""
    digest = bytes.fromhex(sha256_of(path))
    with path.open("ab") as file:
        file.write(digest)


def sum_holds(path: Path) -> bool:
    """Whether a file ends with the SHA-256 of the rest, see ``append_sum``."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file, atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a binary file, atomically."""
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file, atomically. NaN and infinity, which JSON does not allow, are a ``ValueError``."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_new_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file that does not exist yet, see ``write_new``."""
    write_new(path, lambda temporary: write_json(temporary, content))


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or no object.
    """
    content = json.loads(path.read_text(encoding="utf8"))
    if not isinstance(content, dict):
        raise ValueError("it must hold a JSON object")
    return content
