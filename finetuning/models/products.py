"""Products of tensors with a frozen weight and LoRA's two matrices, with a backward pass written by hand.

LoRA's formula for rows h, with A ``(R, in)`` and B ``(out, R)``, which includes the scale:

    forward    inner      = h A^T            y      = h W^T + b + inner B^T
    backward   grad_inner = g B              grad_h = g W       + grad_inner A      (grad_b = sum of g's rows)
               grad_A     = grad_inner^T h   grad_B^T = inner^T g

Backward is forward with A and ``B^T`` exchanged. *Thin* is either of them, ``(R, D)``. So three products with it are
enough. For 8-bit products, ``int8_products.py`` has compiled kernels of these.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from finetuning.models import cpu_kernels

Activation = Callable[[Tensor], Tensor]  # differentiable, row by row; a gated one halves a row's width
ROWS_AT_ONCE = 2048  # rows of an activation's output computed at once on a CPU: 6 MB at MiniLM's size


def _fused_linear() -> Callable[..., Tensor] | None:
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if supported and supported() else None


# The operator that torch.compile uses for a bf16 linear on a CPU, if this torch has it. ``addmm`` needs an extra pass
# for the bias.
FUSED_LINEAR = _fused_linear()


def join(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def join_bias(linears: Sequence[Any], dtype: torch.dtype) -> Tensor | None:
    """The biases of several linears as one, ``(sum of out,)``, zeros where one has none; ``None`` if none has one."""
    if all(linear.bias is None for linear in linears):
        return None
    missing = partial(torch.zeros, dtype=dtype, device=linears[0].weight.device)
    return join([missing(linear.out_features) if linear.bias is None else linear.bias for linear in linears]).to(dtype)


def in_autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype, if autocast is on; for modules with a forward of their own, as ``nn.Linear`` does it."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast is off."""
    if device.type == "meta":  # meta has no autocast
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def frozen_linear(
    x: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    weight: Callable[[], Tensor],
    bias: Tensor | None,
    on_cpu: bool,
    activation: Activation | None = None,
) -> Tensor:
    """``h W^T + b + (h A^T) B^T`` with ``h = activation(x)`` and a frozen W: ``(..., in) -> (..., out)``.

    Args:
        x: the input, ``(..., 2 in)`` if the activation is gated; all tensors have its dtype.
        A: ``(R, in)``, or ``None`` without LoRA.
        B: ``(out, R)``, including the scale.
        weight: returns W ``(out, in)``. It is called again in backward, so that no copy of it lives until then.
        bias: ``(out,)``.
        on_cpu: whether to use the steps for a CPU.
        activation: its output is computed again in backward. On a GPU it is ``F.gelu`` or none.
    """
    y: Tensor = _FrozenLinear.apply(x.reshape(-1, x.shape[-1]), A, B, weight, bias, on_cpu, activation)
    return y.view(*x.shape[:-1], -1)


class _FrozenLinear(torch.autograd.Function):
    """``frozen_linear`` of rows. On a CPU only some rows of an activation's output exist at once.

    On a GPU the steps are a few large operators that ``torch.compile`` can fuse.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor | None,
        B: Tensor | None,
        weight: Callable[[], Tensor],
        bias: Tensor | None,
        on_cpu: bool,
        activation: Activation | None,
    ) -> Tensor:
        ctx.weight, ctx.on_cpu, ctx.activation = weight, on_cpu, activation
        W = weight()  # (out, in)
        outputs, inners = [], []
        for rows in x.split(ROWS_AT_ONCE) if on_cpu and activation is not None else (x,):
            h = rows if activation is None else activation(rows)
            y = _product(h, W, bias, on_cpu)
            if A is not None and B is not None:
                inners.append(h @ A.t())  # (N, R)
                y = y.addmm_(inners[-1], B.t())
            outputs.append(y)
        inner = join(inners) if inners else None
        ctx.save_for_backward(x if activation is not None or inners else None, A, B, inner)
        return join(outputs)  # (N, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_A, need_B, _, need_bias, *_ = ctx.needs_input_grad
        x, A, B, inner = ctx.saved_tensors
        grad_x = grad @ ctx.weight() if need_x else None  # (N, in), of h until the end
        grad_A = grad_B = grad_inner = None
        if A is not None:
            grad_inner = grad @ B  # (N, R)
            if grad_x is not None:
                grad_x.addmm_(grad_inner, A)
            if need_B:  # (out, R); on a CPU the first order takes half the time
                grad_B = (inner.t() @ grad).t() if ctx.on_cpu else grad.t() @ inner
        grad_inner = grad_inner if need_A else None
        if ctx.activation is None:
            grad_A = None if grad_inner is None else grad_inner.t() @ x  # (R, in)
        elif ctx.on_cpu:
            grad_x, grad_A = _activated_backward(ctx.activation, x, A, grad_x, grad_inner)
        else:
            grad_A = None if grad_inner is None else grad_inner.t() @ F.gelu(x)
            grad_x = None if grad_x is None else torch.ops.aten.gelu_backward(grad_x, x)
        return grad_x, grad_A, grad_B, None, grad.sum(0) if need_bias else None, None, None


def _product(h: Tensor, W: Tensor, bias: Tensor | None, on_cpu: bool) -> Tensor:
    if bias is None:
        return h @ W.t()
    bf16_on_cpu = on_cpu and h.dtype == torch.bfloat16 and W.is_contiguous()
    if FUSED_LINEAR is not None and bf16_on_cpu and not torch.compiler.is_compiling():  # that needs constant weights
        return FUSED_LINEAR(h, W, bias, "none", [], "")
    return torch.addmm(bias, h, W.t())


def _activated_backward(
    activation: Activation, x: Tensor, A: Tensor | None, grad: Tensor | None, grad_inner: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """x's gradient from ``grad`` of ``h = activation(x)``, and A's from ``grad_inner``, each if that is given.

    x's gradient is written over ``grad``, unless a gated activation makes it twice as wide.
    """
    if grad is None and grad_inner is None:
        return None, None
    grad_x = grad if grad is None or grad.shape == x.shape else torch.empty_like(x)
    sums = torch.promote_types(x.dtype, torch.float32)
    grad_A = None if A is None or grad_inner is None else torch.zeros_like(A, dtype=sums)
    for start in range(0, len(x), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        h = _activated_again(activation, x[rows], *(None if g is None else g[rows] for g in (grad, grad_x)))
        if grad_A is not None and grad_inner is not None:
            grad_A += grad_inner[rows].t() @ h
    return grad_x, None if grad_A is None else grad_A.to(x.dtype)


def _activated_again(activation: Activation, x: Tensor, grad: Tensor | None, grad_x: Tensor | None) -> Tensor:
    """Returns ``h = activation(x)``, and writes the gradient of x from that of h, which may be the same tensor."""
    if grad is not None and cpu_kernels.available(x):
        if activation is cpu_kernels.gelu:
            return cpu_kernels.gelu_again(x.contiguous(), grad)
        if activation in cpu_kernels.GATED_AGAIN:
            return cpu_kernels.GATED_AGAIN[activation](x.contiguous(), grad, grad_x)
    if grad is None or grad_x is None:
        return activation(x)
    h, gradient = torch.func.vjp(activation, x)  # type: ignore[misc]  # torch.compile traces it, not autograd.grad
    grad_x.copy_(gradient(grad)[0])
    return h
