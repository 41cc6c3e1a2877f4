"""Weights of linears with LoRA, merged once for an evaluation, so that nothing is computed next to a frozen weight."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetuning.models.lora import LinearWithLoRA, base_linear, lora_modules
from finetuning.models.products import join, join_bias, without_autocast
from finetuning.models.quantization import dense_weight

KEPT_BYTES = 2**30  # of one model; linears beyond that are computed as in training


@dataclass(frozen=True)
class _Group:
    """What was made for linears of one input, and from what."""

    frozen: list[tuple[int, int]]  # of each frozen parameter: its address and its number of changes
    thin: list[Tensor]  # copies of all A and B
    weight: Tensor
    bias: Tensor | None


class MergedWeights:
    """Weights of linears with LoRA in the precision of the products: merged, and joined for linears of one input.

    Each is made at its first use, and made again if a parameter has changed since. A and B are compared by value: torch
    does not count the changes that a fused optimizer makes.
    """

    def __init__(self) -> None:
        self.free = KEPT_BYTES
        self.groups: dict[tuple[Any, ...], _Group] = {}

    @torch.no_grad()
    def of(self, modules: Sequence[Any], dtype: torch.dtype) -> tuple[Tensor, Tensor | None] | None:
        """Weight ``(sum of out, in)`` and bias; ``None`` if it would be too large to keep."""
        bases = [base_linear(module) for module in modules]
        frozen = [p for base in bases for p in base.parameters()]
        if any(p.requires_grad or p.is_inference() for p in frozen):  # the latter's changes are not counted
            return None
        state = [(p.data_ptr(), p._version) for p in frozen]
        thin = [p for m in modules if isinstance(m, LinearWithLoRA) for p in m.lora.parameters()]
        key = (dtype, *modules)
        group = self.groups.get(key)
        if group is None or group.frozen != state or not all(map(torch.equal, group.thin, thin)):
            if group is not None:
                self.free += self.groups.pop(key).weight.nbytes
            size = sum(base.weight.numel() for base in bases) * dtype.itemsize
            if size > self.free:
                return None
            self.free -= size
            with without_autocast(frozen[0].device):  # on Hugging Face's own path
                weight = join([round_evenly(_merged_weight(module), dtype) for module in modules])
            copies = [p.detach().clone() for p in thin]
            group = self.groups[key] = _Group(state, copies, weight, join_bias(bases, dtype))
        return group.weight, group.bias


def keep_merged(model: nn.Module) -> None:
    """From now on, passes without gradients on a CPU keep the merged weights that they need, until ``drop_merged``.

    Only fp32 and bf16 products do so, and only over weights that are not packed.
    """
    merged = MergedWeights()
    for _, module in lora_modules(model):
        module.merged = merged


def drop_merged(model: nn.Module) -> None:
    """Frees the weights that ``keep_merged`` keeps."""
    for _, module in lora_modules(model):
        module.merged = None


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """``keep_merged`` for an evaluation, and ``drop_merged`` at its end."""
    keep_merged(model)
    try:
        yield
    finally:
        drop_merged(model)


def round_evenly(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """An fp32 weight in ``dtype``; to bf16 it is rounded up or down, so that errors cancel over neighbouring elements.

    An adapter is often smaller than half a step of bf16. If the base is already in bf16, rounding each element to the
    nearest value would give the base again. Here an element is rounded up as often as it is far from the lower value:
    the random bits of stochastic rounding are the multiples of the golden ratio, which are as even and cost less.
    """
    if dtype != torch.bfloat16:
        return weight.to(dtype)
    golden = -1640531527  # 2^32 / golden ratio, as a signed number
    bits = torch.arange(weight.numel(), dtype=torch.int32).mul_(golden).bitwise_right_shift_(16).bitwise_and_(0xFFFF)
    bits += weight.contiguous().view(torch.int32).view(-1)
    return bits.bitwise_and_(-0x10000).view(torch.float32).view(weight.shape).to(dtype)


def _merged_weight(module: Any) -> Tensor:
    return module.merged_weight() if isinstance(module, LinearWithLoRA) else dense_weight(module).float()
