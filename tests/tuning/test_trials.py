import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from finetuning.runs.history import write_metrics
from finetuning.tuning import trials as module
from finetuning.tuning.trials import COMPLETE, END, FAILED, LEASE_SECONDS, PRUNED, TRIAL, Trial, Trials, best_of
from tests.common import ROOT, refusal_of, some

PYTHON = (sys.executable, "-c")
WORKER = """
import sys
from contextlib import ExitStack
from pathlib import Path
from finetuning.tuning.trials import Trials

trials = Trials(Path(sys.argv[1]), "accuracy")
for _ in range(20):
    with ExitStack() as claim:
        number, _ = trials.claim_new(claim)
        trials.begin(number, {"worker": sys.argv[2]}, {})
        print(number, flush=True)
        trials.end(number, "complete", value=0.5)
"""
HOLDER = """
import sys
from contextlib import ExitStack
from pathlib import Path
from finetuning.tuning.trials import Trials

with ExitStack() as claim:
    print(Trials(Path(sys.argv[1]), "accuracy").claim_new(claim)[0], flush=True)
    sys.stdin.read()
"""


def test_a_trial_goes_from_claim_to_end(tmp_path: Path) -> None:
    trials = Trials(tmp_path / "trials", "accuracy")
    assert trials.all() == []
    with ExitStack() as claim:
        assert trials.claim_new(claim) is not None
        assert trials.running() == 1
        assert trials.read(0) == Trial(0)
        trials.begin(0, {"dropout": 0.1}, {"dropout": 0.1})
        rows: list[dict[str, Any]] = [
            {"step": 1, "epoch": 1, "validation_accuracy": 0.5},
            {"step": 2, "epoch": 2, "validation_accuracy": "nan"},
        ]
        write_metrics(trials.place(0).directory, rows)
        assert trials.read(0).history == {1: 0.5}
        (trials.place(0).directory / "last.ckpt").touch()
        trials.end(0, COMPLETE, value=0.5, history={1: 0.5}, minutes=2.0)
    assert not (trials.place(0).directory / "last.ckpt").exists()
    fresh = Trials(tmp_path / "trials", "accuracy").read(0)
    assert fresh == Trial(0, {"dropout": 0.1}, {"dropout": 0.1}, COMPLETE, 0.5, {1: 0.5}, minutes=2.0)
    assert trials.running() == 0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (TRIAL, '{"poi', "remove the trial's folder"),
        (TRIAL, '{"point": {}}', "it lacks settings: remove the trial's folder"),
        (END, "[]", "it must hold a JSON object: remove this file"),
        (END, "{}", "it lacks history: remove this file"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    trials = Trials(tmp_path, "accuracy")
    (tmp_path / "000").mkdir()
    trials.begin(0, {}, {})
    (tmp_path / "000" / name).write_text(text)
    refusal = refusal_of(trials.all)
    assert refusal.startswith(f"{tmp_path / '000' / name}: cannot be read: ")
    assert message in refusal


def test_workers_share_the_numbers(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen([*PYTHON, WORKER, str(tmp_path), str(i)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for i in range(4)
    ]
    taken = [int(word) for worker in workers for word in worker.communicate()[0].split()]
    assert sorted(taken) == list(range(80))
    for name in ("000-1", "005_2", "003 2"):  # somebody keeps another one
        (tmp_path / name).mkdir()
    assert [trial.state for trial in Trials(tmp_path, "accuracy").all()] == [COMPLETE] * 80


def test_the_trial_of_a_killed_worker_is_taken_over_once(tmp_path: Path) -> None:
    trials = Trials(tmp_path, "accuracy")
    piped: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    other = subprocess.Popen([*PYTHON, HOLDER, str(tmp_path)], cwd=ROOT, **piped)
    assert some(other.stdout).readline() == "0\n"
    with ExitStack() as first, ExitStack() as second:
        assert trials.claim_released(first) is None
        other.kill()
        other.communicate()
        assert (trials.claim_released(first) or (None,))[0] == 0
        assert trials.claim_released(second) is None
        assert (trials.claim_new(second, most=2) or (None,))[0] == 1
        assert trials.claim_new(second, most=2) is None


def test_a_claim_of_another_host_counts_until_its_lease_ends(tmp_path: Path) -> None:
    trials = Trials(tmp_path, "accuracy")
    trials.place(0).directory.mkdir(parents=True)
    lock = trials.place(0).lock
    lock.write_text('{"host": "elsewhere", "process": 1, "since": "today"}')
    assert trials.place(0).is_claimed()
    old = time.time() - LEASE_SECONDS - 1
    os.utime(lock, (old, old))
    assert not trials.place(0).is_claimed()
    with trials.place(0).claim() as descriptor:
        assert descriptor is not None
    assert lock.read_text() == ""


def test_claims_are_renewed_and_a_lost_file_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    os.utime(path, (1.0, 1.0))
    descriptor = os.open(path, os.O_RDWR)
    module.renew([descriptor])
    os.close(descriptor)
    module.renew([descriptor])
    assert path.stat().st_mtime > 1.0


@pytest.mark.parametrize(("minimize", "winner"), [(False, 2), (True, 1)])
def test_the_best_trial_is_the_first_complete_one(minimize: bool, winner: int) -> None:
    scores = [(0, FAILED, None), (1, COMPLETE, 0.5), (2, COMPLETE, 0.7), (3, COMPLETE, 0.7), (4, PRUNED, 0.9)]
    best = some(best_of([Trial(n, state=state, value=value) for n, state, value in scores], minimize))
    assert best.number == winner
    assert best_of([Trial(0)], minimize) is None


def test_looking_at_a_claim_is_no_sign_of_life(tmp_path: Path) -> None:
    place = module.Place(tmp_path / "trials" / "000")
    assert not place.is_claimed()
    with place.claim():
        assert place.is_claimed()
    os.utime(place.lock, (1000, 1000))
    assert not place.is_claimed()
    assert place.lock.stat().st_mtime == 1000
