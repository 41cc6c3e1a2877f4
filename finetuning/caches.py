"""The caches in ``storage.cache_dir()``: their sizes, and how they are emptied. Nothing here imports torch.

Each entry is found by its content: tokens by texts and tokenizer, kernels by sources and compiler. Every file has a
checksum, and is made again if it does not hold. Outputs of frozen layers are here only while a run uses them, in files
without a name that the system removes with the process.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

from finetuning.storage import cache_dir, is_left_over

DOWNLOADS = "imdb_stanford"
FOLDERS = {"tokens": "tokens", "kernels": "kernels", DOWNLOADS: "downloads"}


def cache_table() -> str:
    """The caches' sizes, as a table to print."""
    root = cache_dir()
    rows = [f"caches in {root}", f"{'cache':<12}{'files':>8}{'bytes':>16}"]
    known = {name: _files(root / name) for name in FOLDERS}
    listed = [*((FOLDERS[name], files) for name, files in known.items()), ("left over", list(_left_over()))]
    for title, files in listed:
        rows.append(f"{title:<12}{len(files):>8,}{sum(_size(file) for file in files):>16,}")
    return "\n".join([*rows, "Hugging Face's own cache is not counted: `hf cache ls` shows it"])


def clear_caches() -> str:
    """Removes everything from the caches except files that are being written. Returns what it did, to print."""
    root = cache_dir()
    files = [file for name in FOLDERS for file in _files(root / name)]
    size = sum(_size(file) for file in files)
    for path in [*files, root / DOWNLOADS]:  # an empty folder of downloads would count as downloaded
        _remove(path)
    remove_left_over()
    return f"removed {len(files):,} files, {size:,} bytes, from {root}"


def remove_left_over() -> None:
    """Removes what killed processes left half-written."""
    for path in _left_over():
        _remove(path)


def _left_over() -> Iterator[Path]:
    for pattern in ("aclImdb-*", "tokens/.*.tmp*", "kernels/.*.tmp*", "tmp*"):
        yield from filter(is_left_over, cache_dir().glob(pattern))


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # another process has removed it
        return 0


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
