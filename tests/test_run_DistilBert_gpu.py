"""The job script on a real cluster of one node, with a stand-in for a GPU; no systemd needed."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

import finetune_lora
from benchmarks.slurm_cluster import Cluster, wait_until
from finetuning.runs.files import ADAPTER, read_result
from tests.common import ROOT, one_thread

SCRIPT = ROOT / "run_DistilBert_gpu.SBATCH"


@pytest.fixture
def flags(distilbert: Path, review_folder: Path, tmp_path: Path) -> list[str]:
    data = tmp_path / "my reviews"
    data.symlink_to(review_folder)
    return [
        *("--model_name", str(distilbert), "--dataset", "text", "--data_dir", str(data)),
        *("--accelerator", "cpu", "--precision", "fp32", "--max_length", "32", "--batch_size", "4"),
        *("--epochs", "2", "--patience", "0", "--report", "False", "--baseline", "False"),
    ]


def test_a_refused_job_fails_with_status_2_and_is_not_requeued(ready: Cluster, flags: list[str]) -> None:
    done = ready.submit(str(SCRIPT), *flags, "--epochs", "-1")
    job = done.stdout.strip()
    wait_until(lambda: "JobState=FAILED" in ready.job(job), "the end")
    assert "ExitCode=2:0" in ready.job(job), ready.log()
    assert "error: --epochs -1" in ready.log()
    assert "Restarts=0" in ready.job(done.stdout.strip())


def test_a_signalled_array_task_is_requeued_and_ends_as_if_nothing_had_happened(
    ready: Cluster, flags: list[str], tmp_path: Path
) -> None:
    directory = tmp_path / "run 3"
    flags = [*flags, "--epochs", "8"]
    more = ("--seed", "%a", f"--output_dir={tmp_path}/run %a", "--overwrite")  # the requeued job must not do it
    job = ready.submit("--array=3", str(SCRIPT), *flags, *more)
    number = job.stdout.strip()
    wait_until((directory / "last.ckpt").exists, "the first epoch")
    ready.command("scancel", "--batch", f"--signal={signal.SIGUSR1.name}", f"{number}_3")
    wait_until(lambda: "JobState=PENDING" in ready.job(number), "the requeue")
    interrupted = read_result(directory)
    assert interrupted["status"] == "interrupted", ready.log()
    ready.start_now(number)
    wait_until(lambda: re.search("JobState=(COMPLETED|FAILED)", ready.job(number)) is not None, "the end")
    assert "JobState=COMPLETED" in ready.job(number), ready.log()
    assert "Restarts=1" in ready.job(number)

    result = read_result(directory)
    assert result["status"] == "finished"
    assert 0 < interrupted["train"]["steps"] < result["train"]["steps"]

    with one_thread():  # as in the job: sums in another order would differ in the last bit
        assert finetune_lora.main([*flags, "--seed", "3", "--output_dir", str(tmp_path / "local")]) == 0
    assert (directory / ADAPTER).read_bytes() == (tmp_path / "local" / ADAPTER).read_bytes()
    assert result["test"]["loss"] == read_result(tmp_path / "local")["test"]["loss"]


def test_a_job_that_is_signalled_before_its_run_begins_is_requeued(
    ready: Cluster, flags: list[str], tmp_path: Path
) -> None:
    activate, begun = tmp_path / "venv" / "bin" / "activate", tmp_path / "begun"
    activate.parent.mkdir(parents=True)
    activate.write_text(f"touch '{begun}'\nsleep 2\n")  # as modules and conda may take their time
    job = ready.submit(f"--export=ALL,FINETUNE_VENV={tmp_path / 'venv'}", str(SCRIPT), *flags).stdout.strip()
    wait_until(begun.exists, "the environment")
    ready.command("scancel", "--batch", f"--signal={signal.SIGUSR1.name}", job)
    wait_until(lambda: "JobState=PENDING" in ready.job(job), "the requeue")
    assert "Restarts=1" in ready.job(job)
    assert not (ready.submit_folder / "runs" / f"slurm-{job}").exists(), "no run was started"
    ready.command("scancel", job)


def test_two_tasks_train_as_one_process_does_in_a_directory_of_the_job(
    ready: Cluster, flags: list[str], tmp_path: Path
) -> None:
    flags = [*flags, "--epochs", "2", "--limit_train", "64", "--report", "True", "--baseline", "True"]
    log = tmp_path / "log"
    options = ("--nodes=1", "--ntasks-per-node=2", "--gres=gpu:2", f"--output={log}")
    two = ("--num_nodes", "1", "--devices", "2", "--strategy", "ddp")
    done = ready.submit(*options, str(SCRIPT), *flags, *two)  # sbatch --wait would look after 2, 10 and 42 s
    job = done.stdout.strip()
    wait_until(lambda: re.search("JobState=(COMPLETED|FAILED)", ready.job(job)) is not None, "the end")
    assert "JobState=COMPLETED" in ready.job(job), log.read_text()
    assert "NumTasks=2" in ready.job(done.stdout.strip())
    assert log.read_text().count("\ntest  ") == 1, "one of the two speaks"
    one = [*flags, "--accumulate", "2", "--output_dir", str(tmp_path / "one")]  # the same batches in the same steps
    with one_thread():
        assert finetune_lora.main(one) == 0
    directory = ready.submit_folder / "runs" / f"slurm-{done.stdout.strip()}"
    result, expected = read_result(directory), read_result(tmp_path / "one")
    assert result["status"] == "finished"
    assert result["config"]["data_dir"] == flags[flags.index("--data_dir") + 1]
    assert result["train"]["steps"] == expected["train"]["steps"] > 0
    assert result["test"]["loss"] == pytest.approx(expected["test"]["loss"], abs=1e-5)
    assert (result["config"]["devices"], result["config"]["num_nodes"]) == (2, 1)


@pytest.mark.parametrize(
    ("script", "missing"),
    [
        (SCRIPT, "finetune_lora.py"),
        (ROOT / "studies" / "run_study_array.SBATCH", SCRIPT.name),
        (ROOT / "studies" / "run_tune_array.SBATCH", SCRIPT.name),
    ],
)
def test_a_job_from_another_folder_is_refused(script: Path, missing: str, tmp_path: Path) -> None:
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", str(script), "a.toml"], env=job, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path} has no {missing}: submit this script from the project's folder\n"


def test_the_script_names_no_place_of_one_machine() -> None:
    code = [line for line in SCRIPT.read_text(encoding="utf8").splitlines() if not line.startswith("#")]
    places = re.findall(r"(?:^|[\s\"'=>])([/~][^\s\"';]*)", "\n".join(code))
    assert set(places) == {"/dev/null"}
