"""Texts and labels of a run: splits, leaks, limits, tokens.

``load_texts`` returns train, validation and test as texts. ``tokenize`` turns each split into one flat array of tokens.
Both depend only on the data and the settings, so another machine can repeat a run.
"""

import dataclasses
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from finetuning.data.doubts import contradictions, respelled, wordless
from finetuning.data.folds import with_folds
from finetuning.data.labels import STRATIFIED, doubt_about, unseen_labels
from finetuning.data.sources import read_source
from finetuning.data.splits import (
    encode_labels,
    limited,
    lost_classes,
    numbered_groups,
    split_source,
    with_unseen_test,
    without_leaks,
)  # fmt: skip
from finetuning.data.texts import LabelledTexts, TextData
from finetuning.data.tokens import TokenizedSplit, begun_key, cached_tokens
from finetuning.settings import DataSettings


def load_texts(data: DataSettings, offline: bool) -> TextData:
    """Reads, checks and splits the data, removes leaks, and applies the limits.

    Args:
        offline: never use the network. IMDb is then the packaged reviews, unless ``data.data_dir`` is given.

    Raises:
        UserError: the data is missing, cannot be read, or does not fit the settings.
    """
    source = read_source(data, offline)
    data = dataclasses.replace(data, **source.found)
    names, source = encode_labels(numbered_groups(source), data)
    splits, how = split_source(source, names, data)
    given = "validation" in source.tables and data.split in (None, "official")
    notes: list[str] = []
    if data.kfold is not None and "validation" in splits:
        if given:  # its rows are counted on from those of the source's train, from which test may have been taken
            rows = int(source.tables["train"].index.max()) + 1
            splits["validation"] = splits["validation"].set_axis(splits["validation"].index + rows)
            notes.append("validation is part of the training texts, because of --kfold")
        splits["train"] = pd.concat([splits["train"], splits.pop("validation")]).sort_index()
    notes += [*wordless(splits["train"]), *contradictions(splits["train"])]
    before = splits["train"]
    splits, leaks_dropped, shared = without_leaks(splits, names)
    splits, note = with_unseen_test(splits, given)
    notes += [*shared, *note, *respelled(splits), *source.notes]
    if "group" in before:
        notes.append(
            "intervals and risks count texts as independent; those of one group are not: the truth is less certain"
        )
    kept = limited(splits, data)
    if "labels" in splits["train"]:
        notes += [STRATIFIED, *unseen_labels(splits | {"train": kept["train"]}, names)]
    else:
        found = np.concatenate([table.label.to_numpy() for table in source.tables.values()])
        hint = doubt_about([names[i] for i in np.unique(found)], len(found))
        notes += [f"warning: {hint}"] if hint else []
        notes += lost_classes(before, splits["train"], names, "the removal of texts of validation and test")
        notes += lost_classes(splits["train"], kept["train"], names, "--limit_train")
    texts = TextData(
        source=how,
        label_names=names,
        splits={
            name: LabelledTexts(
                t.text.tolist(),
                np.stack(t.labels.tolist()) if "labels" in t else np.array(t.label, dtype=np.int64),
                t.index.to_numpy(np.int64),
                t.pair.tolist() if "pair" in t else None,
                t.group.to_numpy(np.int64) if "group" in t else None,
            )
            for name, t in kept.items()
        },
        leaks_dropped=leaks_dropped,
        notes=notes,
        columns={"text_column": data.text_column, "label_column": data.label_column},
    )
    del source, before, splits, kept
    pa.default_memory_pool().release_unused()  # otherwise it keeps several times the size of the texts
    return texts if data.kfold is None else with_folds(texts, data)


def prefetch_texts(data: DataSettings) -> None:
    """Downloads the data into the caches, and checks like ``load_texts`` that it can be read."""
    load_texts(data, offline=False)


def tokenize(texts: TextData, tokenizer: Any, data: DataSettings, test: bool = True) -> dict[str, TokenizedSplit]:
    """The tokens of each split, from the cache if possible.

    Args:
        tokenizer: a fast tokenizer of transformers; its own truncation and padding are ignored.
        data: how long texts are cut, see ``encode_texts``.

    Raises:
        UserError: the cache cannot be written, or as in ``encode_texts`` and ``encode_pairs``.
    """
    tokenized, begun = {}, begun_key(tokenizer, data)
    for name, split in texts.splits.items():
        if test or name != "test":
            encoded = cached_tokens(split.texts, tokenizer, data, f"tokenizing {name}", split.pairs, begun)
            tokenized[name] = encoded.labelled(split.labels, split.rows)
    return tokenized
