"""The folder that an export writes: checked before the work, made next to its place, and moved there at the end."""

import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from finetuning.errors import UserError, first_line
from finetuning.storage import cannot_be_written_in, is_left_over, readable_by_all


def check_target(out: Path, run: Path) -> None:
    """Checks that the folder can be made. Writes nothing.

    Raises:
        UserError: it exists, lies in the run directory, or cannot be written.
    """
    if os.path.lexists(out):
        raise UserError(f"{out}: already exists: give a new folder")
    if out.resolve().is_relative_to(run.resolve()):
        raise UserError(f"{out}: lies in the run directory {run}: give a folder outside it")
    if (obstacle := cannot_be_written_in(out)) is not None:
        raise UserError(f"{out}: cannot be written: {obstacle} is not a directory that you may write to")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A new folder with the name of ``out``. It is moved to ``out`` if the block succeeds; else it is removed.

    Raises:
        UserError: the disk is full, or does not let itself be written.
    """
    existing = next(path for path in out.absolute().parents if path.is_dir())
    for left in filter(is_left_over, existing.glob(f".{glob.escape(out.name)}.*.tmp")):  # of a killed export
        shutil.rmtree(left, ignore_errors=True)
    workshop = existing / f".{out.name}.{uuid.uuid4().hex}.tmp"
    folder = workshop / out.name
    try:
        folder.mkdir(parents=True)
        yield folder
        readable_by_all(folder)
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: cannot be written: {first_line(error)}") from None
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
