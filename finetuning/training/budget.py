"""How much a run trains, if the flags do not say it: texts a batch, epochs, patience. Nothing here imports torch.

The rule:

* Fewer than 1,000 training texts: 16 texts a batch. Up to 10,000: 32. From there on: 64.
* 5 epochs; 2 if there are 10,000 texts or more.
* More epochs if that would be fewer than 300 steps, or 10 steps a class; multi-label: 50 a label. At most 50 epochs.
* If 64 texts a batch would need more epochs, 32.

docs/budget.md has the runs on which it rests, and what it gives.
"""

import math
from typing import Any

import numpy as np

from finetuning.settings import TrainingSettings

STEPS = 300
STEPS_A_CLASS = 10
STEPS_A_LABEL = 50  # multi-label data: rare labels are learned last
FEW, MANY = 1_000, 10_000  # training texts
LEAST_EPOCHS, MOST_EPOCHS = 5, 50
PATIENCE = 0  # the learning rate falls to 0 in the last epoch, so stopping earlier costs accuracy


def training_budget(settings: TrainingSettings, labels: np.ndarray, classes: int, processes: int = 1) -> dict[str, Any]:
    """The values of ``batch_size``, ``epochs`` and ``patience`` that the flags leave to the data.

    Args:
        settings: ``None`` in one of these fields means "not given".
        labels, classes, processes: as in ``automatic_epochs``.
    """
    texts = len(labels)

    def epochs(batch_size: int) -> int:
        return automatic_epochs(batch_size * settings.accumulate, labels, classes, processes)

    batch_size = 16 if texts < FEW else 32 if texts < MANY or epochs(64) > _least_epochs(texts) else 64
    chosen = {"batch_size": batch_size, "epochs": epochs(settings.batch_size or batch_size), "patience": PATIENCE}
    return {name: value for name, value in chosen.items() if getattr(settings, name) is None}


def automatic_epochs(batch: int, labels: np.ndarray, classes: int, processes: int = 1) -> int:
    """The epochs of the rule.

    Args:
        batch: texts that a process takes for a step.
        labels: of the training texts: (n,), or multi-label (n, names).
        classes: the number of classes or labels.
        processes: how many processes share each step.
    """
    steps = max(STEPS, (STEPS_A_CLASS if labels.ndim == 1 else STEPS_A_LABEL) * classes)
    steps_per_epoch = math.ceil(len(labels) / (batch * processes))
    return min(max(_least_epochs(len(labels)), math.ceil(steps / steps_per_epoch)), MOST_EPOCHS)


def _least_epochs(texts: int) -> int:
    return LEAST_EPOCHS if texts < MANY else 2
