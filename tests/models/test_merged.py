"""Weights merged for an evaluation: made once, never stale, within a limit, rounded without losing the adapter."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetuning.models import merged as merged_module
from finetuning.models.lora import LinearWithLoRA, linears, transposed
from finetuning.models.merged import keep_merged, merged, round_evenly
from tests.common import train_only_lora
from tests.models.conftest import relative_error
from tests.models.test_lora import lora_linear


def kept(module: LinearWithLoRA) -> list[Tensor]:
    """The weights that are kept."""
    return [] if module.merged is None else [group.weight for group in module.merged.groups.values()]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_merged_weights_are_made_once_and_give_what_the_formula_gives(dtype: torch.dtype, tolerance: float) -> None:
    model = nn.ModuleList([lora_linear(64, 48, seed=1), nn.Linear(64, 32), lora_linear(64, 40, seed=2)])
    train_only_lora(model)
    modules: list[Any] = list(model)
    first, plain, last = modules
    x = torch.randn(33, 64, dtype=dtype)
    h = x.float()
    reference = torch.cat([first.linear(h) + first.lora(h), plain(h), last.linear(h) + last.lora(h)], -1)
    y = torch.randn(33, 48, dtype=dtype)
    with torch.no_grad(), merged(model):
        assert relative_error(linears(x, modules), reference) < tolerance
        (weight,) = kept(first)
        assert (weight.shape, weight.dtype) == ((120, 64), dtype)
        linears(x, modules)
        assert kept(first)[0] is weight
        assert relative_error(transposed(y, first), y.float() @ first.merged_weight()) < tolerance
        assert len(kept(first)) == 2
    assert first.merged is None
    assert relative_error(linears(x.float(), modules), reference) < 1e-6


@pytest.mark.parametrize("change", ["step", "load", "replace", "base"])
def test_merged_weights_are_never_stale(change: str) -> None:
    module, x = lora_linear(), torch.randn(5, 10)
    loaded = {name: value + 1 for name, value in module.state_dict().items()}
    keep_merged(module)
    with torch.inference_mode():
        before = linears(x, [module])
    if change == "step":
        optimizer = torch.optim.AdamW(module.lora.parameters(), lr=0.1, fused=True)
        linears(x, [module]).sum().backward()
        optimizer.step()
    elif change == "load":
        module.load_state_dict(loaded)
    elif change == "replace":
        module.lora.lora_B = nn.Parameter(module.lora.lora_B + 1)
    else:
        with torch.no_grad():
            module.linear.bias.add_(1)  # type: ignore[operator]
    with torch.inference_mode():
        after = linears(x, [module])
    assert relative_error(after, module.linear(x) + module.lora(x)) < 1e-6
    assert relative_error(after, before) > 1e-3
    assert len(kept(module)) == 1


def test_training_ignores_merged_weights() -> None:
    module, x = lora_linear(dropout=0.5), torch.randn(5, 10, requires_grad=True)
    keep_merged(module)
    linears(x, [module]).sum().backward()
    assert module.lora.lora_A.grad is not None
    with torch.no_grad():  # dropout is on
        assert not torch.equal(linears(x, [module]), linears(x, [module]))
    assert not kept(module)
    with torch.no_grad():
        module.eval()(x)
    assert len(kept(module)) == 1


def test_merged_weights_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, x = lora_linear(seed=1), lora_linear(seed=2), torch.randn(5, 10)
    monkeypatch.setattr(merged_module, "KEPT_BYTES", 10 * 7 * 4)
    keep_merged(nn.ModuleList([first, second]))
    with torch.no_grad():
        first(x)
        assert relative_error(second(x), second.linear(x) + second.lora(x)) < 1e-6
        assert [weight.shape for weight in kept(second)] == [(7, 10)]  # the first one's: both share what is kept
        first.lora.lora_B.add_(1)
        assert relative_error(first(x), first.linear(x) + first.lora(x)) < 1e-6
        assert len(kept(first)) == 1


def test_rounding_keeps_an_adapter_that_is_smaller_than_a_step_of_bf16() -> None:
    torch.manual_seed(0)
    weight, A = (torch.randn(512, 768) / 30).bfloat16().float(), torch.randn(8, 768)
    delta = 1e-5 * torch.randn(512, 8) @ A
    x = torch.randn(32, 768) + torch.randn(32, 8) @ A  # an adapter reads what its inputs have in common
    assert torch.equal(round_evenly(weight, torch.bfloat16).float(), weight)
    rounded, nearest = round_evenly(weight + delta, torch.bfloat16), (weight + delta).bfloat16()
    step = 2.0 ** torch.maximum(weight.abs(), (weight + delta).abs()).log2().floor() / 128
    assert ((rounded.float() - weight - delta).abs() <= step).all()
    exact = delta.double() @ x.T.double()
    added, lost = ((w.double() - weight) @ x.T.double() for w in (rounded, nearest))
    assert relative_error(added, exact) < 0.2 < 0.4 < relative_error(lost, exact)
    (slope,) = torch.linalg.lstsq(exact.reshape(-1, 1), added.reshape(-1, 1)).solution.flatten()
    assert 0.9 < slope < 1.1
