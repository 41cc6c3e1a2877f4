"""What a run takes of its machine, whether it had it to itself, and which machine, versions and commit that were."""

import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "lightning", "transformers", "datasets", "torchmetrics", "bitsandbytes", "peft", "numpy")
REPOSITORY = Path(__file__).resolve().parents[2]
OTHERS_ALLOWED = 0.03  # of the machine's processor time: what its services and a shell take


def peak_memory(on_gpu: bool) -> dict[str, Any]:
    """The most memory that this process has held: ``peak_bytes``, and what it was read from."""
    if on_gpu:
        return {"peak_bytes": torch.cuda.max_memory_allocated(), "source": "torch.cuda.max_memory_allocated"}
    with suppress(OSError, StopIteration):  # Linux; its ru_maxrss also counts what the starting process held
        lines = Path("/proc/self/status").read_text(encoding="utf8").splitlines()
        kibibytes = next(line.split()[1] for line in lines if line.startswith("VmHWM:"))
        return {"peak_bytes": int(kibibytes) * 1024, "source": "resident set size of the process, VmHWM"}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak_bytes": peak, "source": "resident set size of the process, ru_maxrss"}


def processor_seconds() -> tuple[float, float] | None:
    """Seconds that all processors have been busy, and those that this process has taken; None but on Linux."""
    with suppress(OSError, ValueError):
        words = Path("/proc/stat").read_text(encoding="utf8").splitlines()[0].split()
        user, nice, system, _idle, _waiting, irq, softirq = map(int, words[1:8])  # proc(5)
        busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
        return busy, sum(os.times()[:4])
    return None


def process_seconds() -> float | None:
    """Wall clock since this process began, with libraries, data and model read in it; None but on Linux."""
    with suppress(OSError, ValueError):
        after_name = Path("/proc/self/stat").read_text(encoding="utf8").rpartition(")")[2].split()
        began = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # starttime of proc(5), since the machine's boot
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began
    return None


def was_alone(before: tuple[float, float] | None, seconds: float) -> bool | None:
    """Whether this process had the processors to itself in the last seconds: only then do its time and memory compare.

    Of other processes on a GPU it knows nothing.

    Args:
        before: ``processor_seconds`` at their beginning.
        seconds: wall clock since.
    """
    after = processor_seconds()
    if before is None or after is None:
        return None
    others = (after[0] - before[0]) - (after[1] - before[1])
    return others < OTHERS_ALLOWED * seconds * (os.cpu_count() or 1)


def environment_record() -> dict[str, Any]:
    """Versions, hardware and the commit, so that a number can be traced."""
    import watermark

    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "versions": versions,
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "amx": bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "git": _git_commit(),
        "watermark": watermark.watermark(machine=True, python=True, iso8601=True),
    }


def _cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Of the first processor, with its numbers: virtual machines give one name to processors of unlike speed."""
    with suppress(OSError, KeyError):
        first = cpuinfo.read_text(encoding="utf8").partition("\n\n")[0]
        facts = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in first.splitlines() if ":" in line)
        numbers = [
            f"{key.removeprefix('cpu ')} {facts[key]}" for key in ("cpu family", "model", "stepping") if key in facts
        ]
        return facts["model name"] + (f" ({', '.join(numbers)})" if numbers else "")
    return platform.processor()


def _git_commit() -> dict[str, Any] | None:
    """The commit of this suite and whether files differ from it; nothing where it is no git checkout."""
    git = shutil.which("git")
    if git is None:
        return None

    def ask(*words: str) -> str:
        done = subprocess.run([git, "-C", str(REPOSITORY), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    with suppress(subprocess.CalledProcessError):
        return {"commit": ask("rev-parse", "HEAD"), "modified": bool(ask("status", "--porcelain", "-uno"))}
    return None
