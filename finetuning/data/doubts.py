"""Warnings about texts: the column may be another than the user meant, or the score too high."""

import re
import unicodedata
from collections.abc import Mapping, Sequence

import pandas as pd

from finetuning.data.texts import contents_of

MANY_CONTRADICTIONS = 0.1  # of the training texts
MANY_WORDLESS = 0.5  # of the training texts
MANY_RESPELLED = 0.01  # of the texts that are held out
SHAPELESS = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")  # hyphens and joints that nobody sees


def contradictions(train: pd.DataFrame) -> list[str]:
    """A warning if many texts occur with several labels, as when one of two columns is missing; else empty."""
    if "labels" in train:
        return []
    share = (train.groupby(contents_of(train)).label.transform("nunique") > 1).mean()
    if share < MANY_CONTRADICTIONS:
        return []
    way = "" if "pair" in train else ": --text_pair_column gives the second text, --text_column A,B joins two columns"
    return [
        f"warning: {share:.0%} of the training texts have different labels elsewhere in train, so people disagree, or"
        f" the label depends on another column{way}"
    ]


def wordless(train: pd.DataFrame) -> list[str]:
    """A warning if at least half of the texts are numbers or ids, as if another column was given; else empty."""
    texts = train.text.str.strip()
    ids = ~texts.str.contains(r"\s") & texts.str.contains(r"\d") & texts.map(str.isascii)
    share = (ids | ~texts.str.contains(r"[^\W\d_]")).mean()
    if share < MANY_WORDLESS:
        return []
    what = "have no letter, or are one word with a digit"
    return [f"warning: {share:.0%} of the training texts {what}: is --text_column the column that you mean?"]


def respelled(splits: Mapping[str, pd.DataFrame]) -> list[str]:
    """A warning if many held-out texts are training texts but for capitals, spaces and codes that nobody sees.

    ``without_leaks`` keeps those, because capitals may matter. Without validation (``--kfold``) each training text is
    held out once, so two of them count as well.
    """
    train, others = splits["train"], [table for name, table in splits.items() if name != "train"]
    looks, held_out = contents_of(train, _looks), contents_of(pd.concat(others), _looks)
    found = held_out.isin(looks)
    if "validation" not in splits:
        found = pd.concat([found, contents_of(train).groupby(looks).transform("nunique") > 1])
    if found.mean() < MANY_RESPELLED:
        return []
    what = "held-out text is a training text" if found.sum() == 1 else "held-out texts are training texts"
    return [
        f"warning: {found.sum()} {what} but for capitals, spaces or invisible characters, so scores may be too high:"
        " spell them alike"
    ]


def alike_groups(names: Sequence[str]) -> list[str]:
    """A warning if the names of different groups look alike; else empty."""
    looks = _looks(pd.Series(names))
    if not looks.duplicated().any():
        return []
    first = looks[looks.duplicated()].iloc[0]
    twins = [name for name, look in zip(names, looks, strict=True) if look == first]
    return [
        f"warning: groups {' and '.join(map(ascii, twins))} count as different, so their texts may be in two splits:"
        " spell them alike"
    ]


def _looks(texts: pd.Series) -> pd.Series:
    """What a reader takes for the texts."""
    return texts.map(_look)


def _look(text: str) -> str:
    shown = text if text.isascii() else SHAPELESS.sub("", unicodedata.normalize("NFKC", text))
    return " ".join(shown.casefold().split())
