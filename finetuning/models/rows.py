"""How the efficient path lays out the tokens of a batch: as rows of a matrix."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from finetuning.models.first_token import TakeFirst

ROW_MULTIPLE = 64  # on a CPU, see Rows


@dataclass(frozen=True)
class Rows:
    """Tokens as rows of a matrix ``(N, D)``: one sequence after the other, padding included.

    On a CPU some rows are added, so that batches of different lengths share a few values of N. oneDNN makes new kernels
    for each new shape. They cost time (a quarter of a step) and memory, and soon fill its cache.
    """

    batch: int  # B, the number of sequences
    length: int  # T, the tokens of each, padding included
    on_cpu: bool  # whether rows are added

    def of(self, x: Tensor) -> Tensor:
        """``(B, T, D)`` or ``(B, D) -> (N, D)``, with rows of zeros at the end."""
        x = x.flatten(0, -2)
        missing = -len(x) % ROW_MULTIPLE if self.on_cpu else 0
        return F.pad(x, (0, 0, 0, missing)) if missing else x  # padding by 0 rows would copy

    def sequences(self, x: Tensor) -> Tensor:
        """``(N, D) -> (B, T, D)``, a view."""
        return self.real(x, self.batch * self.length).view(self.batch, self.length, -1)

    def real(self, x: Tensor, count: int) -> Tensor:
        """The first ``count`` rows, without those added by ``of``. On a GPU it adds none, so this is x."""
        return x[:count] if self.on_cpu else x

    def split_one(self, x: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor]:
        """``(N, D) -> (N', D), (N, D)``: one token of each sequence, at ``places`` ``(B,)`` or the first; and all."""
        tokens = self.sequences(x)
        if places is None and not self.on_cpu:
            one, tokens = TakeFirst.apply(tokens)
            return one, tokens.flatten(0, 1)
        return self.of(take(tokens, places)), x


def take(tokens: Tensor, places: Tensor | None) -> Tensor:
    """``(B, T, D) -> (B, D)``: one token of each sequence, at ``places`` ``(B,)`` or the first."""
    return tokens[:, 0] if places is None else tokens[torch.arange(len(tokens), device=tokens.device), places]


def last_places(mask: Tensor) -> Tensor:
    """The place of each sequence's last real token: ``(B, T) -> (B,)``."""
    return (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
