"""Which columns of a table hold the texts."""

from collections.abc import Collection

import pandas as pd

from finetuning.errors import UserError, listed

JOINED_WITH = " "


def text_columns(wanted: str, available: Collection[str]) -> list[str]:
    """The names in ``--text_column``: one column, or several separated by commas."""
    return [wanted] if wanted in available else [name.strip() for name in wanted.split(",")]


def texts_in(table: pd.DataFrame, wanted: str, where: object, flag: str = "text_column") -> pd.Series:
    """The text of each row. Several columns are joined with a space; empty parts are left out.

    Args:
        table: any table.
        wanted: ``--text_column``, or the other flag's value.
        where: the table's file, for the message.
        flag: the flag that ``wanted`` comes from.

    Returns:
        (rows,) texts. A row without a text is whatever the table has there: empty, ``None`` or no string.

    Raises:
        UserError: a column is missing.
    """
    names = text_columns(wanted, table.columns)
    if not set(names) <= set(table.columns):
        what = "a column" if len(names) == 1 else "columns"
        raise UserError(f"--{flag} {wanted}: must be {what} of {where}, which has: {listed(table.columns)}")
    if len(names) == 1:
        return table[names[0]]
    parts = table[names].astype(object).where(table[names].notna(), "")
    return pd.Series([_joined(row) for row in parts.itertuples(index=False, name=None)], table.index, dtype=object)


def _joined(parts: tuple[object, ...]) -> str | None:
    """``None`` if a part is no string."""
    words = [part for part in parts if isinstance(part, str)]
    return JOINED_WITH.join(word for word in words if word.strip()) if len(words) == len(parts) else None
