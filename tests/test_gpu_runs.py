"""Whole runs on a GPU: each precision and method, and a run that is interrupted and continued."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from finetune_lora import main
from finetuning.runs.files import read_result
from tests.common import ROOT, flags, write_splits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("process_settings"),  # a run in fp32 turns TF32 on, and other tests compare with fp32
]
ON_GPU = ("--accelerator", "gpu", "--learning_rate", "0.01")


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("distilbert", ["--lora_mlp", "True"]),
        ("distilbert", ["--q_lora", "True"]),
        ("bert", ["--method", "full"]),
        ("roberta", ["--method", "selective", "--trainable_layers", "2"]),
        ("distilbert", ["--lora_head", "True", "--efficient", "False"]),
        ("distilbert", ["--lora_mlp", "True", "--gradient_checkpointing", "True"]),
    ],
    ids=["lora", "qlora", "full", "selective", "plain_path", "checkpointing"],
)
def test_a_run_learns(
    tiny_folders: dict[str, Path], review_folder: Path, tmp_path: Path, family: str, more: list[str], precision: str
) -> None:
    words = flags(tiny_folders[family], review_folder, tmp_path / "run", *ON_GPU, *more, "--precision", precision)
    if precision == "bf16" and torch.cuda.get_device_capability(0) < (8, 0):
        assert main(words) == 2
        return
    assert main([*words, "--epochs", "3"]) == 0
    result = read_result(tmp_path / "run")
    assert result["memory"]["source"] == "torch.cuda.max_memory_allocated"
    assert result["train"]["steps"] == 3 * 15
    assert np.isfinite(result["test"]["loss"])
    if family == "distilbert":
        assert result["test"]["accuracy"] > 0.8


def test_compiled_it_learns(distilbert: Path, review_folder: Path, tmp_path: Path) -> None:
    words = flags(distilbert, review_folder, tmp_path / "run", *ON_GPU, "--lora_mlp", "True")
    assert main([*words, "--compile", "True", "--epochs", "3"]) == 0
    assert read_result(tmp_path / "run")["test"]["accuracy"] > 0.8


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_an_interrupted_run_continues(distilbert: Path, tmp_path: Path, precision: str) -> None:
    data = write_splits(tmp_path / "data", train=2000, validation=40, test=40)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = (*ON_GPU, "--precision", precision, "--epochs", "2", "--learning_rate", "0.001")
    assert main(flags(distilbert, data, whole, *more)) == 0
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "finetune_lora.py"), *flags(distilbert, data, parts, *more)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "batch" in line:
            process.send_signal(signal.SIGTERM)
            break
    process.stdout.read()
    assert process.wait(timeout=120) == 130
    assert main(["--resume", "--output_dir", str(parts)]) == 0
    results = [read_result(directory) for directory in (whole, parts)]
    assert results[0]["train"]["steps"] == results[1]["train"]["steps"]
    weights = [load_file(directory / "adapter_model.safetensors") for directory in (whole, parts)]
    for name, weight in weights[0].items():  # products on a GPU may sum in another order
        np.testing.assert_allclose(weights[1][name], weight, rtol=0.05, atol=0.01, err_msg=name)
