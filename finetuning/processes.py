"""How the processes of one run find each other: Lightning, srun or torchrun may have started several."""

import gc
import io
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from finetuning.errors import UserError

PROBE_SECONDS = 0.2  # how long other processes are watched
BUSY = 0.3  # cores; a shell and the services of a machine take less
SPINS, SPINS_IF_BUSY = "30000", "100"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")  # which process of several this is
NUMBERS = (*RANKS, "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "WORLD_SIZE")
OF_A_TASK = (*NUMBERS, "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID")
DIRECTORY_VARIABLE = "FINETUNE_LORA_RUN_DIRECTORY"  # passes the run directory to the processes that Lightning starts


def is_helper() -> bool:
    """Whether this is any process but the first one, which writes the results."""
    return any(os.environ.get(name, "0") != "0" for name in RANKS)


def settle_process() -> None:
    """Replaces variables with which libraries would fail, before anything reads them, and lets any terminal show text.

    Files for containers set some to nothing. Pictures go to files, whatever shows them elsewhere. A character that the
    terminal's encoding lacks is spelled.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error does it by default
    for name in NUMBERS:
        if not os.environ.get(name, "0").isdecimal():
            del os.environ[name]
    os.environ["MPLBACKEND"] = "agg"


def be_nobodys_task() -> None:
    """Forgets that srun or torchrun has started this process as one of several: it works by itself, as its runs do."""
    for name in OF_A_TASK:
        os.environ.pop(name, None)


def stop_signals() -> list[signal.Signals]:
    """What asks this process to stop. A terminal that is closed sends SIGHUP, which ``nohup`` has ignored."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [*STOP_SIGNALS, *([] if ignored else [signal.SIGHUP])]


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM, SIGUSR1 and SIGHUP act like Ctrl-C, until a run has handlers of its own.

    Helpers ignore all four, to their end: the first process stops all processes of a run at the same step.
    """
    if is_helper():
        for number in stop_signals():
            signal.signal(number, signal.SIG_IGN)
        yield
        return
    with interruptible():
        yield


@contextmanager
def interruptible() -> Iterator[None]:
    """All signals that ask to stop act like Ctrl-C, in any process: for commands that srun may start several times."""
    with handled((number for number in stop_signals() if number != signal.SIGINT), signal.default_int_handler):
        yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignores these signals for the moment that it takes to write a result."""
    with handled(stop_signals(), signal.SIG_IGN):
        yield


@contextmanager
def handled(numbers: Iterable[signal.Signals], handler: Any) -> Iterator[None]:
    """Signals have this handler, and their earlier ones afterwards."""
    earlier = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in earlier.items():
            signal.signal(number, old)


@contextmanager
def fast_imports() -> Iterator[None]:
    """Loads torch and what goes with it inside the context: a second faster, and the process ends a second faster.

    Modules stay to the end. So the garbage collector need not look at them while they are loaded, nor later. Where
    torch is loaded already, nothing is to be gained.
    """
    if "torch" in sys.modules:
        yield
        return
    signal_module = ModuleType("scipy.signal")  # torchmetrics loads all of it, to add the name hamming: another second
    signal_module.hamming = None  # type: ignore[attr-defined]
    own = sys.modules.setdefault(signal_module.__name__, signal_module) is signal_module
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        if own:
            del sys.modules[signal_module.__name__]


def slurm_job() -> str | None:
    """The number of the SLURM job that this process belongs to. It stays the same when the job is requeued."""
    return os.environ.get("SLURM_JOB_ID")


def was_requeued() -> bool:
    """Whether SLURM started this job before, and started it again after a preemption or the death of a node."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def in_slurm_step() -> bool:
    """Whether srun started this process."""
    return "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" in os.environ


def srun_tasks() -> int:
    """How many processes srun has started, of which this is one; 1 if it has not started this process."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) if in_slurm_step() else 1


def shared_directory() -> Path | None:
    """The run directory that the first process passed to this one; ``None`` if this process may choose it.

    Raises:
        UserError: the processes cannot agree on a directory, so each would choose its own.
    """
    inherited = os.environ.get(DIRECTORY_VARIABLE) if is_helper() else None
    same = not is_helper() or inherited or in_slurm_step()  # Lightning and srun pass the same values to all processes
    if "TORCHELASTIC_RUN_ID" in os.environ or not same:
        raise UserError("--output_dir: must be given if torchrun or several hosts start the processes of a run")
    return Path(inherited) if inherited else None


def share_directory(directory: Path) -> None:
    """Passes the run directory to the processes that Lightning will start."""
    os.environ[DIRECTORY_VARIABLE] = str(directory)


def processor_seconds(usable: bool = False) -> tuple[float, float] | None:
    """Busy seconds of processors together, and processor seconds of this process; ``None`` unless on Linux.

    Args:
        usable: count only processors that this process may use, not all of the machine.
    """
    with suppress(OSError, ValueError):
        # first, because other systems have neither this file nor the affinity
        lines = [line.split() for line in Path("/proc/stat").read_text(encoding="utf8").splitlines()]
        names = [f"cpu{number}" for number in os.sched_getaffinity(0)] if usable else ["cpu"]
        busy = 0
        for words in (words for words in lines if words[0] in names):
            user, nice, system, _idle, _waiting, irq, softirq = map(int, words[1:8])  # proc(5)
            busy += user + nice + system + irq + softirq
        return busy / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])
    return None


def busy_cores(seconds: float) -> float:
    """Usable cores that other processes have kept busy for the next ``seconds``; 0 if the system does not say."""
    before = processor_seconds(usable=True)
    time.sleep(seconds)
    after = processor_seconds(usable=True)
    if before is None or after is None:
        return 0.0
    return ((after[0] - before[0]) - (after[1] - before[1])) / seconds


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def share_processors() -> None:
    """Sets how long OpenMP's waiting threads spin, see ``spin_variables``; to be called before torch is imported."""
    os.environ.update(spin_variables())


def spin_variables() -> dict[str, str]:
    """How long OpenMP's waiting threads spin before they sleep, as variables of the environment.

    A spinning thread takes the place of the one that it waits for, if other processes use the CPU. Next to one busy
    process on two cores a run then takes 2.8 to 10 times as long; with 100 spins 1.8 times. But on an idle machine 100
    spins cost short texts a quarter, so they are set only if cores are busy when the run begins. Otherwise the default
    of 300,000 becomes 30,000, which costs nothing and halves what a process that starts later can do (docs/log.md). A
    user's own setting wins. Only GNU's OpenMP reads it, which torch has on Linux.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return {}
    return {"GOMP_SPINCOUNT": SPINS_IF_BUSY if busy_cores(PROBE_SECONDS) > BUSY else SPINS}
