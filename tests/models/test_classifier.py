"""The classifier as a whole: what it takes from a batch; its forward is tested in test_encoder.py."""

from pathlib import Path

import numpy as np
import pytest
import torch

from finetuning.config import RunConfig
from finetuning.data.batches import evaluation_loader
from finetuning.data.tokens import encode, encode_pairs
from finetuning.models.classifier import SHORT, Classifier
from finetuning.models.families import FAMILIES
from local_model_utilities import build_classifier, find_base_model, load_tokenizer
from tests.common import CORE
from tests.tiny_models import tiny_model

TEXTS = ["a wonderful and moving film", "dull", "I loved every minute of this long story about a camera"]
PAIRS = ["it was tedious", "the plot, the music and the ending were all a waste of time", "superb"]


@pytest.mark.parametrize("efficient", [True, False], ids=["efficient", "plain"])
@pytest.mark.parametrize("family", sorted(CORE))
def test_logits_of_pairs_equal_those_of_hugging_face(
    family: str, efficient: bool, tiny_folders: dict[str, Path]
) -> None:
    config = RunConfig.from_settings(
        model_name=str(tiny_folders[family]), max_length=16, truncation="head", efficient=efficient
    )
    base = find_base_model(config)
    classifier = build_classifier(config, base, ["no", "maybe", "yes"], torch.float32).eval()
    tokenizer = load_tokenizer(base)
    rows = np.arange(len(TEXTS))
    split = encode_pairs(TEXTS, PAIRS, tokenizer, config.data).labelled(rows, rows)
    (batch,) = evaluation_loader(split, config.training, int(tokenizer.pad_token_id))
    theirs = tokenizer(TEXTS, PAIRS, truncation="longest_first", max_length=16, padding=True, return_tensors="pt")
    if getattr(classifier.model.config, "type_vocab_size", 0) < 2:  # the packaged tokenizer is BERT's
        theirs.pop("token_type_ids", None)
    with torch.no_grad():
        expected, found = classifier.model(**theirs).logits, classifier.logits(batch)
        plain = classifier.logits({name: value for name, value in batch.items() if name != "token_type_ids"})
    torch.testing.assert_close(found, expected[batch["rows"]], rtol=1e-5, atol=1e-5)
    assert torch.equal(found, plain) == (family != "bert")


def test_the_head_of_a_decoder_is_computed_in_fp32_inside_a_trainers_autocast(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    config = RunConfig.from_settings(model_name=str(tmp_path), max_length=16, efficient=False)
    classifier = build_classifier(config, find_base_model(config), ["no", "yes"], torch.bfloat16).eval()
    ids = torch.arange(1, 9).view(2, 4)
    with torch.no_grad():
        expected = classifier(ids, torch.ones_like(ids), None)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = classifier(ids, torch.ones_like(ids), None)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("pairs", [None, PAIRS], ids=["single", "pairs"])
@pytest.mark.parametrize(("family", "efficient"), [("bert", True), ("bert", False), ("distilbert", True)])
def test_logits_of_windows_are_pooled(
    family: str, efficient: bool, pairs: list[str] | None, pooling: str, tiny_folders: dict[str, Path]
) -> None:
    config = RunConfig.from_settings(
        model_name=str(tiny_folders[family]), max_length=12, windows=4, window_overlap=2, window_pooling=pooling,
        efficient=efficient, batch_tokens=128, method="selective", trainable_layers=1,
    )  # fmt: skip
    base = find_base_model(config)
    classifier = build_classifier(config, base, ["no", "maybe", "yes"], torch.float32)
    tokenizer = load_tokenizer(base)
    texts, rows = [TEXTS[0], TEXTS[1], " ".join(TEXTS * 2)], np.arange(3)
    split = encode(texts, pairs, tokenizer, config.data).labelled(rows, rows)
    assert split.windows is not None
    assert split.windows.max() > 1
    (batch,) = evaluation_loader(split, config.training, int(tokenizer.pad_token_id))
    expected = []
    for row in batch["rows"].tolist():
        ids = torch.from_numpy(split.sequence(row).reshape(split.windows[row], -1).astype(np.int64))
        types = {}
        if pairs is not None and family == "bert":
            assert split.second_positions is not None
            types = {
                "token_type_ids": (torch.arange(ids.shape[1]) >= split.second_positions[row]).long().expand_as(ids)
            }
        logits = classifier.model(input_ids=ids, **types).logits
        expected.append(logits.mean(0) if pooling == "mean" else logits.max(0).values)
    found = classifier.logits(batch)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)
    trained = [p for p in classifier.parameters() if p.requires_grad]
    weights = torch.tensor([[1.0, -2.0, 0.5]])
    ours, theirs = (torch.autograd.grad((values * weights).sum(), trained) for values in (found, torch.stack(expected)))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    if efficient:
        kept = classifier.frozen_outputs({"train": split}, 1.0)["train"]
        for _ in range(2):  # computed, then read
            torch.testing.assert_close(classifier.logits(batch, kept), found, rtol=1e-6, atol=1e-6)


def test_a_frozen_encoder_keeps_one_output_for_each_window(bert: Path) -> None:
    config = RunConfig.from_settings(model_name=str(bert), max_length=8, windows=3, method="head")
    base = find_base_model(config)
    classifier = build_classifier(config, base, ["no", "yes"], torch.float32)
    tokenizer, rows = load_tokenizer(base), np.arange(3)
    split = encode(TEXTS, None, tokenizer, config.data).labelled(rows, rows)
    assert split.windows is not None
    (batch,) = evaluation_loader(split, config.training, int(tokenizer.pad_token_id))
    kept = classifier.frozen_outputs({"train": split}, 1.0)["train"]
    assert len(kept.rows) == split.windows.sum() > 3
    expected = classifier.logits(batch)
    for _ in range(2):
        torch.testing.assert_close(classifier.logits(batch, kept), expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("efficient", [True, False], ids=["efficient", "plain"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_takes_the_token_types_that_its_model_has(family: str, efficient: bool) -> None:
    model = tiny_model(family)
    ids = torch.randint(5, 300, (1, 12), generator=torch.Generator().manual_seed(0))
    mask, types = torch.ones_like(ids), torch.tensor([[0] * 5 + [1] * 7])
    has_types = getattr(model.config, "type_vocab_size", 0) > 1
    expected = model(ids, attention_mask=mask, **({"token_type_ids": types} if has_types else {})).logits
    found = Classifier(model, FAMILIES[family], torch.float32, efficient)(ids, mask, token_types=types)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if has_types:
        assert (found - model(ids, attention_mask=mask).logits).abs().max() > 1e-4


@pytest.mark.parametrize("trains", [True, False])
def test_attention_of_short_texts_trains_by_the_plain_formula_and_gives_the_same_logits(trains: bool) -> None:
    model = tiny_model("modernbert")
    classifier = Classifier(model, FAMILIES["modernbert"], torch.float32, efficient=False)
    chosen = []
    for length in (SHORT, SHORT + 1, 8):
        ids = torch.randint(5, 300, (2, length), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[1, length // 2 :] = 0
        model.set_attn_implementation("sdpa")
        expected = model(ids, attention_mask=mask).logits
        with torch.set_grad_enabled(trains):
            torch.testing.assert_close(classifier(ids, mask), expected, rtol=1e-5, atol=1e-5)
        chosen.append(model.config._attn_implementation)
    assert chosen == (["eager", "sdpa", "eager"] if trains else ["sdpa"] * 3)
