"""Linears of a frozen base in 8 bits: the forward product and the input's gradient are products of integers.

Weights are quantized once, symmetric by output row. Activations and gradients are quantized by row at each call. LoRA,
norms, attention and head stay as they are. Wortsman et al. 2023 (SwitchBack, https://arxiv.org/abs/2304.13013) train
CLIP with such products; they need a third product, the weight's gradient, in 16 bits. A frozen weight has none.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from finetuning.models import cpu_kernels
from finetuning.models.families import ModelFamily
from finetuning.models.int8_products import RANK_MULTIPLE, Thin, accumulate, dequantize, multiply, quantize
from finetuning.models.products import Activation, in_autocast, join, join_bias

ROWS_AT_ONCE = 1024  # rows of a product computed at once: their sums, 6 MB at MiniLM's size, stay in the cache


class Int8Linear(nn.Module):
    """A frozen linear with an 8-bit weight.

    Attributes:
        weight: ``(out, in)`` int8.
        scale: ``(out,)`` fp32; the dense weight is ``scale[:, None] * weight``.
        bias: ``(out,)`` fp32, or ``None``.
    """

    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        q, scale, _ = quantize(linear.weight.detach().float().contiguous())
        self.weight = nn.Parameter(q, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in) -> (..., out)`` in x's dtype or autocast's, for Hugging Face's own forward."""
        return int8_linears(in_autocast(x), [self], [None])

    def dense_weight(self) -> Tensor:
        """The weight that training sees, ``(out, in)`` fp32."""
        return self.weight * self.scale[:, None]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def use_int8(model: nn.Module, family: ModelFamily, packed: bool = True) -> None:
    """Quantizes every frozen linear of the encoder's layers to 8 bits. Head and embeddings do not change.

    Args:
        model: a classifier; linears with a trained weight or bias are left alone.
        family: names of its modules.
        packed: whether to replace the linears by ``Int8Linear``. If not, they keep their dtype and get the same values.
    """
    layers = model.get_submodule(family.layers)
    for name, linear in frozen_linears(model, family).items():
        quantized = Int8Linear(linear)
        if packed:
            layers.set_submodule(name, quantized)
        else:
            linear.weight.data = quantized.dense_weight()


def frozen_linears(model: nn.Module, family: ModelFamily) -> dict[str, nn.Linear]:
    """The linears of the encoder's layers that ``use_int8`` quantizes, by their names in these layers."""
    modules = model.get_submodule(family.layers).named_modules()
    linears = {name: module for name, module in modules if isinstance(module, nn.Linear)}
    return {name: m for name, m in linears.items() if not any(p.requires_grad for p in m.parameters())}


@dataclass(frozen=True)
class Int8Weight:
    """The weights of several linears with one input, as one: ``(out, in)``, ``(out,)``, ``(out,)``."""

    values: Tensor
    scale: Tensor
    bias: Tensor | None


def int8_linears(
    x: Tensor,
    modules: Sequence[Int8Linear],
    loras: Sequence[tuple[Tensor, Tensor] | None],
    activation: Activation | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    """Several 8-bit linears of one input, outputs concatenated: ``(..., in) -> (..., sum of out)`` in x's dtype.

    Args:
        x: the input, fp32 or bf16.
        loras: A ``(rank, in)`` and the scaled B ``(out, rank)`` of each, or ``None``.
        activation: applied to x first.
        factors: multiply the rows of weights and B, ``(sum of out,)`` fp32, constants.
    """
    fused = activation in (F.gelu, cpu_kernels.gelu)
    if activation is not None and not fused:
        x = activation(x)
    weight = lambda: _joined(modules, factors)  # noqa: E731  # joined again in backward: no copy lives until then
    ends = [*itertools.accumulate(module.out_features for module in modules)]
    A = B = ranks = None
    if any(lora is not None for lora in loras):
        parts = [_padded(lora, module) for lora, module in zip(loras, modules, strict=True)]
        A, B = torch.cat([a for a, _ in parts]), torch.block_diag(*(b for _, b in parts))
        ranks = tuple(len(a) for a, _ in parts)
        B = B if factors is None else B * factors[:, None]
    rows = x.reshape(-1, x.shape[-1]).contiguous()  # one token of each sequence is a view with gaps
    y: Tensor = _FrozenInt8.apply(rows, A, B, weight, tuple(ends), ranks, fused)
    return y.view(*x.shape[:-1], ends[-1])


def _joined(modules: Sequence[Int8Linear], factors: Tensor | None) -> Int8Weight:
    """One weight of several, its rows multiplied by the factors."""
    scale = join([module.scale for module in modules])
    weight = join([module.weight.data for module in modules])
    return Int8Weight(weight, scale if factors is None else scale * factors, join_bias(modules, torch.float32))


def _padded(lora: tuple[Tensor, Tensor] | None, module: Int8Linear) -> tuple[Tensor, Tensor]:
    """A and B with ranks of zeros up to the next multiple; rank 0 for a linear without LoRA."""
    if lora is None:
        return torch.empty(0, module.in_features), torch.empty(module.out_features, 0)
    A, B = lora
    missing = -len(A) % RANK_MULTIPLE
    return (F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))) if missing else (A, B)


class _FrozenInt8(torch.autograd.Function):
    """``y = h W^T + b + (h A^T) B^T`` with ``h = x`` or ``gelu(x)``. The gradients are those of ``products.py``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor | None,
        B: Tensor | None,
        weight: Callable[[], Int8Weight],
        ends: tuple[int, ...],
        ranks: tuple[int, ...] | None,
        activate: bool,
    ) -> Tensor:
        ctx.weight, ctx.activate = weight, activate
        W = weight()
        y = x.new_empty(len(x), len(W.values))
        sums = torch.empty(min(ROWS_AT_ONCE, len(x)), len(W.values), dtype=torch.int32)
        ctx.A = ctx.B = None
        if A is not None and B is not None and ranks is not None:
            ctx.A = Thin(A.to(x.dtype).contiguous(), (x.shape[1],), (sum(ranks),))
            ctx.B = Thin(B.t().to(x.dtype).contiguous(), ends, ranks)
        inners: list[Any] = []
        for start in range(0, len(x), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            q, scales, inner = quantize(x[rows], None, ctx.A, activate)
            dequantize(multiply(q, W.values.t(), sums), scales, y[rows], W.scale, W.bias, inner, ctx.B)
            inners.append(inner)
        ctx.save_for_backward(
            x if A is not None or activate else None,
            None if A is None else torch.cat(inners or [x.new_empty(0, len(A))]),
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_A, need_B, *_ = ctx.needs_input_grad
        x, inner = ctx.saved_tensors
        A, B, W, grad = ctx.A, ctx.B, ctx.weight(), grad.contiguous()
        width = W.values.shape[1]
        grad_x = grad.new_empty(len(grad), width) if need_x else None
        grad_A = torch.zeros(A.rows.shape) if need_A else None
        grad_B = torch.zeros(B.rows.shape) if need_B else None
        sums = torch.empty(min(ROWS_AT_ONCE, len(grad)), width, dtype=torch.int32) if need_x else None
        for start in range(0, len(grad), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            q, scales, grad_inner = quantize(grad[rows], W.scale, B)
            h = x[rows] if x is not None else None
            if grad_x is not None and sums is not None:
                gelu_input = h if ctx.activate else None
                h_again = dequantize(
                    multiply(q, W.values, sums), scales, grad_x[rows], None, None, grad_inner, A, gelu_input
                )
                h = h_again if ctx.activate else h
            elif ctx.activate and need_A:
                h = F.gelu(x[rows])
            if grad_A is not None and h is not None and grad_inner is not None:
                accumulate(grad_inner, h, grad_A, A)
            if grad_B is not None:
                accumulate(inner[rows], grad[rows], grad_B, B)
        return grad_x, grad_A, None if grad_B is None else grad_B.t(), None, None, None, None
