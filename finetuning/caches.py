"""The caches in ``storage.cache_dir()``: their sizes, and how they are emptied. Nothing here imports torch.

Tokens are found by texts, tokenizer and limits, kernels by sources and compiler. Every file has a checksum, and is made
again if it does not hold. The download of IMDb and the model that is unpacked from packages are a folder each, checked
in the same way. Outputs of frozen layers are here only while a run uses them, in files without a name that the system
removes with the process.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from finetuning.storage import OUR_PREFIX, cache_dir, is_left_over

DOWNLOADS = "imdb_stanford"
UNPACKED = "packaged_base"  # the model of --model_name packaged-base
WHOLE = (DOWNLOADS, UNPACKED)  # each is one entry: its folder
FOLDERS = {"tokens": "tokens", "kernels": "kernels", DOWNLOADS: "downloads", UNPACKED: "unpacked"}
# FINETUNE_LORA_CACHE may name a folder that others use, so these names decide what is ours.
ENTRY = r"[0-9a-f]{16,}\.(npz|so)"
HALF_WRITTEN = rf"\.{ENTRY}\.[0-9a-f]{{32}}\.tmp\.(npz|so)"


def cache_table() -> str:
    """The caches' sizes, as a table to print."""
    root = cache_dir()
    rows = [f"caches in {root}", f"{'cache':<12}{'files':>8}{'bytes':>16}"]
    listed = {title: _files(root / name) for name, title in FOLDERS.items()} | {"left over": list(_left_over())}
    for title, files in listed.items():
        rows.append(f"{title:<12}{len(files):>8,}{sum(_size(file) for file in files):>16,}")
    return "\n".join([*rows, "Hugging Face's own cache is not counted: `hf cache ls` shows it"])


def clear_caches() -> str:
    """Removes everything from the caches except files that are being written. Returns what it did, to print."""
    root = cache_dir()
    files = {file: _size(file) for name in FOLDERS for file in _files(root / name)}
    for path in [*files, *(root / name for name in WHOLE)]:
        _remove(path)
    remove_left_over()
    left = [file for file in files if file.exists()]
    size = sum(files[file] for file in files.keys() - left)
    kept = f"; you may not remove {len(left):,} files, for example {left[0]}" if left else ""
    return f"removed {len(files) - len(left):,} files, {size:,} bytes, from {root}{kept}"


def remove_left_over() -> None:
    """Removes what killed processes left half-written. What cannot be removed, for example another user's, stays."""
    for path in _left_over():
        _remove(path)


def _left_over() -> Iterator[Path]:
    root = cache_dir()
    with suppress(OSError):
        yield from filter(is_left_over, root.glob(f"{OUR_PREFIX}*"))
        for folder in ("tokens", "kernels"):
            yield from filter(is_left_over, _named(root / folder, HALF_WRITTEN))


def _files(folder: Path) -> list[Path]:
    if folder.name not in WHOLE:
        return list(_named(folder, ENTRY))
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]


def _named(folder: Path, pattern: str) -> Iterator[Path]:
    return (path for path in folder.glob("*") if re.fullmatch(pattern, path.name) and path.is_file())


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # another process has removed it
        return 0


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
