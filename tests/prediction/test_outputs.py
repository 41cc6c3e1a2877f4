import datetime
import errno
import gzip
import io
import json
import os
import resource
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetuning.data.files import FORMATS, read_frame
from finetuning.errors import OutputFailed, UserError
from finetuning.prediction import progress
from finetuning.prediction.answers import AnswerColumns
from finetuning.prediction.outputs import check_output, is_parquet, print_answers, write_answers, write_csv
from finetuning.prediction.rows import Answered, Rows, file_of, survey
from finetuning.runs.answers import Rule
from tests.common import refusal_of

pytestmark = pytest.mark.usefixtures("small_chunks")

ONE, SEVERAL = AnswerColumns(["bad", "good"]), AnswerColumns(["bad", "good"], Rule(0.5))


def answered(rows: Iterator[Rows], answers: AnswerColumns) -> Iterator[Answered]:
    """An answer for each row: the first is sure to be good, the others less and less."""
    number = 0
    for chunk in rows:
        good = 1 / (1 + np.arange(number, number + len(chunk.bad)) / 2)
        number += len(chunk.bad)
        good[chunk.bad] = np.nan
        yield chunk, answers.of(np.stack([1 - good, good], axis=1))


def write(source: Path, out: Path, answers: AnswerColumns = ONE, skip: bool = False) -> Path:
    with file_of(source, "text", None) as given:
        surveyed = survey(given, skip, is_parquet(out), lambda _: None)
        write_answers(out, answered(given.rows(skip), answers), surveyed, answers)
    return out


def test_values_of_parquet_become_json_that_others_read(tmp_path: Path) -> None:
    when = datetime.datetime(2026, 1, 2, 3, 4, 5)
    columns = {
        "text": ["a", "b"], "x": [float("inf"), 1.5], "list": [[1.0, None], [2.0]], "times": [[when], []],
        "raw": [b"abc", b"\xff"],
    }  # fmt: skip
    pq.write_table(pa.table(columns, schema=pa.schema([
        ("text", pa.string()), ("x", pa.float64()), ("list", pa.list_(pa.float64())),
        ("times", pa.list_(pa.timestamp("ns"))), ("raw", pa.binary()),
    ])), tmp_path / "in.parquet")  # fmt: skip
    lines = write(tmp_path / "in.parquet", tmp_path / "out.jsonl").read_text().splitlines()
    assert not [line for line in lines if "NaN" in line or "Infinity" in line]
    first, second = map(json.loads, lines)
    assert (first["x"], first["list"], first["times"]) == (None, [1.0, None], [when.isoformat()])
    assert (first["raw"], second["raw"]) == ("abc", "\\xff")
    (tmp_path / "in.jsonl").write_text('{"text": "a", "x": [NaN, {"y": Infinity}, 1]}\n')
    assert json.loads(write(tmp_path / "in.jsonl", tmp_path / "a.jsonl").read_text())["x"] == [None, {"y": None}, 1]
    assert '"[null, {""y"": null}, 1]"' in write(tmp_path / "in.jsonl", tmp_path / "a.csv").read_text()
    assert "abc" in (csv := write(tmp_path / "in.parquet", tmp_path / "out.csv").read_text())
    assert "b'abc'" not in csv


def test_progress_goes_on_if_nobody_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with progress.Progress("predict", 9) as done:
            for _ in range(3):
                done(1)
    assert done.count == 3


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [("one\ntwo", "0"), ('a "b", c', "1"), ("d\te", "1"), ("é", "NA"), ("five", "")]
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(tmp_path / "in.csv", index=False)
    return tmp_path / "in.csv"


def test_lists_that_only_later_chunks_have_can_be_written(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "b"}, {"text": "c"}, {"text": "d", "z": [1], "y": {"b": "q"}}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = pq.read_table(write(tmp_path / "in.jsonl", tmp_path / "out.parquet"))
    assert table["z"].to_pylist() == [None, None, None, [1]]
    assert table["y"].to_pylist() == [None, None, None, {"b": "q"}]


@pytest.mark.parametrize("name", [*(f"out.{kind}" for kind in FORMATS), "OUT.CSV.GZ", "out.jsonl.gz", "out.parquet.gz"])
def test_the_columns_of_the_input_and_ours(table: Path, name: str) -> None:
    out = read_frame(write(table, table.with_name(name)))
    assert list(out.columns) == ["text", "label", *(f"predicted_{column}" for column in ONE.columns)]
    assert out.iloc[:, :2].to_numpy().tolist() == read_frame(table).to_numpy().tolist()
    assert out.predicted_label.tolist() == ["good", "good", "bad", "bad", "bad"]
    expected = [1, 0.666667, 0.5, 0.4, 0.333333]
    assert out.predicted_probability_good.astype(float).tolist() == pytest.approx(expected, abs=1e-6)
    assert [path.name for path in table.parent.iterdir() if path != table] == [name]


def test_equal_input_gives_equal_files(table: Path) -> None:
    first, second = (write(table, table.with_name(f"{name}.jsonl.gz")).read_bytes() for name in "ab")
    assert first == second
    assert len(gzip.decompress(first).splitlines()) == 5
    first, second = (write(table, table.with_name(f"{name}.csv.gz")).read_bytes() for name in "ab")
    assert first == second


def test_bad_rows_have_empty_answers(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a"}\n{"text": null}\n{"text": "c"}\n')
    csv = write(source, tmp_path / "out.csv", skip=True).read_text(encoding="utf8").splitlines()
    head = "text,label,probability_bad,probability_good"
    assert csv == [head, "a,good,0.000000,1.000000", ",,,", "c,bad,0.500000,0.500000"]
    lines = write(source, tmp_path / "out.jsonl", SEVERAL, skip=True).read_text().splitlines()
    assert [json.loads(line)["label"] for line in lines] == [["good"], None, []]
    found = pq.read_table(write(source, tmp_path / "out.parquet", SEVERAL, skip=True))
    assert found.column("label").to_pylist() == [["good"], None, []]
    assert found.schema.field("label").type == pa.list_(pa.string())
    assert found.schema.field("probability_bad").type == pa.float32()
    assert found.column("probability_bad").to_pylist() == [0.0, None, 0.5]


def test_multi_label_answers_in_text_are_separated(table: Path) -> None:
    answers = AnswerColumns(["bad", "good"], Rule(0.3))
    found = read_frame(write(table, table.with_name("out.tsv"), answers))
    assert found.predicted_label.tolist() == ["good", *["bad,good"] * 4]
    answers = AnswerColumns(["bad", "good"], Rule(0.3), separator="; ")
    found = read_frame(write(table, table.with_name("as_trained.csv"), answers))
    assert found.predicted_label.tolist() == ["good", *["bad; good"] * 4], "so that it can be trained on"
    answers = AnswerColumns(["bad, or so", "good"], Rule(0.3))
    found = read_frame(write(table, table.with_name("comma.csv"), answers))
    assert found.predicted_label.tolist() == ['["good"]', *['["bad, or so", "good"]'] * 4]


VALUES = [
    {
        "text": "a", "id": 2**60 + 1, "day": datetime.date(2026, 1, 2), "at": datetime.datetime(2026, 1, 2, 3, 4, 5),
        "price": Decimal("1.10"), "tags": ["x", "y"], "more": {"n": 1}, "sure": True, "kind": "k",
    },
    {"text": "b", "id": None, "day": None, "at": None, "price": None, "tags": None, "more": None, "sure": None},
    {"text": "c", "id": 7, "tags": [], "kind": "l"},
]  # fmt: skip
TYPES = {
    "text": pa.string(), "id": pa.int64(), "day": pa.date32(), "at": pa.timestamp("us"), "price": pa.decimal128(5, 2),
    "tags": pa.list_(pa.string()), "more": pa.struct({"n": pa.int8()}), "sure": pa.bool_(),
    "kind": pa.dictionary(pa.int32(), pa.string()),
}  # fmt: skip


@pytest.fixture
def typed(tmp_path: Path) -> Path:
    """A parquet file with columns of many types."""
    pq.write_table(pa.Table.from_pylist(VALUES, pa.schema(TYPES)), tmp_path / "in.parquet")
    return tmp_path / "in.parquet"


def test_parquet_keeps_types_and_values(typed: Path) -> None:
    given, found = (pq.read_table(path) for path in (typed, write(typed, typed.with_name("out.parquet"))))
    assert found.select(given.column_names).to_pylist() == given.to_pylist()
    for name, kind in TYPES.items():
        assert found.schema.field(name).type in (kind, getattr(kind, "value_type", None)), name


def test_parquet_becomes_text(typed: Path) -> None:
    first, second, _ = map(json.loads, write(typed, typed.with_name("out.jsonl")).read_text().splitlines())
    assert first["id"] == 2**60 + 1
    assert (first["day"], first["at"], first["price"]) == ("2026-01-02", "2026-01-02T03:04:05", "1.10")
    assert (first["tags"], first["more"], first["sure"]) == (["x", "y"], {"n": 1}, True)
    assert second["id"] is None
    lines = read_frame(write(typed, typed.with_name("out.csv")))
    assert lines.id.tolist() == [str(2**60 + 1), "", "7"]
    assert lines.tags.tolist() == ['["x", "y"]', "", "[]"]
    assert lines.day.tolist() == ["2026-01-02", "", ""]


def test_objects_with_other_keys(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(f'{{"text": "a", "id": {2**60 + 1}}}\n{{"text": "b"}}\n{{"text": "c", "new": 0.1}}\n')
    lines = write(source, tmp_path / "out.jsonl").read_text().splitlines()
    assert [[json.loads(line)[key] for key in ("id", "new")] for line in lines] == [
        [2**60 + 1, None], [None, None], [None, 0.1],
    ]  # fmt: skip
    assert pq.read_table(write(source, tmp_path / "out.parquet")).column("id").to_pylist() == [2**60 + 1, None, None]
    source.write_text('{"text": "a", "id": 1}\n{"text": "b", "id": 2}\n{"text": "c", "id": 123456789012345678901}\n')
    assert "parquet cannot hold" in refusal_of(write, source, tmp_path / "big.parquet")
    assert not (tmp_path / "big.parquet").exists()


def test_a_kept_value_with_half_an_emoji(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"title": "abc \\ud83d", "text": "a film"}\n')
    for name in ("out.jsonl", "out.csv"):
        assert "abc \\ud83d" in write(tmp_path / "in.jsonl", tmp_path / name).read_text(encoding="utf8")
    with pytest.raises(UserError, match="parquet cannot hold a column with such values"):
        write(tmp_path / "in.jsonl", tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_an_error_leaves_nothing(table: Path) -> None:
    with table.open("a", encoding="utf8") as file:
        file.write("six,1\n ,1\n")
    for name in ("out.csv", "out.parquet", "out.json.gz"):
        with file_of(table, "text", None) as given:
            surveyed = survey(given, True, is_parquet(Path(name)), lambda _: None)
            with pytest.raises(UserError, match=r"row 6 \(the first one is row 0\) is empty"):
                write_answers(table.with_name(name), answered(given.rows(), ONE), surveyed, ONE)
    assert list(table.parent.iterdir()) == [table]


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl", "out.parquet", "out.tsv.gz"])
def test_a_full_disk(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetuning.prediction.rows.CHUNK_ROWS", 3000)
    texts = [f"{word:x} {'é' * (word % 7)}" for word in np.random.default_rng(0).integers(0, 2**60, 9000).tolist()]
    (tmp_path / "in.txt").write_text("\n".join(texts))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
        with pytest.raises(OutputFailed) as caught:
            write(tmp_path / "in.txt", tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value) == f"--output {tmp_path / name}: cannot be written: File too large"
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_made_meanwhile_is_not_replaced(table: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    if not links:
        monkeypatch.setattr(Path, "hardlink_to", no_links)
    out = table.with_name("out.csv")

    def made_meanwhile() -> Iterator[Answered]:
        with file_of(table, "text", None) as given:
            yield from answered(given.rows(), ONE)
        out.write_text("of somebody else")

    with file_of(table, "text", None) as given:
        found = survey(given, False, False, lambda _: None)
    with pytest.raises(OutputFailed, match=f"--output {out}: cannot be written: File exists"):
        write_answers(out, made_meanwhile(), found, ONE)
    assert out.read_text() == "of somebody else"
    assert set(table.parent.iterdir()) == {table, out}
    out.unlink()
    assert len(read_frame(write(table, out))) == 5
    assert set(table.parent.iterdir()) == {table, out}


def test_outputs_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "there.csv").touch()
    (tmp_path / "broken.csv").symlink_to("nowhere")
    for name, message in (
        ("a.txt", "must end in one of .parquet, .csv"),
        ("labels", "must end in one of"),
        ("there.csv", "already exists: give a new file, or remove it"),
        ("broken.csv", "already exists"),
        ("folder/a.csv", f"the folder {tmp_path / 'folder'} does not exist: make it first"),
    ):
        assert f"--output {tmp_path / name}: {message}" in refusal_of(check_output, tmp_path / name)
    check_output(tmp_path / "a.JSONL.gz")


@pytest.mark.parametrize("separator", [",", "\t"])
def test_texts_keep_their_line_breaks_of_any_kind(tmp_path: Path, separator: str) -> None:
    texts = ["a\rb", "a\r\nb", "a\nb", "a,b\tc", "end\r\n", "fine"]
    stream = io.StringIO()
    rows = pd.DataFrame({"text": texts}, dtype=object)
    write_csv(iter([(rows, {"label": ["x"] * len(texts)})]), stream, separator, 4, ",".join)
    assert stream.getvalue().startswith(f"text{separator}label\n")
    assert stream.getvalue().endswith(f"\nfine{separator}x\n")
    path = tmp_path / ("a.csv" if separator == "," else "a.tsv")
    path.write_bytes(stream.getvalue().encode())
    assert read_frame(path)["text"].tolist() == texts


def test_standard_output(table: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    with file_of(table, "text", None) as given:
        print_answers(answered(given.rows(), ONE), ONE, lambda: called.append(1))
        shown = capsys.readouterr().out
        assert shown.startswith("text,label,probability_bad,probability_good\n")
        assert '"a ""b"", c",good,0.3333,0.6667\n' in shown
        assert len(called) == 3, "once for each chunk"
        with Path("/dev/full").open("w") as full:
            monkeypatch.setattr("sys.stdout", full)
            with pytest.raises(OutputFailed, match="standard output cannot be written: No space left on device"):
                print_answers(answered(given.rows(), ONE), ONE, lambda: None)
