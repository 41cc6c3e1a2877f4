import os
import subprocess

import pytest
from lightning.fabric.strategies.launchers import subprocess_script
from lightning.pytorch.strategies import launchers

from finetuning.config import RunConfig
from finetuning.errors import UserError
from finetuning.training import trainer
from finetuning.training.trainer import GRACE_SECONDS, PatientObserver, check_processes


def test_after_the_death_of_a_process_the_first_one_has_time_to_end_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    monkeypatch.setattr(trainer.time, "sleep", done.append)
    monkeypatch.setattr(subprocess_script.os, "kill", lambda pid, _: done.append(pid))
    dead = subprocess.Popen(["false"])
    dead.wait()
    PatientObserver(main_pid=os.getpid(), child_processes=[dead], sleep_period=1).run()
    assert done == [1, GRACE_SECONDS, os.getpid()]


def test_a_strategy_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match=r"--strategy dpp: allowed are auto, .*ddp, "):
        check_processes(RunConfig.from_settings(strategy="dpp").hardware)


def test_lightning_starts_this_observer() -> None:
    assert launchers.subprocess_script._launch_process_observer is trainer._observe
