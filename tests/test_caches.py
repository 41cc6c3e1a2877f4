import os
import time
from pathlib import Path

import pytest

from finetune_lora import main
from finetuning.caches import cache_table, remove_left_over
from finetuning.storage import append_sum, sum_holds


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with files of each kind, some of them half-written: old ones and new ones."""
    monkeypatch.setenv("FINETUNE_LORA_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "cache"
    for name in ("tokens/a.npz", "tokens/b.npz", "kernels/k.so", "imdb_stanford/train.parquet"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"12345")
    before = time.time() - 3600 - 60
    for name in ("tokens/.a.npz.0.tmp.npz", "kernels/.k.so.0.tmp.so", "aclImdb-x/aclImdb/train/1.txt"):
        for path in (root / name, root / name.replace(".0.", ".1.").replace("-x", "-y")):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"1234567")
            if ".1." not in path.name and "-y" not in str(path):
                for old in (path, root / "aclImdb-x"):
                    os.utime(old, (before, before)) if old.exists() else None
    return root


def test_sizes_are_shown_and_what_is_left_over_is_removed(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cache_info"]) == 0
    shown = {line.split()[0]: line.split()[-2:] for line in capsys.readouterr().out.splitlines()}
    assert (shown["tokens"], shown["kernels"], shown["downloads"]) == (["2", "10"], ["1", "5"], ["1", "5"])
    remove_left_over()
    assert not list(cache.rglob("*.0.tmp*"))
    assert not (cache / "aclImdb-x").exists()
    assert len(list(cache.rglob("*.1.tmp*"))) == 2, "they may still be written"
    assert (cache / "aclImdb-y").exists()
    assert (cache / "tokens" / "a.npz").exists()


def test_the_caches_are_emptied(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cache_clear"]) == 0
    assert capsys.readouterr().out == f"removed 4 files, 20 bytes, from {cache}\n"
    left = {path.name for path in cache.rglob("*") if path.is_file()}
    assert left == {".a.npz.1.tmp.npz", ".k.so.1.tmp.so", "1.txt"}, "they may still be written"
    assert main(["--cache_clear"]) == 0


def test_a_cache_that_does_not_exist_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
