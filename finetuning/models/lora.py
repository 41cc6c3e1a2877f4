"""LoRA layers, written by hand: a frozen linear plus a trained product of two thin matrices.

        x (N, in) ──┬── W (out, in), frozen ─────────────────────────┬──> y (N, out)
                    └── A (rank, in) ── B (out, rank) ── * scale ──(+)

Hu et al. 2021, https://arxiv.org/abs/2106.09685. A and B have PEFT's names and layout. A 4-bit base is passed as a
callable that returns its dense weight. ``linears.py`` computes several linears at once and decides what to save for
backward.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetuning.models.autocast import in_autocast
from finetuning.models.linears import dense_weight, linears

SCALES: dict[str, Callable[[float, int], float]] = {
    "standard": lambda alpha, rank: alpha / rank,  # Hu et al. 2021
    "rslora": lambda alpha, rank: alpha / math.sqrt(rank),  # Kalajdzievski 2023, https://arxiv.org/abs/2312.03732
    "raw": lambda alpha, rank: alpha,  # noqa: ARG005
}


class LoRALayer(nn.Module):
    """The trained part: ``x -> scale * B A dropout(x)``. Its output is zero at first, because B is zero.

    Args:
        in_features: width of x.
        out_features: width of the output.
        rank: inner width, at least 1.
        alpha: numerator of the scale.
        scaling: ``standard`` alpha / rank, ``rslora`` alpha / sqrt(rank), ``raw`` alpha.
        dropout: probability of dropping an element of x in training.

    Raises:
        ValueError: a rank below 1 or a scaling that does not exist.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        scaling: str = "standard",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank {rank}: must be at least 1")
        if scaling not in SCALES:
            raise ValueError(f"scaling {scaling!r}: allowed are {', '.join(SCALES)}")
        self.rank, self.alpha, self.scaling = rank, alpha, scaling
        self.scale = SCALES[scaling](alpha, rank)
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as nn.Linear and PEFT do

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in) -> (..., out)`` in x's dtype; the plain formula, the reference for the fast one."""
        return self.scale * F.linear(F.linear(self.dropout(x), self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))

    def delta_weight(self) -> Tensor:
        """The matrix that the layer adds to a weight: ``scale * B A``, ``(out, in)``, fp32."""
        return self.scale * (self.lora_B @ self.lora_A)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, scaling={self.scaling}"


class LinearWithLoRA(nn.Module):
    """A frozen linear and the LoRA layer next to it.

    Args:
        linear: an ``nn.Linear`` in any precision, or a linear whose weight is packed in 4 bits.
        lora: the trained part, of the same widths.
        dense_weight: returns the weight ``(out, in)`` of a packed linear. It is called again in backward, so that no
            dense copy outlives the forward.
    """

    def __init__(self, linear: nn.Module, lora: LoRALayer, dense_weight: Callable[[], Tensor] | None = None) -> None:
        super().__init__()
        self.linear = linear
        self.lora = lora
        self.dense_weight = dense_weight
        self.in_features: int = lora.lora_A.shape[1]
        self.out_features: int = lora.lora_B.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in) -> (..., out)``: the linear plus the LoRA layer, in x's dtype or autocast's."""
        return linears(in_autocast(x), [self])

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The single weight that replaces both, ``(out, in)``, fp32."""
        return dense_weight(self).float() + self.lora.delta_weight()


def lora_modules(model: nn.Module) -> Iterator[tuple[str, LinearWithLoRA]]:
    """Every linear with LoRA in the model, with its full name."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, LinearWithLoRA))


def ranks_and_alphas(model: nn.Module) -> dict[str, tuple[int, float]]:
    """Rank and alpha of every linear with LoRA, by its full name."""
    return {name: (module.lora.rank, module.lora.alpha) for name, module in lora_modules(model)}


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Replaces every linear with LoRA by one plain fp32 ``nn.Linear`` that computes the same.

    With a 4-bit base, the delta is added to the dequantized weight, because training used that weight. Adding it to the
    original weight, or quantizing again, would change the logits.
    """
    for name, module in list(lora_modules(model)):
        bias = module.linear.bias
        merged = nn.Linear(module.in_features, module.out_features, bias=bias is not None, device="meta")
        merged.weight = nn.Parameter(module.merged_weight(), requires_grad=False)
        if isinstance(bias, Tensor):
            merged.bias = nn.Parameter(bias.float(), requires_grad=False)
        model.set_submodule(name, merged.train(module.training))
