"""Where a run takes place: device, precision, and memory settings of the process."""

import ctypes
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from finetuning.errors import UserError, say
from finetuning.gpus import VISIBLE, has_driver, visible_cards
from finetuning.models import int8_products
from finetuning.models.classifier import Classifier
from finetuning.models.compiled import library
from finetuning.processes import is_helper, srun_tasks
from finetuning.processor import instructions, limited
from finetuning.runs.records import NOT_ASKED_FOR
from finetuning.settings import HardwareSettings

BF16 = frozenset({"amx_bf16", "avx512_bf16"})
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FIRST_WITH_BF16 = (8, 0)  # compute capability: Ampere


@dataclass(frozen=True)
class Hardware:
    """Where a run takes place, and the precision of its products."""

    accelerator: Literal["cpu", "gpu"]
    devices: int | list[int]
    dtype: torch.dtype
    int8: bool = False  # the products of the frozen linears

    @property
    def on_gpu(self) -> bool:
        return self.accelerator == "gpu"

    @property
    def device(self) -> torch.device:
        """The first device."""
        if not self.on_gpu:
            return torch.device("cpu")
        return torch.device("cuda", self.devices[0] if isinstance(self.devices, list) else 0)

    @property
    def precision(self) -> str:
        """The precision of the products as torch names it, e.g. ``bfloat16``."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def described(self) -> str:
        """For people, e.g. ``bfloat16 on cpu``."""
        products = "int8 products of frozen linears, else " if self.int8 else ""
        return f"{products}{self.precision} on {self.accelerator}"


def resolve_hardware(settings: HardwareSettings, resumed: bool = False, half: bool = True) -> Hardware:
    """Asks the machine what ``auto`` means. ``fast`` counts as ``auto``, see ``fastest_precision``.

    Args:
        resumed: whether a run continues, whose precision cannot change.
        half: whether the model can compute in 16 bits.

    Raises:
        UserError: a GPU that is not there, or a precision that the hardware does not have.
    """
    gpus = seen_gpus()
    wanted = settings.accelerator == "gpu" or settings.device is not None
    if settings.device is not None and 0 < gpus <= settings.device:
        raise UserError(f"--device {settings.device}: this machine has {gpus} GPU(s), numbered from 0")
    if settings.accelerator != "cpu" and 0 < gpus < settings.devices:
        own = ": SLURM shows each task its own, use --gres=gpu:N and not --gpus-per-task" if srun_tasks() > 1 else ""
        raise UserError(f"--devices {settings.devices}: this machine has {gpus} GPU(s){own}")
    devices: int | list[int] = [settings.device] if settings.device is not None else settings.devices
    cards = devices if isinstance(devices, list) else list(range(devices))
    obstacle = None if settings.accelerator == "cpu" else gpu_obstacle(cards if gpus else [])
    if wanted and obstacle:
        flag = f"--device {settings.device}" if settings.device is not None else "--accelerator gpu"
        raise UserError(f"{flag}: {obstacle}; use --accelerator cpu")
    if obstacle and gpus and not is_helper():
        say(f"warning: {obstacle}; this run uses the CPU", sys.stderr)
    on_gpu = settings.accelerator != "cpu" and obstacle is None
    cards = cards if on_gpu else []
    int8 = settings.precision == "int8"
    if int8:
        _check_int8(on_gpu, resumed)
    asked = "auto" if settings.precision in ("int8", "fast") else settings.precision
    if not half and asked not in ("auto", "fp32"):
        raise UserError(f"--precision {asked}: Hugging Face's class of this model fails in 16 bits: use auto or fp32")
    dtype = _resolve_dtype(asked if half else "fp32", cards)
    return Hardware("gpu" if on_gpu else "cpu", devices, dtype, int8)


def gpu_obstacle(cards: Sequence[int]) -> str | None:
    """Why torch cannot compute on these GPUs; ``None`` if it can.

    Args:
        cards: their numbers; none if torch sees no GPU.
    """
    if cards:
        strange = [f"GPU {card}, {torch.cuda.get_device_name(card)}" for card in cards if not _is_built_for(card)]
        way = "install another one, see https://pytorch.org/get-started/locally (for GPUs older than T4: CUDA 12.6)"
        return f"this build of torch has no code for {strange[0]}: {way}" if strange else None
    if not has_driver():
        return "this machine has no CUDA GPU"
    if os.environ.get(VISIBLE) is not None and not visible_cards():
        return f"{VISIBLE} hides all GPUs"
    if torch.version.cuda is None and torch.version.hip is None:
        return "this build of torch is for CPUs"
    built = f"CUDA {torch.version.cuda}" if torch.version.hip is None else f"ROCm {torch.version.hip}"
    return f"torch sees no GPU: perhaps the driver is too old for {built}, for which it was built"


def seen_gpus() -> int:
    """How many GPUs torch sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _is_built_for(card: int) -> bool:
    """Whether this build of torch has code for a GPU. The builds for new versions of CUDA leave out old GPUs.

    Code for ``sm_75`` also runs on later GPUs of its major version, that for ``sm_90a`` on no other; ``compute_75`` is
    compiled for any later one.
    """
    own = torch.cuda.get_device_capability(card)
    built = [re.fullmatch(r"(sm|compute)_(\d+)(\d)(a?)f?", name) for name in torch.cuda.get_arch_list()]
    parts = [(found[1] == "compute", bool(found[4]), (int(found[2]), int(found[3]))) for found in built if found]

    def fits(compiled_later: bool, exact: bool, code: tuple[int, int]) -> bool:
        return code == own or (not exact and code < own and (compiled_later or code[0] == own[0]))

    return not parts or any(fits(*part) for part in parts)  # none for ROCm


def _check_int8(on_gpu: bool, resumed: bool) -> None:
    if on_gpu:
        instead = "continue it with" if resumed else "use bf16, or"
        raise UserError(f"--precision int8 needs a CPU: {instead} --accelerator cpu")
    reason = int8_products.refused()
    if reason is not None:
        instead = "the run began with it, so resume on a machine that has it" if resumed else "use --precision auto"
        raise UserError(f"--precision int8: {reason}; {instead}")


def without_int8(hardware: Hardware) -> str | None:
    """Why a run's device cannot multiply in 8 bits; ``None`` if it can, fast or not."""
    return "a GPU" if hardware.on_gpu else int8_products.refused()


def settled_precision(asked: str, hardware: Hardware, excluded: str | None, widths: Sequence[int]) -> str:
    """What ``--precision int8`` or ``fast`` means for a model on this machine, and says it of ``fast``.

    Args:
        asked: one of the two.
        hardware, excluded, widths: as in ``fastest_precision``.

    Raises:
        UserError: int8 is asked for, and nothing of the model can be held in 8 bits.
    """
    if asked == "int8":
        if (reason := int8_products.unsuited(widths)) is not None:
            raise UserError(f"--precision int8: {reason}; use --precision auto")
        return asked
    precision, why = fastest_precision(hardware, excluded, widths)
    if not is_helper():
        print(f"--precision fast: {precision} ({why})", flush=True)
    return precision


def fastest_precision(hardware: Hardware, excluded: str | None, widths: Sequence[int]) -> tuple[str, str]:
    """What ``--precision fast`` means here, and why: ``int8`` if that is possible and fast, else as ``auto``.

    Args:
        hardware: what ``auto`` means here.
        excluded: a setting of the run that excludes int8, or ``None``.
        widths: of the linears that int8 quantizes.

    Returns:
        A precision with a name, which means the same on every machine, and a text.
    """
    reason = excluded or without_int8(hardware) or int8_products.unsuited(widths)
    reason = reason or int8_products.slow(widths, hardware.dtype == torch.float32)
    if reason is None:
        return "int8", "exact and fast on this processor"
    return next(name for name, kind in DTYPES.items() if kind == hardware.dtype), reason


def _resolve_dtype(precision: str, cards: list[int]) -> torch.dtype:
    """bf16 where the hardware multiplies it fast, fp16 on GPUs that are older, else fp32.

    Args:
        precision: as the flag.
        cards: numbers of the run's GPUs, none on a CPU. All ranks look at all of them, so that all choose the same.
    """
    if precision == "fp16" and not cards:
        raise UserError("--precision fp16 needs a GPU: on a CPU use bf16 or fp32")
    without_bf16 = [card for card in cards if not multiplies_bf16(card)]
    if precision == "bf16" and without_bf16:
        card = without_bf16[0]
        name = torch.cuda.get_device_name(card)
        raise UserError(
            f"--precision bf16: GPU {card}, {name}, has no bf16; use --precision fp16, or --accelerator cpu"
        )
    if precision != "auto":
        return DTYPES[precision]
    if cards:
        return torch.float16 if without_bf16 else torch.bfloat16
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    fast = any(getattr(torch.cpu, name, lambda: False)() for name in names)
    if limited():
        fast = not BF16.isdisjoint(instructions())
    return torch.bfloat16 if fast else torch.float32


def multiplies_bf16(card: int) -> bool:
    """Whether a GPU has bf16, from its number in CUDA's list: torch's own test takes memory on the first GPU."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(card) >= FIRST_WITH_BF16


def kernels_used(classifier: Classifier, settings: HardwareSettings, hardware: Hardware) -> str:
    """Whether a run with this classifier uses the compiled CPU kernels, or why not."""
    if hardware.int8:
        return library(without_bf16=hardware.dtype == torch.float32)[1]
    reasons = {
        "--efficient False": not settings.efficient,
        f"{classifier.family.model_type} models run Hugging Face's code": not classifier.efficient,
        "--compile": settings.compile,
        "a GPU": hardware.on_gpu,
        f"they compute in bfloat16 and 8 bits, this run in {hardware.precision}": hardware.dtype != torch.bfloat16,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    return library()[1] if reason is None else f"{NOT_ASKED_FOR}: {reason}"


def prepare_process(hardware: Hardware) -> None:
    """Settings of the process for the run's hardware. Call it once, before the model is built."""
    keep_freed_memory()
    if not hardware.on_gpu:
        return
    # For each new shape cuDNN's attention makes a plan, which takes 0.5 s (FunASR#3704), and with a mask its gradient
    # can be NaN (pytorch#196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    if hardware.dtype == torch.float32:  # products in TF32, eight times as fast, with the accuracy of fp16
        torch.set_float32_matmul_precision("high")


def return_freed_memory() -> None:
    """Gives the memory that the process has kept back to the system: free memory is then free for the next fold."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


def keep_freed_memory() -> bool:
    """Lets a process keep the memory of freed tensors for the next ones, where the C library is glibc.

    Every step allocates and frees the same few hundred MB. By default glibc hands them back to the kernel, which
    zeroes each page again at the next step: a fifth of a step's time on a CPU. Call it once, at the start.

    Returns:
        Whether the library took the settings.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return bool(mallopt and mallopt(M_MMAP_THRESHOLD, 32 * 2**20) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
