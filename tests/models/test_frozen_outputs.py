"""Outputs of frozen layers: what is loaded is what was saved, in memory and on disk, and a whole run is unchanged."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from finetune_lora import main
from finetuning.models.classifier import Classifier
from finetuning.models.families import FAMILIES
from finetuning.models.frozen_outputs import FrozenBatch, FrozenOutputs
from finetuning.runs.files import read_result
from tests.common import flags
from tests.data.test_batches import make_split
from tests.models.test_encoder import prepare

LENGTHS = np.array([3, 1, 5, 2])


@pytest.mark.parametrize("memory_bytes", [10**6, 50], ids=["memory", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_loaded_is_what_was_saved(tmp_path: Path, memory_bytes: int, dtype: torch.dtype) -> None:
    outputs = FrozenOutputs(LENGTHS, 4, dtype, memory_bytes, tmp_path)
    assert outputs.on_disk == (memory_bytes == 50)
    assert not list(tmp_path.iterdir()), "the file has no name"
    everything = torch.randn(4, 5, 4).to(dtype)
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    for examples in ([2, 0], [1, 3]):
        batch = FrozenBatch(outputs, np.array(examples))
        assert not batch.known
        batch.save(everything[examples], mask[examples])
        assert batch.known
        assert FrozenBatch(outputs, np.array([2, 1])).known == (examples == [1, 3]), "only if all of it is"
    assert not FrozenBatch(outputs, np.array([0])).load(mask[[0]])[:, 3:].any()
    other = np.array([3, 2, 1])  # another batch than any that was saved
    assert FrozenBatch(outputs, other).known
    expected = everything * mask[..., None]
    assert torch.equal(FrozenBatch(outputs, other).load(mask[other]), expected[other])


def test_a_file_takes_its_room_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the process would be killed, without a word, on a disk that fills up later."""
    asked: list[int] = []

    def full(_: int, begin: int, size: int) -> None:
        asked.append(size - begin)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        FrozenOutputs(LENGTHS, 4, torch.float32, 0, tmp_path)
    assert asked == [11 * 4 * 4]


def test_a_disk_that_is_too_small_is_said(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="bytes left"):
        FrozenOutputs(np.array([2**50]), 4, torch.float32, 0, tmp_path)


@pytest.mark.parametrize(
    ("method", "memory"),
    [("--method head", "1"), ("--lora_layers 1-2 --lora_mlp True", "1e-9")],
    ids=["head, in memory", "lora_layers, on disk"],
)
def test_a_run_ends_with_the_same_weights(
    distilbert: Path, review_folder: Path, tmp_path: Path, method: str, memory: str
) -> None:
    """To rounding: an epoch's batches have other shapes than those in which the outputs were computed first."""
    weights, losses = [], []
    for gigabytes in ("0", memory):
        output = tmp_path / gigabytes
        words = [*method.split(), "--epochs", "2", "--test", "False"]
        words += ["--frozen_cache_gb", gigabytes, "--precision", "fp32", "--optimizer", "sgd"]
        assert main(flags(distilbert, review_folder, output, *words)) == 0
        weights.append(load_file(next(output.glob("*.safetensors"))))
        losses.append(read_result(output)["validation"]["loss"])
    computed, kept = weights
    for name, weight in computed.items():
        np.testing.assert_allclose(kept[name], weight, rtol=1e-4, atol=1e-6)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("model_type", [name for name, family in FAMILIES.items() if family.efficient])
def test_a_classifier_of_every_family_keeps_outputs_unless_it_drops(model_type: str) -> None:
    family = FAMILIES[model_type]
    for dropout in (0.0, 0.1):
        model = prepare(family, "head_only", dropout=dropout)
        classifier = Classifier(model, family, torch.float32, efficient=True)
        kept = classifier.frozen_outputs({"train": make_split(LENGTHS)}, 1.0)
        assert bool(kept) == (dropout == 0 or "dropout" not in family.settings)
