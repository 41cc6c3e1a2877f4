import os
import signal
import subprocess

import pytest
from lightning.pytorch.strategies import DDPStrategy, launchers

from finetuning.config import RunConfig
from finetuning.training import trainer
from finetuning.training.trainer import GRACE_SECONDS, PatientObserver, _environments, _strategy, check_processes
from tests.common import Capture, check_refusal
from tests.scripts import start_script


def test_after_the_death_of_a_process_the_first_one_has_time_to_end_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    done: list[object] = []
    monkeypatch.setattr(trainer.time, "sleep", done.append)
    monkeypatch.setattr(trainer.os, "_exit", lambda status: done.append(f"exit {status}"))
    dead, other = subprocess.Popen(["false"]), subprocess.Popen(["sleep", "600"])
    dead.wait()
    PatientObserver(main_pid=os.getpid(), child_processes=[other, dead], sleep_period=1).run()
    assert done == [1, GRACE_SECONDS, "exit 1"]
    assert other.wait(timeout=60) == -signal.SIGKILL
    assert capsys.readouterr().err == "error: a process of the run ended with status 1: go on with --resume\n"


@pytest.mark.parametrize(("error", "status"), [("RuntimeError", 1), ("SystemExit", 130)])  # that: a second Ctrl-C
def test_a_process_that_fails_does_not_wait_for_the_others(error: str, status: int) -> None:
    process = start_script("tests/failing_rank.py", [error])
    printed, _ = process.communicate(timeout=60)
    assert (process.returncode, printed) == (status, "recorded")


@pytest.mark.parametrize(
    ("given", "unused"),
    [({}, False), ({"strategy": "ddp"}, False), ({"strategy": "ddp_find_unused_parameters_true"}, True)],
)
def test_ranks_do_not_send_each_other_buffers(given: dict[str, str], unused: bool) -> None:
    assert _strategy(RunConfig.from_settings(strategy="ddp").hardware) == "ddp", "of one process it is Lightning's"
    strategy = _strategy(RunConfig.from_settings(devices=2, **given).hardware)
    assert isinstance(strategy, DDPStrategy)
    assert strategy._ddp_kwargs == {"find_unused_parameters": unused, "broadcast_buffers": False}


SLURM_TASKS = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}
SESSION = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "sys/dashboard", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("given", "flags", "message"),
    [
        ({"TORCHELASTIC_RUN_ID": "7", "WORLD_SIZE": "2"}, {}, "--devices 1 --num_nodes 1: torchrun started 2 process"),
        ({"TORCHELASTIC_RUN_ID": "7", "WORLD_SIZE": "2", "RANK": "1"}, {"devices": 3}, "torchrun started 2 process"),
        (SLURM_TASKS, {"devices": 2}, "SLURM needs --ntasks-per-node=2"),
        ({"RANK": "1"}, {}, "by RANK, LOCAL_RANK, NODE_RANK or SLURM_PROCID this is not the only process"),
        ({"SLURM_PROCID": "2", "SLURM_JOB_NAME": "interactive", "SLURM_STEP_NUM_TASKS": "4"}, {}, "or SLURM_PROCID"),
        (
            {},
            {"num_nodes": 2},
            "nothing has started the run on other nodes: use sbatch or torchrun, or set MASTER_ADDR",
        ),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "1"}, {"num_nodes": 2}, "nothing has started the run on other nodes"),
        (SESSION, {"num_nodes": 2}, r"--num_nodes 2: SLURM started 1 task\(s\), not 2; use srun"),  # nobody else does
    ],
)
def test_processes_that_would_each_train_the_whole_run_or_that_nobody_starts_are_refused(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], flags: dict[str, int], message: str
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    check_refusal(message, check_processes, RunConfig.from_settings(**flags).hardware)


def test_processes_that_fit_are_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "7", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    check_processes(RunConfig.from_settings(devices=2).hardware)


def test_nodes_that_know_each_other_are_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MASTER_ADDR": "a", "MASTER_PORT": "1", "NODE_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    check_processes(RunConfig.from_settings(num_nodes=2).hardware)


PER_NODE = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}


@pytest.mark.parametrize(
    ("more", "devices", "environment"),
    [
        ({}, 1, "LightningEnvironment"),  # a session such as JupyterHub's, in which nobody calls srun
        ({}, 2, "LightningEnvironment"),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, 1, "LightningEnvironment"),
        (
            {"SLURM_JOB_NAME": "interactive", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", **PER_NODE},
            2,
            "SLURMEnvironment",
        ),  # salloc, then srun
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS_PER_NODE": "4"}, 4, "SLURMEnvironment"),
    ],
)
def test_only_several_tasks_of_srun_are_processes_of_the_run(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, str], devices: int, environment: str
) -> None:
    for name, value in (SESSION | more).items():
        monkeypatch.setenv(name, value)
    check_processes(RunConfig.from_settings(devices=devices).hardware)
    assert [type(found).__name__ for found in _environments()] == [environment]


def test_lightning_starts_this_observer() -> None:
    assert launchers.subprocess_script._launch_process_observer is trainer._observe
