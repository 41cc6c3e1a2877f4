import random
import shutil
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch

from finetuning.runs.checkpoints import (
    discard_damaged,
    forget_unneeded,
    has_checkpoint,
    is_intact,
    usable_checkpoint,
    write_checkpoint,
)
from finetuning.runs.files import BEST_CHECKPOINT, LAST_CHECKPOINT, PREVIOUS_CHECKPOINT
from finetuning.storage import write_atomically
from tests.common import Capture


def archive(value: float) -> Callable[[BinaryIO], None]:
    return partial(torch.save, {"value": torch.full((50,), value)})


def value(path: Path) -> float:
    return float(torch.load(path, weights_only=True)["value"][0])


def test_the_last_two_are_kept_and_torch_reads_them(tmp_path: Path) -> None:
    last, previous, best = (tmp_path / name for name in (LAST_CHECKPOINT, PREVIOUS_CHECKPOINT, BEST_CHECKPOINT))
    assert not has_checkpoint(tmp_path)
    assert usable_checkpoint(tmp_path) is None
    for number in range(3):
        write_checkpoint(last, archive(number))
        write_checkpoint(best, archive(10 * number))
    assert [value(path) for path in (last, previous, best)] == [2, 1, 20]
    assert usable_checkpoint(tmp_path) == last
    last.unlink()  # as a process leaves it that is killed between the two renamings
    assert has_checkpoint(tmp_path)
    assert usable_checkpoint(tmp_path) == previous
    forget_unneeded(tmp_path)
    assert list(tmp_path.iterdir()) == []
    best.mkdir()  # somebody else's
    forget_unneeded(tmp_path)
    assert list(tmp_path.iterdir()) == [best]


def test_writing_needs_no_memory_for_the_content(tmp_path: Path) -> None:
    weights = torch.zeros(2_000_000)
    tracemalloc.start()
    write_checkpoint(tmp_path / LAST_CHECKPOINT, partial(torch.save, {"value": weights}))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < weights.nbytes / 4
    assert is_intact(tmp_path / LAST_CHECKPOINT)


def test_only_our_half_written_files_are_removed(tmp_path: Path) -> None:
    for name in (".notes.tmp.txt", ".tmp", ".report.html.tmp1"):
        (tmp_path / name).touch()
    theirs = set(tmp_path.iterdir())
    names: list[Path] = []

    def write(temporary: Path) -> None:
        names.append(temporary)
        temporary.touch()

    for name in ("last.ckpt", ".lock", "result.json"):
        write_atomically(tmp_path / name, write)
        (tmp_path / name).rename(names[-1])  # as a killed process leaves it
    forget_unneeded(tmp_path)
    assert set(tmp_path.iterdir()) == theirs


def test_every_damage_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / LAST_CHECKPOINT
    write_checkpoint(path, archive(1))
    assert is_intact(path)
    content = path.read_bytes()
    generator = random.Random(0)
    tail = range(len(content) - 100, len(content))
    for position in [*generator.sample(range(len(content)), 200), *tail]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        assert not is_intact(path), position
    for kept in (0, 1, 70, 71, 73, 74, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:kept])
        assert not is_intact(path), kept
    path.unlink()
    path.mkdir()
    assert not is_intact(path)


def test_a_damaged_one_gives_way_to_the_one_before(tmp_path: Path) -> None:
    for number in (1, 2):
        write_checkpoint(tmp_path / LAST_CHECKPOINT, archive(number))
    shutil.copy(tmp_path / LAST_CHECKPOINT, tmp_path / "copy")
    (tmp_path / LAST_CHECKPOINT).write_bytes(b"")
    assert usable_checkpoint(tmp_path) == tmp_path / PREVIOUS_CHECKPOINT
    (tmp_path / PREVIOUS_CHECKPOINT).write_bytes(b"")
    assert usable_checkpoint(tmp_path) is None


def test_one_without_a_checksum_is_damaged(tmp_path: Path) -> None:
    with (tmp_path / LAST_CHECKPOINT).open("wb") as file:
        archive(3)(file)
    assert usable_checkpoint(tmp_path) is None


def test_a_damaged_previous_checkpoint_is_discarded_as_well(tmp_path: Path, capsys: Capture) -> None:
    for _ in range(2):
        write_checkpoint(tmp_path / LAST_CHECKPOINT, archive(1.0))
    (tmp_path / PREVIOUS_CHECKPOINT).write_bytes(b"half")
    discard_damaged(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LAST_CHECKPOINT]
    assert is_intact(tmp_path / LAST_CHECKPOINT)
    assert f"{tmp_path / PREVIOUS_CHECKPOINT} is damaged" in capsys.readouterr().err
