"""The names and traits of the table, next to Hugging Face's own classes."""

import pytest
from torch import nn

from finetuning.models.families import FAMILIES
from finetuning.models.fused import split_linears
from tests.tiny_models import LAYERS, POSITIONS, SHAPES, tiny_model

EVERY_FAMILY = pytest.mark.parametrize("model_type", FAMILIES)


def test_the_tests_know_every_family() -> None:
    assert set(SHAPES) == set(FAMILIES)


@EVERY_FAMILY
def test_names_are_all_the_linears_of_the_real_classifier(model_type: str) -> None:
    family, model = FAMILIES[model_type], tiny_model(model_type)
    split_linears(model, family)
    count = family.setting(model, "layer_count")
    assert count == (1 if model_type == "albert" else LAYERS)
    named = [name for target in [*family.targets, "head"] for name in family.linear_names(target, count)]
    assert len(named) == len(set(named))
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in named)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    between = {"electra.embeddings_project", "albert.encoder.embedding_hidden_mapping_in"}  # embeddings and layers
    assert set(named) == linears - between
    norms = {family.attention_norm, family.output_norm, *family.query_key_norms}
    for layer in model.get_submodule(family.layers).children() if family.efficient else ():
        found = {name for name, module in layer.named_modules() if type(module).__name__.endswith("Norm")}
        assert found == norms - {name for name in norms if isinstance(layer.get_submodule(name), nn.Identity)}
    assert family.longest_input(model.config) == POSITIONS


@pytest.mark.parametrize(
    ("model_type", "name", "value"),
    [
        ("bert", "is_decoder", True),  # it is causal then
        ("roberta", "is_decoder", True),
        ("electra", "is_decoder", True),
        ("gemma", "use_bidirectional_attention", True),
        ("qwen3", "is_causal", False),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
    ],
)
def test_what_the_efficient_path_does_not_compute_is_left_to_hugging_face(
    model_type: str, name: str, value: bool
) -> None:
    family, config = FAMILIES[model_type], tiny_model(model_type).config
    assert family.is_efficient(config)
    for own, efficient in ((not value, True), (value, False)):
        setattr(config, name, own)
        assert family.is_efficient(config) == efficient


@EVERY_FAMILY
def test_head_parameters_are_those_outside_the_pretrained_encoder(model_type: str) -> None:
    family, model = FAMILIES[model_type], tiny_model(model_type)
    head = {name for name, _ in family.head_parameters(model)}
    outside = {name for name, _ in model.named_parameters() if not name.startswith(f"{family.base}.")}
    pooler = {name for name, _ in model.named_parameters() if ".pooler." in name}
    assert head == outside | pooler
    assert family.last_token == hasattr(model, "score")
    assert family.checkpointing == model.supports_gradient_checkpointing


@EVERY_FAMILY
def test_settings_are_those_of_the_config(model_type: str) -> None:
    """DeBERTa's config has no ``cls_dropout`` unless it is set; its class reads it all the same."""
    family, config = FAMILIES[model_type], tiny_model(model_type).config
    names = {*family.settings.values(), *family.more_dropouts} - {"cls_dropout"}
    assert all(hasattr(config, name) for name in names)
    others = ("qa_dropout", "summary_last_dropout", "summary_first_dropout")  # of other heads
    dropouts = {name for name in config.to_dict() if "drop" in name} - set(others)
    ours = ("dropout", "attention_dropout", "head_dropout")
    set_by_us = {*(family.settings[name] for name in ours if name in family.settings), *family.more_dropouts}
    assert dropouts <= {config.attribute_map.get(name, name) for name in set_by_us}
