"""Texts -> token ids, cut to the longest input, in one flat array; kept in a cache."""

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
    """Token sequences, special tokens included, one after another."""

    tokens: np.ndarray  # (all tokens,) int32
    offsets: np.ndarray  # (n + 1,) int64, where each sequence begins
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
    """A hash of all that the tokens depend on."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # left by whichever call came last
        backend.pop(state, None)
    digest = hashlib.blake2b(json.dumps([1, data.max_length, data.truncation, backend]).encode(), digest_size=16)
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    digest.update(np.array([len(text) for text in encoded]).tobytes())
    digest.update(b"".join(encoded))
    return digest.hexdigest()


def encode_texts(
    texts: list[str], tokenizer: Any, data: DataSettings, progress: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of ``texts``. A text of more than ``max_length`` tokens, special tokens included, is cut.

    ``head`` keeps its beginning, ``head_tail`` the first quarter of what fits and the rest from its end
    (Sun et al. 2019, arXiv:1905.05583).

    Args:
        texts: at least one.
        tokenizer: a fast tokenizer of transformers.
        config: ``max_length`` and ``truncation``.
        progress: what the progress bar is called; None is no bar.

    Returns:
        All sequences one after another, (all tokens,) int32, and where each begins, (n + 1,) int64.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # all cores; unset, the library may choose one
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
                truncation=False,  # both said, because a tokenizer's file may bring its own
                padding=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # not "longer than the model's maximum": it is cut below
            )["input_ids"]
            for ids in batch:
                kept = ids if len(ids) <= room else ids[:head] + ids[len(ids) - (room - head) :]
                sequences.append(np.array([*prefix, *kept, *suffix], dtype=np.int32))
            bar.update(len(batch))
    lengths = [len(sequence) for sequence in sequences]
    return np.concatenate(sequences), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def cached_tokens(texts: list[str], tokenizer: Any, data: DataSettings, progress: str) -> tuple[np.ndarray, np.ndarray]:
    """``encode_texts``, from the cache if it holds these texts, undamaged.

    Raises:
        UserError: the cache cannot be written.
    """
    path = cache_dir() / "tokens" / f"{_tokens_key(texts, tokenizer, data)}.npz"
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile), np.load(path) as stored:
        return stored["tokens"], stored["offsets"]
    tokens, offsets = encode_texts(texts, tokenizer, data, progress)

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, tokens=tokens, offsets=offsets)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save)
    except OSError as error:
        raise UserError(f"tokens cannot be kept in {path.parent} ({error}): set FINETUNE_LORA_CACHE") from error
    return tokens, offsets
