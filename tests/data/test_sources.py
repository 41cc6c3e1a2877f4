"""Formats, bad input and downloads."""

import hashlib
import http.server
import io
import json
import os
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest

from finetuning import hub
from finetuning.config import RunConfig
from finetuning.data import imdb
from finetuning.errors import UserError
from local_dataset_utilities import prefetch_texts
from tests.conftest import frame, full_disk, text_config, texts_of, write_texts, write_tree

# --- formats


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".TSV", ".jsonl", ".json", ".csv.gz", ".JSONL.GZ"])
@pytest.mark.parametrize("single", [False, True])
def test_all_formats_give_the_same(tmp_path: Path, suffix: str, single: bool) -> None:
    table = pd.DataFrame(
        {
            "label": ["good", "bad", "so-so"] * 10,
            "text": [*(f'a "text", {i}\nwith lines\u2028and é' for i in range(27)), "NA", "12", " null "],
        }
    )
    path = tmp_path / f"train{suffix}"
    if suffix == ".parquet":
        table.to_parquet(path)
    elif suffix in (".csv", ".TSV", ".csv.gz"):
        table.to_csv(path, index=False, encoding="utf-8-sig", sep="\t" if suffix == ".TSV" else ",")
    else:
        table.to_json(path, orient="records", lines=suffix != ".json", force_ascii=False)
    texts = texts_of(text_config(path if single else tmp_path))
    assert texts.label_names == ["bad", "good", "so-so"]
    assert "held out" in texts.source
    assert sum(len(split.texts) for split in texts.splits.values()) == 30
    for split in texts.splits.values():
        assert split.texts == [table.text[row] for row in split.rows]
        assert [texts.label_names[label] for label in split.labels] == [table.label[row] for row in split.rows]


def write_named(path: Path, names: list[str]) -> None:
    """Writes texts of these classes as the datasets library does, which stores the names in parquet."""
    features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    table = pyarrow.Table.from_pandas(frame(40, classes=len(names)))
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path)


def test_label_names_of_the_datasets_library(tmp_path: Path) -> None:
    write_named(tmp_path / "train.parquet", ["zebra", "ape"])
    texts = texts_of(text_config(tmp_path))
    assert texts.label_names == ["zebra", "ape"]
    assert (texts.splits["train"].labels == texts.splits["train"].rows % 2).all()


def test_files_that_number_their_classes_differently_are_refused(tmp_path: Path) -> None:
    write_named(tmp_path / "train.parquet", ["bad", "good", "ok"])
    write_named(tmp_path / "test.parquet", ["bad", "ok"])
    with pytest.raises(UserError, match=r"test.parquet numbers its classes bad, ok, train.parquet bad, good, ok"):
        texts_of(text_config(tmp_path))


def test_a_word_that_is_a_name_is_that_class(tmp_path: Path) -> None:
    write_named(tmp_path / "train.parquet", ["0", "1", "10", "2"])
    pd.DataFrame({"text": ["one", "two"], "label": ["2", "10"]}).to_csv(tmp_path / "test.csv", index=False)
    texts = texts_of(text_config(tmp_path))
    assert [texts.label_names[i] for i in texts.splits["test"].labels] == ["2", "10"]


def test_categories_are_their_values(tmp_path: Path) -> None:
    table = frame(30).assign(label=lambda table: pd.Categorical(table.label.map({0: " bad", 1: "good"})))
    table.to_parquet(tmp_path / "train.parquet")
    assert texts_of(text_config(tmp_path)).label_names == ["bad", "good"]
    table = pd.DataFrame({"text": [f"text {i}" for i in range(30)], "label": pd.Categorical(["a;b", None, "b"] * 10)})
    table.to_parquet(tmp_path / "train.parquet")
    assert texts_of(text_config(tmp_path, label_separator=";")).label_names == ["a", "b"]


def test_other_columns(tmp_path: Path) -> None:
    frame(30).rename(columns={"text": "body", "label": "class"}).to_csv(tmp_path / "train.csv", index=False)
    texts = texts_of(text_config(tmp_path, text_column="body", label_column="class"))
    assert texts.splits["test"].texts[0].startswith("train text")
    for flag, column in (("text_column", "text"), ("label_column", "label")):
        given = {"text_column": "body", "label_column": "class"} | {flag: column}
        with pytest.raises(UserError, match=f"--{flag} {column}: must be a column of .*, which has: body, class"):
            texts_of(text_config(tmp_path, **given))


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["0.0", "1.0"], ["0", "1"]),  # pandas writes whole numbers so if a column once had gaps
        (["10", "9"], ["9", "10"]),
        (["01", "1"], ["01", "1"]),  # codes stay as they are written
        (["100000000000000000001", "100000000000000000002"], ["100000000000000000001", "100000000000000000002"]),
        (["1e3", "1000"], ["1000", "1e3"]),
        (["+1", "-1"], ["+1", "-1"]),
        ([" 2", "1 "], ["1", "2"]),
    ],
)
def test_labels_of_a_csv_file_that_look_like_numbers(tmp_path: Path, labels: list[str], names: list[str]) -> None:
    rows = "".join(f"text {i},{labels[i % 2]}\n" for i in range(30))
    assert texts_of(write_texts(tmp_path, "text,label\n" + rows)).label_names == names


def test_a_limit_that_leaves_out_a_class_brings_a_warning(tmp_path: Path) -> None:
    table = frame(1000).assign(label=["rare" if i % 50 == 0 else "usual" for i in range(1000)])
    table.to_csv(tmp_path / "train.csv", index=False)
    warning = "warning: --limit_train leaves no training text of class rare"
    assert warning in texts_of(text_config(tmp_path, limit_train=10)).notes
    assert warning not in texts_of(text_config(tmp_path, limit_train=100)).notes


def test_several_text_columns(tmp_path: Path) -> None:
    frame(30).assign(title="A title:").to_csv(tmp_path / "train.csv", index=False)
    texts = texts_of(text_config(tmp_path, text_column="title,text"))
    assert texts.splits["test"].texts[0].startswith("A title: train text")
    with pytest.raises(
        UserError, match=r"--text_column title,body: must be columns of .*, which has: text, label, title"
    ):
        texts_of(text_config(tmp_path, text_column="title,body"))


@pytest.mark.parametrize("inside", ["", "aclImdb"])
def test_imdb_tree(tmp_path: Path, inside: str) -> None:
    write_tree(tmp_path / inside)
    texts = texts_of(RunConfig.from_settings(data_dir=tmp_path))
    assert [len(split.texts) for split in texts.splits.values()] == [36, 4, 40]
    assert texts.splits["test"].labels.tolist() == [0] * 20 + [1] * 20
    assert texts.splits["test"].texts[0] == "test neg 0  end é"


def test_imdb_with_train_only_is_not_called_test(tmp_path: Path) -> None:
    frame(30).to_csv(tmp_path / "train.csv", index=False)
    assert texts_of(RunConfig.from_settings(data_dir=tmp_path)).source == "IMDb train, held out (local files)"


PHRASES = [f"Profit of company {i} rose to EUR {i} mn @ \xe4 .@{label}" for i in range(20) for label in ("positive",)]
PHRASES += [f"Sales {i} were flat .@neutral" for i in range(20)] + [f"Loss {i} .@negative" for i in range(20)]
PHRASES += ["Loss 3 .@negative", "Sales 4 were flat .@negative"]


@pytest.mark.parametrize("name", ["Sentences_50Agree.txt", "sentences_50agree.parquet"])
def test_phrasebank(tmp_path: Path, name: str) -> None:
    if name.endswith(".txt"):
        (tmp_path / name).write_bytes("\r\n".join(PHRASES).encode("latin-1") + b"\r\n")
    else:
        ids = {"negative": 0, "neutral": 1, "positive": 2}
        pairs = [phrase.rpartition("@") for phrase in PHRASES]
        pd.DataFrame({"sentence": [p[0] for p in pairs], "label": [ids[p[2]] for p in pairs]}).to_parquet(
            tmp_path / name
        )
    texts = texts_of(RunConfig.from_settings(dataset="financial_phrasebank", data_dir=tmp_path))
    assert texts.label_names == ["negative", "neutral", "positive"]
    assert texts.source == "Financial PhraseBank 50agree, held out (local files)"
    assert texts.notes == ["dropped 1 repeated sentences and 2 with conflicting labels"]
    rows = np.concatenate([split.rows for split in texts.splits.values()])
    assert sorted(rows) == sorted(set(range(60)) - {24})
    for split in texts.splits.values():
        lines = [f"{t}@{texts.label_names[i]}" for t, i in zip(split.texts, split.labels, strict=True)]
        assert lines == [PHRASES[row] for row in split.rows]
    with pytest.raises(UserError, match="--agreement"):
        texts_of(RunConfig.from_settings(dataset="financial_phrasebank", data_dir=tmp_path, agreement="all"))


# --- bad input


def rows_of(*lines: str) -> str:
    good = "".join(f"fine {i},{'ab'[i % 2]}\n" for i in range(20))
    return "text,label\n" + good + "".join(f"{line}\n" for line in lines)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.csv", rows_of(" ,a"), "no text in row 20"),
        ("train.csv", rows_of(",a", "x,b", ",a"), r"no text in 2 rows, first in row 20 \(the first one is row 0\)"),
        ("train.csv", rows_of("x,"), "no label in row 20"),
        ("train.csv", rows_of("x,c", "y,c"), "class 'c' has 2 texts: must be at least 3 for a stratified split: add"),
        ("train.csv", rows_of("x,c"), "has 1 text: .*: add texts of it, leave it out, or give a validation and a test"),
        ("train.csv", rows_of("good, really,b"), r"more fields than the header \(text, label\), .* in quotes"),
        ("train.csv", "text,label\n" + "good, really,b\n" * 20, r"more fields than the header \(text, label\)"),
        ("train.csv", "text,label\ngood, really,b\n" + rows_of(), r"more fields than the header \(text, label\)"),
        (
            "train.csv",
            "text;label\ngood, really;b\n",
            r"header has one column, text;label: separate .* instead of ';'\): give",
        ),
        ("train.csv", "text , label\nx,a\n", r"--text_column text: must be a column of .* has: 'text ', ' label'$"),
        (
            "train.csv",
            rows_of(*(f"x,{i}" for i in range(25))),
            r"column label: .* 45 texts have 27 different labels: if",
        ),
        ("train.csv", "PK\3\4 of Excel \udcd0", "is an Excel file or an archive: save it as CSV in UTF-8, or give"),
        ("train.csv", "d\udce9j\udce0 vu", "is not UTF-8: convert it, or give other data"),
        (
            "train.csv",
            '"a film\nand its sequel' + " or more" * 9 + '",b\nx,a\n',
            r"which has: a film and its .*\.\.\., b$",
        ),
        ("train.csv", "text,label\n", "has no rows"),
        ("train.csv", "", "is empty: give other data"),
        ("train.csv", 'text,label\n"open', "cannot be read"),
        ("train.csv", "text,label\n" + "x,a\n" * 20, "must have at least two labels, but all are 'a'"),
        ("train.jsonl", '{"text": "x", "label": 0}\n{broken', "cannot be read"),
        ("train.jsonl", '{"text": "x", "label": 0}\n{"label": 1}', "no text in row 1"),
        ("train.jsonl", '{"text": "x", "label": 0}\n{"text": 7, "label": 1}', "no text in row 1"),
        ("train.jsonl", '{"text": "x", "label": 0}\n{"text": "y"}', "no label in row 1"),
        ("train.jsonl", '{"text": "x", "label": 0}\n{"text": "y \\ud83d", "label": 1}', "cannot be read"),
        ("train.jsonl", '{"text": {"body": "x"}, "label": 0}', "no text in row 0 .*: it holds lists or objects: write"),
        ("train.jsonl", '{"text": "x", "label": "a"}' + '\n{"text": "y", "label": 1}' * 2, "strings, but one is 'a'"),
        (
            "train.jsonl",
            '{"text": "x", "label": {"a": 0}}\n{"text": "y", "label": {"a": 1}}',
            "all numbers or all strings",
        ),
        ("train.jsonl", '{"text": "x", "label": 0}\n[1, 2]', "cannot be read"),
        ("train.json", "[1, 2]", "element 1 must be an object"),
        ("train.parquet", "PAR1 nonsense PAR1", "cannot be read"),
        ("other.csv", rows_of(), r"must contain train with .*, or give the file itself, --data_dir .*other\.csv$"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        texts_of(write_texts(tmp_path, content, name))
    assert "\n" not in str(caught.value)
    assert "--" in str(caught.value), "the message names a flag"


@pytest.mark.parametrize("name", ["train.csv", "train.jsonl"])
def test_not_utf8(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes("text,label\nna\xefve,a\n".encode("latin-1"))
    with pytest.raises(UserError, match=f"{name} is not UTF-8"):
        texts_of(text_config(tmp_path))


def test_imdb_tree_not_utf8_or_empty(tmp_path: Path) -> None:
    write_tree(tmp_path)
    review = tmp_path / "train" / "pos" / "0_1.txt"
    review.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"0_1\.txt is not UTF-8"):
        texts_of(RunConfig.from_settings(data_dir=tmp_path))
    review.write_text(" \n")
    with pytest.raises(UserError, match=r"0_1\.txt is empty"):
        texts_of(RunConfig.from_settings(data_dir=tmp_path))
    for path in (tmp_path / "train" / "neg").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"neg must contain \*\.txt"):
        texts_of(RunConfig.from_settings(data_dir=tmp_path))


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pd, "read_csv", refuse)
    with pytest.raises(UserError, match=r"cannot be read \(.*Permission denied"):
        texts_of(write_texts(tmp_path, rows_of()))


def test_missing_or_empty_data_dir(tmp_path: Path) -> None:
    for dataset in ("imdb", "text", "financial_phrasebank"):
        with pytest.raises(UserError, match="no such file or folder"):
            texts_of(RunConfig.from_settings(dataset=dataset, data_dir=tmp_path / "nowhere"))
        with pytest.raises(UserError, match=f"--data_dir {tmp_path}"):
            texts_of(RunConfig.from_settings(dataset=dataset, data_dir=tmp_path))


def test_two_files_for_one_split_and_unknown_single_file(tmp_path: Path) -> None:
    write_texts(tmp_path, rows_of())
    config = write_texts(tmp_path, '{"text": "x", "label": 0}', "train.jsonl")
    with pytest.raises(UserError, match=r"train\.csv and train\.jsonl are both train"):
        texts_of(config)
    write_texts(tmp_path, rows_of(), "Train.CSV.gz")
    with pytest.raises(UserError, match=r"Train\.CSV\.gz and train\.csv and train\.jsonl are both train"):
        texts_of(config)
    (tmp_path / "notes.xlsx").touch()
    with pytest.raises(UserError, match=r"single file must end in one of \.parquet.*: save it as CSV in UTF-8$"):
        texts_of(text_config(tmp_path / "notes.xlsx"))


def test_phrasebank_line_without_label(tmp_path: Path) -> None:
    (tmp_path / "Sentences_AllAgree.txt").write_text("Fine .@positive\nno label here\n")
    with pytest.raises(UserError, match=r"row 1 .*sentence@label"):
        texts_of(RunConfig.from_settings(dataset="financial_phrasebank", data_dir=tmp_path, agreement="all"))


# --- download


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A local web server: its address and the folder it serves."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", folder
        running.shutdown()


@pytest.fixture
def stanford(server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny aclImdb archive in place of Stanford's; the archive's path."""
    write_tree(tmp_path / "aclImdb")
    path = server[1] / "aclImdb.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(tmp_path / "aclImdb", "aclImdb")
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(imdb, "STANFORD", hub.Archive(f"{server[0]}/aclImdb.tar.gz", md5))
    return path


STANFORD = RunConfig.from_settings(data_source="stanford")


def test_stanford_download(stanford: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
def test_stanford_files_that_are_lost_are_made_again(
    cache: Path, lost: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = texts_of(STANFORD)
    for name in lost:
        (cache / "imdb_stanford" / name).unlink()
    left = set((cache / "imdb_stanford").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(imdb, "STANFORD", hub.Archive("http://127.0.0.1:9/a.tar.gz", ""))
        with pytest.raises(UserError, match="cannot be reached"):
            texts_of(STANFORD)
    assert set((cache / "imdb_stanford").iterdir()) == left, "without a network nothing more is lost"
    assert texts_of(STANFORD).source == texts.source
    assert len(list((cache / "imdb_stanford").iterdir())) == 3


@pytest.mark.usefixtures("stanford")
def test_a_cache_that_cannot_hold_the_stanford_files(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advice = "set FINETUNE_LORA_CACHE to another folder$"
    for place, name in ((tarfile.TarFile, "extractall"), (pd.DataFrame, "to_parquet"), (Path, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full_disk)
            with pytest.raises(UserError, match=rf"^IMDb cannot be stored in {cache} \(No space left.*\): {advice}"):
                texts_of(STANFORD)
        assert list(cache.iterdir()) == []
    (tmp_path / "file").touch()
    monkeypatch.setenv("FINETUNE_LORA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=rf"^IMDb cannot be stored in .*file/cache \(Not a directory\): {advice}"):
        texts_of(STANFORD)


def test_stanford_archive_damaged(stanford: Path, cache: Path) -> None:
    stanford.write_bytes(stanford.read_bytes()[:-10])
    with pytest.raises(UserError, match="arrived damaged"):
        texts_of(STANFORD)
    assert list(cache.iterdir()) == []


@pytest.mark.usefixtures("stanford")
def test_stanford_download_interrupted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_bar: Any, _bytes: int) -> None:
        assert list(cache.rglob("archive.tar.gz")), "interrupted while the temporary file is there"
        raise KeyboardInterrupt

    monkeypatch.setattr(hub.tqdm, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        texts_of(STANFORD)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("kind", ["name", "link", "absolute link"])
def test_stanford_archive_that_escapes_its_folder(
    server: tuple[str, Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
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
    with pytest.raises(UserError, match="cannot be unpacked"):
        texts_of(STANFORD)
    assert list(cache.iterdir()) == []
    assert list(tmp_path.rglob("evil.txt")) == []


def test_unreachable_hosts_are_reported_in_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(imdb, "STANFORD", hub.Archive("http://127.0.0.1:9/a.tar.gz", ""))
    began = time.monotonic()
    no_imdb = "cannot be reached: give --data_dir PATH, or --offline for packaged reviews and a packaged model$"
    financial = "cannot be reached: give --data_dir PATH$"  # that set is not packaged
    cases = (
        (RunConfig.from_settings(), no_imdb),
        (STANFORD, no_imdb),
        (RunConfig.from_settings(dataset="financial_phrasebank"), financial),
    )
    for config, line in cases:
        with pytest.raises(UserError, match=line):
            texts_of(config)
    assert time.monotonic() - began < 10


def test_a_host_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(*_args: Any, **_options: Any) -> io.BytesIO:
        time.sleep(1)
        return io.BytesIO()

    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.2)
    monkeypatch.setattr(hub.urllib.request, "urlopen", sleep)
    began = time.monotonic()
    with pytest.raises(UserError, match="the model x is not on this machine"):
        hub.require_hub("the model x", "y")
    assert time.monotonic() - began < 1


def test_hub_switched_off_by_its_own_variable(server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.constants, "ENDPOINT", server[0])
    hub.require_hub("anything", "--offline")
    monkeypatch.setattr(hub.constants, "ENDPOINT", f"{server[0]}/missing")  # a 404 is an answer
    hub.require_hub("anything", "--offline")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="--offline"):
        hub.require_hub("anything", "--offline")


def test_hub_files_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_phrasebank_from_the_hubs_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bank.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for level in ("50Agree", "AllAgree"):
            content = "\r\n".join(PHRASES if level == "50Agree" else PHRASES[:-2]).encode("latin-1")
            archive.writestr(f"FinancialPhraseBank-v1.0/Sentences_{level}.txt", content)
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: str(path))
    texts = texts_of(RunConfig.from_settings(dataset="financial_phrasebank"))
    assert sum(len(split.texts) for split in texts.splits.values()) == 59
    texts = texts_of(RunConfig.from_settings(dataset="financial_phrasebank", agreement="all"))
    assert sum(len(split.texts) for split in texts.splits.values()) == 60
    prefetch_texts(RunConfig.from_settings(dataset="financial_phrasebank").data)
