"""Fused linears as parts: the same function, LoRA on chosen rows only, and the published form again."""

import copy

import pytest
import torch
from torch import nn

from finetuning.models.families import FAMILIES
from finetuning.models.fused import SplitLinear, join_linears, split_linears, split_widths
from finetuning.models.lora import merge_lora
from tests.models.conftest import with_lora
from tests.tiny_models import LAYERS, WIDTH, tiny_model

FUSED = [name for name, family in FAMILIES.items() if family.fused]
IDS = torch.randint(5, 300, (1, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bias", [True, False])
def test_parts_compute_what_the_fused_linear_computes(bias: bool) -> None:
    linear, x = nn.Linear(10, 12, bias=bias), torch.randn(2, 5, 10)
    split = SplitLinear(linear, ("a", "b", "c"))
    torch.testing.assert_close(split(x), linear(x))
    assert all(torch.equal(a, b) for a, b in zip(split.joined().parameters(), linear.parameters(), strict=True))


def test_lora_on_one_part_changes_its_rows_alone() -> None:
    linear, x = nn.Linear(10, 12), torch.randn(5, 10)
    split = SplitLinear(linear, ("query", "key", "value"))
    split.set_submodule("key", with_lora(split.get_submodule("key"), 2, 2))
    changed = (split(x) - linear(x)).abs().amax(0) > 1e-6
    assert changed.tolist() == [False] * 4 + [True] * 4 + [False] * 4
    with pytest.raises(TypeError, match="merge it first"):
        split.joined()


@pytest.mark.parametrize("model_type", FUSED)
def test_a_model_gets_back_its_published_form(model_type: str) -> None:
    family, model = FAMILIES[model_type], tiny_model(model_type)
    before, logits = copy.deepcopy(model.state_dict()), model(IDS).logits
    split_linears(model, family)
    (fused,) = family.fused
    widths = dict.fromkeys(("query", "key", "value"), WIDTH)
    assert split_widths(model) == {f"{family.layers}.{i}.{fused}": widths for i in range(LAYERS)}
    torch.testing.assert_close(model(IDS).logits, logits)
    name = family.linear_names("value", LAYERS)[0]
    model.set_submodule(name, with_lora(model.get_submodule(name), 2, 2))
    adapted = model(IDS).logits
    merge_lora(model)
    join_linears(model, family)
    torch.testing.assert_close(model(IDS).logits, adapted)
    after = model.state_dict()
    assert {key: value.shape for key, value in after.items()} == {key: value.shape for key, value in before.items()}
    assert [key for key in before if not torch.equal(before[key], after[key])] == [f"{family.layers}.0.{fused}.weight"]


def test_a_model_without_fused_linears_is_left_alone() -> None:
    model = tiny_model("bert")
    before = list(model.modules())
    split_linears(model, FAMILIES["bert"])
    assert list(model.modules()) == before
