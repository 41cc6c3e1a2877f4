"""LoRA layers, written by hand: a frozen linear plus a trained product of two thin matrices.

        x (N, in) ──┬── W (out, in), frozen ─────────────────────────┬──> y (N, out)
                    └── A (rank, in) ── B (out, rank) ── * scale ──(+)

Hu et al. 2021, https://arxiv.org/abs/2106.09685. A and B have PEFT's names and layout. ``linears`` computes several
linears of one input in one product. ``products.py`` has the formula, its gradients, and what is saved for backward.

For an evaluation, ``merged.py`` adds the product to W once, so that nothing is computed next to W.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetuning.models.dora import Magnitude, row_norms
from finetuning.models.int8 import Int8Linear, int8_linears
from finetuning.models.pissa import principal_part
from finetuning.models.products import Activation, frozen_linear, in_autocast, join, join_bias
from finetuning.models.quantization import dense_weight, is_quantized

if TYPE_CHECKING:
    from finetuning.models.merged import MergedWeights

SCALES: dict[str, Callable[[float, int], float]] = {
    "standard": lambda alpha, rank: alpha / rank,  # Hu et al. 2021
    "rslora": lambda alpha, rank: alpha / math.sqrt(rank),  # Kalajdzievski 2023, https://arxiv.org/abs/2312.03732
    "raw": lambda alpha, rank: alpha,  # noqa: ARG005
}


class LoRALayer(nn.Module):
    """The trained part: ``x -> scale * B A dropout(x)``. Its output is zero at first, because B is zero.

    Args:
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

    def reset(self) -> None:
        """Back to the start, at which the layer changes nothing. DoRA's magnitude is ``LinearWithLoRA``'s to set."""
        self.lora_B.data.zero_()

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, scaling={self.scaling}"


class DoRALayer(LoRALayer):
    """LoRA's matrices and DoRA's magnitude, one number for each output; see ``dora.py``. Arguments as in ``LoRALayer``.

    ``LinearWithLoRA`` sets the magnitude to the norms of its rows, so that it changes nothing at first.
    """

    def __init__(self, in_features: int, out_features: int, *rest: Any, **settings: Any) -> None:
        super().__init__(in_features, out_features, *rest, **settings)
        self.lora_magnitude_vector = nn.Parameter(torch.ones(out_features, dtype=torch.float32))


class PiSSALayer(LoRALayer):
    """LoRA's matrices, which start as the principal part of a weight; see ``pissa.py``. Arguments as in ``LoRALayer``.

    Attributes:
        start_A, start_B: the matrices at the start, frozen. With them, the layer is LoRA on the whole weight.
    """

    def __init__(self, in_features: int, out_features: int, *rest: Any, **settings: Any) -> None:
        super().__init__(in_features, out_features, *rest, **settings)
        self.start_A = nn.Parameter(torch.zeros_like(self.lora_A), requires_grad=False)
        self.start_B = nn.Parameter(torch.zeros_like(self.lora_B), requires_grad=False)

    @torch.no_grad()
    def take_principal(self, weight: Tensor) -> Tensor:
        """Starts as the principal part of a weight ``(out, in)``, and returns the rest of it in its dtype."""
        self.start_A.data, self.start_B.data = principal_part(weight, self.rank, self.scale)
        self.reset()
        return (weight.float() - self.delta_weight()).to(weight.dtype)

    def reset(self) -> None:
        self.lora_A.data.copy_(self.start_A)
        self.lora_B.data.copy_(self.start_B)


VARIANTS: dict[str, type[LoRALayer]] = {"lora": LoRALayer, "dora": DoRALayer, "pissa": PiSSALayer}


class LinearWithLoRA(nn.Module):
    """A frozen linear and the LoRA layer next to it. With PiSSA, the linear loses the part that the layer starts with.

    Attributes:
        merged: the weights that an evaluation keeps, see ``merged.keep_merged``.

    Args:
        linear: an ``nn.Linear`` in any precision, or a linear whose weight is packed in 4 or 8 bits.
        lora: the trained part, of the same widths.
    """

    merged: "MergedWeights | None" = None

    def __init__(self, linear: nn.Module, lora: LoRALayer) -> None:
        super().__init__()
        self.linear = linear
        self.lora = lora
        self.in_features: int = lora.lora_A.shape[1]
        self.out_features: int = lora.lora_B.shape[0]
        if isinstance(lora, PiSSALayer):
            rest = lora.take_principal(dense_weight(linear))
            self.linear.weight = nn.Parameter(rest, requires_grad=False)  # other modules may share the old one
        self.start_magnitude()

    def start_magnitude(self) -> None:
        """Sets DoRA's magnitude, if there is one, to what changes nothing."""
        if isinstance(self.lora, DoRALayer):
            self.lora.lora_magnitude_vector.data = self.row_norms()

    def row_norms(self) -> Tensor:
        """The norm of each row of the linear's weight plus LoRA's, ``(out,)`` fp32, a constant."""
        return row_norms(dense_weight(self.linear), self.lora.lora_A, self.lora.scale * self.lora.lora_B)

    def factors(self) -> Tensor | None:
        """DoRA's factor of each row, ``(out,)`` fp32; 0 for a row of zeros, which pruning leaves. ``None`` for LoRA."""
        if not isinstance(self.lora, DoRALayer):
            return None
        norms = self.row_norms()
        return self.lora.lora_magnitude_vector / norms.masked_fill(norms == 0, torch.inf)

    def added(self, x: Tensor) -> Tensor:
        """``(..., in) -> (..., out)``: what is added to the linear's output, by the plain formula, in x's dtype."""
        factors = self.factors()
        if factors is None:
            added: Tensor = self.lora(x)
            return added
        x, dtype = self.lora.dropout(x), x.dtype
        rows = F.linear(x, dense_weight(self.linear).to(dtype))
        inner = F.linear(F.linear(x, self.lora.lora_A.to(dtype)), self.lora.lora_B.to(dtype))
        # small changes of the weight or the magnitude would be lost in the rounding of a merged weight
        return (factors - 1).to(dtype) * rows + (self.lora.scale * factors).to(dtype) * inner

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in) -> (..., out)``: the linear plus the LoRA layer, in x's dtype or autocast's."""
        y = linears(in_autocast(x), [self])
        # DoRA's output is a view, and Longformer changes it in place
        return y.clone() if isinstance(self.lora, DoRALayer) and y.requires_grad else y

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The single weight that replaces both, ``(out, in)``, fp32."""
        merged, factors = dense_weight(self.linear).float() + self.lora.delta_weight(), self.factors()
        return merged if factors is None else factors[:, None] * merged


# --- several linears of one input


def linears(
    x: Tensor, modules: Sequence[nn.Module], activation: Activation | None = None, on_cpu: bool | None = None
) -> Tensor:
    """Several linears of one input, outputs concatenated: ``(..., in) -> (..., sum of out)`` in x's dtype.

    One product with all weights, one with all A and one with all B (block-diagonal) are faster than one per linear.

    Args:
        x: the input, in the dtype of the products; weights are cast to it.
        modules: ``nn.Linear``, linears packed in 4 or 8 bits, or ``LinearWithLoRA`` of one of these.
        activation: applied to x first. Frozen linears compute it again in backward instead of saving its output. On a
            GPU they do so only for ``F.gelu``.
        on_cpu: whether to use the steps for a CPU. Default: where x is.
    """
    on_cpu = x.device.type == "cpu" if on_cpu is None else on_cpu
    if activation is not None and not on_cpu and activation is not F.gelu:
        x, activation = activation(x), None
    bases, adapted = [base_linear(m) for m in modules], [m for m in modules if isinstance(m, LinearWithLoRA)]
    kept = _kept(modules, x)
    if kept is not None:
        return frozen_linear(x, None, None, lambda: kept[0], kept[1], on_cpu, activation)
    base_is_trained = any(linear.weight.requires_grad for linear in bases)  # a trained bias alone is a frozen linear's
    if adapted and (base_is_trained or any(map(drops_input, adapted))):
        x = x if activation is None else activation(x)
        return linears(x, bases, None, on_cpu) + _lora_outputs(x, modules)
    dtype = x.dtype  # a local name, so that ``weight`` below does not keep x alive until backward
    s = _row_factors(modules) if adapted else None  # (out,)
    constant = None if s is None else s.detach()
    if isinstance(bases[0], Int8Linear):
        loras = [(m.lora.lora_A, _scaled_B(m)) if isinstance(m, LinearWithLoRA) else None for m in modules]
        y = int8_linears(x, bases, loras, activation, constant)
        return y if s is None else Magnitude.apply(y, s, join_bias(bases, dtype))
    bias = join_bias(bases, dtype)

    def weight() -> Tensor:
        W = join([dense_weight(linear) for linear in bases])  # (out, in)
        return (W if constant is None else W * constant[:, None]).to(dtype)

    if base_is_trained:
        return F.linear(x if activation is None else activation(x), weight(), bias)
    if not adapted:
        return frozen_linear(x, None, None, weight, bias, on_cpu, activation)
    blocks = [_scaled_B(m) for m in modules]
    A = join([m.lora.lora_A for m in adapted]).to(dtype)  # (R, in)
    B = blocks[0] if len(blocks) == 1 else torch.block_diag(*blocks)  # (out, R)
    B = (B if constant is None else B * constant[:, None]).to(dtype)
    if dtype == torch.float32 and not torch.is_grad_enabled():
        merged = torch.addmm(weight(), B, A)  # exact here; for bf16 see ``merged.round_evenly``
        return frozen_linear(x, None, None, lambda: merged, bias, on_cpu, activation)
    y = frozen_linear(x, A, B, weight, bias, on_cpu, activation)
    return y if s is None else Magnitude.apply(y, s, bias)


def transposed(x: Tensor, module: nn.Module, on_cpu: bool | None = None) -> Tensor:
    """Multiplies x by a linear's transposed weight, ``x (W + scale B A)``: ``(..., out) -> (..., in)`` in x's dtype.

    It is a linear with weight ``W^T``, whose A is ``scale B^T`` and whose B is ``A^T``. It ignores the bias and LoRA's
    dropout.

    Args:
        x: the input, in the dtype of the products.
        module, on_cpu: as in ``linears``.
    """
    on_cpu = x.device.type == "cpu" if on_cpu is None else on_cpu
    dtype, linear = x.dtype, base_linear(module)
    kept = _kept([module], x)
    if kept is not None:
        return x @ kept[0]

    def weight() -> Tensor:
        return dense_weight(linear).to(dtype).t()  # (in, out)

    A = B = None
    if isinstance(module, LinearWithLoRA):
        factors = module.factors()
        x = x if factors is None else x * factors.to(dtype)
        A, B = _scaled_B(module).t().to(dtype), module.lora.lora_A.t().to(dtype)
    if not linear.weight.requires_grad:
        return frozen_linear(x, A, B, weight, None, on_cpu)
    y = F.linear(x, weight())
    return y if A is None or B is None else y + x @ A.t() @ B.t()


def drops_input(module: nn.Module) -> bool:
    """Whether a linear's LoRA has another input than the linear itself, because of its dropout in training."""
    return isinstance(module, LinearWithLoRA) and module.training and module.lora.dropout.p > 0


def base_linear(module: nn.Module) -> Any:
    """The linear itself, without LoRA."""
    return module.linear if isinstance(module, LinearWithLoRA) else module


def _scaled_B(module: Any) -> Tensor:
    """``scale * B`` ``(out, rank)`` of a linear with LoRA. A linear without LoRA gets a block of rank 0."""
    if isinstance(module, LinearWithLoRA):
        return module.lora.scale * module.lora.lora_B
    return torch.empty(module.out_features, 0, device=module.weight.device)


def _row_factors(modules: Sequence[Any]) -> Tensor | None:
    """DoRA's factors of the rows of several linears, 1 for a linear without it; ``None`` if none has it."""
    factors = [m.factors() if isinstance(m, LinearWithLoRA) else None for m in modules]
    if all(f is None for f in factors):
        return None
    ones = partial(torch.ones, device=next(f for f in factors if f is not None).device)
    return join([ones(m.out_features) if f is None else f for f, m in zip(factors, modules, strict=True)])


def _lora_outputs(x: Tensor, modules: Sequence[Any]) -> Tensor:
    """LoRA's terms by the plain formula, concatenated; zeros for a linear without LoRA."""
    shape = x.shape[:-1]
    parts = [m.added(x) if isinstance(m, LinearWithLoRA) else x.new_zeros(*shape, m.out_features) for m in modules]
    return torch.cat(parts, -1)


def _kept(modules: Sequence[Any], x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """The kept weight and bias of several linears; ``None`` if none is kept, or if this pass must not use it."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # a kept weight would make torch compile again
        return None
    merged = next((m.merged for m in modules if isinstance(m, LinearWithLoRA)), None)
    known = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    if merged is None or not known or any(map(drops_input, modules)):
        return None
    return None if any(is_quantized(base_linear(m)) for m in modules) else merged.of(modules, x.dtype)


# --- LoRA in a model


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
        merged = plain_linear(module.merged_weight(), None if bias is None else bias.float())
        model.set_submodule(name, merged.train(module.training))


def plain_linear(weight: Tensor, bias: Any, trained: bool = False) -> nn.Linear:
    """An ``nn.Linear`` of this weight ``(out, in)`` and bias ``(out,)`` or ``None``. It does not copy them."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=trained)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=trained)
    return linear
