"""Compiled steps on bf16, for CPUs with AMX or AVX512-BF16: attention, activations, norms, sums for DoRA."""

import ctypes
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from finetuning.models.compiled import call, library

WIDTHS = (32, 64, 128)  # of an attention head
LONGEST = 4096
LOG2_E = math.log2(math.e)  # the kernels compute powers of 2
BIAS_OVER_WEIGHT = 32.0  # largest allowed ratio in a norm; the output's bf16 rounding error grows with it in backward


def available(x: Tensor) -> bool:
    """Whether the kernels accept x. Not while torch.compile traces: it can fuse torch's operators but not these."""
    suits = x.dtype == torch.bfloat16 and x.device.type == "cpu"
    return suits and not torch.compiler.is_compiling() and library()[0] is not None


# --- attention


def takes_attention(x: Tensor, width: int, length: int) -> bool:
    """Whether ``Attention`` accepts queries like x, heads of this width, and sequences of this length."""
    return width in WIDTHS and length <= LONGEST and available(x)


class Attention(torch.autograd.Function):
    """``softmax(Q K^T / sqrt(d) + bias) V`` for every head, bf16; see kernels/attention.cpp.

    Called as ``Attention.apply(qkv, heads, batch, T, padding, bias, cos_sin)``:

    - qkv: ``(N, 3 D)``, query, key and value.
    - padding: ``(batch, T)`` bool, True where a key is padding, or ``None``.
    - bias: ``(heads, 2 T - 1)`` fp32, frozen: a term of each score by the distance from its query to its key, which is
      from 1 - T to T - 1; or ``None``. -1e30 hides the key. A query that sees no key gets a finite output.
    - cos_sin: ``(2, T, d / 2)`` fp32: cosines and sines of the angles by which each position turns its query and key,
      each element i with i + d / 2, as Hugging Face's ``rotate_half`` does. Default: ``None``.

    Rows are the tokens of one sequence after the other. Rows after the last sequence are not read, and are 0 in the
    output, ``(N, D)``. Saves its input, its output and one number per query. Backward computes the probabilities again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        heads: int,
        batch: int,
        length: int,
        padding: Tensor | None,
        bias: Tensor | None,
        cos_sin: Tensor | None = None,
    ) -> Tensor:
        qkv, padding = qkv.contiguous(), None if padding is None else padding.contiguous()
        if bias is not None:  # as the kernel reads it: by the distance from key to query, from 1 - P to P
            padded = -(-length // 32) * 32
            bias = F.pad(LOG2_E * bias.flip(1), (padded - length, padded - length + 1)).contiguous()  # (heads, 2 P)
        width = qkv.shape[1] // 3
        out = qkv.new_empty(len(qkv), width)
        out[batch * length :] = 0
        log_sum = torch.empty(batch, heads, length, dtype=torch.float32)
        ctx.sizes = (batch, length, heads, width // heads, 3 * width)
        cos_sin = None if cos_sin is None else cos_sin.contiguous()
        inputs = (*qkv.chunk(3, -1), padding, bias, cos_sin)
        call("attention_forward", *inputs, *ctx.sizes, torch.get_num_threads(), out, log_sum)
        ctx.save_for_backward(qkv, padding, bias, cos_sin, out, log_sum)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, *terms, out, log_sum = ctx.saved_tensors
        batch, length, *_ = ctx.sizes
        grad_qkv = torch.empty_like(qkv)
        grad_qkv[batch * length :] = 0
        inputs = (*qkv.chunk(3, -1), *terms, *ctx.sizes, torch.get_num_threads(), out, log_sum)
        call("attention_backward", *inputs, grad.contiguous(), *grad_qkv.chunk(3, -1))
        return grad_qkv, None, None, None, None, None, None


def takes_mixture(tokens: Tensor) -> bool:
    """Whether ``Mixture`` accepts tokens like these."""
    return tokens.shape[-1] % 32 == 0 and available(tokens)


class Mixture(torch.autograd.Function):
    """``softmax(U X^T scale + bias) X`` for each sequence's tokens X, bf16: means of them; see kernels/mixture.cpp.

    Called as ``Mixture.apply(heads, tokens, scale, padding, bias)``:

    - heads: ``(B, H, D)``, U of each sequence.
    - tokens: ``(B, T, D)``.
    - padding: ``(B, T)`` bool, or ``None``.
    - bias: ``(H, T)`` fp32, frozen; or ``None``.

    Returns ``(B, H, D)``. Saves its inputs, its output and one number per head. Backward computes the weights again.
    """

    @staticmethod
    def forward(
        ctx: Any, heads: Tensor, tokens: Tensor, scale: float, padding: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        heads, tokens = heads.contiguous(), tokens.contiguous()
        padding = None if padding is None else padding.contiguous()
        bias = None if bias is None else F.pad(LOG2_E * bias, (0, -tokens.shape[1] % 16)).contiguous()
        batch, count, width = heads.shape
        mixed, log_sum = torch.empty_like(heads), torch.empty(batch, count, dtype=torch.float32)
        ctx.sizes = (batch, count, tokens.shape[1], width, ctypes.c_float(scale))
        call("mixture_forward", heads, tokens, padding, bias, *ctx.sizes, torch.get_num_threads(), mixed, log_sum)
        ctx.save_for_backward(heads, tokens, padding, bias, mixed, log_sum)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        heads, tokens, padding, bias, mixed, log_sum = ctx.saved_tensors
        grad_heads = torch.empty_like(heads)
        grad_tokens = torch.empty_like(tokens) if ctx.needs_input_grad[1] else None
        inputs = (heads, tokens, padding, bias, *ctx.sizes, torch.get_num_threads(), mixed, log_sum)
        call("mixture_backward", *inputs, grad.contiguous(), grad_heads, grad_tokens)
        return grad_heads, grad_tokens, None, None, None


# --- activation


def gelu(x: Tensor) -> Tensor:
    """``x Phi(x)``, element by element. Uses the compiled kernel if it is available and accepts x, else torch."""
    if not available(x):
        return F.gelu(x)
    y: Tensor = _Gelu.apply(x)
    return y


class _Gelu(torch.autograd.Function):
    """See kernels/activation.cpp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        y = torch.empty_like(x)
        call("gelu_forward", x, ctypes.c_long(x.numel()), torch.get_num_threads(), y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        call("gelu_backward", x, grad.contiguous(), ctypes.c_long(x.numel()), torch.get_num_threads(), grad_x)
        return grad_x


def gelu_again(x: Tensor, grad: Tensor) -> Tensor:
    """Returns ``gelu(x)``, and multiplies ``grad`` by ``gelu'(x)`` in place. Both contiguous, and accepted."""
    h = torch.empty_like(x)
    call("gelu_again", x, ctypes.c_long(x.numel()), torch.get_num_threads(), grad, h)
    return h


def geglu(x: Tensor) -> Tensor:
    """``gelu(a) b``, with a the first half of each row of x and b the second: ``(..., 2 F) -> (..., F)``."""
    return _gated(x, "geglu", F.gelu)


def swiglu(x: Tensor) -> Tensor:
    """``silu(a) b``, with a the first half of each row of x and b the second: ``(..., 2 F) -> (..., F)``."""
    return _gated(x, "swiglu", F.silu)


def _gated(x: Tensor, name: str, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Uses the compiled kernel if it is available and accepts x, else torch."""
    if available(x):
        h: Tensor = _Gated.apply(x, name)
        return h
    return gate(activation, x)


def gate(activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """One half of x, activated, times the other, in torch's operators: ``(..., 2 F) -> (..., F)``."""
    a, b = x.chunk(2, -1)
    return activation(a) * b


class _Gated(torch.autograd.Function):
    """See kernels/activation.cpp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.name, width = name, x.shape[-1] // 2
        h = x.new_empty(*x.shape[:-1], width)
        call(f"{name}_forward", x, *_rows(h), torch.get_num_threads(), h)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        _gated_again(ctx.name, x, grad.contiguous(), grad_x)
        return grad_x, None


def _gated_again(name: str, x: Tensor, grad: Tensor, grad_x: Tensor) -> Tensor:
    h = torch.empty_like(grad)
    call(f"{name}_again", x, grad, *_rows(h), torch.get_num_threads(), grad_x, h)
    return h


def _rows(x: Tensor) -> tuple[ctypes.c_long, ctypes.c_long]:
    return ctypes.c_long(x.numel() // max(x.shape[-1], 1)), ctypes.c_long(x.shape[-1])


# Each takes (x, grad, grad_x): returns h of x, and writes x's gradient from that of h. All contiguous, and accepted.
GATED_AGAIN = {geglu: partial(_gated_again, "geglu"), swiglu: partial(_gated_again, "swiglu")}


# --- norm


def takes_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether ``AddNorm`` accepts rows like x. Not if a weight of 0 or a large bias hides the normalized rows in y."""
    if weight.dtype != torch.float32 or x.shape[-1] % 16 or not available(x):
        return False
    with torch.no_grad():
        if bias is None:
            return float(weight.abs().min()) > 0
        return float((bias / weight).abs().max()) < BIAS_OVER_WEIGHT


class AddNorm(torch.autograd.Function):
    """Layer norm or RMSNorm of ``a + b``, bf16 rows with an fp32 weight and bias; see kernels/norm.cpp.

    Called as ``AddNorm.apply(a, b, weight, bias, eps, rms, keeps_sum)``:

    - a, b: ``(N, D)``; b may be ``None``, for the norm of a alone.
    - weight, bias: ``(D,)``; bias may be ``None``.
    - rms: whether to leave the mean in, ``x / sqrt(mean(x^2) + eps)``. Default: False.
    - keeps_sum: whether to return ``(y, a + b)`` instead of y, for a pre-norm layer. The sum is rounded to bf16; the
      norm is of the sum before that, as without keeps_sum. Default: False.

    Saves its output y and one number per row, but not its inputs a and b, like Apex's memory-efficient layer norm.
    """

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        rms: bool = False,
        keeps_sum: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        a, b = a.contiguous(), None if b is None else b.contiguous()
        y, inverse_deviation = torch.empty_like(a), torch.empty(len(a), dtype=torch.float32)
        total = torch.empty_like(a) if keeps_sum and b is not None else None
        sizes = (ctypes.c_long(len(a)), a.shape[1], torch.get_num_threads())
        call("add_norm_forward", a, b, weight, bias, ctypes.c_float(eps), rms, *sizes, y, inverse_deviation, total)
        ctx.save_for_backward(y, inverse_deviation, weight, bias)
        ctx.rms = rms
        ctx.set_materialize_grads(False)
        return (y, a if total is None else total) if keeps_sum else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_sum: Tensor | None = None) -> tuple[Tensor | None, ...]:
        y, inverse_deviation, weight, bias = ctx.saved_tensors
        _, needs_b, *trained = ctx.needs_input_grad[:4]
        if grad is None:
            return grad_sum, grad_sum if needs_b else None, *[None] * 5
        grad_sum = None if grad_sum is None else grad_sum.contiguous()
        threads, grad_x = torch.get_num_threads(), torch.empty_like(y)
        sums = torch.zeros(2, threads, y.shape[1], dtype=torch.float32) if any(trained) else None
        inputs = (y, inverse_deviation, weight, bias, grad.contiguous(), grad_sum, ctx.rms)
        sizes = (ctypes.c_long(len(y)), y.shape[1], threads)
        call("add_norm_backward", *inputs, *sizes, grad_x, *((None, None) if sums is None else sums))
        of_weight, of_bias = (None, None) if sums is None else sums.sum(1)
        return grad_x, grad_x if needs_b else None, of_weight, None if bias is None else of_bias, None, None, None


# --- DoRA


def takes_magnitude(y: Tensor) -> bool:
    """Whether ``magnitude_sums`` accepts rows like y."""
    return y.shape[-1] % 16 == 0 and available(y)


def magnitude_sums(y: Tensor, grad: Tensor, bias: Tensor | None) -> Tensor:
    """``grad (y - bias)``, summed over rows: ``(N, out), (N, out), (out,)`` to ``(out,)`` fp32; see magnitude.cpp."""
    threads, width = torch.get_num_threads(), y.shape[1]
    sums = torch.zeros(threads, width, dtype=torch.float32)
    sizes = (ctypes.c_long(len(y)), ctypes.c_long(width), threads)
    call("magnitude_sums", y.contiguous(), grad.contiguous(), bias, *sizes, sums)
    return sums.sum(0)
