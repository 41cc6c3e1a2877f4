# mypy: disable-error-code="arg-type,union-attr,operator,assignment"
"""DoRA against its plain formula, and against PEFT's on the same weights: logits, gradients, merged weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetuning.models.int8 import Int8Linear
from finetuning.models.lora import DoRALayer, LinearWithLoRA, linears, transposed
from finetuning.models.quantization import dense_weight
from tests.common import needs_int8, refusal_of, train_only_lora
from tests.models.conftest import assert_each_near, relative_error, with_lora
from tests.models.test_lora import gradients
from tests.small_classifiers import build
from tests.test_every_family import EVERY_FAMILY, FUSED, assert_equals_peft

DORA = {"lora_variant": "dora", "lora_r": 3, "lora_alpha": 5.0}
ALL = {f"lora_{target}": True for target in ("key", "projection", "mlp")} | DORA


def dora_linear(n_in: int = 16, n_out: int = 7, seed: int = 0, bias: bool = True, **settings: Any) -> LinearWithLoRA:
    """A linear with DoRA, its B and magnitude away from their start."""
    torch.manual_seed(seed)
    lora = DoRALayer(n_in, n_out, 3, 5.0, **settings)
    nn.init.normal_(lora.lora_B)
    module = LinearWithLoRA(nn.Linear(n_in, n_out, bias=bias), lora)
    lora.lora_magnitude_vector.data *= 1 + 0.3 * torch.rand(n_out)
    train_only_lora(module)
    return module


def formula(module: LinearWithLoRA, x: Tensor, dropped: Tensor | None = None) -> Tensor:
    """The paper's formula; with dropout, PEFT's, which drops the input of all but the frozen product."""
    lora, W = module.lora, dense_weight(module.linear)
    V = W + lora.scale * lora.lora_B @ lora.lora_A
    s = (lora.lora_magnitude_vector / V.detach().norm(dim=1))[:, None]
    if dropped is None:
        return F.linear(x, s * V, module.linear.bias)
    return F.linear(x, W, module.linear.bias) + F.linear(dropped, s * V - W)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [None, F.gelu])
def test_fast_forward_and_backward_equal_the_formula(bias: bool, activation: Any) -> None:
    module = dora_linear(bias=bias)
    x = torch.randn(2, 5, 16, requires_grad=True)
    inputs = [x, *module.lora.parameters()]
    assert len(inputs) == 4
    fast = linears(x, [module], activation)
    plain = formula(module, x if activation is None else activation(x))
    assert relative_error(fast, plain) < 1e-6
    assert_each_near(gradients(fast, inputs), gradients(plain, inputs), 1e-5)
    with torch.no_grad():
        assert relative_error(linears(x, [module], activation), plain) < 1e-6


def test_at_first_it_changes_nothing_under_autocast_either() -> None:
    linear, x = nn.Linear(64, 48), torch.randn(4, 64)
    module = LinearWithLoRA(linear, DoRALayer(64, 48, 3, 5.0))
    train_only_lora(module)  # so that the fast path is tried
    assert relative_error(module(x), linear(x)) < 1e-6
    exact = module.factors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        factors = module.factors()
    assert factors is not None
    assert torch.equal(factors, torch.ones(48))
    assert torch.equal(factors, exact)


def test_a_row_of_zeros_stays_without_a_nan() -> None:
    module = dora_linear()
    nn.init.zeros_(module.lora.lora_B)
    module.linear.weight.data[:2] = 0
    module.start_magnitude()
    x = torch.randn(5, 16)
    torch.testing.assert_close(module(x), module.linear(x))
    module(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.requires_grad)
    assert module.lora.lora_magnitude_vector.grad.tolist()[:2] == [0, 0]


def test_its_output_can_be_changed_in_place() -> None:
    """As Longformer does with queries."""
    module, gradients_of = dora_linear(), []
    x = torch.randn(4, 16)
    for change in (lambda y: y.div_(2), lambda y: y / 2):
        module.zero_grad()
        change(module(x)).square().sum().backward()
        gradients_of.append([p.grad.clone() for p in module.lora.parameters()])
    torch.testing.assert_close(*gradients_of)


def test_several_linears_of_one_input_and_the_transposed_weight() -> None:
    plain, lora = nn.Linear(16, 6).requires_grad_(False), with_lora(nn.Linear(16, 5), 2, 3.0)
    train_only_lora(lora)
    first, second = dora_linear(seed=1), dora_linear(n_out=4, seed=2)
    modules: list[nn.Module] = [first, plain, lora, second]
    x, z = torch.randn(5, 16, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    inputs = [x, *first.lora.parameters(), *second.lora.parameters(), *lora.lora.parameters()]
    alone = torch.cat([formula(first, x), plain(x), lora(x), formula(second, x)], -1)
    joined = linears(x, modules)
    assert relative_error(joined, alone) < 1e-6
    assert_each_near(gradients(joined, inputs), gradients(alone, inputs), 1e-5)
    back, reference = transposed(z, first), z @ (formula(first, torch.eye(16)) - first.linear.bias).t()
    inputs = [z, *first.lora.parameters()]
    assert relative_error(back, reference) < 1e-5
    assert_each_near(gradients(back, inputs), gradients(reference, inputs), 1e-5)


def test_dropout_is_peft_s() -> None:
    module, x = dora_linear(dropout=0.5).train(), torch.randn(5, 16, requires_grad=True)
    torch.manual_seed(3)
    ours = module(x)
    torch.manual_seed(3)
    reference = formula(module, x, F.dropout(x, 0.5))
    assert relative_error(ours, reference) < 1e-6
    inputs = [x, *module.lora.parameters()]
    assert_each_near(gradients(ours, inputs), gradients(reference, inputs), 1e-5)


def test_small_changes_are_not_lost_in_bf16_where_the_input_has_dropout() -> None:
    module, x = dora_linear(), torch.randn(50, 16)
    module.linear.weight.data = module.linear.weight.data.bfloat16().float()  # as a frozen weight is stored
    module.lora.lora_B.data *= 1e-3
    module.start_magnitude()
    module.lora.lora_magnitude_vector.data *= 1.001
    assert relative_error(module.added(x.bfloat16()).float(), module.added(x)) < 0.02


@needs_int8
def test_in_8_bits_it_is_the_formula_on_the_dequantized_weight() -> None:
    module = dora_linear(n_in=64, n_out=32)
    nn.init.ones_(module.linear.bias)  # large enough to be missed
    packed = LinearWithLoRA(Int8Linear(module.linear), module.lora)
    module.lora.lora_magnitude_vector.data *= 1.5  # the new wrapper has set it again
    x = torch.randn(70, 64, requires_grad=True)
    inputs = [x, *module.lora.parameters()]
    ours, reference = packed(x), formula(packed, x)
    assert relative_error(ours, reference) < 0.02
    assert_each_near(gradients(ours, inputs), gradients(reference, inputs), 0.03)


# --- PEFT


@EVERY_FAMILY
def test_dora_equals_that_of_peft_with_the_adapter_that_is_written(
    folder_of: Any, tmp_path: Path, model_type: str
) -> None:
    assert_equals_peft(folder_of(model_type), tmp_path, model_type, ALL)


@FUSED
def test_parts_of_a_fused_linear_need_dora_together(folder_of: Any, model_type: str) -> None:
    assert refusal_of(build, folder_of(model_type), **DORA, lora_key=False) == (
        f"--lora_variant dora: in {model_type} models query, key, value are one linear, which PEFT adapts as a whole:"
        " put LoRA on all of them, not only on query, value"
    )
