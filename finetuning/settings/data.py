"""Section ``data``: texts, labels and splits."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetuning.datasets import DATASETS, hub_name, split_names, traits_of
from finetuning.errors import UserError
from finetuning.settings.fields import Values, require, setting

CUTTING = ("max_length", "truncation", "windows", "window_overlap")  # decide which tokens of a text are read
COLUMNS = ("text_column", "text_pair_column", "label_separator")  # how a table is read, also to predict
WINDOWED = ("windows", "window_overlap", "window_pooling", "truncation")  # how a long text is read, besides its length


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Texts, labels and splits."""

    dataset: str = setting(
        "imdb",
        f"A named data set ({', '.join(name for name in DATASETS if name != 'text')}), 'text' for your own data in"
        " --data_dir, or OWNER/NAME[:CONFIG], a data set of the hub.",
    )
    data_dir: Path | None = setting(
        None,
        "File or folder with the data: parquet, CSV, TSV, JSON, JSON lines, also with .gz; aclImdb or Sentences_*.txt.",
        "none",
    )
    data_source: Literal["hub", "stanford"] | None = setting(
        None, "Download IMDb from the Hugging Face hub or from Stanford's archive.", "hub"
    )
    text_column: str = setting(
        None,
        "Column with the text, or several (a,b), joined with a space.",
        "text; sentence for financial_phrasebank; found in hub sets",
    )
    label_column: str = setting(
        None, "Column with the label: a number, a string, or a list of several.", "label; found in hub sets"
    )
    split_names: str = setting(
        "", "Splits of a hub set with other names, for example train=train,test=validation_matched.", "none"
    )
    text_pair_column: str | None = setting(
        None, "Column with the second text of each pair, for data sets of pairs.", "none: single texts"
    )
    group_column: str | None = setting(
        None,
        "Column that says which texts belong together (a patient, a contract): no group is in two splits or folds.",
        "none: each text stands alone",
    )
    label_separator: str | None = setting(
        None, "Multi-label data: what separates the labels in the label column.", "none: one label, or lists"
    )
    agreement: Literal["50", "66", "75", "all"] | None = setting(
        None, "For financial_phrasebank: use sentences on which at least this percentage of annotators agree.", "50"
    )
    split: Literal["official", "resplit", "stratified"] | None = setting(
        None,
        "The data's test split (official), IMDb as 35,000 / 5,000 / 10,000 (resplit), or 80 / 10 / 10 % (stratified).",
        "the splits that the data has, missing ones from train; of a single table: stratified",
    )
    max_length: int = setting(256, "Cut texts to N tokens.", at_least=8)
    truncation: Literal["head", "head_tail"] = setting(
        "head_tail",
        "Keep the start of a long text (head), or a quarter from its start and the rest from its end (head_tail).",
    )
    windows: int = setting(
        1, "Turn a text of more than --max_length tokens into up to N windows, and pool their logits.", at_least=1
    )
    window_overlap: int = setting(0, "Tokens that a window has in common with the next one, at least.", at_least=0)
    window_pooling: Literal["mean", "max"] = setting("mean", "How a text's logits come from those of its windows.")
    limit_train: int | None = setting(
        None, "Use only N training texts, keeping the class proportions.", "all", at_least=1
    )
    limit_validation: int | None = setting(
        None, "Use only N validation texts, keeping the class proportions.", "all", at_least=1
    )
    limit_test: int | None = setting(None, "Use only N test texts, keeping the class proportions.", "all", at_least=1)
    kfold: int | None = setting(
        None,
        "For few texts: N folds of the training texts are validation in turn; then train on all of them.",
        "none",
        at_least=2,
        at_most=1000,
    )
    fold: int | None = setting(
        None,
        "With --kfold: only train the run whose validation is fold N.",
        "all folds, then all training texts",
        at_least=1,
    )
    data_seed: int = setting(
        0, "Seed of the splits and limits; --seed does not change them.",
        at_least=0, at_most=2**32 - 1,
    )  # fmt: skip

    @property
    def longest(self) -> int:
        """The largest number of tokens of a text, in all its windows together."""
        return self.windows * self.max_length

    @property
    def folds(self) -> range:
        """The numbers of the folds of ``--kfold`` that the run trains before all training texts; else empty."""
        return range(1, (self.kfold or 0) + 1) if self.fold is None else range(0)

    @staticmethod
    def defaults(s: Values) -> dict[str, Any]:
        traits = traits_of(s.dataset)
        return {"text_column": traits.text_column, "label_column": traits.label_column, "agreement": traits.agreement}

    @staticmethod
    def check(s: Values) -> None:
        traits, on_hub = traits_of(s.dataset), hub_name(s.dataset) is not None
        own = traits.label_names is not None  # its reader knows the columns

        def only_of(trait: str) -> str:
            return f"needs --dataset {' or '.join(name for name, other in DATASETS.items() if getattr(other, trait))}"

        require(s, "dataset", s.data_dir is not None or traits.on_hub, "needs --data_dir PATH")
        require(s, "agreement", s.agreement is None or bool(traits.agreement), only_of("agreement"))
        require(s, "split", s.split != "resplit" or bool(traits.resplit), only_of("resplit"))
        require(s, "data_dir", not (on_hub and s.data_dir), f"needs --dataset text, but --dataset is {s.dataset}")
        require(s, "split_names", not s.split_names or on_hub, "needs --dataset OWNER/NAME, a data set of the hub")
        split_names(s.split_names)
        if s.text_pair_column is not None:
            require(s, "text_pair_column", not own, f"{s.dataset} has no pairs of texts: use --dataset text")
            message = "must be another column than text and label"
            require(s, "text_pair_column", s.text_pair_column not in (s.text_column, s.label_column), message)
        require(s, "group_column", s.group_column is None or not own, f"{s.dataset} has no groups: use --dataset text")
        message = "must be another column than the label"
        require(s, "group_column", s.group_column is None or s.group_column != s.label_column, message)
        require(s, "label_separator", s.label_separator is None or not own, f"{s.dataset} is not multi-label")
        require(s, "label_separator", s.label_separator != "", "must not be empty")
        found = s.data_dir is not None or not s.offline or traits.packaged or on_hub  # the cache may have a hub set
        require(s, "offline", found, f"no package contains {s.dataset}: give --data_dir PATH")
        message = f"must be less than --max_length {s.max_length}"
        require(s, "window_overlap", s.window_overlap < s.max_length, message)
        for name, default in (("window_overlap", 0), ("window_pooling", "mean")):
            require(s, name, s.windows > 1 or getattr(s, name) == default, "needs --windows of 2 or more")
        downloads = traits.downloads and s.data_dir is None and not s.offline
        message = f"{only_of('downloads')} without --data_dir and --offline"
        require(s, "data_source", s.data_source is None or downloads, message)
        _check_folds(s)


def _check_folds(s: Values) -> None:
    """Refuses what cannot be used with ``--kfold``."""
    require(s, "fold", s.fold is None or s.kfold is not None, "needs --kfold N, the number of folds")
    if s.kfold is None:
        return
    require(s, "fold", s.fold is None or s.fold <= s.kfold, f"must be from 1 to {s.kfold}, the number of --kfold")
    message = "cannot be used with --kfold, whose folds are validation: use --limit_train"
    require(s, "limit_validation", s.limit_validation is None, message)
    message = "cannot be used with --kfold, whose folds choose the number of epochs"
    require(s, "epochs", s.epochs != 0 or s.fold is not None, message)
    for name in ("devices", "num_nodes"):
        require(s, name, getattr(s, name) == 1 or s.fold is not None, "must be 1 with --kfold: give each --fold alone")


def check_data_dir(data_dir: Path | None) -> None:
    """Refuses a ``--data_dir`` that does not exist, is not readable, or is neither a file nor a folder."""
    if data_dir is None:
        return
    if not os.access(data_dir, os.R_OK):
        raise UserError(f"--data_dir {data_dir}: no such file or folder, or you may not read it")
    if not (data_dir.is_file() or data_dir.is_dir()):
        raise UserError(f"--data_dir {data_dir}: is a pipe or a device: save it as a file first")
