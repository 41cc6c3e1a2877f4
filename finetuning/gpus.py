"""The GPUs of this machine, as far as they can be seen without torch."""

import os
from itertools import takewhile
from pathlib import Path

DRIVERS = ("/dev/nvidiactl", "/dev/nvhost-ctrl-gpu", "/dev/dxg", "/dev/kfd")  # of NVIDIA, Jetson, WSL and ROCm
VISIBLE = "CUDA_VISIBLE_DEVICES"


def has_driver() -> bool:
    """Whether the system has a driver for GPUs. torch may still be unable to use them."""
    return any(Path(name).exists() for name in DRIVERS)


def visible_cards() -> list[str]:
    """The GPUs of NVIDIA that a program sees, as ``CUDA_VISIBLE_DEVICES`` names them."""
    named = os.environ.get(VISIBLE)
    if named is not None:
        names = (name.strip() for name in named.split(","))
        return list(takewhile(_is_card, names))  # as CUDA does; -1 hides all
    return [str(i) for i in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def _is_card(name: str) -> bool:
    return name.isdecimal() or name.startswith(("GPU-", "MIG-"))
