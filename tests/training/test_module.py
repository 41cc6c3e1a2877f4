import math
from pathlib import Path
from typing import Any

import pytest
import torch

from finetuning.config import RunConfig
from finetuning.errors import TrainingFailed
from finetuning.training.module import FineTuning
from finetuning.training.tasks import SingleLabel
from local_model_utilities import build_classifier, find_base_model


def test_dropout_acts_in_training_and_not_in_evaluation(tiny_folders: dict[str, Path]) -> None:
    config = RunConfig.from_settings(model_name=str(tiny_folders["distilbert"]), max_length=32, dropout=0.3)
    classifier = build_classifier(config, find_base_model(config), ["bad", "good"], torch.float32)
    module = FineTuning(classifier, config.training, SingleLabel(["bad", "good"]), total_steps=1)
    ids, mask = torch.arange(1000, 1020)[None], torch.ones(1, 20, dtype=torch.long)
    assert not torch.equal(module.classifier(ids, mask), module.classifier(ids, mask))
    module.eval()
    assert torch.equal(module.classifier(ids, mask), module.classifier(ids, mask))


def test_an_evaluation_that_is_not_finite_fails(tiny_folders: dict[str, Path]) -> None:
    """A single text's loss counts: a mean that leaves it out would hide it."""
    config = RunConfig.from_settings(model_name=str(tiny_folders["distilbert"]), max_length=32)
    classifier = build_classifier(config, find_base_model(config), ["bad", "good"], torch.float32)
    module = FineTuning(classifier, config.training, SingleLabel(["bad", "good"]), total_steps=1)
    logits = torch.tensor([[0.0, 1.0], [math.nan, 0.0]])
    module.classifier.logits = lambda *_: logits  # type: ignore[method-assign]
    module.validation_step({"labels": torch.tensor([1, 0]), "rows": torch.arange(2)})
    with pytest.raises(TrainingFailed, match="the loss is not finite in validation: lower --learning_rate"):
        module.on_validation_epoch_end()


def test_a_run_that_continues_with_other_kernels_says_so(
    tiny_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = RunConfig.from_settings(model_name=str(tiny_folders["distilbert"]), max_length=32)
    classifier = build_classifier(config, find_base_model(config), ["bad", "good"], torch.float32)
    task = SingleLabel(["bad", "good"])
    before, after = (
        FineTuning(classifier, config.training, task, 1, {}, kernels) for kernels in ("compiled", "no: why")
    )
    checkpoint: dict[str, Any] = {"state_dict": {}, "global_step": 1}
    before.on_save_checkpoint(checkpoint)
    before.on_load_checkpoint(checkpoint)
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("continuing after step 1 of 1\n", "")
    after.on_load_checkpoint(checkpoint)
    line = "warning: the run's CPU kernels were: compiled; now: no: results will not be bit-identical\n"
    assert capsys.readouterr().err == line
