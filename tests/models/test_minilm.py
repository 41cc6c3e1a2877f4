# mypy: disable-error-code="union-attr,arg-type"
"""The packaged MiniLM as what it is: a BERT with the pooler and the token types that its file has."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import BertForSequenceClassification

from finetuning.config import RunConfig
from finetuning.models.classifier import Classifier
from finetuning.settings import PACKAGED_BERT
from local_model_utilities import find_base_model, load_tokenizer
from tests.common import needs_int8, packaged_folder
from tests.models.conftest import assert_same
from tests.small_classifiers import build

PAIRS = ["A film that nobody should miss.", "No."], ["It is worth seeing, says the writer.", "It is bad."]
LABELS = torch.tensor([1, 0])
PACKAGED = Path(PACKAGED_BERT)


@pytest.fixture(scope="module")
def tokens() -> dict[str, Tensor]:
    tokenizer = load_tokenizer(find_base_model(RunConfig.from_settings(model_name=PACKAGED_BERT)))
    return dict(tokenizer(*PAIRS, padding=True, return_tensors="pt"))


def logits(classifier: Classifier, tokens: dict[str, Tensor], typed: bool = True) -> Tensor:
    types = tokens["token_type_ids"] if typed else None
    return classifier(tokens["input_ids"], tokens["attention_mask"], token_types=types)


def test_logits_and_gradients_equal_those_of_hugging_face(tokens: dict[str, Tensor]) -> None:
    ours = build(PACKAGED, method="full")
    assert ours.efficient
    stored = load_file(packaged_folder() / "model.safetensors")
    assert torch.equal(ours.model.bert.pooler.dense.weight, stored["pooler.dense.weight"]), "not drawn anew"
    theirs = BertForSequenceClassification.from_pretrained(packaged_folder(), num_labels=2).eval()
    theirs.classifier.load_state_dict(ours.model.classifier.state_dict())
    found, expected = logits(ours, tokens), theirs(**tokens).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (logits(ours, tokens, typed=False) - found).abs().max() > 1e-3, "types tell the texts of a pair apart"
    for answer in (found, expected):
        F.cross_entropy(answer, LABELS).backward()
    own, reference = ({n: p.grad for n, p in model.named_parameters()} for model in (ours.model, theirs))
    assert_same(own, reference, floor=1e-8)


@pytest.mark.parametrize("method", ["lora", "head"])
def test_the_pooler_is_a_part_of_the_head(method: str) -> None:
    trained = {name for name, p in build(PACKAGED, method=method).model.named_parameters() if p.requires_grad}
    head = {f"{name}.{kind}" for name in ("bert.pooler.dense", "classifier") for kind in ("weight", "bias")}
    assert {name for name in trained if "lora_" not in name} == head


@pytest.mark.parametrize(
    "settings",
    [{}, {"q_lora": True}, pytest.param({"precision": "int8"}, marks=needs_int8), {"efficient": False}],
    ids=["bf16", "nf4", "int8", "plain"],
)
def test_other_precisions(tokens: dict[str, Tensor], settings: dict[str, Any]) -> None:
    exact, rounded = build(PACKAGED, method="head"), build(PACKAGED, torch.bfloat16, **settings)
    with torch.no_grad():
        expected, found = logits(exact, tokens), logits(rounded, tokens)
    assert 0 < (found - expected).abs().max() < 0.15 * expected.abs().max()
