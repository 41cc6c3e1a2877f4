"""The estimate: its parts against what is known of them, its peak against the run's, and that it writes nothing."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune_lora import main
from finetuning.config import RunConfig
from finetuning.runs.files import read_result
from finetuning.training import estimate
from finetuning.training.estimate import (
    _seconds_per_token,
    estimate_table,
    kept_for_backward,
    measure_steps,
    run_seconds,
)
from finetuning.training.hardware import resolve_hardware
from finetuning.training.tasks import SingleLabel
from local_dataset_utilities import tokenize
from local_model_utilities import build_classifier, count_parameters, find_base_model, load_tokenizer
from tests.common import Capture, Patch, flags, texts_of
from tests.scripts import finish, start


def measured(folder: Path, data: Path, **settings: object) -> tuple[dict, RunConfig, int]:
    config = RunConfig.from_settings(
        model_name=str(folder), dataset="text", data_dir=data, max_length=32, batch_size=8, accelerator="cpu",
        precision="fp32", **{"epochs": 2} | settings,
    )  # fmt: skip
    base = find_base_model(config)
    tokenizer = load_tokenizer(base)
    splits = tokenize(texts_of(config), tokenizer, config.data)
    hardware = resolve_hardware(config.hardware)
    classifier = build_classifier(config, base, ["bad", "good"], hardware.dtype)
    pad_id, cache_gb = int(tokenizer.pad_token_id), config.hardware.frozen_cache_gb
    record = measure_steps(
        classifier, SingleLabel(["bad", "good"]), splits, pad_id, config.training, hardware, cache_gb
    )
    return record, config, count_parameters(classifier)["total"].bytes


@pytest.mark.parametrize(("optimizer", "states"), [("adamw", 2), ("sgd_nesterov", 1), ("sgd", 0)])
def test_parts_are_those_that_are_known(distilbert: Path, review_folder: Path, optimizer: str, states: int) -> None:
    record, config, weights = measured(distilbert, review_folder, method="full", optimizer=optimizer)
    memory, seconds = record["memory"], record["seconds"]
    assert memory["gradients"] == weights  # all is trained, in fp32
    assert memory["optimizer"] == states * weights
    assert memory["peak"] > memory["activations"] > 0
    assert record["steps"] == 15
    assert seconds["run"] == pytest.approx(2 * (seconds["epoch"] + seconds["validation"]) + seconds["test"])
    table = estimate_table(record, weights, config.training.epochs)
    assert "15 steps" in table
    assert "activations" in table


@pytest.mark.filterwarnings("error:Mean of empty slice")
def test_one_step_in_an_epoch_is_enough(distilbert: Path, review_folder: Path) -> None:
    record, *_ = measured(distilbert, review_folder, limit_train=8)
    assert record["steps"] == 1
    assert all(seconds > 0 for seconds in record["seconds"].values())


@pytest.mark.parametrize(
    "settings", [{"method": "selective", "trainable_layers": 1}, {"lora_layers": "2"}], ids=["selective", "lora_layers"]
)
def test_outputs_of_frozen_layers_are_part_of_it(
    distilbert: Path, review_folder: Path, settings: dict[str, Any]
) -> None:
    settings = settings | {"epochs": 5}
    record, config, weights = measured(distilbert, review_folder, **settings)
    plain, *_ = measured(distilbert, review_folder, frozen_cache_gb=0.0, **settings)
    memory, seconds = record["memory"], record["seconds"]
    assert plain["memory"]["kept_outputs"] == 0 < memory["kept_outputs"]
    assert memory["kept_outputs"] % (32 * 4) == 0, "rows of the model's width, in fp32"
    filed, *_ = measured(distilbert, review_folder, frozen_cache_gb=1e-9, **settings)
    on_disk, table = filed["memory"], estimate_table(filed, weights, config.training.epochs)
    assert (on_disk["kept_outputs"], on_disk["outputs_on_disk"]) == (0, memory["kept_outputs"])
    assert re.search(r"\noutputs of frozen layers +\d+ MiB on disk\n", table)
    assert "epoch, from the second on" in table
    assert plain["seconds"]["later_epoch"] == plain["seconds"]["epoch"]
    later = seconds["later_epoch"] + seconds["later_validation"]
    expected = seconds["epoch"] + seconds["validation"] + 4 * later + seconds["test"]
    assert seconds["run"] == pytest.approx(expected)
    assert "outputs of frozen layers" in estimate_table(record, weights, config.training.epochs)


def test_an_average_of_the_weights_is_part_of_it(distilbert: Path, review_folder: Path) -> None:
    record, config, weights = measured(distilbert, review_folder, method="full", average="ema")
    assert record["memory"]["average"] == weights
    assert "average of the weights" in estimate_table(record, weights, config.training.epochs)


def test_its_peak_has_what_the_steps_lack_and_activations_are_of_the_longest_texts(
    distilbert: Path, review_folder: Path, monkeypatch: Patch
) -> None:
    lengths: list[int] = []
    monkeypatch.setattr(estimate, "kept_for_backward", lambda _, batch: lengths.append(batch["input_ids"].shape[1]))
    monkeypatch.setattr(estimate, "peak_memory", lambda _: {"peak_bytes": 1000})
    settings: dict[str, Any] = {"method": "selective", "trainable_layers": 1, "average": "ema"}
    memory = measured(distilbert, review_folder, **settings)[0]["memory"]
    assert min(memory["kept_outputs"], memory["average"]) > 0
    assert memory["peak"] == 1000 + memory["kept_outputs"] + memory["average"]
    assert lengths == [32]  # --max_length, which few reviews reach


def test_what_is_kept_for_backward_counts_once_and_without_weights() -> None:
    linear, x = torch.nn.Linear(8, 4), torch.randn(6, 8, requires_grad=True)

    def logits(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return (linear(batch["x"]) + linear(batch["x"][1:2])).exp()

    classifier: Any = SimpleNamespace(parameters=linear.parameters, logits=logits)
    assert kept_for_backward(classifier, {"x": x}) == 4 * (6 * 8 + 6 * 4)


@pytest.mark.parametrize(("seconds", "mean"), [([10, 1, 2, 3, 100], 5), ([10, 1, 2, 3], 4)])
def test_the_slowest_and_the_fastest_of_five_batches_do_not_count(
    seconds: list[int], mean: int, monkeypatch: Patch
) -> None:
    times = iter(time for length in seconds for time in (0, length))
    monkeypatch.setattr(estimate, "clock", lambda _: next(times))
    batches = [{"attention_mask": torch.tensor([[1, 1, 0]])}] * len(seconds)
    assert _seconds_per_token(batches, torch.device("cpu"), lambda _: None) == mean / 2


def test_checkpointing_keeps_fewer_activations(bert: Path, review_folder: Path) -> None:
    kept = [
        measured(bert, review_folder, gradient_checkpointing=checkpointing)[0]["memory"]["activations"]
        for checkpointing in (False, True)
    ]
    assert kept[1] < kept[0] / 2


def test_the_command_writes_nothing_and_its_peak_is_the_runs(
    distilbert: Path, review_folder: Path, tmp_path: Path
) -> None:
    words = flags(distilbert, review_folder, tmp_path / "run")
    process = start([*words, "--estimate"])
    shown, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert not (tmp_path / "run").exists()
    peak = float(next(line for line in shown.splitlines() if line.startswith("peak")).split()[1]) * 2**20
    finish(start(words))
    used = read_result(tmp_path / "run")["memory"]["peak_bytes"]
    assert peak == pytest.approx(used, rel=0.15)


def test_a_step_that_does_not_fit_a_gpu_is_said_in_one_line(
    distilbert: Path, review_folder: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr("finetuning.steps.estimate.measure_steps", too_large)
    words = flags(distilbert, review_folder, tmp_path / "run", "--estimate", "--batch_tokens", "4096")
    assert main(words) == 2
    *_, line = capsys.readouterr().err.splitlines()  # tokenizing comes first
    assert line.startswith("error: --estimate: the GPU has too little memory")
    assert "--batch_tokens (4096)" in line


def test_the_seconds_of_a_run() -> None:
    seconds = {"epoch": 10.0, "later_epoch": 8.0, "validation": 3.0, "later_validation": 2.0, "test": 5.0}
    assert run_seconds(seconds, 3) == 10 + 3 + 2 * (8 + 2) + 5
    assert run_seconds(seconds, 0) == 3 + 5, "without an epoch, a run only evaluates"


def test_it_is_for_one_device(capsys: Capture) -> None:
    assert main(["--offline", "--estimate", "--devices", "2"]) == 2
    assert "--estimate True: needs --devices 1 and --num_nodes 1" in capsys.readouterr().err
