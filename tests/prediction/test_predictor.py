from pathlib import Path
from typing import Any

import pytest
import torch

from finetuning.models.classifier import Classifier
from finetuning.prediction.predictor import load_predictor
from finetuning.prediction.trained import read_trained


def test_no_result_is_read_before_all_batches_are_computed(
    tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU each reading waits for all queued work."""
    predictor = load_predictor(read_trained(tiny_folders["bert"]))
    log: list[str] = []
    compute, read = Classifier.logits, torch.Tensor.cpu

    def logits(self: Classifier, batch: dict[str, Any]) -> torch.Tensor:
        log.append("compute")
        return compute(self, batch)

    def cpu(self: torch.Tensor) -> torch.Tensor:
        log.append("read")
        return read(self)

    monkeypatch.setattr(Classifier, "logits", logits)
    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    counted: list[int] = []
    probabilities = predictor([f"film number {i}" for i in range(600)], done=counted.append)
    assert probabilities.sum(1) == pytest.approx(1)
    assert sum(counted) == 600
    batches = len(counted)
    assert batches >= 3
    assert log.count("compute") == batches
    assert log[-batches:] == ["read"] * batches
