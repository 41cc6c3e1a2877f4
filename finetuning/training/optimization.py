"""Optimizers and learning-rate schedules."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from finetuning.settings import TrainingSettings


def make_optimizer(
    parameters: list[torch.nn.Parameter], training: TrainingSettings, fused: bool
) -> torch.optim.Optimizer:
    """The optimizer; weight decay acts on matrices, not on biases and norms (as BERT was trained)."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    rate, momentum = training.learning_rate, training.momentum or 0.0
    make: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adam": lambda: torch.optim.Adam(groups, lr=rate, fused=fused),
        "adamw": lambda: torch.optim.AdamW(groups, lr=rate, fused=fused),
        "sgd": lambda: torch.optim.SGD(groups, lr=rate, momentum=momentum, fused=fused),
        "sgd_nesterov": lambda: torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=True, fused=fused),
    }
    return make[training.optimizer]()


def make_scheduler(optimizer: torch.optim.Optimizer, training: TrainingSettings, total_steps: int) -> LRScheduler:
    """The schedule, to be stepped once an optimizer step.

    OneCycleLR would by default also replace the momentum, and Adam's first beta: that is off.
    """
    if training.scheduler == "onecycle":
        rates = [group["lr"] for group in optimizer.param_groups]
        rising = min(training.warmup_fraction + 1e-9, 1.0)  # torch divides by steps * rising - 1
        return OneCycleLR(optimizer, rates, total_steps, pct_start=rising, cycle_momentum=False)
    warmup = min(math.ceil(training.warmup_fraction * total_steps), total_steps - 1)  # the first step of one trains
    return LambdaLR(optimizer, partial(_rate_factor, training.scheduler, warmup, total_steps))


def _rate_factor(scheduler: str, warmup: int, total: int, step: int) -> float:
    """The share of the peak rate at a step: up to 1 in a line, then level, or down to 0 in a line or half a cosine."""
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[scheduler]
