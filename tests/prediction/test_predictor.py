from pathlib import Path
from typing import Any

import pytest
import torch

from finetuning.config import RunConfig
from finetuning.errors import UserError
from finetuning.models.base_files import file_hashes
from finetuning.models.classifier import Classifier
from finetuning.prediction.predictor import load_predictor, on_this_machine
from finetuning.prediction.trained import read_trained
from finetuning.runs.files import ADAPTER, write_result


def test_no_result_is_read_before_all_batches_are_computed(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each reading waits for all queued work."""
    predictor = load_predictor(read_trained(bert))
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


def test_a_base_model_that_has_changed_since_the_run_is_refused(bert: Path, tmp_path: Path) -> None:
    base = bert
    config = RunConfig.from_settings(model_name=str(base), accelerator="cpu", max_length=32)
    data = {"label_names": ["bad", "good"], "columns": {}}
    result = {"status": "finished", "config": config.to_dict(), "data": data, "task": {}}
    write_result(tmp_path, result | {"base_model": {"sha256": file_hashes(base) | {"config.json": "0"}}})
    with pytest.raises(UserError, match=r"base model .*config\.json has changed since the run"):
        load_predictor(read_trained(tmp_path))
    write_result(tmp_path, result | {"base_model": {"sha256": file_hashes(base)}})
    with pytest.raises(UserError, match=f"{ADAPTER} cannot be read"):  # the base model is accepted
        load_predictor(read_trained(tmp_path))


def test_precision_is_one_that_this_machine_has() -> None:
    def here(**settings: object) -> dict[str, object]:
        return on_this_machine(RunConfig.from_settings(**settings).hardware)

    assert here(precision="bf16", device=3)["precision"] == "bf16"
    given = here(precision="fp16", accelerator="gpu")["precision"]
    assert given == ("fp16" if torch.cuda.is_available() else "auto")
    assert here(accelerator="cpu")["accelerator"] == "cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetuning.prediction.predictor.seen_gpus", lambda: 1)
        patch.setattr("finetuning.prediction.predictor.gpu_obstacle", lambda _: None)
        for able, precision in (True, "bf16"), (False, "auto"):
            patch.setattr("finetuning.prediction.predictor.multiplies_bf16", lambda _, able=able: able)
            assert here(precision="bf16")["precision"] == precision
        patch.setattr("finetuning.prediction.predictor.gpu_obstacle", lambda _: "too old for this build")
        assert [here(precision=name)["precision"] for name in ("fp16", "bf16")] == ["auto", "bf16"]
