"""Rotary positions: queries and keys are turned by angles that grow with the token's place (Su et al. 2021)."""

from typing import Any

import torch
from torch import Tensor, nn


def cos_and_sin(rotary: nn.Module, length: int, device: torch.device, kind: str | None) -> Tensor:
    """Cos and sin of each place's angles, ``(2, T, d / 2)``, fp32.

    Args:
        rotary: Hugging Face's module, which knows the base and the scaling of the angles.
        length: T.
        device: where to make them.
        kind: the layer's type, by which some models choose the angles.
    """
    module: Any = rotary
    by_kind = (kind,) if kind is not None and hasattr(rotary, f"{kind}_inv_freq") else ()
    both = module(torch.empty(0, device=device), torch.arange(length, device=device)[None], *by_kind)  # (1, T, d) each
    return torch.cat(both).chunk(2, -1)[0].contiguous()  # the second half of each repeats the first


def turn(x: Tensor, positions: Tensor) -> Tensor:
    """Turns each pair of elements i and i + d / 2 by its angle: ``(..., T, H, d), (2, T, d / 2) -> (..., T, H, d)``."""
    cos, sin = positions.unsqueeze(-2)  # (T, 1, d / 2) each
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
