import errno
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
import torch

from finetuning.errors import Interrupted
from finetuning.flags import from_flags
from finetuning.materials import find_materials
from finetuning.steps import claim_directory, read_inputs, watched
from finetuning.training import checkpoints
from finetuning.training.callbacks import GracefulStop, Meter
from finetuning.training.checkpoints import CheckpointFiles
from finetuning.training.trackers import Trackers
from tests.common import Patch, flags


class Clock:
    """A clock that the test moves. Writing a checkpoint takes ``cost`` seconds."""

    def __init__(self, monkeypatch: Patch, cost: float) -> None:
        self.now = 1000.0
        self.cost = cost
        monkeypatch.setattr(checkpoints.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(checkpoints, "write_checkpoint", self._write)

    def _write(self, path: Path, write: Callable[[BinaryIO], object]) -> None:
        self.now += self.cost


class FullFile(io.BytesIO):
    def write(self, content: Any) -> int:
        if self.tell() + len(content) > 700:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(content)


def test_a_full_disk_is_the_error_and_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: Patch) -> None:
    last = tmp_path / "last.ckpt"
    CheckpointFiles().save_checkpoint({"epoch": 1}, last)
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda content, _: save(content, FullFile()))
    with pytest.raises(OSError, match="No space left on device"):
        CheckpointFiles().save_checkpoint({"epoch": 2, "weights": torch.zeros(1000)}, last)
    assert list(tmp_path.iterdir()) == [last]
    assert CheckpointFiles().load_checkpoint(last, weights_only=True) == {"epoch": 1}


@pytest.mark.parametrize(
    ("minutes", "cost", "after"),
    [
        (5, 1.0, 300),  # what writing costs is no matter: 100 s would be enough
        (5, 4.0, 400),  # one of 4 s may come every 400 s
        (0.01, 0.5, 50),
        (0.01, 0.0, 0.6),
        (0, 0.0, None),
    ],
)
def test_a_checkpoint_is_due_by_the_clock_and_takes_at_most_a_hundredth_of_the_time(
    minutes: float, cost: float, after: float | None, monkeypatch: Patch
) -> None:
    clock = Clock(monkeypatch, cost)
    files = CheckpointFiles()
    clock.now += 60 * minutes - 0.01
    assert not files.due(minutes), "the first one costs an unknown time"
    clock.now += 0.02
    assert files.due(minutes) == (after is not None)
    files.save_checkpoint({}, Path("last.ckpt"))
    clock.now += (after or 1e9) - 0.01
    assert not files.due(minutes)
    clock.now += 0.02
    assert files.due(minutes) == (after is not None)


@pytest.mark.parametrize(
    ("minutes", "steps", "expected"), [(0, 0, []), (0.9, 0, [3, 6]), (0, 3, [3, 6]), (0.01, 0, [1, 3, 5, 7])]
)
def test_a_run_writes_the_checkpoints_that_are_due(
    minutes: float, steps: int, expected: list[int], tmp_path: Path, monkeypatch: Patch
) -> None:
    clock = Clock(monkeypatch, cost=0.25)  # so one may come every 25 s
    files, saved = CheckpointFiles(), []

    def save(path: Path) -> None:
        files.save_checkpoint({}, path)
        saved.append(trainer.global_step)

    trainer: Any = SimpleNamespace(
        num_training_batches=16, accumulate_grad_batches=2, world_size=1, is_global_zero=True, save_checkpoint=save,
        strategy=SimpleNamespace(checkpoint_io=files),
    )  # fmt: skip
    stop = GracefulStop(tmp_path, Meter(tmp_path), minutes, steps)
    for batch in range(16):  # of two a step, 10 s each; the one after the last comes from Lightning
        clock.now += 10
        trainer.global_step = (batch + 1) // 2
        stop.on_train_batch_end(trainer, None, {}, {}, batch)
    assert saved == expected


@pytest.mark.parametrize(
    ("device", "steps", "asked"),
    [("cuda", 0, [1, 11, 21]), ("cuda", 4, [1, 4, 8, 11, 12, 16, 20, 21, 24]), ("cpu", 0, [*range(1, 25)])],
)
def test_ranks_on_gpus_seldom_wait_for_each_other(device: str, steps: int, asked: list[int], tmp_path: Path) -> None:
    found = []

    def reduce(*_: bool, **__: bool) -> bool:
        found.append(trainer.global_step)
        return False

    trainer: Any = SimpleNamespace(
        num_training_batches=25, accumulate_grad_batches=1, world_size=2, is_global_zero=False,
        strategy=SimpleNamespace(checkpoint_io=CheckpointFiles(), reduce_boolean_decision=reduce),
    )  # fmt: skip
    stop = GracefulStop(tmp_path, Meter(tmp_path), 5, steps)
    for batch in range(25):
        trainer.global_step = batch + 1
        stop.on_train_batch_end(trainer, SimpleNamespace(device=torch.device(device)), {}, {}, batch)
    assert found == asked


def test_a_test_stops_at_once_if_no_other_process_waits_for_it(tmp_path: Path) -> None:
    stop = GracefulStop(tmp_path, Meter(tmp_path), 5, 0)
    alone, ranks = (SimpleNamespace(world_size=size) for size in (1, 2))
    trainers: list[Any] = [alone, ranks]
    for trainer in trainers:
        stop.on_test_batch_end(trainer, None, None, {}, 0)
    stop.requested = True
    stop.on_test_batch_end(trainers[1], None, None, {}, 0)
    with pytest.raises(Interrupted):
        stop.on_test_batch_end(trainers[0], None, None, {}, 0)


def test_the_flags_reach_the_run(bert: Path, review_folder: Path, tmp_path: Path) -> None:
    words = flags(bert, review_folder, tmp_path / "run", "--checkpoint_steps", "9")
    for more, minutes in ((["--checkpoint_minutes", "7"], 7), ([], 5)):
        config = from_flags([*words, *more, "--overwrite"])
        claim = claim_directory(tmp_path / "run", read_inputs(config, find_materials(config)))
        with claim.lock, watched(claim, False, Trackers([], claim.directory)) as watch:
            assert (watch.stop.minutes, watch.stop.steps) == (minutes, 9)
