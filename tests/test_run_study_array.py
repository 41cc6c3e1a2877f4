"""A study as a job array on a real cluster of one node: two runs at a time, one of them killed and requeued.

Also what the scripts of both kinds of arrays, studies and searches, have in common.
"""

import re
from pathlib import Path
from typing import Any

import pytest

import finetune_lora
from benchmarks.slurm_cluster import Cluster, wait_until
from compare_methods import main
from finetuning.comparison.packed import read_records
from finetuning.comparison.plan import read_plan
from tests.common import ROOT, Patch, one_thread, write_study

SCRIPT = ROOT / "studies" / "run_study_array.SBATCH"
ROWS = """
[[rows]]
name = "lora"
epochs = 8

[[rows]]
name = "selective"
method = "selective"
trainable_layers = 1
"""


def table(results: Path) -> dict[str, Any]:
    """What the report compares, by run: no times, no memory."""
    records = {}
    for name, record in read_records(results / "tiny")[0].items():
        result, predictions = record.result, record.predictions
        scores = {key: value for key, value in result["test"].items() if key != "seconds"}
        records[name] = (result["status"], result["study"], scores, result["parameters"], predictions)
    return records


def test_an_array_with_a_killed_task_gives_the_table_of_a_local_run(
    ready: Cluster, jobs_folder: Path, distilbert: Path, review_folder: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    write_study(jobs_folder / "tiny.toml", distilbert, ROWS)
    flags = ("tiny.toml", "--data_dir", str(review_folder))
    array = ready.submit("--array=0-1%2", str(SCRIPT), *flags).stdout.strip()
    collected = ready.submit(f"--dependency=afterany:{array}", "--gres=none", str(SCRIPT), *flags).stdout.strip()

    checkpoint = jobs_folder / "runs" / "tiny" / "lora-seed0" / "last.ckpt"
    wait_until(checkpoint.exists, "the first epoch")
    assert 1 <= ready.command("squeue", "-h", "-t", "RUNNING").stdout.count("\n") <= 2
    (task,) = re.findall(r"JobId=(\d+) ArrayJobId=\d+ ArrayTaskId=0 ", ready.job(array))
    ready.command("scontrol", "requeue", task)  # kills it first, as a preemption does
    wait_until(lambda: "JobState=PENDING" in ready.job(task), "the requeued task")
    ready.start_now(task)
    wait_until(lambda: re.search("JobState=(COMPLETED|FAILED)", ready.job(collected)) is not None, "the collection")
    assert "2 finished and 0 failed of 2 runs" in ready.log(), ready.log()
    assert "continued" in ready.log()
    assert "Restarts=1" in ready.job(task)

    monkeypatch.chdir(jobs_folder)
    with one_thread():  # as in the jobs: sums in another order would differ in the last bit
        for run in read_plan(Path("tiny.toml")).runs:
            directory = tmp_path / "runs" / "tiny" / run.name
            assert finetune_lora.main([*run.flags(review_folder), "--output_dir", str(directory)]) == 0
    local = ("--runs_dir", str(tmp_path / "runs"), "--results", str(tmp_path / "results"))
    assert main(["collect", "tiny.toml", *local]) == 0
    assert len(table(jobs_folder / "results")) == 2
    assert table(jobs_folder / "results") == table(tmp_path / "results")


@pytest.mark.parametrize("name", ["run_study_array.SBATCH", "run_tune_array.SBATCH"])
def test_a_script_starts_its_command_through_the_script_of_single_runs(name: str) -> None:
    lines = (ROOT / "studies" / name).read_text(encoding="utf8").splitlines()
    code = [line for line in lines if not line.startswith("#")]
    assert "source ./run_DistilBert_gpu.SBATCH" in code
    assert not [line for line in code if "activate" in line or "srun" in line]
