"""What the flags must know about each ``--dataset``. The package ``data`` reads the texts.

To add a data set, add a row here, a reader in ``finetuning/data/``, and its name in ``READERS`` of its
``sources.py``.
"""

import re
from dataclasses import dataclass

from finetuning.errors import UserError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class DatasetTraits:
    """One value of ``--dataset``."""

    text_column: str = "text"  # default of ``--text_column``; empty if the column is found in the data
    label_column: str = "label"  # default of ``--label_column``; empty if the column is found in the data
    monitor: str = "accuracy"  # default of ``--monitor``, the validation metric that chooses the checkpoint
    label_names: tuple[str, ...] | None = None  # names of the classes 0, 1, ...; ``None`` if they come from the data
    # ratio of train, validation and test with ``--split resplit``; ``None`` if that is not allowed
    resplit: tuple[int, int, int] | None = None
    agreement: str | None = None  # default of ``--agreement``; ``None`` if the flag is not allowed
    downloads: bool = False  # whether ``--data_source`` is allowed
    on_hub: bool = True  # whether it can be downloaded; if not, ``--data_dir`` is required
    packaged: bool = False  # whether a package of requirements-offline.txt contains it, for ``--offline``
    line_breaks: str = ""  # markup between the lines of a text, replaced by a space; empty if there is none

    def clean(self, text: str) -> str:
        """The text as the model reads it, in training and in prediction."""
        return text.replace(self.line_breaks, " ") if self.line_breaks else text


DATASETS = {
    "imdb": DatasetTraits(
        label_names=("negative", "positive"),
        resplit=(35, 5, 10),  # thousands of texts: 35,000 / 5,000 / 10,000
        downloads=True,
        packaged=True,
        line_breaks="<br />",
    ),
    "financial_phrasebank": DatasetTraits(
        text_column="sentence",
        monitor="macro_f1",  # because its classes differ in size
        label_names=("negative", "neutral", "positive"),
        agreement="50",
    ),
    "text": DatasetTraits(on_hub=False),
}
HUB_SET = DatasetTraits(text_column="", label_column="")  # of OWNER/NAME


def traits_of(dataset: str) -> DatasetTraits:
    """What the flags must know about a ``--dataset``.

    Raises:
        UserError: it is neither a named data set nor of the form OWNER/NAME[:CONFIG].
    """
    if hub_name(dataset) is None and dataset not in DATASETS:
        raise UserError(
            f"--dataset {dataset}: must be one of {', '.join(DATASETS)}, or OWNER/NAME[:CONFIG], a data set of the hub"
        )
    return DATASETS.get(dataset, HUB_SET)


def hub_name(dataset: str) -> tuple[str, str | None] | None:
    """The repository and the config of a data set of the hub; ``None`` for a named data set."""
    found = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?::(.+))?", dataset)
    return (found[1], found[2]) if found else None


def split_names(flag: str) -> dict[str, str]:
    """Reads ``--split_names train=NAME,validation=NAME,test=NAME``; an empty flag gives no names.

    Raises:
        UserError: it has another form, names a part twice or no train, or uses a split for two parts.
    """
    pairs = [tuple(word.strip().split("=", 1)) for word in flag.split(",")] if flag else []
    names = {pair[0]: pair[-1] for pair in pairs}
    whole = all(len(pair) == 2 and pair[0] in SPLITS and pair[1] for pair in pairs)
    if pairs and not (whole and "train" in names and len(set(names.values())) == len(names) == len(pairs)):
        raise UserError(
            f"--split_names {flag}: must be of the form train=NAME,validation=NAME,test=NAME, each with another split;"
            f" validation and test may be missing"
        )
    return names
