"""A search as a job array on a real cluster of one node: workers that join, one of them preempted and requeued."""

import re
from pathlib import Path

from benchmarks.slurm_cluster import Cluster, wait_until
from finetuning.storage import read_json
from tests.common import ROOT, write_splits

SCRIPT = ROOT / "studies" / "run_tune_array.SBATCH"
TRIED = 4


def test_an_array_of_workers_shares_a_search_and_survives_a_preemption(
    ready: Cluster, jobs_folder: Path, distilbert: Path, tmp_path: Path
) -> None:
    write_splits(tmp_path, train=60, validation=50, test=40)
    line = "--dataset text --accelerator cpu --precision fp32 --max_length 32 --batch_size 8 --epochs 4 --prune False"
    flags = [*line.split(), "--data_dir", str(tmp_path), "--model_name", str(distilbert)]
    flags += ["--trials", str(TRIED), "--seeds", "1", "--output_dir", "search"]
    array = ready.submit("--array=0-1", str(SCRIPT), *flags).stdout.strip()
    folder = jobs_folder / "search"
    wait_until(lambda: (folder / "trials" / "001" / "metrics.csv").exists(), "a trial of each worker")

    (task,) = re.findall(r"JobId=(\d+) ArrayJobId=\d+ ArrayTaskId=0 ", ready.job(array))
    ready.command("scontrol", "requeue", task)  # kills it first, as a preemption does
    wait_until(lambda: "JobState=PENDING" in ready.job(task), "the requeued worker")
    ready.start_now(task)
    wait_until(lambda: (folder / "tune.json").exists(), f"the end of the search: {ready.log()}")
    wait_until(lambda: not re.search("JobState=(RUNNING|PENDING)", ready.job(array)), "the end of the jobs")
    assert "Restarts=1" in ready.job(task)

    ends = [read_json(path) for path in sorted(folder.glob("trials/*/end.json"))]
    assert [end["state"] for end in ends] == ["complete"] * TRIED
    assert [len(end["history"]) for end in ends] == [4] * TRIED
    assert read_json(folder / "tune.json")["winner"]["seeds"] == [1]
    finalists = read_json(folder / "final.json")["trials"]  # the default, and the best trial if that is another one
    assert len(list(folder.glob("last/*/result.json"))) == len(finalists)
    assert (folder / "best" / "result.json").exists()
    assert ready.log().count("best run    search/best") == 2  # each worker says how it ended
