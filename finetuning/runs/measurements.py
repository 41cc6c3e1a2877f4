"""Memory and time of a run, whether other programs used the machine, and the hardware, versions and commit."""

import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from finetuning.forking import is_forked
from finetuning.processes import processor_seconds
from finetuning.processor import cpu_name

PACKAGES = ("torch", "lightning", "transformers", "datasets", "torchmetrics", "bitsandbytes", "peft", "numpy")
OTHERS_ALLOWED = 0.03  # fraction of all processor time that system services and a shell may use


def peak_memory(on_gpu: bool) -> dict[str, Any]:
    """The peak memory of this process: ``peak_bytes``, and the ``source`` of the number."""
    if on_gpu:
        return {"peak_bytes": torch.cuda.max_memory_allocated(), "source": "torch.cuda.max_memory_allocated"}
    with suppress(OSError, StopIteration):  # Linux, where ru_maxrss would include memory of the parent process
        lines = Path("/proc/self/status").read_text(encoding="utf8").splitlines()
        kibibytes = next(line.split()[1] for line in lines if line.startswith("VmHWM:"))
        return {"peak_bytes": int(kibibytes) * 1024, "source": "resident set size of the process, VmHWM"}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak_bytes": peak, "source": "resident set size of the process, ru_maxrss"}


def forget_peak(on_gpu: bool) -> None:
    """Lets the peak memory of this process begin anew, where the system can do it."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf8")  # proc(5)


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes of main memory that this process may still take; ``None`` unless on Linux.

    The smallest of the machine's and of what the process's control groups leave, as containers and SLURM set them.
    File caches do not count as taken, because the system gives them up.

    Args:
        root: the file system with ``proc`` and ``sys``; tests give another one.
    """
    with suppress(OSError, StopIteration, ValueError):
        lines = (root / "proc/meminfo").read_text(encoding="utf8").splitlines()
        free = [1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))]
        for line in (root / "proc/self/cgroup").read_text(encoding="utf8").splitlines():
            _, controllers, group = line.split(":", 2)
            new = controllers == ""  # version 2
            names = ("memory.max", "memory.current") if new else ("memory.limit_in_bytes", "memory.usage_in_bytes")
            base = root / "sys/fs/cgroup" / ("" if new else "memory")
            if new or "memory" in controllers.split(","):
                folder = base / group.lstrip("/")
                for level in (folder, *(parent for parent in folder.parents if parent.is_relative_to(base))):
                    free += _left_in_group(level, *names)
        return min(free)
    return None


def _left_in_group(folder: Path, limit: str, usage: str) -> list[int]:
    """What a control group leaves, or nothing if it has no limit."""
    with suppress(OSError, ValueError):
        most = int((folder / limit).read_text(encoding="utf8"))  # "max" is no number
        facts = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf8").splitlines())
        cached = int(facts.get("total_inactive_file", facts.get("inactive_file", 0)))
        return [max(most - int((folder / usage).read_text(encoding="utf8")) + cached, 0)]
    return []


def process_seconds() -> float | None:
    """Wall-clock seconds since this process started, including imports unless it was forked after them; ``None``
    unless on Linux."""
    with suppress(OSError, ValueError):
        after_name = Path("/proc/self/stat").read_text(encoding="utf8").rpartition(")")[2].split()
        began = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # starttime in proc(5), counted from boot
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began
    return None


def was_alone(before: tuple[float, float] | None, seconds: float) -> bool | None:
    """Whether no other process used the processors, so that times can be compared; ``None`` if that is unknown.

    It does not see other processes on a GPU.

    Args:
        before: ``processor_seconds`` at the start of the measured time.
        seconds: wall-clock seconds since then.
    """
    after = processor_seconds()
    if before is None or after is None:
        return None
    others = (after[0] - before[0]) - (after[1] - before[1])
    return others < OTHERS_ALLOWED * seconds * (os.cpu_count() or 1)


def environment_record() -> dict[str, Any]:
    """Versions, hardware, commit and date, so that each result can be traced back."""
    import watermark

    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "versions": versions,
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "amx": bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "git": COMMIT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "forked": is_forked(),
        "watermark": watermark.watermark(machine=True, python=True, iso8601=True),
    }


def git_commit() -> dict[str, Any] | None:
    """The commit of this suite, its date, and whether files differ from it; ``None`` if this is no git checkout."""
    git = shutil.which("git")
    if git is None:
        return None

    def output_of(*words: str) -> str:
        here = Path(__file__).resolve().parent
        done = subprocess.run([git, "-C", str(here), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    with suppress(subprocess.CalledProcessError):
        output_of("ls-files", "--error-unmatch", Path(__file__).name)  # of a venv, git may know the folder around it
        modified = bool(output_of("status", "--porcelain", "-uno"))
        commit, date = output_of("show", "--no-patch", "--format=%H %cI", "HEAD").split()
        return {"commit": commit, "date": date, "modified": modified}
    return None


COMMIT = git_commit()  # of the code that this process has loaded: the files may change while studies fork runs from it
