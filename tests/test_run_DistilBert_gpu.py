"""The job script on a real cluster of one node, with a stand-in for a GPU; no systemd needed."""

import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import finetune_lora

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "run_DistilBert_gpu.SBATCH"
DAEMONS = ("munged", "slurmctld", "slurmd")
DAEMON_PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
PATIENCE_SECONDS = 180  # for a machine with other work; nothing here takes ten

SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
MailProg=/bin/true
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
KillWait=5
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=1 RealMemory=500 Gres=gpu:1 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def wait_until(happened: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert time.monotonic() < end, f"waited {PATIENCE_SECONDS} s in vain: {what}"
        time.sleep(0.05)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in sockets]


@dataclass(frozen=True)
class Cluster:
    """A running cluster, and the folder from which jobs are submitted."""

    environment: dict[str, str]
    submit_folder: Path

    def command(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words, env=self.environment, cwd=self.submit_folder, check=check, capture_output=True, text=True
        )

    def submit(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Submits the script with the overrides and flags in ``words``; its output is the job's number."""
        options = ("--parsable", "--mem=400M", "--cpus-per-task=1", "--nice", "--output=log")
        return self.command("sbatch", *options, *words, check=check)

    def log(self) -> str:
        return (self.submit_folder / "log").read_text(encoding="utf8")

    def job(self, number: str) -> str:
        """What SLURM knows of a job, as ``Key=Value`` words."""
        return self.command("scontrol", "show", "job", number).stdout


def missing_cluster() -> None:
    absent = [name for name in DAEMONS if shutil.which(name, path=DAEMON_PATH) is None]
    if absent:
        reason = f"no {absent[0]}: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


def configure(folder: Path) -> None:
    for name in ("state", "spool"):
        (folder / name).mkdir()
    folder.chmod(0o755)  # munged refuses a socket that others cannot reach
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o600)
    host = socket.gethostname().split(".")[0]
    text = SLURM_CONF.format(host=host, user=getpass.getuser(), ports=free_ports(2), folder=folder)
    (folder / "slurm.conf").write_text(text, encoding="utf8")
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n", encoding="utf8")  # any character device will do
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n", encoding="utf8")


def daemons(folder: Path) -> list[list[str]]:
    munge = {"key-file": "key", "socket": "munge.sock", "pid-file": "munge.pid", "log-file": "munge.log"}
    munge |= {"seed-file": "munge.seed"}
    return [
        ["munged", "--foreground", *(f"--{option}={folder / name}" for option, name in munge.items())],
        ["slurmctld", "-D", "-c", "-L", str(folder / "slurmctld.log")],
        ["slurmd", "-D", "-L", str(folder / "slurmd.log")],
    ]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing_cluster()
    submit_folder = tmp_path_factory.mktemp("submit from here")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "FINETUNE_"))}
    environment |= {"PATH": DAEMON_PATH, "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm")))
        configure(folder)
        environment["SLURM_CONF"] = str(folder / "slurm.conf")
        cluster = Cluster(environment, submit_folder)
        for words in daemons(folder):
            with (folder / f"{words[0]}.out").open("w") as output:
                process = subprocess.Popen(words, env=environment, stdout=output, stderr=output)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            if words[0] == "munged":
                wait_until((folder / "munge.sock").exists, "munged")
        wait_until(lambda: "idle" in cluster.command("sinfo", "-h", "-o", "%T", check=False).stdout, "an idle node")
        yield cluster
        cluster.command("scancel", "--user", getpass.getuser())
        wait_until(lambda: not cluster.command("squeue", "-h").stdout.strip(), "an empty queue")


@pytest.fixture
def ready(cluster: Cluster, tmp_path: Path) -> Cluster:
    """The cluster with an environment that the script has to activate before it finds its Python."""
    (tmp_path / "my venv" / "bin").mkdir(parents=True)
    activate = f'export PATH="{Path(sys.executable).parent}:$PATH"\n'
    (tmp_path / "my venv" / "bin" / "activate").write_text(activate, encoding="utf8")
    variables = {
        "FINETUNE_VENV": str(tmp_path / "my venv"),
        "FINETUNE_ENTRY": str(ROOT / "finetune_lora.py"),
        "FINETUNE_LORA_CACHE": os.environ["FINETUNE_LORA_CACHE"],
    }
    return Cluster(cluster.environment | variables, cluster.submit_folder)


@pytest.fixture
def flags(tiny_folders: dict[str, Path], review_folder: Path, tmp_path: Path) -> list[str]:
    data = tmp_path / "my reviews"
    data.symlink_to(review_folder)
    return [
        *("--model_name", str(tiny_folders["distilbert"]), "--dataset", "text", "--data_dir", str(data)),
        *("--accelerator", "cpu", "--precision", "fp32", "--max_length", "32", "--batch_size", "4"),
    ]


def read_result(directory: Path) -> dict:
    return json.loads((directory / "result.json").read_text(encoding="utf8"))


def test_a_job_runs_with_its_flags_and_writes_to_a_directory_of_its_own(ready: Cluster, flags: list[str]) -> None:
    done = ready.submit("--wait", str(SCRIPT), *flags, "--epochs", "1", check=False)
    assert done.returncode == 0, ready.log()
    result = read_result(ready.submit_folder / "runs" / f"slurm-{done.stdout.strip()}")
    assert result["status"] == "finished"
    assert result["config"]["data_dir"] == flags[flags.index("--data_dir") + 1]


def test_a_refused_job_fails_with_status_2_and_is_not_requeued(ready: Cluster, flags: list[str]) -> None:
    done = ready.submit("--wait", str(SCRIPT), *flags, "--epochs", "0", check=False)
    assert done.returncode == 2, ready.log()
    assert "error: --epochs 0" in ready.log()
    assert "Restarts=0" in ready.job(done.stdout.strip())


def test_a_signalled_array_task_is_requeued_and_ends_as_if_nothing_had_happened(
    ready: Cluster, flags: list[str], tmp_path: Path
) -> None:
    directory = tmp_path / "run 3"
    flags = [*flags, "--epochs", "12"]
    job = ready.submit("--array=3", str(SCRIPT), *flags, "--seed", "%a", f"--output_dir={tmp_path}/run %a")
    number = job.stdout.strip()
    wait_until((directory / "last.ckpt").exists, "the first epoch")
    ready.command("scancel", "--batch", f"--signal={signal.SIGUSR1.name}", f"{number}_3")
    wait_until(lambda: "JobState=PENDING" in ready.job(number), "the requeue")
    interrupted = read_result(directory)
    assert interrupted["status"] == "interrupted", ready.log()
    time.sleep(2)  # a job that starts in the second in which it ended is refused: "Job credential revoked"
    ready.command("scontrol", "update", f"JobId={number}", "StartTime=now")  # it would wait for two minutes
    wait_until(lambda: re.search("JobState=(COMPLETED|FAILED)", ready.job(number)) is not None, "the end")
    assert "JobState=COMPLETED" in ready.job(number), ready.log()
    assert "Restarts=1" in ready.job(number)

    result = read_result(directory)
    assert result["status"] == "finished"
    assert 0 < interrupted["train"]["steps"] < result["train"]["steps"]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the job: sums in another order would differ in the last bit
    try:
        assert finetune_lora.main([*flags, "--seed", "3", "--output_dir", str(tmp_path / "local")]) == 0
    finally:
        torch.set_num_threads(threads)
    expected = load_file(tmp_path / "local" / "adapter_model.safetensors")
    resumed = load_file(directory / "adapter_model.safetensors")
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert result["test"]["loss"] == read_result(tmp_path / "local")["test"]["loss"]


def test_the_script_names_no_place_of_one_machine() -> None:
    code = [line for line in SCRIPT.read_text(encoding="utf8").splitlines() if not line.startswith("#")]
    places = re.findall(r"(?:^|[\s\"'=>])([/~][^\s\"';]*)", "\n".join(code))
    assert set(places) == {"/dev/null"}
