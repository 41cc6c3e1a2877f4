"""Linears that LoRA cannot take as they are: fused ones are split into their parts, and Conv1D becomes a linear.

ModernBERT's ``Wqkv`` and GPT-2's ``c_attn`` compute query, key and value in one product. As parts, each of the three is
a linear that can have LoRA of its own. ``join_linears`` gives the model back its published form.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finetuning.models.families import ModelFamily
from finetuning.models.lora import linears, plain_linear
from finetuning.models.products import in_autocast


class SplitLinear(nn.Module):
    """A fused linear as its parts, one linear for each name. They are computed in one product, as before.

    Args:
        linear: the fused linear.
        names: the parts in the order of their rows. All have the same width.
    """

    def __init__(self, linear: nn.Linear, names: Sequence[str]) -> None:
        super().__init__()
        weights = linear.weight.chunk(len(names))
        biases = [None] * len(names) if linear.bias is None else linear.bias.chunk(len(names))
        for name, weight, bias in zip(names, weights, biases, strict=True):
            self.add_module(name, plain_linear(weight, bias, linear.weight.requires_grad))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in) -> (..., out)``: the outputs of the parts, concatenated."""
        return linears(in_autocast(x), list(self.children()))

    @torch.no_grad()
    def joined(self) -> nn.Linear:
        """The fused linear again, without LoRA on its parts."""
        parts: list[nn.Linear] = [part for part in self.children() if isinstance(part, nn.Linear)]
        if len(parts) < len(list(self.children())):
            raise TypeError("a part has LoRA: merge it first")
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        return plain_linear(torch.cat([part.weight for part in parts]), bias, parts[0].weight.requires_grad)


def split_linears(model: nn.Module, family: ModelFamily, parts: bool = True) -> None:
    """Replaces each Conv1D by a linear and, if ``parts``, each fused linear of the family by a ``SplitLinear``."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            model.set_submodule(name, plain_linear(module.weight.t(), module.bias, module.weight.requires_grad))
    for i in range(family.setting(model, "layer_count") if parts and family.fused else 0):
        for fused, names in family.fused.items():
            path = f"{family.layers}.{i}.{fused}"
            linear = model.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            model.set_submodule(path, SplitLinear(linear, names))


def split_widths(model: nn.Module) -> dict[str, dict[str, int]]:
    """For each linear that was split: the width of each of its parts, in their order."""
    return {
        name: {part: module.out_features for part, module in split.named_children()}  # type: ignore[misc]
        for name, split in model.named_modules()
        if isinstance(split, SplitLinear)
    }


@torch.no_grad()
def join_linears(model: nn.Module, family: ModelFamily) -> None:
    """Undoes ``split_linears`` in a model without LoRA, whose weights then have Hugging Face's names and shapes."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SplitLinear):
            model.set_submodule(name, module.joined())
    if not family.conv1d:
        return
    for name, module in list(model.get_submodule(family.layers).named_modules()):
        if isinstance(module, nn.Linear):
            conv = Conv1D(module.out_features, module.in_features)
            conv.weight = nn.Parameter(module.weight.t().contiguous(), requires_grad=module.weight.requires_grad)
            conv.bias = nn.Parameter(module.bias.detach(), requires_grad=module.bias.requires_grad)
            model.get_submodule(family.layers).set_submodule(name, conv)
