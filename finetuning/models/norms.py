"""Norms of the efficient path, with statistics in fp32 whatever the dtype of the rows."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetuning.models import cpu_kernels


@dataclass(frozen=True)
class Norms:
    """The form of a family's norms."""

    rms: bool  # root mean square norms (Zhang and Sennrich 2019): no mean is subtracted
    offset: float  # added to their weights
    dtype: torch.dtype  # of the products
    on_cpu: bool  # whether to use the steps for a CPU

    def of(self, x: Tensor, norm: nn.Module) -> Tensor:
        """``(..., D) -> (..., D)``; an ``nn.Identity`` is no norm."""
        if isinstance(norm, nn.Identity):
            return x
        if self.compiles(x, norm):
            return self.compiled(x.flatten(0, -2), None, norm).view(x.shape)
        weight, bias, eps = self.parts(norm)
        trained = norm.weight.requires_grad and x.dtype != torch.float32  # steps near 1 would be lost in rounding
        if not self.on_cpu and not trained:  # a GPU needs one dtype, and always computes the statistics in fp32
            return self.plain(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)
        # a CPU's layer norm mixes dtypes natively only with an fp32 weight, its other norm never
        if weight.dtype != torch.float32 or ((self.rms or not self.on_cpu) and x.dtype != torch.float32):
            bias = None if bias is None else bias.float()
            return self.plain(x.float(), weight.float(), bias, eps).to(self.dtype)
        return self.plain(x, weight, bias, eps)

    def of_sum(self, a: Tensor, b: Tensor, norm: nn.Module) -> Tensor:
        """The norm of ``a + b``, a residual sum."""
        return self.compiled(a, b, norm) if self.compiles(a, norm) else self.of(a + b, norm)

    def with_sum(self, a: Tensor, b: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """The norm of ``a + b``, and the sum itself, to which the next one adds; b may be left out."""
        if self.compiles(a, norm):
            return self.compiled(a, b, norm, keeps_sum=True)
        x = a if b is None else a + b
        return self.of(x, norm), x

    def compiles(self, x: Tensor, norm: nn.Module) -> bool:
        """Whether the compiled kernel takes rows like x and this norm."""
        if not self.on_cpu or isinstance(norm, nn.Identity):
            return False
        weight, bias, _ = self.parts(norm)
        return cpu_kernels.takes_norm(x, weight, bias)

    def compiled(self, a: Tensor, b: Tensor | None, norm: nn.Module, keeps_sum: bool = False) -> Any:
        """The norm of ``a + b`` by the kernel, ``(N, D)``; with ``keeps_sum`` also the sum."""
        return cpu_kernels.AddNorm.apply(a, b, *self.parts(norm), self.rms, keeps_sum)

    def parts(self, norm: Any) -> tuple[Tensor, Tensor | None, float]:
        weight = norm.weight + self.offset if self.offset else norm.weight
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        return weight, getattr(norm, "bias", None), eps

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        if self.rms:
            return F.rms_norm(x, x.shape[-1:], weight, eps)
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
