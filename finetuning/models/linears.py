"""Computes linears of one input in one product, with hand-written backward passes for frozen weights.

A linear is an ``nn.Linear``, a linear packed in 4 bits, or one with LoRA (``LinearWithLoRA`` of ``lora.py``). This file
recognizes LoRA by its attributes ``linear`` and ``lora``.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from finetuning.models import cpu_kernels
from finetuning.models.int8 import Int8Linear, int8_linears

Activation = Callable[[Tensor], Tensor]  # differentiable, element by element
ROWS_AT_ONCE = 1024  # rows of an activation's output computed at once on a CPU: 3 MB at MiniLM's size


def _fused_linear() -> Callable[..., Tensor] | None:
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if supported and supported() else None


# The operator that torch.compile uses for a bf16 linear on a CPU, if this torch has it. ``addmm`` needs an extra pass
# for the bias.
FUSED_LINEAR = _fused_linear()


def linears(
    x: Tensor,
    modules: Sequence[nn.Module],
    unpack: Callable[[nn.Module], Tensor] | None = None,
    activation: Activation | None = None,
    on_cpu: bool | None = None,
) -> Tensor:
    """Several linears of one input, outputs concatenated: ``(..., in) -> (..., sum of out)`` in x's dtype.

    One product with all weights, one with all A and one with all B (block-diagonal) are faster than one per linear.

    Args:
        x: the input, in the dtype of the products; weights are cast to it.
        modules: ``nn.Linear``, ``LinearWithLoRA``, or linears packed in 4 bits.
        unpack: returns the dense weight of a packed linear that has no LoRA.
        activation: applied to x first. Frozen linears compute it again in backward instead of saving its output. On a
            GPU they do so only for ``F.gelu``.
        on_cpu: whether to use the steps for a CPU. Default: where x is.
    """
    on_cpu = x.device.type == "cpu" if on_cpu is None else on_cpu
    if activation is not None and not on_cpu and activation is not F.gelu:
        x, activation = activation(x), None
    adapted: list[Any] = [m for m in modules if _has_lora(m)]
    if isinstance(_base(modules[0]), Int8Linear):
        return _int8_linears(x, modules, activation)
    dtype = x.dtype  # a local name, so that ``weight`` below does not keep x alive until backward

    def weight() -> Tensor:
        return _join([dense_weight(m, unpack) for m in modules]).to(dtype)  # (out, in)

    bias = _join_bias([_base(m) for m in modules], dtype)
    base_is_trained = any(p.requires_grad for m in modules for p in _base(m).parameters())
    if base_is_trained or any(map(drops_input, adapted)):
        x = x if activation is None else activation(x)
        y = F.linear(x, weight(), bias) if base_is_trained else _frozen_linear(x, None, None, weight, bias, on_cpu)
        return y + torch.cat([_lora_output(x, m) for m in modules], -1) if adapted else y
    if not adapted:
        return _frozen_linear(x, None, None, weight, bias, on_cpu, activation)
    blocks = [_scaled_B(m) for m in modules]
    A = _join([m.lora.lora_A for m in adapted]).to(dtype)  # (R, in)
    B = (blocks[0] if len(blocks) == 1 else torch.block_diag(*blocks)).to(dtype)  # (out, R)
    if dtype == torch.float32 and not torch.is_grad_enabled():
        merged = torch.addmm(weight(), B, A)  # exact here; in bf16 the sum would round most of the adapter away
        return _frozen_linear(x, None, None, lambda: merged, bias, on_cpu, activation)
    return _frozen_linear(x, A, B, weight, bias, on_cpu, activation)


def _int8_linears(x: Tensor, modules: Sequence[Any], activation: Activation | None) -> Tensor:
    bases = [_base(m) for m in modules]
    if not any(map(drops_input, modules)):
        loras = [(m.lora.lora_A, _scaled_B(m)) if _has_lora(m) else None for m in modules]
        return int8_linears(x, bases, loras, activation)
    x = x if activation is None else activation(x)
    return int8_linears(x, bases, [None] * len(bases)) + torch.cat([_lora_output(x, m) for m in modules], -1)


def transposed(
    x: Tensor, module: Any, unpack: Callable[[nn.Module], Tensor] | None = None, on_cpu: bool | None = None
) -> Tensor:
    """Multiplies x by a linear's transposed weight, ``x (W + scale B A)``: ``(..., out) -> (..., in)`` in x's dtype.

    It is a linear with weight ``W^T``, whose A is ``scale B^T`` and whose B is ``A^T``. It ignores the bias and LoRA's
    dropout.

    Args:
        x: the input, in the dtype of the products.
        module: as in ``linears``.
        unpack, on_cpu: as in ``linears``.
    """
    on_cpu = x.device.type == "cpu" if on_cpu is None else on_cpu
    dtype = x.dtype

    def weight() -> Tensor:
        return dense_weight(module, unpack).to(dtype).t()  # (in, out)

    A = B = None
    if _has_lora(module):
        A, B = _scaled_B(module).t().to(dtype), module.lora.lora_A.t().to(dtype)
    if not any(p.requires_grad for p in _base(module).parameters()):
        return _frozen_linear(x, A, B, weight, None, on_cpu)
    y = F.linear(x, weight())
    return y if A is None or B is None else y + x @ A.t() @ B.t()


def drops_input(module: Any) -> bool:
    """Whether a linear's LoRA has another input than the linear itself, because of its dropout in training."""
    return _has_lora(module) and module.training and module.lora.dropout.p > 0


def _has_lora(module: nn.Module) -> bool:
    return hasattr(module, "lora")


def _base(module: Any) -> Any:
    return module.linear if _has_lora(module) else module


def dense_weight(module: Any, unpack: Callable[[nn.Module], Tensor] | None = None) -> Tensor:
    """A linear's weight ``(out, in)`` without LoRA's part. ``unpack`` returns it for a packed linear without LoRA."""
    if _has_lora(module) and module.dense_weight is not None:
        return module.dense_weight()
    linear = _base(module)
    if linear.weight.is_floating_point():
        return linear.weight
    if unpack is None:
        raise TypeError(f"{type(linear).__name__} is packed, and nothing was given that unpacks it")
    return unpack(linear)


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _join_bias(modules: Sequence[Any], dtype: torch.dtype) -> Tensor | None:
    if all(m.bias is None for m in modules):
        return None
    device = modules[0].weight.device
    missing = partial(torch.zeros, dtype=dtype, device=device)
    return _join([missing(m.out_features) if m.bias is None else m.bias for m in modules]).to(dtype)


def _scaled_B(module: Any) -> Tensor:
    """``scale * B`` ``(out, rank)`` of a linear with LoRA. A linear without LoRA gets a block of rank 0."""
    if _has_lora(module):
        return module.lora.scale * module.lora.lora_B
    return torch.empty(module.out_features, 0, device=module.weight.device)


def _lora_output(x: Tensor, module: Any) -> Tensor:
    if _has_lora(module):
        return module.lora(x)
    return x.new_zeros(*x.shape[:-1], module.out_features)


def _frozen_linear(
    x: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    weight: Callable[[], Tensor],
    bias: Tensor | None,
    on_cpu: bool,
    activation: Activation | None = None,
) -> Tensor:
    function = _FrozenLinear if on_cpu else _FrozenLinearOnGPU
    y: Tensor = function.apply(x.reshape(-1, x.shape[-1]), A, B, weight, bias, activation)
    return y.view(*x.shape[:-1], -1)


class _FrozenLinear(torch.autograd.Function):
    """``y = h W^T + b + (h A^T) B^T`` with ``h = activation(x)``. W and b are frozen, and B includes the scale.

    The low-rank product is added in place, so it needs no full-size temporary. Backward computes W and h again instead
    of saving them. Only some rows of an activation's output exist at once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor | None,
        B: Tensor | None,
        weight: Callable[[], Tensor],
        bias: Tensor | None,
        activation: Activation | None,
    ) -> Tensor:
        ctx.weight, ctx.activation = weight, activation
        W = weight()  # (out, in)
        parts = (x,) if activation is None else (activation(part) for part in x.split(ROWS_AT_ONCE))  # h
        if A is None or B is None:
            ctx.save_for_backward(x if activation is not None else None, None, None, None)
            return _join([_product(h, W, bias) for h in parts])  # (N, out)
        outputs, inners = [], []
        for h in parts:
            inners.append(h @ A.t())  # (N, R)
            outputs.append(_product(h, W, bias).addmm_(inners[-1], B.t()))
        ctx.save_for_backward(x, A, B, _join(inners))
        return _join(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_A, need_B, *_ = ctx.needs_input_grad
        x, A, B, inner = ctx.saved_tensors
        grad_x = grad @ ctx.weight() if need_x else None  # (N, in), of h until the end
        grad_A = grad_B = grad_inner = None
        if A is not None:
            grad_inner = grad @ B  # (N, R)
            if grad_x is not None:
                grad_x.addmm_(grad_inner, A)
            if need_A and ctx.activation is None:
                grad_A = grad_inner.t() @ x  # (R, in)
            # (out, R); on a CPU this order of the product takes half the time of ``grad.t() @ inner``
            grad_B = (inner.t() @ grad).t() if need_B else None
        if ctx.activation is not None and (need_x or need_A):
            grad_A = _activated_backward(ctx.activation, x, grad_x, grad_inner if need_A else None)
        return grad_x, grad_A, grad_B, None, None, None


class _FrozenLinearOnGPU(torch.autograd.Function):
    """The same in a few large operators that ``torch.compile`` can fuse; the activation is GELU or none."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor | None,
        B: Tensor | None,
        weight: Callable[[], Tensor],
        bias: Tensor | None,
        activation: Activation | None,
    ) -> Tensor:
        ctx.weight, ctx.gelu = weight, activation is not None
        h = F.gelu(x) if ctx.gelu else x
        W = weight()  # (out, in)
        y = h @ W.t() if bias is None else torch.addmm(bias, h, W.t())  # (N, out)
        inner = None
        if A is not None and B is not None:
            inner = h @ A.t()  # (N, R)
            y = y.addmm_(inner, B.t())
        ctx.save_for_backward(x if ctx.gelu or inner is not None else None, A, B, inner)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_A, need_B, *_ = ctx.needs_input_grad
        x, A, B, inner = ctx.saved_tensors
        grad_x = grad @ ctx.weight() if need_x else None  # (N, in), of h until the end
        grad_A = grad_B = None
        if A is not None:
            grad_inner = grad @ B  # (N, R)
            if grad_x is not None:
                grad_x = grad_x.addmm_(grad_inner, A)
            if need_A:
                grad_A = grad_inner.t() @ (F.gelu(x) if ctx.gelu else x)  # (R, in)
            grad_B = grad.t() @ inner if need_B else None  # (out, R)
        if ctx.gelu and grad_x is not None:
            grad_x = torch.ops.aten.gelu_backward(grad_x, x)
        return grad_x, grad_A, grad_B, None, None, None


def _product(h: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """``h W^T + bias``."""
    if bias is None:
        return h @ W.t()
    if FUSED_LINEAR is not None and h.device.type == "cpu" and h.dtype == torch.bfloat16 and W.is_contiguous():
        return FUSED_LINEAR(h, W, bias, "none", [], "")
    return torch.addmm(bias, h, W.t())


def _activated_backward(
    activation: Activation, x: Tensor, grad: Tensor | None, grad_inner: Tensor | None
) -> Tensor | None:
    """Turns ``grad`` ``(N, in)`` from the gradient of ``h = activation(x)`` into x's gradient, in place.

    Returns A's gradient, ``grad_inner^T h``.
    """
    sums = torch.promote_types(x.dtype, torch.float32)
    grad_A = None if grad_inner is None else x.new_zeros(grad_inner.shape[1], x.shape[1], dtype=sums)
    for start in range(0, len(x), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        h = _activated_again(activation, x[rows], None if grad is None else grad[rows])
        if grad_A is not None and grad_inner is not None:
            grad_A += grad_inner[rows].t() @ h
    return None if grad_A is None else grad_A.to(x.dtype)


def _activated_again(activation: Activation, x: Tensor, grad: Tensor | None) -> Tensor:
    """Returns ``h = activation(x)``, and turns ``grad`` from h's gradient into x's, in place."""
    if activation is cpu_kernels.gelu and grad is not None and cpu_kernels.available(x):
        return cpu_kernels.gelu_again(x.contiguous(), grad)
    part = x.detach().requires_grad_(grad is not None)
    with torch.enable_grad():
        h = activation(part)
    if grad is not None:
        grad.copy_(torch.autograd.grad(h, part, grad)[0])
    return h.detach()
