"""Compares the memory that training will need with what is free, before the first step.

The estimate has what is certain: gradients, the optimizer's state, what the largest batch keeps for backward, and kept
outputs of frozen layers. The batch is measured with a few of its texts, so the check itself needs little memory. On a
GPU, where the classifier is not yet, only gradients and optimizer count.
"""

import torch

from finetuning.data.batches import TokenBatchLoader
from finetuning.errors import TrainingFailed
from finetuning.models.classifier import Classifier
from finetuning.models.frozen_outputs import FrozenOutputs
from finetuning.runs.measurements import free_memory
from finetuning.settings import TrainingSettings
from finetuning.training.estimate import kept_for_backward
from finetuning.training.hardware import Hardware

MEASURED_TEXTS = 8
OPTIMIZER_COPIES = {"adam": 2, "adamw": 2, "sgd": 0, "sgd_nesterov": 1}  # of each trained weight; sgd without momentum


def check_memory(
    classifier: Classifier,
    loader: TokenBatchLoader,
    training: TrainingSettings,
    hardware: Hardware,
    frozen: dict[str, FrozenOutputs],
) -> None:
    """Checks that training will fit into the free memory.

    Raises:
        TrainingFailed: it will not; the line says what would fit.
    """
    free = torch.cuda.mem_get_info(hardware.device)[0] if hardware.on_gpu else free_memory()
    if free is None:
        return
    copies = 1 + OPTIMIZER_COPIES[training.optimizer] + int(training.optimizer == "sgd" and bool(training.momentum))
    fixed = copies * sum(p.numel() * p.element_size() for p in classifier.parameters() if p.requires_grad)
    fixed += sum(outputs.bytes for outputs in frozen.values() if not outputs.on_disk)
    batch = 0 if hardware.on_gpu else largest_batch_bytes(classifier, loader)
    if fixed + batch <= free:
        return
    raise TrainingFailed(
        f"training needs about {_gib(fixed + batch)} more memory, but only {_gib(free)} are free:"
        f" {advice(fixed, batch, free, training.batch_tokens, classifier.checkpointing)}; --force starts anyway"
    )


def largest_batch_bytes(classifier: Classifier, loader: TokenBatchLoader) -> int:
    """What the largest batch keeps for backward, from a few of its texts. Draws nothing from the random generators."""
    batch, times = loader.part_of_largest(MEASURED_TEXTS)
    with torch.random.fork_rng(devices=[]):
        return int(times * kept_for_backward(classifier, batch))


def advice(fixed: int, batch: int, free: int, batch_tokens: int, checkpointing: bool) -> str:
    """What would fit.

    Args:
        fixed: bytes that do not depend on the batch.
        batch: bytes of a batch of ``batch_tokens``.
        free: bytes that are free.
        batch_tokens: the run's largest batch, in tokens.
        checkpointing: whether the run already has ``--gradient_checkpointing``.
    """
    fitting = int(batch_tokens * (free - fixed) / batch) // 64 * 64 if batch else 0
    if fitting >= 64:
        return f"--batch_tokens {fitting} would fit"
    if batch and not checkpointing:
        return "use --gradient_checkpointing True, a shorter --max_length or a smaller model"
    return "use --method lora or a smaller model"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
