"""Activations of feed-forward networks on the efficient path."""

from functools import partial

from torch.nn import functional as F
from transformers.activations import ACT2FN

from finetuning.models import cpu_kernels
from finetuning.models.products import Activation

COMPILED_GATES = {"gelu": cpu_kernels.geglu, "silu": cpu_kernels.swiglu}


def feed_forward_activation(name: str, gated: bool, on_cpu: bool) -> Activation:
    """An activation by its name in Hugging Face's configs.

    Args:
        name: for example ``gelu``.
        gated: whether it maps ``(N, 2 F)`` to ``(N, F)``: one half, activated, times the other (Shazeer 2020).
        on_cpu: whether to use the compiled one of a CPU, if there is one.
    """
    plain = F.gelu if name == "gelu" else ACT2FN[name]
    if gated:
        return COMPILED_GATES[name] if on_cpu and name in COMPILED_GATES else partial(cpu_kernels.gate, plain)
    return cpu_kernels.gelu if on_cpu and name == "gelu" else plain
