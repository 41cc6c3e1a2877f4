import os
import pwd
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from finetune_lora import main
from finetuning.caches import cache_table, clear_caches, remove_left_over
from finetuning.storage import append_sum, make_folder, sum_holds
from tests.common import Capture, Patch, full_disk

A, B, K = (letter * 64 for letter in "abc")  # names of entries are hashes
OLD, NEW = "0" * 32, "1" * 32
BEFORE = time.time() - 3600 - 60


def leave(path: Path, content: bytes = b"1234567", old: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    if old:
        os.utime(path, (BEFORE, BEFORE))
        os.utime(path.parent, (BEFORE, BEFORE))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: Patch) -> Path:
    """A cache with files of each kind, some of them half-written: old ones and new ones."""
    monkeypatch.setenv("FINETUNE_LORA_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "cache"
    folders = ("imdb_stanford/train.parquet", "packaged_base/vocab.txt")
    for name in (f"tokens/{A}.npz", f"tokens/{B}.npz", f"kernels/{K}.so", *folders):
        leave(root / name, b"12345", old=False)
    for name in (f"tokens/.{A}.npz.{OLD}.tmp.npz", f"kernels/.{K}.so.{OLD}.tmp.so", "finetune_lora-imdb-x/1.txt"):
        leave(root / name)
        leave(root / name.replace(OLD, NEW).replace("-x", "-y"), old=False)
    return root


def test_sizes_are_shown_and_what_is_left_over_is_removed(cache: Path, capsys: Capture) -> None:
    assert main(["--cache_info"]) == 0
    shown = {line.split()[0]: line.split()[-2:] for line in capsys.readouterr().out.splitlines()}
    assert (shown["tokens"], shown["kernels"], shown["downloads"]) == (["2", "10"], ["1", "5"], ["1", "5"])
    assert shown["unpacked"] == ["1", "5"]
    remove_left_over()
    assert not list(cache.rglob(f"*{OLD}*"))
    assert not (cache / "finetune_lora-imdb-x").exists()
    assert len(list(cache.rglob(f"*{NEW}*"))) == 2, "they may still be written"
    assert (cache / "finetune_lora-imdb-y").exists()
    assert (cache / "tokens" / f"{A}.npz").exists()


def test_the_caches_are_emptied(cache: Path, capsys: Capture) -> None:
    assert main(["--cache_clear"]) == 0
    assert capsys.readouterr().out == f"removed 5 files, 25 bytes, from {cache}\n"
    left = {path.name for path in cache.rglob("*") if path.is_file()}
    assert left == {f".{A}.npz.{NEW}.tmp.npz", f".{K}.so.{NEW}.tmp.so", "1.txt"}, "they may still be written"
    assert main(["--cache_clear"]) == 0


@pytest.mark.parametrize("there", [None, {}, {"file": "damaged"}, {"file": "whole"}])
@pytest.mark.parametrize("fails", [False, True])
def test_a_folder_is_made_unless_another_process_was_faster(
    tmp_path: Path, there: dict[str, str] | None, fails: bool
) -> None:
    def make(made: Path) -> None:
        (made.parent / "needed only for this").touch()
        (made / "file").write_text("whole")
        if there is not None:  # another process has made it meanwhile
            folder.mkdir()
            for name, text in there.items():
                (folder / name).write_text(text)
            inodes.append(folder.stat().st_ino)
        if fails:
            full_disk()

    folder, inodes = tmp_path / "cache" / "made", list[int]()
    is_whole = there == {"file": "whole"}
    with pytest.raises(OSError, match="No space") if fails and not is_whole else nullcontext():
        make_folder(folder, make, lambda path: {"whole"} == {file.read_text() for file in path.glob("*")})
        assert (folder / "file").read_text() == "whole"
        assert (folder.stat().st_ino in inodes) == is_whole, "the first one wins"
    assert [path for path in folder.parent.iterdir() if path != folder] == [], "nothing else is left"


def test_only_one_thing_is_done_instead_of_a_run(capsys: Capture) -> None:
    assert main(["--cache_info", "--estimate"]) == 2
    assert capsys.readouterr().err == "error: --estimate, --cache_info: give one of them\n"


def test_without_a_home_folder_the_line_names_the_variable(monkeypatch: Patch, capsys: Capture) -> None:
    def unknown(_: int) -> None:
        raise KeyError

    for name in ("FINETUNE_LORA_CACHE", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)  # as of a user that only a container's command line names
    assert main(["--cache_info"]) == 2
    line = "error: you have no home folder for caches: set FINETUNE_LORA_CACHE to a folder\n"
    assert capsys.readouterr().err == line


def test_in_a_folder_that_others_use_only_our_files_are_removed(cache: Path) -> None:
    others = ("tmp-experiments/notes.txt", "tmp8x_a", "aclImdb-mine/train.txt", "tokens/.notes.tmp", "tokens/notes.npz")
    for name in others:
        leave(cache / name)
    remove_left_over()
    clear_caches()
    assert all((cache / name).exists() for name in others)


def test_what_may_not_be_removed_stays_and_does_no_harm(cache: Path, monkeypatch: Patch) -> None:
    def refuse(path: Path, **_: bool) -> None:  # root may remove anything
        raise PermissionError(f"{path} belongs to somebody else")

    monkeypatch.setattr(Path, "unlink", refuse)
    remove_left_over()
    assert len(list(cache.rglob(f"*{OLD}*"))) == 2
    said = clear_caches()
    assert said.startswith(f"removed 2 files, 10 bytes, from {cache}; you may not remove 3 files, for example {cache}")


def test_a_cache_that_does_not_exist_is_empty(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("FINETUNE_LORA_CACHE", str(tmp_path / "none"))
    assert "tokens" in cache_table()
    remove_left_over()
    assert not (tmp_path / "none").exists()


def test_a_sum_at_the_end_of_a_file_holds_until_anything_changes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert not sum_holds(path)
    for content in (b"", b"content"):
        path.write_bytes(content)
        append_sum(path)
        whole = path.read_bytes()
        assert whole.startswith(content)
        assert sum_holds(path)
        for position in range(len(whole)):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
            assert not sum_holds(path)
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            assert not sum_holds(path)
    path.unlink()
    path.mkdir()
    assert not sum_holds(path)
