"""Compares the memory that training will need with what is free, before the first step.

The estimate has what is certain: gradients, the optimizer's state, an average of the weights, what the largest batch
keeps for backward, and kept outputs of frozen layers. The batch is measured with a few of its texts, so the check
itself needs little memory. On a GPU, where the classifier is not yet, its weights count, but no batch.
"""

import torch

from finetuning.data.batches import TokenBatchLoader
from finetuning.errors import TrainingFailed
from finetuning.models.classifier import Classifier
from finetuning.models.frozen_outputs import FrozenOutputs
from finetuning.runs.measurements import free_memory
from finetuning.settings import TrainingSettings
from finetuning.training.estimate import kept_for_backward

MEASURED_TEXTS = 8
OPTIMIZER_COPIES = {"adam": 2, "adamw": 2, "sgd": 0, "sgd_nesterov": 1}  # of each trained weight; sgd without momentum


def check_memory(
    classifier: Classifier,
    loader: TokenBatchLoader,
    training: TrainingSettings,
    device: torch.device,
    frozen: dict[str, FrozenOutputs],
    max_length: int,
    windows: int,
    processes: int,
    resumed: bool = False,
) -> None:
    """Checks that training will fit into the free memory.

    Args:
        classifier: the run's classifier, on the CPU.
        loader: the batches of this process.
        training: the optimizer.
        device: where this process will train.
        frozen: outputs of frozen layers that are kept.
        max_length, windows: the run's flags; ``--batch_tokens`` must reach their product.
        processes: the processes of the run on this machine, which share the main memory.
        resumed: whether the run is continued, so that its batches and what it trains are known.

    Raises:
        TrainingFailed: it will not; the line says what would fit.
    """
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else free_memory()
    if free is None:
        return
    free //= 1 if on_gpu else processes
    copies = 1 + OPTIMIZER_COPIES[training.optimizer] + int(training.optimizer == "sgd" and bool(training.momentum))
    copies += training.average != "none"
    fixed = copies * sum(p.nbytes for p in classifier.parameters() if p.requires_grad)
    if on_gpu:
        fixed += sum(t.nbytes for t in (*classifier.parameters(), *classifier.buffers()))
    constant, batch, tokens = (0, 0, 0) if on_gpu else largest_batch(classifier, loader)
    fixed, outputs = fixed + constant, sum(outputs.bytes for outputs in frozen.values() if not outputs.on_disk)
    if fixed + outputs + batch <= free:
        return
    can_recompute = not classifier.checkpointing and (classifier.efficient or classifier.family.checkpointing)
    if outputs and fixed + batch <= free:  # what is kept only saves time
        fitting = f"--frozen_cache_gb {(free - fixed - batch) * 10 // 2**30 / 10:g} would fit"
    elif resumed:
        fitting = f"{'use --gradient_checkpointing True, or ' if can_recompute else ''}free some memory"
    else:
        fitting = advice(fixed + outputs, batch, free, tokens, max_length, windows, can_recompute)
    raise TrainingFailed(
        f"training needs about {_gib(fixed + outputs + batch)} more memory, but only {_gib(free)} are free: {fitting};"
        " --force starts anyway"
    )


def largest_batch(classifier: Classifier, loader: TokenBatchLoader) -> tuple[int, int, int]:
    """Bytes that the largest batch keeps for backward, from a few of its texts, and its tokens.

    Some of the bytes do not grow with the texts, such as copies of trained weights in the precision of products. So two
    parts of different size are measured. Draws nothing from the random generators.

    Returns:
        Bytes that any batch keeps, bytes that grow with it, and tokens with padding.
    """
    with torch.random.fork_rng(devices=[]):
        part, times = loader.part_of_largest(MEASURED_TEXTS)
        kept, tokens = kept_for_backward(classifier, part), part["input_ids"].numel()
        if times == 1:
            return 0, kept, tokens
        part, _ = loader.part_of_largest(MEASURED_TEXTS // 2)
        each = max(0, kept - kept_for_backward(classifier, part)) / (tokens - part["input_ids"].numel())
    return max(0, int(kept - each * tokens)), int(each * times * tokens), round(times * tokens)


def advice(fixed: int, batch: int, free: int, tokens: int, max_length: int, windows: int, can_recompute: bool) -> str:
    """What would fit.

    Args:
        fixed: bytes that do not depend on the batch.
        batch: bytes of the largest batch.
        free: bytes that are free.
        tokens: tokens of that batch, with padding. If its texts are short, it has fewer than ``--batch_tokens``.
        max_length, windows: the run's flags.
        can_recompute: whether ``--gradient_checkpointing`` could be given.
    """
    fitting = int(tokens * (free - fixed) / batch) // 64 * 64 if batch else 0
    if fitting >= 64:
        shorter = f" --max_length {fitting // windows}" if fitting < windows * max_length else ""
        return f"--batch_tokens {fitting}{shorter} would fit"
    if batch and can_recompute and fixed <= free:
        return "use --gradient_checkpointing True, a shorter --max_length or a smaller model"
    return "train fewer weights, with --method lora, or use --q_lora True or a smaller model"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
