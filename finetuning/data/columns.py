"""Which columns of a table hold the texts and the labels."""

import re
from collections.abc import Collection, Mapping
from typing import Literal

import numpy as np
import pandas as pd

from finetuning.data.files import shown_columns
from finetuning.datasets import traits_of
from finetuning.errors import UserError, listed
from finetuning.settings import DataSettings

Kind = Literal["text", "classes", "other"]  # of a column; classes: numbers that have names


def text_columns(wanted: str, available: Collection[str]) -> list[str]:
    """The names in ``--text_column``: one column, or several separated by commas."""
    return [wanted] if wanted in available else [name.strip() for name in wanted.split(",")]


def texts_in(table: pd.DataFrame, wanted: str, where: object, flag: str = "text_column") -> pd.Series:
    """The text of each row. Several columns are joined with a space; empty parts are left out.

    Args:
        wanted: ``--text_column``, or the other flag's value.
        where: the table's file, for the message.
        flag: the flag that ``wanted`` comes from.

    Returns:
        (rows,) texts. A row without a text is whatever the table has there: empty, ``None`` or no string.

    Raises:
        UserError: a column is missing, or named twice.
    """
    names = text_columns(wanted, table.columns)
    if not set(names) <= set(table.columns):
        what = "a column" if len(names) == 1 else "columns"
        raise UserError(f"--{flag} {wanted}: must be {what} of {where}, which has: {shown_columns(table.columns)}")
    if len(set(names)) < len(names):
        raise UserError(f"--{flag} {wanted}: names a column twice")
    if len(names) == 1:
        return table[names[0]]
    parts = table[names].astype(object).where(table[names].notna(), "")
    return pd.Series([_joined(row) for row in parts.itertuples(index=False, name=None)], table.index, dtype=object)


def no_text(columns: pd.DataFrame) -> str:
    """What to do if one of the columns holds other values than text; empty if it does not."""
    for name, column in columns.items():
        others = column[column.notna() & ~column.map(lambda value: isinstance(value, str))].tolist()
        if others:
            kind = "lists or objects" if isinstance(others[0], dict | list | np.ndarray) else type(others[0]).__name__
            return f"column {name} holds {kind}: write the text itself"
    return ""


def refuse_columns(data: DataSettings) -> None:
    """Refuses names of columns, other than the data set's default, for texts that are in no table."""
    traits = traits_of(data.dataset)
    for name in ("text_column", "label_column"):
        if getattr(data, name) not in (None, getattr(traits, name)):
            raise UserError(f"--{name} {getattr(data, name)}: these texts are in no table: leave it out")


def _joined(parts: tuple[object, ...]) -> str | None:
    """``None`` if a part is no string."""
    words = [part for part in parts if isinstance(part, str)]
    return " ".join(word for word in words if word.strip()) if len(words) == len(parts) else None


def find_label_column(kinds: Mapping[str, Kind], taken: Collection[str], flag: str) -> str:
    """The only column that can hold the labels: one with class names, else one named label, else the only number.

    Args:
        kinds: every column of the data set, with its kind.
        taken: columns that have another use.
        flag: ``--dataset`` and its value, for the message.

    Raises:
        UserError: there is none, or more than one.
    """
    free = {name: kind for name, kind in kinds.items() if name not in taken and not _is_id(name)}
    ways = (
        [name for name, kind in free.items() if kind == "classes"],
        [name for name in free if name.lower() in ("label", "labels")],
        [name for name, kind in free.items() if kind == "other"],
    )
    return _only(next(filter(None, ways), []), kinds, flag, "labels", "--label_column NAME")


def find_text_column(kinds: Mapping[str, Kind], taken: Collection[str], flag: str) -> str:
    """The only column that can hold the texts: strings that are neither an id nor a label's name.

    Args, Raises: as ``find_label_column``.
    """
    strings = [name for name, kind in kinds.items() if kind == "text" and name not in taken]
    found = [name for name in strings if not _is_id(name) and not name.lower().startswith("label")]
    advice = "--text_column NAME, or A,B for two columns joined; for pairs also --text_pair_column NAME"
    return _only(found, kinds, flag, "texts", advice)


def _is_id(name: str) -> bool:
    return re.fullmatch(r"(.*_)?(id|idx|uuid|index)", name.lower()) is not None


def _only(found: list[str], kinds: Mapping[str, Kind], flag: str, what: str, advice: str) -> str:
    if len(found) == 1:
        return found[0]
    problem = f"{' or '.join(found)} can be the {what}" if found else f"no column can be the {what}"
    columns = listed(f"{name} ({kind})" for name, kind in kinds.items())
    raise UserError(f"{flag}: {problem}: give {advice}; the columns are {columns}")
