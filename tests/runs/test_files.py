import json
import math
from pathlib import Path

import pytest

from finetuning.runs.files import (
    ADAPTER,
    METRICS,
    PREDICTIONS,
    RESULT,
    SUMMED,
    check_unchanged,
    read_result,
    read_status,
    record_is_unchanged,
    with_sums,
    write_result,
)
from finetuning.storage import read_json, sha256_of, write_atomically, write_json
from tests.common import contents, refusal_of


@pytest.mark.parametrize("damaged", [None, "", '{"status": "fini', "{}"])
def test_status_of_a_directory_without_a_whole_result_is_none(tmp_path: Path, damaged: str | None) -> None:
    if damaged is not None:
        (tmp_path / RESULT).write_text(damaged)
    assert read_status(tmp_path) is None


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / RESULT

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        assert temporary.parent == tmp_path  # a rename within one file system is atomic
        assert temporary.suffix == path.suffix
        assert temporary != path
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert list(tmp_path.iterdir()) == []
    path.write_text("old")
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert contents(tmp_path) == {RESULT: b"old"}
    write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert contents(tmp_path) == {RESULT: b"new"}


def test_json_holds_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / RESULT, {"loss": math.nan})
    assert list(tmp_path.iterdir()) == []
    write_json(tmp_path / RESULT, {"name": "é", "loss": None})
    assert json.loads((tmp_path / RESULT).read_text(encoding="utf8")) == {"name": "é", "loss": None}


def test_a_result_knows_its_files_and_itself(tmp_path: Path) -> None:
    check_unchanged(tmp_path / ADAPTER)  # no run, so nothing is known
    (tmp_path / ADAPTER).write_bytes(b"weights")
    (tmp_path / PREDICTIONS).write_bytes(b"predictions")
    write_result(tmp_path, {"status": "finished", "test": {"accuracy": 0.9}, "seconds": 1 / 3})
    result = read_result(tmp_path)
    assert result["sha256"][ADAPTER] == sha256_of(tmp_path / ADAPTER)
    assert set(result["sha256"]) == {ADAPTER, PREDICTIONS, RESULT}
    write_result(tmp_path, result | {"study": "s"})
    assert read_result(tmp_path)["study"] == "s"
    check_unchanged(tmp_path / ADAPTER)
    (tmp_path / PREDICTIONS).write_bytes(b"prediction")
    assert f"{PREDICTIONS} was changed after its run wrote it" in refusal_of(check_unchanged, tmp_path / PREDICTIONS)

    whole = read_json(tmp_path / RESULT)
    for changed in (whole | {"seconds": 1 / 7}, whole | {"sha256": whole["sha256"] | {ADAPTER: "0" * 64}}):
        write_json(tmp_path / RESULT, changed)
        with pytest.raises(ValueError, match="it was changed after it was written"):
            read_result(tmp_path)
        assert f"{RESULT} cannot be used: it was changed" in refusal_of(check_unchanged, tmp_path / ADAPTER)
        assert read_status(tmp_path) is None
    for others in ('{"status": "finished"}', '{"sha256": {}}', '{"sha256": 3}'):  # without its own
        (tmp_path / RESULT).write_text(others)
        with pytest.raises(ValueError, match="it was changed after it was written"):
            read_result(tmp_path)
    write_result(tmp_path, {"status": "finished"})
    (tmp_path / ADAPTER).write_bytes(b"others")
    write_json(tmp_path / RESULT, with_sums({"status": "finished"}, {}))
    assert f"{ADAPTER} was changed after its run wrote it" in refusal_of(check_unchanged, tmp_path / ADAPTER)


@pytest.mark.parametrize("name", [PREDICTIONS, METRICS])
def test_a_record_is_changed_if_one_of_its_files_is(tmp_path: Path, name: str) -> None:
    for each in SUMMED:
        (tmp_path / each).write_bytes(b"whole")
    write_result(tmp_path, {"status": "finished"})
    assert record_is_unchanged(tmp_path)
    (tmp_path / name).write_bytes(b"changed")
    assert not record_is_unchanged(tmp_path)
