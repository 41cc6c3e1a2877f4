"""benchmarks.gpu in its small form, on a CPU: all parts run, and one that fails does not stop the others."""

import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu_parts import SMALL, Record, Sizes


def test_all_parts_in_the_small_form(tmp_path: Path) -> None:
    from tests.scripts import start_script  # which loads torch; a part that starts anew imports this file

    output = tmp_path / "gpu.json"
    words = ["benchmarks.gpu", "--small", "--output", str(output)]
    # no compiler: no part needs kernels, and the cache of its own is empty
    process = start_script("tests/module.py", words, more={"CXX": "false"})
    shown, errors = process.communicate(timeout=sum(part.limit_seconds for part in gpu.plan(SMALL)))
    parts = json.loads(output.read_text(encoding="utf8"))["parts"]
    assert list(parts) == [part.name for part in gpu.plan(SMALL)]
    assert {name: part["error"] for name, part in parts.items() if "error" in part} == {}
    assert process.returncode == 0, errors
    assert parts["tests"].get("skipped", 0) + parts["tests"].get("passed", 0) > 10
    assert parts["tests"]["failed_tests"] == []
    assert parts["run lora fp32"]["train_tokens_per_second"] > 0
    assert parts["interrupt and resume"]["equal"]
    assert parts["steps peft_tuned 8"]["steps"] == parts["steps suite_equal_batches 8"]["steps"] == SMALL.steps
    same = {parts[f"steps {name} 8"]["padding_fraction"] for name in ("peft_tuned", "suite_equal_batches")}
    assert len(same) == 1, "both get the same batches"
    rows = [line for line in shown.splitlines() if line.startswith("| ")]
    assert len(rows) == len(parts) + 1


def test_on_a_gpu_every_method_has_every_precision() -> None:
    names = [part.name for part in gpu.plan(Sizes())]
    assert len(names) == len(set(names))
    for method in ("lora", "qlora", "full", "selective"):
        assert {f"run {method} {precision}" for precision in ("bf16", "fp16", "fp32")} <= set(names)
    assert names[:3] == ["folder", "environment", "tests"]
    assert names[-1] == "profile"


def slow(*_: Any) -> Record:
    subprocess.run(["sleep", "60"], check=False)
    return {}


def wrong(*_: Any) -> Record:
    raise ValueError("no such kernel\nand more")


def fine(_: Path, sizes: Sizes) -> Record:
    return {"precisions": len(sizes.precisions)}


@pytest.mark.parametrize(
    ("call", "record"),
    [
        (fine, {"precisions": 1}),
        (wrong, {"error": "ValueError: no such kernel"}),
        (slow, {"error": "not done after 1 s"}),
    ],
)
def test_a_part_that_fails_or_takes_too_long_gives_its_reason(call: Any, record: Record, tmp_path: Path) -> None:
    began = time.perf_counter()
    assert gpu.run_part(gpu.Part("it", call, 1 if call is slow else 20), tmp_path, SMALL) == record
    assert time.perf_counter() - began < 15


def test_parts_for_a_gpu_start_anew(tmp_path: Path) -> None:
    part = gpu.Part("it", fine, 60)
    assert gpu.run_part(part, tmp_path, replace(SMALL, start="spawn")) == {"precisions": 1}


def test_the_table_says_what_failed() -> None:
    parts = {
        "environment": {"gpu": "A card", "versions": {"torch": "2"}, "seconds": 1.0},
        "run lora bf16": {"error": "a | b", "seconds": 2.0},
        "steps suite 8": {"train_tokens_per_second": 1234.5, "peak_bytes": 2**21, "seconds": 3.0},
        "attention": {"milliseconds": {"64": 0.5, "128": "no kernel"}, "seconds": 4.0},
    }
    lines = gpu.table({"parts": parts}).splitlines()
    assert lines[0] == "A card; torch 2."
    assert lines[-3:] == [
        "| run lora bf16 | 2.0 | failed: a \\| b |",
        "| steps suite 8 | 3.0 | train_tokens_per_second 1,234; peak 2 MiB |",
        "| attention | 4.0 | 64: 0.50 ms; 128: no kernel |",
    ]


def test_parts_are_chosen_by_the_beginning_of_their_names() -> None:
    assert [part.name for part in gpu.chosen(gpu.plan(SMALL), "steps")] == [
        "folder", "steps suite_equal_batches 8", "steps peft_tuned 8",
    ]  # fmt: skip
