"""DoRA: the rows of a frozen weight plus LoRA are normalized, and each gets a trained magnitude m.

    y = s (W + scale B A) x + b    with s = m / ||W + scale B A||, by row

Liu et al. 2024, https://arxiv.org/abs/2402.09353. The norm is a constant in backward, as in section 4.3 of the paper.
So A, B and x have the gradients of plain LoRA with the weight ``s W`` and the matrix ``s scale B``.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from finetuning.models.cpu_kernels import magnitude_sums, takes_magnitude
from finetuning.models.products import without_autocast

ROWS_AT_ONCE = 256  # rows of products summed at once on a CPU, so that they stay in its cache


@torch.no_grad()
def row_norms(weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """``||W + B A||`` by row: ``(out, in), (rank, in), (out, rank) -> (out,)`` fp32. B includes the scale."""
    with without_autocast(weight.device):  # on Hugging Face's own path
        return torch.linalg.vector_norm(torch.addmm(weight.float(), B, A), dim=1)


class Magnitude(torch.autograd.Function):
    """Gives s its gradient: ``Magnitude.apply(y, s, bias)`` returns y, in which s is a factor already.

    y is ``(..., out)``, s ``(out,)``, bias ``(out,)`` or ``None``. The gradient of s is the sum of ``g (y - b) / s``
    over all rows, and 0 where s is 0. Saves y, which the next step often saves as well.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, s: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(y, s, bias)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, s, bias = ctx.saved_tensors
        ys, grads = y.flatten(0, -2), grad.flatten(0, -2)
        if takes_magnitude(y):
            return grad, _over(magnitude_sums(ys, grads, bias), s), None
        count = ROWS_AT_ONCE if y.device.type == "cpu" else max(len(ys), 1)
        sums = torch.zeros_like(s)
        for rows, own in zip(ys.split(count), grads.split(count), strict=True):
            sums += (rows * own if bias is None else torch.sub(rows, bias).mul_(own)).sum(0)
        return grad, _over(sums, s), None


def _over(sums: Tensor, s: Tensor) -> Tensor:
    return torch.where(s == 0, 0.0, sums / s)
