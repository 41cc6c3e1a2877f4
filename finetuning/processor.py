"""Instructions of this machine's processor, and how to hide some of them."""

import os
import platform
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from finetuning.errors import UserError

VARIABLE = "FINETUNE_LORA_PROCESSOR"


@dataclass(frozen=True)
class _Level:
    """What a value of the variable hides, and the values with which torch's libraries hide it as well."""

    hidden: tuple[str, ...]  # instructions whose names begin like this
    onednn: str
    aten: str = "avx512"
    mkl: str = "AVX512"


_LEVELS = {
    "avx512_bf16": _Level(("amx_",), "AVX512_CORE_BF16"),
    "avx512_vnni": _Level(("amx_", "avx512_bf16"), "AVX512_CORE_VNNI"),
    "avx512": _Level(("amx_", "avx512_bf16", "avx512_vnni", "avx_vnni"), "AVX512_CORE"),
    "avx2_vnni": _Level(("amx_", "avx512"), "AVX2_VNNI", "avx2", "AVX2"),
    "avx2": _Level(("amx_", "avx512", "avx_vnni"), "AVX2", "avx2", "AVX2"),
}


def instructions() -> set[str]:
    """The processor's instruction sets, named as in Linux's /proc/cpuinfo; empty on other systems.

    The variable ``FINETUNE_LORA_PROCESSOR`` hides the newest ones, so that other ways can be tried on one machine.
    """
    try:
        found = set(Path("/proc/cpuinfo").read_text(encoding="utf8").split())
    except OSError:
        return set()
    return {name for name in found if not name.startswith(_hidden())}


def limited() -> bool:
    """Whether the variable hides instructions."""
    return bool(_hidden())


def _hidden() -> tuple[str, ...]:
    value = os.environ.get(VARIABLE)
    return _LEVELS[value].hidden if value in _LEVELS else ()


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
    level = _LEVELS[value]
    os.environ["ONEDNN_MAX_CPU_ISA"] = level.onednn
    os.environ["ATEN_CPU_CAPABILITY"] = level.aten
    os.environ["MKL_ENABLE_INSTRUCTIONS"] = level.mkl


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name and model numbers of the first processor: on virtual machines, processors of one name differ in speed."""
    with suppress(OSError, KeyError):
        first = cpuinfo.read_text(encoding="utf8").partition("\n\n")[0]
        facts = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in first.splitlines() if ":" in line)
        numbers = [
            f"{key.removeprefix('cpu ')} {facts[key]}" for key in ("cpu family", "model", "stepping") if key in facts
        ]
        return facts["model name"] + (f" ({', '.join(numbers)})" if numbers else "")
    return platform.processor()
