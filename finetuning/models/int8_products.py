"""8-bit products of a frozen weight with activations or gradients on a CPU: quantize, multiply, dequantize.

A row of x becomes integers q from -127 to 127 and a scale, ``x = scale q``. Products of integers are exact in 32 bits:

    y = x W^T + b + inner B^T        row by row: scale (q Q^T) columns + b + inner B^T,   W = columns[:, None] Q
    g W + inner A                    the columns' scales multiply g before it is quantized, so one copy Q is enough

LoRA's part comes along, because it needs the same rows: ``inner = x A^T`` while they are quantized, ``inner B^T`` while
the sums are dequantized. Each step is a compiled kernel (kernels/int8.cpp), or the same in torch's operators. The
product is torch's with AVX512-VNNI, and our own with AVX2-VNNI (kernels/products_int8.cpp).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from finetuning.models.compiled import call, library
from finetuning.processor import instructions

LARGEST = 127  # -128 is not used, so that the integers are symmetric
SMALLEST = 1e-30  # a row below it counts as zeros, as in the kernel
NEEDED_BY_TORCH = frozenset({"avx512_vnni", "avx512bw"})  # else torch's 8-bit product is a slow loop, or wrong
NEEDED_BY_OURS = frozenset({"avx_vnni"})
AMX = frozenset({"amx_tile", "amx_bf16"})
RANK_MULTIPLE = 4  # of a LoRA matrix for the kernels
WIDTH_MULTIPLE = 32  # of rows for the kernels
WIDEST = (2**31 - 1) // LARGEST**2  # products of integers whose sum fits in 32 bits
FORMS = {torch.bfloat16: "bf16", torch.float32: "fp32"}  # of the kernels


@dataclass(frozen=True)
class Thin:
    """LoRA matrices of several linears as one, ``(R, D)``: A of all, or the block-diagonal B^T of all."""

    rows: Tensor  # ``(R, D)``, in the dtype of the products
    ends: tuple[int, ...]  # block i has the columns up to ``ends[i]``
    ranks: tuple[int, ...]  # ... and the next ``ranks[i]`` rows; all other elements are zero.

    @functools.cached_property
    def pairs(self) -> Tensor:
        """As the kernels multiply them, with neighbouring rows interleaved: ``(R / 2, D, 2)``; in fp32 as they are."""
        if self.rows.dtype == torch.float32:
            return self.rows
        return self.rows.unflatten(0, (-1, 2)).transpose(1, 2).contiguous()

    @functools.cached_property
    def segments(self) -> tuple[int | Tensor, ...]:
        """The blocks as the kernels take them: count, ends, ranks, sum of ranks."""
        ends, ranks = (torch.tensor(values, dtype=torch.int32) for values in (self.ends, self.ranks))
        return len(self.ends), ends, ranks, sum(self.ranks)


def takes(x: Tensor, thin: Thin | None, width: int) -> bool:
    """Whether the kernels accept x, LoRA matrices like these, and rows of this width."""
    ends, ranks = ((), ()) if thin is None else (thin.ends, thin.ranks)
    fits = not any(n % WIDTH_MULTIPLE for n in (width, *ends)) and not any(n % RANK_MULTIPLE for n in ranks)
    without_bf16 = x.dtype == torch.float32
    return fits and library(without_bf16)[0] is not None


def quantize(
    x: Tensor, columns: Tensor | None = None, thin: Thin | None = None, activate: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantizes each row of ``h columns``, where h is x or its GELU.

    Args:
        x: ``(N, D)``.
        columns: ``(D,)`` fp32, a factor of each column.
        thin: ``(R, D)``.
        activate: whether h is ``gelu(x)``.

    Returns:
        q ``(N, D)`` int8, scales ``(N,)`` fp32, and ``h thin^T`` ``(N, R)`` in x's dtype. The scale of a row that is
        not finite is NaN.
    """
    count, width = x.shape
    if not takes(x, thin, width):
        h = F.gelu(x) if activate else x
        inner = None if thin is None else h @ thin.rows.t()
        return *_quantize(h.float() if columns is None else h.float() * columns), inner
    q, scales = torch.empty(count, width, dtype=torch.int8), torch.empty(count)
    inner = None if thin is None else x.new_empty(count, len(thin.rows))
    _call(
        "quantize", x, x, columns, int(activate), count, width, None if thin is None else thin.rows,
        *(_no_segments(width) if thin is None else thin.segments), torch.get_num_threads(), q, scales, inner,
    )  # fmt: skip
    return q, scales, inner


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    largest = x.abs().amax(1)  # NaN if an element is
    usable = largest.isfinite() & (largest >= SMALLEST)
    factors = torch.where(usable, LARGEST / largest, 0.0)
    q = (x.nan_to_num(0.0, 0.0, 0.0) * factors[:, None]).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    return q, torch.where(usable, largest / LARGEST, torch.where(largest.isfinite(), 0.0, torch.nan))


def dequantize(
    sums: Tensor,
    scales: Tensor,
    out: Tensor,
    columns: Tensor | None = None,
    bias: Tensor | None = None,
    inner: Tensor | None = None,
    thin: Thin | None = None,
    gelu_input: Tensor | None = None,
) -> Tensor | None:
    """Writes ``scales sums columns + bias + inner thin`` to ``out``, times ``gelu'(gelu_input)`` if that is given.

    Args:
        sums: ``(N, D)`` int32, of a product of integers.
        scales: ``(N,)`` fp32.
        out: ``(N, D)``.
        columns: ``(D,)`` fp32.
        bias: ``(D,)`` fp32.
        inner: ``(N, R)`` in out's dtype.
        thin: ``(R, D)``.
        gelu_input: ``(N, D)`` in out's dtype.

    Returns:
        ``gelu(gelu_input)``, if that is given.
    """
    count, width = sums.shape
    if not takes(out, thin, width):
        y = sums * scales[:, None] if columns is None else sums * scales[:, None] * columns
        y = y if bias is None else y + bias
        y = y if inner is None or thin is None else y + inner.float() @ thin.rows.float()
        if gelu_input is None:
            out.copy_(y)
            return None
        out.copy_(torch.ops.aten.gelu_backward(y, gelu_input.float()))
        return F.gelu(gelu_input)
    h = None if gelu_input is None else torch.empty_like(out)
    _call(
        "dequantize", out, sums, scales, columns, bias, inner, None if thin is None else thin.pairs, gelu_input,
        count, width, *(_no_segments(width) if thin is None else thin.segments), torch.get_num_threads(), out, h,
    )  # fmt: skip
    return h


def accumulate(inner: Tensor, x: Tensor, sums: Tensor, like: Thin) -> None:
    """Adds ``inner^T x`` to ``sums``, ``(N, R), (N, D) -> (R, D)`` fp32; the kernel only the blocks of ``like``."""
    width = x.shape[1]
    if not takes(x, like, width):
        sums += inner.float().t() @ x.float()
        return
    _call("accumulate", x, inner, x, len(x), width, *like.segments, torch.get_num_threads(), sums)


@functools.cache
def _no_segments(width: int) -> tuple[int | Tensor, ...]:
    """One block of rank 0."""
    return 1, torch.tensor([width], dtype=torch.int32), torch.zeros(1, dtype=torch.int32), 0


def _call(name: str, like: Tensor, *arguments: Tensor | int | None) -> None:
    """Calls a kernel of int8.cpp in its form for the dtype of ``like``.

    Raises:
        ValueError: a tensor has gaps between its rows, which a kernel would read as numbers.
    """
    if not all(a.is_contiguous() for a in arguments if isinstance(a, Tensor)):
        raise ValueError(f"{name}: the kernel takes contiguous tensors")
    call(f"{name}_{FORMS[like.dtype]}", *arguments)


def multiply(q: Tensor, weight: Tensor, sums: Tensor) -> Tensor:
    """Exact product ``q weight``: ``(N, K), (K, D) -> (N, D)`` int32, written to the first rows of ``sums``."""
    out = sums[: len(q)]
    if not hasattr(library(without_bf16=True)[0], "multiply_int8"):  # ours is compiled only where torch's is slow
        return torch._int_mm(q, weight, out=out)
    depth, width = weight.shape
    transposed = not weight.is_contiguous()
    if depth % WIDTH_MULTIPLE or width % WIDTH_MULTIPLE:
        return out.copy_(q.double() @ weight.double())  # exact: the sums are below 2^53
    rows = weight.t() if transposed else weight
    call("multiply_int8", q, rows, len(q), depth, width, int(transposed), torch.get_num_threads(), out)
    return out


@functools.cache
def refused() -> str | None:
    """Why this machine cannot multiply 8-bit integers fast and exactly; ``None`` if it can.

    Older processors and libraries add pairs of products in 16 bits, which overflow without an error. So one product is
    compared with the exact one.
    """
    if not NEEDED_BY_TORCH.issubset(instructions()):
        if not NEEDED_BY_OURS.issubset(instructions()):
            return "the processor has neither AVX512-VNNI nor AVX2-VNNI"
        kernels, state = library(without_bf16=True)
        if kernels is None:
            return f"on a processor with AVX2-VNNI it needs compiled CPU kernels, but {state.removeprefix('no: ')}"
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-LARGEST, LARGEST + 1, (96, 96), generator=generator) for _ in range(2))
    left[:32], right[:, :32] = LARGEST, -LARGEST  # extreme sums
    exact = (left.double() @ right.double()).to(torch.int32)
    for weight in (right.to(torch.int8), right.t().contiguous().to(torch.int8).t()):
        if not torch.equal(multiply(left.to(torch.int8), weight, torch.empty_like(exact)), exact):
            return "8-bit products are wrong on this processor, perhaps because ONEDNN_MAX_CPU_ISA is set"
    return None


def unsuited(widths: Sequence[int]) -> str | None:
    """Why linears of these widths cannot be held in 8 bits; ``None`` if they can."""
    if not widths:
        return "the run has no frozen linear that can be held in 8 bits"
    widest = max(widths)
    return f"a linear is {widest:,} wide, and 8-bit products take at most {WIDEST:,}" if widest > WIDEST else None


def slow(widths: Sequence[int], without_bf16: bool) -> str | None:
    """Why 8-bit products of linears of these widths save no time on this machine; ``None`` if they do.

    Without the kernels, the steps around a product take longer than 8 bits save. With AMX, bf16 products are so fast
    that these steps cost more than 8 bits save (docs/log.md).

    Args:
        widths: of the linears.
        without_bf16: whether all else is computed in fp32.
    """
    kernels, state = library(without_bf16=without_bf16)
    if kernels is None:
        return f"CPU kernels: {state}"
    if AMX.issubset(instructions()):
        return "bf16 with AMX is faster"
    odd = next((width for width in widths if width % WIDTH_MULTIPLE), None)
    return None if odd is None else f"a linear is {odd} wide, and the kernels take multiples of {WIDTH_MULTIPLE}"
