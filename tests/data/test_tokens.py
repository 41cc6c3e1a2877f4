"""Tokens of single texts, of pairs and of windows, and their cache."""

import hashlib
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import RobertaProcessing, TemplateProcessing
from transformers import AutoTokenizer

from finetuning.config import RunConfig
from finetuning.data import tokens as module
from finetuning.data.texts import LabelledTexts, TextData
from finetuning.data.tokens import TokenizedSplit, cached_tokens, encode, encode_pairs, encode_texts
from finetuning.settings import DataSettings
from finetuning.storage import sum_holds
from local_dataset_utilities import tokenize
from tests.common import ROOT, Capture, Patch, check_refusal, packaged_folder, refusal_of, some
from tests.scripts import start_script


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(packaged_folder())


# --- single texts


def tokens_of(texts: list[str], tokenizer: Any, test: bool = True, **settings: Any) -> dict[str, TokenizedSplit]:
    """The tokens of data whose three splits have the same texts."""
    split = LabelledTexts(texts, np.arange(len(texts)) % 2, np.arange(len(texts)) + 5)
    data = TextData("here", ["a", "b"], {"train": split, "validation": split, "test": split}, 0)
    return tokenize(data, tokenizer, RunConfig.from_settings(**settings).data, test)


LONG = [f"word{i} is a number and so is {i}" for i in range(3)] + [" ".join(str(i) for i in range(400)), "short"]


@pytest.mark.parametrize("max_length", [8, 64, 128, 300, 512])
def test_head_equals_the_tokenizers_own_truncation(tokenizer: Any, max_length: int) -> None:
    """Also beyond 128, where this tokenizer's file would cut and pad by itself."""
    split = tokens_of(LONG, tokenizer, max_length=max_length, truncation="head")["train"]
    expected = tokenizer(LONG, truncation=True, max_length=max_length, padding=False)["input_ids"]
    assert [split.sequence(i).tolist() for i in range(len(split))] == expected
    assert split.lengths.max() == max_length if max_length < 400 else split.lengths.max() > 400
    assert split.tokens.dtype == np.int32
    assert split.offsets.dtype == np.int64
    assert split.rows.tolist() == [5, 6, 7, 8, 9]


def test_head_tail_keeps_a_quarter_of_the_beginning_and_the_end(tokenizer: Any) -> None:
    head, both = (
        tokens_of(LONG, tokenizer, max_length=66, truncation=truncation)["train"]
        for truncation in ("head", "head_tail")
    )
    whole = tokenizer(LONG[3], truncation=False, padding=False)["input_ids"]
    assert both.sequence(3).tolist() == whole[:17] + whole[-49:]
    for i in (0, 1, 2, 4):
        assert both.sequence(i).tolist() == head.sequence(i).tolist(), "texts that fit are left alone"


@pytest.fixture(scope="session")
def roberta() -> Any:
    """A RoBERTa tokenizer of single bytes: <s> and </s> around, as the pretrained ones have."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def test_roberta_special_tokens(roberta: Any) -> None:
    split = tokens_of(LONG, roberta, max_length=40)["train"]
    for i in range(len(split)):
        assert split.sequence(i)[0] == 0
        assert split.sequence(i)[-1] == 2
        assert split.lengths[i] <= 40
    whole = roberta(LONG[3])["input_ids"]
    assert split.sequence(3).tolist() == whole[:10] + whole[-30:]


@pytest.mark.usefixtures("cache")  # else they might not be tokenized
def test_long_texts_give_no_warning(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokens_of([LONG[3] * 3, "b"], tokenizer)
    assert "longer" not in caplog.text


def test_test_split_is_left_alone(tokenizer: Any) -> None:
    assert list(tokens_of(LONG, tokenizer, test=False)) == ["train", "validation"]
    assert list(tokens_of(LONG, tokenizer)) == ["train", "validation", "test"]


def test_tokens_are_kept_and_damaged_files_made_again(tokenizer: Any, cache: Path, capsys: Capture) -> None:
    first = tokens_of(LONG, tokenizer, max_length=32)["train"]
    assert "tokenizing train" in capsys.readouterr().err
    (path,) = (cache / "tokens").iterdir()
    tokens_of(LONG, tokenizer, max_length=32)
    assert capsys.readouterr().err == "", "no bar when nothing is done"
    good = path.read_bytes()
    for damaged in (b"", b"nonsense", good[: len(good) // 2], good[:100] + b"\xff\xff" + good[102:]):
        path.write_bytes(damaged)
        again = tokens_of(LONG, tokenizer, max_length=32)["train"]
        assert np.array_equal(again.tokens, first.tokens)
        assert np.array_equal(again.offsets, first.offsets)
        capsys.readouterr()
    tokens_of(LONG, tokenizer, max_length=33)
    tokens_of(LONG, tokenizer, max_length=32, truncation="head")
    for texts in (["a", "bc"], ["ab", "c"]):
        tokens_of(texts, tokenizer, max_length=32)
    assert len(list((cache / "tokens").iterdir())) == 5


def test_cache_that_cannot_be_written(tokenizer: Any, tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FINETUNE_LORA_CACHE", str(tmp_path / "file"))
    assert "FINETUNE_LORA_CACHE" in refusal_of(tokens_of, LONG, tokenizer)


def test_several_processes_at_once(tokenizer: Any, cache: Path, tmp_path: Path) -> None:
    script = tmp_path / "tokenize_texts.py"
    script.write_text(
        f"""import sys
sys.path.insert(0, {str(ROOT)!r})
from transformers import AutoTokenizer
from finetuning.data.tokens import cached_tokens
from finetuning.settings import DataSettings
tokenizer = AutoTokenizer.from_pretrained({str(packaged_folder())!r})
print(cached_tokens({LONG!r} * 200, tokenizer, DataSettings(), "tokenizing").tokens.sum())
"""
    )
    processes = [start_script(str(script), []) for _ in range(2)]
    shown = [process.communicate(timeout=300) for process in processes]
    found = tokens_of(LONG * 200, tokenizer)["train"].tokens.sum()
    assert [out for out, _ in shown] == [f"{found}\n"] * 2, shown
    assert [path.suffix for path in (cache / "tokens").iterdir()] == [".npz"]


# --- pairs

LENGTHS = [(1, 1), (3, 3), (2, 40), (40, 2), (9, 8), (8, 9), (40, 40), (41, 40), (7, 41), (1, 200)]
TEXTS = [" ".join(str(i) for i in range(n)) for n, _ in LENGTHS]  # each number below 200 is one token
PAIRS = [" ".join(str(i) for i in range(300, 300 + n)) for _, n in LENGTHS]


def sequences(tokens: np.ndarray, offsets: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(tokens, offsets[1:-1])]


@pytest.mark.parametrize("max_length", [8, 15, 16, 21, 64, 128, 300])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_pairs_are_those_of_the_tokenizer(tokenizer: Any, kind: str, max_length: int, monkeypatch: Patch) -> None:
    monkeypatch.setitem(os.environ, "TOKENIZERS_PARALLELISM", "")
    del os.environ["TOKENIZERS_PARALLELISM"]
    if kind == "roberta":  # two separators, and no token types
        tokenizer.backend_tokenizer.post_processor = RobertaProcessing(("[SEP]", 102), ("[CLS]", 101))
    data = DataSettings(max_length=max_length, truncation="head")
    tokens, offsets, second_positions, _ = encode_pairs(TEXTS, PAIRS, tokenizer, data)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    expected = tokenizer(
        TEXTS, PAIRS, truncation="longest_first", max_length=max_length, padding=False, return_token_type_ids=True
    )
    assert sequences(tokens, offsets) == expected["input_ids"]
    if kind == "roberta":
        assert second_positions is None
    else:
        positions = zip(np.diff(offsets), some(second_positions), strict=True)
        ours = [(np.arange(n) >= s).astype(int).tolist() for n, s in positions]
        assert ours == expected["token_type_ids"]


def test_a_cut_pair_keeps_start_and_end_of_both_texts(tokenizer: Any) -> None:
    tokens, offsets, second_positions, _ = encode_pairs(TEXTS, PAIRS, tokenizer, DataSettings(max_length=23))
    a, b = (tokenizer(texts[6], add_special_tokens=False)["input_ids"] for texts in (TEXTS, PAIRS))  # 40 tokens each
    assert sequences(tokens, offsets)[6] == [101, *a[:2], *a[-8:], 102, *b[:2], *b[-8:], 102]
    assert some(second_positions)[6] == 12


def test_a_pair_that_leaves_no_room_is_refused(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] [CLS] [CLS] $A [SEP] [SEP] $B:1 [SEP] [SEP]",
        special_tokens=[("[CLS]", 101), ("[SEP]", 102)],
    )  # fmt: skip
    encode_pairs(TEXTS, PAIRS, tokenizer, DataSettings(max_length=9))
    line = r"^--max_length 8: must be at least 9 for pairs of texts, because a pair has 7"
    check_refusal(line, encode_pairs, TEXTS, PAIRS, tokenizer, DataSettings(max_length=8))


def test_tokens_removed_while_they_are_read_are_made_again(tokenizer: Any, monkeypatch: Patch) -> None:
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
    text = " ".join(str(i) for i in range(40))
    tokens, _, _, windows = encode_texts([text], tokenizer, data)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    kept = ids[:4] + ids[-12:]
    assert some(windows).tolist() == [2]
    assert tokens.tolist() == [101, *kept[:8], 102, 101, *kept[8:], 102]


@pytest.mark.parametrize("swapped", [False, True])
def test_windows_of_a_pair_have_the_shorter_text_whole(tokenizer: Any, swapped: bool) -> None:
    data = DataSettings(max_length=23, windows=3, truncation="head")
    texts, pairs = (PAIRS, TEXTS) if swapped else (TEXTS, PAIRS)
    tokens, offsets, begins, windows = encode_pairs(texts, pairs, tokenizer, data)
    assert begins is not None
    assert some(windows).tolist() == [1, 1, 3, 3, 1, 1, 3, 3, 3, 3]
    a, b = (tokenizer(column[8], add_special_tokens=False)["input_ids"] for column in (texts, pairs))  # 7 and 41 tokens
    for i, window in enumerate(np.split(tokens, offsets[1:-1])[8].reshape(3, -1).tolist()):
        second = window[begins[8] :]
        first = window[: begins[8]]
        short, long = (second[:-1], first[1:-1]) if swapped else (first[1:-1], second[:-1])
        assert short == (b if swapped else a)
        assert long == (a if swapped else b)[[0, 13, 26][i] : [13, 26, 39][i]]  # 23 less 3 special tokens and 7


def test_an_overlap_that_leaves_no_room_is_refused(tokenizer: Any) -> None:
    data = DataSettings(max_length=20, windows=2, window_overlap=18)
    line = r"^--window_overlap 18: must be less than 18, the tokens of a text that a wind"
    check_refusal(line, encode, TEXTS, None, tokenizer, data)
    data = DataSettings(max_length=20, windows=2, window_overlap=9)
    check_refusal(r"^--window_overlap 9: must be less than 9, the tokens", encode, TEXTS, PAIRS, tokenizer, data)


def test_the_cache_keeps_windows(tokenizer: Any) -> None:
    data = DataSettings(max_length=20, windows=3, window_overlap=2)
    first, again = (cached_tokens(TEXTS, tokenizer, data, "windows") for _ in range(2))
    np.testing.assert_array_equal(some(first.windows), some(again.windows))
    assert cached_tokens(TEXTS, tokenizer, DataSettings(max_length=20), "one window").windows is None


def test_sequences_of_one_window_keep_the_hash_that_interrupted_runs_have() -> None:
    split = TokenizedSplit(np.arange(5, dtype=np.int32), np.array([0, 2, 5]), np.array([0, 1]), np.array([7, 8]))
    parts = [*(array.tobytes() for array in (split.tokens, split.offsets, split.labels, split.rows)), b""]
    expected = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    assert split.sha256 == expected
    assert replace(split, windows=np.array([2, 1])).sha256 != expected


def test_the_cache_tells_overlaps_apart(tokenizer: Any) -> None:
    data = DataSettings(max_length=20, windows=3, window_overlap=2)
    first = cached_tokens(TEXTS, tokenizer, data, "windows")
    other = cached_tokens(TEXTS, tokenizer, replace(data, window_overlap=6), "another overlap")
    assert not np.array_equal(first.tokens, other.tokens)


def test_types_may_begin_before_the_second_text(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] [SEP]:1 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 101), ("[SEP]", 102)],
    )  # fmt: skip
    _, offsets, begins, _ = encode_pairs(TEXTS, PAIRS, tokenizer, DataSettings(max_length=400))
    expected = tokenizer(TEXTS, PAIRS, truncation=False, padding=False, return_token_type_ids=True)["token_type_ids"]
    positions = zip(np.diff(offsets), some(begins), strict=True)
    assert [(np.arange(n) >= s).astype(int).tolist() for n, s in positions] == expected
