import json
import math
from pathlib import Path

import pytest

from finetuning.runs.files import RESULT, read_status
from finetuning.storage import write_atomically, write_json


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


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
