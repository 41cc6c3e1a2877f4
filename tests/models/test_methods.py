"""Which weights bitfit, norms and head train, and that the efficient path computes their gradients."""

import copy
import re

import pytest
import torch
from peft import LNTuningConfig, get_peft_model
from torch import nn

from finetuning.config import RunConfig
from finetuning.models.encoder import classify, count_frozen_layers
from finetuning.models.families import FAMILIES, ModelFamily
from finetuning.models.methods import check_method, choose_trained
from finetuning.settings import MethodSettings
from tests.common import CORE, refusal_of
from tests.models.conftest import saved_tensors
from tests.models.test_encoder import (
    FAMILY,
    LAYERS,
    STEPS,
    assert_as_good,
    assert_equal_those_of_hugging_face,
    batch,
    low_precision_errors,
    prepare,
)
from tests.tiny_models import INNER, WIDTH, tiny_model

PARTIAL = pytest.mark.parametrize("method", ["bitfit", "norms"])


def method_of(method: str, **more: object) -> MethodSettings:
    return RunConfig.from_settings(method=method, **more).method


def prepared(model_type: str, method: str) -> nn.Module:
    """A tiny classifier in training mode, trained as the method says, with biases and norms away from their start."""
    model = prepare(FAMILIES[model_type], "full")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    choose_trained(model, FAMILIES[model_type], method_of(method), head=True)
    return model


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


HEAD = {f"{name}.{kind}" for name in ("pre_classifier", "classifier") for kind in ("weight", "bias")}
NORMS = ("sa_layer_norm", "output_layer_norm")
LINEARS = ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2")


def test_exactly_biases_norms_or_the_head_of_distilbert_are_trained() -> None:
    layers = [f"distilbert.transformer.layer.{i}" for i in range(LAYERS)]
    norms = ["distilbert.embeddings.LayerNorm", *(f"{layer}.{norm}" for layer in layers for norm in NORMS)]
    linears = [f"{layer}.{linear}" for layer in layers for linear in LINEARS]
    assert trained_names(prepared("distilbert", "bitfit")) == HEAD | {f"{name}.bias" for name in norms + linears}
    expected = HEAD | {f"{name}.{kind}" for name in norms for kind in ("weight", "bias")}
    assert trained_names(prepared("distilbert", "norms")) == expected
    assert trained_names(prepared("distilbert", "head")) == HEAD


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT's, of the norms that it wraps all the same
def test_norms_are_pefts_ln_tuning() -> None:
    model, family = prepared("distilbert", "norms"), FAMILIES["distilbert"]
    config = LNTuningConfig(
        task_type="SEQ_CLS", target_modules=["LayerNorm", *NORMS], modules_to_save=list(family.head_modules)
    )
    peer = get_peft_model(copy.deepcopy(model), config)
    ids, mask, labels = batch(family, padded=True)
    ours, theirs = classify(model, family, ids, mask, torch.float32), peer(ids, attention_mask=mask).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for logits in (ours, theirs):
        nn.functional.cross_entropy(logits, labels).backward()
    wrapped = r"^base_model\.model\.|\.(ln_tuning_layers|modules_to_save)\.default"
    expected = {re.sub(wrapped, "", name): p.grad for name, p in peer.named_parameters() if p.requires_grad}
    assert expected.keys() == trained_names(model)
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model_type", CORE)
def test_their_number_is_the_closed_form(model_type: str) -> None:
    counts = {
        method: sum(p.numel() for p in prepared(model_type, method).parameters() if p.requires_grad)
        for method in ("bitfit", "norms", "head")
    }
    assert counts["head"] == WIDTH * WIDTH + WIDTH + 3 * WIDTH + 3
    assert counts["bitfit"] - counts["head"] == WIDTH + LAYERS * (7 * WIDTH + INNER)
    assert counts["norms"] - counts["head"] == 2 * WIDTH + LAYERS * 4 * WIDTH


def test_rms_norms_are_norms() -> None:
    model = tiny_model("qwen3")
    choose_trained(model, FAMILIES["qwen3"], method_of("norms"), head=False)
    kinds = {name.rpartition(".")[0].rpartition(".")[2] for name in trained_names(model)}
    assert kinds == {"input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "norm"}


def test_the_distances_of_mpnet_are_no_biases() -> None:
    names = trained_names(prepared("mpnet", "bitfit"))
    assert "mpnet.encoder.layer.0.attention.attn.q.bias" in names
    assert not [name for name in names if "relative_attention_bias" in name]


def test_head_is_selective_with_no_layer() -> None:
    model = prepare(FAMILIES["bert"], "full")
    choose_trained(model, FAMILIES["bert"], method_of("selective", trainable_layers=0), head=True)
    assert trained_names(model) == trained_names(prepared("bert", "head"))
    assert count_frozen_layers(model, FAMILIES["bert"]) == LAYERS
    head, no_layer, two_layers = (
        RunConfig.from_settings(**more).training.learning_rate
        for more in ({"method": "head"}, {"method": "selective", "trainable_layers": 0}, {"method": "selective"})
    )
    assert head == no_layer != two_layers


def test_an_encoder_without_biases_is_refused() -> None:
    line = refusal_of(check_method, tiny_model("llama"), FAMILIES["llama"], method_of("bitfit"), "some/llama")
    assert line == (
        "--method bitfit: the encoder of some/llama, of type 'llama', has no biases: use --method head, which trains"
        " the head alone, or --method lora"
    )


# --- the efficient path


@FAMILY
@STEPS
@PARTIAL
def test_logits_and_gradients_equal_those_of_hugging_face(family: ModelFamily, method: str, on_cpu: bool) -> None:
    model = prepared(family.model_type, method)
    ids, mask, labels = batch(family, padded=True)
    ours = classify(model, family, ids, mask, torch.float32, on_cpu=on_cpu)
    assert_equal_those_of_hugging_face(model, ours, ids, mask, labels)


@PARTIAL
def test_bf16_is_as_good_as_autocast(method: str) -> None:
    family = FAMILIES["distilbert"]
    model = prepared("distilbert", method)
    batches = [batch(family, padded=True, seed=seed) for seed in range(9)]
    assert_as_good([low_precision_errors(model, family, *inputs, torch.bfloat16) for inputs in batches])


def test_biases_alone_keep_no_weight_and_no_wide_activation_for_backward() -> None:
    family = FAMILIES["distilbert"]
    ids, mask, _ = batch(family, padded=False)
    sizes = {}
    for method in ("bitfit", "full"):
        with saved_tensors() as saved:
            classify(prepared("distilbert", method), family, ids, mask, torch.float32)
        sizes[method] = sum(tensor.numel() for tensor in {t.data_ptr(): t for t in saved}.values())
    assert sizes["bitfit"] < 0.8 * sizes["full"]
