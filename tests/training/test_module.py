import copy
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor

from finetuning.config import RunConfig
from finetuning.data.batches import evaluation_loader, train_loader
from finetuning.data.tokens import TokenizedSplit
from finetuning.errors import Interrupted, TrainingFailed
from finetuning.models.lora import lora_modules
from finetuning.models.merged import drop_merged
from finetuning.training.callbacks import GracefulStop, Meter
from finetuning.training.module import FineTuning, _gather
from finetuning.training.tasks import SingleLabel
from finetuning.training.trainer import quiet_lightning
from local_model_utilities import build_classifier, find_base_model


def module_of(folder: Path, kernels: str = "", **settings: Any) -> FineTuning:
    config = RunConfig.from_settings(model_name=str(folder), max_length=32, **settings)
    classifier = build_classifier(config, find_base_model(config), ["bad", "good"], torch.float32)
    return FineTuning(classifier, config.training, SingleLabel(["bad", "good"]), total_steps=1, kernels=kernels)


def test_dropout_acts_in_training_and_not_in_evaluation(distilbert: Path) -> None:
    module = module_of(distilbert, dropout=0.3)
    ids, mask = torch.arange(1000, 1020)[None], torch.ones(1, 20, dtype=torch.long)
    assert not torch.equal(module.classifier(ids, mask), module.classifier(ids, mask))
    module.eval()
    assert torch.equal(module.classifier(ids, mask), module.classifier(ids, mask))


def test_a_signal_is_heard_while_frozen_outputs_are_computed_again(distilbert: Path) -> None:
    module, seen = module_of(distilbert, method="head"), list[int]()
    stop = GracefulStop(Path(), Meter(Path()), 0, 0)

    def first_batches(count: int) -> Iterator[dict[str, Tensor]]:
        for number in range(count):
            seen.append(number)
            stop.requested = number == 2
            yield {
                "input_ids": torch.ones(1, 4, dtype=torch.long),
                "attention_mask": torch.ones(1, 4, dtype=torch.long),
            }

    loader = SimpleNamespace(first_batches=first_batches)
    trainer: Any = SimpleNamespace(
        train_dataloader=loader, global_step=9, callbacks=[stop], world_size=1, should_stop=False
    )
    module._trainer = trainer
    module.frozen = {"train": cast(Any, SimpleNamespace())}
    module.classifier.logits = lambda *_: None  # type: ignore[method-assign,assignment]
    with pytest.raises(Interrupted):
        module._continue_outputs()
    assert seen == [0, 1, 2]
    trainer.should_stop = True  # patience has ended the training
    module._continue_outputs()
    assert seen == [0, 1, 2]


def test_an_evaluation_that_is_not_finite_fails(distilbert: Path) -> None:
    """A single text's loss counts: a mean that leaves it out would hide it."""
    module = module_of(distilbert)
    logits = torch.tensor([[0.0, 1.0], [math.nan, 0.0]])
    module.classifier.logits = lambda *_: logits  # type: ignore[method-assign]
    module.validation_step({"labels": torch.tensor([1, 0]), "rows": torch.arange(2)})
    with pytest.raises(TrainingFailed, match="the loss is not finite in validation: lower --learning_rate"):
        module.on_validation_epoch_end()


def test_a_run_that_continues_with_other_kernels_says_so(distilbert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = (module_of(distilbert, kernels) for kernels in ("compiled", "no: why"))
    checkpoint: dict[str, Any] = {"state_dict": {}, "global_step": 1}
    before.on_save_checkpoint(checkpoint)
    before.on_load_checkpoint(checkpoint)
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("continuing after step 1\n", "")
    after.on_load_checkpoint(checkpoint)
    line = "warning: the run's CPU kernels were: compiled; now: no: results will not be bit-identical\n"
    assert capsys.readouterr().err == line


class Compared(pl.Callback):
    """Compares the logits of each validation with those of the plain products."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.logits: list[Tensor] = []
        self.merged: list[bool] = []  # whether weights are kept: in each validation, after it

    def note(self, module: Any) -> None:
        self.merged.append(any(m.merged is not None for _, m in lora_modules(module.classifier.model)))

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        plain = copy.deepcopy(module.classifier)
        drop_merged(plain.model)
        found = module._parts[-1][2]
        torch.testing.assert_close(found, plain.logits(batch), rtol=self.tolerance, atol=self.tolerance)
        self.logits.append(found.clone())
        self.note(module)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.note(module)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 3e-2)])
@pytest.mark.parametrize("efficient", [True, False])
def test_validation_after_each_step_uses_the_weights_of_that_step(
    precision: str, tolerance: float, efficient: bool, bert: Path, tmp_path: Path
) -> None:
    config = RunConfig.from_settings(
        model_name=str(bert), max_length=32, batch_size=16, learning_rate=0.01, precision=precision,
        efficient=efficient, lora_query=True, lora_key=True, lora_mlp=True,
    )  # fmt: skip
    torch.manual_seed(0)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    classifier = build_classifier(config, find_base_model(config), ["bad", "good"], dtype)
    rows = np.arange(16)
    tokens = np.random.default_rng(0).integers(1000, 1100, 16 * 20)
    split = TokenizedSplit(tokens, 20 * np.arange(17), rows % 2, rows)
    module = FineTuning(classifier, config.training, SingleLabel(["bad", "good"]), total_steps=3)
    compared = Compared(tolerance)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=3, callbacks=[compared], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    loaders = train_loader(split, config.training, 0), evaluation_loader(split, config.training, 0)
    with quiet_lightning():
        trainer.fit(module, *loaders)
    assert compared.merged == [True, False] * 3
    first, second, third = compared.logits
    assert min((first - second).abs().max(), (second - third).abs().max()) > 2 * tolerance


def test_predictions_are_in_the_order_of_rows() -> None:
    rows, labels, logits = _gather([np.array([7, 3]), np.array([0, 1]), np.array([[0.7], [0.3]])])
    assert (rows.tolist(), labels.tolist(), logits.tolist()) == ([3, 7], [1, 0], [[0.3], [0.7]])
