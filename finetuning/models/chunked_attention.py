"""Attention in torch operators, for a CPU without the compiled kernels."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SCORES_IN_CACHE = 1_000_000  # attention scores computed at once: in bf16 1 MB for each of 2 cores


class ChunkedAttention(torch.autograd.Function):
    """``softmax(Q K^T / sqrt(d) + bias) V`` for every head on a CPU: ``(B, T, 3 D) -> (B, T, D)``.

    Forward is torch's fused kernel, whose backward is slow on a CPU. Here backward uses batched products over a few
    heads at a time, so that the scores stay in the processor's cache. It computes the probabilities again.

    The bias is frozen, in qkv's dtype: ``(B or 1, H or 1, T or 1, T)``, or ``None``.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, bias: Tensor | None) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, d) each, views
        out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)
        ctx.save_for_backward(qkv, bias)
        ctx.heads = heads
        return out.transpose(1, 2).flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, bias = ctx.saved_tensors
        (B, T, _), H = grad.shape, ctx.heads
        q, k, v = qkv.view(B, T, 3, H, -1).permute(2, 0, 3, 1, 4).flatten(1, 2)  # (B H, T, d) each, copied
        grad = grad.view(B, T, H, -1).transpose(1, 2).flatten(0, 1)  # (B H, T, d)
        if bias is not None:
            bias = bias.expand(B, H, *bias.shape[2:])  # (B, H, T or 1, T)
        gradients = torch.empty(3, *q.shape, dtype=q.dtype)
        scale, step = q.shape[-1] ** -0.5, min(B * H, max(1, SCORES_IN_CACHE // T**2))
        scores, grad_P = torch.empty(2, step, T, T, dtype=q.dtype)
        parts = [z.split(step) for z in (q, k, v, grad, *gradients)]
        for i, (q, k, v, grad, grad_q, grad_k, grad_v) in enumerate(zip(*parts, strict=True)):
            if len(q) < len(scores):  # the last part
                scores, grad_P = scores[: len(q)], grad_P[: len(q)]
            P = _scaled_bmm(q, k.transpose(1, 2), scale, out=scores)  # (c, T, T)
            if bias is not None:
                heads = torch.arange(i * step, i * step + len(q))
                P.add_(bias[heads // H, heads % H])
            torch.softmax(P, -1, out=P)
            torch.bmm(P.transpose(1, 2), grad, out=grad_v)
            torch.bmm(grad, v.transpose(1, 2), out=grad_P)
            grad_S = torch._softmax_backward_data(grad_P, P, -1, P.dtype)
            _scaled_bmm(grad_S, k, scale, out=grad_q)
            _scaled_bmm(grad_S.transpose(1, 2), q, scale, out=grad_k)
        return gradients.view(3, B, H, T, -1).permute(1, 3, 0, 2, 4).reshape(B, T, -1), None, None


def _scaled_bmm(a: Tensor, b: Tensor, scale: float, out: Tensor) -> Tensor:
    """``scale * a b``. The scale is applied before rounding, without an extra pass."""
    return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)
