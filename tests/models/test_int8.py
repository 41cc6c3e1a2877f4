"""8-bit linears equal the same formula in fp64 on the dequantized operands, and stay close to the dense linear."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from finetuning.data.imdb import read_imdb
from finetuning.models import int8, int8_products
from finetuning.models.int8 import Int8Linear, int8_linears
from finetuning.models.int8_products import quantize
from finetuning.models.lora import LinearWithLoRA, linears, merge_lora
from finetuning.models.products import Activation
from finetuning.settings import DataSettings
from tests.common import needs_int8, packaged_folder
from tests.models.conftest import assert_each_near, relative_error, saved_tensors, with_lora

pytestmark = needs_int8
every_variant = pytest.mark.usefixtures("int8_variant")
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
without_and_with_gelu = pytest.mark.parametrize("activation", [None, F.gelu], ids=["none", "gelu"])
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 3e-3}
EXACT = {torch.float32: 1e-6, torch.bfloat16: 2e-3}


def rounded(x: Tensor, columns: Tensor | None = None) -> Tensor:
    """x times the columns' factors, as the 8-bit rows say it, in fp64."""
    q, scales, _ = quantize(x, columns)
    return q.double() * scales.double()[:, None]


def adapted(linear: Int8Linear, rank: int = 8, dropout: float = 0.0) -> LinearWithLoRA:
    return with_lora(linear, rank, 2 * rank, std=0.1, dropout=dropout)


def outcome(modules: Sequence[nn.Module], x: Tensor, grad: Tensor, activation: Activation | None) -> tuple[Tensor, ...]:
    """The output of linears, and the gradients of their input and of LoRA's matrices."""
    leaf = x.detach().requires_grad_()
    y = linears(leaf, modules, activation)
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    return (y, *torch.autograd.grad(y, [leaf, *trained], grad))


@every_variant
@both_dtypes
@pytest.mark.parametrize("shape", [(130, 384, 1536), (64, 1536, 384), (3, 32, 64), (5, 40, 24)])
def test_forward_and_input_gradient_equal_the_dequantized_operands(
    dtype: torch.dtype, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "ROWS_AT_ONCE", 60)
    torch.manual_seed(0)
    count, width, out = shape
    linear = Int8Linear(nn.Linear(width, out, bias=False))
    x, grad = torch.randn(count, width).to(dtype).requires_grad_(), torch.randn(count, out).to(dtype)
    y = linears(x, [linear])
    (grad_x,) = torch.autograd.grad(y, x, grad)
    assert (y.dtype, grad_x.dtype) == (dtype, dtype)
    weight = linear.weight.double()
    assert relative_error(y, rounded(x.detach()) @ weight.t() * linear.scale.double()) < EXACT[dtype]
    assert relative_error(grad_x, rounded(grad, linear.scale) @ weight) < EXACT[dtype]


@every_variant
@both_dtypes
@pytest.mark.parametrize("activation", [None, F.gelu, torch.relu], ids=["none", "gelu", "relu"])
@pytest.mark.parametrize("ranks", [(0,), (8,), (8, 0, 8), (6, 6, 6)])
def test_the_same_as_dense_linears_up_to_8_bits(
    dtype: torch.dtype, activation: Activation | None, ranks: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    dense = [nn.Linear(384, 192) for _ in ranks]
    packed = [Int8Linear(linear) for linear in dense]
    modules = [adapted(p, rank) if rank else p for p, rank in zip(packed, ranks, strict=True)]
    x, grad = torch.randn(50, 384).to(dtype), torch.randn(50, 192 * len(ranks)).to(dtype)
    y, *gradients = outcome(modules, x, grad, activation)

    exact_x = x.double().requires_grad_()
    h = exact_x if activation is None else activation(exact_x)
    loras = [module.lora for module in modules if isinstance(module, LinearWithLoRA)]
    matrices = [p.detach().double().requires_grad_() for lora in loras for p in lora.parameters()]
    pairs, parts = iter(matrices), []
    for linear, rank in zip(packed, ranks, strict=True):
        part = h @ linear.dense_weight().double().t() + linear.bias.double()
        parts.append(part + 2 * h @ next(pairs).t() @ next(pairs).t() if rank else part)
    exact = torch.cat(parts, -1)
    references = torch.autograd.grad(exact, [exact_x, *matrices], grad.double())
    assert relative_error(y, exact) < 0.012
    assert relative_error(gradients[0], references[0]) < 0.015
    assert all(value.dtype == torch.float32 for value in gradients[1:])
    assert_each_near(gradients[1:], references[1:], 5e-3 if dtype == torch.bfloat16 else 1e-5)


@every_variant
@both_dtypes
@without_and_with_gelu
def test_rows_with_gaps_between_them_are_read_as_they_are(dtype: torch.dtype, activation: Activation | None) -> None:
    """As the last layer's first tokens of 64 sequences are: a view of the rows of all tokens."""
    torch.manual_seed(0)
    module = adapted(Int8Linear(nn.Linear(64, 96)))
    tokens, grads = torch.randn(64, 7, 64).to(dtype), torch.randn(64, 5, 96).to(dtype)
    for x, grad in ((tokens[:, 0], grads[:, 0]), (tokens[0, 0].expand(64, -1), grads[0, 0].expand(64, -1))):
        assert not x.is_contiguous()
        copied = outcome([module], x.contiguous(), grad.contiguous(), activation)
        torch.testing.assert_close(outcome([module], x, grad, activation), copied, rtol=0, atol=0)


def test_a_kernel_refuses_rows_with_gaps() -> None:
    if int8_products.library(without_bf16=True)[0] is None:
        pytest.skip("no compiled kernels")
    with pytest.raises(ValueError, match="contiguous"):
        quantize(torch.randn(4, 2, 64)[:, 0])


@every_variant
@both_dtypes
@without_and_with_gelu
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rank", [0, 8])
def test_a_value_that_is_not_finite_is_never_hidden(
    dtype: torch.dtype, activation: Activation | None, bad: float, rank: int
) -> None:
    torch.manual_seed(0)
    linear = Int8Linear(nn.Linear(64, 96))
    x, grad = torch.randn(5, 64).to(dtype), torch.randn(5, 96).to(dtype)
    others = [0, 1, 3, 4]
    for spoilt in (x, grad):
        given = [tensor.clone() for tensor in (x, grad)]
        given[spoilt is grad][2, 3] = bad
        y, grad_x, *of_lora = outcome([adapted(linear, rank) if rank else linear], given[0], given[1], activation)
        assert y[others].isfinite().all()
        assert grad_x[others].isfinite().all()
        assert y[2].isfinite().all() if spoilt is grad else not y[2].isfinite().any()
        assert spoilt is x or not grad_x[2].isfinite().any()
        if rank:
            grad_A, grad_B = of_lora
            assert not grad_B.isfinite().all()
            assert not (grad_A[:, 3] if spoilt is x else grad_A).isfinite().any()


@every_variant
@both_dtypes
@without_and_with_gelu
def test_without_the_kernels_torch_gives_the_same(
    dtype: torch.dtype, activation: Activation | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    modules = [adapted(Int8Linear(nn.Linear(64, 96))), Int8Linear(nn.Linear(64, 32))]
    x, grad = torch.randn(70, 64).to(dtype), torch.randn(70, 128).to(dtype)
    found = outcome(modules, x, grad, activation)
    monkeypatch.setattr(int8_products, "library", lambda *_, **__: (None, "no"))
    assert_each_near(found, outcome(modules, x, grad, activation), ROUNDING[dtype])


def test_real_activations_lose_little() -> None:
    """MiniLM's own inputs of each linear: the 8-bit output against the dense one, without the bias.

    The rows after GELU, inputs of a layer's last linear, have the largest values against their mean, and lose most.
    """
    model = AutoModel.from_pretrained(packaged_folder()).eval()
    tokenizer = AutoTokenizer.from_pretrained(packaged_folder())
    reviews = read_imdb(DataSettings(), offline=True).tables["train"]["text"][:8].tolist()
    batch = tokenizer(reviews, padding=True, truncation=True, max_length=128, return_tensors="pt")
    errors = {}

    def compare(name: str) -> Callable[..., None]:
        def hook(linear: nn.Linear, inputs: tuple[Tensor], _: Tensor) -> None:
            x = inputs[0][batch["attention_mask"].bool()]
            shift = 0 if linear.bias is None else linear.bias.detach()
            errors[name] = relative_error(Int8Linear(linear)(x) - shift, F.linear(x, linear.weight))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layer" in name:
            module.register_forward_hook(compare(name))
    with torch.no_grad():
        model(**batch)
    assert len(errors) == 36
    assert sorted(errors.values())[18] < 0.015, errors
    assert max(errors.values()) < 0.03, errors


@every_variant
def test_one_huge_value_costs_its_row_alone_its_precision() -> None:
    linear = Int8Linear(nn.Linear(64, 64, bias=False))
    x = torch.randn(5, 64)
    alone = int8_linears(x, [linear], [None])
    x[2, 3] = 1e6
    y = int8_linears(x, [linear], [None])
    torch.testing.assert_close(y[[0, 1, 3, 4]], alone[[0, 1, 3, 4]], rtol=0, atol=0)
    assert relative_error(y[2], rounded(x)[2] @ linear.dense_weight().double().t()) < 1e-6


@every_variant
def test_a_row_of_zeros_gives_the_bias() -> None:
    linear = Int8Linear(nn.Linear(64, 64))
    torch.testing.assert_close(int8_linears(torch.zeros(3, 64), [linear], [None]), linear.bias.expand(3, 64))


@every_variant
def test_no_rows_give_no_rows() -> None:
    module = adapted(Int8Linear(nn.Linear(64, 96)))
    y, grad_x, *gradients = outcome([module], torch.randn(0, 64), torch.ones(0, 96), F.gelu)
    assert (y.shape, grad_x.shape) == ((0, 96), (0, 64))
    assert len(gradients) == 2
    assert not any(gradient.any() for gradient in gradients)


def test_dropout_of_lora_leaves_the_frozen_linear_its_whole_input() -> None:
    torch.manual_seed(0)
    linear = Int8Linear(nn.Linear(64, 64))
    module = adapted(linear, dropout=0.5).train()
    x = torch.randn(50, 64)
    torch.manual_seed(1)
    y = module(x)
    torch.manual_seed(1)
    torch.testing.assert_close(y, int8_linears(x, [linear], [None]) + module.lora(x))


def test_no_dense_weight_is_kept_for_backward() -> None:
    linear = Int8Linear(nn.Linear(64, 96))
    x = torch.randn(5, 64, requires_grad=True)
    with saved_tensors() as saved:
        int8_linears(x, [linear], [None])
    assert not [t for t in saved if t.shape in ((96, 64), (64, 96))]
    assert sum(t.numel() * t.element_size() for t in (linear.weight, linear.scale)) == 96 * 64 + 96 * 4


def test_lora_merges_into_the_weight_that_training_saw() -> None:
    torch.manual_seed(0)
    module = adapted(Int8Linear(nn.Linear(64, 64)))
    model = nn.Sequential(module)
    merged = module.merged_weight()
    merge_lora(model)
    torch.testing.assert_close(model[0].weight, merged)
