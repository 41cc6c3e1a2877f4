"""A real SLURM cluster of one node, with stand-ins for GPUs; no systemd needed."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

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
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 Gres=gpu:2 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def wait_until(happened: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert time.monotonic() < end, f"waited {PATIENCE_SECONDS} s in vain: {what}"
        time.sleep(0.05)


def free_ports() -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        return first.getsockname()[1], second.getsockname()[1]


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

    def start_now(self, job: str, check: bool = True) -> None:
        """Starts a requeued job, which would wait for two minutes."""
        time.sleep(2)  # a job that starts in the second in which it ended is refused: "Job credential revoked"
        self.command("scontrol", "update", f"JobId={job}", "StartTime=now", check=check)

    def log(self) -> str:
        return (self.submit_folder / "log").read_text(encoding="utf8")

    def job(self, number: str) -> str:
        """What SLURM knows of a job, as ``Key=Value`` words."""
        return self.command("scontrol", "show", "job", number).stdout


def missing_daemon() -> str | None:
    """Which of SLURM's daemons is not installed."""
    return next((f"no {name}" for name in DAEMONS if shutil.which(name, path=DAEMON_PATH) is None), None)


def configure(folder: Path) -> None:
    for name in ("state", "spool"):
        (folder / name).mkdir()
    folder.chmod(0o755)  # munged refuses a socket that others cannot reach
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o600)
    host = socket.gethostname().split(".")[0]
    text = SLURM_CONF.format(host=host, user=getpass.getuser(), ports=free_ports(), folder=folder)
    (folder / "slurm.conf").write_text(text, encoding="utf8")
    devices = ("/dev/null", "/dev/zero")  # any character devices will do
    (folder / "gres.conf").write_text("".join(f"Name=gpu File={path}\n" for path in devices), encoding="utf8")
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n", encoding="utf8")


def daemons(folder: Path) -> list[list[str]]:
    munge = {"key-file": "key", "socket": "munge.sock", "pid-file": "munge.pid", "log-file": "munge.log"}
    munge |= {"seed-file": "munge.seed"}
    return [
        ["munged", "--foreground", *(f"--{option}={folder / name}" for option, name in munge.items())],
        ["slurmctld", "-D", "-c", "-L", str(folder / "slurmctld.log")],
        ["slurmd", "-D", "-L", str(folder / "slurmd.log")],
    ]


def kill_all_of(folder: Path) -> None:
    """Ends what the daemons leave: forks of slurmd may outlive it."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(folder).encode() in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)


@contextmanager
def running_cluster(submit_folder: Path) -> Iterator[Cluster]:
    """Starts the daemons, and ends them with all their jobs. Only one at a time: its jobs share this machine."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "FINETUNE_"))}
    environment |= {"PATH": DAEMON_PATH, "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm")))
        stack.callback(kill_all_of, folder)
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
