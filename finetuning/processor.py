"""Instructions of this machine's processor, and how to hide some of them."""

import os
from pathlib import Path

from finetuning.errors import UserError

VARIABLE = "FINETUNE_LORA_PROCESSOR"

_AMX = frozenset({"amx_tile", "amx_bf16", "amx_int8"})
_BF16 = frozenset({"avx512_bf16"})
_VNNI = frozenset({"avx512_vnni", "avx_vnni"})
# What each value of the variable hides, and the values with which oneDNN, ATen and MKL hide it, too.
_LEVELS: dict[str, tuple[frozenset[str], str]] = {
    "avx512_bf16": (_AMX, "AVX512_CORE_BF16"),
    "avx512_vnni": (_AMX | _BF16, "AVX512_CORE_VNNI"),
    "avx512": (_AMX | _BF16 | _VNNI, "AVX512_CORE"),
}


def instructions() -> set[str]:
    """The processor's instruction sets, named as in Linux's /proc/cpuinfo; empty on other systems.

    The variable ``FINETUNE_LORA_PROCESSOR`` hides the newest ones, so that other ways can be tried on one machine.
    """
    try:
        found = set(Path("/proc/cpuinfo").read_text(encoding="utf8").split())
    except OSError:
        return set()
    return found - _hidden()


def limited() -> bool:
    """Whether the variable hides instructions."""
    return bool(_hidden())


def _hidden() -> frozenset[str]:
    value = os.environ.get(VARIABLE)
    return _LEVELS[value][0] if value in _LEVELS else frozenset()


def limit_libraries() -> None:
    """Hides from torch's libraries what the variable hides; to be called before torch is imported.

    Raises:
        UserError: the variable has a value that is not allowed.
    """
    value = os.environ.get(VARIABLE)
    if not value:
        return
    if value not in _LEVELS:
        raise UserError(f"{VARIABLE}={value}: must be one of {', '.join(_LEVELS)}")
    os.environ["ONEDNN_MAX_CPU_ISA"] = _LEVELS[value][1]
    os.environ["ATEN_CPU_CAPABILITY"] = "avx512"
    os.environ["MKL_ENABLE_INSTRUCTIONS"] = "AVX512"
