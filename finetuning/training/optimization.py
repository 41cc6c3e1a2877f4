"""Optimizers and learning-rate schedules."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from finetuning.settings import TrainingSettings


def make_optimizer(
    parameters: Mapping[str, torch.nn.Parameter], training: TrainingSettings, fused: bool
) -> torch.optim.Optimizer:
    """The optimizer of these parameters, by name.

    ``fused`` is one kernel for all weights. Without it, each operation still takes all weights at once.
    """
    groups = parameter_groups(parameters, training)
    rate, momentum = training.learning_rate, training.momentum or 0.0
    how: dict[str, Any] = {"fused": True} if fused else {"foreach": True}
    make: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adam": lambda: torch.optim.Adam(groups, lr=rate, **how),
        "adamw": lambda: torch.optim.AdamW(groups, lr=rate, **how),
        "sgd": lambda: torch.optim.SGD(groups, lr=rate, momentum=momentum, **how),
        "sgd_nesterov": lambda: torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=True, **how),
    }
    return make[training.optimizer]()


def parameter_groups(parameters: Mapping[str, torch.nn.Parameter], training: TrainingSettings) -> list[dict[str, Any]]:
    """The parameters in groups, each with its peak learning rate and weight decay; none is empty.

    As in BERT's training, weight decay acts on matrices but not on biases and norms. LoRA+ (Hayou et al. 2024,
    https://arxiv.org/abs/2402.12354) has the groups of PEFT's ``create_loraplus_optimizer``: B, DoRA's magnitudes, and
    the head's biases and norms have the larger rate; A and the head's matrices have the smaller one.
    """
    rate, decay, ratio = training.learning_rate, training.weight_decay, training.lora_plus_ratio
    larger = rate if ratio is None else rate * ratio
    fast = ("lora_B", "lora_magnitude_vector") if ratio is not None else ()
    of_B = {name: p for name, p in parameters.items() if name.endswith(fast)}
    others = {name: p for name, p in parameters.items() if name not in of_B}
    groups = [
        {"params": [p for p in others.values() if p.ndim > 1], "lr": rate, "weight_decay": decay},
        {"params": list(of_B.values()), "lr": larger, "weight_decay": decay},
        {"params": [p for p in others.values() if p.ndim <= 1], "lr": larger, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_scheduler(optimizer: torch.optim.Optimizer, training: TrainingSettings, total_steps: int) -> LRScheduler:
    """The learning-rate schedule, to be stepped once per optimizer step.

    OneCycleLR's cycle of momentum (or Adam's first beta) is turned off.
    """
    if total_steps == 1:  # a run of one step must train
        return LambdaLR(optimizer, lambda _: 1.0)
    if training.scheduler == "onecycle":
        rates = [group["lr"] for group in optimizer.param_groups]
        rising = min(training.warmup_fraction + 1e-9, 1 - 1e-9)  # torch divides by steps * rising - 1 and by the rest
        return OneCycleLR(optimizer, rates, total_steps, pct_start=rising, cycle_momentum=False)
    warmup = min(math.ceil(training.warmup_fraction * total_steps), total_steps - 1)
    return LambdaLR(optimizer, partial(_rate_factor, training.scheduler, warmup, total_steps))


def _rate_factor(scheduler: str, warmup: int, total: int, step: int) -> float:
    """The fraction of the peak rate at a step: a linear warm-up to 1, then constant, linear to 0, or cosine to 0."""
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[scheduler]
