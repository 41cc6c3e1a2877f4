"""Tokens of pairs of texts; those of single texts are tested in tests/test_local_dataset_utilities.py."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import RobertaProcessing, TemplateProcessing
from transformers import AutoTokenizer

from finetuning.data import tokens as module
from finetuning.data.tokens import cached_tokens, encode_pairs
from finetuning.errors import UserError
from finetuning.settings import DataSettings
from finetuning.storage import sum_holds
from tests.conftest import packaged_folder

LENGTHS = [(1, 1), (3, 3), (2, 40), (40, 2), (9, 8), (8, 9), (40, 40), (41, 40), (7, 41), (1, 200)]
TEXTS = [" ".join(str(i) for i in range(n)) for n, _ in LENGTHS]  # each number below 200 is one token
PAIRS = [" ".join(str(i) for i in range(300, 300 + n)) for _, n in LENGTHS]


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(packaged_folder())


def like_roberta(tokenizer: Any) -> Any:
    """The packaged tokenizer with RoBERTa's two separators and without token types."""
    backend = tokenizer.backend_tokenizer
    backend.post_processor = RobertaProcessing(("[SEP]", 102), ("[CLS]", 101))
    return tokenizer


def sequences(tokens: np.ndarray, offsets: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(tokens, offsets[1:-1])]


@pytest.mark.parametrize("max_length", [8, 15, 16, 21, 64, 128, 300])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_pairs_are_those_of_the_tokenizer(tokenizer: Any, kind: str, max_length: int) -> None:
    tokenizer = tokenizer if kind == "bert" else like_roberta(tokenizer)
    data = DataSettings(max_length=max_length, truncation="head")
    tokens, offsets, second_positions = encode_pairs(TEXTS, PAIRS, tokenizer, data)
    expected = tokenizer(
        TEXTS, PAIRS, truncation="longest_first", max_length=max_length, padding=False, return_token_type_ids=True
    )
    assert sequences(tokens, offsets) == expected["input_ids"]
    if kind == "roberta":
        assert second_positions is None
    else:
        assert second_positions is not None
        positions = zip(np.diff(offsets), second_positions, strict=True)
        ours = [(np.arange(n) >= s).astype(int).tolist() for n, s in positions]
        assert ours == expected["token_type_ids"]


def test_a_cut_pair_keeps_start_and_end_of_both_texts(tokenizer: Any) -> None:
    tokens, offsets, second_positions = encode_pairs(TEXTS, PAIRS, tokenizer, DataSettings(max_length=23))
    a, b = (tokenizer(texts[6], add_special_tokens=False)["input_ids"] for texts in (TEXTS, PAIRS))  # 40 tokens each
    assert sequences(tokens, offsets)[6] == [101, *a[:2], *a[-8:], 102, *b[:2], *b[-8:], 102]
    assert second_positions is not None
    assert second_positions[6] == 12


def test_a_pair_that_leaves_no_room_is_refused(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] [CLS] [CLS] $A [SEP] [SEP] $B:1 [SEP] [SEP]",
        special_tokens=[("[CLS]", 101), ("[SEP]", 102)],
    )  # fmt: skip
    encode_pairs(TEXTS, PAIRS, tokenizer, DataSettings(max_length=9))
    with pytest.raises(
        UserError, match=r"^--max_length 8: must be at least 9 for pairs of texts, because a pair has 7"
    ):
        encode_pairs(TEXTS, PAIRS, tokenizer, DataSettings(max_length=8))


def test_tokens_removed_while_they_are_read_are_made_again(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataSettings(max_length=31)
    first = cached_tokens(TEXTS, tokenizer, data, "first")

    def removed_after_the_check(path: Path) -> bool:
        assert sum_holds(path)
        path.unlink()
        return True

    monkeypatch.setattr(module, "sum_holds", removed_after_the_check)
    np.testing.assert_array_equal(cached_tokens(TEXTS, tokenizer, data, "again")[0], first[0])


def test_the_cache_tells_pairs_from_single_texts(tokenizer: Any) -> None:
    data = DataSettings(max_length=32)
    first, again = (cached_tokens(TEXTS, tokenizer, data, "pairs", PAIRS) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    tokens, _, second_positions = cached_tokens(TEXTS, tokenizer, data, "single")
    assert second_positions is None
    assert len(tokens) < len(first[0])
    swapped = cached_tokens(PAIRS, tokenizer, data, "swapped", TEXTS)
    assert not np.array_equal(swapped[0], first[0])
