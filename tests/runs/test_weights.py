# mypy: disable-error-code="union-attr,arg-type,operator"
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

from finetuning.config import RunConfig
from finetuning.models.classifier import Classifier
from finetuning.models.families import FAMILIES
from finetuning.models.lora import lora_modules
from finetuning.runs import weights
from finetuning.runs.files import ADAPTER, ADAPTER_CONFIG, TRAINED_WEIGHTS
from finetuning.runs.weights import adapter_config, load_trained, peft_name
from finetuning.settings import LoRASettings
from tests import small_classifiers
from tests.common import CORE, LAYERS, Patch, check_refusal, each_once, some
from tests.small_classifiers import batch, fill, in_peft, logits_of, save


def build(folder: Path, seed: int, **settings: object) -> tuple[Classifier, RunConfig]:
    config = RunConfig.from_settings(model_name=str(folder), **settings)
    return small_classifiers.build(folder, seed=seed, **settings), config


def trained(folder: Path, directory: Path, **settings: object) -> tuple[Classifier, RunConfig]:
    """A classifier that is away from its beginning, and saved in a directory."""
    classifier, config = build(folder, 0, **settings)
    fill(classifier)
    directory.mkdir(exist_ok=True)
    save(directory, classifier, config)
    return classifier, config


def lora_settings(**settings: object) -> LoRASettings:
    return some(RunConfig.from_settings(**settings).lora)


@torch.no_grad()
def logits(classifier: Classifier) -> torch.Tensor:
    return classifier(*batch())


ALL_BUT_HEAD: dict[str, object] = {"lora_r": 4}  # the default linears
QUERY_VALUE: dict[str, object] = {"lora_key": False, "lora_projection": False, "lora_mlp": False}
METHODS: dict[str, dict[str, object]] = {
    "lora": QUERY_VALUE,
    "lora_all": ALL_BUT_HEAD,
    "lora_head": {"lora_head": True},
    "q_lora": {"q_lora": True},
    "dora": {"lora_variant": "dora"},
    "pissa": {"lora_variant": "pissa"},
    "full": {"method": "full"},
    "selective": {"method": "selective", "trainable_layers": 1},
    "head_alone": {"method": "head"},
    "bitfit": {"method": "bitfit"},
    "norms": {"method": "norms"},
}


@pytest.mark.parametrize(
    ("model_type", "method"),
    each_once(CORE, ["lora", "lora_all", "q_lora", "dora", "pissa"]),  # others: test_every_family.py
)
def test_saved_weights_make_the_same_classifier_again(
    bases: dict[str, Path], tmp_path: Path, model_type: str, method: str
) -> None:
    classifier, config = trained(bases[model_type], tmp_path, **METHODS[method])
    assert (tmp_path / (ADAPTER if config.method.method == "lora" else TRAINED_WEIGHTS)).exists()
    fresh, _ = build(bases[model_type], 1, **METHODS[method])
    expected = logits(classifier)
    assert (logits(fresh) - expected).abs().max() > 0.01
    load_trained(tmp_path, fresh, config.lora is not None)
    assert torch.equal(logits(fresh), expected)


@pytest.mark.parametrize("model_type", CORE)
def test_only_what_was_trained_is_saved(bases: dict[str, Path], tmp_path: Path, model_type: str) -> None:
    sizes = {}
    for method in METHODS:
        classifier, config = build(bases[model_type], 0, **METHODS[method])
        path = save(tmp_path, classifier, config)
        tensors = load_file(path)
        assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
        sizes[method] = sum(tensor.numel() for tensor in tensors.values())
        named = classifier.named_parameters()
        start = sum(p.numel() for name, p in named if name.endswith(("start_A", "start_B")))  # of PiSSA
        head = sum(p.numel() for _, p in classifier.family.head_parameters(classifier.model) if not p.requires_grad)
        trained = sum(p.numel() for p in classifier.parameters() if p.requires_grad)
        assert sizes[method] == trained + start + head
        assert bool(start) == (method == "pissa")
    assert sizes["head_alone"] < sizes["norms"] < sizes["bitfit"] < sizes["lora"] < sizes["selective"] < sizes["full"]


def test_names_in_an_adapter_are_those_of_peft(bases: dict[str, Path], tmp_path: Path) -> None:
    assert peft_name("a.q_lin.lora.lora_A", lora=True) == "base_model.model.a.q_lin.lora_A.weight"
    assert peft_name("a.q_lin.lora.lora_B", lora=True) == "base_model.model.a.q_lin.lora_B.weight"
    assert peft_name("classifier.linear.bias", lora=True) == "base_model.model.classifier.base_layer.bias"
    assert peft_name("classifier.bias", lora=True) == "base_model.model.classifier.bias"
    assert peft_name("classifier.bias", lora=False) == "classifier.bias"
    classifier, config = build(bases["distilbert"], 0, **QUERY_VALUE | {"lora_value": False, "lora_r": 3})
    tensors = load_file(save(tmp_path, classifier, config))
    layers = [f"base_model.model.distilbert.transformer.layer.{i}.attention.q_lin" for i in range(LAYERS)]
    expected = {f"{layer}.lora_{matrix}.weight" for layer in layers for matrix in "AB"}
    head = {f"base_model.model.{n}.{p}" for n in ("pre_classifier", "classifier") for p in ("weight", "bias")}
    assert set(tensors) == expected | head
    assert tensors[f"{layers[0]}.lora_A.weight"].shape == (3, 32)  # (r, in)
    assert tensors[f"{layers[0]}.lora_B.weight"].shape == (32, 3)  # (out, r)


def test_adapter_config_says_what_peft_reads(bases: dict[str, Path], tmp_path: Path) -> None:
    settings = {"lora_r": 4, "lora_alpha": 2.0, "lora_dropout": 0.25, "lora_value": False}
    classifier, config = build(bases["bert"], 0, **QUERY_VALUE | settings)
    save(tmp_path, classifier, config)
    stored = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    targets = [f"bert.encoder.layer.{i}.attention.self.query" for i in range(LAYERS)]
    assert stored["target_modules"] == targets
    assert (stored["peft_type"], stored["task_type"], stored["bias"]) == ("LORA", "SEQ_CLS", "none")
    assert (stored["r"], stored["lora_alpha"], stored["lora_dropout"]) == (4, 2.0, 0.25)
    assert stored["base_model_name_or_path"] == str(bases["bert"])
    assert stored["modules_to_save"] == ["bert.pooler.dense", "classifier"]
    assert stored["inference_mode"] is True

    def scale(**settings: object) -> float:
        written = adapter_config(lora_settings(lora_r=4, lora_alpha=2.0, **settings), "base", {}, [])
        return written["lora_alpha"] / (math.sqrt(written["r"]) if written["use_rslora"] else written["r"])

    assert scale() == 0.5
    assert scale(lora_scaling="rslora") == 1.0
    assert scale(lora_scaling="raw") == 2.0
    roberta = adapter_config(lora_settings(), "base", {}, FAMILIES["roberta"].head)
    assert roberta["modules_to_save"] == ["classifier"]
    on_head = adapter_config(lora_settings(lora_head=True), "base", {"classifier": (8, 16.0)}, ["classifier"])
    assert (on_head["task_type"], on_head["modules_to_save"]) == (None, None)


def logits_in_peft(folder: Path, adapter: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of PEFT's model without its adapter, and with it."""
    torch.manual_seed(11)  # of the head that is drawn anew
    model = in_peft(folder, adapter)
    with model.disable_adapter():
        before = logits_of(model)
    return before, logits_of(model)


IN_PEFT: list[dict[str, object]] = [
    {"lora_head": True},  # for each family, whose heads differ; without it: test_every_family.py
    *(ALL_BUT_HEAD | {"lora_alpha": 3.0, "lora_scaling": scaling} for scaling in ("standard", "rslora", "raw")),
]


@pytest.mark.parametrize(("model_type", "settings"), each_once(CORE, IN_PEFT))
def test_an_adapter_loads_in_peft(
    bases: dict[str, Path], tmp_path: Path, model_type: str, settings: dict[str, object]
) -> None:
    classifier, _ = trained(bases[model_type], tmp_path, **settings)
    base, ours = logits_in_peft(bases[model_type], tmp_path)
    expected = logits(classifier)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert (ours - base).abs().max() > 0.05
    # and not through the head alone: without the matrices the logits are others
    for _, module in lora_modules(classifier.model):
        module.lora.lora_B.data.zero_()
    assert (logits(classifier) - expected).abs().max() > 0.01


def test_an_adapter_on_more_linears_than_peft_lists_one_by_one(tmp_path: Path) -> None:
    """PEFT shortens a list of twenty names or more to endings, which must not reach into other layers."""
    folder, adapter = tmp_path / "base", tmp_path / "adapter"
    shape = {"hidden_size": 32, "num_hidden_layers": 12, "num_attention_heads": 4, "intermediate_size": 64}
    BertForSequenceClassification(BertConfig(max_position_embeddings=64, **shape)).save_pretrained(folder)
    classifier, _ = trained(folder, adapter, lora_layers="1,10-11,5", **ALL_BUT_HEAD)
    assert len(json.loads((adapter / ADAPTER_CONFIG).read_text())["target_modules"]) == 4 * 6
    base, ours = logits_in_peft(folder, adapter)
    torch.testing.assert_close(ours, logits(classifier), rtol=1e-4, atol=1e-5)
    assert (ours - base).abs().max() > 0.05


def test_a_damaged_or_foreign_file_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    classifier, config = build(bases["distilbert"], 0)

    def refused(words: str, **settings: object) -> None:
        other, other_config = build(bases["distilbert"], 1, **settings)
        before = {name: p.detach().clone() for name, p in other.saved_parameters().items()}
        line = check_refusal(words, load_trained, tmp_path, other, other_config.lora is not None)
        assert ADAPTER in line or TRAINED_WEIGHTS in line
        assert all(torch.equal(p, before[name]) for name, p in other.saved_parameters().items())

    refused("cannot be read")
    path = save(tmp_path, classifier, config)
    refused("cannot be read", method="full")
    refused("does not contain the weights of this run", lora_key=False)
    refused("does not contain the weights of this run", lora_value=False)
    refused(r"has shape \(8, 32\), must be \(4, 32\)", lora_r=4)
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:5], b"", b"\xff" * 64):
        path.write_bytes(damaged)
        refused("cannot be read")


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_fused_linears_keep_their_scaling(monkeypatch: Patch, scaling: str) -> None:
    targets = {"X.Wqkv.query": (4, 2.0), "X.Wqkv.value": (4, 2.0)}
    split = {"X.Wqkv": {"query": 8, "key": 8, "value": 8}}
    settings = lora_settings(lora_r=4, lora_alpha=2.0, lora_scaling=scaling)
    written = weights.adapter_config(settings, "base", targets, [], split)
    rank, alpha = written["rank_pattern"]["X.Wqkv"], written["alpha_pattern"]["X.Wqkv"]
    assert alpha / rank ** (0.5 if scaling == "rslora" else 1) == pytest.approx(1.0 if scaling == "rslora" else 0.5)
    B = torch.block_diag(torch.ones(8, 4), torch.empty(8, 0), torch.ones(8, 4))
    monkeypatch.setattr(weights, "_read_tensors", lambda _: {"base_model.model.X.Wqkv.lora_B.weight": B})
    adapter: Any = SimpleNamespace(folder=Path(), rank=4, scaling=scaling, linears={"X.Wqkv": (rank, alpha)})
    found = weights.separate_linears(adapter, {"Wqkv": ("query", "key", "value")})
    assert list(found) == list(targets)
    assert [rank for rank, _ in found.values()] == [4, 4]
    assert [alpha for _, alpha in found.values()] == pytest.approx([2.0, 2.0])
