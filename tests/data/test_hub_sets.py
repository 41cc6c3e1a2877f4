"""Data sets of the hub, from a cache in the hub's own layout."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pandas as pd
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

import finetune_lora
import predict
from benchmarks.harness import TRAINING_FLAGS
from finetuning import hub
from finetuning.config import RunConfig
from finetuning.runs.files import read_result
from tests.common import ROOT, Capture, Patch, frame, refusal_of, some, texts_of
from tests.hub_cache import COMMIT, card, hub_server, parquet, write_hub_cache

SPLITS = {"train": 40, "validation": 12, "test": 10}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: Patch) -> Path:
    """The hub's cache, empty, as on a machine without a network."""
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "hub"


def files_of(config: str, **changes: pd.DataFrame) -> dict[str, bytes | str]:
    """A card and three parquet files, each with other texts."""
    tables = {split: frame(rows, word=split) for split, rows in SPLITS.items()} | changes
    return {"README.md": card(config)} | {f"{config}/{name}.parquet": parquet(table) for name, table in tables.items()}


def config_of(dataset: str, **settings: object) -> RunConfig:
    return RunConfig.from_settings(dataset=dataset, **settings)


def refusal(dataset: str, **settings: object) -> str:
    return refusal_of(texts_of, config_of(dataset, **settings))


# --- what is read


@pytest.mark.parametrize("dataset", ["me/films", "me/films:plain"])
@pytest.mark.parametrize("offline", [True, False])
def test_splits_columns_and_class_names_come_from_the_set(cache: Path, dataset: str, offline: bool) -> None:
    write_hub_cache(cache, "me/films", files_of("plain"))
    texts = texts_of(config_of(dataset, offline=offline))
    assert texts.source == f"{dataset}, official test (Hugging Face hub)"
    assert texts.label_names == ["bad", "good"]
    assert texts.columns == {"text_column": "text", "label_column": "label"}
    assert {name: len(split.texts) for name, split in texts.splits.items()} == SPLITS
    assert texts.splits["test"].texts == [f"test text {i}" for i in range(10)]
    assert texts.splits["test"].labels.tolist() == [0, 1] * 5
    assert texts.notes == []


def test_configs(cache: Path) -> None:
    files = files_of("one") | files_of("two", test=frame(6, word="other")) | {"README.md": card("one", "two")}
    write_hub_cache(cache, "me/films", files)
    assert len(texts_of(config_of("me/films:two")).splits["test"].texts) == 6
    assert "--dataset me/films: must name one of the configs one, two, as me/films:one does" in refusal("me/films")
    assert "--dataset me/films:three: must name one of the configs one, two" in refusal("me/films:three")


def test_a_test_without_labels_is_no_test(cache: Path) -> None:
    write_hub_cache(cache, "me/films", files_of("plain", test=frame(10, word="secret").assign(label=-1)))
    texts = texts_of(config_of("me/films"))
    assert texts.source == "me/films, validation as test (Hugging Face hub)"
    assert texts.notes == [
        "the test split has no labels: validation is the test, and a new validation is taken out of train"
    ]
    assert texts.splits["test"].texts == [f"validation text {i}" for i in range(12)]
    assert [len(split.texts) for split in texts.splits.values()] == [36, 4, 12]
    assert all(text.startswith("train") for text in texts.splits["validation"].texts)
    assert not any("secret" in text for split in texts.splits.values() for text in split.texts)


def test_texts_without_an_agreed_label_are_left_out(cache: Path) -> None:
    """As in SNLI. Of a column without names of classes, -1 is a class."""
    tables = {split: frame(rows, word=split) for split, rows in SPLITS.items()}
    for split, rows in {"train": [3, 7], "test": [0]}.items():
        tables[split].loc[rows, "label"] = -1
    write_hub_cache(cache, "me/films", files_of("plain", **tables))
    texts = texts_of(config_of("me/films"))
    assert texts.notes == ["left out texts without an agreed label (-1): 2 of train, 1 of test"]
    assert [len(split.texts) for split in texts.splits.values()] == [38, 12, 9]
    assert texts.splits["test"].rows.tolist() == list(range(1, 10))
    assert texts.splits["test"].texts[0] == "test text 1"
    write_hub_cache(cache, "me/numbers", {"train.csv": frame(40).replace({"label": {0: -1}}).to_csv(index=False)})
    assert texts_of(config_of("me/numbers")).label_names == ["-1", "1"]


def test_without_test_and_validation(cache: Path) -> None:
    write_hub_cache(cache, "me/one", {"train.csv": frame(40).to_csv(index=False)})
    texts = texts_of(config_of("me/one"))
    assert texts.source == "me/one, held out (Hugging Face hub)"
    assert [len(split.texts) for split in texts.splits.values()] == [32, 4, 4]
    assert texts.label_names == ["0", "1"]
    train = frame(40).to_json(orient="records", lines=True)
    write_hub_cache(cache, "me/two", {"train.jsonl": train, "test.jsonl": '{"text": "x", "label": -1}'})
    lists = frame(40).assign(label=[[["a"], ["b"], ["a", "b"], []][i % 4] for i in range(40)])
    hidden = '{"text": "x", "label": []}\n{"text": "y", "label": []}\n'
    content = {"train.jsonl": lists.to_json(orient="records", lines=True), "test.jsonl": hidden}
    write_hub_cache(cache, "me/three", content)
    for name in ("me/two", "me/three"):
        texts = texts_of(config_of(name))
        assert [len(split.texts) for split in texts.splits.values()] == [32, 4, 4]
        assert texts.notes[:1] == ["the test split has no labels: a test is taken out of train"]
        assert len(texts.notes) == (1 if name == "me/two" else 2), "lists are stratified by their rarest label"


def test_names_of_splits(cache: Path) -> None:
    table = frame(40).rename(columns={"text": "sentence"})
    splits = {"train": table, "dev_matched": table[:6], "dev_mismatched": table[:8], "extra": table[:4]}
    files = {f"data/{name}.csv": split.to_csv(index=False) for name, split in splits.items()}
    entries = "".join(f"  - {{split: {name}, path: data/{name}.csv}}\n" for name in splits)
    files["README.md"] = f"---\nconfigs:\n- config_name: default\n  data_files:\n{entries}---\n"
    write_hub_cache(cache, "me/pairs", files)
    given = "train=train, validation=dev_mismatched, test=dev_matched"
    texts = texts_of(config_of("me/pairs", split_names=given))
    assert [len(texts.splits[part].texts) for part in ("validation", "test")] == [8, 6]
    assert "unused splits: extra" in texts.notes
    assert texts_of(config_of("me/pairs")).notes == ["unused splits: dev_matched, dev_mismatched, extra"]
    line = refusal("me/pairs", split_names="train=extra,test=dev")
    assert "--dataset me/pairs has no split dev, but train, dev_matched, dev_mismatched, extra" in line


def test_a_set_without_train(cache: Path) -> None:
    write_hub_cache(cache, "me/tested", {"test.csv": frame(9).to_csv(index=False)})
    assert "has no split train, but test: give --split_names train=NAME" in refusal("me/tested")


def test_other_columns(cache: Path) -> None:
    table = frame(40).rename(columns={"text": "body", "label": "stars"}).assign(id="x", title="A title")
    write_hub_cache(cache, "me/reviews", {"train.csv": table.to_csv(index=False)})
    line = refusal("me/reviews")
    assert "body or title can be the texts: give --text_column NAME, or A,B for two columns joined" in line
    assert "the columns are body (text), stars (other), id (text), title (text)" in line
    texts = texts_of(config_of("me/reviews", text_column="title,body"))
    assert texts.columns == {"text_column": "title,body", "label_column": "stars"}
    assert texts.splits["test"].texts[0].startswith("A title train text")
    columns = "which has: body, stars, id, title"
    assert f"--text_column text: must be a column of train of me/reviews, {columns}" in refusal(
        "me/reviews", text_column="text"
    )
    assert f"--label_column kind: must be a column of train of me/reviews, {columns}" in refusal(
        "me/reviews", text_column="body", label_column="kind"
    )


def test_pairs_of_texts(cache: Path) -> None:
    table = frame(40).rename(columns={"text": "premise"})
    table["hypothesis"] = [f"claim {i}" for i in range(40)]
    write_hub_cache(cache, "me/pairs", {"train.csv": table.to_csv(index=False)})
    assert "premise or hypothesis can be the texts" in refusal("me/pairs")
    texts = texts_of(config_of("me/pairs", text_pair_column="hypothesis"))
    assert texts.columns == {"text_column": "premise", "label_column": "label"}
    assert some(texts.splits["train"].pairs)[0].startswith("claim ")


def test_groups_of_texts(cache: Path) -> None:
    table = frame(40).assign(author=[f"author {i // 2}" for i in range(40)])
    write_hub_cache(cache, "me/letters", {"train.csv": table.to_csv(index=False)})
    assert "text or author can be the texts" in refusal("me/letters")
    texts = texts_of(config_of("me/letters", group_column="author"))
    assert texts.columns == {"text_column": "text", "label_column": "label"}
    groups = [set(split.rows // 2) for split in texts.splits.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 20


def test_multi_label_data(cache: Path) -> None:
    table = frame(40).assign(labels=[[i % 3] if i % 4 else [0, 2] for i in range(40)]).drop(columns="label")
    write_hub_cache(cache, "me/several", {"train.parquet": parquet(table)})
    texts = texts_of(config_of("me/several"))
    assert texts.columns == {"text_column": "text", "label_column": "labels"}
    assert texts.label_names == ["0", "1", "2"]


def test_a_text_that_trains_is_not_tested(cache: Path) -> None:
    write_hub_cache(cache, "me/films", files_of("plain", test=frame(10, word="train")))
    assert texts_of(config_of("me/films")).leaks_dropped == 10


# --- what is refused


def test_no_label_in_all_of_train(cache: Path) -> None:
    write_hub_cache(cache, "me/films", files_of("plain", train=frame(40).assign(label=-1)))
    assert "--label_column label: train of me/films has no label in 40 rows, first in row 0 (" in refusal("me/films")
    assert refusal("me/films").endswith("download it, change it, and give --dataset text")


def test_a_row_that_lacks_a_text_has_its_number_in_the_file(cache: Path) -> None:
    table = frame(40)
    table.loc[:9, "label"], table.loc[20, "text"] = -1, " "
    write_hub_cache(cache, "me/films", files_of("plain", train=table))
    assert "train of me/films has no text in row 20 (" in refusal("me/films")


def test_not_in_the_cache(cache: Path) -> None:
    assert "--dataset me/films is not in the hub's cache, and --offline" in refusal("me/films", offline=True)
    assert "--dataset me/films is not on this machine" in refusal("me/films")
    snapshot = write_hub_cache(cache, "me/films", files_of("plain"))
    (snapshot / "plain" / "train.parquet").unlink()
    partly = "--dataset me/films is only partly in the hub's cache, and --offline was given: --prefetch it first"
    assert refusal("me/films", offline=True) == partly


def test_a_part_of_the_files_is_not_taken_for_the_set(cache: Path) -> None:
    parts = {f"train-0000{i}-of-00002.parquet": parquet(frame(20, word=f"part {i}")) for i in range(2)}
    snapshot = write_hub_cache(cache, "me/parts", {f"data/{name}": part for name, part in parts.items()})
    assert len(texts_of(config_of("me/parts")).splits["train"].texts) == 32
    (snapshot / "data" / "train-00001-of-00002.parquet").unlink()
    (snapshot / "convert.py").write_text("no loading script")
    assert "--dataset me/parts is only partly in the hub's cache" in refusal("me/parts", offline=True)
    assert "--dataset me/parts is only partly on this machine, and https://" in refusal("me/parts")
    hashed = {f"train-0000{i}-of-00002-{i}f3a.parquet": part for i, part in enumerate(parts.values())}
    write_hub_cache(cache, "me/hashed", {f"data/{name}": part for name, part in hashed.items()})  # of older versions
    assert len(texts_of(config_of("me/hashed")).splits["train"].texts) == 32
    splits = "".join(f"  - {{name: {name}, num_examples: 40}}\n" for name in ("train", "test"))
    metadata = f"---\ndataset_info:\n  features:\n  - {{name: text, dtype: string}}\n  splits:\n{splits}---\n"
    write_hub_cache(cache, "me/no_test", {"README.md": metadata, "train.csv": frame(40).to_csv(index=False)})
    assert "--dataset me/no_test is only partly in the hub's cache" in refusal("me/no_test", offline=True)


def test_code_is_never_run(cache: Path, tmp_path: Path) -> None:
    script = f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    expected = {  # the library itself refuses a script that is named like its folder
        "films.py": "has a loading script and no data files, and the hub's code is never run: convert it, and give",
        f"{COMMIT}.py": "Dataset scripts are no longer supported",
    }
    for name, words in expected.items():
        repository = f"me/{name[:5]}"
        write_hub_cache(cache, repository, {name: script, "README.md": "A card without metadata"})
        assert words in refusal(repository)
    assert not (tmp_path / "ran").exists()


def test_damaged_or_other_files(cache: Path, capfd: Capture) -> None:
    write_hub_cache(cache, "me/damaged", {"train.parquet": b"PAR1 nonsense PAR1"})
    assert "--dataset me/damaged cannot be read (" in refusal("me/damaged")
    write_hub_cache(cache, "me/pictures", {"train/bad/a.png": b"png", "train/good/b.png": b"png"})
    assert "--dataset me/pictures holds imagefolder: only parquet, csv" in refusal("me/pictures")
    write_hub_cache(cache, "me/empty", {"train.csv": "text,label\n"})
    assert "me/empty" in refusal("me/empty")
    write_hub_cache(cache, "me/mixed", {"train.csv": "text,label\nx,1\n", "test.csv": "text,kind\nx,1\n"})
    assert "--dataset me/mixed cannot be read (" in refusal("me/mixed")
    shown = capfd.readouterr()
    assert "Failed" not in shown.err
    assert "Traceback" not in shown.err


# --- whole commands


def test_from_prefetch_to_prediction(cache: Path, distilbert: Path, tmp_path: Path, capsys: Capture) -> None:
    write_hub_cache(cache, "me/films", files_of("plain", test=frame(10).assign(label=-1)))
    common = ["--dataset", "me/films:plain", "--model_name", str(distilbert), "--max_length", "16"]
    assert finetune_lora.main([*common, "--prefetch"]) == 0
    assert "data: in the cache" in capsys.readouterr().out
    run = tmp_path / "run"
    more = f"--offline --epochs 1 {TRAINING_FLAGS} --accelerator cpu --precision fp32 --output_dir"
    assert finetune_lora.main([*common, *more.split(), str(run)]) == 0
    assert "warning" not in capsys.readouterr().err
    data = read_result(run)["data"]
    assert data["source"] == "me/films:plain, validation as test (Hugging Face hub)"
    assert data["columns"] == {"text_column": "text", "label_column": "label"}
    assert data["sizes"] == {"train": 36, "validation": 4, "test": 12}
    assert len(data["notes"]) == 1
    frame(3).to_json(tmp_path / "new.jsonl", orient="records", lines=True)
    assert predict.main([str(run), "--file", str(tmp_path / "new.jsonl")]) == 0
    assert "train text 2," in capsys.readouterr().out, "the column that the run found"


def test_refused_sets_leave_no_directory(
    cache: Path, distilbert: Path, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    def refused(dataset: str, words: str, *more: str) -> None:
        given = ["--dataset", dataset, "--model_name", str(distilbert), "--max_length", "16", *more]
        assert finetune_lora.main([*given, "--accelerator", "cpu", "--output_dir", str(tmp_path / "refused")]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert [line.partition(words)[:2] for line in lines] == [(f"error: --dataset {dataset}", words)]
        assert not (tmp_path / "refused").exists()

    def ask_hub(*_: object, local_files_only: bool = False, **__: object) -> None:
        response: Any = SimpleNamespace(headers={}, request=None)
        raise LocalEntryNotFoundError("not cached") if local_files_only else GatedRepoError("no", response=response)

    refused("me/nothing", " is not in the hub's cache", "--offline")
    write_hub_cache(cache, "me/films", {"films.py": "", "README.md": "A card without metadata"})
    refused("me/films", " has a loading script and no data files", "--offline")
    monkeypatch.setattr("finetuning.hub.snapshot_download", ask_hub)
    monkeypatch.setattr("finetuning.hub.require_hub", lambda *_: None)
    refused("me/gated", ": the hub asks you to accept its terms")


# Python code that reads a data set, for a process that does not import torch.
READ = """
from finetuning.config import RunConfig
from finetuning.errors import UserError
from local_dataset_utilities import load_texts, prefetch_texts

def read(dataset, how):
    config = RunConfig.from_settings(dataset=dataset)
    try:
        print(how(config.data) if how is prefetch_texts else how(config.data, False).source)
    except UserError as error:
        print(error)
"""


def in_a_process(code: str, **variables: str) -> list[str]:
    """The lines that Python code prints; a warning is an error, and nothing else may be printed."""
    variables = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **variables}
    command = [sys.executable, "-W", "error", "-c", READ + code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | variables)
    assert (done.stderr, done.returncode) == ("", 0)
    return done.stdout.splitlines()


def test_hf_home_in_a_process_of_its_own(tmp_path: Path) -> None:
    write_hub_cache(tmp_path / "hub", "me/films", files_of("plain"))
    shown = in_a_process("read('me/films', load_texts)", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert shown == ["me/films, official test (Hugging Face hub)"]
    assert (tmp_path / "datasets").is_dir()


def test_prefetch_downloads_what_a_machine_without_network_needs(tmp_path: Path) -> None:
    write_hub_cache(tmp_path / "hub", "me/films", {"README.md": card("plain")})  # what another program has fetched
    with hub_server(files_of("plain")) as address:
        variables = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": address}
        names = ("me/films", "me/nothing", "me/gated")
        assert in_a_process("".join(f"read('{name}', prefetch_texts)\n" for name in names), **variables) == [
            "None",
            "--dataset me/nothing: the hub has no such dataset, or it is private",
            "--dataset me/gated: the hub asks you to accept its terms, and to log in, first",
        ]
    assert in_a_process("read('me/films', load_texts)\nread('me/nothing', load_texts)", **variables) == [
        "me/films, official test (Hugging Face hub)",
        f"--dataset me/nothing is not on this machine, and {address} cannot be reached: give --dataset text"
        f" --data_dir PATH",
    ]
    assert (tmp_path / "datasets").is_dir()
