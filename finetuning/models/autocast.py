"""Autocast for linears with a forward of their own, as ``nn.Linear`` has it."""

import torch
from torch import Tensor


def in_autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype, if autocast is on."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
