"""Lightning module, optimizers, schedulers, the table of default learning rates, hardware, the trainer.

The loss of a batch is a sum over its texts, multiplied by the weight that the loader gives with it, so that the
gradient of a step is the mean over all texts of the step, however they are spread over batches and ranks.
"""

import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from finetuning.models.frozen_outputs import FrozenOutputs
from finetuning.runs.files import BEST_CHECKPOINT, NOT_FINITE
from finetuning.settings import RunConfig, UserError
from finetuning.training.callbacks import (
    ADVICE,
    BestCheckpoint,
    PatientStop,
    ProgressBar,
    ProgressLines,
    TrainingFailed,
)
from local_model_utilities import Classifier, saved_parameters

Batch = dict[str, Tensor]
Predictions = tuple[np.ndarray, np.ndarray, np.ndarray]

# Peak learning rates where --learning_rate is not given: about ten times higher for LoRA than for all weights,
# and far higher for SGD, whose step is not scaled by the size of past gradients.
DEFAULT_LEARNING_RATES: dict[tuple[str, str], float] = {
    ("lora", "adam"): 1e-3,
    ("lora", "adamw"): 1e-3,
    ("lora", "sgd"): 0.5,
    ("lora", "sgd_nesterov"): 0.1,
    ("full", "adam"): 1e-4,
    ("full", "adamw"): 1e-4,
    ("full", "sgd"): 0.1,
    ("full", "sgd_nesterov"): 0.02,
    ("selective", "adam"): 5e-4,
    ("selective", "adamw"): 5e-4,
    ("selective", "sgd"): 0.1,
    ("selective", "sgd_nesterov"): 0.02,
}


# ---------------------------------------------------------------------------------------------------------------------
# hardware


@dataclass(frozen=True)
class Hardware:
    """Where a run takes place, and the precision of its products."""

    accelerator: Literal["cpu", "gpu"]
    devices: int | list[int]
    dtype: torch.dtype

    @property
    def on_gpu(self) -> bool:
        return self.accelerator == "gpu"


def resolve_hardware(config: RunConfig) -> Hardware:
    """Asks the machine what ``auto`` means.

    Raises:
        UserError: a GPU that is not there, a precision that the hardware does not have, or no strategy's name.
    """
    _check_tasks(config)
    strategies = ["auto", *StrategyRegistry.available_strategies()]
    if config.strategy not in strategies:
        raise UserError(f"--strategy {config.strategy}: allowed are {', '.join(strategies)}")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = config.accelerator == "gpu" or config.device is not None
    if wanted and not gpus:
        flag = f"--device {config.device}" if config.device is not None else "--accelerator gpu"
        raise UserError(f"{flag}: this machine has no CUDA GPU; use --accelerator cpu")
    if config.device is not None and config.device >= gpus:
        raise UserError(f"--device {config.device}: this machine has {gpus} GPU(s), numbered from 0")
    on_gpu = wanted or (config.accelerator == "auto" and gpus > 0)
    if on_gpu and config.devices > gpus:
        raise UserError(f"--devices {config.devices}: this machine has {gpus} GPU(s)")
    devices: int | list[int] = [config.device] if config.device is not None else config.devices
    return Hardware("gpu" if on_gpu else "cpu", devices, _resolve_dtype(config, on_gpu))


def _check_tasks(config: RunConfig) -> None:
    """Under SLURM, Lightning waits for processes that SLURM was not asked to start, without end."""
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if SLURMEnvironment.detect() and tasks != config.devices * config.num_nodes:
        raise UserError(
            f"--devices {config.devices} --num_nodes {config.num_nodes}: SLURM started {tasks} task(s), not"
            f" {config.devices * config.num_nodes}; use srun, and sbatch --nodes={config.num_nodes}"
            f" --ntasks-per-node={config.devices}"
        )


def _resolve_dtype(config: RunConfig, on_gpu: bool) -> torch.dtype:
    """bf16 where the hardware multiplies it fast, fp16 on GPUs that are older, else fp32."""
    precision = config.precision
    if precision == "fp16" and not on_gpu:
        raise UserError("--precision fp16 needs a GPU: on a CPU use bf16 or fp32")
    if precision != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    if on_gpu:
        with torch.cuda.device(config.device or 0):  # of two cards, one may be older
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    fast = any(
        getattr(torch.cpu, name, lambda: False)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
    return torch.bfloat16 if fast else torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# optimizer and schedule


def resolve_learning_rate(config: RunConfig) -> float:
    """``--learning_rate``, or the table's for this method and optimizer."""
    return config.learning_rate or DEFAULT_LEARNING_RATES[config.method, config.optimizer]


def make_optimizer(parameters: list[torch.nn.Parameter], config: RunConfig, fused: bool) -> torch.optim.Optimizer:
    """The optimizer; weight decay acts on matrices, not on biases and norms (as BERT was trained)."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    rate = resolve_learning_rate(config)
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=rate, fused=fused)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate, fused=fused)
    nesterov = config.optimizer == "sgd_nesterov"
    return torch.optim.SGD(groups, lr=rate, momentum=config.momentum or 0.0, nesterov=nesterov, fused=fused)


def make_scheduler(optimizer: torch.optim.Optimizer, config: RunConfig, total_steps: int) -> LRScheduler:
    """The schedule, to be stepped once an optimizer step.

    OneCycleLR would by default also replace the momentum, and Adam's first beta: that is off.
    """
    assert config.warmup_fraction is not None
    if config.scheduler == "onecycle":
        rates = [group["lr"] for group in optimizer.param_groups]
        rising = min(config.warmup_fraction + 1e-9, 1.0)  # torch divides by steps * rising - 1
        return OneCycleLR(optimizer, rates, total_steps, pct_start=rising, cycle_momentum=False)
    warmup = min(math.ceil(config.warmup_fraction * total_steps), total_steps - 1)  # the first step of one trains
    return LambdaLR(optimizer, partial(_rate_factor, config.scheduler, warmup, total_steps))


def _rate_factor(scheduler: str, warmup: int, total: int, step: int) -> float:
    """The share of the peak rate at a step: up to 1 in a line, then level, or down to 0 in a line or half a cosine."""
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[scheduler]


# ---------------------------------------------------------------------------------------------------------------------
# the module


class FineTuning(pl.LightningModule):
    """Trains a classifier; its checkpoints hold what is trained and no base weights."""

    def __init__(
        self,
        classifier: Classifier,
        config: RunConfig,
        class_count: int,
        total_steps: int,
        frozen: dict[str, FrozenOutputs] | None = None,
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.config = config
        # Not the trainer's estimated_stepping_batches: to ask for that before a checkpoint is read makes Lightning
        # forget the place in the epoch at which the loader is to go on.
        self.total_steps = total_steps
        self.frozen = frozen or {}  # split -> outputs of frozen layers, kept from epoch to epoch
        self.strict_loading = False  # checkpoints lack the base model
        metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(class_count, average="micro"),
                "macro_f1": MulticlassF1Score(class_count, average="macro"),
                "loss": MeanMetric(nan_strategy="disable"),  # else it leaves out what is not finite
            },
            compute_groups=False,
        )
        self.metrics = torch.nn.ModuleDict({split: metrics.clone() for split in ("validation", "test")})
        self.scores: dict[str, dict[str, float]] = {}  # split -> metric -> value, of the latest evaluation
        self.predictions: dict[str, Predictions] = {}  # split -> rows, labels, logits of the latest evaluation
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        # A loaded model is in evaluation mode, and Lightning leaves it there: without this no dropout would act.
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
            self.log(f"{split}_{name}", value, prog_bar=name == self.config.monitor, logger=False)

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        fused = self.classifier.dtype != torch.float16  # fused steps unscale by themselves: no clipping then
        optimizer = make_optimizer(parameters, self.config, fused)
        scheduler = make_scheduler(optimizer, self.config, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = {f"classifier.model.{name}" for name in saved_parameters(self.classifier)}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}
        # A checkpoint that is chosen later brings the validation that it was chosen for.
        checkpoint["scores"] = dict(self.scores)
        checkpoint["predictions"] = {s: tuple(map(torch.from_numpy, p)) for s, p in self.predictions.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.scores = dict(checkpoint["scores"])
        self.predictions = {s: tuple(t.numpy() for t in p) for s, p in checkpoint["predictions"].items()}

    def load_best(self, path: Path) -> None:
        """Takes the weights and the validation of the best checkpoint."""
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        self.load_state_dict(checkpoint["state_dict"], strict=False)
        self.on_load_checkpoint(checkpoint)


def leave_process_group() -> None:
    """Ends the threads by which processes speak; one that runs on while its process ends may abort it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _gather(parts: list[np.ndarray]) -> Predictions:
    """Rows, labels and logits of all ranks, in the order of the rows."""
    gathered = [parts]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gathered = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(gathered, parts)
    rows, labels, logits = (np.concatenate(column) for column in zip(*(g for g in gathered if g), strict=True))
    order = np.argsort(rows, kind="stable")
    return rows[order], labels[order], logits[order]


# ---------------------------------------------------------------------------------------------------------------------
# the trainer


def make_trainer(config: RunConfig, hardware: Hardware, directory: Path, callbacks: list[Callback]) -> pl.Trainer:
    """Lightning's trainer: best and last checkpoint, early stopping, progress bar."""
    mode = "min" if config.monitor == "loss" else "max"
    monitor = f"validation_{config.monitor}"
    best = BestCheckpoint(
        dirpath=directory,
        filename=BEST_CHECKPOINT.removesuffix(".ckpt"),
        monitor=monitor,
        mode=mode,
        save_last=True,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    at_terminal = sys.stdout.isatty()
    refresh_rate = 20 if hardware.on_gpu else 1  # the loss that it shows waits for the device
    stopping = [PatientStop(monitor, patience=config.patience, mode=mode)] if config.patience else []
    return pl.Trainer(
        accelerator=hardware.accelerator,
        devices=hardware.devices,
        num_nodes=config.num_nodes,
        strategy=config.strategy,
        precision="16-mixed" if hardware.dtype == torch.float16 else "32-true",  # bf16 is the classifier's own affair
        max_epochs=config.epochs,
        accumulate_grad_batches=config.accumulate,
        gradient_clip_val=config.gradient_clip or None,
        callbacks=[
            *callbacks,
            *stopping,
            best,
            ProgressBar(refresh_rate) if at_terminal else ProgressLines(),
        ],
        logger=False,  # metrics.csv is the run's own history
        log_every_n_steps=10,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=at_terminal,
        default_root_dir=directory,
        # requeueing is the job script's: only one of the two may do it
        plugins=[SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else None,
    )


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keeps notes from users that are about Lightning and not about their run."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    notes = ("does not have many workers", "Checkpoint directory", "srun", "isinstance", "sync_dist=True")
    with warnings.catch_warnings():
        for note in notes:  # sync_dist: what is logged is equal on all ranks already
            warnings.filterwarnings("ignore", f".*{note}.*")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
