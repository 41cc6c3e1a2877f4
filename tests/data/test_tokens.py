"""Tokens of pairs of texts; those of single texts are tested in tests/test_local_dataset_utilities.py."""

import hashlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import RobertaProcessing, TemplateProcessing
from transformers import AutoTokenizer

from finetuning.data import tokens as module
from finetuning.data.tokens import TokenizedSplit, cached_tokens, encode, encode_pairs, encode_texts
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
    tokens, offsets, second_positions, _ = encode_pairs(TEXTS, PAIRS, tokenizer, data)
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
    tokens, offsets, second_positions, _ = encode_pairs(TEXTS, PAIRS, tokenizer, DataSettings(max_length=23))
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
    tokens, _, second_positions, _ = cached_tokens(TEXTS, tokenizer, data, "single")
    assert second_positions is None
    assert len(tokens) < len(first[0])
    swapped = cached_tokens(PAIRS, tokenizer, data, "swapped", TEXTS)
    assert not np.array_equal(swapped[0], first[0])


WINDOW_LENGTHS = [1, 5, 18, 19, 30, 36, 37, 60, 89, 90, 91, 200]


@pytest.mark.parametrize(("overlap", "windows"), [(0, 2), (0, 5), (6, 2), (6, 6), (17, 60)])
def test_windows_cover_a_text_evenly(tokenizer: Any, overlap: int, windows: int) -> None:
    data = DataSettings(max_length=20, truncation="head", windows=windows, window_overlap=overlap)
    texts = [" ".join(str(i) for i in range(n)) for n in WINDOW_LENGTHS]
    encoded = encode_texts(texts, tokenizer, data)
    assert encoded.windows is not None
    for length, text, ids, count in zip(
        WINDOW_LENGTHS, texts, np.split(encoded.tokens, encoded.offsets[1:-1]), encoded.windows, strict=True
    ):
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        reach = windows * (18 - overlap) + overlap  # two of the 20 tokens are special
        parts = ids.reshape(count, -1)  # all equally long
        assert parts.shape[1] <= 20
        assert count == max(1, -(-(min(length, reach) - overlap) // (18 - overlap))) <= windows, "as few as possible"
        assert (parts[:, 0] == 101).all()
        assert (parts[:, -1] == 102).all()
        starts = [whole.index(part[1]) for part in parts]
        assert [whole[s : s + parts.shape[1] - 2] for s in starts] == parts[:, 1:-1].tolist()
        kept = min(length, reach)
        assert starts[0] == 0
        assert starts[-1] + parts.shape[1] - 2 >= kept
        assert all(b - a <= parts.shape[1] - 2 - overlap for a, b in pairwise(starts))


def test_windows_of_a_longer_text_keep_its_start_and_its_end(tokenizer: Any) -> None:
    data = DataSettings(max_length=10, windows=2)
    (text,) = (" ".join(str(i) for i in range(40)),)
    tokens, _, _, windows = encode_texts([text], tokenizer, data)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    kept = ids[:4] + ids[-12:]
    assert windows is not None
    assert windows.tolist() == [2]
    assert tokens.tolist() == [101, *kept[:8], 102, 101, *kept[8:], 102]


@pytest.mark.parametrize("swapped", [False, True])
def test_windows_of_a_pair_have_the_shorter_text_whole(tokenizer: Any, swapped: bool) -> None:
    data = DataSettings(max_length=23, windows=3, truncation="head")
    texts, pairs = (PAIRS, TEXTS) if swapped else (TEXTS, PAIRS)
    tokens, offsets, begins, windows = encode_pairs(texts, pairs, tokenizer, data)
    assert begins is not None
    assert windows is not None
    assert windows.tolist() == [1, 1, 3, 3, 1, 1, 3, 3, 3, 3]
    a, b = (tokenizer(column[8], add_special_tokens=False)["input_ids"] for column in (texts, pairs))  # 7 and 41 tokens
    for i, window in enumerate(np.split(tokens, offsets[1:-1])[8].reshape(3, -1).tolist()):
        second = window[begins[8] :]
        first = window[: begins[8]]
        short, long = (second[:-1], first[1:-1]) if swapped else (first[1:-1], second[:-1])
        assert short == (b if swapped else a)
        assert long == (a if swapped else b)[[0, 13, 26][i] : [13, 26, 39][i]]  # 23 less 3 special tokens and 7


def test_an_overlap_that_leaves_no_room_is_refused(tokenizer: Any) -> None:
    data = DataSettings(max_length=20, windows=2, window_overlap=18)
    with pytest.raises(
        UserError, match=r"^--window_overlap 18: must be less than 18, the tokens of a text that a wind"
    ):
        encode(TEXTS, None, tokenizer, data)
    with pytest.raises(UserError, match=r"^--window_overlap 9: must be less than 9, the tokens"):
        encode(TEXTS, PAIRS, tokenizer, DataSettings(max_length=20, windows=2, window_overlap=9))


def test_the_cache_keeps_windows(tokenizer: Any) -> None:
    data = DataSettings(max_length=20, windows=3, window_overlap=2)
    first, again = (cached_tokens(TEXTS, tokenizer, data, "windows") for _ in range(2))
    assert first.windows is not None
    assert again.windows is not None
    np.testing.assert_array_equal(first.windows, again.windows)
    assert cached_tokens(TEXTS, tokenizer, DataSettings(max_length=20), "one window").windows is None


def test_sequences_of_one_window_keep_the_hash_that_interrupted_runs_have() -> None:
    split = TokenizedSplit(np.arange(5, dtype=np.int32), np.array([0, 2, 5]), np.array([0, 1]), np.array([7, 8]))
    parts = [*(array.tobytes() for array in (split.tokens, split.offsets, split.labels, split.rows)), b""]
    expected = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    assert split.sha256 == expected
    assert replace(split, windows=np.array([2, 1])).sha256 != expected
