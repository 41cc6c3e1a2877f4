"""Attention of each sequence's first token, in torch operators for a GPU that ``torch.compile`` can fuse.

The backward of each slice of a tensor writes a gradient as large as the whole tensor. These two functions avoid it.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class TakeFirst(torch.autograd.Function):
    """``(B, T, D) -> (B, D), (B, T, D)``: each sequence's first token, and all of them.

    Backward adds the first token's gradient to the tokens' gradient in one pass. A slice would write zeros, the row and
    a sum.
    """

    @staticmethod
    def forward(_: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return tokens[:, 0], tokens.view_as(tokens)

    @staticmethod
    @once_differentiable
    def backward(_: Any, grad_first: Tensor, grad_tokens: Tensor) -> Tensor:
        return torch.select_scatter(grad_tokens, grad_tokens[:, 0] + grad_first, 1, 0)


class Mixture(torch.autograd.Function):
    """``softmax(U X^T scale + bias) X`` for each sequence's tokens X; arguments as in ``cpu_kernels.Mixture``.

    Saves its inputs and the probabilities. One product also sums the tokens' two gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, heads: Tensor, tokens: Tensor, scale: float, padding: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        scores = torch.bmm(heads, tokens.transpose(1, 2)) * scale  # (B, H, T)
        if bias is not None:
            scores = scores + bias.to(scores.dtype)
        if padding is not None:
            scores = scores.masked_fill(padding[:, None], -math.inf)
        P = scores.softmax(-1)
        ctx.save_for_backward(heads, tokens, P)
        ctx.scale = scale
        return torch.bmm(P, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        heads, tokens, P = ctx.saved_tensors
        grad_P = torch.bmm(grad, tokens.transpose(1, 2))  # (B, H, T)
        grad_S = torch._softmax_backward_data(grad_P, P, -1, P.dtype) * ctx.scale
        grad_tokens = None
        if ctx.needs_input_grad[1]:
            grad_tokens = torch.baddbmm(torch.bmm(P.transpose(1, 2), grad), grad_S.transpose(1, 2), heads)
        return torch.bmm(grad_S, tokens), grad_tokens, None, None, None
