import os
import stat
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError

from finetuning.errors import ExportFailed, UserError
from finetuning.export.command import check_target
from finetuning.export.folder import check_last_tokens, staged
from tests.common import refusal_of


def test_targets_that_are_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    file = tmp_path / "file"
    file.write_text("")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    inside = tmp_path / "to_run"
    inside.symlink_to(run)
    for out, words in (
        (run, "already exists"),
        (file, "already exists"),
        (link, "already exists"),
        (run / "model", "lies in the run directory"),
        (inside / "a" / "b", "lies in the run directory"),
        (run / "x" / ".." / "model", "lies in the run directory"),
        (file / "model", "is not a directory that you may write to"),
    ):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match=words) as caught:
            check_target(out, run)
        assert str(caught.value).startswith(str(out))
        assert sorted(tmp_path.rglob("*")) == before
    check_target(tmp_path / "a" / "b", run)
    assert "is not valid UTF-8: give another name" in refusal_of(check_target, Path(os.fsdecode(b"out\xff")), run)


def fail_in_the_middle(out: Path, error: BaseException) -> None:
    with staged(out) as folder:
        (folder / "half").write_text("x")
        raise error


def test_a_folder_appears_only_if_everything_worked(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "model"
    errors: list[tuple[BaseException, type[BaseException]]] = [
        (ExportFailed("differs"), ExportFailed),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(28, "No space left on device"), UserError),
        (SafetensorError("IoError: No space left on device"), UserError),
    ]
    for raised, expected in errors:
        with pytest.raises(expected) as caught:
            fail_in_the_middle(out, raised)
        if expected is UserError:
            assert f"{out}: cannot be written" in str(caught.value)
            assert "No space left on device" in str(caught.value)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="/proc/model: cannot be written"):
        fail_in_the_middle(Path("/proc/model"), ExportFailed("not reached"))
    with staged(out) as folder:
        assert folder.name == out.name
        (folder / "whole").write_text("x")
        (folder / "whole").chmod(0o600)  # as safetensors makes its files
        (folder.parent / "desk").mkdir()
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["whole"]
    assert stat.S_IMODE((out / "whole").stat().st_mode) & 0o044
    assert list(tmp_path.iterdir()) == [tmp_path / "deep"]


def test_what_a_killed_export_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    names = (f".[model].{'1' * 32}.tmp", f".[model].{'2' * 32}.tmp", f".m.{'3' * 32}.tmp", ".[model].mine.tmp")
    old, recent, other, mine = (tmp_path / name for name in names)
    hours_ago = time.time() - 2 * 3600
    for folder in (old, recent, other, mine):
        folder.mkdir()
        (folder / "weights").write_text("half")
        os.utime(folder / "weights", (hours_ago, hours_ago))
        os.utime(folder, (hours_ago, hours_ago))
    os.utime(recent / "weights")  # another process is writing it
    with staged(tmp_path / "[model]"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"[model]", recent.name, other.name, mine.name}


def test_a_text_that_ends_with_padding_cannot_be_exported(tmp_path: Path) -> None:
    def check(last: int, pad_id: int | None, decoder: bool = True) -> None:
        family = SimpleNamespace(last_token=decoder, model_type="qwen3")
        base: Any = SimpleNamespace(family=family, config=SimpleNamespace(pad_token_id=pad_id))
        held: Any = SimpleNamespace(pad_id=7, sequences=[np.array([1, 2]), np.array([1, last])])
        run: Any = SimpleNamespace(directory=tmp_path)
        check_last_tokens(run, base, held, SimpleNamespace(pad_token="<pad>"))

    check(7, None, decoder=False)
    check(6, 7)
    for pad_id in (None, 7, 0):  # the exported config gets the tokenizer's
        assert "the tokenizer ends a text with its padding token '<pad>', which" in refusal_of(check, 7, pad_id)
