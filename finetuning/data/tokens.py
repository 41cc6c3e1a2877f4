"""Turns texts into token ids, cut to ``--max_length``, in one flat array. A cache keeps them."""

import contextlib
import hashlib
import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from finetuning.errors import UserError
from finetuning.settings import DataSettings
from finetuning.storage import cache_dir, write_atomically


@dataclass(frozen=True)
class TokenizedSplit:
    """Token sequences with their special tokens, one after another."""

    tokens: np.ndarray  # (all tokens,) int32
    offsets: np.ndarray  # (n + 1,) int64, the start of each sequence and the end of the last one
    labels: np.ndarray  # (n,) int64
    rows: np.ndarray  # (n,) int64

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, (n,) int64."""
        return np.diff(self.offsets)

    def sequence(self, i: int) -> np.ndarray:
        """A view of sequence ``i``, (length,) int32."""
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]


def _tokens_key(texts: list[str], tokenizer: Any, data: DataSettings) -> str:
    """A hash of everything that the tokens depend on."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # earlier calls change them, but they do not change our tokens
        backend.pop(state, None)
    digest = hashlib.blake2b(json.dumps([1, data.max_length, data.truncation, backend]).encode(), digest_size=16)
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
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
    head = room if data.truncation == "head" else room // 4
    sequences = []
    with tqdm(total=len(texts), desc=progress, unit=" texts", mininterval=1, disable=progress is None) as bar:
        for start in range(0, len(texts), 1000):
            batch = tokenizer(
                texts[start : start + 1000],
                add_special_tokens=False,
                truncation=False,  # a tokenizer's file may set its own truncation and padding
                padding=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # no warning about long texts, because they are cut below
            )["input_ids"]
            for ids in batch:
                kept = ids if len(ids) <= room else ids[:head] + ids[len(ids) - (room - head) :]
                sequences.append(np.array([*prefix, *kept, *suffix], dtype=np.int32))
            bar.update(len(batch))
    lengths = [len(sequence) for sequence in sequences]
    return np.concatenate(sequences), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def cached_tokens(texts: list[str], tokenizer: Any, data: DataSettings, progress: str) -> tuple[np.ndarray, np.ndarray]:
    """Like ``encode_texts``, but reads the tokens from the cache if they are there and not damaged.

    Raises:
        UserError: the cache cannot be written.
    """
    path = cache_dir() / "tokens" / f"{_tokens_key(texts, tokenizer, data)}.npz"
    damaged = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
    with contextlib.suppress(*damaged), path.open("rb") as file, np.load(file) as stored:
        return stored["tokens"], stored["offsets"]
    tokens, offsets = encode_texts(texts, tokenizer, data, progress)

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, tokens=tokens, offsets=offsets)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save)
    except OSError as error:
        raise UserError(
            f"tokens cannot be stored in {path.parent} ({error}): set FINETUNE_LORA_CACHE to another folder"
        ) from error
    return tokens, offsets
