"""Turns texts into token ids, cut to ``--max_length`` or to windows of that length. A cache keeps them."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from finetuning.errors import UserError
from finetuning.settings import CUTTING, DataSettings
from finetuning.storage import append_sum, cache_dir, sum_holds, write_atomically

FORMAT = 3  # of the files in the cache


class Encoded(NamedTuple):
    """Token sequences with their special tokens, one after another. The two texts of a pair are one sequence.

    A long text may be several windows, each with its special tokens and all of the same length. They count as one
    sequence here.
    """

    tokens: np.ndarray  # (all tokens,) int32
    offsets: np.ndarray  # (n + 1,) int64, the start of each sequence and the end of the last one
    second_positions: np.ndarray | None = None  # (n,) int64, where token type 1 begins in each window of a pair
    windows: np.ndarray | None = None  # (n,) int64, how many each sequence has; None: one

    def labelled(self, labels: np.ndarray, rows: np.ndarray) -> "TokenizedSplit":
        """A split with these labels and rows in the source."""
        return TokenizedSplit(self.tokens, self.offsets, labels, rows, self.second_positions, self.windows)


@dataclass(frozen=True)
class TokenizedSplit:
    """The sequences of a split, see ``Encoded``, with their labels."""

    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray  # (n,) int64; multi-label (n, names) int8, 0 or 1
    rows: np.ndarray  # (n,) int64
    second_positions: np.ndarray | None = None
    windows: np.ndarray | None = None

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
        windows = () if self.windows is None else (self.windows,)  # runs without windows keep their hash
        arrays = (self.tokens, self.offsets, self.labels, self.rows, self.second_positions, *windows)
        parts = (b"" if array is None else array.tobytes() for array in arrays)
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()

    def sequence(self, i: int) -> np.ndarray:
        """A view of sequence ``i``, (length,) int32."""
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def window_spans(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each window of some sequences begins, and how many tokens it has: (windows,) each."""
        starts, lengths = self.offsets[examples], self.offsets[examples + 1] - self.offsets[examples]
        if self.windows is None:
            return starts, lengths
        counts = self.windows[examples]
        lengths = np.repeat(lengths // counts, counts)
        place = np.arange(len(lengths)) - np.repeat(np.cumsum(counts) - counts, counts)  # of a window in its sequence
        return np.repeat(starts, counts) + place * lengths, lengths

    def taken(self, positions: np.ndarray) -> "TokenizedSplit":
        tokens, offsets = _joined([self.sequence(i) for i in positions])
        begins, windows = (
            None if array is None else array[positions] for array in (self.second_positions, self.windows)
        )
        return TokenizedSplit(tokens, offsets, self.labels[positions], self.rows[positions], begins, windows)


def begun_key(tokenizer: Any, data: DataSettings) -> hashlib.blake2b:
    """The part of a hash of everything that tokens depend on which all splits share: a vocabulary is long."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # earlier calls change them, but they do not change our tokens
        backend.pop(state, None)
    cutting = [getattr(data, name) for name in CUTTING]
    return hashlib.blake2b(json.dumps([FORMAT, *cutting, backend]).encode(), digest_size=16)


def _tokens_key(texts: list[str], pairs: list[str] | None, begun: hashlib.blake2b) -> str:
    """The whole hash of a split."""
    digest = begun.copy()
    for column in (texts, pairs) if pairs is not None else (texts,):
        encoded = [text.encode("utf-8", "surrogatepass") for text in column]
        digest.update(np.array([len(text) for text in encoded]).tobytes())
        digest.update(b"".join(encoded))
    return digest.hexdigest()


def encode_texts(texts: list[str], tokenizer: Any, data: DataSettings, progress: str | None = None) -> Encoded:
    """Tokens of ``texts``, each text cut to ``max_length`` tokens including special tokens, or to windows of them.

    ``head`` keeps the start of a long text. ``head_tail`` fills a quarter of the length from its start and the rest
    from its end (Sun et al. 2019, arXiv:1905.05583). The length is the one of ``windows`` windows together.

    Args:
        texts: at least one text.
        tokenizer: a fast tokenizer of transformers.
        data: ``max_length``, ``truncation``, ``windows`` and ``window_overlap``.
        progress: title of the progress bar; ``None`` shows no bar.

    Raises:
        UserError: ``window_overlap`` leaves no room in a window.
    """
    probe = tokenizer("a", return_special_tokens_mask=True, truncation=False, padding=False)
    body = np.flatnonzero(np.array(probe["special_tokens_mask"]) == 0)
    prefix, suffix = probe["input_ids"][: body[0]], probe["input_ids"][body[-1] + 1 :]
    room = data.max_length - len(prefix) - len(suffix)
    _check_overlap(data, room)
    sequences, counts = [], []
    for (ids,) in _plain_ids(tokenizer, progress, texts):
        windows = _windows(ids, room, data)
        whole = chain.from_iterable([*prefix, *window, *suffix] for window in windows)
        sequences.append(np.array([*whole], dtype=np.int32))
        counts.append(len(windows))
    return Encoded(*_joined(sequences), windows=_counts(counts, data))


def encode_pairs(
    texts: list[str], pairs: list[str], tokenizer: Any, data: DataSettings, progress: str | None = None
) -> Encoded:
    """Tokens of pairs of texts, joined as the tokenizer joins them, and cut to ``max_length`` tokens together.

    Tokens are taken from the longer text first, so that neither text vanishes (``longest_first`` in Hugging Face's
    tokenizers). ``truncation`` says which part of each text is kept, as in ``encode_texts``. With ``windows``, each one
    has the shorter text and a window of the longer one.

    Args:
        texts: the first text of each pair; at least one.
        pairs: the second texts, in the same order.
        tokenizer, data, progress: as in ``encode_texts``.

    Returns:
        The sequences, without ``second_positions`` if the tokenizer gives all tokens the same type.

    Raises:
        UserError: ``max_length`` leaves no room for both texts, or ``window_overlap`` none in a window.
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
    _check_overlap(data, room - room // 2)
    sequences, begins, counts = [], [], []
    for a, b in _plain_ids(tokenizer, progress, texts, pairs):
        shorter = min(len(a), len(b), room // 2)
        if len(a) <= len(b):
            windows = [(_cut(a, shorter, data), window) for window in _windows(b, room - shorter, data)]
        else:
            windows = [(window, _cut(b, shorter, data)) for window in _windows(a, room - shorter, data)]
        whole = chain.from_iterable([*prefix, *a, *middle, *b, *suffix] for a, b in windows)
        sequences.append(np.array([*whole], dtype=np.int32))
        begins.append(len(prefix) + len(windows[0][0]) + len(middle))
        counts.append(len(windows))
    second_positions = np.array(begins) + (types.index(1) - second[0]) if 1 in types else None
    return Encoded(*_joined(sequences), second_positions, _counts(counts, data))


def _plain_ids(tokenizer: Any, progress: str | None, *columns: list[str]) -> Iterator[tuple[list[int], ...]]:
    """For each row of the columns, the token ids of its texts, without special tokens and uncut."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # otherwise the library may use only one core
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


def _windows(ids: list[int], room: int, data: DataSettings) -> list[list[int]]:
    """The windows of a text: as few as ``room`` tokens a window allow, equally long and evenly spread over the text.

    So a text of a few tokens more than a window becomes two windows of half its length, and a batch of such texts has
    no padding.
    """
    overlap = data.window_overlap
    ids = _cut(ids, data.windows * (room - overlap) + overlap, data)
    count = max(1, -(-(len(ids) - overlap) // (room - overlap)))
    length = -(-(len(ids) + (count - 1) * overlap) // count)
    starts = [i * (len(ids) - length) // max(count - 1, 1) for i in range(count)]
    return [ids[start : start + length] for start in starts]


def _check_overlap(data: DataSettings, room: int) -> None:
    if data.window_overlap >= room:
        raise UserError(
            f"--window_overlap {data.window_overlap}: must be less than {room}, the tokens of a text that a window of"
            f" --max_length {data.max_length} always has"
        )


def _counts(counts: list[int], data: DataSettings) -> np.ndarray | None:
    """The windows of each sequence, as ``Encoded`` holds them."""
    return np.array(counts, dtype=np.int64) if data.windows > 1 else None


def _joined(sequences: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All sequences one after another, and their offsets."""
    lengths = [len(sequence) for sequence in sequences]
    return np.concatenate(sequences), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def cached_tokens(
    texts: list[str],
    tokenizer: Any,
    data: DataSettings,
    progress: str,
    pairs: list[str] | None = None,
    begun: hashlib.blake2b | None = None,
) -> Encoded:
    """Like ``encode_pairs``, or ``encode_texts`` without ``pairs``, but reads the tokens from the cache.

    Tokens that are not in the cache, or damaged there, are made and written to it. ``begun`` is what ``begun_key``
    gives, if several splits share it.

    Raises:
        UserError: the cache cannot be written, or as in ``encode_pairs``.
    """
    path = cache_dir() / "tokens" / f"{_tokens_key(texts, pairs, begun or begun_key(tokenizer, data))}.npz"
    if sum_holds(path):
        with suppress(OSError), path.open("rb") as file, np.load(file) as stored:  # it may have been removed meanwhile
            return Encoded(**stored)
    encoded = encode(texts, pairs, tokenizer, data, progress)

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            named: dict[str, Any] = encoded._asdict()
            np.savez(file, **{name: array for name, array in named.items() if array is not None})
        append_sum(temporary)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save)
    except OSError as error:
        raise UserError(
            f"tokens cannot be stored in {path.parent} ({error}): set FINETUNE_LORA_CACHE to another folder"
        ) from error
    return encoded


def encode(
    texts: list[str], pairs: list[str] | None, tokenizer: Any, data: DataSettings, progress: str | None = None
) -> Encoded:
    """``encode_pairs``, or ``encode_texts`` if there are no ``pairs``."""
    if pairs is not None:
        return encode_pairs(texts, pairs, tokenizer, data, progress)
    return encode_texts(texts, tokenizer, data, progress)
