"""The output of frozen layers for each text, computed in the first epoch and used again in every later one.

Without dropout, the output of the layers below the first trained one never changes. In selective fine-tuning, and with
LoRA in the last layers, these layers are most of the model. Rows of padding are not kept, because nothing reads them.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from finetuning.storage import OUR_PREFIX


class FrozenOutputs:
    """One split's outputs: one row per token, or one row per window if the last layer is frozen too.

    Args:
        lengths: (examples,) rows of each example.
        width: width of a row.
        dtype: dtype of a row: the precision of the products, so that nothing is rounded.
        memory_bytes: larger outputs go into a file without a name, which disappears with the process.
        folder: the folder of that file.

    Raises:
        OSError: the disk has too little space for the file.
    """

    def __init__(self, lengths: np.ndarray, width: int, dtype: torch.dtype, memory_bytes: int, folder: Path) -> None:
        self.lengths, self.ends = lengths, np.cumsum(lengths)
        self.known = np.zeros(len(lengths), dtype=bool)
        shape = (int(self.ends[-1]), width)
        self.bytes = shape[0] * width * dtype.itemsize
        self.on_disk = self.bytes > memory_bytes
        if not self.on_disk:
            self.rows = torch.empty(shape, dtype=dtype)  # memory is used only as rows are written
            return
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < self.bytes:
            raise OSError(f"{folder} has {free:,} bytes left, {self.bytes:,} are needed")
        with tempfile.TemporaryFile(dir=folder, prefix=OUR_PREFIX) as file:  # its mapping outlives its closing
            file.truncate(self.bytes)
            if hasattr(os, "posix_fallocate"):  # without it, a disk that fills up later would kill the process
                os.posix_fallocate(file.fileno(), 0, self.bytes)
            mapped = np.memmap(file, dtype=np.uint8, mode="r+", shape=(self.bytes,))
        self.rows = torch.from_numpy(mapped).view(dtype).view(shape)


@dataclass(frozen=True)
class FrozenBatch:
    """The outputs of one batch: loaded if they are known, saved once they are computed."""

    outputs: FrozenOutputs
    examples: np.ndarray  # (B,)

    @property
    def known(self) -> bool:
        return bool(self.outputs.known[self.examples].all())

    def load(self, mask: Tensor) -> Tensor:
        """``(B, T) -> (B, T, D)``: the kept rows where the mask is True, zeros elsewhere.

        The mask has a row for each window, those of one example together. So do ``save``'s mask and x.
        """
        rows = self.outputs.rows
        x = torch.zeros(*mask.shape, rows.shape[1], dtype=rows.dtype, device=mask.device)
        x[mask] = rows[self._places()].to(mask.device)
        return x

    def save(self, x: Tensor, mask: Tensor) -> None:
        """Keeps the rows of x ``(B, T, D)`` where ``mask`` ``(B, T)`` is True."""
        self.outputs.rows[self._places()] = x.detach()[mask].cpu()
        self.outputs.known[self.examples] = True

    def _places(self) -> Tensor:
        """Positions of the examples' rows in ``outputs.rows``, one example after the other."""
        ends, lengths = self.outputs.ends[self.examples], self.outputs.lengths[self.examples]
        return torch.from_numpy(np.concatenate([np.arange(e - n, e) for e, n in zip(ends, lengths, strict=True)]))
