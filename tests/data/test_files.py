"""Every format, whole and in chunks; damaged files."""

import gzip
import json
from collections.abc import Callable, Collection
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetuning.data.files import UNREADABLE, name_and_format, read_chunks, read_frame, readable
from finetuning.errors import UserError

ROWS = pd.DataFrame(
    {"text": [*(f'a "text", {i}\nwith lines\u2028, é' for i in range(8)), "NA"], "label": list("abc" * 3)}
)
NAMES = ("a.parquet", "a.csv", "a.tsv", "a.json", "a.jsonl")


def write(folder: Path, name: str, table: pd.DataFrame = ROWS) -> Path:
    """The table in the format of a name; ``.gz`` packs it."""
    path = folder / name
    kind = name_and_format(path)[1]
    plain = folder / f"plain.{kind}"
    if kind == "parquet":
        table.to_parquet(plain)
    elif kind in ("csv", "tsv"):
        table.to_csv(plain, index=False, sep="," if kind == "csv" else "\t", encoding="utf-8-sig")
    else:
        table.to_json(plain, orient="records", lines=kind == "jsonl", force_ascii=False)
    content = plain.read_bytes()
    plain.unlink()
    path.write_bytes(gzip.compress(content) if name.lower().endswith(".gz") else content)
    return path


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", [str, str.upper, "{}.gz".format, lambda name: f"{name.upper()}.GZ"])
@pytest.mark.parametrize("rows", [None, 1, 3, 9, 100])
def test_formats_and_chunks(tmp_path: Path, name: str, change: object, rows: int | None) -> None:
    assert callable(change)
    path = write(tmp_path, change(name))
    chunks = list(read_chunks(path, rows))
    assert max(len(chunk) for chunk in chunks) == min(rows or 9, 9)
    found = pd.concat(chunks, ignore_index=True)
    assert list(found.columns) == ["text", "label"]
    assert found.to_numpy().tolist() == ROWS.to_numpy().tolist()


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.tsv"])
@pytest.mark.parametrize("rows", [None, 3])
def test_a_table_without_rows_has_its_columns(tmp_path: Path, name: str, rows: int | None) -> None:
    (chunk,) = read_chunks(write(tmp_path, name, ROWS[:0]), rows)
    assert (len(chunk), list(chunk.columns)) == (0, ["text", "label"])


def test_columns_of_parquet_that_nobody_needs_are_not_read(tmp_path: Path) -> None:
    path, asked = tmp_path / "a.parquet", list[Collection[str]]()
    nanosecond = pa.array([1], pa.time64("ns"))  # pandas refuses it
    pq.write_table(pa.table({"text": ["a"], "label": [1], "time": nanosecond, "a.b": [2]}), path)

    def wanted(*names: str) -> Callable[[Collection[str]], Collection[str]]:
        def chosen(known: Collection[str]) -> Collection[str]:
            asked.append(known)
            return names

        return chosen

    assert list(read_frame(path, wanted("label", "text", "text")).columns) == ["label", "text"]
    assert asked == [["text", "label", "time", "a.b"]]
    for others in (None, wanted("text", "missing"), wanted("text", "a.b")):
        with pytest.raises(UNREADABLE, match="nanoseconds"):
            read_frame(path, others)


def test_numbers_stay_numbers_where_the_format_has_them(tmp_path: Path) -> None:
    table = pd.DataFrame({"label": [3, 1]})
    for name, label in (("a.parquet", 3), ("a.jsonl", 3), ("a.csv", "3"), ("a.tsv", "3")):
        assert read_frame(write(tmp_path, name, table)).label[0] == label


@pytest.mark.parametrize("rows", [None, 1])
@pytest.mark.parametrize("count", [0, 1])
def test_a_column_that_pandas_took_as_an_index_is_a_column(tmp_path: Path, rows: int | None, count: int) -> None:
    ROWS[:count].set_index("text").to_parquet(tmp_path / "a.parquet")
    chunk = next(read_chunks(tmp_path / "a.parquet", rows))
    assert set(chunk.columns) == {"text", "label"}
    assert chunk.text.tolist() == ROWS.text[:count].tolist()


def test_json_that_is_too_deep_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(UserError, match=r"a.jsonl cannot be read"), readable(tmp_path / "a.jsonl"):
        read_frame(tmp_path / "a.jsonl")


def test_names() -> None:
    for name, expected in (
        ("train.csv", ("train", "csv")),
        ("Train.TSV.GZ", ("Train", "tsv")),
        ("a.b.jsonl", ("a.b", "jsonl")),
        ("lines.txt", ("lines.txt", None)),
        ("lines.txt.gz", ("lines.txt", None)),
        ("csv", ("csv", None)),
    ):
        assert name_and_format(Path(name)) == expected


def test_json_lists_and_lines_under_either_ending(tmp_path: Path) -> None:
    objects = [{"text": "x", "label": 0}, {"text": "y", "label": 1}]
    (tmp_path / "list.jsonl").write_text(" \n" + json.dumps(objects, indent=1))
    (tmp_path / "lines.json").write_text("\n\n".join(map(json.dumps, objects)), "utf-8-sig")
    for name in ("list.jsonl", "lines.json"):
        assert read_frame(tmp_path / name).to_dict("records") == objects


@pytest.mark.parametrize("name", NAMES)
def test_damaged_gzip(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, f"{name}.gz")
    whole = path.read_bytes()
    broken = {
        "cut": whole[:-6],
        "no gzip": b"text,label\n",
        "wrong checksum": whole[:-6] + bytes(2) + whole[-4:],
        "wrong bytes": whole[:30] + b"\xff" * 20 + whole[50:],
    }
    for content in broken.values():
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path.name} (cannot be read|is not UTF-8)") as caught, readable(path):
            read_frame(path)
        assert "\n" not in str(caught.value)
        with pytest.raises(UNREADABLE):
            list(read_chunks(path, 2))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n\n{broken', "line 3 is not JSON: Expecting property name"),
        ("a.jsonl", '{"text": "x"}\n[1, 2]\n', r'line 2 must be an object like \{"text"'),
        ("a.json", '[{"text": "x"}, 3]', "element 2 must be an object"),
        ("a.csv", "text,label\nfine,1\nfine, really,1\n", r"header \(text, label\), .* texts with commas in quotes"),
        ("a.tsv", "text\tlabel\nfine\t1\nfine\treally\t1\n", r"header \(text, label\), .* texts with tabs in quotes"),
        (
            "a.csv",
            'text,label\n"Fine,1\nfine,1\nthe "best" film,1\n',
            "a quote in line 2 that is open or not doubled: put texts",
        ),
        ("a.csv", "text,label,text\na,1,b\n", r"two columns of its header \(text, label, text\) have the same name"),
        ("a.csv", 'text,label\n"open,a\nb,c\n', r"header \(text, label\), or an open quote: put texts with commas in"),
        ("a.tsv", 'text\tlabel\n"open\t1\nfine\t1\nshut"\t1\n', "text, as after an open quote, at open 1 fine 1 shut"),
        (
            "a.csv",
            "text,id\nfine,1\nfine,2\nline one\rline two,3\n",
            "line 4 has 1 field, but the header 2: put texts with",
        ),
    ],
)
@pytest.mark.parametrize("rows", [None, 2])
def test_wrong_rows(tmp_path: Path, name: str, content: str, message: str, rows: int | None) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        list(read_chunks(tmp_path / name, rows))


def test_half_a_character_in_json_is_refused_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "user": "y"}\n{"text": "x", "user": "\\ud83d"}\n')
    with pytest.raises(ValueError, match="object 2 has half a character"):
        read_frame(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"text": "x", "label": 1}\n{"text": "x", "label": "\\ud83d"}\n')
    with pytest.raises(ValueError, match="object 2 has half a character"):
        read_frame(tmp_path / "b.jsonl")
    assert next(read_chunks(tmp_path / "a.jsonl", 5)).user.tolist() == ["y", "\ud83d"], "kept in a column beside"


def test_fields_that_a_spreadsheet_left_out_are_empty_and_lines_of_blanks_no_texts(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label,notes\ngood,1,x\nbad,0\n")
    assert next(read_chunks(tmp_path / "a.csv", None)).label.tolist() == ["1", "0"]
    (tmp_path / "a.csv").write_text("text,note\nfine,\n \n\nfine,1\n")
    assert next(read_chunks(tmp_path / "a.csv", None)).text.tolist() == ["fine", "fine"]


def test_chunks_need_little_memory(tmp_path: Path) -> None:
    """The first chunk comes before the end of the file is read."""
    for name, good in (("a.csv", "text\nfine\nfine\n"), ("a.jsonl", '{"text": "fine"}\n' * 2)):
        content = good.encode() + b"x" * 5_000_000
        path = tmp_path / f"{name}.gz"
        path.write_bytes(gzip.compress(content)[:-20])
        assert next(read_chunks(path, 2)).text.tolist() == ["fine", "fine"]


@pytest.mark.parametrize("rows", [None, 1, 2])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_quotes_that_end_in_their_line_and_right_ones_are_read(tmp_path: Path, ends: str, rows: int | None) -> None:
    (tmp_path / "a.csv").write_bytes(
        f'text,label{ends}"Great" film,1{ends}{ends}a 6" pipe,1{ends}"two{ends}lines, ""quoted""",1{ends}'.encode()
        + b"x" * 200_000
        + b",1"
    )
    texts = pd.concat(list(read_chunks(tmp_path / "a.csv", rows))).text.tolist()
    assert [text[:30].replace(ends, "|") for text in texts] == [
        "Great film", 'a 6" pipe', 'two|lines, "quoted"', "x" * 30
    ]  # fmt: skip
