"""Texts and labels of a run: splits, leaks, limits, tokens.

``load_texts`` gives train, validation and test as plain texts; ``tokenize`` gives each as one flat array of tokens.
Everything is decided by the data's content and ``--data_seed``, so a run can be repeated on another machine.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from finetuning.data.sources import read_source
from finetuning.data.splits import drop_leaks, encode_labels, keep_test_unseen, limited, split_source
from finetuning.data.texts import LabelledTexts, TextData
from finetuning.data.tokens import TokenizedSplit, cached_tokens
from finetuning.settings import DataSettings


def load_texts(data: DataSettings, offline: bool) -> TextData:
    """Reads, checks, splits, removes leaks, applies the limits.

    Args:
        data: the settings of the data.
        offline: whether the network must not be used; IMDb is then the packaged reviews, unless there is a folder.

    Raises:
        UserError: data that is missing, cannot be read, or does not fit the flags.
    """
    names, source = encode_labels(read_source(data, offline), data)
    splits, how = split_source(source, names, data)
    leaks_dropped = drop_leaks(splits, names)
    given = "validation" in source.tables and data.split in (None, "official")
    notes = [*keep_test_unseen(splits, given), *source.notes]
    texts = TextData(
        source=how,
        label_names=names,
        splits={
            name: LabelledTexts(t.text.tolist(), t.label.to_numpy(np.int64), t.index.to_numpy(np.int64))
            for name, t in limited(splits, data).items()
        },
        leaks_dropped=leaks_dropped,
        notes=notes,
    )
    del source, splits
    pa.default_memory_pool().release_unused()  # it would keep several times the texts' size for the whole run
    return texts


def prefetch_texts(data: DataSettings) -> None:
    """Fills the download caches for these settings, and checks that what they hold can be read."""
    load_texts(data, offline=False)


def tokenize(texts: TextData, tokenizer: Any, data: DataSettings, test: bool = True) -> dict[str, TokenizedSplit]:
    """Tokens of each split, from the cache if it holds them.

    Args:
        texts: from ``load_texts``.
        tokenizer: a fast tokenizer of transformers; its own truncation and padding are not used.
        data: ``max_length`` and ``truncation``, see ``encode_texts``.
        test: whether the test split is wanted.

    Raises:
        UserError: the cache cannot be written.
    """
    wanted = {name: split for name, split in texts.splits.items() if test or name != "test"}
    return {
        name: TokenizedSplit(
            *cached_tokens(split.texts, tokenizer, data, f"tokenizing {name}"), split.labels, split.rows
        )
        for name, split in wanted.items()
    }
