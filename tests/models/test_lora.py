"""LoRA against its plain formula, against the real PEFT, and over 4-bit weights."""

import copy
import dataclasses
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetuning.models import lora as lora_module
from finetuning.models import products
from finetuning.models.cpu_kernels import swiglu
from finetuning.models.families import FAMILIES, ModelFamily
from finetuning.models.lora import LinearWithLoRA, LoRALayer, linears, lora_modules, merge_lora
from finetuning.models.quantization import dense_weight, quantize_linears
from tests.common import CORE, Patch, tiny_classifier, train_only_lora
from tests.models.conftest import assert_each_near, place_lora, relative_error, saved_tensors, with_lora

RANK, ALPHA = 3, 5.0
TARGETS = ("query", "key", "value", "projection", "mlp", "head")


def lora_linear(n_in: int = 10, n_out: int = 7, seed: int = 0, **settings: Any) -> LinearWithLoRA:
    """A linear with LoRA whose B is not zero, the base frozen."""
    torch.manual_seed(seed)
    module = with_lora(nn.Linear(n_in, n_out), RANK, ALPHA, **settings)
    train_only_lora(module)
    return module


def gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of one fixed, uneven function of y."""
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    return list(torch.autograd.grad((y.double() * weights).sum(), inputs))


# --- one layer


@pytest.mark.parametrize(("scaling", "scale"), [("standard", 5 / 3), ("rslora", 5 / 3**0.5), ("raw", 5.0)])
def test_layer_is_the_formula(scaling: str, scale: float) -> None:
    layer = LoRALayer(10, 7, RANK, ALPHA, scaling)
    x = torch.randn(4, 10)
    assert layer.scale == pytest.approx(scale)
    assert torch.equal(layer(x), torch.zeros(4, 7)), "B starts at zero, so a new layer changes nothing"
    nn.init.normal_(layer.lora_B)
    assert relative_error(layer(x), scale * (x @ layer.lora_A.T @ layer.lora_B.T)) < 1e-6
    assert relative_error(layer(x), x @ layer.delta_weight().T) < 1e-6


def test_layer_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="rank 0"):
        LoRALayer(10, 7, 0, ALPHA)
    with pytest.raises(ValueError, match="half"):
        LoRALayer(10, 7, RANK, ALPHA, "half")


@pytest.mark.parametrize("bias", [True, False])
def test_fast_forward_and_backward_equal_the_plain_formula(bias: bool) -> None:
    module = lora_linear()
    if not bias:
        module.linear.bias = None  # type: ignore[assignment]
    x = torch.randn(2, 5, 10, requires_grad=True)
    inputs = [x, module.lora.lora_A, module.lora.lora_B]
    fast, plain = module(x), module.linear(x) + module.lora(x)
    assert fast.shape == (2, 5, 7)
    assert relative_error(fast, plain) < 1e-6
    assert_each_near(gradients(fast, inputs), gradients(plain, inputs), 1e-5)
    module(x).sum().backward()
    assert all(p.grad is None for p in module.linear.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_the_adapter_is_merged_where_that_is_exact(dtype: torch.dtype, monkeypatch: Patch) -> None:
    module, x = lora_linear(), torch.randn(2, 5, 10, dtype=dtype)
    merged: list[bool] = []

    def watched(x: Tensor, A: Tensor | None, *rest: Any) -> Tensor:
        merged.append(A is None)
        return products.frozen_linear(x, A, *rest)

    monkeypatch.setattr(lora_module, "frozen_linear", watched)
    with torch.no_grad():
        fast, plain = linears(x, [module]), module.linear(x.float()) + module.lora(x.float())
    assert relative_error(fast, plain) < (1e-6 if dtype == torch.float32 else 1e-2)
    assert merged == [dtype == torch.float32]


@pytest.mark.parametrize("rows_at_once", [2, 5, products.ROWS_AT_ONCE])  # of five: 2 + 2 + 1, exactly all, all
@pytest.mark.parametrize("kind", ["lora", "frozen", "bias", "trained"])
@pytest.mark.parametrize("input_is_trained", [True, False])
def test_activation_equals_the_plain_formula_and_its_output_is_not_saved(
    kind: str, input_is_trained: bool, rows_at_once: int, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(products, "ROWS_AT_ONCE", rows_at_once)
    module: nn.Module = lora_linear() if kind == "lora" else nn.Linear(10, 7).requires_grad_(kind == "trained")
    if kind == "bias":
        module.bias.requires_grad_(True)
    x = torch.randn(5, 10, requires_grad=input_is_trained)
    inputs = [*([x] if input_is_trained else []), *(p for p in module.parameters() if p.requires_grad)]
    with saved_tensors() as saved:
        ours = linears(x, [module], activation=F.gelu)
    plain = module(F.gelu(x))
    assert relative_error(ours, plain) < 1e-6
    assert ours.requires_grad == bool(inputs)
    if kind != "trained":
        assert not any(torch.equal(tensor, F.gelu(x)) for tensor in saved if tensor.shape == x.shape)
    if inputs:
        assert_each_near(gradients(ours, inputs), gradients(plain, inputs), 1e-5)


def test_gradcheck() -> None:
    modules = [lora_linear(4, 3, seed).double() for seed in (1, 2)]
    matrices = [p for m in modules for p in m.lora.parameters()]
    for activation, width in ((None, 4), (F.gelu, 4), (swiglu, 8)):
        x = torch.randn(5, width, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, *_: linears(x, modules, activation), (x, *matrices))  # noqa: B023


def test_input_without_gradient_gets_none() -> None:
    module = lora_linear()
    y = module(torch.randn(5, 10))
    y.sum().backward()
    assert module.lora.lora_A.grad is not None
    assert lora_linear().requires_grad_(False)(torch.randn(5, 10)).grad_fn is None


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_on_the_input_of_the_lora_matrices_and_in_training_only(training: bool) -> None:
    module = lora_linear(dropout=0.5).train(training)
    x = torch.randn(5, 10)
    torch.manual_seed(3)
    ours = module(x)
    torch.manual_seed(3)
    kept = F.dropout(x, 0.5, training)
    reference = module.linear(x) + module.lora.scale * (kept @ module.lora.lora_A.T @ module.lora.lora_B.T)
    assert relative_error(ours, reference) < 1e-6


def test_trained_base_gets_its_gradients() -> None:
    module = lora_linear().requires_grad_(True)
    module(torch.randn(5, 10)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_base_keeps_fp32_masters(dtype: torch.dtype) -> None:
    module = lora_linear(64, 48)
    x = torch.randn(33, 64)
    exact = gradients(module(x), list(module.lora.parameters()))
    module.linear.to(dtype)
    with torch.autocast("cpu", dtype):
        under_autocast = module(x)
    for y in (module(x.to(dtype)), under_autocast):
        assert y.dtype == dtype
        ours = gradients(y, list(module.lora.parameters()))
        assert all(g.dtype == torch.float32 for g in ours)
        assert_each_near(ours, exact, 0.02)
    holder = nn.Sequential(module)
    merge_lora(holder)  # which is plain fp32, whatever the base was
    assert {parameter.dtype for parameter in holder.parameters()} == {torch.float32}
    assert relative_error(holder(x), module(x.to(dtype))) < 0.02


# --- whole models


IDS = torch.randint(5, 50, (4, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scaling", ["standard", "rslora", "raw"])
@pytest.mark.parametrize("family", CORE.values(), ids=CORE)
def test_lora_equals_that_of_peft_and_merging_changes_nothing(family: ModelFamily, scaling: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig, get_peft_model
    ours = tiny_classifier(family.model_type, classes=3).eval()
    base = copy.deepcopy(ours).double()
    names = place_lora(ours, family, TARGETS, RANK, ALPHA, scaling=scaling)
    ours.double()  # gradients that are small differences of large numbers are the same to the last digits, or wrong
    before = base(IDS).logits
    alpha = ALPHA * RANK if scaling == "raw" else ALPHA
    theirs = get_peft_model(
        base,
        LoraConfig(r=RANK, lora_alpha=alpha, use_rslora=scaling == "rslora", target_modules=names),  # type: ignore[arg-type]
    ).eval()
    pairs = []
    for name, module in lora_modules(ours):
        peft_layer = theirs.get_submodule(f"base_model.model.{name}")
        for matrix in ("lora_A", "lora_B"):
            mine, other = getattr(module.lora, matrix), getattr(peft_layer, matrix)["default"].weight
            other.data = mine.data.clone()
            pairs.append((mine, other))
    logits, reference = ours(IDS).logits, theirs(IDS).logits
    assert relative_error(logits, reference) < 1e-9
    assert relative_error(logits, before) > 1e-6, "LoRA must change the base's output"
    grads = gradients(logits, [mine for mine, _ in pairs])
    expected = gradients(reference, [other for _, other in pairs])
    assert_each_near(grads, expected, 1e-9)
    merge_lora(ours)
    assert not any("lora" in name for name, _ in ours.named_parameters())
    assert relative_error(ours.float()(IDS).logits, logits) < 1e-5


# --- 4 bits


def quantized(linear: nn.Linear) -> tuple[LinearWithLoRA, LinearWithLoRA]:
    """QLoRA over the linear, and LoRA over the dense weight that 4 bits leave of it; the same A and B."""
    bnb = pytest.importorskip("bitsandbytes")
    packed = bnb.nn.Linear4bit(linear.in_features, linear.out_features, compute_dtype=torch.float32, quant_type="nf4")
    packed.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    packed.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    packed.to("cpu")  # this quantizes
    packed.support_avx512bf16_for_cpu = False
    dense = nn.Linear(linear.in_features, linear.out_features)
    dense.weight.data = bnb.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state)
    dense.bias.data = linear.bias.data
    qlora = with_lora(packed, RANK, ALPHA)
    lora_on_dense = LinearWithLoRA(dense, copy.deepcopy(qlora.lora))
    train_only_lora(lora_on_dense)
    return qlora, lora_on_dense


@pytest.mark.parametrize("width", [16, 48, 64, 100, 1200])
def test_four_bits_are_the_nearest_values_of_their_block(width: int) -> None:
    """Also where a block of 64 goes over the end of a row: bitsandbytes' kernel for AVX512 is wrong there."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model: Any = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(width, 64)])})
    dense = model["layers"][0].weight.data.clone().view(-1, 64)  # (blocks, 64)
    quantize_linears(model, dataclasses.replace(FAMILIES["bert"], layers="layers"), torch.float32, double=False)
    linear = model["layers"][0]
    table, largest = bnb.functional.get_4bit_type("nf4", "cpu"), dense.abs().amax(dim=1, keepdim=True)
    nearest = table[(dense[:, :, None] / largest[:, :, None] - table).abs().argmin(dim=2)] * largest
    assert relative_error(dense_weight(linear), nearest.view(64, width)) < 1e-6
    x = torch.randn(3, width, requires_grad=True)
    y = linear(x)
    assert relative_error(y, F.linear(x, nearest.view(64, width), linear.bias)) < 1e-5
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert relative_error(grad, nearest.view(64, width).sum(dim=0).expand(3, -1)) < 1e-5


def test_four_bits_equal_lora_on_the_dequantized_weight() -> None:
    torch.manual_seed(0)
    qlora, lora = quantized(nn.Linear(64, 128))
    x = torch.randn(5, 64, requires_grad=True)
    for training in (True, False, True):  # an evaluation in between must leave the weights as they were
        y = qlora.train(training)(x)
        reference = lora(x)
        assert relative_error(y, reference) < 1e-6
        ours = gradients(y, [x, *qlora.lora.parameters()])
        expected = gradients(reference, [x, *lora.lora.parameters()])
        assert_each_near(ours, expected, 1e-5)
    assert relative_error(linears(x, [qlora.linear]), lora.linear(x)) < 1e-6
    assert relative_error(qlora.merged_weight(), lora.merged_weight()) < 1e-6
    holder = nn.Sequential(qlora)
    merge_lora(holder)
    assert relative_error(holder(x), lora(x)) < 1e-6
