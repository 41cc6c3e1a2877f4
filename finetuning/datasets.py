"""What the flags of a run need to know of each ``--dataset``; how its texts are read is the room ``data``'s.

A new data set is a row here and a reader in ``finetuning/data/sources.py``.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetTraits:
    """One value of ``--dataset``.

    Attributes:
        text_column: the column with the text, unless ``--text_column`` names another one.
        monitor: the validation metric that chooses the checkpoint, unless ``--monitor`` names another one.
        label_names: names of the classes 0, 1, ...; ``None`` if they come from the data.
        resplit: shares of train, validation and test with ``--split resplit``; ``None`` if that is refused.
        agreement: ``--agreement`` if it is not given; ``None`` if the flag does not belong to this data set.
        downloads: values of ``--data_source``; empty if the flag does not belong to this data set.
        on_hub: whether it can be downloaded at all; otherwise ``--data_dir`` is needed.
        packaged: whether ``--offline`` finds it in the packages of requirements-offline.txt.
        line_breaks: markup that separates lines in a text, replaced by a space; empty if there is none.
    """

    text_column: str = "text"
    monitor: str = "accuracy"
    label_names: tuple[str, ...] | None = None
    resplit: tuple[int, int, int] | None = None
    agreement: str | None = None
    downloads: tuple[str, ...] = ()
    on_hub: bool = True
    packaged: bool = False
    line_breaks: str = ""

    def clean(self, text: str) -> str:
        """A text as training and prediction see it."""
        return text.replace(self.line_breaks, " ") if self.line_breaks else text


DATASETS = {
    "imdb": DatasetTraits(
        label_names=("negative", "positive"),
        resplit=(35, 5, 10),  # thousands of texts: 35,000 / 5,000 / 10,000
        downloads=("hub", "stanford"),
        packaged=True,
        line_breaks="<br />",
    ),
    "financial_phrasebank": DatasetTraits(
        text_column="sentence",
        monitor="macro_f1",  # its classes are of unequal size
        label_names=("negative", "neutral", "positive"),
        agreement="50",
    ),
    "text": DatasetTraits(on_hub=False),
}
