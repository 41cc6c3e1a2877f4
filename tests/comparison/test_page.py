import base64
import re

from finetuning.comparison.page import Plot, Section, render_page
from finetuning.pages import Table
from tests.html_reader import Reader, read

EMPTY = Table(("row",), [])
ANSWER_COLUMNS = ("best row", "test accuracy, %", "training time, s", "peak memory, GiB", "how sure")


def section(**changes: object) -> Section:
    parts: dict[str, object] = {
        "study": "one_study", "question": "Which <method>?", "headlines": ["Best: a & b."],
        "answers": Table(ANSWER_COLUMNS, [("a|<b>", "93.13", "", "1.00", "not compared & sure")]),
        "notes": ["A note on `--seed`."],
        "table": Table(("row", "seeds", "no value", "command"), [("a|<b>", "1", "", "python x.py --flag '<&>'")]),
        "comparisons": EMPTY, "pairs": 0, "f1_comparisons": EMPTY, "tuning": EMPTY, "over_sets": [],
        "part": "", "plots": [],
    }  # fmt: skip
    return Section(**parts | changes)  # type: ignore[arg-type]


def test_the_page_is_whole_and_needs_no_other_file() -> None:
    png = b"\x89PNG bytes"
    plots = [Plot("p.png", 'A "plot" < another', lambda: png)]
    comparison = Table(("row", "verdict"), [("a", "no significant difference")])
    text = render_page(
        [
            section(plots=plots, comparisons=comparison, pairs=1, tuning=comparison, over_sets=[comparison]),
            section(study="other"),
        ]
    )
    reader = read(text)
    for said in (
        "Which <method>?",
        "a & b.",
        "A note on --seed.",
        "Over data sets",
        "a|<b>",
        "--flag '<&>'",
        "no significant difference",
    ):
        assert said in reader.text
    assert "no value" not in reader.text  # a column without a value
    assert {address.split(",")[0] for address in reader.addresses} == {
        "#answers", "#one_study", "#other", "data:", "data:image/png;base64",
    }  # fmt: skip
    (encoded,) = re.findall(r"base64,([^\"]+)", text)
    assert base64.b64decode(encoded) == png
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "<code>--seed</code>" in text  # as on a page of Markdown
    assert "url(" not in text
    assert "<script" not in text


def test_a_page_without_studies_says_so() -> None:
    assert "No runs yet." in render_page([])


def test_the_page_begins_with_the_answers() -> None:
    unanswered = section(study="two", answers=Table(ANSWER_COLUMNS, []))
    text = render_page([section(), unanswered])
    beginning = text.partition("<section")[0]
    reader = Reader()
    reader.feed(beginning.partition("<body>")[2])
    assert reader.addresses == ["#one_study", "#two"]
    for said in (*ANSWER_COLUMNS, "Which <method>?", "93.13", "1.00", "not compared & sure", "no test result yet"):
        assert said in reader.text
    assert '<section id="two">' in text
