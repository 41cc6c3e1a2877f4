"""Averages of the trained weights. A run evaluates and saves them, while training goes on with the weights themselves.

* ``ema``: exponential moving average, whose weights fade over a tenth of all steps (Polyak and Juditsky 1992 show why
  averages are closer to the optimum than the last weights; faded ones are usual for neural networks).
* ``swa``: equal average over the last quarter of all steps (Izmailov et al. 2018, https://arxiv.org/abs/1803.05407).
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

FADES_OVER = 0.1  # of all steps
LAST_PART = 0.25


class Averaging:
    """The averages of some parameters.

    Args:
        kind: ``ema`` or ``swa``.
        parameters: by name; training changes them in place.
        total_steps: of the whole run.
    """

    def __init__(self, kind: Literal["ema", "swa"], parameters: Mapping[str, nn.Parameter], total_steps: int) -> None:
        self._names, self._live = list(parameters), list[Tensor](parameters.values())
        self._first = int((1 - LAST_PART) * total_steps) if kind == "swa" else 0
        decay = 1 - 1 / max(2.0, FADES_OVER * total_steps)
        self._fading = 1 - decay if kind == "ema" else None
        self._averages = [live.detach().clone() for live in self._live]
        self._averaged = 0  # counted here: torch's AveragedModel counts on the device, so each step would wait for it

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes the weights after a step, counted from 1."""
        if step <= self._first:
            return
        share = self._fading or 1 / (self._averaged + 1)
        torch._foreach_lerp_(self._averages, self._live, share if self._averaged else 1.0)
        self._averaged += 1

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges weights and averages, if there are any yet. A second call undoes it."""
        if self._averaged:
            for live, average in zip(self._live, self._averages, strict=True):
                kept = live.clone()
                live.copy_(average)
                average.copy_(kept)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: how many weights were averaged, and the averages by name, none before the first."""
        averages = zip(self._names, self._averages, strict=True) if self._averaged else ()
        weights = {name: average.detach().clone() for name, average in averages}
        return {"averaged": self._averaged, "weights": weights}

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """Continues from what ``state`` gave."""
        self._averaged = int(state["averaged"])
        weights: Mapping[str, Tensor] = state["weights"]
        for name, average in zip(self._names, self._averages, strict=True):
            if name in weights:
                average.copy_(weights[name])
