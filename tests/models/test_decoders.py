"""A decoder's logits: of the last real token, whatever pads, and its tokenizer's padding token."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from finetuning.models.attention import Attention
from finetuning.models.base_model import load_tokenizer, read_base_model
from finetuning.models.classifier import Classifier
from finetuning.models.families import FAMILIES
from finetuning.models.norms import Norms
from finetuning.models.rows import Rows
from tests.common import refusal_of
from tests.tiny_models import save_tokenizer, tiny_model

DECODERS = [name for name, family in FAMILIES.items() if family.last_token]
END = 0  # of text, and what pads


@torch.no_grad()
@pytest.mark.parametrize("model_type", DECODERS)
def test_a_decoder_reads_the_last_real_token(model_type: str) -> None:
    """Also if a text ends with the token that pads. Hugging Face's classifier, without padding, is the reference."""
    model = tiny_model(model_type)
    texts = torch.randint(5, 300, (3, 12), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([12, 7, 9])
    mask = (torch.arange(12) < lengths[:, None]).long()
    texts[1, 6] = texts[0, 11] = END
    expected = torch.cat([model(input_ids=text[None, :n]).logits for text, n in zip(texts, lengths, strict=True)])
    classifier = Classifier(model, FAMILIES[model_type], torch.float32, efficient=True)
    torch.testing.assert_close(classifier(texts * mask + END * (1 - mask), mask), expected)
    model.config.pad_token_id = END
    theirs = model(input_ids=texts * mask, attention_mask=mask).logits
    assert (theirs - expected).abs().amax(1).gt(1e-3).tolist() == [True, True, False], "the reason for the own code"


def test_a_tokenizer_without_a_padding_token_pads_with_its_end_of_text(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)
    save_tokenizer(tmp_path, decoder=True)
    base = read_base_model("decoder", tmp_path)
    assert load_tokenizer(base).pad_token == "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")).save_pretrained(tmp_path)
    assert "needs a fast tokenizer with a token for padding or end of text" in refusal_of(load_tokenizer, base)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers makes an empty one, which reads every text as unknown tokens."""
    tiny_model("bert").save_pretrained(tmp_path)
    base = read_base_model("FOLDER", tmp_path)
    assert "FOLDER: has no tokenizer: needs one of tokenizer.json, vocab" in refusal_of(load_tokenizer, base)
    (tmp_path / "spm.model").touch()
    monkeypatch.setattr("finetuning.models.base_files.find_spec", lambda _: None)
    assert "needs a package: pip install sentencepiece protobuf" in refusal_of(load_tokenizer, base)


@pytest.mark.parametrize(("dtype", "common"), [(torch.bfloat16, 100), (torch.float16, 100), (torch.float16, 6000)])
def test_the_last_layer_keeps_what_tells_tokens_apart(dtype: torch.dtype, common: float) -> None:
    """Scores of one token, of which all tokens share a large part, as of Qwen2's keys with their bias."""
    model, family = tiny_model("qwen2"), FAMILIES["qwen2"]
    q, k, v = torch.randn(3, 2, 40, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    q, shift = q[:, :1], q[:, :1].float()
    k = (k + (common * 32**0.5 * shift / shift.square().sum(-1, keepdim=True))).to(dtype)
    norms = Norms(family.rms, family.norm_offset, dtype, on_cpu=True)
    attention = Attention(model, family, norms, Rows(2, 40, on_cpu=True), padding=None, places=None)
    attention.width = 32
    expected = torch.softmax(q.double() @ k.double().mT * 32**-0.5, -1) @ v.double()
    found = attention.attend(q, k, v, None)
    assert (found - expected).norm() < 0.01 * expected.norm()
