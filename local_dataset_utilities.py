"""Texts and labels: splits, leaks, limits, tokenizing.

``load_texts`` gives train, validation and test as plain texts; ``tokenize`` gives each as one flat array of tokens.
Everything is decided by the data's content and ``--data_seed``, so a run can be repeated on another machine.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import uuid
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from tqdm import tqdm  # type: ignore[import-untyped]

from finetuning.data.sources import SPLITS, Source, read_source
from finetuning.settings import RunConfig, UserError, cache_dir


@dataclass(frozen=True)
class LabelledTexts:
    """One split. ``rows`` say where each text stands in its source.

    With ``--split official`` that is the position in the split's own file (a validation split that was carved out
    of train: in train's), from 0; otherwise the position in train, validation and test put one after another.
    """

    texts: list[str]
    labels: np.ndarray  # (n,) int64
    rows: np.ndarray  # (n,) int64


@dataclass(frozen=True)
class TextData:
    """Three splits and what is to be told of them."""

    source: str  # for people, e.g. "IMDb (Stanford), official test"
    label_names: list[str]
    splits: dict[str, LabelledTexts]  # train, validation, test
    leaks_dropped: int  # texts removed from train because they also stand in validation or test
    notes: list[str] = field(default_factory=list)  # what was done to the data, one sentence each


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


def load_texts(config: RunConfig) -> TextData:
    """Read, check, split, remove leaks, apply the limits.

    Raises:
        UserError: data that is missing, cannot be read, or does not fit the flags.
    """
    source = read_source(config)
    names, source = _encode_labels(source, config)
    splits, how = _split(source, names, config)
    leaks_dropped = _drop_leaks(splits, names)
    given = "validation" in source.tables and config.split in (None, "official")
    notes = [*_keep_test_unseen(splits, given), *source.notes]
    data = TextData(
        source=how,
        label_names=names,
        splits={
            name: LabelledTexts(t.text.tolist(), t.label.to_numpy(np.int64), t.index.to_numpy(np.int64))
            for name, t in _limited(splits, config).items()
        },
        leaks_dropped=leaks_dropped,
        notes=notes,
    )
    del source, splits
    pa.default_memory_pool().release_unused()  # it would keep several times the texts' size for the whole run
    return data


def prefetch_texts(config: RunConfig) -> None:
    """Fill the download caches for ``config``, and check that what they hold can be read."""
    load_texts(config)


# ---------------------------------------------------------------------------------------------------------------------
# labels and splits


def _encode_labels(source: Source, config: RunConfig) -> tuple[list[str], Source]:
    """Label names, and the source with labels 0 ... classes - 1."""
    labels = _comparable(pd.concat({split: table.label for split, table in source.tables.items()}))
    if not pd.api.types.is_numeric_dtype(labels) and not labels.map(lambda label: isinstance(label, str)).all():
        raise UserError(f"--label_column {config.label_column}: labels must be all numbers or all strings")
    known: dict[Any, int]
    if source.label_names is not None:
        names = source.label_names
        known = {key: i for i, name in enumerate(names) for key in (i, name)}
    else:
        if pd.api.types.is_float_dtype(labels) and (labels % 1 == 0).all():
            labels = labels.astype(int)
        values = sorted(labels.unique().tolist())
        names = [str(value) for value in values]
        known = {value: i for i, value in enumerate(values)}
    unknown = labels[~labels.isin(list(known))]
    if len(unknown):
        allowed = ", ".join(f"{i} or {name}" for i, name in enumerate(names))
        advice = "" if config.dataset == "text" else "; --dataset text takes any labels"
        raise UserError(
            f"--label_column {config.label_column}: label {unknown.tolist()[0]!r} is not one of {allowed}{advice}"
        )
    if labels.nunique() < 2:
        raise UserError(f"--label_column {config.label_column}: all labels are {labels.tolist()[0]!r}, two are needed")
    codes = labels.map(known).astype(np.int64)
    tables = {split: table.assign(label=codes[split].to_numpy()) for split, table in source.tables.items()}
    return names, dataclasses.replace(source, tables=tables)


def _comparable(labels: pd.Series) -> pd.Series:
    """Labels, of which CSV files give words: as numbers where all are, else words without spaces around them."""
    words = labels.map(lambda label: isinstance(label, str))
    if not words.any():
        return labels
    numbers = pd.to_numeric(labels.where(words | labels.map(np.isscalar)), errors="coerce")
    return numbers if numbers.notna().all() else labels.where(~words, labels.astype(str).str.strip())


def stratified_parts(labels: np.ndarray, sizes: Sequence[int], seed: int) -> list[np.ndarray]:
    """Disjoint random parts of exactly ``sizes`` examples, each with all classes in proportion, within two examples.

    Each class's examples, in random order, are spread evenly over the interval from 0 to 1; all are sorted by that
    place and cut. (The counts are those of Webster's method of apportionment.)

    Args:
        labels: (n,) class of each example.
        sizes: of the parts; together at most n. The first part of a smaller request lies in that of a larger one.
        seed: repeats the same parts.

    Returns:
        Positions in ``labels``, one array (size,) for each part.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = order[np.argsort(place[order], kind="stable")]
    return np.split(order, np.cumsum(sizes))[: len(sizes)]


def _sizes(total: int, shares: Sequence[int]) -> list[int]:
    """``total`` divided in proportion to ``shares``, by largest remainder."""
    exact = total * np.array(shares) / sum(shares)
    sizes = np.floor(exact).astype(int)
    sizes[np.argsort(sizes - exact, kind="stable")[: total - sizes.sum()]] += 1
    return sizes.tolist()


def _parts(table: pd.DataFrame, shares: Sequence[int], names: list[str], seed: int) -> list[pd.DataFrame]:
    """``table`` cut into stratified parts in proportion to ``shares``."""
    counts = table.label.value_counts()
    if counts.min() < len(shares):
        count = f"class {names[counts.idxmin()]!r} has {counts.min()} texts"
        raise UserError(f"--label_column: {count}, a stratified split needs {len(shares)}")
    sizes = _sizes(len(table), shares)
    if 0 in sizes:
        raise UserError(f"--data_dir: {len(table)} texts are too few to be split {':'.join(map(str, shares))}")
    return [table.iloc[part] for part in stratified_parts(table.label.to_numpy(), sizes, seed)]


def _split(source: Source, names: list[str], config: RunConfig) -> tuple[dict[str, pd.DataFrame], str]:
    """Train, validation and test as ``--split`` says, and how the result is to be called."""
    tables = source.tables
    kind = config.split or ("official" if "test" in tables else "stratified")
    if kind != "stratified" and "test" not in tables:
        raise UserError(f"--split {kind}: {source.name} ({source.where}) has no test split, allowed is stratified")
    if kind == "official" or (config.split is None and "validation" in tables):
        splits = dict(tables)
        for missing in {"validation", "test"} - set(tables):  # one at most
            splits["train"], splits[missing] = _parts(tables["train"], (90, 10), names, config.data_seed)
        test = "official test" if "test" in tables else "held-out test"
        return {split: splits[split] for split in SPLITS}, f"{source.name}, {test} ({source.where})"
    shares = (35, 5, 10) if kind == "resplit" else (80, 10, 10)
    # One table keeps its rows: repeated sentences may be missing from it.
    everything = pd.concat([tables[s] for s in SPLITS if s in tables], ignore_index=len(tables) > 1)
    splits = dict(zip(SPLITS, _parts(everything, shares, names, config.data_seed), strict=True))
    name = source.name if len(tables) == 1 else f"{source.name} {' + '.join(tables)}"
    return splits, f"{name}, {'resplit' if kind == 'resplit' else 'held out'} ({source.where})"


def _drop_leaks(splits: dict[str, pd.DataFrame], names: list[str]) -> int:
    """Remove from train, in ``splits``, the texts that also stand in validation or test; their number."""
    held_out = pd.concat([splits["validation"], splits["test"]])
    leaks = splits["train"].text.str.strip().isin(held_out.text.str.strip())
    splits["train"] = splits["train"][~leaks]
    missing = sorted(set(held_out.label) - set(splits["train"].label))
    if missing:
        raise UserError(
            f"--data_dir: label {names[missing[0]]!r} stands in validation or test, but on no text of train"
            + (f" (after {leaks.sum()} texts that stand there as well were dropped from train)" if leaks.any() else "")
        )
    return int(leaks.sum())


def _keep_test_unseen(splits: dict[str, pd.DataFrame], given: bool) -> list[str]:
    """Remove from validation, in ``splits``, the texts that also stand in test, for validation chooses the checkpoint
    and the learning rate. One that was ``given`` as a file of its own stays whole. Returns what there is to say."""
    seen = splits["validation"].text.str.strip().isin(splits["test"].text.str.strip())
    if not seen.any():
        return []
    if given:
        return [f"{seen.sum()} of {len(seen)} validation texts stand in test: what they choose has seen the test"]
    if seen.all():
        raise UserError(f"--data_dir: each text of validation, {len(seen)} held out of train, stands in test as well")
    splits["validation"] = splits["validation"][~seen]
    return [f"{seen.sum()} validation texts left out, before any limit: they stand in test"]


def _limited(splits: dict[str, pd.DataFrame], config: RunConfig) -> dict[str, pd.DataFrame]:
    """Stratified subsamples of the sizes that ``--limit_train`` and so on ask for."""
    limited = dict(splits)
    for name, table in splits.items():
        limit = getattr(config, f"limit_{name}")
        if limit is None:
            continue
        classes = table.label.nunique() if name == "train" else 1
        if not classes <= limit <= len(table):
            raise UserError(
                f"--limit_{name} {limit}: the {name} split has {len(table)} texts in {table.label.nunique()} classes, "
                f"allowed is {classes} to {len(table)}"
            )
        limited[name] = table.iloc[stratified_parts(table.label.to_numpy(), [limit], config.data_seed)[0]]
    return limited


# ---------------------------------------------------------------------------------------------------------------------
# tokens


def tokenize(data: TextData, tokenizer: Any, config: RunConfig) -> dict[str, TokenizedSplit]:
    """Tokens of each split (of test only with ``config.test``), from the cache where they are in it.

    A text of more than ``max_length`` tokens, special tokens included, is cut: ``head`` keeps its beginning,
    ``head_tail`` the first quarter of what fits and the rest from its end (Sun et al. 2019, arXiv:1905.05583).

    Args:
        data: the texts.
        tokenizer: a fast tokenizer of transformers; its own truncation and padding are not used.
        config: ``max_length``, ``truncation`` and ``test``.

    Raises:
        UserError: the cache cannot be written.
    """
    splits = {}
    for name, split in data.splits.items():
        if name == "test" and not config.test:
            continue
        path = cache_dir() / "tokens" / f"{_tokens_key(split.texts, tokenizer, config)}.npz"
        tokens, offsets = _cached(
            path, functools.partial(encode_texts, split.texts, tokenizer, config, f"tokenizing {name}")
        )
        splits[name] = TokenizedSplit(tokens, offsets, split.labels, split.rows)
    return splits


def _tokens_key(texts: list[str], tokenizer: Any, config: RunConfig) -> str:
    """A hash of all that the tokens depend on."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # left by whichever call came last
        backend.pop(state, None)
    digest = hashlib.blake2b(json.dumps([1, config.max_length, config.truncation, backend]).encode(), digest_size=16)
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    digest.update(np.array([len(text) for text in encoded]).tobytes())
    digest.update(b"".join(encoded))
    return digest.hexdigest()


def encode_texts(
    texts: list[str], tokenizer: Any, config: RunConfig, progress: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of ``texts``, cut as ``tokenize`` says.

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
    room = config.max_length - len(prefix) - len(suffix)
    head = room if config.truncation == "head" else room // 4
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


def _cached(path: Path, make: Callable[[], tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """What ``path`` holds; if it is not there or damaged, what ``make`` gives, which is kept there."""
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile), np.load(path) as stored:
        return stored["tokens"], stored["offsets"]
    tokens, offsets = make()
    temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")  # several processes may make the same
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                np.savez(file, tokens=tokens, offsets=offsets)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"tokens cannot be kept in {path.parent} ({error}): set FINETUNE_LORA_CACHE") from error
    return tokens, offsets
