"""Formats and bad input."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest

from finetuning.config import RunConfig
from finetuning.errors import UserError
from tests.common import check_refusal, frame, refusal_of, text_config, texts_of, write_texts
from tests.data.test_files import write

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
    path = write(tmp_path, f"train{suffix}", table)
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


@pytest.mark.parametrize("stored", ["{", "[]", '{"info": null}', '{"info": {"features": {"label": []}}}'])
def test_parquet_of_another_program_has_no_label_names(tmp_path: Path, stored: str) -> None:
    table = pyarrow.Table.from_pandas(frame(40))
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": stored}), tmp_path / "train.parquet")
    assert texts_of(text_config(tmp_path)).label_names == ["0", "1"]


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


def test_whole_numbers_of_databases_are_their_values(tmp_path: Path) -> None:
    frame(30).assign(label=[Decimal(1 + i % 2) for i in range(30)]).to_parquet(tmp_path / "train.parquet")
    assert texts_of(text_config(tmp_path)).label_names == ["1", "2"]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_short_floats_are_what_people_write(tmp_path: Path, dtype: type) -> None:
    frame(30).assign(label=np.array([0.1, 0.5, 1] * 10, dtype)).to_parquet(tmp_path / "train.parquet")
    assert texts_of(text_config(tmp_path)).label_names == ["0.1", "0.5", "1.0"]


@pytest.mark.parametrize("twice", ["text", "label", "other"])
def test_only_a_needed_column_must_be_there_once(tmp_path: Path, twice: str) -> None:
    table = pyarrow.Table.from_pandas(frame(30))
    for _ in range(2 if twice == "other" else 1):
        table = table.append_column(twice, table[table.column_names[0]])
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    if twice == "other":
        assert len(texts_of(text_config(tmp_path)).label_names) == 2
        return
    check_refusal(f"train.parquet: two of its columns are named {twice}: rename one", texts_of, text_config(tmp_path))


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


@pytest.mark.parametrize("settings", [{}, {"kfold": 5}])
def test_a_class_that_only_test_texts_have_brings_a_warning(tmp_path: Path, settings: dict[str, Any]) -> None:
    copies = [f"copy {i}" for i in range(4)]
    write_texts(tmp_path, rows_of(*(f"{text},c" for text in copies)))
    rows = "".join(f"{text},{'ab'[i % 2]}\n" for i, text in enumerate(copies))
    write_texts(tmp_path, f"text,label\n{rows}", "test.csv")
    write_texts(tmp_path, "text,label\nnew 1,a\nnew 2,b\n", "validation.csv")
    warning = "warning: the removal of texts of validation and test leaves no training text of class c"
    assert warning in texts_of(text_config(tmp_path, **settings)).notes


def test_files_that_are_no_split_are_named(tmp_path: Path) -> None:
    for name in ("train.csv", "dev.csv", "test-00000-of-00002.csv"):
        write_texts(tmp_path, rows_of(), name)
    note = "unused files: dev.csv, test-00000-of-00002.csv: the names of splits are train, validation, test"
    assert note in texts_of(text_config(tmp_path)).notes
    write_texts(tmp_path, rows_of().replace(",a", ",0").replace(",b", ",1"))
    assert note in texts_of(RunConfig.from_settings(dataset="imdb", data_dir=tmp_path)).notes
    assert not any("unused" in text for text in texts_of(text_config(tmp_path / "train.csv")).notes)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"text_column": "text,label"}, "--text_column text,label: column label holds the labels"),
        ({"text_column": "label"}, "--text_column label: column label holds the labels"),
        ({"text_pair_column": "title,label"}, "--text_pair_column title,label: column label holds the labels"),
        (
            {"text_column": "text,year"},
            "--text_column text,year: .* has no text in 30 rows.*: column year holds int: write",
        ),
        ({"text_column": "raw"}, "--text_column raw: .* has no text in 30 rows.*: column raw holds bytes: write"),
    ],
)
def test_columns_that_are_no_text(tmp_path: Path, settings: dict[str, Any], line: str) -> None:
    frame(30).assign(title="A title", year=1999, raw=b"bytes").to_parquet(tmp_path / "train.parquet")
    check_refusal(f"^{line}", texts_of, text_config(tmp_path, **settings))


def test_several_text_columns(tmp_path: Path) -> None:
    frame(30).assign(title="A title:").to_csv(tmp_path / "train.csv", index=False)
    texts = texts_of(text_config(tmp_path, text_column="title,text"))
    assert texts.splits["test"].texts[0].startswith("A title: train text")
    line = r"--text_column title,body: must be columns of .*, which has: text, label, title"
    check_refusal(line, texts_of, text_config(tmp_path, text_column="title,body"))


# --- bad input


def rows_of(*lines: str) -> str:
    good = "".join(f"fine {i},{'ab'[i % 2]}\n" for i in range(20))
    return "text,label\n" + good + "".join(f"{line}\n" for line in lines)


CSV, JSONL = "train.csv", "train.jsonl"
BAD_FILES = [
    (CSV, rows_of(" ,a"), "no text in row 20"),
    (CSV, rows_of(",a", "x,b", ",a"), r"no text in 2 rows, first in row 20 \(the first one is row 0\)"),
    (CSV, rows_of("x,"), "no label in row 20"),
    (CSV, rows_of("x,c", "y,c"), "class 'c' has 2 texts: must be at least 3 for a stratified split: add"),
    (CSV, rows_of("x,c"), "has 1 text: .*: add texts of it, leave it out, or give a validation and a test"),
    (CSV, rows_of("good, really,b"), r"more fields than the header \(text, label\), .* in quotes"),
    (CSV, "text,label\n" + "good, really,b\n" * 20, r"more fields than the header \(text, label\)"),
    (CSV, "text,label\ngood, really,b\n" + rows_of(), r"more fields than the header \(text, label\)"),
    (CSV, "text;label\ngood, really;b\n", r"header has one column, text;label: separate .* instead of ';'\): give"),
    (CSV, "text , label\nx,a\n", r"--text_column text: must be a column of .* has: 'text ', ' label'$"),
    (CSV, rows_of(*(f"x,{i}" for i in range(25))), r"column label: .* 45 texts have 27 different labels: if"),
    (CSV, "PK\3\4 of Excel \udcd0", "is an Excel file or an archive: save it as CSV in UTF-8, or give"),
    (CSV, "d\udce9j\udce0 vu", r"is not UTF-8: convert it \(iconv\), or give other data"),
    (
        CSV,
        '"a film\nand its sequel' + " or more" * 9 + '",b\nx,a\n',
        r"which has: a film and its seq\.\.\.ore or more or more, b$",
    ),
    (CSV, "text,label\n", "has no rows"),
    (CSV, "", "is empty: give other data"),
    (CSV, 'text,label\n"open', "cannot be read"),
    (CSV, "text,label\n" + "x,a\n" * 20, "must have at least two labels, but all are 'a'"),
    (JSONL, '{"text": "x", "label": 0}\n{broken', "cannot be read"),
    (JSONL, '{"text": "x", "label": 0}\n{"label": 1}', "no text in row 1"),
    (JSONL, '{"text": "x", "label": 0}\n{"text": 7, "label": 1}', "no text in row 1 .* text holds int: write"),
    (JSONL, '{"text": "x", "label": 0}\n{"text": "y"}', "no label in row 1"),
    (JSONL, '{"text": "x", "label": 0}\n{"text": "y \\ud83d", "label": 1}', "cannot be read"),
    (JSONL, '{"text": {"body": "x"}, "label": 0}', "no text in row 0 .*: column text holds lists or objects: write"),
    (JSONL, '{"text": "x", "label": "a"}' + '\n{"text": "y", "label": 1}' * 2, "strings, but one is 'a'"),
    (JSONL, '{"text": "x", "label": {"a": 0}}\n{"text": "y", "label": {"a": 1}}', "all numbers or all strings"),
    (JSONL, '{"text": "x", "label": 0}\n[1, 2]', "cannot be read"),
    ("train.json", "[1, 2]", "element 1 must be an object"),
    ("train.parquet", "PAR1 nonsense PAR1", "cannot be read"),
    ("other.csv", rows_of(), r"must contain train with .*, or give a file itself, as --data_dir .*other\.csv$"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    assert "--" in check_refusal(message, texts_of, write_texts(tmp_path, content, name)), "the message names a flag"


@pytest.mark.parametrize("name", ["train.csv", "train.jsonl"])
def test_not_utf8(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes("text,label\nna\xefve,a\n".encode("latin-1"))
    assert f"{name} is not UTF-8" in refusal_of(texts_of, text_config(tmp_path))


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pd, "read_csv", refuse)
    check_refusal(r"cannot be read \(.*Permission denied", texts_of, write_texts(tmp_path, rows_of()))


def test_missing_or_empty_data_dir(tmp_path: Path) -> None:
    for path, line in (
        (tmp_path / "nowhere", "no such file or folder"),
        (tmp_path, f"--data_dir {tmp_path}"),
        (Path("/dev/null"), "--data_dir /dev/null: is a pipe or a device: save it as a file first"),
    ):
        for dataset in ("imdb", "text", "financial_phrasebank"):
            check_refusal(line, texts_of, RunConfig.from_settings(dataset=dataset, data_dir=path))


def test_of_a_folder_of_the_hub_the_training_file_is_named(tmp_path: Path) -> None:
    for split in ("test", "train"):
        write_texts(tmp_path, rows_of(), f"{split}-00000-of-00001.csv")
    check_refusal("give a file itself, as --data_dir .*train-00000-of-00001.csv$", texts_of, text_config(tmp_path))


def test_truths_of_json_are_the_words_of_a_csv(tmp_path: Path) -> None:
    write_texts(tmp_path, "text,label\n" + "".join(f"x {i},{i % 2 == 0}\n" for i in range(20)))
    write_texts(tmp_path, '{"text": "y", "label": true}\n{"text": "z", "label": false}', "test.jsonl")
    found = texts_of(text_config(tmp_path))
    assert (found.label_names, found.splits["test"].labels.tolist()) == (["False", "True"], [1, 0])
    write_texts(tmp_path, '{"text": "y", "label": 1}\n{"text": "z", "label": 0}', "test.jsonl")
    check_refusal("but one is .: write them alike in all files", texts_of, text_config(tmp_path))


def test_two_files_for_one_split_and_unknown_single_file(tmp_path: Path) -> None:
    write_texts(tmp_path, rows_of())
    config = write_texts(tmp_path, '{"text": "x", "label": 0}', "train.jsonl")
    assert "train.csv and train.jsonl are both train" in refusal_of(texts_of, config)
    write_texts(tmp_path, rows_of(), "Train.CSV.gz")
    assert "Train.CSV.gz and train.csv and train.jsonl are both train" in refusal_of(texts_of, config)
    (tmp_path / "notes.xlsx").touch()
    with pytest.raises(UserError, match=r"single file must end in one of \.parquet.*: save it as CSV in UTF-8$"):
        texts_of(text_config(tmp_path / "notes.xlsx"))
