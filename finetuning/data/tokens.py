"""Turns texts into token ids, cut to ``--max_length``, in one flat array. A cache keeps them."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from finetuning.errors import UserError
from finetuning.settings import DataSettings
from finetuning.storage import append_sum, cache_dir, sum_holds, write_atomically

FORMAT = 2  # of the files in the cache


@dataclass(frozen=True)
class TokenizedSplit:
    """Token sequences with their special tokens, one after another. The two texts of a pair are one sequence."""

    tokens: np.ndarray  # (all tokens,) int32
    offsets: np.ndarray  # (n + 1,) int64, the start of each sequence and the end of the last one
    labels: np.ndarray  # (n,) int64; multi-label (n, names) int8, 0 or 1
    rows: np.ndarray  # (n,) int64
    second_positions: np.ndarray | None = None  # (n,) int64, where token type 1 begins in each pair

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, (n,) int64."""
        return np.diff(self.offsets)

    @property
    def length_by_row(self) -> dict[int, int]:
        """Row in the source -> tokens of its sequence."""
        return dict(zip(self.rows.tolist(), self.lengths.tolist(), strict=True))

    @property
    def sha256(self) -> str:
        """A hash of everything that training and evaluation read."""
        arrays = (self.tokens, self.offsets, self.labels, self.rows, self.second_positions)
        parts = (b"" if array is None else array.tobytes() for array in arrays)
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()

    def sequence(self, i: int) -> np.ndarray:
        """A view of sequence ``i``, (length,) int32."""
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def taken(self, positions: np.ndarray) -> "TokenizedSplit":
        """The sequences at some positions."""
        tokens, offsets = _joined([self.sequence(i) for i in positions])
        begins = None if self.second_positions is None else self.second_positions[positions]
        return TokenizedSplit(tokens, offsets, self.labels[positions], self.rows[positions], begins)


def _tokens_key(texts: list[str], tokenizer: Any, data: DataSettings, pairs: list[str] | None) -> str:
    """A hash of everything that the tokens depend on."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # earlier calls change them, but they do not change our tokens
        backend.pop(state, None)
    digest = hashlib.blake2b(json.dumps([FORMAT, data.max_length, data.truncation, backend]).encode(), digest_size=16)
    for column in (texts, pairs) if pairs is not None else (texts,):
        encoded = [text.encode("utf-8", "surrogatepass") for text in column]
        digest.update(np.array([len(text) for text in encoded]).tobytes())
        digest.update(b"".join(encoded))
    return digest.hexdigest()


def encode_texts(
    texts: list[str], tokenizer: Any, data: DataSettings, progress: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of ``texts``, each text cut to ``max_length`` tokens including special tokens.

    ``head`` keeps the start of a long text. ``head_tail`` fills a quarter of the length from its start and the rest
    from its end (Sun et al. 2019, arXiv:1905.05583).

    Args:
        texts: at least one text.
        tokenizer: a fast tokenizer of transformers.
        data: ``max_length`` and ``truncation``.
        progress: title of the progress bar; ``None`` shows no bar.

    Returns:
        All sequences one after another, (all tokens,) int32, and their offsets, (n + 1,) int64.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # otherwise the library may use only one core
    probe = tokenizer("a", return_special_tokens_mask=True, truncation=False, padding=False)
    body = np.flatnonzero(np.array(probe["special_tokens_mask"]) == 0)
    prefix, suffix = probe["input_ids"][: body[0]], probe["input_ids"][body[-1] + 1 :]
    room = data.max_length - len(prefix) - len(suffix)
    sequences = [
        np.array([*prefix, *_cut(ids, room, data), *suffix], dtype=np.int32)
        for (ids,) in _plain_ids(tokenizer, progress, texts)
    ]
    return _joined(sequences)


def encode_pairs(
    texts: list[str], pairs: list[str], tokenizer: Any, data: DataSettings, progress: str | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Tokens of pairs of texts, joined as the tokenizer joins them, and cut to ``max_length`` tokens together.

    Tokens are taken from the longer text first, so that neither text vanishes (``longest_first`` in Hugging Face's
    tokenizers). ``truncation`` says which part of each text is kept, as in ``encode_texts``.

    Args:
        texts: the first text of each pair; at least one.
        pairs: the second texts, in the same order.
        tokenizer, data, progress: as in ``encode_texts``.

    Returns:
        Tokens and offsets as ``encode_texts``, and where token type 1 begins in each sequence, (n,) int64; ``None`` if
        the tokenizer gives all tokens the same type.

    Raises:
        UserError: ``max_length`` leaves no room for both texts.
    """
    probe = tokenizer("a", "b", return_token_type_ids=True, truncation=False, padding=False)
    owner, ids, types = np.array(probe.sequence_ids(), dtype=float), probe["input_ids"], probe["token_type_ids"]
    first, second = np.flatnonzero(owner == 0), np.flatnonzero(owner == 1)  # special tokens have no owner
    prefix, middle, suffix = ids[: first[0]], ids[first[-1] + 1 : second[0]], ids[second[-1] + 1 :]
    special = len(prefix) + len(middle) + len(suffix)
    room = data.max_length - special
    if room < 2:
        raise UserError(
            f"--max_length {data.max_length}: must be at least {special + 2} for pairs of texts, because a pair has"
            f" {special} special tokens"
        )
    sequences, begins = [], []
    for a, b in _plain_ids(tokenizer, progress, texts, pairs):
        shorter = min(len(a), len(b), room // 2)
        rooms = (shorter, room - shorter) if len(a) <= len(b) else (room - shorter, shorter)
        kept_a, kept_b = (_cut(text, kept, data) for text, kept in zip((a, b), rooms, strict=True))
        sequences.append(np.array([*prefix, *kept_a, *middle, *kept_b, *suffix], dtype=np.int32))
        begins.append(len(prefix) + len(kept_a) + len(middle))
    typed = 1 in types
    shift = types.index(1) - int(second[0]) if typed else 0
    return *_joined(sequences), np.array(begins) + shift if typed else None


def _plain_ids(tokenizer: Any, progress: str | None, *columns: list[str]) -> Iterator[tuple[list[int], ...]]:
    """For each row of the columns, the token ids of its texts, without special tokens and uncut."""
    total = len(columns[0])
    with tqdm(total=total, desc=progress, unit=" texts", mininterval=1, disable=progress is None) as bar:
        for start in range(0, total, 1000):
            batch = [
                tokenizer(
                    column[start : start + 1000],
                    add_special_tokens=False,
                    truncation=False,  # a tokenizer's file may set its own truncation and padding
                    padding=False,
                    return_attention_mask=False,
                    return_token_type_ids=False,
                    verbose=False,  # no warning about long texts, because they are cut later
                )["input_ids"]
                for column in columns
            ]
            yield from zip(*batch, strict=True)
            bar.update(len(batch[0]))


def _cut(ids: list[int], room: int, data: DataSettings) -> list[int]:
    """At most ``room`` tokens of a text: its start, or its start and its end."""
    head = room if data.truncation == "head" else room // 4
    return ids if len(ids) <= room else ids[:head] + ids[len(ids) - (room - head) :]


def _joined(sequences: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All sequences one after another, and their offsets."""
    lengths = [len(sequence) for sequence in sequences]
    return np.concatenate(sequences), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def cached_tokens(
    texts: list[str], tokenizer: Any, data: DataSettings, progress: str, pairs: list[str] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Like ``encode_pairs``, or ``encode_texts`` without ``pairs``, but reads the tokens from the cache.

    Tokens that are not in the cache, or damaged there, are made and written to it.

    Raises:
        UserError: the cache cannot be written, or as in ``encode_pairs``.
    """
    path = cache_dir() / "tokens" / f"{_tokens_key(texts, tokenizer, data, pairs)}.npz"
    if sum_holds(path):
        with suppress(OSError), path.open("rb") as file, np.load(file) as stored:  # it may have been removed meanwhile
            return stored["tokens"], stored["offsets"], stored.get("second_positions")
    arrays = encode(texts, pairs, tokenizer, data, progress)

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            named: dict[str, Any] = dict(zip(("tokens", "offsets", "second_positions"), arrays, strict=True))
            np.savez(file, **{name: array for name, array in named.items() if array is not None})
        append_sum(temporary)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save)
    except OSError as error:
        raise UserError(
            f"tokens cannot be stored in {path.parent} ({error}): set FINETUNE_LORA_CACHE to another folder"
        ) from error
    return arrays


def encode(
    texts: list[str], pairs: list[str] | None, tokenizer: Any, data: DataSettings, progress: str | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """``encode_pairs``, or ``encode_texts`` if there are no ``pairs``."""
    if pairs is not None:
        return encode_pairs(texts, pairs, tokenizer, data, progress)
    return *encode_texts(texts, tokenizer, data, progress), None
