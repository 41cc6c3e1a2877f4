"""What the flags must know about each ``--dataset``. The package ``data`` reads the texts.

To add a data set, add a row here and a reader in ``finetuning/data/sources.py``.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetTraits:
    """One value of ``--dataset``.

    Attributes:
        text_column: default of ``--text_column``.
        monitor: default of ``--monitor``, the validation metric that chooses the checkpoint.
        label_names: names of the classes 0, 1, ...; ``None`` if they come from the data.
        resplit: ratio of train, validation and test with ``--split resplit``; ``None`` if that is not allowed.
        agreement: default of ``--agreement``; ``None`` if the flag is not allowed.
        downloads: allowed values of ``--data_source``; empty if the flag is not allowed.
        on_hub: whether it can be downloaded; if not, ``--data_dir`` is required.
        packaged: whether a package of requirements-offline.txt contains it, for ``--offline``.
        line_breaks: markup between the lines of a text, replaced by a space; empty if there is none.
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
        """The text as the model reads it, in training and in prediction."""
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
        monitor="macro_f1",  # because its classes differ in size
        label_names=("negative", "neutral", "positive"),
        agreement="50",
    ),
    "text": DatasetTraits(on_hub=False),
}
