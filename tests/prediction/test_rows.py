import gzip
import json
import os
import shutil
import socket
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from finetuning.errors import UserError
from finetuning.prediction.rows import STANDARD_INPUT, Survey, file_of, given_texts, survey
from tests.common import full_disk, refusal_of, some

pytestmark = pytest.mark.usefixtures("small_chunks")


def texts_of(path: Path, column: str = "text", pair: str | None = None) -> list[dict[str, list[Any]]]:
    """The texts of each chunk; the file is read twice, and must say the same."""
    with file_of(path, column, pair) as source:
        first, second = ([rows.texts for rows in source.rows()] for _ in range(2))
    assert first == second
    return first


def surveyed(path: Path, skip_bad: bool = False, typed: bool = False, column: str = "text") -> Survey:
    with file_of(path, column, None) as source:
        return survey(source, skip_bad, typed, lambda _: None)


def refusal(path: Path, column: str = "text", **options: bool) -> str:
    return refusal_of(surveyed, path, column=column, **options)


def test_a_table_is_read_in_chunks(tmp_path: Path) -> None:
    texts = ["one\ntwo", 'a "quoted", word', "three", "four", "five"]
    pd.DataFrame({"text": texts, "other": range(5)}).to_csv(tmp_path / "a.csv", index=False)
    assert texts_of(tmp_path / "a.csv") == [{"text": texts[:2]}, {"text": texts[2:4]}, {"text": texts[4:]}]
    pairs = texts_of(tmp_path / "a.csv", "text", "other")
    assert pairs[0] == {"text": texts[:2], "text_pair": ["0", "1"]}


def test_lines_without_blank_ones(tmp_path: Path) -> None:
    content = "\ufeffone\r\n\n two \nthree".encode()
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "a.log.gz").write_bytes(gzip.compress(content, mtime=0))
    for name in ("a.txt", "a.log.gz"):
        assert texts_of(tmp_path / name) == [{"text": ["one", " two "]}, {"text": ["three"]}]


def test_what_can_be_read_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lines").write_text("one\ntwo\nthree\n")
    with (tmp_path / "lines").open("rb") as stream:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=stream))
        assert texts_of(STANDARD_INPUT) == [{"text": ["one", "two"]}, {"text": ["three"]}]
    os.mkfifo(tmp_path / "pipe.csv")
    thread = threading.Thread(target=(tmp_path / "pipe.csv").write_text, args=("text,label\none,1\n",))
    thread.start()
    assert texts_of(tmp_path / "pipe.csv") == [{"text": ["one"]}]
    thread.join()


def test_what_cannot_be_copied_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("a.csv")
        copied = "--file a.csv: cannot be copied to a temporary file: "
        assert refusal(Path("a.csv")) == f"{copied}No such device or address"
    monkeypatch.setattr("sys.stdin", None)  # as after <&- in a shell
    assert refusal(STANDARD_INPUT) == "--file -: standard input is closed: give a file"
    (tmp_path / "lines").write_text("one\n")
    for failing in (shutil, "copyfileobj"), (tempfile, "mkdtemp"):
        with (tmp_path / "lines").open("rb") as stream, monkeypatch.context() as patch:
            patch.setattr("sys.stdin", SimpleNamespace(buffer=stream))
            patch.setattr(*failing, full_disk)
            assert refusal(STANDARD_INPUT) == copied.replace("a.csv", "-") + "No space left on device"


def test_a_file_that_the_system_does_not_look_up(tmp_path: Path) -> None:
    assert refusal(tmp_path / f"{'a' * 300}.csv").endswith("cannot be read: File name too long")


REFUSED: list[tuple[Any, ...]] = [  # name, content, message, and perhaps the column
    ("a.txt", b"", "contains no text"),
    ("a.txt", b"\n  \n", "contains no text"),
    ("a.csv", b"text\n", "contains no text"),
    ("a.txt", b"fine\nfine\nd\xe9j\xe0 vu\n", "is not UTF-8: convert it (iconv)"),
    ("a.txt", b"d\xe9j\xe0 vu", "is not UTF-8"),
    ("a.csv", b"text\nfine\nfine\nd\xe9j\xe0 vu\n", "is not UTF-8: convert it (iconv)"),
    ("a.csv", b"text\nd\xe9j\xe0 vu\n", "is not UTF-8"),
    ("a.xlsx", b"PK\3\4 \xd0", "is an Excel file or an archive: save it as CSV in UTF-8"),
    (
        "a.json",
        b'[{"text": "fine"}, {"text": [1, 2]}]',
        "row 1 (the first one is row 0) is [1, 2], no text: remove or correct it",
    ),
    ("a.json", b'[{"text": 3}]', "row 0 (the first one is row 0) is 3, no text"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "b"}\n{"text": null}', "row 2 (the first one is row 0) is None, no text"),
    ("a.jsonl", b'{"text": "fine"}\n{"review": "fine"}\n', "row 1 (the first one is row 0) is nan, no text"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "b"}\n{"texts": "c"}', "row 2 (the first one is row 0) is nan, no text"),
    ("a.jsonl", b'{"text": "fine"}\n{broken', "line 2 is not JSON"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}', "row 1 (the first one is row 0) is not UTF-8: convert it"),
    (
        "a.csv",
        b"text,n\na,1\nb,1\nc,1\n ,1\n",
        "row 3 (the first one is row 0) is empty: remove it, or give --skip_bad_rows",
    ),
    ("a.csv", b"text,label\nfine,1\n,0\n", "row 1 (the first one is row 0) is empty"),
    ("a.csv", b"label,text\n1,fine\n0\n", "a.csv: cannot be read: line 3 has 1 field, but the header 2"),
    ("a.csv", b"text\na\nb\nc\nd, e\n", "cannot be read: a row has more fields"),
    ("a.csv", b"text,label\nfine, really,1\n", "more fields than the header (text, label)"),
    ("a.csv", b"text,label\nfine,1\nfine, really,1\n", "more fields than the header (text, label)"),
    ("a.csv", b"", "a.csv: is empty"),
    ("a.csv", b"review\na\n", "--text_column text: must be a column of"),
    ("a.csv", b"review,label\nfine,1\n", "which has: review, label"),
    ("a.csv", b"text,label\nfine,1\n", "--text_column review", "review"),
    ("a.json", b'[{"t": "a", "y": 1999}]', "row 0 (the first one is row 0) has no text: column y holds int", "t,y"),
    ("a.csv", gzip.compress(b"text\nfine\n", mtime=0), "is packed: end its name in .gz"),
    ("a.parquet", b"PAR1 nonsense PAR1", "cannot be read"),
    ("a.csv.gz", b"text\nfine\n", "cannot be read: Not a gzipped file"),
    ("a.txt.gz", gzip.compress(b"fine\n" * 9, mtime=0)[:-3], "cannot be read: Compressed file ended"),
]


@pytest.mark.parametrize("case", REFUSED)
def test_refused_files(tmp_path: Path, case: tuple[Any, ...]) -> None:
    name, content, message, *column = case
    path = tmp_path / name
    path.write_bytes(content)
    found = refusal(path, *column)
    assert message in found
    assert str(path) in found
    assert "plain" not in found


def test_a_cut_parquet(tmp_path: Path) -> None:
    pd.DataFrame({"text": [f"text {i}" for i in range(1000)]}).to_parquet(tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    for rest in (content[: len(content) // 2], content[:-8], b""):
        (tmp_path / "a.parquet").write_bytes(rest)
        assert f"--file {tmp_path / 'a.parquet'}: cannot be read" in refusal(tmp_path / "a.parquet")
    assert "No such file" in refusal(tmp_path / "none.parquet")
    assert "cannot be read" in refusal(tmp_path)


def test_bad_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    values = ["fine", None, "", 3, "\ud800", "good"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": value}) + "\n" for value in values))
    found = surveyed(tmp_path / "a.jsonl", skip_bad=True)
    assert (found.rows, found.bad) == (6, 4)
    with file_of(tmp_path / "a.jsonl", "text", None) as source:
        assert [list(rows.bad) for rows in source.rows(True)] == [[False, True], [True, True], [True, False]]
    pairs = given_texts(["a", "b"], ["c", " "])
    assert [list(rows.bad) for rows in pairs.rows(True)] == [[False, True]]
    assert "--text_pair: text 2 is empty" in refusal_of(list, pairs.rows())
    (tmp_path / "a.csv").write_text("id,text,note\n1,,fine\n2, ,good\n")
    said = refusal_of(surveyed, tmp_path / "a.csv", skip_bad=True)
    assert said.endswith("a.csv: no row has a text in --text_column text: other columns are id, note")


def test_the_columns_and_types_of_all_chunks(tmp_path: Path) -> None:
    lines = ['{"text": "a", "n": 1}', '{"text": "b"}', '{"text": "c", "n": 0.5, "tags": ["x"]}', '{"text": "d"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = surveyed(tmp_path / "a.jsonl", typed=True)
    assert found.columns == ["text", "n", "tags"]
    assert some(found.schema).types == [pa.string(), pa.float64(), pa.list_(pa.string())]
    assert surveyed(tmp_path / "a.jsonl").schema is None
    (tmp_path / "a.jsonl").write_text('{"text": "a", "n": 1}\n{"text": "b", "n": "x"}')
    assert "parquet cannot hold a column with such values" in refusal(tmp_path / "a.jsonl", typed=True)
    assert surveyed(tmp_path / "a.jsonl").rows == 2
    schema = pa.schema({"text": pa.string(), "id": pa.int64(), "day": pa.date32()})
    pa.parquet.write_table(pa.Table.from_pylist([{"text": "a"}], schema), tmp_path / "a.parquet")
    assert surveyed(tmp_path / "a.parquet", typed=True).schema == schema


def test_columns_of_one_name(tmp_path: Path) -> None:
    for other in ("n", "text"):
        table = pa.table([["a"], [1], [2]], names=["text", "n" if other == "n" else "m", other])
        pa.parquet.write_table(table, tmp_path / "a.parquet")
        assert "two of its columns have the same name" in refusal(tmp_path / "a.parquet")


def test_pairs_need_a_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was trained on pairs, so it must be a table"), file_of(tmp_path, "a", "b"):
        pass
