"""A job on a real SLURM cluster of one node is preempted, requeued, or loses its processes or its node."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from benchmarks.faults import runs
from benchmarks.faults.runs import REPEATED, ROOT, Broken, Commands, Outcome, Undisturbed, continued, number_of
from benchmarks.slurm_cluster import Cluster, daemons, running_cluster, wait_until

KINDS = ("preempted", "requeued", "step killed", "node failed")


def job_disturbed(commands: Commands, generator: random.Random, directory: Path) -> str:
    """A job is disturbed at a random moment; it is done once, as if nothing had happened."""
    whole = commands.whole("lora")[0]
    kind = KINDS[number_of(directory) % len(KINDS)]
    (directory / "bin").mkdir(parents=True)
    (directory / "bin" / "activate").write_text(f'export PATH="{Path(sys.executable).parent}:$PATH"\n', "utf8")
    variables = {
        "FINETUNE_VENV": str(directory),
        "FINETUNE_ENTRY": str(ROOT / "finetune_lora.py"),
        "FINETUNE_LORA_CACHE": str(commands.folder / "cache"),
    }
    run = directory / "run"
    with running_cluster(directory) as started:
        cluster = Cluster(started.environment | variables, directory)
        script = str(ROOT / "run_DistilBert_gpu.SBATCH")
        job = cluster.submit("--requeue", script, *commands.flags(run, "lora")).stdout.strip()
        wait_until((run / "settings.json").exists, "the run's directory")
        time.sleep(generator.uniform(0, 4))
        disturb(cluster, job, kind)
        wait_until(lambda: "RUNNING" not in state(cluster, job) and "COMPLETING" not in state(cluster, job), "its end")
        if state(cluster, job) == "FAILED":  # its step was killed: SLURM leaves it to the user to start it again
            cluster.command("scontrol", "requeue", job)
        if state(cluster, job) != "COMPLETED":
            cluster.start_now(job, check=False)
        wait_until(lambda: state(cluster, job) in ("COMPLETED", "FAILED"), "the end")
        if state(cluster, job) != "COMPLETED":
            raise Broken(f"{kind}: the job ended as {state(cluster, job)}: {cluster.log()[-300:]}")
        log, restarts = cluster.log(), word(cluster, job, "Restarts")
    if restarts == "0" or "nothing to do" in log:  # the job had ended before
        raise Undisturbed
    *before, after = (Outcome(0, part) for part in log.split(f"\nrun     {run}\n"))  # each start prints this line
    earlier = Outcome(0, "".join(part.printed for part in before))
    repeated = 0 if kind == "preempted" else REPEATED  # it has time to write a checkpoint
    _, how = continued(min(after.batches, default=2) > 1, earlier, lambda: after, repeated)
    runs.require_same(run, whole)
    return f"{kind}: {how}, identical"


def state(cluster: Cluster, job: str) -> str:
    """The job's state, as SLURM names it."""
    return word(cluster, job, "JobState")


def word(cluster: Cluster, job: str, key: str) -> str:
    """What SLURM says of a job under this name."""
    found = re.search(rf"\b{key}=(\w+)", cluster.job(job))
    return found[1] if found else ""


def disturb(cluster: Cluster, job: str, kind: str) -> None:
    if kind == "preempted":  # the signal that --signal=B:USR1@120 sends
        cluster.command("scancel", "--batch", f"--signal={signal.SIGUSR1.name}", job, check=False)
    elif kind == "requeued":
        cluster.command("scontrol", "requeue", job, check=False)
    elif kind == "step killed":
        cluster.command("scancel", "--signal=KILL", f"{job}.0", check=False)
    else:
        fail_node(cluster, job)


def fail_node(cluster: Cluster, job: str) -> None:
    """All processes of the node die, SLURM's first, and the controller hears that it is down. Then it comes back."""
    folder = Path(cluster.environment["SLURM_CONF"]).parent
    listed = cluster.command("scontrol", "listpids", job, check=False).stdout.split("\n")[1:]
    pids = [int(line.split()[0]) for line in listed if line.strip() and int(line.split()[0]) > 1]
    daemon = int((folder / "slurmd.pid").read_text(encoding="utf8"))
    for pid in (daemon, *{parent for parent in map(parent_of, pids) if is_daemon(parent)}, *pids):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    host = cluster.command("sinfo", "-h", "-o", "%n").stdout.strip()
    cluster.command("scontrol", "update", f"NodeName={host}", "State=DOWN", "Reason=power")
    wait_until(lambda: state(cluster, job) not in ("RUNNING", "COMPLETING"), "the requeue")
    subprocess.Popen(daemons(folder)[2], env=cluster.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    cluster.command("scontrol", "update", f"NodeName={host}", "State=RESUME")


def parent_of(pid: int) -> int:
    """The parent of a process; 0 if it has ended."""
    with suppress(OSError):
        words = Path(f"/proc/{pid}/stat").read_text(encoding="utf8").rpartition(")")[2].split()
        return int(words[1])
    return 0


def is_daemon(pid: int) -> bool:
    """Whether a process watches the steps of a job for SLURM."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf8").startswith("slurmstepd")
    return False
