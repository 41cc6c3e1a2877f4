"""The file of a study's collected runs: what is written is read again, and damage is noticed."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetuning.comparison.collected import read_study
from finetuning.comparison.packed import RUNS, Columns, Record, change_records, read_records
from finetuning.errors import UserError
from finetuning.runs.lock import DirectoryLock
from tests.common import contents, refusal_of
from tests.synthetic_runs import outcomes, write_run

HOLLOW = '[{"result": {}, "metrics": null, "predictions": null}, {"planned": []}]'


def predictions(*labels: int | list[int]) -> Columns:
    """Predictions that are all right, for the rows 7, 10, 13, ..."""
    return {"row": list(range(7, 7 + 3 * len(labels), 3)), "label": list(labels), "predicted": list(labels)}


def result(name: str, **more: Any) -> dict[str, Any]:
    return {"status": "finished", "study": {"run": name}} | more


def test_runs_of_one_label_and_of_several_share_a_file(tmp_path: Path) -> None:
    tables = {"many": predictions(0, 300), "none": None, "one": predictions(1, 0), "several": predictions([0, 2], [])}
    metrics = {name: None if name == "none" else "a\r\n1\r\n" for name in tables}
    records = [Record.made(tmp_path, result(name), metrics[name], columns) for name, columns in tables.items()]
    change_records(tmp_path, reversed(records[1:]), ["one", "lost"])
    change_records(tmp_path, records[:1])
    found, planned = read_records(tmp_path)
    assert list(found) == list(tables), "by name"
    assert planned == ["one", "lost"]
    for name, record in found.items():
        assert (record.name, record.path) == (name, tmp_path / name)
        assert (record.metrics, record.predictions) == (metrics[name], tables[name])
    assert [path.name for path in tmp_path.iterdir()] == [RUNS]
    assert len((tmp_path / RUNS).read_text().splitlines()) == 3 + len(tables), "a line for each run"


def test_other_runs_and_other_studies_stay_as_they_are(tmp_path: Path) -> None:
    kept = write_run(tmp_path, "s", "kept", correct=outcomes(0.9, 50, 0), curve=[0.5])
    other = write_run(tmp_path, "t", "other", correct=outcomes(0.9, 50, 0))
    before = contents(tmp_path / "t")
    write_run(tmp_path, "s", "new", correct=outcomes(0.8, 50, 1))
    write_run(tmp_path, "s", "new", status="failed")
    found, _ = read_records(tmp_path / "s")
    assert found[kept.name] == kept
    assert [record.result["status"] for record in found.values()] == ["finished", "failed"]
    assert contents(tmp_path / "t") == before
    assert read_records(tmp_path / "t")[0] == {other.name: other}
    assert read_records(tmp_path / "nothing") == ({}, [])


DAMAGED = [
    (None, "", "Expecting value"),
    (None, "{", "Expecting property name"),
    (None, "[]", "it does not hold collected runs"),
    (None, "{}", "it does not hold collected runs"),
    (None, '[{"result": 3}, {"planned": []}]', "it does not hold collected runs"),
    (None, HOLLOW.replace("{}", "3"), "it must hold a JSON object"),
    (None, HOLLOW.replace("{}", '{"sha256": 3}'), "it was changed after it was written"),
    ('"accuracy": 0.9', '"accuracy": 0.8', "it was changed after it was written"),
    (",0.75\\n", ",0.85\\n", "the metrics of lora-final-seed0 were changed after they were written"),
    ('"predictions": "eN', '"predictions": "eM', "the predictions of lora-final-seed0 were changed after they were"),
    ('"predictions": "', '"predictions": 7, "": "', "it does not hold collected runs"),
    ('"predictions": "', '"predictions": null, "": "', "the predictions of lora-final-seed0 were changed after"),
    ("[\n", "[\n{line}", "lora-final-seed0 is there twice: delete one of the two lines"),
    ("\n]\n", "", "Expecting ',' delimiter"),
]


@pytest.mark.parametrize(("old", "new", "said"), DAMAGED)
def test_damaged_records_are_refused_in_one_line(tmp_path: Path, old: str | None, new: str, said: str) -> None:
    write_run(tmp_path, "s", "lora", curve=[0.5, 0.75], correct=outcomes(0.9, 60, 1))
    path = tmp_path / "s" / RUNS
    text = path.read_text()
    assert old is None or old in text
    path.write_text(new if old is None else text.replace(old, new.replace("{line}", text.splitlines(True)[1])))
    line = refusal_of(read_study, "s", tmp_path)
    assert line.startswith(f"{path} cannot be read: ")
    assert said in line


def test_a_killed_process_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = write_run(tmp_path, "s", "lora", correct=outcomes(0.8, 60, 1))
    before = (tmp_path / "s" / RUNS).read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("finetuning.comparison.packed.write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            write_run(tmp_path, "s", "full", correct=outcomes(0.8, 60, 2))
    assert (tmp_path / "s" / RUNS).read_bytes() == before
    (found,) = read_study("s", tmp_path).runs
    assert found.record == record


def test_one_process_at_a_time_changes_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetuning.comparison.packed.PATIENCE_SECONDS", 0.0)
    folder = tmp_path / "s"
    with DirectoryLock(folder), pytest.raises(UserError, match=f"--results {folder}: is being written by process"):
        write_run(tmp_path, "s", "lora")
    assert list(folder.iterdir()) == []
    (tmp_path / "t").touch()
    assert f"--results {tmp_path / 't'}: cannot be written" in refusal_of(write_run, tmp_path, "t", "lora")


def test_every_line_is_json_by_itself(tmp_path: Path) -> None:
    write_run(tmp_path, "s", "lora")
    first, *lines, last = (tmp_path / "s" / RUNS).read_text().splitlines()
    assert (first, last) == ("[", "]")
    assert [set(json.loads(line.removesuffix(","))) for line in lines] == [
        {"result", "metrics", "predictions"}, {"planned"}
    ]  # fmt: skip
