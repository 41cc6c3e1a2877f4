import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from finetuning.processor import cpu_name
from finetuning.runs import measurements
from finetuning.runs.measurements import environment_record, free_memory, peak_memory, processor_seconds, was_alone
from tests.common import ROOT


def test_memory_and_time_are_those_of_the_process() -> None:
    """And not of the process that started it, of which Linux' ru_maxrss would tell: it has loaded more."""
    code = (
        "import time; time.sleep(0.5); import numpy as np;"
        "from finetuning.runs.measurements import peak_memory, process_seconds;"
        "before = peak_memory(False)['peak_bytes']; block = np.ones(before // 8);"
        "print(before, peak_memory(False)['peak_bytes'], process_seconds())"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    before, after, seconds = map(float, done.stdout.split())
    own = peak_memory(on_gpu=False)
    assert own["source"].startswith("resident set size")
    assert 50 * 2**20 < before < own["peak_bytes"], "torch alone is more than the first"
    assert before < after < 2.5 * before
    if Path("/proc/self/stat").exists():
        assert 0.5 < seconds < time.monotonic() - began + 0.02  # the kernel's clock has ticks of 10 ms


def test_environment_says_on_what_a_number_was_measured() -> None:
    record = environment_record()
    assert set(record) == {
        "python", "versions", "cpu", "cpu_capability", "amx", "threads", "gpus", "git", "date", "forked", "watermark",
    }  # fmt: skip
    assert record["versions"]["torch"] == torch.__version__
    assert {"lightning", "transformers", "numpy"} <= set(record["versions"])
    assert record["cpu"]
    assert record["threads"] == torch.get_num_threads()
    assert record["git"] is None or (len(record["git"]["commit"]) == 40 and isinstance(record["git"]["modified"], bool))
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (
            "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nstepping\t: 1\nflags:\n\n"
            "processor\t: 1\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n\n",
            "AMD EPYC (family 25, model 17, stepping 1)",
        ),
        ("processor\t: 0\nmodel name\t: Neoverse: N1\nCPU part\t: 0xd0c\n\n", "Neoverse: N1"),
        ("processor\t: 0\nCPU part\t: 0xd0c\n\n", platform.processor()),
    ],
)
def test_processors_of_one_name_are_told_apart(tmp_path: Path, cpuinfo: str, name: str) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert cpu_name(tmp_path / "cpuinfo") == name
    assert cpu_name(tmp_path / "none") == platform.processor()


@pytest.mark.parametrize(("others", "alone"), [(0.0, True), (0.29, True), (0.31, False)])
def test_alone_is_when_others_take_next_to_nothing(monkeypatch: pytest.MonkeyPatch, others: float, alone: bool) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(measurements, "processor_seconds", lambda: (120.0 + others, 30.0))
    assert was_alone((110.0, 20.0), seconds=5.0) is alone
    assert was_alone(None, seconds=5.0) is None


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux's /proc/stat")
def test_a_busy_child_counts_as_this_process() -> None:
    before = processor_seconds()
    code = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    after = processor_seconds()
    assert before is not None
    assert after is not None
    assert after[0] - before[0] > 0.25
    assert after[1] - before[1] > 0.25


def write_facts(root: Path, facts: dict[str, str]) -> None:
    for name, content in facts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


def test_free_memory_is_what_the_machine_and_all_control_groups_leave(tmp_path: Path) -> None:
    assert free_memory(tmp_path) is None
    write_facts(
        tmp_path, {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 5000 kB\n", "proc/self/cgroup": "0::/a/b\n"}
    )
    assert free_memory(tmp_path) == 5000 * 1024
    group = "sys/fs/cgroup/a/"
    stat = "anon 1\ninactive_file 1000\n"
    write_facts(
        tmp_path, {f"{group}memory.max": "3000000", f"{group}memory.current": "900000", f"{group}memory.stat": stat}
    )
    write_facts(
        tmp_path, {f"{group}b/memory.max": "max", f"{group}b/memory.current": "1", f"{group}b/memory.stat": stat}
    )
    assert free_memory(tmp_path) == 3_000_000 - 900_000 + 1000, "the limit of the group above counts"
    old = "sys/fs/cgroup/memory/job/"
    write_facts(
        tmp_path,
        {
            "proc/self/cgroup": "7:cpu:/x\n4:memory:/job\n",
            f"{old}memory.limit_in_bytes": "2000000",
            f"{old}memory.usage_in_bytes": "1900000",
            f"{old}memory.stat": "total_inactive_file 50\n",
        },
    )
    assert free_memory(tmp_path) == 100_050
