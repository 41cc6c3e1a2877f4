from pathlib import Path

import pytest
from torch import nn

from finetuning.errors import UserError
from finetuning.models.families import FAMILIES, family_of
from tests.conftest import CORE, LAYERS, POSITIONS, tiny_classifier


@pytest.mark.parametrize("model_type", CORE)
def test_every_name_is_a_module_of_the_real_classifier(model_type: str) -> None:
    family, model = FAMILIES[model_type], tiny_classifier(model_type)
    named = [name for target in [*family.targets, "head"] for name in family.linear_names(target, LAYERS)]
    assert len(named) == len(set(named))
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in named)
    all_linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(named) == all_linears
    for i in range(LAYERS):
        for norm in (family.attention_norm, family.output_norm):
            assert isinstance(model.get_submodule(f"{family.layers}.{i}.{norm}"), nn.LayerNorm)
    assert family.setting(model, "layer_count") == LAYERS
    assert family.longest_input(model.config) == POSITIONS


@pytest.mark.parametrize("model_type", CORE)
def test_head_parameters_are_those_outside_the_pretrained_encoder(model_type: str) -> None:
    family, model = FAMILIES[model_type], tiny_classifier(model_type)
    head = {name for name, _ in family.head_parameters(model)}
    outside = {name for name, _ in model.named_parameters() if not name.startswith(f"{family.base}.")}
    pooler = {name for name, _ in model.named_parameters() if ".pooler." in name}
    assert head == outside | pooler


def test_other_families_are_refused() -> None:
    with pytest.raises(UserError, match=r"'gpt2': supported are bert, "):
        family_of("gpt2", str(Path("folder")))
