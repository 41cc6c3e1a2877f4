"""The Lightning module that trains a classifier.

The loss of a batch is the sum over its texts times the batch's ``loss_weight``. So the gradient of a step is the mean
over all texts of the step, however they are spread over batches and ranks.
"""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from finetuning.errors import TrainingFailed, say
from finetuning.models.classifier import Classifier
from finetuning.models.frozen_outputs import FrozenOutputs
from finetuning.models.merged import drop_merged, keep_merged
from finetuning.processes import is_helper
from finetuning.runs.files import NOT_FINITE
from finetuning.settings import TrainingSettings
from finetuning.training.averaging import Averaging
from finetuning.training.callbacks import ADVICE, GracefulStop, of_all_ranks
from finetuning.training.checkpoints import check_best, only_tensors
from finetuning.training.optimization import make_optimizer, make_scheduler
from finetuning.training.tasks import Task

Batch = dict[str, Any]  # as the loaders of finetuning/data/batches.py make it
Predictions = tuple[np.ndarray, np.ndarray, np.ndarray]


class FineTuning(pl.LightningModule):
    """Trains a classifier. Its checkpoints contain the trained weights but no frozen weights."""

    def __init__(
        self,
        classifier: Classifier,
        training: TrainingSettings,
        task: Task,
        total_steps: int,
        frozen: dict[str, FrozenOutputs] | None = None,
        kernels: str = "",
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.settings = training
        self.task = task
        # The trainer's estimated_stepping_batches is not used: reading it before a checkpoint is loaded makes
        # Lightning lose the position in the epoch.
        self.total_steps = total_steps
        self.frozen = frozen or {}  # split -> outputs of frozen layers, reused in every epoch
        self.kernels = kernels  # see ``kernels_used``; a run that continues with others is not bit-identical
        self.strict_loading = False  # checkpoints do not contain the base model
        self.mean_loss = MeanMetric(nan_strategy="disable")  # of the present evaluation; by default it would skip NaN
        self.scores: dict[str, dict[str, float]] = {}  # split -> metric -> value, from the latest evaluation
        self.predictions: dict[str, Predictions] = {}  # split -> rows, labels, logits, from the latest evaluation
        self.averaging: Averaging | None = None  # from the start of training on, if the run asks for it
        self._averages: dict[str, Any] | None = None  # of the checkpoint to continue from
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        # A loaded model is in evaluation mode, and Lightning does not change that, so dropout would stay off.
        self.train()

    def on_train_start(self) -> None:
        self._continue_outputs()
        if self.settings.average != "none":
            self.averaging = Averaging(self.settings.average, self._trained, self.total_steps)
            if self._averages is not None:
                self.averaging.load(self._averages)

    def _continue_outputs(self) -> None:
        """Computes the outputs of frozen layers that an interrupted run had, from the batches that made them.

        In other batches their last bits would differ, and so would the trained weights.
        """
        outputs = self.frozen.get("train")
        loader: Any = self.trainer.train_dataloader
        if outputs is not None and not self.trainer.should_stop:  # patience may have ended the training
            callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
            stops = [callback for callback in callbacks if isinstance(callback, GracefulStop)]
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                for batch in loader.first_batches(self.trainer.global_step * self.settings.accumulate):
                    for stop in stops:  # an epoch may take minutes
                        stop.check(self.trainer)
                    self.classifier.logits(batch, outputs)

    @property
    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def training_step(self, batch: Batch) -> Tensor:
        logits = self.classifier.logits(batch, self.frozen.get("train"))
        loss_sum = self.task.training_loss(logits, batch["labels"])
        return {"loss": loss_sum * batch["loss_weight"], "mean_loss": loss_sum.detach() / len(logits)}  # type: ignore[return-value]

    def optimizer_step(self, *arguments: Any, **named: Any) -> None:
        super().optimizer_step(*arguments, **named)
        if self.averaging is not None:  # before callbacks write a checkpoint
            self.averaging.update(self.trainer.global_step + 1)  # Lightning counts the step after this

    def validation_step(self, batch: Batch) -> None:
        self._evaluation_step(batch, "validation")

    def test_step(self, batch: Batch) -> None:
        self._evaluation_step(batch, "test")

    def on_validation_start(self) -> None:
        self.swap_average()
        keep_merged(self.classifier.model)

    def on_test_start(self) -> None:
        keep_merged(self.classifier.model)

    def on_validation_end(self) -> None:
        drop_merged(self.classifier.model)
        self.swap_average()

    def on_test_end(self) -> None:
        drop_merged(self.classifier.model)

    def swap_average(self) -> None:
        """Exchanges the trained weights and their averages, if the run has any. A second call undoes it."""
        if self.averaging is not None:
            self.averaging.swap()

    def take_average(self) -> None:
        """Replaces the trained weights by their averages, if the run has any."""
        if self.averaging is not None:
            self.averaging.swap()
        elif self._averages is not None:  # continued after the last step, so training did not start
            self.load_state_dict(self._averages["weights"], strict=False)

    def on_validation_epoch_end(self) -> None:
        self._end_evaluation("validation")

    def on_test_epoch_end(self) -> None:
        self._end_evaluation("test")

    def _evaluation_step(self, batch: Batch, split: str) -> None:
        logits = self.classifier.logits(batch, self.frozen.get(split))
        self.mean_loss.update(self.task.losses(logits, batch["labels"]))
        self._parts.append((batch["rows"], batch["labels"], logits))

    def _end_evaluation(self, split: str) -> None:
        loss = float(self.mean_loss.compute())  # over all ranks
        self.mean_loss.reset()
        if not math.isfinite(loss):
            raise TrainingFailed(f"{NOT_FINITE} in {split}: {ADVICE}")
        parts = [torch.cat(column).cpu().numpy() for column in zip(*self._parts, strict=True)] if self._parts else []
        self._parts = []
        self.predictions[split] = _gather(parts)
        _, labels, logits = self.predictions[split]
        if split == "validation":
            self.task.tune(labels, logits)
        self.scores[split] = all_scores(self.task, labels, logits, loss)
        for name, value in self.scores[split].items():
            self.log(f"{split}_{name}", value, prog_bar=name == self.settings.monitor, logger=False)

    def configure_optimizers(self) -> Any:
        fused = self.classifier.dtype != torch.float16  # with fp16, a fused step unscales by itself: too late to clip
        optimizer = make_optimizer(self._trained, self.settings, fused)
        scheduler = make_scheduler(optimizer, self.settings, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = {f"classifier.model.{name}" for name in self.classifier.saved_parameters()}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}
        if self.averaging is not None:
            checkpoint["average"] = self.averaging.state()
        # load_best restores the scores and predictions of the best epoch from here.
        checkpoint["kernels"] = _kind(self.kernels)
        checkpoint["scores"] = dict(self.scores)
        threshold = self.task.rule.threshold
        checkpoint["decoding"] = {} if threshold is None else {"threshold": threshold}
        checkpoint["predictions"] = {s: tuple(map(torch.from_numpy, p)) for s, p in self.predictions.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        before, now = checkpoint["kernels"], _kind(self.kernels)
        if before != now and not is_helper():
            text = f"the run's CPU kernels were: {before}; now: {now}: results will not be bit-identical"
            print(f"warning: {text}", file=sys.stderr)
        if not is_helper():
            say(f"continuing after step {checkpoint['global_step']}")
        self._averages = checkpoint.get("average")
        self._restore(checkpoint)

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        self.scores = dict(checkpoint["scores"])
        self.task.rule = replace(self.task.rule, **checkpoint["decoding"])
        self.predictions = {s: tuple(t.numpy().copy() for t in p) for s, p in checkpoint["predictions"].items()}

    def record(self, split: str) -> dict[str, Any]:
        """The scores of the latest evaluation of a split, and their details by class."""
        _, labels, logits = self.predictions[split]
        return self.scores[split] | self.task.details(labels, logits)

    def load_best(self, path: Path) -> int:
        """Loads the weights of the best checkpoint, or their averages, and its scores on validation.

        Returns:
            Its epoch, counted from 1.
        """
        check_best(path)
        with only_tensors(path):
            # mapped: read into the weights without a copy in memory
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        averages = checkpoint.get("average", {}).get("weights", {})
        self.load_state_dict(checkpoint["state_dict"] | averages, strict=False)
        self._restore(checkpoint)
        return int(checkpoint["epoch"]) + 1


def all_scores(task: Task, labels: np.ndarray, logits: np.ndarray, loss: float) -> dict[str, float]:
    """The metrics of a split and its loss, as ``result.json`` orders them."""
    found = task.scores(labels, logits)
    return {"accuracy": found.pop("accuracy"), "loss": loss} | found


def _kind(kernels: str) -> str:
    """The text of ``kernels_used`` without the reason, which may be what a compiler says."""
    return kernels.partition(":")[0]


def _gather(parts: list[np.ndarray]) -> Predictions:
    """Rows, labels and logits of all ranks, sorted by row."""
    every = [each for each in of_all_ranks(parts) if each]
    rows, labels, logits = (np.concatenate(column) for column in zip(*every, strict=True))
    order = np.argsort(rows, kind="stable")
    return rows[order], labels[order], logits[order]
