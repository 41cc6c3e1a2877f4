# mypy: disable-error-code="union-attr,arg-type,operator"
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from finetuning.config import RunConfig
from finetuning.export.plain import DTYPES, plain_model, write_model, write_tokenizer
from finetuning.models.lora import lora_modules
from local_model_utilities import build_classifier, find_base_model, load_tokenizer
from tests.common import needs_int8, packaged_folder, refusal_of
from tests.runs.test_weights import ALL_BUT_HEAD, METHODS, logits
from tests.small_classifiers import NAMES, build, built_and_filled, fill, logits_of

CASES = {name: METHODS[name] for name in ("lora", "lora_all", "lora_head", "q_lora", "dora", "pissa", "full")} | {
    "rslora": ALL_BUT_HEAD | {"lora_scaling": "rslora"},
    "raw": ALL_BUT_HEAD | {"lora_scaling": "raw", "lora_alpha": 2.0},
}


def loaded_logits(folder: Path) -> torch.Tensor:
    """What Transformers computes from the folder."""
    return logits_of(AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval())


@pytest.mark.parametrize(
    ("model_type", "case"), [*product(["distilbert"], CASES), *product(["bert", "roberta"], ["lora_all", "full"])]
)
def test_transformers_loads_what_the_run_computed(
    bases: dict[str, Path], tmp_path: Path, model_type: str, case: str
) -> None:
    classifier = build(bases[model_type], **CASES[case])
    classifier.model.config.update({"windows": {"windows": 4}, "threshold": 0.2, "text_pairs": True})  # of its base
    untrained = logits(classifier)
    fill(classifier)
    expected = logits(classifier)  # not merged, and on the efficient path
    model = plain_model(classifier, 0)
    assert {type(module).__name__ for module in model.modules()} & {"LinearWithLoRA", "FourBitLinear"} == set()
    write_model(tmp_path, model, torch.float32)
    found = loaded_logits(tmp_path)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (expected - untrained).abs().max() > 0.05
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path).config
    assert list(config.id2label.values()) == NAMES
    assert config.problem_type == "single_label_classification"
    assert not {"windows", "threshold", "text_pairs", "positive_label"} & set(config.to_dict())


@needs_int8
def test_an_8_bit_base_becomes_the_weights_that_training_saw(bases: dict[str, Path], tmp_path: Path) -> None:
    classifier = built_and_filled(bases["bert"], **ALL_BUT_HEAD, precision="int8")
    linear = classifier.model.get_submodule("bert.encoder.layer.1.output.dense")
    weight = linear.merged_weight()
    expected = logits(classifier)
    model = plain_model(classifier, 0)
    torch.testing.assert_close(model.get_submodule("bert.encoder.layer.1.output.dense").weight, weight)
    write_model(tmp_path, model, torch.float32)
    torch.testing.assert_close(loaded_logits(tmp_path), expected, rtol=0.05, atol=0.05)


@torch.no_grad()
@pytest.mark.parametrize("q_lora", [False, True], ids=["lora", "q_lora"])
@pytest.mark.parametrize("model_type", ["albert", "deberta-v2", "modernbert", "gpt2", "qwen3"])
def test_families_without_efficient_path(folder_of: Any, tmp_path: Path, model_type: str, q_lora: bool) -> None:
    name = str(folder_of(model_type))
    config = RunConfig.from_settings(model_name=name, max_length=16, lora_key=True, lora_mlp=True, q_lora=q_lora)
    found = find_base_model(config)
    classifier = build_classifier(config, found, NAMES, torch.float32).eval()
    pad_id = int(load_tokenizer(found).pad_token_id)
    ids = torch.randint(5, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, 7:], mask[1, 7:] = pad_id, 0
    untrained = classifier(ids, mask)
    for _, module in lora_modules(classifier.model):
        torch.nn.init.normal_(module.lora.lora_B, std=0.1)
    expected = classifier(ids, mask)
    write_model(tmp_path / "out", plain_model(classifier, pad_id), torch.float32)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    torch.testing.assert_close(loaded(ids, attention_mask=mask).logits, expected, rtol=0, atol=1e-4)
    assert (expected - untrained).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_weights_in_half_precision(bases: dict[str, Path], tmp_path: Path, dtype: str) -> None:
    classifier = built_and_filled(bases["distilbert"])
    before = logits(classifier)
    model = plain_model(classifier, 0)
    write_model(tmp_path, model, DTYPES[dtype])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    stored = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert {p.dtype for p in stored.parameters()} == {DTYPES[dtype]}
    rounded = logits_of(model)
    torch.testing.assert_close(loaded_logits(tmp_path), rounded, rtol=0, atol=1e-5)
    assert 1e-6 < (rounded - before).abs().max() < 0.2


def test_a_weight_that_is_not_a_number_is_refused(bases: dict[str, Path]) -> None:
    classifier = build(bases["bert"], lora_mlp=False)
    weight = classifier.model.get_submodule("bert.encoder.layer.1.output.dense").weight
    weight.data[2, 3] = float("nan")
    assert "bert.encoder.layer.1.output.dense.weight has values that are not" in refusal_of(plain_model, classifier, 0)


def test_a_full_disk_is_the_systems_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        write_tokenizer(tmp_path, AutoTokenizer.from_pretrained(packaged_folder()), max_length=20)


def test_the_tokenizer_cuts_where_the_run_did(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(packaged_folder())  # its own file cuts and pads at 128
    tokenizer.truncation_side = "left"  # as a base model's file may say
    write_tokenizer(tmp_path, tokenizer, max_length=20)
    assert AutoTokenizer.from_pretrained(tmp_path).truncation_side == "right"
    stored = AutoTokenizer.from_pretrained(tmp_path)
    assert stored.model_max_length == 20
    assert len(stored("film " * 300, truncation=True)["input_ids"]) == 20
    assert len(stored("film", truncation=True)["input_ids"]) == 3
    assert np.array_equal(
        stored(["a film that", "moved me"], truncation=True)["input_ids"][1], tokenizer("moved me")["input_ids"]
    )
