"""Two processes with DDP: the same result as one process, and an orderly end of both when they are asked to stop."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import finetune_lora
from finetuning.runs.files import read_result
from tests.common import Capture, Patch, needs_int8
from tests.scripts import Script, start_script

LIMIT_SECONDS = 240  # for a machine with other work; a run takes five
TWO = ("--devices", "2", "--strategy", "ddp")
ONE = ("--accumulate", "2")  # the same batches in the same steps
METHODS = {
    "lora": ("--method", "lora", "--lora_key", "--lora_mlp", "--report", "True", "--baseline", "True"),
    "full": ("--method", "full", "--learning_rate", "1e-3"),
}


@pytest.fixture
def flags(distilbert: Path, review_folder: Path) -> list[str]:
    return [
        *("--model_name", str(distilbert), "--dataset", "text", "--data_dir", str(review_folder)),
        *("--accelerator", "cpu", "--precision", "fp32", "--max_length", "32", "--batch_size", "8", "--epochs", "8"),
        *("--limit_train", "64", "--patience", "0", "--report", "False", "--baseline", "False"),
    ]


@contextmanager
def started(flags: list[str]) -> Iterator[Script | subprocess.Popen[str]]:
    """The command in a process group of its own, as a terminal starts it; nothing of it is left behind."""
    process = start_script("finetune_lora.py", flags, joined=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def done_by_two(flags: list[str]) -> str:
    """What two processes printed that were started at once, as torchrun does it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    more = [shared | {"LOCAL_RANK": str(rank)} for rank in range(2)]
    processes = [start_script("finetune_lora.py", flags, joined=True, more=variables) for variables in more]
    printed = "".join(process.communicate(timeout=LIMIT_SECONDS)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0], printed
    return printed


def output_after_first_epoch(process: Script | subprocess.Popen[str], directory: Path, number: int, group: bool) -> str:
    """Waits for a checkpoint, sends the signal, and returns what was printed once all processes have ended."""
    end = time.monotonic() + LIMIT_SECONDS
    while not (directory / "last.ckpt").exists():
        assert process.poll() is None, process.communicate(timeout=LIMIT_SECONDS)[0]
        assert time.monotonic() < end
        time.sleep(0.01)
    (os.killpg if group else os.kill)(process.pid, number)
    return process.communicate(timeout=LIMIT_SECONDS)[0]  # the second process holds the pipe, too


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """All but the keys' biases: their gradient is zero in theory, and Adam makes steps of its rounding."""
    (path,) = directory.glob("*.safetensors")
    return {name: weight for name, weight in load_file(path).items() if not name.endswith("k_lin.bias")}


@pytest.mark.parametrize(
    ("method", "number", "group"),
    [("lora", signal.SIGINT, True), ("full", signal.SIGTERM, False)],
    ids=["lora, Ctrl-C", "full, SIGTERM to the first process"],
)
def test_two_processes_stop_together_go_on_and_end_like_one(
    flags: list[str], tmp_path: Path, method: str, number: int, group: bool
) -> None:
    import pyarrow.parquet as pq

    two, one = tmp_path / "two", tmp_path / "one"
    flags = [*flags, *METHODS[method]]
    command = [*flags, *TWO, "--output_dir", str(two)]
    with started(command) as process:
        output = output_after_first_epoch(process, two, number, group)
    assert process.returncode == 130, output
    assert output.count("interrupted; continue with:") == 1
    assert "sync_dist" not in output
    interrupted = read_result(two)
    assert interrupted["status"] == "interrupted"

    output = done_by_two([*command, "--resume"])
    assert output.count("\ntest  ") == 1
    assert finetune_lora.main([*flags, *ONE, "--output_dir", str(one)]) == 0

    result, expected = read_result(two), read_result(one)
    assert result["status"] == "finished"
    assert 0 < interrupted["train"]["steps"] < result["train"]["steps"] == expected["train"]["steps"]
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    assert (two / "report.html").exists() == bool(result.get("baseline")) == (method == "lora")
    torch.testing.assert_close(weights(two), weights(one), rtol=1e-4, atol=1e-5)
    assert result["test"]["loss"] == pytest.approx(expected["test"]["loss"], abs=1e-5)
    predictions, others = (pq.read_table(d / "predictions.parquet").to_pydict() for d in (two, one))
    for name in ("split", "row", "label"):  # each text of each split once
        assert predictions[name] == others[name]


@needs_int8
def test_two_processes_with_8_bit_products_end_like_one(flags: list[str], tmp_path: Path) -> None:
    """Rows are quantized one by one, so a batch may be split; LoRA's gradients are sums in bf16 or fp32 before that."""
    two, one = tmp_path / "two", tmp_path / "one"
    flags = [*flags, "--lora_mlp", "--precision", "int8", "--epochs", "2"]
    done_by_two([*flags, *TWO, "--output_dir", str(two)])
    assert finetune_lora.main([*flags, *ONE, "--output_dir", str(one)]) == 0
    assert read_result(two)["train"]["steps"] == read_result(one)["train"]["steps"] > 0
    moved = [(weights(two)[name] - weight).norm() / weight.norm() for name, weight in weights(one).items()]
    assert max(moved) < 0.02
    assert read_result(two)["validation"]["loss"] == pytest.approx(read_result(one)["validation"]["loss"], abs=1e-3)


def test_the_second_process_tells_nobody_and_ends_with_status_0(monkeypatch: Patch, capsys: Capture) -> None:
    """Any other status makes Lightning or srun kill the first process, which may still be writing."""
    earlier = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    monkeypatch.setattr(finetune_lora, "run", lambda _: {"status": "interrupted"})
    try:
        assert finetune_lora.main([]) == 130
        assert signal.getsignal(signal.SIGINT) is earlier[signal.SIGINT]
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert finetune_lora.main([]) == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        monkeypatch.setattr(finetune_lora, "run", lambda _: {"status": "failed"})
        assert finetune_lora.main([]) == 1
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
    assert capsys.readouterr().err == ""
