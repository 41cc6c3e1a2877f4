"""Each step around an 8-bit product equals its formula in fp64, with every variant of the kernels and without them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from finetuning.models import compiled, int8_products
from finetuning.models.compiled import VARIANTS, library
from finetuning.models.int8_products import Thin, accumulate, dequantize, multiply, quantize, refused
from finetuning.processor import VARIABLE, instructions
from tests.common import ROOT, Patch, needs_int8, one_thread, some
from tests.models.conftest import only, relative_error

DTYPES = (torch.float32, torch.bfloat16)
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2e-3}  # relative, by tensor norm
both_ways = pytest.mark.usefixtures("steps")


@pytest.fixture(params=[*VARIANTS, None], ids=lambda variant: variant.name if variant else "torch")
def steps(request: pytest.FixtureRequest, monkeypatch: Patch) -> Iterator[None]:
    """Each way of compiling the kernels that this processor can run, and torch's operators."""
    if request.param is None:
        monkeypatch.setattr(int8_products, "library", lambda *_: (None, "no"))
        yield
        return
    for _ in only(request.param, monkeypatch):
        if library(without_bf16=True)[0] is None:
            pytest.skip(library(without_bf16=True)[1])
        yield


def thin(dtype: torch.dtype, width: int, ranks: tuple[int, ...]) -> Thin:
    """LoRA matrices of as many linears of equal width; those of rank 0 have none."""
    part = width // len(ranks)
    rows = torch.block_diag(*(torch.randn(r, part) for r in ranks)).to(dtype).contiguous()
    return Thin(rows, tuple(part * (i + 1) for i in range(len(ranks))), ranks)


@pytest.mark.usefixtures("int8_variant")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_variant_has_the_kernels_it_says(dtype: torch.dtype, int8_variant: compiled.Variant) -> None:
    has = dtype == torch.float32 or int8_variant.has_bf16
    assert int8_products.takes(torch.zeros(1, 32, dtype=dtype), None, 32) == has


@both_ways
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "width"), [(1, 32), (4, 64), (7, 384), (70, 1536), (3, 40)])
def test_rows_become_integers_times_a_scale(dtype: torch.dtype, count: int, width: int) -> None:
    x = (torch.randn(count, width) * torch.logspace(-6, 3, count)[:, None]).to(dtype)
    columns = torch.rand(width) + 0.1
    for factors in (None, columns):
        q, scales, inner = quantize(x, factors)
        exact = x.double() if factors is None else x.double() * factors
        assert inner is None
        assert q.abs().amax(1).eq(127).all(), "the largest element of a row uses the whole range"
        largest = exact.abs().amax(1, keepdim=True)
        torch.testing.assert_close(scales.double(), largest[:, 0] / 127, rtol=1e-6, atol=0)
        assert ((q * scales.double()[:, None] - exact).abs() <= largest / 127 * 0.5001).all()


@both_ways
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_usable_scale(dtype: torch.dtype) -> None:
    x = torch.randn(6, 64).to(dtype)
    x[0], x[1], x[2, 3], x[3, 5], x[4, 7] = 0, 1e-38, torch.nan, torch.inf, 1e30
    q, scales, _ = quantize(x)
    assert scales[:2].tolist() == [0, 0]
    assert scales[2:4].isnan().all(), "a row that is not finite must stay so"
    assert q[:4].abs().sum() == 0
    assert q[4, 7] == 127
    assert q[4].abs().sum() == 127
    assert scales[4:].isfinite().all()


@both_ways
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [(8,), (4,), (16,), (8, 0, 8), (4, 4, 4), (3,)])
@pytest.mark.parametrize("activate", [False, True])
def test_loras_inner_rows_come_along(dtype: torch.dtype, ranks: tuple[int, ...], activate: bool) -> None:
    torch.manual_seed(0)
    x, A = torch.randn(37, 192).to(dtype), thin(dtype, 192, ranks)
    q, scales, inner = quantize(x, None, A, activate)
    h = F.gelu(x.double()) if activate else x.double()
    assert inner is not None
    rounding = 4e-3 if activate and dtype == torch.bfloat16 else ROUNDING[dtype]
    assert relative_error(inner, h @ A.rows.double().t()) < rounding
    assert relative_error(q * scales[:, None], h) < 0.01


@both_ways
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [(8,), (8, 0, 8), (12,), (3,)])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_sums_become_rows_with_bias_and_lora(
    dtype: torch.dtype, ranks: tuple[int, ...], gelu: bool, scaled: bool
) -> None:
    torch.manual_seed(0)
    count, width = 37, 192
    sums, scales = torch.randint(-100_000, 100_000, (count, width), dtype=torch.int32), torch.rand(count) * 1e-4
    B, inner = thin(dtype, width, ranks), torch.randn(count, sum(ranks)).to(dtype)
    columns, bias = (torch.rand(width), torch.randn(width)) if scaled else (None, None)
    x = torch.randn(count, width).to(dtype) if gelu else None
    out = torch.empty(count, width, dtype=dtype)
    h = dequantize(sums, scales, out, columns, bias, inner, B, x)
    exact = sums.double() * scales.double()[:, None]
    exact = exact * columns.double() + bias.double() if columns is not None and bias is not None else exact
    exact = exact + inner.double() @ B.rows.double()
    if x is None:
        assert h is None
    else:
        exact = torch.ops.aten.gelu_backward(exact, x.double())
        assert relative_error(some(h), F.gelu(x.double())) < ROUNDING[dtype]
    assert relative_error(out, exact) < ROUNDING[dtype]


@both_ways
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 37, 64])
@pytest.mark.parametrize("ranks", [(8,), (8, 0, 8), (4,), (12,), (3,)])
def test_gradients_of_lora_are_added_up(dtype: torch.dtype, count: int, ranks: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, inner = torch.randn(count, 192).to(dtype), torch.randn(count, sum(ranks)).to(dtype)
    blocks = thin(torch.float32, 192, ranks)
    before = blocks.rows.clone()
    accumulate(inner, x, blocks.rows, blocks)
    exact = (inner.double().t() @ x.double()) * (before != 0)
    if not int8_products.takes(x, blocks, 192):
        exact = inner.double().t() @ x.double()  # torch's product fills the zeros of the blocks, too
    assert relative_error(blocks.rows - before, exact) < 1e-5


@needs_int8
@pytest.mark.usefixtures("int8_variant")
@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("shape", [(1, 32, 64), (5, 40, 24), (7, 96, 32), (70, 768, 3072), (1024, 384, 384)])
def test_products_are_exact(shape: tuple[int, int, int], extreme: bool) -> None:
    torch.manual_seed(0)
    count, width, out = shape
    q, weight = (torch.randint(-127, 128, (rows, width), dtype=torch.int8) for rows in (count, out))
    grad = torch.randint(-127, 128, (count, out), dtype=torch.int8)
    if extreme:
        q, weight, grad = q.sign() * 127, weight.sign() * 127, grad.sign() * 127
        q[0], weight[0], weight[:, 1], grad[-1] = 127, -127, 127, -127
    exact = (q.double() @ weight.double().t()).to(torch.int32), (grad.double() @ weight.double()).to(torch.int32)
    sums, grad_sums = (torch.full((count + 3, columns), 7, dtype=torch.int32) for columns in (out, width))
    assert torch.equal(multiply(q, weight.t(), sums), exact[0])
    assert torch.equal(multiply(grad, weight, grad_sums), exact[1])
    assert sums[count:].eq(7).all(), "rows after the product were written"
    assert grad_sums[count:].eq(7).all(), "rows after the product were written"
    with one_thread():
        assert torch.equal(multiply(q, weight.t(), sums), exact[0])


@needs_int8
def test_a_wrong_product_is_refused(monkeypatch: Patch) -> None:
    def saturating(a: Tensor, b: Tensor, _: Tensor) -> Tensor:  # as AVX2 does it: pairs of products in 16 bits
        pairs = [(a[:, i : i + 2].int() + 128) @ b[i : i + 2].int() for i in range(0, a.shape[1], 2)]
        return torch.stack(pairs).clamp(-32768, 32767).sum(0).to(torch.int32) - 128 * b.int().sum(0, dtype=torch.int32)

    monkeypatch.setattr(int8_products, "multiply", saturating)
    wrong = "8-bit products are wrong on this processor, perhaps because ONEDNN_MAX_CPU_ISA is set"
    assert refused.__wrapped__() == wrong


@pytest.mark.parametrize(
    ("level", "needs", "expected"),
    [
        ("avx512_bf16", "avx512_bf16", None),
        ("avx512_vnni", "avx512_vnni", None),
        ("avx512", "avx512bw", "the processor has neither AVX512-VNNI nor AVX2-VNNI"),
    ],
)
def test_what_torchs_libraries_compute_on_other_processors(level: str, needs: str, expected: str | None) -> None:
    if needs not in instructions():
        pytest.skip(f"the processor has no {needs}")
    code = """
from finetuning.processor import limit_libraries
limit_libraries()
from finetuning.models.int8_products import refused
print(refused())"""
    environment = os.environ | {VARIABLE: level, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout == f"{expected}\n", ended.stderr


def test_a_processor_without_the_instructions_is_refused(monkeypatch: Patch) -> None:
    monkeypatch.setattr(int8_products, "instructions", lambda: {"avx2", "avx512bw"})
    assert refused.__wrapped__() == "the processor has neither AVX512-VNNI nor AVX2-VNNI"


def test_a_processor_with_avx2_vnni_needs_compiled_kernels(fresh_library: Path, monkeypatch: Patch) -> None:
    for module in (compiled, int8_products):
        monkeypatch.setattr(module, "instructions", lambda: {"avx2", "fma", "bmi2", "movbe", "avx_vnni"})
    monkeypatch.setenv("CXX", "/nowhere/c++")
    reason = str(refused.__wrapped__())
    assert reason.startswith("on a processor with AVX2-VNNI it needs compiled CPU kernels, but not built: ")
    assert not list(fresh_library.glob("kernels/*"))
