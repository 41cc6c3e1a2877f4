"""The Lightning module that trains a classifier.

The loss of a batch is the sum over its texts times the batch's ``loss_weight``. So the gradient of a step is the mean
over all texts of the step, however they are spread over batches and ranks.
"""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from finetuning.errors import TrainingFailed
from finetuning.models.classifier import Classifier
from finetuning.models.frozen_outputs import FrozenOutputs
from finetuning.runs.files import NOT_FINITE
from finetuning.settings import TrainingSettings
from finetuning.training.callbacks import ADVICE
from finetuning.training.optimization import make_optimizer, make_scheduler

Batch = dict[str, Any]  # as the loaders of finetuning/data/batches.py make it
Predictions = tuple[np.ndarray, np.ndarray, np.ndarray]


class FineTuning(pl.LightningModule):
    """Trains a classifier. Its checkpoints contain the trained weights but no frozen weights."""

    def __init__(
        self,
        classifier: Classifier,
        training: TrainingSettings,
        class_count: int,
        total_steps: int,
        frozen: dict[str, FrozenOutputs] | None = None,
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.settings = training
        # The trainer's estimated_stepping_batches is not used: reading it before a checkpoint is loaded makes
        # Lightning lose the position in the epoch.
        self.total_steps = total_steps
        self.frozen = frozen or {}  # split -> outputs of frozen layers, reused in every epoch
        self.strict_loading = False  # checkpoints do not contain the base model
        # Without validate_args: to look at the labels' values a GPU has to be waited for at every batch.
        metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(class_count, average="micro", validate_args=False),
                "macro_f1": MulticlassF1Score(class_count, average="macro", validate_args=False),
                "loss": MeanMetric(nan_strategy="disable"),  # by default it would skip NaN
            },
            compute_groups=False,
        )
        self.metrics = torch.nn.ModuleDict({split: metrics.clone() for split in ("validation", "test")})
        self.scores: dict[str, dict[str, float]] = {}  # split -> metric -> value, from the latest evaluation
        self.predictions: dict[str, Predictions] = {}  # split -> rows, labels, logits, from the latest evaluation
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        # A loaded model is in evaluation mode, and Lightning does not change that, so dropout would stay off.
        self.train()

    def training_step(self, batch: Batch) -> Tensor:
        logits = self.classifier.logits(batch, self.frozen.get("train"))
        loss_sum = cross_entropy(logits, batch["labels"], reduction="sum")
        return {"loss": loss_sum * batch["loss_weight"], "mean_loss": loss_sum.detach() / len(logits)}  # type: ignore[return-value]

    def validation_step(self, batch: Batch) -> None:
        self._evaluation_step(batch, "validation")

    def test_step(self, batch: Batch) -> None:
        self._evaluation_step(batch, "test")

    def on_validation_epoch_end(self) -> None:
        self._end_evaluation("validation")

    def on_test_epoch_end(self) -> None:
        self._end_evaluation("test")

    def _evaluation_step(self, batch: Batch, split: str) -> None:
        logits = self.classifier.logits(batch, self.frozen.get(split))
        labels, metrics = batch["labels"], self.metrics[split]
        metrics["accuracy"].update(logits, labels)  # type: ignore[index]
        metrics["macro_f1"].update(logits, labels)  # type: ignore[index]
        metrics["loss"].update(cross_entropy(logits, labels, reduction="none"))  # type: ignore[index]
        self._parts.append((batch["rows"], labels, logits))

    def _end_evaluation(self, split: str) -> None:
        metrics = self.metrics[split]
        values = metrics.compute()  # type: ignore[operator]
        metrics.reset()  # type: ignore[operator]
        self.scores[split] = {name: float(value) for name, value in values.items()}
        if not math.isfinite(self.scores[split]["loss"]):
            raise TrainingFailed(f"{NOT_FINITE} in {split}: {ADVICE}")
        parts = [torch.cat(column).cpu().numpy() for column in zip(*self._parts, strict=True)] if self._parts else []
        self._parts = []
        self.predictions[split] = _gather(parts)
        for name, value in values.items():
            self.log(f"{split}_{name}", value, prog_bar=name == self.settings.monitor, logger=False)

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        fused = self.classifier.dtype != torch.float16  # with fp16, a fused step unscales by itself: too late to clip
        optimizer = make_optimizer(parameters, self.settings, fused)
        scheduler = make_scheduler(optimizer, self.settings, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = {f"classifier.model.{name}" for name in self.classifier.saved_parameters()}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}
        # load_best restores the scores and predictions of the best epoch from here.
        checkpoint["scores"] = dict(self.scores)
        checkpoint["predictions"] = {s: tuple(map(torch.from_numpy, p)) for s, p in self.predictions.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.scores = dict(checkpoint["scores"])
        self.predictions = {s: tuple(t.numpy() for t in p) for s, p in checkpoint["predictions"].items()}

    def load_best(self, path: Path) -> None:
        """Loads the weights and the validation scores of the best checkpoint."""
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        self.load_state_dict(checkpoint["state_dict"], strict=False)
        self.on_load_checkpoint(checkpoint)


def _gather(parts: list[np.ndarray]) -> Predictions:
    """Rows, labels and logits of all ranks, sorted by row."""
    gathered = [parts]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gathered = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(gathered, parts)
    rows, labels, logits = (np.concatenate(column) for column in zip(*(g for g in gathered if g), strict=True))
    order = np.argsort(rows, kind="stable")
    return rows[order], labels[order], logits[order]
