"""Reads the texts: one reader for each named ``--dataset``, and one for all data sets of the hub."""

from collections.abc import Callable

from finetuning.data.hub_sets import read_hub_set
from finetuning.data.imdb import read_imdb
from finetuning.data.phrasebank import read_phrasebank
from finetuning.data.tables import class_names, read_table, split_files, unused_files
from finetuning.data.texts import Source
from finetuning.errors import UserError, listed
from finetuning.settings import DataSettings, check_data_dir


def read_source(data: DataSettings, offline: bool) -> Source:
    """The tables for these settings, downloaded if necessary; refused if they are missing or cannot be read."""
    check_data_dir(data.data_dir)
    return READERS.get(data.dataset, read_hub_set)(data, offline)


def read_own_files(data: DataSettings, _offline: bool) -> Source:
    """``--dataset text``: the files ``train``, ``validation`` and ``test`` in a folder, or one file."""
    assert data.data_dir is not None  # config.py requires it for this data set
    files = split_files(data.data_dir)
    tables = {split: read_table(path, data) for split, path in files.items()}
    names = {split: class_names(path, data.label_column) for split, path in files.items()}
    for split, own in names.items():
        if names["train"] and own and own != names["train"][: len(own)]:
            raise UserError(
                f"--data_dir: {files[split].name} numbers its classes {listed(own)}, {files['train'].name}"
                f" {listed(names['train'])}: number them alike, or write the labels as words"
            )
    notes = unused_files(data.data_dir)
    return Source(data.data_dir.resolve().name, "local files", tables, names["train"], notes, "test file")


READERS: dict[str, Callable[[DataSettings, bool], Source]] = {
    "imdb": read_imdb,
    "financial_phrasebank": read_phrasebank,
    "text": read_own_files,
}
