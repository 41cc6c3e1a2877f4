"""Section ``hardware``: device and precision."""

from dataclasses import dataclass
from typing import Literal

from finetuning.settings.fields import Values, require, setting


@dataclass(frozen=True, kw_only=True)
class HardwareSettings:
    """Device and precision."""

    precision: Literal["auto", "bf16", "fp16", "fp32", "int8", "fast"] = setting(
        "auto",
        "Precision of frozen weights and matrix products; trained weights are always fp32. int8: the frozen linears on"
        " a CPU with AVX512-VNNI or AVX2-VNNI. fast: int8 if it is possible and fast, else as auto.",
    )
    accelerator: Literal["auto", "cpu", "gpu"] = setting("auto", "CPU or GPU; auto uses a GPU if there is one.")
    device: int | None = setting(None, "Run on GPU number N, counted from 0.", "none", at_least=0)
    devices: int = setting(1, "Number of GPUs (or CPU processes) per node.", at_least=1)
    num_nodes: int = setting(1, "Number of nodes.", at_least=1)
    strategy: Literal["auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true"] = setting(
        "auto", "How the processes of a run work together: a strategy of Lightning."
    )
    efficient: bool = setting(
        True, "Use the suite's faster encoder code: the same result up to rounding. False uses Hugging Face's code."
    )
    gradient_checkpointing: bool = setting(
        False, "Save memory: recompute activations in the backward pass instead of keeping them."
    )
    compile: bool = setting(False, "Use torch.compile, on a GPU; the first steps take minutes.")
    frozen_cache_gb: float = setting(
        4.0,
        "On a CPU, reuse outputs of frozen layers in later epochs: X GiB in memory, the rest on disk; 0 turns it off.",
        at_least=0,
    )

    @property
    def processes(self) -> int:
        """How many processes share a run."""
        return self.devices * self.num_nodes

    @staticmethod
    def check(s: Values) -> None:
        excludes = excludes_int8(s.method, bool(s.q_lora), s.compile)
        allowed = s.precision != "int8" or excludes is None
        require(s, "precision", allowed, f"cannot be used, because {excludes}")
        require(s, "device", s.device is None or s.accelerator != "cpu", "needs a GPU: leave out --accelerator cpu")
        message = f"needs --devices 1, but --devices is {s.devices}"
        require(s, "device", s.device is None or s.devices == 1, message)


def excludes_int8(method: str, q_lora: bool, compile: bool) -> str | None:
    """The setting that excludes 8-bit products of frozen linears; ``None`` if none does."""
    if method == "full":
        return "--method full trains all weights"
    if method == "bitfit":
        return "--method bitfit trains the biases of linears, whose products then stay in floating point"
    if q_lora:
        return "--q_lora True holds the frozen weights in 4 bits"
    return "--compile True is for GPUs" if compile else None
