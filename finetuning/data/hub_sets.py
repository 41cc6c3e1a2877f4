"""Any data set of the Hugging Face hub: ``--dataset OWNER/NAME`` or ``OWNER/NAME:CONFIG``.

The files come from a snapshot in the hub's cache, so they are also found without a network. The library ``datasets``
reads them. It never runs a repository's code.
"""

import contextlib
import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import yaml

from finetuning.data.columns import Kind, find_label_column, find_text_column, text_columns
from finetuning.data.tables import checked
from finetuning.data.texts import Source
from finetuning.datasets import SPLITS, hub_name, split_names
from finetuning.errors import UserError, first_line, listed
from finetuning.hub import hub_snapshot
from finetuning.settings import DataSettings

INSTEAD = "--dataset text --data_dir PATH"
BUILDERS = ("parquet", "csv", "json", "arrow", "text")  # of the library; its others read images, sound and more
PART = re.compile(r"(.*)-\d+-of-(\d+).*")  # of a split in several files; a hash may follow, of each its own
NO_LABEL = -1  # what a column of classes has instead of a missing label


def read_hub_set(data: DataSettings, offline: bool) -> Source:
    """The splits of a data set of the hub, and the columns found in it.

    A test split without labels is no test: validation takes its place, and a new one is later taken out of train.

    Raises:
        UserError: the data set, its config, a split or a column does not exist, or the data cannot be downloaded.
    """
    name = hub_name(data.dataset)
    assert name is not None  # config.py allows no other name
    flag = f"--dataset {data.dataset}"
    folder = hub_snapshot(flag, name[0], offline, INSTEAD, lambda cached: _is_complete(cached, name[1]), "dataset")
    splits = _prepared(folder, *name, flag)
    names = _chosen_splits(list(splits), data.split_names, flag)
    features = splits[names["train"]].features
    columns = _columns(features, data, flag)
    label, classes = columns["label_column"], _class_names(features.get(columns["label_column"]))
    pairs = [] if data.text_pair_column is None else text_columns(data.text_pair_column, features)
    wanted = {*text_columns(columns["text_column"], features), *pairs, *filter(None, [data.group_column]), label}
    kept = sorted(wanted) if wanted <= set(features) else list(features)  # all of them for the message of the check
    raw = {part: splits[split].select_columns(kept).to_pandas() for part, split in names.items()}
    raw, test_is, notes = _with_labelled_test(raw, label)
    if unused := [split for split in splits if split not in names.values()]:
        notes.append(f"unused splits: {listed(unused)}")
    if classes is not None:  # elsewhere -1 may be a class
        raw, left_out = _with_agreed_labels(raw, label)
        notes += left_out
    settings = dataclasses.replace(data, **columns)
    tables = {
        part: checked(table, f"{part} of {data.dataset}", settings).set_axis(table.index) for part, table in raw.items()
    }
    return Source(data.dataset, "Hugging Face hub", tables, classes, notes, test_is, columns)


# --- the library


@contextlib.contextmanager
def _library(flag: str) -> Iterator[None]:
    """Turns every error of the library into one line, and hides what it logs."""
    from datasets.exceptions import DatasetGenerationError

    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # it also passes on errors of parsers and of the file system
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        raise UserError(f"{flag} cannot be read ({first_line(cause, name_file=True)}): give {INSTEAD}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _is_complete(folder: Path, config: str | None) -> bool:
    """Whether a folder of the cache has the files of a config. Other programs may have fetched a part of them."""
    import datasets

    with contextlib.suppress(UserError), _library(""):
        if _file_elsewhere(folder) is not None:  # refused later
            return True
        chosen = config or datasets.get_dataset_default_config_name(str(folder))
        if chosen in datasets.get_dataset_config_names(str(folder)):
            builder = datasets.load_dataset_builder(str(folder), chosen)
            files = builder.config.data_files or {}
            return set(builder.info.splits or ()) <= set(files) and all(map(_has_every_part, files.values()))
        return True
    return _has_script(folder)  # with nothing else, which is refused later


def _has_every_part(files: Iterable[str]) -> bool:
    """Whether files whose names end in ``-00000-of-00002`` and so on are all there."""
    parts = Counter(match.groups() for file in files if (match := PART.fullmatch(file)))
    return all(count == int(total) for (*_, total), count in parts.items())


def _has_script(folder: Path) -> bool:
    return any(folder.glob("*.py"))


def _file_elsewhere(folder: Path) -> str | None:
    """The first file of a set's card that is not in its repository; ``None`` if there is none.

    The library would read any file of this machine that a card names, and download any address, even with --offline.

    Raises:
        Exception: a card is damaged; the library refuses it as well.
    """
    from datasets import config
    from huggingface_hub import DatasetCard

    card, metadata = folder / config.REPOCARD_FILENAME, folder / config.REPOYAML_FILENAME
    found = [DatasetCard.load(card).data] if card.is_file() else []
    found += [yaml.safe_load(metadata.read_text(encoding="utf8")) or {}] if metadata.is_file() else []
    entries = [entry for data in found for entry in data.get(config.METADATA_CONFIGS_FIELD) or ()]
    named = _strings([[entry.get("data_files"), entry.get("data_dir")] for entry in entries])
    return next(filter(_leads_out, named), None)


def _strings(value: Any) -> Iterator[str]:
    """All strings in nested lists and dictionaries."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _leads_out(name: str) -> bool:
    path = PurePosixPath(name)
    return "://" in name or "::" in name or name.startswith("~") or path.is_absolute() or ".." in path.parts


def _prepared(folder: Path, repository: str, config: str | None, flag: str) -> Mapping[str, Any]:
    """Every split of a config, as the library's ``Dataset``."""
    import datasets
    from datasets.exceptions import DataFilesNotFoundError

    with _library(flag):
        if elsewhere := _file_elsewhere(folder):
            raise UserError(
                f"{flag} names {elsewhere}, which is not in its repository and is never read: download it, and give"
                f" {INSTEAD}"
            )
        try:
            known = datasets.get_dataset_config_names(str(folder))
        except DataFilesNotFoundError:
            if not _has_script(folder):
                raise
            raise UserError(
                f"{flag} has a loading script and no data files, and the hub's code is never run: convert it, and give"
                f" {INSTEAD}"
            ) from None
        default = datasets.get_dataset_default_config_name(str(folder))
        if config not in known and (config is not None or default is None):
            raise UserError(f"{flag}: must name one of the configs {listed(known)}, as {repository}:{known[0]} does")
        builder = datasets.load_dataset_builder(str(folder), config)
        kind = builder.info.builder_name
        if kind not in BUILDERS:
            raise UserError(f"{flag} holds {kind}: only {', '.join(BUILDERS)} can be read")
        builder.download_and_prepare()
        splits: Mapping[str, Any] = builder.as_dataset()
        return splits


# --- splits


def _chosen_splits(available: list[str], given: str, flag: str) -> dict[str, str]:
    """For train, and for validation and test if they exist, the name of its split."""
    names = split_names(given) or {part: part for part in SPLITS if part in available}
    unknown = [name for name in names.values() if name not in available]
    if unknown:
        raise UserError(f"--split_names {given}: {flag} has no split {unknown[0]}, but {listed(available)}")
    if "train" not in names:
        raise UserError(
            f"{flag} has no split train, but {listed(available)}: give --split_names train=NAME, and"
            f" validation=NAME and test=NAME if there are such splits"
        )
    return names


def _missing(labels: pd.Series) -> pd.Series:
    """Which labels are missing: empty, or -1."""
    return labels.isna() | (labels == NO_LABEL if pd.api.types.is_numeric_dtype(labels) else False)


def _is_empty(label: object) -> bool:
    """Whether it is a list without a label: of single texts allowed, of a whole split a sign that labels are hidden."""
    return isinstance(label, list | tuple | np.ndarray) and len(label) == 0


def _with_labelled_test(tables: dict[str, pd.DataFrame], label: str) -> tuple[dict[str, pd.DataFrame], str, list[str]]:
    """Tables whose test has labels, what the test is, and a note if it had none.

    Benchmarks such as GLUE keep the labels of their test to themselves.
    """
    test = tables.get("test")
    if test is None or label not in test or not (_missing(test[label]) | test[label].map(_is_empty)).all():
        return tables, "official test", []
    rest = {part: table for part, table in tables.items() if part != "test"}
    if "validation" not in rest:
        return rest, "official test", ["the test split has no labels: a test is taken out of train"]
    rest["test"] = rest.pop("validation")
    note = "the test split has no labels: validation is the test, and a new validation is taken out of train"
    return rest, "validation as test", [note]


def _with_agreed_labels(tables: dict[str, pd.DataFrame], label: str) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Tables without the texts labelled -1, on whose label the annotators of sets such as SNLI did not agree; a note.

    Rows keep their numbers. A table in which no text has a label stays, without labels.
    """
    kept: dict[str, pd.DataFrame] = {}
    left_out: list[str] = []
    for part, table in tables.items():
        unlabelled = _missing(table[label]) & table[label].notna()
        if unlabelled.all():
            kept[part] = table.assign(**{label: None})
            continue
        kept[part] = table[~unlabelled]
        left_out += [f"{unlabelled.sum()} of {part}"] if unlabelled.any() else []
    return kept, [f"left out texts without an agreed label (-1): {listed(left_out)}"] if left_out else []


# --- columns


def _columns(features: Mapping[str, Any], data: DataSettings, flag: str) -> dict[str, Any]:
    """``--text_column`` and ``--label_column``: as given, else the only ones that are possible."""
    kinds = {name: _kind(feature) for name, feature in features.items()}
    pairs = [] if data.text_pair_column is None else text_columns(data.text_pair_column, kinds)
    taken = [*pairs, *filter(None, [data.group_column])]
    label = data.label_column or find_label_column(kinds, [*text_columns(data.text_column, kinds), *taken], flag)
    return {"text_column": data.text_column or find_text_column(kinds, [label, *taken], flag), "label_column": label}


def _kind(feature: Any) -> Kind:
    if _class_names(feature) is not None:
        return "classes"
    return "text" if getattr(feature, "dtype", None) in ("string", "large_string") else "other"


def _class_names(feature: Any) -> list[str] | None:
    """The names of a column of classes, or of a column of lists of classes."""
    return getattr(getattr(feature, "feature", feature), "names", None)
